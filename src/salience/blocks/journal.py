"""A long work that any interruption leaves where it was.

Beside the output OUT, until it is whole, lies the folder OUT.partial:

    job.json                  what is being made: model, options, versions
    block-00007.safetensors   what was made of a block, and with it
    block-00007.json          its record; a block is done when this is there
    search-00007.safetensors  the scales and grids found for it, if they are to be saved
    hidden-00007.bin          the hidden states that enter a block, from time to time
    coded-00007.bin           likewise of the quantized blocks, where later ones learn from them
    search.safetensors        the search-*.safetensors in one
    teacher.bin               the hidden states that leave the float model's last block
    tuning.safetensors        how far the pass over the whole model is, from time to time
    tuned-00007.safetensors   what that pass changes of a block; after the last, of what is in none
    tuned.json                its record; the pass is done when this is there
    inputs-00007.safetensors  of a block, while the cost of its widths is measured (--target-bits)
    allocation.json           these costs; the measurement is done when this is there
    final/                    the checkpoint, put together when all blocks are done
    published                 job.json, renamed: `final` is whole and takes the name OUT
    lock                      held by the process that is at it

Every file appears whole under its name or not at all, so a kill at any moment leaves a state of
this list, and the same command goes on from it. Another command is told what differs.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from salience.checkpoint import SafetensorsCheckpoint, read_json
from salience.errors import DoesNotFitError, SalienceError, StorageError
from salience.writer import check_free, disk_errors, replacing, sync, write_json, write_tensors

_CONTINUABLE = (StorageError, DoesNotFitError)
_BEGUN, _PUBLISHED, _LOCK = "job.json", "published", "lock"
_TUNED = "tuned.json"


def is_published(out: Path) -> bool:
    """Whether the checkpoint is whole and has only to take its name, or has."""
    return (_folder(out) / _PUBLISHED).exists()


def held_bytes(out: Path) -> int:
    """Disk that an unfinished job already has."""
    total = 0
    for path in _folder(out).rglob("*"):
        with suppress(OSError):  # another process may be at it, which is refused later
            total += path.stat().st_size if path.is_file() else 0
    return total


def check_output(out: Path) -> None:
    """Refuse an output that is taken, or whose journal's name is.

    Raises:
        SalienceError: naming the folder.
        StorageError: the folder cannot be read.
    """
    folder = _folder(out)
    try:
        if is_published(out):
            return
        names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    except OSError as error:
        raise StorageError(f"cannot read {folder}: {error.strerror}") from None
    if _BEGUN not in names and names - {_LOCK, f".{_BEGUN}.tmp"}:
        raise SalienceError(
            f"{folder} exists and was not made by salience; move it, or name another output"
        )
    try:
        check_free(out)
    except SalienceError:
        if folder.exists() and names <= {_LOCK}:  # what a kill at the very end of a job leaves
            with suppress(OSError):
                (folder / _LOCK).unlink(missing_ok=True)
                folder.rmdir()
        raise


def _folder(out: Path) -> Path:
    out = out.resolve()
    return out.parent / f"{out.name}.partial"


class Journal:
    """The folder beside an output that is being made. Use as a context manager.

    Args:
        out: the checkpoint folder to make.
        job: what decides the bytes of the result, as plain JSON values by the option's name.

    Raises:
        SalienceError: `out` is taken, another process is at it, or it was begun as another job.
        StorageError: the folder cannot be written.
    """

    def __init__(self, out: Path, job: Mapping[str, Any]) -> None:
        self.out = out.resolve()  # a link or "." cannot be renamed to
        self.folder = _folder(out)
        self.final = self.folder / "final"
        self._begun = self.folder / _BEGUN
        self._published = self.folder / _PUBLISHED
        self._search_file = self.folder / "search.safetensors"
        self._job = dict(job)
        self._lock_file = self.folder / _LOCK
        self._lock = FileLock(self._lock_file, timeout=0)

    def __enter__(self) -> "Journal":
        try:
            check_output(self.out)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout:
            raise SalienceError(f"another process is making {self.out}; wait for it") from None
        except OSError as error:
            raise StorageError(f"cannot write to {self.folder}: {error.strerror}") from None
        try:
            check_output(self.out)  # the one that had the lock may just have finished
            self._begin()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Bad input leaves nothing. What can be continued is kept: a full disk, Ctrl-C, a crash.
        refused = kind is not None and issubclass(kind, SalienceError)
        try:
            if kind is None or (refused and not issubclass(kind, _CONTINUABLE)):
                self._remove()
        finally:
            self._lock.release()

    def _begin(self) -> None:
        path = self._published if self._published.exists() else self._begun
        if not path.exists():
            write_json(path, self._job)
            return
        begun = read_json(path)
        wanted = json.loads(json.dumps(self._job))
        for key in [*wanted, *begun]:
            if begun.get(key) != wanted.get(key):
                raise SalienceError(
                    f"{self.folder} was begun with {key} {begun.get(key)}, now it is "
                    f"{wanted.get(key)}; use that, or delete the folder to start over"
                )

    def _remove(self) -> None:
        """Delete the folder, in an order in which a kill leaves nothing that looks done."""
        last = (self._begun, self._published, self._lock_file)
        with disk_errors(self.folder):
            for record in (*self.folder.glob("block-*.json"), self.folder / _TUNED):
                record.unlink(missing_ok=True)
            for path in self.folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path not in last:
                    path.unlink()
            for path in last:
                path.unlink(missing_ok=True)
        with suppress(OSError):  # another process may just have come
            self.folder.rmdir()

    @property
    def finished(self) -> bool:
        """Whether the checkpoint is whole and has only to be published, or was."""
        return self._published.exists()

    def done(self) -> int:
        """How many blocks are done, from the first on."""
        count = 0
        while self._record(count).exists():
            count += 1
        return count

    def save_block(self, index: int, tensors: Mapping[str, Tensor], record: object) -> None:
        """Write what was made of a block; it is done when this returns."""
        write_tensors(self._tensors(index), tensors, {"format": "pt"})
        write_json(self._record(index), record)

    def save_search(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Write what was found for a block, before the block itself."""
        write_tensors(self._search(index), tensors, {})

    def join_searches(self, info: Mapping[str, str], blocks: int) -> None:
        """Put what was found for all blocks into one file, for `publish`."""
        tensors = {}
        for index in range(blocks):
            path = self._search(index)
            with self._undamaged(path), safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    tensors[name] = file.get_tensor(name)
        write_tensors(self._search_file, tensors, info)

    def record(self, index: int) -> dict[str, Any]:
        """The record of a block that is done.

        Raises:
            StorageError: damaged.
        """
        path = self._record(index)
        with self._undamaged(path):
            return read_json(path)

    @contextmanager
    def block(self, index: int) -> Iterator[Any]:
        """The tensors of a block that is done, an open safetensors file.

        Raises:
            StorageError: damaged.
        """
        path = self._tensors(index)
        with self._undamaged(path), safe_open(path, framework="pt") as file:
            yield file

    @contextmanager
    def _undamaged(self, path: Path) -> Iterator[None]:
        """Say of a file that cannot be read how to go on without it."""
        try:
            yield
        except (SafetensorError, SalienceError, OSError) as error:
            if isinstance(error, StorageError):
                raise
            raise StorageError(
                f"{path} is damaged ({error}); delete {self.folder} to start over"
            ) from None

    @property
    def teacher_file(self) -> Path:
        """Where the hidden states that leave the float model's last block may be."""
        return self.folder / "teacher.bin"

    def save_state(self, tensors: Mapping[str, Tensor], values: object) -> None:
        """Write how far the pass over the whole model is."""
        write_tensors(self._state_file, tensors, {"values": json.dumps(values)})

    def load_state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What `save_state` last wrote.

        Raises:
            StorageError: damaged.
        """
        path = self._state_file
        if not path.exists():
            return None
        with self._undamaged(path), safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads(file.metadata()["values"])

    def save_tuned(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Write what the pass over the whole model changes of a block."""
        write_tensors(self._tuned(index), tensors, {"format": "pt"})

    def tuned(self, index: int) -> dict[str, Tensor]:
        """What that pass changed, once it is done.

        Raises:
            StorageError: damaged.
        """
        path = self._tuned(index)
        if not (self.folder / _TUNED).exists() or not path.exists():
            return {}
        with self._undamaged(path), safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def save_tuning(self, record: object) -> None:
        """Say that the pass is done; `tuned` has its results from now on."""
        write_json(self.folder / _TUNED, record)

    def tuning(self) -> dict[str, Any] | None:
        """The record of the pass over the whole model; None until it is done.

        Raises:
            StorageError: damaged.
        """
        path = self.folder / _TUNED
        if not path.exists():
            return None
        with self._undamaged(path):
            return read_json(path)

    def checkpoint(self, indices: Iterable[int]) -> SafetensorsCheckpoint:
        """The tensors of blocks that are done, as one checkpoint.

        Raises:
            StorageError: damaged.
        """
        paths = [self._tensors(index) for index in indices]
        with self._undamaged(self.folder):
            return SafetensorsCheckpoint(self.folder, paths)

    def hidden_file(self, index: int, kind: str = "hidden") -> Path:
        """Where the hidden states that enter a block are or would be."""
        return self.folder / f"{kind}-{index:05d}.bin"

    def save_hidden(self, index: int, hidden: Tensor, kind: str = "hidden") -> None:
        """Write the hidden states that enter a block."""
        with replacing(self.hidden_file(index, kind)) as temporary:
            hidden.cpu().numpy().tofile(temporary)

    def latest_hidden(self, before: int, kind: str = "hidden") -> int | None:
        """The last block, up to `before`, whose hidden states are on the disk."""
        there = [i for i in range(before, -1, -1) if self.hidden_file(i, kind).exists()]
        return there[0] if there else None

    def forget_hidden(self, done: int, kind: str = "hidden") -> None:
        """Delete hidden states that going on after `done` blocks would not read."""
        latest = self.latest_hidden(done, kind)
        for path in self.folder.glob(f"{kind}-*.bin"):
            if latest is None or path < self.hidden_file(latest, kind):
                path.unlink()

    def publish(self, search: Path | None = None) -> None:
        """Give `final` the name of the output, the search its own, and delete all else."""
        with disk_errors(self.out):
            if self._begun.exists():
                self._begun.rename(self._published)
                sync(self.folder)
        # From here on a kill is followed by the rest of this.
        if self.final.exists():
            if search is not None:
                with replacing(search) as temporary:
                    shutil.copyfile(self._search_file, temporary)
            with disk_errors(self.out):
                self.final.rename(self.out)
                sync(self.out.parent)

    def _tensors(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def _tuned(self, index: int) -> Path:
        return self.folder / f"tuned-{index:05d}.safetensors"

    @property
    def _state_file(self) -> Path:
        return self.folder / "tuning.safetensors"

    def _search(self, index: int) -> Path:
        return self.folder / f"search-{index:05d}.safetensors"

    def _record(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.json"
