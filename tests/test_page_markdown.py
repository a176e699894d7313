"""How the page renders what a model writes, as a whole and as it arrives."""
# ruff: noqa: RUF001  Chinese is written with its own colon and comma

import re
from typing import Any

import pytest

from helpers_page import Open

pytest_plugins = ["fixtures_page"]
pytestmark = pytest.mark.xdist_group("page")


# ---- Markdown ------------------------------------------------------------------------------------


CASES = {
    "text": ("one\ntwo\n\nthree", "<p>one\ntwo</p><p>three</p>"),
    "emphasis": (
        "**b** *i* ***bi*** ~~s~~ __u__ _v_ **a *b* c** *a **b** c* **a *b***",
        "<p><strong>b</strong> <em>i</em> <em><strong>bi</strong></em> <del>s</del> "
        "<strong>u</strong> <em>v</em> <strong>a <em>b</em> c</strong> "
        "<em>a <strong>b</strong> c</em> <strong>a <em>b</em></strong></p>",
    ),
    "no emphasis": ("5 * 3 * 2, 2*3*4, snake_case_name, **open", None),
    "chinese": (
        "**注意：**这是*重点*，好。",
        "<p><strong>注意：</strong>这是<em>重点</em>，好。</p>",
    ),
    "emoji": ("👩‍👩‍👧 **🎉** 𠮷", "<p>👩‍👩‍👧 <strong>🎉</strong> 𠮷</p>"),
    "code": ("`a*b*` ``x`y`` `open", "<p><code>a*b*</code> <code>x`y</code> `open</p>"),
    "escapes": (r"\*a\* \[b](c) &lt;d&gt; a<br>b", "<p>*a* [b](c) &lt;d&gt; a<br>b</p>"),
    "html": ("<b onclick=x>a</b> <!-- c -->", None),
    "headings": ("# One #\n### Three\n#no", "<h1>One</h1><h3>Three</h3><p>#no</p>"),
    "rule": ("a\n---\n***\n- - -", "<p>a</p><hr><hr><hr>"),
    "nested list": (
        "1. a\n   - b\n   - c\n     1. d\n2. e\n\n   more\n\nend",
        "<ol><li><p>a</p><ul><li><p>b</p></li><li><p>c</p><ol><li><p>d</p></li></ol></li></ul></li>"
        "<li><p>e</p><p>more</p></li></ol><p>end</p>",
    ),
    "nested by two": (
        "1. a\n  - b\n2. c",
        "<ol><li><p>a</p><ul><li><p>b</p></li></ul></li><li><p>c</p></li></ol>",
    ),
    "list that starts": ("3) a\n4) b", '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol>'),
    "number in a text": ("it was in\n1986. Then", "<p>it was in\n1986. Then</p>"),
    "quote": (
        "> a\n> > b\n> - c\n\nd",
        "<blockquote><p>a</p><blockquote><p>b</p></blockquote><ul><li><p>c</p></li></ul>"
        "</blockquote><p>d</p>",
    ),
    "deep": (">" * 60 + " a", None),
    "deep list": ("".join(" " * 2 * n + "- a\n" for n in range(40)), None),
    "bad links": ("[a](javascript:alert(1)) [b](data:text/html,x) [c](/d)", None),
    "marks": ("*" * 50 + "a" + "*" * 50 + "_" * 9 + "`" * 7 + "[[[](((", None),
}


def rendered(page: Any, text: str, cuts: list[int]) -> str:
    return page.evaluate(
        """([text, cuts]) => {
          const root = document.createElement("div"), reply = new Reply(root);
          let from = 0;
          for (const to of [...cuts, text.length]) { reply.push(text.slice(from, to)); from = to; }
          reply.end();
          return root.innerHTML;
        }""",
        [text, cuts],
    )


def test_markdown(visit: Open) -> None:
    page = visit()
    for name, (text, wanted) in CASES.items():
        got = rendered(page, text, [])
        if wanted is not None:
            assert got == wanted, name
        elif not name.startswith("deep"):
            plain = page.evaluate(
                "(t) => { const p = document.createElement('p'); p.textContent = t; "
                "return p.outerHTML; }",
                text,
            )
            assert name == "marks" or got == plain, name


