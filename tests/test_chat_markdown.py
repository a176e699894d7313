# ruff: noqa: RUF001
"""What a terminal shows of markdown that comes in pieces. The terminal is pyte's."""

import io
import re
from itertools import pairwise

import pyte
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from salience.chat.markdown import StreamedMarkdown, StreamedText
from salience.chat.wrapping import WrappedText, breaks

SAMPLE = """# Title 标题

Hello **world**, a `code` and *more* with <div> and [link](http://x.y/z) and ![img](a.png).
A second line.

使用 AWQ 进行量化的时候，我们需要注意激活值的分布，因为只有少数通道（约百分之一）非常重要。😀

1. one
2. two

   ```python
   for i in range(10):
       print("你好", i)
   ```
3. three

- a
  - b
    - c

| a | b |
|---|--:|
| 你好 | 2 |

> quote
> more
lazy

---

Heading
===
```
x = 1
"""


class Screen:
    """A terminal with all that scrolled off it."""

    def __init__(self, columns: int = 60, rows: int = 20) -> None:
        self.columns, self.rows = columns, rows
        self.screen = pyte.HistoryScreen(columns, rows, history=100_000, ratio=1e-9)
        self.screen.set_mode(pyte.modes.LNM)  # as the line discipline of a terminal: \n is \r\n
        self.stream = pyte.Stream(self.screen)
        self.writes: list[str] = []

    def console(self) -> Console:
        outer = self

        class File(io.StringIO):
            def write(self, text: str) -> int:
                outer.writes.append(text)
                outer.stream.feed(text)
                return len(text)

        return Console(
            file=File(), force_terminal=True, width=self.columns, height=self.rows, legacy_windows=0
        )

    @property
    def lines(self) -> list[str]:
        top = [
            "".join(line[column].data for column in range(self.columns)).rstrip()
            for line in self.screen.history.top
        ]
        lines = top + [line.rstrip() for line in self.screen.display]
        while lines and not lines[-1]:
            lines.pop()
        return lines


def show(pieces: list[str], columns: int = 60, rows: int = 20) -> list[str]:
    """All lines of a terminal after a text that came in pieces, each of them drawn."""
    screen = Screen(columns, rows)
    streamed = StreamedMarkdown(screen.console())
    for piece in pieces:
        streamed._next = 0.0
        streamed.push(piece)
    streamed.finish()
    assert screen.screen.cursor.x == 0
    return screen.lines


