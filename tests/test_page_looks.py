"""What goes wrong with a server, and how the page looks and feels."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers_page import FakeServer, Open, Refusal, ask, pieces, said, settled, until

pytest_plugins = ["fixtures_page"]
pytestmark = pytest.mark.xdist_group("page")


# ---- what goes wrong -----------------------------------------------------------------------------


def test_what_a_model_writes_is_only_text(visit: Open, fake: FakeServer) -> None:
    page = visit()
    evil = """<img src=x onerror="window.bad=1"> <script>window.bad=1</script> </script>
<svg/onload=bad()> [x](javascript:window.bad=1) [y](JaVaScRiPt:1) ![z](https://evil.example/a.png)
<https://a.example/"onmouseover=bad()> [q](https://a.example/\\"onclick=bad) <iframe src=//evil>

```html"><img src=x onerror=window.bad=1>
</code></pre><script>window.bad=1</script>
```
| <img src=x onerror=bad()> |
|---|
| <b>x</b> |
"""
    fake.reply = lambda body: pieces(evil, 5)
    ask(page, evil)
    page.reload()
    page.wait_for_selector(".assistant table")
    assert page.evaluate("window.bad") is None
    allowed = "div p a code span em strong del br button pre table thead tbody tr th td svg use"
    tags = page.evaluate(
        "[...new Set([...document.querySelectorAll('.prose *')].map((n) => n.localName))]"
    )
    assert set(tags) <= set(allowed.split())
    links = page.evaluate("[...document.querySelectorAll('.prose a')].map((a) => a.href)")
    assert links
    assert all(link.startswith("https://") for link in links)
    attributes = page.evaluate(
        "[...document.querySelectorAll('.prose a')].flatMap((a) => a.getAttributeNames())"
    )
    assert set(attributes) == {"href", "target", "rel"}
    assert "<iframe src=//evil>" in page.inner_text(".assistant")


@pytest.mark.parametrize(
    ("refusal", "title", "button"),
    [
        (Refusal(429, "busy", headers={"Retry-After": "2"}), "The server is busy", "Try again"),
        (Refusal(503, "the server is stopping"), "The server is stopping", "Try again"),
        (Refusal(500, "it broke"), "The server could not answer", "Try again"),
        (
            Refusal(400, "2100 tokens do not fit", "context_length_exceeded"),
            "This conversation is longer than the model can read",
            "Leave out the oldest question",
        ),
    ],
)
def test_refusals(visit: Open, fake: FakeServer, refusal: Refusal, title: str, button: str) -> None:
    page = visit(allow=f"status of {refusal.status}")
    ask(page, "one")

    def refuse(body: dict[str, Any]) -> list[str]:
        raise refusal

    fake.reply = refuse
    ask(page, "two")
    assert title in page.inner_text(".trouble strong")
    if refusal.status == 429:
        assert "2 s" in page.inner_text(".trouble")
    fake.reply = lambda body: ["fine"]
    page.click(f".trouble >> text={button}")
    settled(page)
    assert page.locator(".trouble").count() == 0
    assert said(page)[-2:] == ["two", "fine"]
    oldest = "two" if refusal.code else "one"
    assert fake.bodies[-1]["messages"][0]["content"] == oldest


def test_a_question_without_an_answer_joins_the_next(visit: Open, fake: FakeServer) -> None:
    page = visit(allow="status of 429")

    def busy(body: dict[str, Any]) -> list[str]:
        raise Refusal(429, "busy")

    fake.reply = busy
    ask(page, "one")
    fake.reply = lambda body: ["fine"]
    ask(page, "two")
    assert fake.bodies[-1]["messages"] == [{"role": "user", "content": "one\n\ntwo"}]
    assert said(page) == ["one", "two", "fine"]


def test_a_server_that_goes_away_and_comes_back(visit: Open, fake: FakeServer) -> None:
    page = visit(allow="Failed to load resource|ERR_")

    def broken(body: dict[str, Any]) -> Iterator[str]:
        yield "half of "
        raise Refusal(500, "")

    fake.reply = broken
    ask(page, "one")
    assert said(page)[1].strip() == "half of"
    assert "does not answer" in page.inner_text(".trouble")
    assert "broken off" in page.inner_text(".assistant .facts")
    page.context.set_offline(True)
    page.click("text=Try again")
    settled(page)
    assert "does not answer" in page.inner_text(".trouble")
    page.wait_for_selector("#state.gone")
    page.context.set_offline(False)
    fake.reply = lambda body: ["whole"]
    page.click("text=Try again")
    settled(page)
    assert said(page) == ["one", "whole"]
    page.wait_for_selector("#state.ok")


@pytest.mark.parametrize("remember", [False, True])
def test_the_key(visit: Open, fake: FakeServer, remember: bool) -> None:
    fake.key = "sesame"
    page = visit(allow="status of 401")
    page.wait_for_selector("#ask[open]")
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("#ask[open] >> text=The API key is wrong")
    page.click("#ask >> text=Cancel")
    ask(page, "Hi")
    page.wait_for_selector("#ask[open]")
    page.fill("#key", "sesame")
    page.set_checked("#remember", remember)
    page.keyboard.press("Enter")
    page.wait_for_selector("text=You said: Hi")
    page.wait_for_selector("#state.ok")
    kept = page.evaluate("[sessionStorage, localStorage].map((s) => s.getItem('salience:key'))")
    assert kept == ([None, "sesame"] if remember else ["sesame", None])
    page.reload()
    page.wait_for_selector("#state.ok")
    page.click("[data-do=settings]")
    page.click("#forget")
    page.wait_for_selector("#ask[open]")


# ---- looks and hands -----------------------------------------------------------------------------


LONG = "x" * 300 + "\n\n| " + " | ".join(["wide cell"] * 12) + " |\n|" + "---|" * 12 + "\n\n"
LONG += (
    "```\n" + "y" * 300 + "\n```\n\n" + "https://a.example/" + "z" * 300 + "\n\n`" + "c" * 300 + "`"
)


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_is_wider_than_the_window(visit: Open, fake: FakeServer, width: int) -> None:
    phone = {"is_mobile": True, "has_touch": True} if width < 700 else {}
    page = visit(viewport={"width": width, "height": 740}, **phone)
    fake.reply = lambda body: [LONG]
    page.fill("#input", "w" * 400)
    page.click("#send")
    settled(page)
    for selector in ("html", "body", "#scroll", "main"):
        over = page.evaluate(
            f"(n => n.scrollWidth - n.clientWidth)(document.querySelector('{selector}'))"
        )
        assert over <= 0, selector
    small = page.evaluate(
        """[...document.querySelectorAll("input, textarea")]
          .filter((n) => !["checkbox", "radio", "file"].includes(n.type))
          .filter((n) => parseFloat(getComputedStyle(n).fontSize) < 16)
          .map((n) => n.id || n.name)"""
    )
    assert small == []  # phones zoom into fields of smaller text
    if width < 700:
        page.fill("#input", "a line")
        page.press("#input", "Enter")
        assert page.input_value("#input") == "a line\n"
        assert not page.is_visible("#side")
        page.tap("#menu")
        page.wait_for_selector("#side", state="visible")
        assert page.evaluate("document.querySelector('main').inert")
        page.keyboard.press("Escape")
        page.wait_for_selector("#side", state="hidden")
        assert page.evaluate("document.activeElement.id") == "menu"


CONTRAST = """() => {
  // The ratio of WCAG 2, of colours as a canvas paints them.
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = (color) => {
    const [r, g, b] = rgba(color).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  const bad = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((each) => each.nodeType === 3 && each.data.trim());
    if (!own || node.closest(".hidden") || !node.checkVisibility({ opacityProperty: true })) {
      continue;
    }
    const behind = (each) => getComputedStyle(each).backgroundColor;
    let ground = node;
    while (ground !== document.body && rgba(behind(ground))[3] === 0) ground = ground.parentElement;
    const [a, b] = [light(getComputedStyle(node).color), light(behind(ground))];
    const ratio = Math.max(a, b) / Math.min(a, b);
    if (ratio < 4.5) bad.push([node.outerHTML.slice(0, 80), ratio]);
  }
  return bad;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_dark_and_light(visit: Open, fake: FakeServer, scheme: str) -> None:
    page = visit(color_scheme=scheme, allow="status of 429")
    ground = "getComputedStyle(document.body).backgroundColor"
    colors = {"light": "rgb(252, 251, 249)", "dark": "rgb(23, 24, 22)"}
    other = {"light": "dark", "dark": "light"}[scheme]
    assert page.evaluate(ground) == colors[scheme]
    fake.reply = lambda body: [
        "a `b` [c](https://d.example)\n> quote\n\n```py\n# c\nif 'a': 1\n```\n|a|\n|-|\n|b|"
    ]
    ask(page, "Hi")

    def busy(body: dict[str, Any]) -> list[str]:
        raise Refusal(429, "busy")

    fake.reply = busy
    ask(page, "Ho")
    assert page.evaluate(CONTRAST) == []
    page.click("[data-do=settings]")
    assert page.evaluate(CONTRAST) == []
    page.check(f"#theme input[value={other}]")
    page.keyboard.press("Escape")
    assert page.evaluate(ground) == colors[other]
    page.reload()
    assert page.evaluate(ground) == colors[other]
    page.click("[data-do=theme]")
    assert page.evaluate(ground) == colors[scheme]


def test_keys_and_names(visit: Open, fake: FakeServer) -> None:
    page = visit()
    page.fill("#input", "one")
    page.press("#input", "Shift+Enter")
    page.keyboard.insert_text("two")
    ask_composed = "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true})"
    page.evaluate(f"document.querySelector('#input').dispatchEvent({ask_composed})")
    assert fake.bodies == []
    page.press("#input", "Enter")
    settled(page)
    assert fake.bodies[0]["messages"][0]["content"] == "one\ntwo"
    page.keyboard.press("Control+k")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.className") == "open"
    page.keyboard.press("Control+k")
    page.keyboard.press("Enter")
    assert page.is_visible("#empty")
    assert page.evaluate("document.activeElement.id") == "input"
    page.click("[data-do=settings]")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.dataset.do") == "settings"
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, input, textarea, a')].filter((n) => !(n.innerText "
        "|| n.getAttribute('aria-label') || n.labels?.length || n.id === 'file' || n.textContent))"
        ".map((n) => n.outerHTML)"
    )
    assert unnamed == []


def test_copy(visit: Open, fake: FakeServer) -> None:
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    fake.reply = lambda body: ["**a**\n```py\nx = 1\n\ny\n```"]
    ask(page, "Hi")
    page.click("[data-do=copy-code]")
    assert page.evaluate("navigator.clipboard.readText()") == "x = 1\n\ny"
    page.click(".assistant [data-do=copy]")
    assert page.evaluate("navigator.clipboard.readText()") == "**a**\n```py\nx = 1\n\ny\n```"
    # Not a secure page, as under an address other than this machine's.
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.evaluate("document.execCommand = () => { window.copied = document.activeElement.value; }")
    page.click(".user [data-do=copy]")
    assert page.evaluate("window.copied") == "Hi"


def test_it_scrolls_only_for_those_who_read_at_the_bottom(visit: Open, fake: FakeServer) -> None:
    page = visit(viewport={"width": 900, "height": 500}, reduced_motion="reduce")
    fake.delay = 0.01
    fake.reply = lambda body: (f"line {n}\n\n" for n in range(150))
    page.fill("#input", "Go")
    page.press("#input", "Enter")
    distance = (
        "(n => n.scrollHeight - n.scrollTop - n.clientHeight)(document.querySelector('#scroll'))"
    )
    page.wait_for_selector("text=line 30")
    assert page.evaluate(distance) < 60
    page.mouse.move(450, 250)
    page.mouse.wheel(0, -300)
    page.wait_for_selector("#latest", state="visible")
    top = page.evaluate("document.querySelector('#scroll').scrollTop")
    page.wait_for_selector("text=line 90", state="attached")
    assert page.evaluate("document.querySelector('#scroll').scrollTop") == top
    page.click("#latest")
    page.wait_for_selector("text=line 120")
    assert page.evaluate(distance) < 60
    assert (
        page.evaluate("getComputedStyle(document.querySelector('#send')).animationName") == "none"
    )
    settled(page)
    assert page.evaluate(distance) < 2


def test_a_long_talk_stays_fast(visit: Open, fake: FakeServer, tmp_path: Path) -> None:
    answer = "Some **text** with `code`.\n\n- a\n- b\n\n```py\n" + "x = 1  # c\n" * 10 + "```\n\n"
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": answer * (1 + n % 2)} for n in range(200)]
    file = tmp_path / "long.json"
    file.write_text(
        json.dumps({"model": "m", "system": None, "sampling": {}, "messages": messages})
    )
    page = visit()
    page.set_input_files("#file", file)
    until(page, "document.querySelectorAll('.message').length === 200")
    shown = page.evaluate(
        "() => { const begun = performance.now(); show(load(talk.id)); document.body.offsetHeight; "
        "return performance.now() - begun; }"
    )
    assert shown < 2500, shown
    page.evaluate(
        """() => {
          window.slow = [];
          const note = (list) => slow.push(...list.getEntries().map((each) => each.duration));
          new PerformanceObserver(note).observe({ type: "longtask" });
        }"""
    )
    fake.delay = 0.005
    fake.reply = lambda body: pieces(answer * 4, 8)
    page.keyboard.type("typed while long", delay=5)
    page.keyboard.press("Enter")
    settled(page)
    assert page.locator(".message").count() == 202
    # On a machine that does other things, too; a task of a second would be felt.
    assert max(page.evaluate("slow") or [0]) < 1000
