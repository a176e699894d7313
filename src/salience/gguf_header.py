"""The header of a GGUF file, walked once before any library reads it.

A header says how much follows: so many keys, strings of such a length, arrays of so many values.
`gguf` believes it, and an array that claims 2**60 values keeps it busy for good. Here every count
is held against the bytes that are left, so that what follows costs no more than the file is long:

    "GGUF"  version u32  tensors u64  keys u64
    a key     name, type u32, value;     a string is its length u64 and its bytes,
                                         an array the type u32 of its values, their count u64, they
    a tensor  name, axes u32, size u64 of each, type u32, place u64

Integers are little-endian, or big-endian where the version only then is a small number.
"""

import mmap
import struct
from pathlib import Path

from salience.errors import SalienceError

_MAGIC = b"GGUF"
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_MOST_VALUES = 2**22  # in all arrays: a vocabulary of 256k, its scores, types and merges take 2**20
_MOST_AXES = 4


def check_gguf_header(path: Path) -> None:
    """Refuse a file whose header claims more than the file holds.

    Raises:
        SalienceError: unreadable, no GGUF file, truncated, or with such claims.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Header(data).check()
    except (OSError, ValueError) as error:
        raise SalienceError(
            f"{path} is truncated or no GGUF file ({error}); download it again"
        ) from None


class _Header:
    """A place in the header, which only moves on."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0
        self._order = "<"
        self._values = 0

    def check(self) -> None:
        if self._take(4) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._number(4)
        if version & 0xFFFF == 0:
            self._order = ">"
        tensors, keys = self._number(8), self._number(8)
        for what, count, check in (("key", keys, self._value), ("tensor", tensors, self._tensor)):
            seen: set[bytes] = set()
            for _ in range(count):
                name = self._string()
                if name in seen:
                    raise ValueError(f"{what} {name.decode(errors='replace')!r} is there twice")
                seen.add(name)
                check()

    def _take(self, count: int) -> bytes:
        left = len(self._data) - self._at
        if count > left:
            raise ValueError(f"{count} bytes should follow where {left} are left")
        self._at += count
        return self._data[self._at - count : self._at]

    def _number(self, size: int) -> int:
        (value,) = struct.unpack(self._order + {4: "I", 8: "Q"}[size], self._take(size))
        return int(value)

    def _string(self) -> bytes:
        return self._take(self._number(8))

    def _value(self) -> None:
        kind = self._number(4)
        if kind != _ARRAY:
            self._plain(kind, 1)
            return
        kind, count = self._number(4), self._number(8)
        self._values += count
        if self._values > _MOST_VALUES:
            raise ValueError(f"its arrays claim {self._values} values, more than any vocabulary")
        self._plain(kind, count)

    def _plain(self, kind: int, count: int) -> None:
        """Values that are no arrays."""
        if kind in _SCALARS:
            self._take(count * _SCALARS[kind])
        elif kind == _STRING:
            for _ in range(count):
                self._string()
        else:
            raise ValueError(f"a value is of type {kind}, which is not supported")

    def _tensor(self) -> None:
        axes = self._number(4)
        if axes > _MOST_AXES:
            raise ValueError(f"a tensor has {axes} axes")
        elements = 1
        for _ in range(axes):
            elements *= self._number(8)
        self._number(4)
        place = self._number(8)
        # No type takes less than a bit for each.
        if elements > 8 * len(self._data) or place > len(self._data):
            raise ValueError("a tensor reaches beyond the end")
