"""What a quantized weight looks like: how many bits, in groups of how many columns.

A weight row of `in_features` columns is cut into groups of `group_size`. Each group stores one
fp16 scale and one integer zero, each weight a code of `bits` bits:

    w = scale * (code - zero),   0 <= code < 2**bits

Smaller groups follow the weights more closely and cost more: w4g128 takes 4.16 bits a weight,
w4g64 4.31, w4g32 4.63.

A codebook scheme has uneven steps and no zeros (`salience.codebook`). `nf4` stores one fp32 scale
for 64 weights, 4.5 bits a weight; `nf4-dq` stores the scales in 8 bits too, 4.13. Other groups are
written out, `nf4g128`. `fp4` is an older table.
"""

import re
from dataclasses import dataclass

from salience.errors import SalienceError

CODEBOOKS = ("nf4", "fp4")
NESTED_BLOCK = 256  # scales that share a scale, with double quantization
_PATTERN = re.compile(r"w([1-8])(?:g([1-9][0-9]{0,8})|(channel))(-sym)?")
_CODEBOOK_PATTERN = re.compile(rf"({'|'.join(CODEBOOKS)})(?:g([1-9][0-9]{{0,8}}))?(-dq)?")
_USUAL_GROUPS = (256, 128, 64, 32, 16)
_SCALE_BITS = 16
_CODEBOOK_BITS = 4
_CODEBOOK_GROUP = 64
_CODEBOOK_SCALE_BITS = 32
_NESTED_SCALE_BITS = 8


@dataclass(frozen=True, slots=True)
class Scheme:
    """How weights are coded.

    Args:
        bits: bits per code, 1 to 8.
        group_size: columns that share a scale and a zero; -1 for a whole row.
        sym: the zero is fixed at 2**(bits-1), so the grid is symmetric around 0.
        codebook: name of a non-uniform grid, "nf4" or "fp4"; None for the uniform one.
        double_quant: the scales of a codebook scheme are quantized too.

    Raises:
        SalienceError: a value outside its range.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = False
    codebook: str | None = None
    double_quant: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise SalienceError(f"bits is {self.bits}; use 1 to 8")
        if self.group_size != -1 and self.group_size < 1:
            raise SalienceError(f"group_size is {self.group_size}; use -1 (whole row) or more")
        if self.codebook is None:
            if self.double_quant:
                raise SalienceError("double_quant is for nf4; use scheme nf4-dq")
        elif self.codebook not in CODEBOOKS:
            raise SalienceError(f"codebook is {self.codebook!r}; use {' or '.join(CODEBOOKS)}")
        elif self.bits != _CODEBOOK_BITS or self.group_size < 1 or self.sym:
            raise SalienceError(f"{self.codebook} has 4 bits, a group size, and no symmetric form")

    @classmethod
    def parse(cls, text: str) -> "Scheme":
        """Read `w4g128`, `w3g64`, `w4channel` (one group a row), each with `-sym` if symmetric;
        `nf4` or `fp4`, `nf4g128` of other groups than 64, and `nf4-dq` with double quantization.
        """
        match = _CODEBOOK_PATTERN.fullmatch(text)
        if match is not None:
            name, group, nested = match.groups()
            size = int(group) if group else _CODEBOOK_GROUP
            return cls(_CODEBOOK_BITS, size, codebook=name, double_quant=nested is not None)
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise SalienceError(
                f"scheme {text!r} is not understood; write it like w4g128, w3g64-sym or w4channel, "
                "or nf4 or nf4-dq or fp4"
            )
        bits, group, channel, sym = match.groups()
        return cls(int(bits), -1 if channel else int(group), sym is not None)

    def __str__(self) -> str:
        if self.codebook is not None:
            group = "" if self.group_size == _CODEBOOK_GROUP else f"g{self.group_size}"
            return f"{self.codebook}{group}{'-dq' if self.double_quant else ''}"
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
        if not size or in_features % size:  # a whole row of no columns is no group
            raise SalienceError(f"group size {size} does not divide in_features {in_features}")
        return in_features // size

    def bits_per_weight(self, in_features: int) -> float:
        """Stored bits a weight, scales and zeros included."""
        columns = self.group_columns(in_features)
        if self.codebook is None:
            return self.bits + (_SCALE_BITS + self.bits) / columns
        if self.double_quant:
            nested = _NESTED_SCALE_BITS + _CODEBOOK_SCALE_BITS / NESTED_BLOCK
            return self.bits + nested / columns
        return self.bits + _CODEBOOK_SCALE_BITS / columns


def fitting_group_sizes(in_features: set[int]) -> list[int]:
    """The usual group sizes that divide every one of `in_features`, largest first."""
    return [g for g in _USUAL_GROUPS if all(n % g == 0 for n in in_features)]
