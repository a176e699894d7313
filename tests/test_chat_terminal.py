"""The real program on a terminal: a child on a pty, whose screen pyte keeps."""

import errno
import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyte
import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

import salience
from salience.chat.commands import State
from salience.chat.session import Reply, Session
from salience.chat.terminal import Terminal
from salience.runtime import Engine, Sampling

ENTER, TAB, CTRL_C, CTRL_D, CTRL_J, UP = "\r", "\t", "\x03", "\x04", "\n", "\x1b[A"
PATIENCE = 60.0  # seconds, on a machine that others use


class Program:
    """`salience chat MODEL` in a child; forked, as importing all takes longer than the talk."""

    def __init__(self, model: Path, folder: Path, *args: str, rows: int = 24) -> None:
        self.screen = pyte.HistoryScreen(80, rows, history=10_000, ratio=1e-9)
        self.stream = pyte.ByteStream(self.screen)
        self.bytes = b""
        self.status: int | None = None
        self.child, self.master = pty.fork()
        if self.child == 0:
            self._run(model, folder, args)
        self.resize(80, rows)

    @staticmethod
    def _run(model: Path, folder: Path, args: tuple[str, ...]) -> None:
        status = 70
        try:
            os.chdir(folder)
            os.environ |= {"XDG_STATE_HOME": str(folder / "state"), "TERM": "xterm-256color"}
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
            sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.argv = ["salience", "chat", str(model), "--device", "cpu", *args]
            from salience.cli import main

            main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 71
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def resize(self, columns: int, rows: int) -> None:
        self.screen.resize(rows, columns)
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        if self.status is None:
            os.kill(self.child, signal.SIGWINCH)

    def send(self, *keys: str) -> None:
        for key in keys:
            os.write(self.master, key.encode())

    def read(self, seconds: float = 0.05) -> None:
        """Take what the program wrote; answer when it asks where the cursor is."""
        while select.select([self.master], [], [], seconds)[0]:
            try:
                data = os.read(self.master, 65536)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                data = b""
            if not data:
                self.status = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])
                return
            self.bytes += data
            self.stream.feed(data)
            if b"\x1b[6n" in data:
                row, column = self.screen.cursor.y + 1, self.screen.cursor.x + 1
                self.send(f"\x1b[{row};{column}R")

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display]

    @property
    def text(self) -> str:
        """All that was on the screen, what scrolled off it included."""
        width = self.screen.columns
        top = ["".join(line[at].data for at in range(width)) for line in self.screen.history.top]
        return "\n".join([line.rstrip() for line in top] + self.lines)

    def wait(self, found: Callable[[], Any] | str) -> None:
        """Until something holds, or a text stands on the screen."""
        holds = found if callable(found) else lambda: found in self.text
        end = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < end and self.status is None, (
                f"{found!r} did not come; status {self.status}\n{self.text}"
            )
            self.read()

    def ready(self) -> None:
        """Until the toolbar is there, and with it the input line."""
        self.wait(lambda: any(re.search(r"context \d+ of \d+ \(\d+%\)", x) for x in self.lines))

    def ask(self, *keys: str) -> str:
        """Send a line and wait for the end of what it brings; what the screen shows then."""
        self.ready()
        count = self.text.count("first token")
        self.send(*keys, ENTER)
        self.wait(lambda: self.text.count("first token") > count)
        self.ready()
        return self.text

    def command(self, line: str, answer: str) -> None:
        self.ready()
        self.send(line, ENTER)
        self.wait(answer)
        self.ready()

    def leave(self, *keys: str) -> int:
        """The exit status that keys at the input line bring."""
        self.ready()
        self.send(*keys)
        end = time.monotonic() + PATIENCE
        while self.status is None:
            assert time.monotonic() < end, self.text
            self.read()
        return self.status

    def end(self) -> None:
        if self.status is None:
            os.kill(self.child, signal.SIGKILL)
            os.waitpid(self.child, 0)
        os.close(self.master)


