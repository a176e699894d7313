"""Runs of the command line that start at once, and that can be killed at any write.

Importing everything takes longer than a tiny quantization, so one process imports it and forks a
child for each run. The process itself never computes: torch's threads do not survive a fork.

A run is killed after some seconds, or before its n-th change of the disk. Changes are counted by an
audit hook, which sees every open for writing, rename, deletion and so on that Python does; what
safetensors writes is seen when the file is then synced. With `tear`, a file that is about to be
synced or added to is first cut in half: the kill came in the middle of writing it.
"""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from types import TracebackType
from typing import Any

_CHANGES = {
    "os.mkdir": 0,
    "os.remove": 0,
    "os.rmdir": 0,
    "os.rename": 0,
    "os.chmod": 0,
    "shutil.rmtree": 0,
    "shutil.copyfile": 1,
}


@dataclass(frozen=True)
class Run:
    """How a run ended: exit status (negative for a signal), output, the changes it made, and its
    peak of resident bytes, of which much is what had been imported before.
    """

    status: int
    stdout: str
    stderr: str
    changes: list[str] = field(default_factory=list)
    peak: int = 0

    @property
    def line(self) -> str:
        """The message of a refusal, which is one line."""
        assert self.status > 0 and self.stdout == "", self
        said = without_warnings(self.stderr)
        assert said.startswith("error: ") and said.count("\n") == 1, self.stderr
        return said


def without_warnings(stderr: str) -> str:
    """What is said beside what vLLM and SGLang would mind of a tiny model."""
    lines = stderr.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("warning: "))


Stamps = dict[str, tuple[int, int]]


def finished_blocks(folder: Path) -> Stamps:
    """Inode and time of the files of each block that has its record, in OUT.partial."""
    found = {}
    for record in folder.glob("block-*.json"):
        for file in (record, record.with_suffix(".safetensors")):
            status = file.stat()
            found[file.name] = (status.st_ino, status.st_mtime_ns)
    return found


def published_blocks(run: Run) -> Stamps:
    """The same of all blocks at the moment a run was about to publish."""
    words = [line.split() for line in run.changes if line.startswith("kept ")]
    return {name: (int(inode), int(time)) for _, name, inode, time in words}


# All of a report that two runs of one job may have differently.
_COSTS = {"seconds", "phase_seconds", "peak_rss_bytes", "peak_vram_bytes"}


def differences(a: Path, b: Path) -> list[str]:
    """Names of the files of two checkpoints that differ, but for time and memory in the report."""
    names = {path.name for folder in (a, b) for path in folder.iterdir()}
    return sorted(name for name in names if _content(a / name) != _content(b / name))


def _content(path: Path) -> object:
    if not path.is_file():
        return None
    if path.name != "salience_report.json":
        return path.read_bytes()
    report = json.loads(path.read_text(encoding="utf-8"))
    report["blocks"] = [_without_costs(block) for block in report["blocks"]]
    return _without_costs(report)


def _without_costs(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in _COSTS}


