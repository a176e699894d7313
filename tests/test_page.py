"""The chat page in Chromium, with a stand-in for the server and, at the end, with the server.

One browser for a module; each test has a context, hence a storage, of its own. A page that logs an
error, breaks its policy or asks for what is not its server's fails any test.
"""

import json
import re
from pathlib import Path

import pytest

from helpers_page import FakeServer, Open, ask, pieces, said, settled, until
from helpers_server import serving, tiny_engine
from salience.runtime import Sampling
from salience.server.guard import Limits
from salience.server.page import HEADERS, PAGE

pytest_plugins = ["fixtures_page"]
pytestmark = pytest.mark.xdist_group("page")


# ---- the file ------------------------------------------------------------------------------------


def test_the_page_names_no_address_and_its_policy_names_every_block() -> None:
    text = PAGE.decode()
    # Names of XML, not addresses; and what a reader of JavaScript builds on.
    addresses = set(re.findall(r"(?:https?:)?//[a-z0-9][\w.-]*\.[a-z]{2,}[^\s\"'<]*", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\bsrc=|@import|url\(|\bon[a-z]+=\"|\sstyle=\"|innerHTML|eval\(", text)
    policy = HEADERS["Content-Security-Policy"]
    assert policy.count("'sha256-") == text.count("<script>") + text.count("<style>") == 4
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


# ---- talking -------------------------------------------------------------------------------------


def test_a_talk(visit: Open, fake: FakeServer) -> None:
    page = visit()
    page.wait_for_selector("#state.ok")
    assert page.inner_text("#state") == "tiny-w4g64"
    assert page.evaluate("document.activeElement.id") == "input"
    fake.delay = 0.02
    fake.reply = lambda body: pieces("Hello **you**\n\n```py\nx = 1\n```")
    ask(page, "Hi\tthere <b>")
    assert said(page)[0] == "Hi\tthere <b>"
    assert page.inner_text(".assistant strong") == "you"
    assert page.inner_text("#live").startswith("Hello **you**")
    facts = page.inner_text(".assistant .facts")
    assert re.fullmatch(r"\d+ tokens · .*tokens/s · first after .*", facts), facts
    assert "28 of 2,048" in page.inner_text("#facts")
    assert "410 MiB" in page.inner_text("#facts")
    assert fake.bodies[0] == {
        "model": "tiny-w4g64",
        "messages": [{"role": "user", "content": "Hi\tthere <b>"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    ask(page, "Again")
    assert [each["role"] for each in fake.bodies[1]["messages"]] == ["user", "assistant", "user"]
    assert page.title() == "Hi there <b> \u2013 salience"


def test_streaming_and_stop(visit: Open, fake: FakeServer) -> None:
    page = visit()
    fake.delay = 0.02
    fake.reply = lambda body: (f"word{n} " for n in range(5000))
    for stop in (lambda: page.press("#input", "Escape"), lambda: page.click("#send")):
        fake.left.clear()
        page.fill("#input", "Talk")
        page.press("#input", "Enter")
        page.wait_for_selector(".assistant[aria-busy] >> text=word3")
        assert page.get_attribute("#send", "aria-label") == "Stop"
        assert "of 2,048" in page.inner_text("#facts")
        stop()
        assert fake.left.wait(3), "the server still writes"
        settled(page)
        assert page.get_attribute("#send", "aria-label") == "Send"
        assert "stopped" in page.locator(".assistant .facts").last.inner_text()
    assert "word3" in said(page)[-1]
    # A closed page ends its generation, too.
    fake.left.clear()
    page.fill("#input", "Talk")
    page.press("#input", "Enter")
    until(page, "document.querySelectorAll('.assistant')[2]?.innerText.includes('word3')")
    page.close()
    assert fake.left.wait(3)


def test_answer_again_edit_and_delete(visit: Open, fake: FakeServer) -> None:
    page = visit()
    counted = iter(range(100))
    fake.reply = lambda body: [f"answer {next(counted)}"]
    for text in ("one", "two", "three"):
        ask(page, text)
    page.locator(".assistant [data-do=again]").last.click()
    settled(page)
    assert said(page) == ["one", "answer 0", "two", "answer 1", "three", "answer 3"]

    page.locator(".user [data-do=edit]").nth(1).click()
    assert page.evaluate("document.activeElement.value") == "two"
    page.keyboard.press("Escape")
    assert said(page)[2] == "two"
    page.locator(".user [data-do=edit]").nth(1).click()
    page.keyboard.insert_text(" and a half")
    page.keyboard.press("Enter")
    settled(page)
    assert said(page) == ["one", "answer 0", "two and a half", "answer 4"]
    sent = [each["content"] for each in fake.bodies[-1]["messages"]]
    assert sent == ["one", "answer 0", "two and a half"]

    page.press("#input", "ArrowUp")
    assert page.evaluate("document.activeElement.value") == "two and a half"
    page.click("text=Cancel")
    page.locator(".assistant [data-do=edit]").first.click()
    page.locator(".edit textarea").fill("mended")
    page.click("text=Save")
    assert said(page)[1] == "mended"

    page.locator(".assistant [data-do=delete]").first.click()
    assert said(page) == ["two and a half", "answer 4"]
    page.click("#toast button")
    assert said(page) == ["one", "mended", "two and a half", "answer 4"]


def test_thoughts_are_folded_and_not_sent_back(visit: Open, fake: FakeServer) -> None:
    page = visit()
    fake.reply = lambda body: pieces("<think>\nHm, *maybe*.\n</think>\n\nYes, **so**.", 3)
    ask(page, "Is it?")
    assert page.locator(".thought").get_attribute("open") is None
    assert "Hm" not in page.inner_text(".prose")
    page.click(".thought summary")
    assert page.inner_text(".thought em") == "maybe"
    ask(page, "Really?")
    assert fake.bodies[1]["messages"][1]["content"] == "Yes, **so**."
    assert page.evaluate("exported(talk).messages[1]") == {
        "role": "assistant",
        "content": "Yes, **so**.",
        "reasoning_content": "Hm, *maybe*.",
    }


def test_settings_are_sent_kept_and_reset(visit: Open, fake: FakeServer) -> None:
    page = visit()
    page.click("[data-do=settings]")
    page.fill("#system", "Be brief.")
    wanted = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.25,
        "seed": 7,
    }
    for name, value in {**wanted, "max_new_tokens": 99}.items():
        page.fill(f"#sampling [name={name}]", str(value))
    page.fill("#sampling [name=stop]", "END\n##\n")
    page.click("text=Use for new conversations")
    ask(page, "Hi")
    body = fake.bodies[0]
    sent = {name: body[name] for name in wanted}
    assert sent == wanted
    assert (body["max_tokens"], body["stop"]) == (99, ["END", "##"])
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}

    page.reload()
    page.click("[data-do=settings]")
    assert page.input_value("#sampling [name=temperature]") == "0.7"
    page.fill("#sampling [name=temperature]", "-1")  # not a temperature: not sent
    page.keyboard.press("Escape")
    ask(page, "Hi")
    assert "temperature" not in fake.bodies[1]
    page.click("[data-do=settings]")
    page.click("[data-do=reset]")
    assert page.input_value("#sampling [name=top_k]") == ""
    page.keyboard.press("Escape")
    ask(page, "Hi")
    assert not {"top_k", "seed", "stop", "max_tokens"} & set(fake.bodies[2])
    page.click("[data-do=new]")
    ask(page, "In a new one")
    assert fake.bodies[3]["top_k"] == 40


# ---- conversations -------------------------------------------------------------------------------


def test_conversations_outlive_a_reload(visit: Open, fake: FakeServer, tmp_path: Path) -> None:
    page = visit()
    ask(page, "about cats")
    page.click("[data-do=new]")
    assert page.is_visible("#empty")
    ask(page, "about dogs")
    page.reload()
    assert said(page)[0] == "about dogs"
    assert page.locator("#talks .open").all_inner_texts() == ["about dogs", "about cats"]
    page.click("#talks .open >> text=about cats")
    assert said(page) == ["about cats", "You said: about cats"]

    page.fill("#search", "said: about DOGS")
    until(page, "document.querySelectorAll('#talks .open').length === 1")
    page.press("#search", "Enter")
    assert said(page)[0] == "about dogs"
    page.fill("#search", "")
    until(page, "document.querySelectorAll('#talks .open').length === 2")

    page.hover("#talks li:first-child")
    page.click("#talks li:first-child [data-do=rename]")
    page.keyboard.insert_text("Dogs")
    page.keyboard.press("Enter")
    assert page.inner_text("#title") == "Dogs"

    page.hover("#talks li:first-child")
    with page.expect_download() as download:
        page.click("#talks li:first-child [data-do=export]")
    assert download.value.suggested_filename == "Dogs.json"
    file = tmp_path / "talk.json"
    download.value.save_as(file)
    assert json.loads(file.read_text()) == {
        "model": "tiny-w4g64",
        "system": None,
        "sampling": {},
        "messages": [
            {"role": "user", "content": "about dogs"},
            {"role": "assistant", "content": "You said: about dogs"},
        ],
    }

    page.hover("#talks li:first-child")
    page.click("#talks li:first-child [data-do=remove]")
    assert page.locator("#talks .open").all_inner_texts() == ["about cats"]
    page.click("#toast button")
    assert page.locator("#talks .open").all_inner_texts() == ["Dogs", "about cats"]
    assert said(page)[0] == "about dogs"

    page.set_input_files("#file", file)
    page.wait_for_selector("#toast >> text=Imported")
    assert page.locator("#talks .open").count() == 3
    bad = tmp_path / "bad.json"
    for text in ("[1]", "{", '{"messages": [{"role": "tool", "content": ""}]}', "null"):
        bad.write_text(text)
        page.set_input_files("#file", bad)
        page.wait_for_selector("#toast >> text=bad.json was not imported")
        page.evaluate("document.querySelector('#toast').replaceChildren()")
    assert page.locator("#talks .open").count() == 3


def test_an_answer_goes_on_while_another_talk_is_shown(visit: Open, fake: FakeServer) -> None:
    page = visit()
    ask(page, "first")
    page.click("[data-do=new]")
    fake.delay = 0.02
    fake.reply = lambda body: (f"w{n} " for n in range(60))
    page.fill("#input", "second")
    page.press("#input", "Enter")
    page.wait_for_selector("text=w5")
    page.click("#talks .open >> text=first")
    assert page.locator("#talks .running").count() == 1
    assert "w5" not in page.inner_text("#messages")
    page.wait_for_timeout(150)
    page.click("#talks .open >> text=second")
    page.wait_for_selector("text=w20")
    settled(page)
    assert said(page)[1].split() == [f"w{n}" for n in range(60)]


def test_a_full_storage_is_said_and_survived(visit: Open, fake: FakeServer) -> None:
    page = visit()
    page.evaluate(
        """() => { const full = "x".repeat(1 << 20);
        try { for (let n = 0; ; n++) localStorage.setItem("fill" + n, full); } catch {}
        try { for (let n = 0; ; n++) localStorage.setItem("f" + n, "x".repeat(500)); } catch {} }"""
    )
    ask(page, "a " * 600)
    assert "no room" in page.inner_text("#toast")
    assert len(said(page)) == 2
    ask(page, "goes on")
    assert len(fake.bodies[1]["messages"]) == 3


# ---- the server itself ---------------------------------------------------------------------------


def test_with_the_server(visit: Open) -> None:
    limits = Limits(api_key="sesame")
    with serving(tiny_engine(slots=2, context=512), limits=limits) as served:
        page = visit(url=served.url + "/", allow="status of 40[01]")
        page.wait_for_selector("#ask[open]")
        page.fill("#key", "sesame")
        page.keyboard.press("Enter")
        page.wait_for_selector("#state.ok")
        assert page.inner_text("#state") == "tiny"
        page.click("[data-do=settings]")
        page.fill("#sampling [name=temperature]", "0")
        page.fill("#sampling [name=max_new_tokens]", "24")
        page.keyboard.press("Escape")
        text = "what is a module"
        ask(page, text)
        wanted = served.reply(
            Sampling(temperature=0.0, max_new_tokens=24), [{"role": "user", "content": text}]
        )
        assert page.evaluate("talk.messages[1].content") == wanted.text
        assert f"{len(wanted.tokens)} tokens" in page.inner_text(".facts >> nth=0")
        assert re.search(r"\d+ of 512", page.inner_text("#facts"))

        page.click("[data-do=settings]")
        page.fill("#sampling [name=max_new_tokens]", "400")
        page.keyboard.press("Escape")
        page.fill("#input", "more")
        page.press("#input", "Enter")
        until(page, "[...runs.values()].some((run) => run.tokens > 2)")
        page.press("#input", "Escape")
        assert served.settles(lambda: served.is_idle, 5)
        settled(page)

        ask(page, "a word " * 600)
        assert "longer than the model can read" in page.inner_text(".trouble")
