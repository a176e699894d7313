"""Writing to disk so that a file or a folder is there whole or not at all.

A file is written under another name, synced and renamed. A checkpoint folder is filled beside its
target and takes the target's name when everything in it is on the disk.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from salience.checkpoint import DTYPES, INDEX_NAME
from salience.errors import SalienceError, StorageError
from salience.machine import free_disk_bytes

SHARD_BYTES = 2**29
_PIECE = 2**22  # numbers
# What float tensors may be stored in, by the name that configs and the command line have for it.
FLOAT_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ShardWriter:
    """Write the tensors and files of a checkpoint into a folder.

    Args:
        folder: an empty folder.
        shard_bytes: a shard is written when this much is waiting. Of tensors that are mapped from
            other files it costs no memory.

    Raises:
        StorageError: the disk is full or not writable.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self._shard_bytes = shard_bytes
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []
        self._total = 0

    def add(self, name: str, tensor: Tensor) -> int:
        """Queue one tensor; it is copied to the CPU now. Returns its bytes."""
        tensor = tensor.detach().contiguous().cpu()
        self._waiting[name] = tensor
        self._waiting_bytes += tensor.nbytes
        if self._waiting_bytes >= self._shard_bytes:
            self._flush()
        return tensor.nbytes

    def write_json(self, name: str, value: object) -> None:
        """Write a JSON file into the checkpoint."""
        write_json(self.folder / name, value)

    def finish(self) -> None:
        """Write what waits, name the shards, and put everything on the disk."""
        self._flush()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        with disk_errors(self.folder):
            for i, (file, names) in enumerate(self._shards, start=1):
                final = f"model-{i:05d}-of-{count:05d}.safetensors"
                final = final if count > 1 else "model.safetensors"
                file.rename(self.folder / final)
                weight_map.update(dict.fromkeys(names, final))
        if count > 1:
            metadata = {"total_size": self._total}
            self.write_json(INDEX_NAME, {"metadata": metadata, "weight_map": weight_map})
        with disk_errors(self.folder):
            for file in self.folder.rglob("*"):
                if file.is_file():
                    sync(file)
            sync(self.folder)

    def _flush(self) -> None:
        if not self._waiting:
            return
        file = self.folder / f"shard-{len(self._shards)}"
        with disk_errors(self.folder):
            names = list(self._waiting)
            save_tensors(file, self._waiting, {"format": "pt"})
        self._total += self._waiting_bytes
        self._shards.append((file, names))
        self._waiting, self._waiting_bytes = {}, 0


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file, whole or not at all.

    Raises:
        StorageError: the disk is full or not writable.
    """
    with replacing(path) as temporary:
        save_tensors(temporary, dict(tensors), metadata)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, the same bytes as the library, but one tensor at a time.

    The library lays the whole file out in memory first. Tensors that are mapped from other files
    are read as they are written.

    Args:
        path: the file.
        tensors: taken out of the dict one after the other, so that each can be freed.
        metadata: of the file.
    """
    places = {dtype: place for place, dtype in enumerate(_NAMES)}
    order = sorted(tensors, key=lambda name: (places[tensors[name].dtype], name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            data = tensors.pop(name).detach().contiguous().cpu().flatten()
            file.write(data.view(torch.uint8).numpy().data)


def float_dtype(name: str) -> torch.dtype:
    """The dtype called `name`.

    Raises:
        SalienceError: it is none that float tensors are stored in.
    """
    if name not in FLOAT_DTYPES:
        raise SalienceError(f"--dtype {name!r} is not one of {' and '.join(FLOAT_DTYPES)}")
    return FLOAT_DTYPES[name]


def to_dtype(tensor: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """A float tensor as it is stored.

    Raises:
        SalienceError: it overflows `dtype`.
    """
    stored = tensor.detach().to(dtype)
    if not torch.isfinite(stored).all():
        half = dtype == torch.float16
        mend = "fp16, which the checkpoint stores; use --dtype bfloat16" if half else "bf16"
        raise SalienceError(f"tensor {name} overflows {mend}")
    return stored


def holds(dtype: torch.dtype, tensor: Tensor) -> bool:
    """Whether a dtype has every value of a float tensor, looked at a few rows at a time."""
    if tensor.dtype == dtype:
        return True
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim else tensor[None, None]
    step = max(1, _PIECE // max(1, rows.shape[-1]))
    return all(torch.equal(part.to(dtype).float(), part.float()) for part in rows.split(step))


def write_json(path: Path, value: object) -> None:
    """Write one JSON file, whole or not at all.

    Raises:
        StorageError: the disk is full or not writable.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, which then takes the place of `path`.

    Raises:
        StorageError: the disk is full or not writable.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        try:
            yield temporary
            sync(temporary)
            temporary.rename(path)
            sync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


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


def check_file(path: Path, out: Path) -> None:
    """Refuse a file to write, beside a folder `out` to make, that cannot be made.

    Raises:
        SalienceError: it is there already, its folder is not, or it would be in `out`.
    """
    if out.resolve() in (path.resolve(), *path.resolve().parents):
        raise SalienceError(f"{path} is in the output {out}; name a file elsewhere")
    if path.exists():
        raise SalienceError(f"{path} exists; name another file")
    if not path.resolve().parent.is_dir():
        raise SalienceError(f"the folder of {path} does not exist; make it first")


def check_disk(out: Path, need: int) -> None:
    """Refuse to start what the disk cannot hold.

    Raises:
        StorageError: fewer than `need` bytes are free where `out` would be.
    """
    free = free_disk_bytes(out)
    if free < need:
        raise StorageError(
            f"the disk of {out} has {free / 2**20:.0f} MiB free and the work needs "
            f"{need / 2**20:.0f} MiB; free some or name another output"
        )


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turn an error of the disk into one line that names the output.

    Raises:
        StorageError: instead of the error.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StorageError(f"writing {out} failed: {error}") from error


def sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