class Workshop:
    """A process to fork runs from. Use as a context manager."""

    def __enter__(self) -> "Workshop":
        environment = {
            **os.environ,
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def start(self, *args: object, cwd: Path, **how: Any) -> None:
        """Begin `salience ARGS` in `cwd`, for `end`; one at a time.

        Args:
            args: of the command line.
            cwd: where it runs, and below which changes are counted.
            how: of these, whatever is wanted:
                kill_after: seconds.
                kill_at: number of the change before which the run is killed, from 1.
                tear: cut the file that this change is about in half.
                fail_at: number of the change from which on all writes fail, as on a full disk.
                on_disk: keep hidden states on the disk.
                save_seconds: between copies of hidden states, or of what is tuned, in memory.
                shard_bytes: of a shard of the checkpoint.
                file_bytes: most that a file can be; writing more fails.
                stdin: text that is piped in.
                iterations: that each block learns for, with --effort best.
                no_disk_check: leave out the comparison of what is needed with what is free.
                program: Python to run with ARGS in place of the command line.
        """
        assert self._process.stdin is not None
        request = {"args": list(map(str, args)), "cwd": str(cwd), **how}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def end(self) -> Run:
        """Wait for what was started."""
        assert self._process.stdout is not None
        return Run(**json.loads(self._process.stdout.readline()))

    def __call__(self, *args: object, cwd: Path, **how: Any) -> Run:
        """`start` and `end`."""
        self.start(*args, cwd=cwd, **how)
        return self.end()


def _serve() -> None:
    import transformers
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import salience.cli
    import salience.pipeline.quantize

    # What is made on the first use took half of each run: Transformers' table of renamings, and
    # what typer imports when there are options to read.
    get_checkpoint_conversion_mapping("llama")
    sys.argv = ["salience", "quantize", "nowhere", "-o", "nowhere"]
    with redirect_stderr(StringIO()), suppress(SystemExit):
        salience.cli.main()
    for line in sys.stdin:
        request = json.loads(line)
        scratch = [os.memfd_create(name) for name in ("stdout", "stderr", "changes")]
        child = os.fork()
        if child == 0:
            _child(request, scratch)
        if "kill_after" in request:
            time.sleep(request["kill_after"])
            os.kill(child, signal.SIGKILL)
        _, status, used = os.wait4(child, 0)
        texts = []
        for descriptor in scratch:
            os.lseek(descriptor, 0, os.SEEK_SET)
            with os.fdopen(descriptor, encoding="utf-8") as file:
                texts.append(file.read())
        answer = {
            "status": os.waitstatus_to_exitcode(status),
            "stdout": texts[0],
            "stderr": texts[1],
            "changes": texts[2].splitlines(),
            "peak": used.ru_maxrss * 1024,
        }
        print(json.dumps(answer), flush=True)


def _child(request: dict[str, Any], scratch: list[int]) -> None:
    from salience import writer
    from salience.blocks import hidden
    from salience.cli import main
    from salience.learning import end_to_end
    from salience.methods import BEST, EFFORTS, Tuning
    from salience.pipeline import quantize as pipeline
    from salience.planning.plan import Budget

    os.chdir(request["cwd"])
    piped = os.memfd_create("stdin")
    os.write(piped, request.get("stdin", "").encode())
    os.lseek(piped, 0, os.SEEK_SET)
    os.dup2(piped, 0)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    os.dup2(scratch[0], 1)
    os.dup2(scratch[1], 2)
    if "on_disk" in request:
        budget = Budget(request["on_disk"], False, 0)
        pipeline.choose_budget = lambda *_: budget
    if "iterations" in request:
        tuning = Tuning(request["iterations"], batch_tokens=32, check_every=2)
        EFFORTS["best"] = {"awq": replace(BEST, learns=tuning)}
    if "no_disk_check" in request:
        pipeline.check_disk = lambda *_: None
    hidden.SAVE_SECONDS = request.get("save_seconds", hidden.SAVE_SECONDS)
    end_to_end.SAVE_SECONDS = request.get("save_seconds", end_to_end.SAVE_SECONDS)
    if "shard_bytes" in request:
        writer.ShardWriter.__init__.__defaults__ = (request["shard_bytes"],)
    if "file_bytes" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"],) * 2)
    sys.addaudithook(_Hook(request, scratch[2]))
    sys.argv = ["salience", *request["args"]]
    status = 1
    try:
        if "program" in request:
            exec(request["program"], {"__name__": "__main__"})
            status = 0
        else:
            main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class _Hook:
    """Counts changes of the disk, and does what was asked for at one of them."""

    def __init__(self, request: dict[str, Any], log: int) -> None:
        self._root = request["cwd"]
        self._kill_at, self._tear = request.get("kill_at", 0), request.get("tear", False)
        self._fail_at = request.get("fail_at", 0)
        self._log, self._count, self._busy = log, 0, False

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self._busy:
            return
        self._busy = True
        try:
            path = self._changed(event, args)
            if path is not None:
                self._change(event, path, args)
        finally:
            self._busy = False

    def _changed(self, event: str, args: tuple[Any, ...]) -> str | None:
        if event in _CHANGES:
            path = args[_CHANGES[event]]
        elif event == "open":
            # A sync opens what was just written; its temporary name tells it from a reader.
            path, _, flags = args
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
            if not isinstance(path, (str, os.PathLike)):
                return None
            name = os.path.basename(os.fspath(path))
            if not writes and not name.endswith(".tmp") and "final" not in Path(path).parts:
                return None
        else:
            return None
        full = os.path.abspath(os.fspath(path))
        return full if full.startswith(f"{self._root}/") else None

    def _change(self, event: str, path: str, args: tuple[Any, ...]) -> None:
        self._count += 1
        other = f" {os.path.relpath(args[1], self._root)}" if event == "os.rename" else ""
        line = f"{event} {os.path.relpath(path, self._root)}{other}\n"
        os.write(self._log, line.encode())
        if event == "os.rename" and path.endswith("/job.json"):
            for file in sorted(Path(path).parent.glob("block-*")):
                status = file.stat()
                text = f"kept {file.name} {status.st_ino} {status.st_mtime_ns}\n"
                os.write(self._log, text.encode())
        if self._count == self._kill_at:
            if self._tear and event == "open" and os.path.isfile(path):
                os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        if self._fail_at and self._count >= self._fail_at and event in ("open", "os.mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


if __name__ == "__main__":
    _serve()
