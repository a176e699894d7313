"""The header of a GGUF file: what it says of the model, and where its tensors are.

A header says how much follows: so many keys, strings of such a length, arrays of so many values.
Here every count is held against the bytes that are left, so that a file that claims 2**60 values is
refused at once (`gguf`'s own reader would count them), and reading costs what the file is long:

    "GGUF"  version u32  tensors u64  keys u64
    a key     name, type u32, value;     a string is its length u64 and its bytes,
                                         an array the type u32 of its values, their count u64, they
    a tensor  name, axes u32, size u64 of each, type u32, place u64 after the header's end

The end is filled up to a multiple of the alignment, which is 32 or what general.alignment says.
All integers are little-endian.
"""

import math
import mmap
import struct
from collections.abc import Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from salience.errors import SalienceError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # of `struct`
_U32, _STRING, _ARRAY = 4, 8, 9
_MOST_VALUES = 2**22  # in all arrays: a vocabulary of 256k, its scores, types and merges take 2**20
_MOST_AXES = 4
_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class Field:
    """The value of a key.

    Args:
        kind: its type, by GGUF's number.
        of: the type of an array's values; None if it is no array.
        raw: a number, the bytes of a string, or a list of either.
    """

    kind: int
    of: int | None
    raw: Any

    def value(self) -> Any:
        """It, with strings for bytes.

        Raises:
            UnicodeDecodeError: bytes that are no UTF-8.
        """
        if isinstance(self.raw, bytes):
            return self.raw.decode()
        if self.of == _STRING:
            return [each.decode() for each in self.raw]
        return self.raw


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's shape, rows before columns; its type, by ggml's number; its first byte."""

    shape: tuple[int, ...]
    kind: int
    place: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What is before the tensors' bytes."""

    fields: dict[str, Field]
    tensors: dict[str, TensorInfo]


def read_gguf_header(path: Path) -> GgufHeader:
    """Read it, and refuse one that claims more than the file holds.

    Raises:
        SalienceError: unreadable, no GGUF file, truncated, big-endian, or with such claims.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).header()
    except (OSError, ValueError) as error:
        raise SalienceError(
            f"{path} is truncated or no GGUF file ({error}); download it again"
        ) from None


class _Reader:
    """A place in the header, which only moves on."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0
        self._values = 0

    def header(self) -> GgufHeader:
        if self._take(4) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._number("I")
        if version not in _VERSIONS:
            big = version & 0xFFFF == 0
            raise ValueError("it is big-endian" if big else f"its version is {version}")
        tensors, keys = self._number("Q"), self._number("Q")
        fields: dict[str, Field] = {}
        for _ in range(keys):
            name = self._name("key", fields)
            fields[name] = self._field()
        infos: dict[str, TensorInfo] = {}
        for _ in range(tensors):
            name = self._name("tensor", infos)
            infos[name] = self._tensor()
        step = _alignment(fields)
        start = -(-self._at // step) * step
        placed = {name: replace(each, place=start + each.place) for name, each in infos.items()}
        return GgufHeader(fields, placed)

    def _take(self, count: int) -> bytes:
        left = len(self._data) - self._at
        if count > left:
            raise ValueError(f"{count} bytes should follow where {left} are left")
        self._at += count
        return self._data[self._at - count : self._at]

    def _number(self, code: str) -> int:
        (value,) = struct.unpack(f"<{code}", self._take(struct.calcsize(code)))
        return int(value)

    def _string(self) -> bytes:
        return self._take(self._number("Q"))

    def _name(self, what: str, seen: Container[str]) -> str:
        name = self._string().decode()
        if name in seen:
            raise ValueError(f"{what} {name!r} is there twice")
        return name

    def _field(self) -> Field:
        kind = self._number("I")
        if kind != _ARRAY:
            return Field(kind, None, self._values_of(kind, 1)[0])
        of, count = self._number("I"), self._number("Q")
        self._values += count
        if self._values > _MOST_VALUES:
            raise ValueError(f"its arrays claim {self._values} values, more than any vocabulary")
        return Field(kind, of, self._values_of(of, count))

    def _values_of(self, kind: int, count: int) -> list[Any]:
        """Values that are no arrays."""
        if kind == _STRING:
            return [self._string() for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"a value is of type {kind}, which is not supported")
        code = f"<{count}{_SCALARS[kind]}"
        return list(struct.unpack(code, self._take(struct.calcsize(code))))

    def _tensor(self) -> TensorInfo:
        axes = self._number("I")
        if axes > _MOST_AXES:
            raise ValueError(f"a tensor has {axes} axes")
        shape = tuple(reversed([self._number("Q") for _ in range(axes)]))
        kind, place = self._number("I"), self._number("Q")
        if 0 in shape:  # with it any other axis could be of any length
            raise ValueError("a tensor has no elements")
        # No type takes less than a bit for each.
        if math.prod(shape) > 8 * len(self._data) or place > len(self._data):
            raise ValueError("a tensor reaches beyond the end")
        return TensorInfo(shape, kind, place)


def _alignment(fields: dict[str, Field]) -> int:
    field = fields.get("general.alignment")
    if field is None:
        return _ALIGNMENT
    if field.kind != _U32 or field.raw.bit_count() != 1:
        raise ValueError("its general.alignment is no power of two")
    return int(field.raw)
