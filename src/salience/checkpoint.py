"""Checkpoints on disk: read lazily a tensor at a time, written a shard at a time.

Reading never holds more than the tensor asked for. Writing goes to a temporary folder beside the
target, which takes the target's name only when everything in it is on the disk: whoever looks
sees the whole checkpoint or none.
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from salience.errors import SalienceError
from salience.machine import free_disk_bytes

_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_OTHERS = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
INDEX_NAME = "model.safetensors.index.json"


class Checkpoint(Protocol):
    """Named tensors on disk."""

    path: Path

    def names(self) -> set[str]:
        """The names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the header alone."""
        ...

    def nbytes(self, name: str) -> int:
        """Bytes a tensor takes on disk."""
        ...

    def tensor(self, name: str) -> Tensor:
        """One tensor, read now, in its stored dtype (fp32 when it was stored quantized)."""
        ...


class SafetensorsCheckpoint:
    """A folder with `model.safetensors`, or shards and their index.

    Raises:
        SalienceError: a missing, truncated or malformed file, or a dtype that is not supported.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        self._files: dict[str, Path] = {}
        for file in self._shards():
            self._read_header(file)

    def _shards(self) -> list[Path]:
        index = self.path / INDEX_NAME
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise SalienceError(f"{index} has no weight_map; download the checkpoint again")
            names = sorted({str(value) for value in weight_map.values()})
            for name in names:
                # An index is untrusted: a shard lies beside it, whatever the index says.
                if Path(name).name != name or not name.endswith(".safetensors"):
                    raise SalienceError(f"{index} names {name!r}, which is no shard beside it")
            files = [self.path / name for name in names]
        else:
            files = sorted(self.path.glob("*.safetensors"))
            if not files:
                pickles = sorted(p.name for p in self.path.glob("*.bin"))
                found = f"only {pickles[0]}, a pickle: convert it first" if pickles else "none"
                raise SalienceError(f"{self.path} should hold .safetensors files, found {found}")
        for file in files:
            if not file.is_file():
                raise SalienceError(f"shard {file} is missing; download it again")
        return files

    def _read_header(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (not a dict)
                    view = shard.get_slice(name)
                    dtype = view.get_dtype()
                    if dtype not in _FLOATS and dtype not in _OTHERS:
                        raise SalienceError(
                            f"tensor {name} of {file} has dtype {dtype}, which is not supported; "
                            "convert the checkpoint to BF16, F16 or F32"
                        )
                    if name in self._files:
                        raise SalienceError(f"{name} is in both {self._files[name]} and {file}")
                    self._shapes[name] = tuple(view.get_shape())
                    self._dtypes[name] = dtype
                    self._files[name] = file
        except (SafetensorError, OSError) as error:
            raise SalienceError(
                f"{file} is truncated or no safetensors file ({error}); download it again"
            ) from None

    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[self._known(name)]

    def nbytes(self, name: str) -> int:
        count = 1
        for size in self.shape(name):
            count *= size
        dtype = self._dtypes[name]
        return count * (_FLOATS.get(dtype) or _OTHERS[dtype])

    def tensor(self, name: str) -> Tensor:
        with safe_open(self._files[self._known(name)], framework="pt") as shard:
            return cast(Tensor, shard.get_tensor(name))

    def _known(self, name: str) -> str:
        if name not in self._files:
            raise SalienceError(f"tensor {name} is missing from {self.path}")
        return name


class GgufCheckpoint:
    """A `.gguf` file under its own tensor names; quantized blocks are dequantized by `gguf`.

    Raises:
        SalienceError: not a GGUF file, or a truncated one.
    """

    def __init__(self, path: Path) -> None:
        import gguf

        self.path = path
        try:
            reader = gguf.GGUFReader(path)
            architecture = reader.get_field("general.architecture")
            self.architecture = "" if architecture is None else str(architecture.contents())
        except (ValueError, IndexError, KeyError, OSError) as error:
            raise SalienceError(
                f"{path} is truncated or no GGUF file ({error}); download it again"
            ) from None
        if not self.architecture:
            raise SalienceError(f"{path} does not name its architecture; convert it again")
        # The tensors are views of the file; the reader itself holds the vocabulary in memory.
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(n) for n in reversed(self._known(name).shape))

    def nbytes(self, name: str) -> int:
        return int(self._known(name).n_bytes)

    def tensor(self, name: str) -> Tensor:
        import gguf
        import numpy

        tensor = self._known(name)
        try:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise SalienceError(f"tensor {name} of {self.path}: {error}") from None
        return torch.from_numpy(numpy.array(values, dtype=numpy.float32))

    def _known(self, name: str) -> Any:
        if name not in self._tensors:
            raise SalienceError(f"tensor {name} is missing from {self.path}")
        return self._tensors[name]


