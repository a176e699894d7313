"""What works on rows, as Triton kernels: norms, and products with an activation.

A row is in registers from end to end, so that each number is read and written once. Functions have
the names and arguments of those in `plain`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from salience.kernels.fused._dependent import launch_options

_PIECE = 1024  # columns of a program of `_gate`


@triton.jit
def _norm(
    x, residual, weight, y, total, rows, width, eps, offset,
    x_count, x_outer, x_inner, r_count, r_outer, r_inner,
    ADD: tl.constexpr, CAST_FIRST: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """ROWS rows; row i of x begins at (i // count) * outer + (i % count) * inner."""
    if PDL:
        cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    factor = tl.load(weight + column, mask=column < width, other=0.0)
    factor = factor.to(tl.float32) + offset
    if CAST_FIRST:
        factor = factor.to(weight.dtype.element_ty).to(tl.float32)
    if PDL:
        cuda.gdc_wait()
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row // x_count * x_outer + row % x_count * x_inner
    wide = tl.load(x + at[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    here = row[:, None] * width + column[None, :]
    if ADD:
        at = row // r_count * r_outer + row % r_count * r_inner
        other = tl.load(residual + at[:, None] + column[None, :], mask=inside, other=0.0)
        added = (wide + other.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(total + here, added, mask=inside)
        wide = added.to(tl.float32)
    mean = tl.sum(wide * wide, axis=1) / width
    wide *= tl.rsqrt(mean + eps)[:, None]
    if CAST_FIRST:
        wide = wide.to(x.dtype.element_ty).to(tl.float32)
    tl.store(y + here, (wide * factor[None, :]).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gate(
    gate, up, y, width, g_count, g_outer, g_inner, u_count, u_outer, u_inner,
    KIND: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A piece of a row."""
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < width
    g_row = row // g_count * g_outer + row % g_count * g_inner
    u_row = row // u_count * u_outer + row % u_count * u_inner
    g = tl.load(gate + g_row + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + u_row + column, mask=inside, other=0.0).to(tl.float32)
    if KIND == "silu":
        active = g / (1 + tl.exp(-g))
    elif KIND == "tanh":  # (1 + tanh(z)) / 2 is the sigmoid of 2 z
        active = g / (1 + tl.exp(-1.5957691216057308 * (g + 0.044715 * g * g * g)))
    else:
        active = 0.5 * g * (1 + tl.erf(0.7071067811865476 * g))
    active = active.to(gate.dtype.element_ty).to(tl.float32)
    tl.store(y + row * width + column, (active * u).to(y.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool) -> Tensor:
    """As `salience::rms_norm`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _normed(x, None, weight, y, y, eps, offset, cast_first)
    return y


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool
) -> tuple[Tensor, Tensor]:
    """As `salience::add_rms_norm`."""
    y, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _normed(x, residual, weight, y, total, eps, offset, cast_first)
    return y, total


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """As `salience::silu_mul`."""
    return _gated(gate, up, "silu")


def gelu_mul(gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
    """As `salience::gelu_mul`."""
    return _gated(gate, up, "tanh" if tanh else "erf")


def _normed(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    y: Tensor,
    total: Tensor,
    eps: float,
    offset: float,
    cast_first: bool,
) -> None:
    width = x.shape[-1]
    rows = x.numel() // width
    x, *x_strides = _rows(x)
    r, *r_strides = (x, *x_strides) if residual is None else _rows(residual)
    columns = triton.next_power_of_2(width)
    # Heads are narrow and many: a few go into one program.
    together = max(1, 512 // columns) if rows > 128 else 1
    with torch.cuda.device_of(x):
        _norm[(triton.cdiv(rows, together),)](
            x, r, weight.contiguous(), y, total, rows, width, eps, offset, *x_strides, *r_strides,
            ADD=residual is not None, CAST_FIRST=cast_first, ROWS=together, WIDTH=columns,
            num_warps=min(16, max(1, together * columns // 512)), **launch_options(x),
        )  # fmt: skip


def _gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    width = gate.shape[-1]
    gate, *g_strides = _rows(gate)
    up, *u_strides = _rows(up)
    with torch.cuda.device_of(gate):
        _gate[(y.numel() // width, triton.cdiv(width, _PIECE))](
            gate, up, y, width, *g_strides, *u_strides, KIND=kind, WIDTH=_PIECE, num_warps=4,
            **launch_options(gate),
        )  # fmt: skip
    return y


def _rows(x: Tensor) -> tuple[Tensor, int, int, int]:
    """Where the rows of x lie: x, count, outer and inner stride, see `_norm`.

    Any axes that two strides describe; x is copied when they do not.
    """
    axes: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    if len(axes) > 2 or x.stride(-1) != 1:
        return _rows(x.contiguous())
    if len(axes) == 2:
        return x, axes[1][0], axes[0][1], axes[1][1]
    return x, 1, axes[0][1] if axes else x.shape[-1], 0
