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
def _turned(
    x, lane, c, s,
    DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """The head at x, rotated, in its own dtype."""
    if INTERLEAVED:
        swapped = lane ^ 1
        minus = lane % 2 == 0
    else:
        minus = lane < ROTARY // 2
        swapped = tl.where(minus, lane + ROTARY // 2, lane - ROTARY // 2)
    value = tl.load(x + lane, mask=lane < DIM, other=0.0)
    other = tl.load(x + swapped, mask=lane < ROTARY, other=0.0).to(tl.float32)
    first = value.to(tl.float32) * c
    second = tl.where(minus, -other, other) * s
    if ROUND:  # as two products of PyTorch
        first = first.to(value.dtype).to(tl.float32)
        second = second.to(value.dtype).to(tl.float32)
    return tl.where(lane < ROTARY, (first + second).to(value.dtype), value)


@triton.jit
def _rope(
    q, k, v, cos, sin, k_cache, v_cache, positions, out, length,
    q_row, q_head, k_row, k_head, v_row, v_head, cos_row, sin_row,
    kc_row, kc_head, kc_key, vc_row, vc_head, vc_key,
    HEADS: tl.constexpr, DIM: tl.constexpr, VALUES: tl.constexpr, ROTARY: tl.constexpr,
    WHOLE: tl.constexpr, INTERLEAVED: tl.constexpr, ROUND: tl.constexpr, LANES: tl.constexpr,
    PDL: tl.constexpr,
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
        x = _turned(q + row * q_row + head * q_head, lane, c, s, DIM, ROTARY, INTERLEAVED, ROUND)
        tl.store(out + (row * HEADS + head) * DIM + lane, x, mask=lane < DIM)
    else:
        place = tl.load(positions + row).to(tl.int64)
        if (place >= 0) & (place < length):
            head -= HEADS
            x = _turned(
                k + row * k_row + head * k_head, lane, c, s, DIM, ROTARY, INTERLEAVED, ROUND
            )
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
    with torch.cuda.device_of(q):
        _rope[(len(q), q.shape[1] + k.shape[1])](
            q, k, v, cos, sin, k_cache, v_cache, positions, out, length,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], cos.stride(0), sin.stride(0),
            *k_cache.stride()[:3], *v_cache.stride()[:3],
            HEADS=q.shape[1], DIM=dim, VALUES=values, ROTARY=rotary_dim,
            WHOLE=cos.shape[-1] == rotary_dim, INTERLEAVED=interleaved,
            ROUND=cos.dtype == q.dtype != torch.float32,
            LANES=triton.next_power_of_2(max(dim, values)), num_warps=1, **launch_options(q),
        )  # fmt: skip
    return out
