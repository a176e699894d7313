"""Codebooks: grids whose steps are not even.

A code of a codebook scheme is the place of a value in a fixed table, w = scale * table[code]. NF4's
sixteen values are the quantiles of a normal distribution, scaled to -1 .. 1 with an exact 0: as
many weights fall on each, if weights are normal. FP4 is the older choice: a sign, two bits of
exponent and one of mantissa, so that 0 comes twice and the values around it, where most weights
are, lie far apart. In both the scale is the largest magnitude of a block, the "absmax", so that
there are no zeros to store; no range is searched and no text is looked at.

Double quantization stores these scales, less their mean, in 8 bits: as places in a table of 256
values whose steps grow tenfold from one decade to the next, in blocks of 256 with one scale each.

All numbers are those of bitsandbytes, whose checkpoints are made of them.
"""

import torch
from torch import Tensor

_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4_SIXTHS = (0.0, 0.03125, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4 = (*(0.0 - n / 6 for n in reversed(_FP4_SIXTHS)), *(n / 6 for n in _FP4_SIXTHS))
_TABLES = {"nf4": _NF4, "fp4": _FP4}
_DECADES = 7


def table(name: str, device: torch.device | None = None) -> Tensor:
    """The values of a codebook, ascending, fp32 [2**bits]."""
    return torch.tensor(_TABLES[name], device=device)


def nested_table(device: torch.device | None = None) -> Tensor:
    """The values of a scale's scale, ascending, fp32 [256].

    Decade i, up to 10**(i-6), has 2**i values of each sign: the middles of equal parts of its upper
    nine tenths. 0 and 1 complete them.
    """
    values = [0.0, 1.0]
    for i in range(_DECADES):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        middles = 10 ** (i + 1 - _DECADES) * ((edges[:-1] + edges[1:]) / 2)
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values), device=device)


def nearest(value: Tensor, values: Tensor) -> Tensor:
    """Place in `values` (ascending) of the one nearest to each value, the lower when between two:
    uint8, the shape of `value`.
    """
    middles = (values[:-1] + values[1:]) / 2
    return torch.bucketize(value.contiguous(), middles, out_int32=True).to(torch.uint8)