def cut(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


def test_what_it_looks_like() -> None:
    assert show([SAMPLE]) == [
        "Title 标题",
        "",
        "Hello world, a code and more with <div> and link",
        "(http://x.y/z) and !img (a.png).",
        "A second line.",
        "",
        "使用 AWQ 进行量化的时候，我们需要注意激活值的分布，因为只有",
        "少数通道（约百分之一）非常重要。😀",
        "",
        " 1 one",
        " 2 two",
        "   for i in range(10):",
        '       print("你好", i)',
        " 3 three",
        "",
        " • a",
        "    • b",
        "       • c",
        "",
        " a     b",
        " ───────",
        " 你好  2",
        "",
        "▌ quote",
        "▌ more",
        "▌ lazy",
        "",
        "-" * 59,
        "",
        "Heading",
        "",
        "x = 1",
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
@pytest.mark.parametrize(("columns", "rows"), [(60, 20), (60, 3), (24, 8), (200, 100)])
def test_cuts(size: int, columns: int, rows: int) -> None:
    assert show(cut(SAMPLE, size), columns, rows) == show([SAMPLE], columns, rows)


PARTS = [
    *("a", "word", "量化", "。", "😀", " ", "  ", "\n", "\n\n", "\n    ", "\t", "\r\n", "\x1b[2J"),
    *("# ", "- ", "1. ", "2) ", "> ", "```", "```py\n", "~~~\n", "---\n", "===\n", "**", "*", "_"),
    *("`", "``", "| a | b |\n", "|---|---|\n", "<b>", "</b>", "<!-- ", "[a](b)", "![", "[x]: y\n"),
    *("\\", "&amp;", "x" * 30, "长" * 30, "https://a.b"),
]
MARKDOWN = st.lists(st.sampled_from(PARTS), max_size=25).map("".join)


@settings(max_examples=150, deadline=None)
@given(MARKDOWN, st.data())
@example("1. a\n\n2. b\n", None)
@example("a\n| b | c |\n|---|---|\n", None)
@example("- a\n\n-", None)
def test_any_cut_gives_the_same_screen(text: str, data: st.DataObject | None) -> None:
    if data is None:
        pieces = list(text)
    else:
        at = data.draw(st.lists(st.integers(0, len(text)), max_size=12).map(sorted))
        pieces = [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)]
    assert show(pieces, 40, 6) == show([text], 40, 6)


WORDS = st.lists(
    st.tuples(st.sampled_from(["\n", "\n\n", " ", "\n- ", "\n1. ", "\n> ", "\n# "]), st.booleans()),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(WORDS, st.integers(1, 9))
@example([(" ", at in (0, 5, 6)) for at in range(7)], 1)  # its line ends between "w6" and "量"
def test_nothing_is_lost_or_shown_twice(gaps: list[tuple[str, bool]], size: int) -> None:
    """Numbered words are on the screen once each and in their order, however long the text is."""
    text = "".join(f"{gap}w{at}{'量' if wide else 'x'}" for at, (gap, wide) in enumerate(gaps))
    shown = " ".join(show(cut(text, size), 30, 5))
    assert re.findall(r"w(\d+) ?[量x]", shown) == [str(at) for at in range(len(gaps))]


def test_a_block_higher_than_the_screen_shows_its_end() -> None:
    screen = Screen(30, 6)
    streamed = StreamedMarkdown(screen.console())
    for at in range(20):
        streamed._next = 0.0
        streamed.push(f"- item {at}\n")
        assert len(screen.screen.history.top) == 0
    assert screen.lines == [f" • item {at}" for at in range(15, 20)]
    streamed.finish()
    assert screen.lines == [f" • item {at}" for at in range(20)]


def test_only_what_changed_is_written() -> None:
    screen = Screen(40, 30)
    streamed = StreamedMarkdown(screen.console())
    streamed.push("".join(f"- item {at}\n" for at in range(20)))
    before = len(screen.writes)
    streamed._next = 0.0
    streamed.push("- last")
    written = "".join(screen.writes[before:])
    assert "last" in written and "item 3" not in written
    assert sum(bool(text) for text in screen.writes[before:]) == 1, "a frame is one write"


def test_drawing_takes_a_small_part_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("salience.chat.markdown.time.monotonic", lambda: now[0])
    screen = Screen()
    streamed = StreamedMarkdown(screen.console())
    for _ in range(100):
        streamed.push("word ")
        now[0] += 0.01
    assert 10 <= sum(bool(text) for text in screen.writes) <= 21
    streamed.finish()
    assert " ".join(screen.lines).split() == ["word"] * 100


@pytest.mark.parametrize("kind", [StreamedMarkdown, StreamedText])
def test_a_text_cannot_steer_the_terminal(kind: type) -> None:
    screen = Screen()
    streamed = kind(screen.console())
    streamed.push("before \x1b[2J\x9b2J\x07\x1b]0;title\x07 after\r\nnext")
    streamed.finish()
    assert screen.lines[0].startswith("before �[2J�2J��]0;title� after")
    assert screen.lines[1] == "next"
    assert screen.screen.title == ""


def test_a_narrower_screen() -> None:
    """After a resize the lines are broken anew and the old ones are drawn over."""
    screen = Screen(40, 20)
    console = screen.console()
    streamed = StreamedMarkdown(console)
    streamed.push("one two three four five six seven")
    screen.columns = 20
    screen.screen.resize(20, 20)
    screen.screen.reset()  # what a terminal does that breaks lines anew
    screen.screen.set_mode(pyte.modes.LNM)
    screen.stream.feed("one two three four f\nive six seven\n")
    console.width = 20
    streamed._next = 0.0
    streamed.push(" eight")
    streamed.finish()
    assert screen.lines == ["one two three four", "five six seven", "eight"]


def test_plain_text() -> None:
    screen = Screen(20, 5)
    streamed = StreamedText(screen.console(), "dim")
    for piece in cut("**a** [bold]量化[/bold]\n\n# b", 2):
        streamed.push(piece)
    streamed.finish()
    assert screen.lines == ["**a** [bold]量化[/bo", "ld]", "", "# b"]


@given(st.text(st.sampled_from("ab 量化，（）😀"), max_size=60), st.integers(2, 30))
def test_lines_fit_and_join_to_the_text(text: str, width: int) -> None:
    at = [0, *breaks(text, width), len(text)]
    assert at == sorted(at) and len(set(at[1:-1])) == len(at[1:-1])
    lines = [text[a:b] for a, b in pairwise(at)]
    assert all(cell_len(line.rstrip()) <= width for line in lines)
    assert "".join(lines) == text


def test_lines_break_where_the_script_allows() -> None:
    def wrapped(text: str, width: int) -> list[str]:
        return [line.plain.rstrip() for line in WrappedText(text).wrap(None, width)]

    assert wrapped("one two three", 8) == ["one two", "three"]
    assert wrapped("AWQ 量化很好", 10) == ["AWQ 量化很", "好"]
    assert wrapped("一二三四，五", 8) == ["一二三", "四，五"], "no line begins with a comma"
    assert wrapped("一二三（四）", 8) == ["一二三", "（四）"], "no line ends with what opens"
    assert wrapped("x" * 25, 10) == ["x" * 10, "x" * 10, "x" * 5]
