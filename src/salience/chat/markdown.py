"""Markdown on a terminal while it is still being written.

Blocks of markdown (paragraphs, lists, tables, code) are closed by what follows them and never open
again. So when a block begins, on a line that is complete, those before it are printed for good. The
last block is live: it is drawn again whenever more of it has come, over its own lines. A live block
that is higher than the screen shows its end; whole it is printed when it is closed. Only lines that
changed are written, in one piece, so nothing flickers.

What is printed in the end is the same however the text was cut into pieces. Nothing of the text is
left out: what Rich would drop or move (HTML, images, the targets of links) is shown as it stands.
"""

import math
import time
from collections.abc import Iterable, Iterator
from itertools import takewhile
from typing import Any, ClassVar

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderResult
from rich.control import Control
from rich.markdown import CodeBlock, Heading, Markdown, Paragraph
from rich.segment import ControlType, Segment, Segments
from rich.syntax import Syntax
from rich.text import Text

from salience.chat.wrapping import WrappedText

_FRAME_SECONDS = 0.05
_SHARE = 10  # drawing takes at most one part in so many of the time
_ERASE_DOWN = Segment("\x1b[0J", None, [(ControlType.CLEAR,)])
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
_CONTROLS[ord("\r")] = ""

Line = list[Segment]


def visible(text: str) -> str:
    """A text that cannot steer a terminal: its control characters are replaced by U+FFFD."""
    return text.translate(_CONTROLS)


class _Paragraph(Paragraph):
    def on_enter(self, context: Any) -> None:
        super().on_enter(context)
        self.text = WrappedText()


class _Heading(Heading):
    def on_enter(self, context: Any) -> None:
        super().on_enter(context)
        self.text = WrappedText()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.text  # Rich centres the first level, which is far away on a wide screen


class _CodeBlock(CodeBlock):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # No padding, so that it can be copied, and the terminal's own colours, light or dark.
        code = str(self.text).rstrip()
        yield Syntax(code, self.lexer_name, theme="ansi_dark", word_wrap=True)


class _Block(Markdown):
    """One block, of tokens that were parsed before."""

    elements: ClassVar = {
        **Markdown.elements,
        "paragraph_open": _Paragraph,
        "heading_open": _Heading,
        "fence": _CodeBlock,
        "code_block": _CodeBlock,
    }

    def __init__(self, tokens: list[Token], style: str) -> None:
        super().__init__("", style=style, hyperlinks=False)
        self.parsed = tokens


_PARSER = (
    MarkdownIt("commonmark", {"html": False})
    .enable(["strikethrough", "table"])
    .disable(["reference", "image"])
)


def _blocks(text: str) -> Iterator[tuple[int, list[Token]]]:
    """The first line and the tokens of each block."""
    tokens: list[Token] = []
    for token in _PARSER.parse(text):
        if token.level == 0 and token.nesting >= 0:
            if tokens:
                yield (tokens[0].map or [0])[0], tokens
            tokens = []
        for child in token.children or ():
            if child.type == "softbreak":  # who writes a line end in a chat means it
                child.type = "hardbreak"
        tokens.append(token)
    if tokens:
        yield (tokens[0].map or [0])[0], tokens


class StreamedMarkdown:
    """Draws markdown as it comes.

    Args:
        console: of Rich, on a terminal.
        style: of the whole text.
    """

    def __init__(self, console: Console, style: str = "none") -> None:
        self._console = console
        self._style = style
        self._pending = ""  # from the beginning of the last block on
        self._live: list[Line] = []  # the lines on the screen that are not for good
        self._width = console.width
        self._printed = False
        self._next = 0.0

    def push(self, piece: str) -> None:
        """Take more of the text, and draw it unless the last time was just now."""
        self._pending += visible(piece)
        now = time.monotonic()
        if now >= self._next:
            self._draw(ended=False)
            after = time.monotonic()
            self._next = after + max(_FRAME_SECONDS, _SHARE * (after - now))

    def finish(self) -> None:
        """Print all that is left; the cursor is on the line below."""
        self._draw(ended=True)

    def _draw(self, ended: bool) -> None:
        width, height = self._console.size
        complete = self._pending if ended else self._pending[: self._pending.rfind("\n") + 1]
        found = list(_blocks(complete))
        done = self._lines(found if ended else found[:-1], width, self._printed)
        if ended:
            self._pending = ""
        elif found:
            lines = self._pending.split("\n")
            self._pending = "\n".join(lines[found[-1][0] :])
        self._printed |= bool(done)
        live = self._lines(_blocks(self._pending), width, self._printed)
        self._write(done, live[-max(height - 1, 1) :], width)

    def _lines(
        self, blocks: Iterable[tuple[int, list[Token]]], width: int, printed: bool
    ) -> list[Line]:
        """Blocks with an empty line between, and before the first if something was printed."""
        # One column stays free: a terminal that takes a sign for wider than Rich does would wrap.
        options = self._console.options.update(width=max(width - 1, 1), height=None)
        found: list[Line] = []
        for _, tokens in blocks:
            block = _Block(tokens, self._style)
            lines = [_stripped(line) for line in self._console.render_lines(block, options)]
            while lines and not lines[0]:
                del lines[0]
            while lines and not lines[-1]:
                del lines[-1]
            found += [[], *lines] if lines and (found or printed) else lines
        return found

    def _write(self, done: list[Line], live: list[Line], width: int) -> None:
        lines, old = done + live, self._live
        same = 0
        if width == self._width:
            pairs = zip(old, lines, strict=False)
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        # After a resize the terminal has broken the lines that are too long now.
        up = sum(max(1, math.ceil(_cells(line) / width)) for line in old[same:])
        self._live, self._width = live, width
        if not up and not lines[same:]:
            return
        out = [Control.move(0, -up).segment] if up else []
        for line in lines[same:]:
            out += [*line, Control((ControlType.ERASE_IN_LINE, 0)).segment, Segment("\n")]
        if up:
            out.append(_ERASE_DOWN)
        self._console.print(Segments(out), end="", crop=False)


class StreamedText:
    """The same for a text that is shown as it is; the terminal breaks its lines."""

    def __init__(self, console: Console, style: str = "none") -> None:
        self._console = console
        self._style = style

    def push(self, piece: str) -> None:
        """Print it."""
        text = Text(visible(piece), style=self._style)
        self._console.print(text, end="", soft_wrap=True)

    def finish(self) -> None:
        """End the line."""
        self._console.print()


def _cells(line: Line) -> int:
    return sum(segment.cell_length for segment in line)


def _stripped(line: Line) -> Line:
    """Without spaces at the end, which a copy would have and a narrower terminal would wrap."""
    line = list(line)
    while line:
        text, style, control = line.pop()
        if text := text.rstrip():
            line.append(Segment(text, style, control))
            break
    return line
