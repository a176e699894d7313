"""Checkpoints on disk, read lazily: never more is held than the tensor asked for."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from salience.errors import SalienceError
from salience.gguf.header import Field, TensorInfo, read_gguf_header
from salience.pt_checkpoint import PtCheckpoint, pt_files

# By their names in safetensors files, and in the order in which the library lays them out: wide
# elements first, so that all are aligned.
DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
INDEX_NAME = "model.safetensors.index.json"
CONFIG_KEY = "salience.config"  # in a GGUF file's metadata: the config.json of the model
BLOCKS = ".blocks"
# Types of 32-column blocks, which may be codes, scales and zeros as a QTensor has them.
BLOCK = 32
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
T = TypeVar("T")


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

    Args:
        folder: where they are.
        files: these of its files, and no others.

    Raises:
        SalienceError: a missing, truncated or malformed file, or a dtype that is not supported.
    """

    def __init__(self, folder: Path, files: Sequence[Path] | None = None) -> None:
        self.path = folder
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        self._files: dict[str, Path] = {}
        for file in self._shards() if files is None else files:
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
                    if dtype not in DTYPES:
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
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype, from the header alone."""
        return DTYPES[self._dtypes[self._known(name)]]

    def tensor(self, name: str) -> Tensor:
        with safe_open(self._files[self._known(name)], framework="pt") as shard:
            return cast(Tensor, shard.get_tensor(name))

    def _known(self, name: str) -> str:
        if name not in self._files:
            raise SalienceError(f"tensor {name} is missing from {self.path}")
        return name


class GgufCheckpoint:
    """A `.gguf` file under its own tensor names; quantized blocks are dequantized by `gguf`.

    `layers` is how many layers it says it has, 0 if it does not say. Blocks of 32 columns are also
    to be had as they are: of a tensor "x", as "x.blocks", uint8 [out, in / 32, bytes of a block].

    Raises:
        SalienceError: not a GGUF file, or a truncated one.
    """

    def __init__(self, path: Path) -> None:
        import numpy

        self.path = path
        header = read_gguf_header(path)
        self._fields, self._tensors = header.fields, header.tensors
        self._bytes = numpy.memmap(path, mode="r")
        for name in self._tensors:
            self._check(name)
        self.architecture = self._said("general.architecture", str, "")
        if not self.architecture:
            raise SalienceError(f"{path} does not name its architecture; convert it again")
        self.layers = self._said(f"{self.architecture}.block_count", int, 0)

    def _said(self, key: str, kind: type[T], otherwise: T) -> T:
        """The value of a key, if it is there, of such a kind."""
        field = self._fields.get(key)
        if field is None:
            return otherwise
        try:
            value = field.value()
        except UnicodeDecodeError:
            value = None
        if not isinstance(value, kind):
            raise SalienceError(f"{key} of {self.path} is no {kind.__name__}; download it again")
        return value

    def _check(self, name: str) -> None:
        """Refuse a tensor of an unknown type, of half a block, or that the file has no bytes of."""
        import gguf

        info = self._tensors[name]
        try:
            kind = gguf.GGMLQuantizationType(info.kind)
        except ValueError:
            raise SalienceError(
                f"tensor {name} of {self.path} is of type {info.kind}, which is not known; "
                "a newer gguf may know it"
            ) from None
        block, _ = gguf.GGML_QUANT_SIZES[kind]
        if not info.shape or info.shape[-1] % block:
            raise SalienceError(
                f"tensor {name} of {self.path} is {list(info.shape)}, no rows of whole blocks of "
                f"{block}; download it again"
            )
        if info.place + self.nbytes(name) > len(self._bytes):
            raise SalienceError(
                f"{self.path} is truncated: tensor {name} reaches beyond its end; download it again"
            )

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        if name.endswith(BLOCKS):
            owner = name.removesuffix(BLOCKS)
            rows, columns = self.shape(owner)
            return (rows, columns // BLOCK, BLOCK_BYTES[self.kind(owner)])
        return self._known(name).shape

    def nbytes(self, name: str) -> int:
        info = self._known(name.removesuffix(BLOCKS))
        return math.prod(info.shape[:-1]) * _row_bytes(info)

    def config(self) -> dict[str, Any] | None:
        """The config.json that salience wrote into the file; None of files by others.

        Raises:
            SalienceError: it is none.
        """
        text = self._said(CONFIG_KEY, str, "")
        if not text:
            return None
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SalienceError(f"{CONFIG_KEY} of {self.path} is no JSON ({error})") from None
        if not isinstance(value, dict):
            raise SalienceError(f"{CONFIG_KEY} of {self.path} should be a JSON object")
        return value

    def fields(self, prefix: str) -> dict[str, Field]:
        """The metadata whose keys begin with `prefix`."""
        return {key: field for key, field in self._fields.items() if key.startswith(prefix)}

    def kind(self, name: str) -> str:
        """llama.cpp's name of a tensor's type, as "F16" and "Q4_0"."""
        import gguf

        return str(gguf.GGMLQuantizationType(self._known(name).kind).name)

    def has_blocks(self, name: str) -> bool:
        """Whether a tensor is a matrix of 32-column blocks."""
        return len(self._known(name).shape) == 2 and self.kind(name) in BLOCK_BYTES

    def tensor(self, name: str) -> Tensor:
        import gguf
        import numpy

        stored = name.removesuffix(BLOCKS)
        info = self._known(stored)
        # memmap's own class makes every view of it slow.
        data = numpy.asarray(self._bytes)[info.place : info.place + self.nbytes(stored)]
        data = data.reshape(*info.shape[:-1], _row_bytes(info))
        if name.endswith(BLOCKS):
            size = BLOCK_BYTES[self.kind(stored)]
            blocks = torch.from_numpy(data.copy())
            return blocks.unflatten(1, (blocks.shape[1] // size, size))
        try:
            values = gguf.dequantize(data, gguf.GGMLQuantizationType(info.kind))
        except (NotImplementedError, ValueError) as error:
            raise SalienceError(f"tensor {name} of {self.path}: {error}") from None
        if values.base is not None or values.dtype != numpy.float32:  # a view of the file
            values = numpy.array(values, dtype=numpy.float32)
        return torch.from_numpy(values)

    def _known(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise SalienceError(f"tensor {name} is missing from {self.path}")
        return self._tensors[name]


def _row_bytes(info: TensorInfo) -> int:
    """Bytes of a row of a tensor in a GGUF file."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(info.kind)]
    return info.shape[-1] // block * size


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
            name: stored
            for name, stored in stored_names.items()
            if stored.removesuffix(BLOCKS) in inner.names()
        }
        self._convert = convert

    def names(self) -> set[str]:
        return set(self._stored)

    def stored_names(self) -> dict[str, str]:
        """The stored name of each of the model's tensors that is there."""
        return dict(self._stored)

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


def open_checkpoint(path: Path) -> Checkpoint:
    """The tensors of a model: of a `.gguf` file, or of a folder by what is in it.

    A folder without other weights may hold one such file.

    Raises:
        SalienceError: none of its kinds, or a broken file.
    """
    if path.is_file():
        return GgufCheckpoint(path)
    if not any(path.glob("*.safetensors")) and not (path / INDEX_NAME).exists() and pt_files(path):
        return PtCheckpoint(path)
    file = only_gguf(path)
    return SafetensorsCheckpoint(path) if file is None else GgufCheckpoint(file)


def only_gguf(folder: Path) -> Path | None:
    """The `.gguf` file of a folder without other weights.

    Raises:
        SalienceError: there are several.
    """
    files = sorted(folder.glob("*.gguf"))
    if not files or any(folder.glob("*.safetensors*")):
        return None
    if len(files) > 1:
        raise SalienceError(f"{folder} holds {len(files)} .gguf files; name one, as {files[0]}")
    return files[0]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        SalienceError: unreadable, not JSON, or not an object.
    """
    if not path.is_file():  # reading a pipe would wait for ever
        raise SalienceError(f"{path} is no file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SalienceError(f"{path} is not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise SalienceError(f"{path} should hold a JSON object")
    return value