def test_links_tables_and_code(visit: Open) -> None:
    page = visit()
    got = rendered(page, '[a *b*](https://x.org/a_(b)?c=d "t") https://y.org/z, <mailto:a@b.c>', [])
    links = re.findall(r'<a href="([^"]*)" target="_blank" rel="noopener noreferrer nofollow"', got)
    assert links == ["https://x.org/a_(b)?c=d", "https://y.org/z", "mailto:a@b.c"]
    assert "<em>b</em></a>" in got
    got = rendered(page, "看https://x.org/甲。好 [https://z.org](https://z.org)", [])
    assert re.findall(r'href="([^"]*)', got) == ["https://x.org/", "https://z.org"]

    got = rendered(page, "head\n| a | b \\| c |\n|:-:|--:|\n| *1* | `x` | y |\n| 2\nend", [])
    assert got.startswith("<p>head</p><div")
    rows = re.findall(r"<tr>(.*?)</tr>", got)
    cells = [re.findall(r'<t[hd] class="(\w+) short">(.*?)</t[hd]>', row) for row in rows]
    assert cells == [
        [("center", "a"), ("right", "b | c")],
        [("center", "<em>1</em>"), ("right", "<code>x</code>")],
        [("center", "2"), ("right", "")],
    ]
    assert got.endswith("<p>end</p>")

    text = 'x\n```python\ns = """a\n# b"""  # c\n\nif 1: f("d")\n```\n````\n```\n````'
    got = rendered(page, text, [])
    assert re.findall(r'class="t-(\w+)">([^<]*)<', got) == [
        ("string", '"""a'),
        ("string", '# b"""'),
        ("comment", "# c"),
        ("keyword", "if"),
        ("number", "1"),
        ("string", '"d"'),
    ]
    codes = re.findall(r"<code>(.*?)</code>", got, re.DOTALL)
    assert [re.sub("<[^>]*>", "", code) for code in codes] == [
        's = """a\n# b"""  # c\n\nif 1: f("d")',
        "```",
    ]


def test_pieces_give_what_the_whole_gives(visit: Open) -> None:
    """Cut anywhere, also within a character of two units, a tag, a fence or a table's rule."""
    page = visit()
    texts = [text for text, _ in CASES.values()]
    texts += [
        "<think>\nWell, *no*.\n</think>\n\nYes.",
        "so\n\n- it is\n</think>\n\n**Yes**",
        "<think></think>a<b",
        "a | b\n--|--\n1 | 2\n\n```js\n/* x\ny */ `a\nb` 'c'\n```\nend\n~~~\nopen\n\n  x",
        "1. a\n   ```py\nx = 1\n   ```\n2. b\r\n\r\n> ```\n> q\n> ```\n> z",
        "- [x] done\n- [ ] not\n\t- tab\n* * *\n| a |\n|--|\n| b |",
    ]
    texts.append("\n\n".join(texts[:-5]))
    different = page.evaluate(
        """(texts) => {
          let seed = 7;
          const random = (below) => (seed = (seed * 48271) % 2147483647) % below;
          const render = (pieces) => {
            const root = document.createElement("div"), reply = new Reply(root);
            for (const piece of pieces) reply.push(piece);
            reply.end();
            return root.innerHTML;
          };
          const bad = [];
          for (const text of texts) {
            const whole = render([text]);
            const tries = [text.split(""), text.split(/(?=\\n)/), text.split(/(?<=\\n)/)];
            for (let round = 0; round < 30; round++) {
              const pieces = [];
              for (let at = 0; at < text.length; ) {
                const size = 1 + random(1 + random(40));
                pieces.push(text.slice(at, (at += size)));
              }
              tries.push(pieces);
            }
            for (const pieces of tries) {
              const got = render(pieces);
              if (got !== whole) bad.push([whole, got, pieces]);
            }
          }
          return bad.slice(0, 2);
        }""",
        texts,
    )
    assert different == []


def test_the_renderer_is_linear_and_keeps_what_is_finished(visit: Open) -> None:
    page = visit()
    assert page.evaluate(
        """() => {
          const root = document.createElement("div"), reply = new Reply(root);
          reply.push("first *a*\\n\\n- one\\n- two\\n\\n```py\\nx = 1\\ny");
          const kept = ["p", "li", "code > span"].map((name) => root.querySelector(name));
          reply.push(" = 2\\n```\\nand **more**");
          return kept.every((node) => root.contains(node));
        }"""
    )
    # 1 MB in pieces of 1 kB, then what makes a careless parser quadratic.
    spent = page.evaluate(
        """() => {
          const block = "Some *text* with `code` and a [link](https://x.org).\\n\\n- a\\n- b\\n\\n";
          const hard = ["*a ", "_a_b", "[", "[a](", "```a", "**a*", "~~a ", "> ", "# ", "|a", " "];
          hard.push("<", "&", "a* ", "https://a) ", "![a](", "- ", "`", "*");
          const run = (pieces) => {
            const begun = performance.now(), reply = new Reply(document.createElement("div"));
            for (const piece of pieces) reply.push(piece);
            reply.end();
            return performance.now() - begun;
          };
          const times = [run(Array(1000).fill(block.repeat(14)))];
          for (const text of hard) times.push(run([text.repeat(8000), "end\\n", text]));
          return times;
        }"""
    )
    assert max(spent) < 4000, spent
