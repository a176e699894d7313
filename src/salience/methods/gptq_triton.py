"""The two walks of `methods.gptq` over a few columns, each as one kernel.

Written with torch, a column takes five launches and moves little: a GPU spends its time on starting
them. Here a program owns a few rows of the weight (`ROWS`) and goes through all the columns by
itself. Instead of updating every later column, it keeps what each column left behind and sums when
a column's turn comes,

    value_j = start_j + sum over i < j of near_ij left_i

which is one multiplication and one sum a column, both in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 16  # of the weight, in one program of one warp


# `codes` are steps below: code - zero.
@triton.jit
def _walk(
    start, near, scales, zeros, group, diagonal, old, steps, left,
    out, start_batch, old_batch, groups, levels,
    n: tl.constexpr, DESCENT: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of one weight, all n columns (at most COLUMNS)."""
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < out
    places = tl.arange(0, COLUMNS)
    behind = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
    for j in range(n):
        column = tl.load(near + (batch * n + j) * n + places, mask=places < j, other=0.0)
        shift = tl.sum(column[:, None] * behind, axis=0)
        at = (batch * groups + tl.load(group + batch * n + j)) * out + row
        scale = tl.load(scales + at, mask=inside, other=1.0).to(tl.float32)
        zero = tl.load(zeros + at, mask=inside, other=0.0)
        value = tl.load(start + batch * start_batch + j * out + row, mask=inside, other=0.0)
        if DESCENT:
            before = tl.load(old + batch * old_batch + j * out + row, mask=inside, other=0.0)
            curvature = scale * tl.load(diagonal + batch * n + j)
            step = before - (value + shift) / curvature
        else:
            value -= shift
            step = value / scale
        step = tl.minimum(tl.maximum(step, -zero), levels - zero)
        # Adding 1.5 * 2**23 leaves no bits for a fraction: ties go to even, as torch.round's do.
        step = (step + 12582912.0) - 12582912.0
        rest = (step - before) * scale if DESCENT else value - step * scale
        here = (batch * n + j) * out + row
        tl.store(steps + here, step, mask=inside)
        tl.store(left + here, rest, mask=inside)
        behind = tl.where(places[:, None] == j, rest[None, :], behind)


def round_columns(
    block: Tensor, near: Tensor, scales: Tensor, zeros: Tensor, group: Tensor, levels: int
) -> tuple[Tensor, Tensor]:
    """`methods.gptq.round_columns` on a GPU."""
    return _run(block, near.mT, scales, zeros, group, levels)


def move_columns(
    own: Tensor,
    near: Tensor,
    old: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group: Tensor,
    levels: int,
) -> tuple[Tensor, Tensor]:
    """`methods.gptq.move_columns` on a GPU."""
    return _run(own, near, scales, zeros, group, levels, old)


def _run(
    start: Tensor,
    near: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group: Tensor,
    levels: int,
    old: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Steps and what they leave, both fp32 [batch, n, out]. near[j, i] weighs column i for j."""
    batch, n, out = start.shape
    if start.stride()[1:] != (out, 1) or (old is not None and old.stride()[1:] != (out, 1)):
        raise ValueError("columns must be whole pieces of memory")
    steps, left = (torch.empty(batch, n, out, device=start.device) for _ in range(2))
    before = steps if old is None else old
    diagonal = near.diagonal(dim1=-2, dim2=-1).contiguous()
    with torch.cuda.device_of(start):
        _walk[(triton.cdiv(out, _ROWS), batch)](
            start, near.contiguous(), scales.contiguous(), zeros.contiguous(),
            group.contiguous(), diagonal, before, steps, left,
            out, start.stride(0), before.stride(0), scales.shape[1], levels,
            n=n, DESCENT=old is not None, COLUMNS=triton.next_power_of_2(n), ROWS=_ROWS,
            num_warps=1,
        )  # fmt: skip
    return steps, left
