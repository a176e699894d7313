"""The chat on a terminal: an input line with history and completion, replies as they come.

Between input lines the terminal does not show what is typed; it is in the next input line.
Ctrl-C is then a signal whose handler ends the reply at its next token, so that nothing is left half
done. At the input line it empties the line.
"""

import os
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console
from rich.text import Text

from salience.chat.commands import COMMANDS, SETTINGS, Outcome, State, gib, run
from salience.chat.markdown import StreamedMarkdown, StreamedText, visible
from salience.errors import SalienceError
from salience.monitor import memory

_CUT = {
    "cancelled": "stopped",
    "length": "cut off by max_new_tokens; /set max_new_tokens changes it",
    "context": "cut off: the context is full",
}


def history_file() -> Path:
    """Where what was said is kept: salience/chat_history in the XDG folder for such things."""
    state = os.environ.get("XDG_STATE_HOME", "")
    folder = Path(state) if Path(state).is_absolute() else Path.home() / ".local" / "state"
    return folder / "salience" / "chat_history"


class _History(FileHistory):
    """A file that only its owner reads."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
        path.chmod(0o600)
        super().__init__(str(path))

    def store_string(self, string: str) -> None:
        # A terminal can send half a character, which has no form in UTF-8.
        with suppress(OSError):  # a full disk is no reason to end the talk
            super().store_string(string.encode(errors="replace").decode())


class _Completer(Completer):
    """Commands, files of /save and /load, and the settings of /set."""

    _files = PathCompleter(expanduser=True)
    _arguments: dict[str, Iterable[str]] = {  # noqa: RUF012
        "/set": SETTINGS,
        "/set markdown": ("on", "off"),
        "/set stop": ("off",),
        "/set seed": ("random",),
        "/system": ("off",),
    }

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
        before = document.text_before_cursor
        said, space, word = before.rpartition(" ")
        name, _, rest = before.partition(" ")
        if name in ("/load", "/save") and space:
            yield from self._files.get_completions(Document(rest.lstrip()), event)
            return
        notes = SETTINGS if said == "/set" else {n: each.help for n, each in COMMANDS.items()}
        for candidate in self._arguments.get(said, ()) if space else COMMANDS:
            if candidate.startswith(word):
                yield Completion(candidate, -len(word), display_meta=notes.get(candidate, ""))


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys


class Terminal:
    """The loop of input and reply.

    Args:
        state: the talk, the model's name and how replies are shown.
        history: the file of what was said; None to keep it in memory.
        console: where replies go.
    """

    def __init__(self, state: State, history: Path | None, console: Console | None = None) -> None:
        self.state = state
        self.console = console or Console(highlight=False)
        self._prompts: PromptSession[str] = PromptSession(
            message="> ",
            multiline=True,
            prompt_continuation="  ",
            key_bindings=_keys(),
            completer=_Completer(),
            complete_while_typing=Condition(self._is_command),
            history=self._history(history),
            bottom_toolbar=self._toolbar,
            enable_open_in_editor=True,
            tempfile_suffix=".md",
        )

    def run(self) -> None:
        """Until /exit or Ctrl-D."""
        self._note(f"{self.state.model}; /help lists commands and keys")
        # All the time, as a second Ctrl-C may come when the reply has just ended, and keys when an
        # input line has.
        with _interrupts(self.state.session.stop), _no_echo():
            self._loop()

    def _loop(self) -> None:
        draft = ""
        while True:
            try:
                line = self._prompts.prompt(default=draft)
            except KeyboardInterrupt:
                if not self._prompts.default_buffer.text:
                    self._note("Ctrl-D or /exit leaves")
                draft = ""
                continue
            except EOFError:
                return
            draft = ""
            if not line.strip():
                continue
            try:
                outcome = self._take(line)
            except SalienceError as error:
                self.console.print(Text(str(error), style="red"))
                draft = "" if line.startswith("/") else line
                continue
            if outcome.leave:
                return
            draft = outcome.draft

    def _take(self, line: str) -> Outcome:
        session = self.state.session
        if not line.startswith("/"):
            return self._show(session.stream(line), line)
        outcome = run(self.state, line)
        if outcome.text:
            self._note(outcome.text)
        return self._show(session.again(), "") if outcome.retry else outcome

    def _show(self, pieces: Generator[tuple[str, str], None, None], line: str) -> Outcome:
        """Draw a reply as it comes. One that was stopped before it began gives the line back."""
        session = self.state.session
        before = session.last
        kind = StreamedMarkdown if self.state.markdown else StreamedText
        if self.console.is_dumb_terminal:
            kind = StreamedText
        shown = None
        waiting = self.console.status(Text("reading", style="dim"))
        with closing(pieces), waiting:
            for thought, answer in pieces:
                waiting.stop()
                for style, piece in (("dim", thought), ("none", answer)):
                    if not piece:
                        continue
                    if shown is None or shown[0] != style:
                        self._end(shown)
                        shown = (style, kind(self.console, style))
                        self.console.print()
                    shown[1].push(piece)
            self._end(shown)
        if session.last is before or session.last is None or not session.last.result.tokens:
            self._note("stopped before it began")
            return Outcome(draft=line)
        self.console.print()
        self._note(self._summary())
        self.console.print()
        return Outcome()

    def _end(self, shown: "tuple[str, StreamedMarkdown | StreamedText] | None") -> None:
        if shown is not None:
            shown[1].finish()

    def _summary(self) -> str:
        session = self.state.session
        assert session.last is not None
        result, now = session.last.result, memory()
        gpu = f" + {gib(now.gpu_reserved)} GPU" if now.gpu_total else ""
        parts = [
            f"first token {result.first_token_seconds:.2f} s",
            f"{result.tokens_per_second:.1f} tokens/s",
            f"context {session.used} of {session.context}",
            f"{gib(now.resident)}{gpu}",
        ]
        reason = str(result.finish_reason)
        if reason == "length" and session.used >= session.context:
            reason = "context"
        if reason in _CUT:
            parts.append(_CUT[reason])
        elif not session.last.text:
            parts.append("the answer is empty")
        return " · ".join(parts)

    def _toolbar(self) -> StyleAndTextTuples:
        session = self.state.session
        used = f"context {session.used} of {session.context} ({session.used / session.context:.0%})"
        return [("", f" {self.state.model} · {used} ")]

    def _is_command(self) -> bool:
        return self._prompts.default_buffer.text.startswith("/")

    def _history(self, path: Path | None) -> History:
        if path is None:
            return InMemoryHistory()
        try:
            return _History(path)
        except OSError as error:
            self._note(f"no history: {path}: {error.strerror}")
            return InMemoryHistory()

    def _note(self, text: str) -> None:
        self.console.print(Text(visible(text), style="dim"))


@contextmanager
def _interrupts(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls a function instead of raising wherever the program is."""
    before = signal.signal(signal.SIGINT, lambda *_: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _no_echo() -> Iterator[None]:
    """What is typed is not shown, and waits for the next input line as it was typed."""
    try:
        import termios
    except ImportError:  # Windows, where nothing is shown unless it is read
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    quiet: list[Any] = termios.tcgetattr(descriptor)
    quiet[0] &= ~termios.ICRNL
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(descriptor, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