@pytest.fixture(scope="module")
def endless(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama without an end token: the seed of a talk is any, and so were its ends."""
    folder = tmp_path_factory.mktemp("endless") / "llama"
    shutil.copytree(llama, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": []}))
    return folder


@pytest.fixture
def start(endless: Path, tmp_path: Path) -> Iterator[Callable[..., Program]]:
    made: list[Program] = []

    def begin(*args: str, **options: int) -> Program:
        made.append(Program(endless, tmp_path, *args, **options))
        made[-1].ready()
        return made[-1]

    yield begin
    for program in made:
        program.end()


Start = Callable[..., Program]


def saved(program: Program, path: Path) -> list[str]:
    """The texts of the talk, by /save."""
    path.unlink(missing_ok=True)
    program.ready()
    program.send(f"/save {path}", ENTER)
    program.wait(path.exists)
    program.ready()
    return [message["content"] for message in json.loads(path.read_text())["messages"]]


@pytest.mark.slow
def test_a_talk(start: Start, tmp_path: Path) -> None:
    """Lines of several, the line after a reply, /undo, /retry, /save, /load, leaving."""
    program = start("--max-new-tokens", "8", "--temperature", "2")
    program.ask("one", CTRL_J, "two\\", ENTER, "three", "\x1b\r", "four")
    assert "> one\n  two\n  three\n  four\n" in program.text
    line = next(x for x in program.lines if "first token" in x)
    assert re.search(r"first token [\d.]+ s · [\d.]+ tokens/s · context \d+ of 512 · .* GiB", line)
    file = tmp_path / "t.json"
    texts = saved(program, file)
    assert texts[0] == "one\ntwo\nthree\nfour" and len(texts) == 2

    program.ask("\x1b[200~pasted\nlines\x1b[201~")  # as a terminal brackets what is pasted
    assert saved(program, tmp_path / "b.json")[2] == "pasted\nlines"

    count = program.text.count("first token")
    program.send("/retry", ENTER)
    program.wait(lambda: program.text.count("first token") > count)
    again = saved(program, tmp_path / "c.json")
    before = [m["content"] for m in json.loads((tmp_path / "b.json").read_text())["messages"]]
    assert again[:3] == before[:3] and again[3] != before[3]

    program.command("/undo", "1 turns are left")
    program.wait("> pasted\n  lines")
    program.send(CTRL_C)
    program.read(0.3)
    assert "Ctrl-D" not in program.text, "the hint is for an empty line"
    assert saved(program, tmp_path / "d.json") == texts

    program.command("/reset", "begins anew")
    assert saved(program, tmp_path / "e.json") == []
    program.command(f"/load {file}", "1 turns; ")
    assert saved(program, tmp_path / "f.json") == texts
    program.command("/load nothing.json", "No such file")
    program.command("/nonsense", "there is no command /nonsense")
    program.command("/set top_p 3", "top_p is 3.0, must be above 0")
    program.command("/stats", "of them in the cache")

    program.send(CTRL_C)
    program.wait("Ctrl-D or /exit leaves")
    program.ready()
    assert program.leave(CTRL_D) == 0


@pytest.mark.slow
def test_ctrl_c_ends_the_reply_and_not_the_program(start: Start, tmp_path: Path) -> None:
    program = start("--max-new-tokens", "490", "--temperature", "3")
    program.send("first", ENTER)
    program.wait("> first")
    program.wait(lambda: len("".join(program.lines)) > 200)
    program.send("typed ahead")
    program.wait("first token")
    program.wait("> typed ahead")
    assert program.text.count("typed ahead") == 1, "what is typed is not shown within the reply"
    program.send(CTRL_C)
    program.command("/reset", "begins anew")

    program.send("go on", ENTER)
    program.wait("> go on")
    row = [at for at, line in enumerate(program.lines) if line == "> go on"][-1]
    program.wait(lambda: any(program.lines[row + 2 :]))
    program.send(CTRL_C, CTRL_C)
    program.wait("stopped")
    program.ready()
    asked, reply = saved(program, tmp_path / "a.json")
    assert asked == "go on" and reply
    assert program.leave("/exit", ENTER) == 0


@pytest.mark.slow
def test_enter_between_two_input_lines(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the next line, as it would have there."""
    note = Terminal._note

    def slow(terminal: Terminal, text: str) -> None:
        note(terminal, text)
        time.sleep(0.5)

    monkeypatch.setattr(Terminal, "_note", slow)
    program = start()
    program.send(CTRL_C)
    program.wait("/exit leaves")
    program.send("/reset", ENTER)
    program.wait("begins anew")
    assert program.leave(CTRL_D) == 0


@pytest.mark.slow
def test_completion_and_history(start: Start, tmp_path: Path) -> None:
    (tmp_path / "talks").mkdir()
    (tmp_path / "talks" / "one.json").write_text("{}")
    program = start("--max-new-tokens", "3")
    for typed, shown, completed in (
        ("/sta", "times, tokens and memory", "> /stats"),
        ("/set repe", "above 1 against tokens", "> /set repetition_penalty"),
        ("/set markdown of", "off", "> /set markdown off"),
        ("/load talks/o", "one.json", "> /load talks/one.json"),
    ):
        program.ready()
        program.send(typed)
        program.wait(shown)
        program.send(TAB)
        program.wait(completed)
        program.send(CTRL_C)
        program.wait(lambda: program.lines[program.screen.cursor.y] == ">")
    program.ask("remember", CTRL_J, "this")
    assert program.leave(CTRL_D) == 0

    file = tmp_path / "state" / "salience" / "chat_history"
    assert file.stat().st_mode & 0o777 == 0o600 and file.parent.stat().st_mode & 0o777 == 0o700
    again = start()
    again.send(UP)
    again.wait("> remember\n  this")
    again.send(CTRL_C)
    silent = start("--no-history")
    silent.send(UP)
    silent.read(0.5)
    assert "remember" not in silent.text
    silent.ask("secret")
    assert "secret" not in file.read_text()


@pytest.mark.slow
def test_resize_and_long_replies(start: Start, tmp_path: Path) -> None:
    program = start("--max-new-tokens", "400", "--temperature", "1", "--seed", "1", rows=10)
    program.send("go", ENTER)
    program.wait(lambda: len("".join(program.lines)) > 200)
    program.resize(50, 12)
    program.wait("first token")
    program.ready()
    assert "Traceback" not in program.text
    assert len(saved(program, tmp_path / "a.json")[1]) > 200
    program.command("/set markdown off", "markdown off")
    program.command("/undo", "nothing is left")


@pytest.mark.slow
def test_a_full_context(start: Start) -> None:
    program = start("--context", "24", "--max-new-tokens", "100", "--temperature", "2")
    program.ask("a")
    assert "cut off: the context is full" in program.text.replace("\n", " ")
    program.send("more", ENTER)
    program.wait("/undo or /reset makes room")
    program.wait(lambda: program.lines[program.screen.cursor.y] == "> more")


def test_no_terminal(llama: Path, tmp_path: Path) -> None:
    """A terminal that is read from, and a file that is written to."""
    child, master = pty.fork()
    if child == 0:
        descriptor = os.open(tmp_path / "out", os.O_CREAT | os.O_WRONLY)
        os.dup2(descriptor, 1)
        Program._run(llama, tmp_path, ())
    with open(master, "rb", buffering=0) as file:
        said = b""
        try:
            while data := file.read(1024):
                said += data
        except OSError:
            pass
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert b"a talk needs a terminal; give --prompt, or pipe the prompt in" in said


def test_thoughts_are_dim_and_above_the_answer(
    llama: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(Engine(salience.load(llama), tokenizer, max_context=64))
    session.sampling = Sampling(max_new_tokens=1)
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=60, color_system="standard")

    def pieces(text: str) -> Iterator[tuple[str, str]]:
        yield "Two and ", ""
        yield "two", ""
        yield "", "It is **4**."
        session.last = Reply("It is **4**.", "Two and two", session.engine.generate([[5]])[0])

    monkeypatch.setattr(session, "stream", pieces)
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("2 + 2?\r/exit\r")
        Terminal(State(session, "tiny"), None, console).run()
    screen = pyte.Screen(60, 20)
    screen.set_mode(pyte.modes.LNM)
    pyte.Stream(screen).feed(file.getvalue())
    lines = [line.rstrip() for line in screen.display]
    assert lines[0] == "tiny; /help lists commands and keys"
    assert lines[1:6] == ["", "Two and two", "", "It is 4.", ""]
    assert lines[6].startswith("first token ")
    assert "\x1b[2mTwo and two" in file.getvalue() and "\x1b[2mIt is" not in file.getvalue()
