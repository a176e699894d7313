"""All rounding of weights to a grid, once.

The uniform grid of a group with smallest value lo and largest value hi (both stretched to hold 0,
so that 0 stays exactly 0) is, with L = 2**bits - 1:

    asymmetric   scale = (hi - lo) / L          zero = round(-lo / scale)
    symmetric    scale = 2 max(-lo, hi) / L     zero = 2**(bits-1)

    code = clamp(round(w / scale) + zero, 0, L)

The scale is rounded to fp16, the precision it is stored in, before any code is computed: codes
made for an unrounded scale would be read back against another grid. Ties round to even.
A narrower [lo, hi] than the group's own clips the outliers and makes every other step finer; where
to stop is what the clip search of `methods.awq` asks.

A codebook has no range to choose: a group's scale is its largest magnitude, fp32, and a code is the
place of the nearest value of the table,

    code = nearest(w * (1 / scale), table)

computed in fp32 whatever the weight's dtype, as bitsandbytes does.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from salience.codebook import nearest, nested_table, table
from salience.errors import SalienceError
from salience.qtensor import NestedScales, QTensor
from salience.scheme import NESTED_BLOCK, Scheme


class Grid(NamedTuple):
    """One grid a group: `scales` fp16, `zeros` fp32 integers, both [..., groups]. Of a codebook,
    `scales` fp32 and `zeros` 0.
    """

    scales: Tensor
    zeros: Tensor
    levels: int
    codebook: str | None = None


def grouped(weight: Tensor, scheme: Scheme) -> Tensor:
    """View a weight [out, in] as [out, groups, group_size]."""
    return weight.unflatten(-1, (scheme.groups(weight.shape[-1]), -1))


def value_range(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of each group, stretched to hold 0: two [out, groups]."""
    lo, hi = torch.aminmax(grouped(weight, scheme), dim=-1)
    return lo.clamp(max=0), hi.clamp(min=0)


def make_grid(lo: Tensor, hi: Tensor, scheme: Scheme) -> Grid:
    """The grid that spans [lo, hi] of each group (lo <= 0 <= hi, any shape)."""
    levels = scheme.levels
    if scheme.codebook is not None:
        scales = torch.maximum(lo.abs(), hi).float()
        return Grid(scales, torch.zeros_like(scales), levels, scheme.codebook)
    width = 2 * torch.maximum(-lo, hi) if scheme.sym else hi - lo
    scales = (width / levels).to(torch.float16)
    # A group of nothing but zeros (or of values under fp16's range) has no width: any scale does.
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    if scheme.sym:
        zeros = torch.full_like(lo, 2 ** (scheme.bits - 1), dtype=torch.float32)
    else:
        zeros = torch.round(-lo.float() / scales.float()).clamp_(0, levels)
    return Grid(scales, zeros, levels)


def _steps(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Signed grid steps (code - zero) of a grouped weight, and the scales, broadcast and fp32."""
    scales = grid.scales.float()[..., None]
    zeros = grid.zeros[..., None]
    steps = (weight / scales).round_()
    return torch.clamp(steps, -zeros, grid.levels - zeros, out=steps), scales


def snap(weight: Tensor, grid: Grid) -> Tensor:
    """Each weight's nearest grid value, fp32. `weight` is grouped: [..., groups, group_size]."""
    if grid.codebook is not None:
        values = table(grid.codebook, weight.device)
        return values[_places(weight, grid.scales, values).int()] * grid.scales[..., None]
    steps, scales = _steps(weight, grid)
    return steps.mul_(scales)


def encode(weight: Tensor, grid: Grid, scheme: Scheme) -> QTensor:
    """Code a weight [out, in] on a grid [out, groups].

    Raises:
        SalienceError: a scale beyond the range of its dtype.
    """
    if not torch.isfinite(grid.scales).all():
        kind = "fp16" if scheme.codebook is None else "fp32"
        raise SalienceError(f"a group's range is too wide for an {kind} scale")
    if scheme.codebook is not None:
        values = table(scheme.codebook, weight.device)
        codes = _places(grouped(weight.float(), scheme), grid.scales, values).flatten(1)
        nested = nest(grid.scales) if scheme.double_quant else None
        scales = grid.scales if nested is None else nested.dequantize()
        return QTensor(codes, scales, grid.zeros.to(torch.uint8), scheme, nested=nested)
    steps, _ = _steps(grouped(weight.float(), scheme), grid)
    codes = (steps + grid.zeros[..., None]).to(torch.uint8).flatten(1)
    return QTensor(codes, grid.scales, grid.zeros.to(torch.uint8), scheme)


def quantize(weight: Tensor, scheme: Scheme) -> QTensor:
    """Round a weight [out, in] to nearest on the grid of its own range.

    Raises:
        SalienceError: a group size that does not divide the columns, a range beyond the scales'.
    """
    return encode(weight, make_grid(*value_range(weight.float(), scheme), scheme), scheme)


def nest(scales: Tensor) -> NestedScales:
    """Double quantization of scales [out, groups], fp32."""
    offset = scales.mean()
    flat = (scales - offset).flatten()
    blocks = pad(flat, (0, -len(flat) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    largest = blocks.abs().amax(dim=-1)
    values = nested_table(scales.device)
    codes = _places(blocks, largest, values)
    return NestedScales(
        codes.flatten()[: len(flat)].view_as(scales), largest, offset.item(), values
    )


def _places(groups: Tensor, scales: Tensor, values: Tensor) -> Tensor:
    """Codes of groups [..., n] in the table `values`, each with its scale [...]. The weight times
    the reciprocal, as bitsandbytes does; of a group of zeros, whose scale is 0, any will do.
    """
    return nearest(groups * (1.0 / scales.clamp(min=1e-38))[..., None], values)
