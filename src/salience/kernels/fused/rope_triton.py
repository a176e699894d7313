"""Rotation of queries and keys and the write into the cache, as one Triton kernel.

A program of one warp has one head of one row. It holds the head twice, once with the two of each
pair swapped, so that both ways of pairing are the same formula: x cos + swapped sin.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from salience.kernels.fused._dependent import launch_options
from salience.kernels.fused.plain import heads, tables


@triton.jit
def _weighted(wide, weight, offset, like, CAST_FIRST: tl.constexpr):
    """What a norm's module makes of a quotient, fp32 but rounded to the dtype of `like`."""
    factor = weight.to(tl.float32) + offset
    if CAST_FIRST:
        factor = factor.to(weight.dtype).to(tl.float32)
        wide = wide.to(like.dtype).to(tl.float32)
    return (wide * factor).to(like.dtype).to(tl.float32)


@triton.jit
def _turned(
    x, weight, lane, c, s, eps, offset,
    DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, ROUND: tl.constexpr,
    NORM: tl.constexpr, CAST_FIRST: tl.constexpr,
):  # fmt: skip
    """The head at x, normalized if it shall be, and rotated, in its own dtype."""
    if INTERLEAVED:
        swapped = lane ^ 1
        minus = lane % 2 == 0
    else:
        minus = lane < ROTARY // 2
        swapped = tl.where(minus, lane + ROTARY // 2, lane - ROTARY // 2)
    stored = tl.load(x + lane, mask=lane < DIM, other=0.0)
    value = stored.to(tl.float32)
    other = tl.load(x + swapped, mask=lane < ROTARY, other=0.0).to(tl.float32)
    if NORM:
        root = tl.rsqrt(tl.sum(value * value, axis=0) / DIM + eps)
        w = tl.load(weight + lane, mask=lane < DIM, other=0.0)
        value = _weighted(value * root, w, offset, stored, CAST_FIRST)
        w = tl.load(weight + swapped, mask=lane < ROTARY, other=0.0)
        other = _weighted(other * root, w, offset, stored, CAST_FIRST)
    first = value * c
    second = tl.where(minus, -other, other) * s
    if ROUND:  # as two products of PyTorch
        first = first.to(stored.dtype).to(tl.float32)
        second = second.to(stored.dtype).to(tl.float32)
    return tl.where(lane < ROTARY, first + second, value).to(stored.dtype)


@triton.jit
def _rope(
    q, k, v, cos, sin, k_cache, v_cache, positions, q_weight, k_weight, out,
    length, eps, offset, q_row, q_head, k_row, k_head, v_row, v_head, cos_row, sin_row,
    kc_row, kc_head, kc_key, vc_row, vc_head, vc_key,
    HEADS: tl.constexpr, DIM: tl.constexpr, VALUES: tl.constexpr, ROTARY: tl.constexpr,
    WHOLE: tl.constexpr, INTERLEAVED: tl.constexpr, ROUND: tl.constexpr, NORM: tl.constexpr,
    CAST_FIRST: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs 0 .. HEADS - 1 have a head of q, those after a head of k and v."""
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, LANES)
    column = lane
    if not WHOLE:
        column = lane // 2 if INTERLEAVED else lane % (ROTARY // 2)
    c = tl.load(cos + row * cos_row + column, mask=lane < ROTARY, other=0.0).to(tl.float32)
    s = tl.load(sin + row * sin_row + column, mask=lane < ROTARY, other=0.0).to(tl.float32)
    if head < HEADS:
        x = _turned(
            q + row * q_row + head * q_head, q_weight, lane, c, s, eps, offset,
            DIM, ROTARY, INTERLEAVED, ROUND, NORM, CAST_FIRST,
        )  # fmt: skip
        tl.store(out + (row * HEADS + head) * DIM + lane, x, mask=lane < DIM)
    else:
        place = tl.load(positions + row).to(tl.int64)
        if (place >= 0) & (place < length):
            head -= HEADS
            x = _turned(
                k + row * k_row + head * k_head, k_weight, lane, c, s, eps, offset,
                DIM, ROTARY, INTERLEAVED, ROUND, NORM, CAST_FIRST,
            )  # fmt: skip
            at = k_cache + row * kc_row + head * kc_head + place * kc_key
            tl.store(at + lane, x.to(k_cache.dtype.element_ty), mask=lane < DIM)
            y = tl.load(v + row * v_row + head * v_head + lane, mask=lane < VALUES, other=0.0)
            at = v_cache + row * vc_row + head * vc_head + place * vc_key
            tl.store(at + lane, y.to(v_cache.dtype.element_ty), mask=lane < VALUES)


def rope_update(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    rotary_dim: int,
    interleaved: bool,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    offset: float,
    cast_first: bool,
) -> Tensor:
    """As `salience::rope_update`."""
    dim, values, length = k_cache.shape[-1], v_cache.shape[-1], k_cache.shape[2]
    if k_cache.stride(-1) != 1 or v_cache.stride(-1) != 1:
        raise ValueError("the last axis of a cache must be contiguous")
    q, k, v, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, cos, sin))
    q, k, v = heads(q, dim), heads(k, dim), heads(v, values)
    cos, sin = tables(cos, len(q)), tables(sin, len(q))
    positions = positions.contiguous()  # one number for all rows may come expanded
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rotary_dim = rotary_dim or cos.shape[-1]
    weights, norm = (q, k), False
    if q_weight is not None and k_weight is not None:
        weights, norm = (q_weight.contiguous(), k_weight.contiguous()), True
    with torch.cuda.device_of(q):
        _rope[(len(q), q.shape[1] + k.shape[1])](
            q, k, v, cos, sin, k_cache, v_cache, positions, *weights, out, length, eps, offset,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], cos.stride(0), sin.stride(0),
            *k_cache.stride()[:3], *v_cache.stride()[:3],
            HEADS=q.shape[1], DIM=dim, VALUES=values, ROTARY=rotary_dim,
            WHOLE=cos.shape[-1] == rotary_dim, INTERLEAVED=interleaved,
            ROUND=cos.dtype == q.dtype != torch.float32, NORM=norm, CAST_FIRST=cast_first,
            LANES=triton.next_power_of_2(max(dim, values)), num_warps=1, **launch_options(q),
        )  # fmt: skip
    return out
