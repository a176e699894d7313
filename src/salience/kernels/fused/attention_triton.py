"""Attention of one query a row to its cache, split along the context (flash-decoding), in Triton.

One token has few heads, and a program a head would leave most of a GPU idle while a few of its
processors read the whole cache. So each head's keys are cut into `splits` pieces of equal length.
A program has a piece, and all the query heads that share its keys, so that these are read once. It
keeps a running maximum m of the scores and, relative to it, the sum of weights and the weighted sum
of values; the pieces i are put together by

    out = sum_i 2^(m_i - m) acc_i / sum_i 2^(m_i - m) sum_i,    m = max_i m_i

in a second kernel. The number of pieces depends on shapes only, as a CUDA graph needs; how long
they are, each program finds out from its row's position, and those that have none end at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from salience.kernels.fused._dependent import launch_options
from salience.kernels.fused.plain import heads

_LOG2E = tl.constexpr(1.4426950408889634)
_MOST_SPLITS = 32


@triton.jit
def _span(position, length, window, SPLITS: tl.constexpr, KEYS: tl.constexpr):
    """The first key that a row sees, the end, and how many a piece has, a multiple of KEYS."""
    end = tl.minimum(position + 1, length)
    first = tl.where(window > 0, tl.maximum(end - window, 0), 0)
    each = tl.cdiv(tl.maximum(end - first, 1), SPLITS * KEYS) * KEYS
    return first, end, each


@triton.jit
def _keys(
    x, k, v, start, end, k_key, v_key, scale, softcap, m, total, acc,
    DIM: tl.constexpr, VALUES: tl.constexpr, DIMS: tl.constexpr, VALUE_DIMS: tl.constexpr,
    KEYS: tl.constexpr, SOFTCAP: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """Take KEYS keys into the running sums: m and total [heads], acc [heads, VALUE_DIMS]."""
    key = start + tl.arange(0, KEYS)
    seen = key < end
    column = tl.arange(0, DIMS)
    value_column = tl.arange(0, VALUE_DIMS)
    k_mask = seen[:, None]
    if DIMS != DIM:
        k_mask = k_mask & (column < DIM)[None, :]
    v_mask = seen[:, None]
    if VALUE_DIMS != VALUES:
        v_mask = v_mask & (value_column < VALUES)[None, :]
    # What is not seen is not read: it may be anything, and 0 times NaN is NaN.
    keys = tl.load(k + key[:, None] * k_key + column[None, :], mask=k_mask, other=0.0)
    values = tl.load(v + key[:, None] * v_key + value_column[None, :], mask=v_mask, other=0.0)
    if not GPU:  # the interpreter multiplies no bf16
        keys, values = keys.to(tl.float32), values.to(tl.float32)
    scores = tl.dot(x, tl.trans(keys), input_precision="ieee") * scale
    if SOFTCAP:  # tanh(z) = 1 - 2 / (1 + exp(2 z))
        scores = softcap * (1 - 2 / (1 + tl.exp(2 * scores / softcap)))
    scores = tl.where(seen[None, :], scores * _LOG2E, float("-inf"))
    higher = tl.maximum(m, tl.max(scores, axis=1))
    weights = tl.exp2(scores - higher[:, None])
    shrink = tl.exp2(m - higher)
    total = total * shrink + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return higher, total, acc


@triton.jit
def _attend(
    q, k_cache, v_cache, positions, sinks, out, parts, sums, length, scale, softcap, window,
    q_row, q_head, k_row, k_head, k_key, v_row, v_head, v_key,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, VALUES: tl.constexpr,
    DIMS: tl.constexpr, VALUE_DIMS: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    GPU: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A piece of the keys of one head of the cache, for the GROUP heads of q that see it."""
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    pair, split = tl.program_id(0), tl.program_id(1)
    row, kv_head = (pair // KV_HEADS).to(tl.int64), pair % KV_HEADS
    position = tl.load(positions + row).to(tl.int32)
    head = tl.arange(0, HEADS)
    own = (head < GROUP)[:, None]
    column = tl.arange(0, DIMS)
    value_column = tl.arange(0, VALUE_DIMS)
    at = row * q_row + (kv_head * GROUP + head)[:, None] * q_head + column[None, :]
    x = tl.load(q + at, mask=own & (column < DIM)[None, :], other=0.0)
    first, end, each = _span(position, length, window, SPLITS, KEYS)
    first += split * each
    end = tl.minimum(end, first + each)
    if (SPLITS > 1) & (first >= end):
        return
    if not GPU:
        x = x.to(tl.float32)
    k = k_cache + row * k_row + kv_head * k_head
    v = v_cache + row * v_row + kv_head * v_head
    m = tl.full((HEADS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((HEADS,), dtype=tl.float32)
    acc = tl.zeros((HEADS, VALUE_DIMS), dtype=tl.float32)
    if GPU:
        for start in tl.range(first, end, KEYS, num_stages=STAGES):
            m, total, acc = _keys(
                x, k, v, start, end, k_key, v_key, scale, softcap, m, total, acc,
                DIM, VALUES, DIMS, VALUE_DIMS, KEYS, SOFTCAP, GPU,
            )  # fmt: skip
    else:  # the interpreter has no range of tensors
        start = first
        while start < end:
            m, total, acc = _keys(
                x, k, v, start, end, k_key, v_key, scale, softcap, m, total, acc,
                DIM, VALUES, DIMS, VALUE_DIMS, KEYS, SOFTCAP, GPU,
            )  # fmt: skip
            start += KEYS
    keep = own & (value_column < VALUES)[None, :]
    if SPLITS == 1:
        if SINKS:
            sink = tl.load(sinks + kv_head * GROUP + head, mask=head < GROUP, other=0.0)
            sink = sink.to(tl.float32) * _LOG2E
            higher = tl.maximum(m, sink)
            total = total * tl.exp2(m - higher) + tl.exp2(sink - higher)
            acc *= tl.exp2(m - higher)[:, None]
        acc /= tl.where(total > 0, total, 1.0)[:, None]
        at = (pair.to(tl.int64) * GROUP + head)[:, None] * VALUES + value_column[None, :]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=keep)
    else:
        at = (pair * SPLITS + split) * GROUP + head
        tl.store(sums + 2 * at, m, mask=head < GROUP)
        tl.store(sums + 2 * at + 1, total, mask=head < GROUP)
        tl.store(parts + at[:, None] * VALUES + value_column[None, :], acc, mask=keep)


@triton.jit
def _combine(
    parts, sums, positions, sinks, out, length, window,
    ALL_HEADS: tl.constexpr, GROUP: tl.constexpr, VALUES: tl.constexpr, VALUE_DIMS: tl.constexpr,
    KEYS: tl.constexpr, SPLITS: tl.constexpr, SINKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One head of one row: the pieces that have keys put together."""
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    index = tl.program_id(0)
    position = tl.load(positions + index // ALL_HEADS).to(tl.int32)
    first, end, each = _span(position, length, window, SPLITS, KEYS)
    split = tl.arange(0, SPLITS)
    there = first + split * each < end
    column = tl.arange(0, VALUE_DIMS)
    at = (index // GROUP * SPLITS + split) * GROUP + index % GROUP
    m = tl.load(sums + 2 * at, mask=there, other=float("-inf"))
    total = tl.load(sums + 2 * at + 1, mask=there, other=0.0)
    acc = tl.load(
        parts + at[:, None] * VALUES + column[None, :],
        mask=there[:, None] & (column < VALUES)[None, :],
        other=0.0,
    )
    higher = tl.max(m, axis=0)
    if SINKS:
        sink = tl.load(sinks + index % ALL_HEADS).to(tl.float32) * _LOG2E
        higher = tl.maximum(higher, sink)
    shrink = tl.where(there, tl.exp2(m - higher), 0.0)
    whole = tl.sum(total * shrink, axis=0)
    if SINKS:
        whole += tl.exp2(sink - higher)
    y = tl.sum(acc * shrink[:, None], axis=0) / tl.where(whole > 0, whole, 1.0)
    at = index.to(tl.int64) * VALUES + column
    tl.store(out + at, y.to(out.dtype.element_ty), mask=column < VALUES)


def splits_of(pairs: int, length: int, keys: int, processors: int) -> int:
    """Pieces of the context: as many programs as are at work at once, four a processor."""
    splits = 1
    while splits < _MOST_SPLITS and 2 * splits * pairs <= 4 * processors and splits * keys < length:
        splits *= 2
    return splits


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    splits: int = 0,
    keys: int = 0,
    stages: int = 3,
    warps: int = 4,
) -> Tensor:
    """As `salience::decode_attention`; the rest of the arguments is for measurements."""
    kv_heads, length, dim = k_cache.shape[1:]
    values = v_cache.shape[-1]
    q = heads(q, dim) if q.stride(-1) == 1 else heads(q.contiguous(), dim)
    if k_cache.stride(-1) != 1 or v_cache.stride(-1) != 1:
        raise ValueError("the last axis of a cache must be contiguous")
    positions = positions.contiguous()  # one number for all rows may come expanded
    batch, all_heads = q.shape[:2]
    group, pairs = all_heads // kv_heads, batch * kv_heads
    keys = keys or (32 if max(dim, values) <= 128 and q.dtype != torch.float32 else 16)
    splits = splits or splits_of(pairs, length, keys, _processors(q))
    out = torch.empty(batch, all_heads * values, dtype=q.dtype, device=q.device)
    parts = sums = out
    if splits > 1:
        size = pairs * splits * group
        parts = torch.empty(size * values, dtype=torch.float32, device=q.device)
        sums = torch.empty(size * 2, dtype=torch.float32, device=q.device)
    value_dims = triton.next_power_of_2(values)
    given = out if sinks is None else sinks.contiguous()
    options = launch_options(q)
    with torch.cuda.device_of(q):
        _attend[(pairs, splits)](
            q, k_cache, v_cache, positions, given, out, parts, sums, length, scale, softcap,
            window, *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
            KV_HEADS=kv_heads, GROUP=group, DIM=dim, VALUES=values,
            DIMS=max(16, triton.next_power_of_2(dim)), VALUE_DIMS=max(16, value_dims),
            HEADS=max(16, triton.next_power_of_2(group)), KEYS=keys, SPLITS=splits,
            STAGES=stages, SOFTCAP=softcap > 0, SINKS=sinks is not None, GPU=q.is_cuda,
            num_warps=warps, **options,
        )  # fmt: skip
        if splits > 1:
            _combine[(batch * all_heads,)](
                parts, sums, positions, given, out, length, window,
                ALL_HEADS=all_heads, GROUP=group, VALUES=values, VALUE_DIMS=value_dims,
                KEYS=keys, SPLITS=splits, SINKS=sinks is not None, num_warps=4, **options,
            )  # fmt: skip
    return out


def _processors(q: Tensor) -> int:
    if not q.is_cuda:  # interpreted
        return 1
    return torch.cuda.get_device_properties(q.device).multi_processor_count
