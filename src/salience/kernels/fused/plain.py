"""The fused operations in PyTorch: what runs on CPUs, and what the GPU kernels must equal.

They round where the modules of Transformers round, so that a model gives the same logits with them
as without. See `salience.kernels.fused` for shapes and meaning.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool) -> Tensor:
    """As `salience::rms_norm`."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if cast_first:
        factor = weight + offset if offset else weight
        return (factor * wide.to(x.dtype)).to(x.dtype).contiguous()
    factor = weight.float()
    return (wide * (factor + offset if offset else factor)).to(x.dtype).contiguous()


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool
) -> tuple[Tensor, Tensor]:
    """As `salience::add_rms_norm`."""
    total = (residual + x).contiguous()
    return rms_norm(total, weight, eps, offset, cast_first), total


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """As `salience::silu_mul`."""
    return (F.silu(gate) * up).contiguous()


def gelu_mul(gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
    """As `salience::gelu_mul`."""
    return (F.gelu(gate, approximate="tanh" if tanh else "none") * up).contiguous()


def heads(x: Tensor, head_dim: int) -> Tensor:
    """A view [batch, heads, head_dim] of x [batch, heads * head_dim], with an axis of one token
    before or after the heads or none, whatever its strides.
    """
    if x.ndim == 2 or x.shape[-1] != head_dim:
        x = x.unflatten(-1, (-1, head_dim))
    return x.flatten(1, -2)


def tables(cos: Tensor, batch: int) -> Tensor:
    """A view [batch, width] of cosines or sines [batch or 1, ..., width] of one token a row."""
    return cos.reshape(-1, cos.shape[-1]).expand(batch, -1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool) -> Tensor:
    """x [batch, heads, head_dim], the first `rotary_dim` columns turned by [batch, width]."""
    turned = x[..., :rotary_dim]
    if cos.shape[-1] != rotary_dim:  # one column for each pair
        repeat = torch.Tensor.repeat_interleave if interleaved else _twice
        cos, sin = repeat(cos, 2, -1), repeat(sin, 2, -1)
    if interleaved:
        other = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        other = torch.cat((-second, first), dim=-1)
    turned = (turned * cos[:, None] + other * sin[:, None]).to(x.dtype)
    return torch.cat((turned, x[..., rotary_dim:]), dim=-1)


def _twice(x: Tensor, times: int, dim: int) -> Tensor:
    return torch.cat([x] * times, dim=dim)


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
    batch, width = len(positions), k_cache.shape[-1]
    cos, sin = tables(cos, batch), tables(sin, batch)
    rotary_dim = rotary_dim or cos.shape[-1]
    q, k = heads(q, width), heads(k, width)
    if q_weight is not None and k_weight is not None:
        q = rms_norm(q, q_weight, eps, offset, cast_first)
        k = rms_norm(k, k_weight, eps, offset, cast_first)
    keys = rotated(k, cos, sin, rotary_dim, interleaved)
    values = heads(v, v_cache.shape[-1])
    rows = ((positions >= 0) & (positions < k_cache.shape[2])).nonzero().squeeze(1)
    k_cache[rows, :, positions[rows]] = keys[rows].to(k_cache.dtype)
    v_cache[rows, :, positions[rows]] = values[rows].to(v_cache.dtype)
    return rotated(q, cos, sin, rotary_dim, interleaved).contiguous()


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """As `salience::decode_attention`."""
    kv_heads, length, width = k_cache.shape[1:]
    # The heads that share keys are as several queries of one head: no key is repeated.
    queries = heads(q, width).unflatten(1, (kv_heads, -1))
    out = q.new_zeros(*queries.shape[:-1], v_cache.shape[-1])
    ends = [min(position + 1, length) for position in positions.tolist()]
    pieces = (
        [slice(0, len(ends))]
        if len(set(ends)) == 1
        else [slice(b, b + 1) for b in range(len(ends))]
    )
    for rows in pieces:
        end = ends[rows.start]
        if end <= 0:
            continue
        keys = slice(max(0, end - window) if window else 0, end)
        k, v = k_cache[rows, :, keys], v_cache[rows, :, keys]
        if softcap or sinks is not None:
            out[rows] = _attention(queries[rows], k, v, scale, softcap, sinks)
        else:
            out[rows] = F.scaled_dot_product_attention(queries[rows], k, v, scale=scale)
    return out.flatten(1)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, sinks: Tensor | None
) -> Tensor:
    """Softmax attention in fp32 of q [batch, kv_heads, group, head_dim] to k and v
    [batch, kv_heads, keys, head_dim], with scores bent below `softcap` and one more score a head
    that has no value.
    """
    scores = (q.float() @ k.float().mT) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if sinks is not None:
        sink = sinks.float().view(1, q.shape[1], q.shape[2], 1).expand(len(q), -1, -1, -1)
        scores = torch.cat((scores, sink), dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    return (weights @ v.float()).to(q.dtype)


def argmax(logits: Tensor) -> Tensor:
    """As `salience::argmax`."""
    return logits.nan_to_num(-torch.inf, torch.inf, -torch.inf).argmax(-1)