class RenamedCheckpoint:
    """Another checkpoint under the model's names.

    Args:
        inner: the tensors as stored.
        stored_names: stored name of each of the model's tensors.
        convert: applied to (tensor, stored name), for formats that rearrange values.
    """

    def __init__(
        self,
        inner: Checkpoint,
        stored_names: Mapping[str, str],
        convert: Callable[[Tensor, str], Tensor] | None = None,
    ) -> None:
        self.path = inner.path
        self._inner = inner
        self._stored = {
            name: stored for name, stored in stored_names.items() if stored in inner.names()
        }
        self._convert = convert

    def names(self) -> set[str]:
        return set(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._inner.shape(self._stored_name(name))

    def nbytes(self, name: str) -> int:
        return self._inner.nbytes(self._stored_name(name))

    def tensor(self, name: str) -> Tensor:
        stored = self._stored_name(name)
        tensor = self._inner.tensor(stored)
        return tensor if self._convert is None else self._convert(tensor, stored)

    def _stored_name(self, name: str) -> str:
        if name not in self._stored:
            raise SalienceError(f"tensor {name} is missing from {self.path}")
        return self._stored[name]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        SalienceError: unreadable, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SalienceError(f"{path} is not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise SalienceError(f"{path} should hold a JSON object")
    return value


class ShardWriter:
    """Write a checkpoint folder that appears whole or not at all.

    Use as a context manager: tensors and files go to a temporary folder beside `out`; leaving the
    block without an error renames it to `out`, leaving with one removes it.

    Args:
        out: the folder to make; it must not exist or must be empty.
        shard_bytes: a shard is written when this much is waiting, so about that much memory is
            held.

    Raises:
        SalienceError: `out` is taken, or the disk is full or not writable.
    """

    def __init__(self, out: Path, shard_bytes: int = 2**29) -> None:
        self.out = out.resolve()  # a link or "." cannot be renamed to
        self.folder = self.out.parent / f".{self.out.name}.{secrets.token_hex(4)}"
        self._shard_bytes = shard_bytes
        self._waiting: dict[str, Tensor] = {}
        self._shards: list[tuple[Path, list[str]]] = []
        self._total = 0

    def __enter__(self) -> "ShardWriter":
        check_free(self.out)
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir()
        except OSError as error:
            raise SalienceError(f"cannot write to {self.out.parent}: {error.strerror}") from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            try:
                self._finish()
            except BaseException:
                shutil.rmtree(self.folder, ignore_errors=True)
                raise
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Queue one tensor; it is copied to the CPU now."""
        tensor = tensor.detach().contiguous().cpu()
        self._waiting[name] = tensor
        if sum(t.nbytes for t in self._waiting.values()) >= self._shard_bytes:
            self._flush()

    def write_json(self, name: str, value: object) -> None:
        """Write a JSON file into the checkpoint."""
        text = json.dumps(value, indent=2, sort_keys=False, ensure_ascii=False) + "\n"
        with disk_errors(self.out):
            (self.folder / name).write_text(text, encoding="utf-8")

    def _flush(self) -> None:
        if not self._waiting:
            return
        file = self.folder / f"shard-{len(self._shards)}"
        with disk_errors(self.out):
            save_file(self._waiting, file, metadata={"format": "pt"})
            # safetensors makes its files private; these are as readable as any other new file.
            file.chmod(self.folder.stat().st_mode & 0o666)
        self._total += sum(t.nbytes for t in self._waiting.values())
        self._shards.append((file, list(self._waiting)))
        self._waiting = {}

    def _finish(self) -> None:
        self._flush()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        with disk_errors(self.out):
            for i, (file, names) in enumerate(self._shards, start=1):
                final = f"model-{i:05d}-of-{count:05d}.safetensors"
                final = final if count > 1 else "model.safetensors"
                file.rename(self.folder / final)
                weight_map.update(dict.fromkeys(names, final))
        if count > 1:
            metadata = {"total_size": self._total}
            self.write_json(INDEX_NAME, {"metadata": metadata, "weight_map": weight_map})
        with disk_errors(self.out):
            for file in _files_below(self.folder):
                _sync(file)
            self.folder.rename(self.out)
            _sync(self.out.parent)


def check_free(out: Path) -> None:
    """Refuse an output that cannot become the checkpoint's folder.

    Raises:
        SalienceError: `out` is a file, a folder that is not empty, or where a disk is mounted.
    """
    try:
        taken = any(out.iterdir()) if out.is_dir() else out.exists()
    except OSError as error:
        raise SalienceError(f"output {out} cannot be used: {error.strerror}") from None
    if taken:
        raise SalienceError(f"output {out} exists and is not an empty folder; name another")
    if os.path.ismount(out):
        raise SalienceError(f"a disk is mounted at output {out}; name a new folder in it")


def check_disk(out: Path, need: int) -> None:
    """Refuse to start what the disk cannot hold.

    Raises:
        SalienceError: fewer than `need` bytes are free where `out` would be.
    """
    free = free_disk_bytes(out)
    if free < need:
        raise SalienceError(
            f"the disk of {out} has {free / 2**20:.0f} MiB free and the checkpoint needs "
            f"{need / 2**20:.0f} MiB; free some or name another output"
        )


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turn an error of the disk into one line that names the output.

    Raises:
        SalienceError: instead of the error.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise SalienceError(f"writing {out} failed: {error}") from error


def _files_below(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
