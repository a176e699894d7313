"""Text that breaks into lines where its script allows it.

Rich breaks at spaces alone, which leaves Chinese and Japanese, written without, with a ragged half
of each line empty. Between two of their characters a line may end, but not before closing
punctuation, nor after what opens.
"""

import re
from typing import Any

from rich.cells import cell_len, chop_cells
from rich.containers import Lines
from rich.text import Text

_CLOSING = "、。，．！？：；）」』】》〉〕”’…—％ー々"  # noqa: RUF001
_OPENING = "（「『【《〈〔“‘"  # noqa: RUF001
_WIDE = "\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003fffd"
# What stays together: one wide character or one word, with its punctuation and the spaces after.
_UNIT = re.compile(
    rf"[{_OPENING}]*(?:[{_WIDE}]|[^\s{_WIDE}{_OPENING}]+)[{_CLOSING}]*\s*|[{_OPENING}]+\s*|\s+"
)


def breaks(line: str, width: int) -> list[int]:
    """The indices at which lines begin, beside the first.

    Args:
        line: a text without line ends.
        width: cells that a line has.
    """
    found: list[int] = []
    column = 0
    for match in _UNIT.finditer(line):
        unit = match[0]
        # Spaces may hang over the end of a line, where they are cut.
        if column and column + cell_len(unit.rstrip()) > width:
            found.append(match.start())
            column = 0
        at, parts = match.start(), chop_cells(unit, width)
        for part in parts[:-1] if cell_len(unit.rstrip()) > width else ():
            at += len(part)
            found.append(at)
            unit = line[at : match.end()]
        column += cell_len(unit)
    return found


class WrappedText(Text):
    """A text of Rich that is broken by `breaks`."""

    def wrap(self, console: Any, width: int, **options: Any) -> Lines:
        """The lines of a width; the options are those of Rich, of which none is needed here."""
        del console, options
        lines = Lines()
        for line in self.split(allow_blank=True):
            line.expand_tabs(8)
            parts = line.divide(breaks(line.plain, width))
            for part in parts:
                part.rstrip_end(width)
            lines.extend(parts)
        return lines
