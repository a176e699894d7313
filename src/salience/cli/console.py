"""What the commands print: progress and errors on stderr, results on stdout."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from salience.errors import SalienceError
from salience.scheme import Scheme

stdout = Console(highlight=False, soft_wrap=True)
stderr = Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr; yields the callback (phase, done, total)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # Off a terminal rich would still end the bar with an empty line.
    hidden = not stderr.is_terminal
    with Progress(*columns, console=stderr, transient=True, disable=hidden) as bar:
        task = bar.add_task(title, total=None)

        def update(phase: str, done: int, total: int) -> None:
            bar.update(task, description=f"{title}: {phase}", completed=done, total=total)

        yield update


def show_block(
    name: str,
    error_rtn: float,
    error: float,
    folds: int,
    seconds: float,
    memory: int,
    losses: tuple[float, float] | None = None,
) -> None:
    """A line for a finished block, above the bar; nothing off a terminal, as with the bar.

    `losses` are those of a block that learned, before and after.
    """
    if stderr.is_terminal:
        ratio = error / error_rtn if error_rtn else 1.0
        learned = ""
        if losses is not None:
            learned = f"loss {losses[0]:.2e} before it learned, {losses[1]:.2e} after, "
        stderr.print(
            f"{escape(name)}: output error {error_rtn:.2e} rounded, {error:.2e} now "
            f"([bold]{ratio:.2f}[/bold]), {learned}{folds} folds, {seconds:.1f} s, {size(memory)}"
        )


def show_warning(line: str) -> None:
    """A line on stderr that is no error."""
    stderr.print(escape(f"warning: {line}"))


def show_serving(model: str, address: str, size_text: str, has_key: bool) -> None:
    """Where a server is to be found, on stderr."""
    key = "with the API key" if has_key else "no API key"
    stderr.print(f"[bold]{escape(model)}[/bold] is served at {escape(address)} ({key})")
    stderr.print(f"{size_text}; Ctrl-C ends it")


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, ensure_ascii=False))


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str | None) -> int | None:
    """Bytes of a text such as "8GiB" or "500MB"; None of None.

    Raises:
        SalienceError: it is no such text.
    """
    if text is None:
        return None
    match = re.fullmatch(
        r"([0-9]{1,15}(?:\.[0-9]{1,15})?) *((?:[KMGT]i?)?B)", text.strip(), re.ASCII | re.IGNORECASE
    )
    if match is None or not float(match[1]):
        raise SalienceError(f"size {text!r} is not understood; write it like 8GiB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_numbers(option: str, text: str) -> list[int]:
    """The numbers of a text such as "1,4,16", which `option` was given.

    Raises:
        SalienceError: it is no such text.
    """
    parts = text.split(",")
    if not all(part.isdecimal() and 0 < int(part) < 2**20 for part in parts):
        raise SalienceError(f"{option} {text!r} is not understood; write it like 1,4,16")
    return [int(part) for part in parts]


def parse_rules(texts: list[str] | None) -> tuple[tuple[str, Scheme], ...]:
    """The (pattern, scheme) pairs of texts such as "lm_head=w8g128".

    Raises:
        SalienceError: one is no such text.
    """
    rules = []
    for text in texts or ():
        pattern, equals, scheme = text.rpartition("=")
        if not equals:
            raise SalienceError(f'--rule {text!r} is not understood; write it "REGEX=SCHEME"')
        rules.append((pattern, Scheme.parse(scheme)))
    return tuple(rules)
