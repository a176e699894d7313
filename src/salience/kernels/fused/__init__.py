"""What a decode step does between its matrix products, as a few ops of one launch each.

One token's activations are some kilobytes: a GPU takes longer to start a kernel than to compute
with them, and a step in PyTorch starts about ten kernels a norm or rotation. The ops here are
registered with torch.library (`torch.ops.salience.*`): opaque to torch.compile, safe to capture in
a CUDA graph (they read no tensor on the host, and the number of programs depends on shapes only).
On GPUs they are Triton kernels, attention from sm90 on one in CUDA C++; elsewhere
`plain`.

They round to the dtype of their input where the modules of Transformers do, so that a model that
uses them follows the one that does not.

`x`, `q`, `gate` and so on may be views with strides, such as slices of one product, as long as
their last axis is contiguous. Outputs are contiguous.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from salience.kernels.fused import plain


@torch.library.custom_op("salience::rms_norm", mutates_args=())
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, cast_first: bool = True
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + offset), over the last axis, computed in fp32.

    `x` is [..., width], one row a token or a head, `weight` [width] and nothing that the same CUDA
    graph computes: it is read before the kernels in front have ended. With `cast_first` the
    quotient is rounded to the dtype of x before it meets the weight (Llama); without it, after
    (Gemma, whose offset is 1).
    """
    return plain.rms_norm(x, weight, eps, offset, cast_first)


@rms_norm.register_fake
def _(
    x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, cast_first: bool = True
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("salience::add_rms_norm", mutates_args=())
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    offset: float = 0.0,
    cast_first: bool = True,
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual): the sum is rounded to the dtype of x first."""
    return plain.add_rms_norm(x, residual, weight, eps, offset, cast_first)


@add_rms_norm.register_fake
def _(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    offset: float = 0.0,
    cast_first: bool = True,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("salience::silu_mul", mutates_args=())
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both [..., width]."""
    return plain.silu_mul(gate, up)


@silu_mul.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("salience::gelu_mul", mutates_args=())
def gelu_mul(gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
    """gelu(gate) * up, both [..., width], by the tanh formula or by erf."""
    return plain.gelu_mul(gate, up, tanh)


@gelu_mul.register_fake
def _(gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("salience::rope_update", mutates_args=("k_cache", "v_cache"))
def rope_update(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    rotary_dim: int = 0,
    interleaved: bool = False,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    cast_first: bool = True,
) -> Tensor:
    """Rotate q and k by their position, write k and v into the caches: rotated q [batch, heads, D].

    Args:
        q: one token a row, [batch, heads * D] or [batch, heads, D], with an axis of 1 for the token
            before or after the heads or none.
        k, v: the same with kv_heads heads.
        cos, sin: [batch or 1, ..., width] of each row's position. The width is `rotary_dim`, or
            half of it with one column for each pair. Products are rounded to the wider dtype of
            these and q.
        k_cache, v_cache: [batch, kv_heads, length, D]; D may be another for values. Row b is
            written at positions[b], unless that lies outside of 0 .. length - 1.
        positions: int [batch].
        rotary_dim: how many columns of a head turn, the first ones; 0 for the width of `cos`.
        interleaved: pairs are columns 2 i, 2 i + 1 (GPT-J, Cohere), not i, i + rotary_dim / 2.
        q_weight, k_weight: [D]. Where both are given, each head of q and k is first normalized
            with them (Qwen3, Gemma3): `rms_norm` with `eps`, `offset` and `cast_first`.
    """
    return plain.rope_update(
        q, k, v, cos, sin, k_cache, v_cache, positions, rotary_dim, interleaved,
        q_weight, k_weight, eps, offset, cast_first,
    )  # fmt: skip


@rope_update.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    rotary_dim: int = 0,
    interleaved: bool = False,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    cast_first: bool = True,
) -> Tensor:
    return q.new_empty(plain.heads(q, k_cache.shape[-1]).shape)


@torch.library.custom_op("salience::decode_attention", mutates_args=())
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of one token a row to its cache: [batch, heads * D of values].

    Args:
        q: [batch, heads, D] or as for `rope_update`; head h meets the keys of head
            h // (heads / kv_heads).
        k_cache, v_cache: [batch, kv_heads, length, D]. What lies behind a row's position is not
            looked at, and may be anything.
        positions: int [batch]: row b sees keys 0 .. positions[b]; none when negative: then it is 0.
        scale: of the scores.
        window: only the last so many keys are seen; 0 for all.
        softcap: scores become softcap * tanh(score / softcap); 0 for none.
        sinks: [heads], a score for each head that takes its part of the softmax and has no value.
    """
    return plain.decode_attention(q, k_cache, v_cache, positions, scale, window, softcap, sinks)


@decode_attention.register_fake
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    heads = plain.heads(q, k_cache.shape[-1]).shape[1]
    return q.new_empty(q.shape[0], heads * v_cache.shape[-1])


@torch.library.custom_op("salience::argmax", mutates_args=())
def argmax(logits: Tensor) -> Tensor:
    """The index of the highest of each row of logits [batch, vocabulary], the first of equals:
    int64 [batch]. NaN is as low as minus infinity.
    """
    return plain.argmax(logits)


@argmax.register_fake
def _(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


if find_spec("triton") is not None and torch.cuda.is_available():
    from salience.kernels.fused import (
        argmax_triton,
        attention_cuda,
        attention_triton,
        rope_triton,
        rows_triton,
    )

    def _decode_attention(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, *rest: Any, **named: Any
    ) -> Tensor:
        takes = attention_cuda.supports(q, k_cache, v_cache, positions)
        attention = attention_cuda if takes else attention_triton
        return attention.decode_attention(q, k_cache, v_cache, positions, *rest, **named)

    rms_norm.register_kernel("cuda", rows_triton.rms_norm)
    add_rms_norm.register_kernel("cuda", rows_triton.add_rms_norm)
    silu_mul.register_kernel("cuda", rows_triton.silu_mul)
    gelu_mul.register_kernel("cuda", rows_triton.gelu_mul)
    rope_update.register_kernel("cuda", rope_triton.rope_update)
    decode_attention.register_kernel("cuda", _decode_attention)
    argmax.register_kernel("cuda", argmax_triton.argmax)
