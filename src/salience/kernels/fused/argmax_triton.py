"""The likeliest token of each row, as two small Triton kernels.

A vocabulary has a hundred thousand logits and a step few rows: pieces of a row go to programs of
their own, whose winners a second kernel compares.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from salience.kernels.fused._dependent import launch_options

_PIECE = 2048


@triton.jit
def _first_of_highest(value, index):
    """The highest value and the lowest index that has it. NaN counts as the lowest value."""
    value = tl.where(value == value, value, float("-inf"))
    highest = tl.max(value, axis=0)
    return highest, tl.min(tl.where(value == highest, index, 2147483647), axis=0)


@triton.jit
def _pieces(logits, values, indices, row_stride, width, PIECE: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = piece * PIECE + tl.arange(0, PIECE)
    value = tl.load(logits + row * row_stride + index, mask=index < width, other=float("-inf"))
    highest, first = _first_of_highest(value.to(tl.float32), index)
    at = row * tl.num_programs(1) + piece
    tl.store(values + at, highest)
    tl.store(indices + at, first)


@triton.jit
def _winners(values, indices, out, pieces, PIECES: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    row = tl.program_id(0)
    piece = tl.arange(0, PIECES)
    at = row * pieces + piece
    value = tl.load(values + at, mask=piece < pieces, other=float("-inf"))
    index = tl.load(indices + at, mask=piece < pieces, other=2147483647)
    _, first = _first_of_highest(value, index)
    tl.store(out + row, first.to(tl.int64))


def argmax(logits: Tensor) -> Tensor:
    """As `salience::argmax`."""
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    rows, width = logits.shape
    pieces = triton.cdiv(width, _PIECE)
    values = torch.empty(rows, pieces, dtype=torch.float32, device=logits.device)
    indices = torch.empty(rows, pieces, dtype=torch.int32, device=logits.device)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    options = launch_options(logits)
    with torch.cuda.device_of(logits):
        _pieces[(rows, pieces)](
            logits, values, indices, logits.stride(0), width, PIECE=_PIECE, num_warps=8, **options
        )
        _winners[(rows,)](
            values, indices, out, pieces, PIECES=triton.next_power_of_2(pieces), num_warps=1,
            **options,
        )  # fmt: skip
    return out
