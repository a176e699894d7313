"""What a quantized weight looks like: how many bits, in groups of how many columns.

A weight row of `in_features` columns is cut into groups of `group_size`. Each group stores one
fp16 scale and one integer zero, each weight a code of `bits` bits:

    w = scale * (code - zero),   0 <= code < 2**bits

Smaller groups follow the weights more closely and cost more: w4g128 takes 4.16 bits a weight,
w4g64 4.31, w4g32 4.63.
"""

import re
from dataclasses import dataclass

from salience.errors import SalienceError

_PATTERN = re.compile(r"w([1-8])(?:g([1-9][0-9]*)|(channel))(-sym)?")
_USUAL_GROUPS = (256, 128, 64, 32, 16)
_SCALE_BITS = 16


@dataclass(frozen=True, slots=True)
class Scheme:
    """How weights are coded.

    Args:
        bits: bits per code, 1 to 8.
        group_size: columns that share a scale and a zero; -1 for a whole row.
        sym: the zero is fixed at 2**(bits-1), so the grid is symmetric around 0.
        codebook: name of a non-uniform grid; None for the uniform one.

    Raises:
        SalienceError: a value outside its range.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = False
    codebook: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise SalienceError(f"bits is {self.bits}; use 1 to 8")
        if self.group_size != -1 and self.group_size < 1:
            raise SalienceError(f"group_size is {self.group_size}; use -1 (whole row) or more")

    @classmethod
    def parse(cls, text: str) -> "Scheme":
        """Read `w4g128`, `w3g64`, `w4channel` (one group a row), each with `-sym` if symmetric."""
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise SalienceError(
                f"scheme {text!r} is not understood; write it like w4g128, w3g64-sym or w4channel"
            )
        bits, group, channel, sym = match.groups()
        return cls(int(bits), -1 if channel else int(group), sym is not None)

    def __str__(self) -> str:
        group = "channel" if self.group_size == -1 else f"g{self.group_size}"
        return f"w{self.bits}{group}{'-sym' if self.sym else ''}"

    @property
    def levels(self) -> int:
        """The largest code, 2**bits - 1."""
        return 2**self.bits - 1

    def group_columns(self, in_features: int) -> int:
        """Columns in one group of a weight with `in_features` columns."""
        return in_features if self.group_size == -1 else self.group_size

    def groups(self, in_features: int) -> int:
        """Groups in a row of `in_features` columns.

        Raises:
            SalienceError: the group size does not divide `in_features`.
        """
        size = self.group_columns(in_features)
        if in_features % size:
            raise SalienceError(f"group size {size} does not divide in_features {in_features}")
        return in_features // size

    def bits_per_weight(self, in_features: int) -> float:
        """Stored bits a weight, scales and zeros included."""
        return self.bits + (_SCALE_BITS + self.bits) / self.group_columns(in_features)


def fitting_group_sizes(in_features: set[int]) -> list[int]:
    """The usual group sizes that divide every one of `in_features`, largest first."""
    return [g for g in _USUAL_GROUPS if all(n % g == 0 for n in in_features)]
