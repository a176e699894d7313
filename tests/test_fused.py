"""The fused ops against fp64, in PyTorch and as Triton kernels (interpreted without a GPU)."""

import math
from collections.abc import Callable
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.cohere.modeling_cohere import rotate_half as rotate_pairs
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from salience.kernels import fused
from salience.kernels.fused import attention_cuda, plain

pytest.importorskip("triton")
from salience.kernels.fused import argmax_triton, attention_triton, rope_triton, rows_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Roundings that may meet: of an input's product, of a sum, of the result.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 2e-6}
DTYPES = list(TOLERANCE)

TRITON = SimpleNamespace(
    rms_norm=rows_triton.rms_norm,
    add_rms_norm=rows_triton.add_rms_norm,
    silu_mul=rows_triton.silu_mul,
    gelu_mul=rows_triton.gelu_mul,
    rope_update=rope_triton.rope_update,
    decode_attention=attention_triton.decode_attention,
    argmax=argmax_triton.argmax,
)
NO_NORM = (None, None, 0.0, 0.0, True)  # the last arguments of rope_update
Ops = ModuleType | SimpleNamespace


def _by_cuda(q: Tensor, k: Tensor, v: Tensor, at: Tensor, *rest: object) -> Tensor:
    if not attention_cuda.supports(q, k, v, at):
        pytest.skip("not for this GPU, or not for these tensors")
    return attention_cuda.decode_attention(q, k, v, at, *rest)  # type: ignore[arg-type]


CUDA = SimpleNamespace(decode_attention=_by_cuda)
by_three = pytest.mark.parametrize("ops", [plain, TRITON, CUDA], ids=["plain", "triton", "cuda"])
by_both = pytest.mark.parametrize("ops", [plain, TRITON], ids=["plain", "triton"])


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def close(found: Tensor, want: Tensor, ops: int = 1) -> None:
    """Every number, but for roundings of what is as large as the largest in its row."""
    assert found.shape == want.shape
    size = want.abs().amax(-1, keepdim=True).clamp(min=1e-300)  # a row of zeros is exact
    error = ((found.double() - want).abs() / size).max()
    assert float(error) <= TOLERANCE[found.dtype] * ops


def norm64(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * (weight.double() + offset)


@by_both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("offset", "cast_first"), [(0.0, True), (1.0, False)])
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (5, 96), (3, 200)])
def test_rms_norm(
    rows: int, width: int, offset: float, cast_first: bool, dtype: torch.dtype, ops: Ops
) -> None:
    x, weight = random(rows, width, dtype=dtype) * 3, random(width, dtype=dtype)
    found = ops.rms_norm(x, weight, 1e-5, offset, cast_first)
    close(found, norm64(x, weight, 1e-5, offset))
    residual = random(rows, width, dtype=dtype, seed=1)
    found, total = ops.add_rms_norm(x, residual, weight, 1e-5, offset, cast_first)
    if dtype == torch.bfloat16 and DEVICE == "cpu":  # the interpreter cuts bf16 off
        close(total, x.double() + residual.double())
    else:
        assert torch.equal(total, x + residual)
    close(found, norm64(total, weight, 1e-5, offset))


@by_both
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_heads(dtype: torch.dtype, ops: Ops) -> None:
    product = random(3, 10 * 48, dtype=dtype)
    weight = random(48, dtype=dtype)
    for x in (product[:, 96:288].view(3, 4, 48), product.view(3, 1, 10, 48).transpose(1, 2)[:, 2:]):
        found = ops.rms_norm(x, weight, 1e-6, 0.0, True)
        assert found.is_contiguous()
        other = random(*x.shape[:-1], 64, dtype=dtype)[..., 16:]
        _, total = ops.add_rms_norm(x, other, weight, 1e-6, 0.0, True)
        close(total, x.double() + other.double())
        close(found, norm64(x, weight, 1e-6, 0.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_round_as_the_modules_do(dtype: torch.dtype) -> None:
    x = random(7, 128, dtype=dtype) * 4
    weight = random(128, dtype=dtype, seed=3)
    for module, offset, cast_first in (
        (LlamaRMSNorm(128, 1e-5), 0.0, True),
        (GemmaRMSNorm(128, 1e-5), 1.0, False),
    ):
        module.weight.data = weight
        found = fused.rms_norm(x, weight, 1e-5, offset, cast_first)
        assert torch.equal(found, module(x).detach())


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@by_both
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_with_an_activation(dtype: torch.dtype, ops: Ops) -> None:
    both = random(3, 2 * 72, dtype=dtype) * 4
    wide = both.double()
    gate, up = both.chunk(2, dim=-1)
    g, u = wide.chunk(2, dim=-1)
    close(ops.silu_mul(gate, up), g / (1 + torch.exp(-g)) * u)
    close(ops.gelu_mul(gate, up, False), g * 0.5 * (1 + torch.erf(g / math.sqrt(2))) * u)
    inner = math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)
    close(ops.gelu_mul(gate, up, True), 0.5 * g * (1 + torch.tanh(inner)) * u)


def rotated64(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """Each pair of x [batch, heads, D] as a complex number, turned by angles [batch, pairs]."""
    wide, pairs = x.double(), angles.shape[1]
    index = torch.arange(pairs, device=x.device)
    first = 2 * index if interleaved else index
    second = first + (1 if interleaved else pairs)
    turned = torch.complex(wide[..., first], wide[..., second]) * torch.exp(1j * angles)[:, None]
    out = wide.clone()
    out[..., first], out[..., second] = turned.real, turned.imag
    return out


@by_both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "rotary_dim"), [(16, 16), (20, 12), (48, 48)])
@pytest.mark.parametrize("half_tables", [False, True])
def test_rope_update(
    dim: int, rotary_dim: int, interleaved: bool, half_tables: bool, dtype: torch.dtype, ops: Ops
) -> None:
    batch, kv_heads, heads, length = 3, 2, 6, 9
    product = random(batch, 1, (heads + 2 * kv_heads) * dim, dtype=dtype)
    q, k, v = product.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
    angles = (random(batch, rotary_dim // 2) * 3).double()
    table = angles
    if not half_tables:
        table = angles.repeat_interleave(2, -1) if interleaved else angles.repeat(1, 2)
    caches = random(batch, length, 2 * kv_heads, dim, dtype=dtype).transpose(1, 2)
    k_cache, v_cache = caches.chunk(2, dim=1)
    before = k_cache.clone(), v_cache.clone()
    positions = torch.tensor([4, 0, length], device=DEVICE)  # the last is outside: not written
    found = ops.rope_update(
        q, k.view(batch, 1, kv_heads, dim).transpose(1, 2), v, table.cos().to(dtype)[:, None],
        table.sin().to(dtype)[:, None], k_cache, v_cache, positions, rotary_dim, interleaved,
        *NO_NORM,
    )  # fmt: skip
    close(found, rotated64(q.view(batch, heads, dim), angles, interleaved))
    keys = rotated64(k.view(batch, kv_heads, dim), angles, interleaved)
    for row, position in enumerate(positions[:2].tolist()):
        close(k_cache[row, :, position], keys[row])
        assert torch.equal(v_cache[row, :, position], v.view(batch, kv_heads, dim)[row])
        for cache, old in zip((k_cache, v_cache), before, strict=True):
            cache[row, :, position] = old[row, :, position]
    assert torch.equal(k_cache, before[0])
    assert torch.equal(v_cache, before[1])


@by_both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("offset", "cast_first"), [(0.0, True), (1.0, False)])
def test_rope_of_normalized_heads(
    offset: float, cast_first: bool, dtype: torch.dtype, ops: Ops
) -> None:
    q, k, v = random(2, 12 * 24, dtype=dtype).split([8 * 24, 2 * 24, 2 * 24], dim=-1)
    angles = random(2, 8).double() * 3
    tables = angles.cos().to(dtype), angles.sin().to(dtype)
    caches = random(2, 2, 2, 5, 24, dtype=dtype)
    weights = random(24, dtype=dtype), random(24, dtype=dtype, seed=1)
    at = torch.tensor([4, 1], device=DEVICE)
    norm = (*weights, 1e-5, offset, cast_first)
    found = ops.rope_update(q, k, v, *tables, *caches, at, 16, False, *norm)
    want = [
        rotated64(norm64(x.reshape(2, -1, 24), weight, 1e-5, offset), angles, False)
        for x, weight in zip((q, k), weights, strict=True)
    ]
    close(found, want[0], ops=2)
    close(caches[0][torch.arange(2), :, at], want[1], ops=2)


@by_both
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_rounds_as_the_modules_do(interleaved: bool, dtype: torch.dtype, ops: Ops) -> None:
    q, k = random(2, 1, 4 * 16, dtype=dtype), random(2, 1, 2 * 16, dtype=dtype)
    v, caches = random(2, 1, 2 * 16, dtype=dtype), random(2, 2, 2, 8, 16, dtype=dtype)
    cos, sin = random(1, 1, 16, dtype=dtype), random(1, 1, 16, dtype=dtype, seed=1)
    at = torch.tensor([5], device=DEVICE).expand(2)  # one position for all rows
    found = ops.rope_update(q, k, v, cos, sin, *caches, at, 0, interleaved, *NO_NORM)
    q, k = (x.view(2, 1, -1, 16).transpose(1, 2) for x in (q, k))
    if interleaved:
        want, keys = (x * cos[None] + rotate_pairs(x) * sin[None] for x in (q, k))
    else:
        want, keys = apply_rotary_pos_emb(q, k, cos, sin)
    if dtype == torch.float16 and DEVICE == "cpu":
        assert torch.equal(found, want[:, :, 0])
        assert torch.equal(caches[0][:, :, 5], keys[:, :, 0])
    else:  # a product and a sum may have been rounded once, on a GPU in any dtype
        close(found, want[:, :, 0].double())
        close(caches[0][:, :, 5], keys[:, :, 0].double())
    assert torch.equal(caches[1][:, :, 5], v.view(2, 2, 16))


def attention64(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float, window: int, softcap: float,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """A loop over rows and heads."""
    group = q.shape[1] // k.shape[1]
    out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=torch.float64, device=q.device)
    for row, position in enumerate(positions.tolist()):
        seen = slice(max(0, position + 1 - window) if window else 0, position + 1)
        for head in range(q.shape[1]):
            scores = k[row, head // group, seen].double() @ q[row, head].double() * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.exp()
            extra = sinks[head].double().exp() if sinks is not None else 0.0
            values = v[row, head // group, seen].double()
            out[row, head] = (weights / (weights.sum() + extra)) @ values
    return out.flatten(1)


def attended(
    attention: Callable[..., Tensor], *, batch: int = 2, kv_heads: int = 2, group: int = 3,
    dim: int = 16, values: int = 16, length: int = 40, positions: list[int] | None = None,
    window: int = 0, softcap: float = 0.0, sinks: bool = False,
    dtype: torch.dtype = torch.float16, seed: int = 0,
) -> None:  # fmt: skip
    """One call with random numbers, poison behind the positions, against fp64."""
    generator = torch.Generator().manual_seed(seed)
    if positions is None:
        positions = torch.randint(length, (batch,), generator=generator).tolist()
    at = torch.tensor(positions, device=DEVICE)
    q = random(batch, 1, kv_heads * group * dim, dtype=dtype, seed=seed)
    # Tokens before heads: the cache's strides are those of a transposed tensor.
    k = random(batch, length, kv_heads, dim, dtype=dtype, seed=seed + 1).transpose(1, 2)
    v = random(batch, kv_heads, length, values, dtype=dtype, seed=seed + 2)
    beyond = torch.arange(length, device=DEVICE) > at[:, None]
    for cache in (k, v):
        cache.masked_fill_(beyond[:, None, :, None], math.nan)
    sink = random(kv_heads * group, seed=seed + 3) * 2 if sinks else None
    settings_ = (0.3, window, softcap, sink)
    found = attention(q, k, v, at, *settings_)
    assert found.dtype == dtype
    heads = q.view(batch, kv_heads * group, dim)
    close(found, attention64(heads, k, v, at, *settings_))


@by_three
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"group": 1, "positions": [0, 39]},
        {"dim": 20, "values": 12, "group": 8, "positions": [33, 33]},
        {"window": 7, "positions": [3, 30]},
        {"softcap": 2.0},
        {"sinks": True},
        {"softcap": 3.0, "sinks": True, "window": 20},
        {"positions": [-1, 12]},
    ],
    ids=str,
)
def test_decode_attention(case: dict[str, object], dtype: torch.dtype, ops: Ops) -> None:
    attended(ops.decode_attention, dtype=dtype, **case)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("positions", [[69, 16], [31, 15]])
def test_decode_attention_cut_or_whole(
    positions: list[int], splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces without keys leave nothing behind; what was in the scratch is not taken for theirs."""
    monkeypatch.setattr(torch, "empty", lambda *shape, **how: torch.full(shape, math.nan, **how))
    attention = partial(attention_triton.decode_attention, splits=splits, keys=16)
    attended(attention, length=70, positions=positions, group=4, sinks=True)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_decode_attention_in_pieces(data: st.DataObject) -> None:
    """Any lengths, cut in any way: pieces without a key, with one, and with several rounds."""
    length = data.draw(st.integers(1, 150), label="length")
    batch = data.draw(st.integers(1, 2), label="batch")
    positions = st.lists(st.integers(-1, length - 1), min_size=batch, max_size=batch)
    attended(
        partial(
            attention_triton.decode_attention,
            splits=data.draw(st.sampled_from([1, 2, 4, 8]), label="splits"),
            keys=data.draw(st.sampled_from([16, 32]), label="keys"),
        ),
        batch=batch,
        kv_heads=data.draw(st.integers(1, 2), label="kv_heads"),
        group=data.draw(st.sampled_from([1, 2, 5, 17]), label="group"),
        length=length,
        positions=data.draw(positions, label="positions"),
        window=data.draw(st.sampled_from([0, 1, 20, 90]), label="window"),
        softcap=data.draw(st.sampled_from([0.0, 2.5]), label="softcap"),
        sinks=data.draw(st.booleans(), label="sinks"),
        seed=data.draw(st.integers(0, 99), label="seed"),
    )


def test_pieces_of_the_context() -> None:
    """Four programs a processor, and no more pieces than the cache has tiles of keys."""
    found = [attention_triton.splits_of(pairs, 4096, 32, 132) for pairs in (8, 32, 128, 512, 4096)]
    assert found == [32, 16, 4, 1, 1]
    assert attention_triton.splits_of(8, 100, 32, 132) == 4
    assert attention_triton.splits_of(8, 32, 32, 132) == 1


@pytest.mark.parametrize(
    ("shape", "permuted", "strides"),
    [
        ((3, 8), (0, 1), (1, 8, 0)),
        ((3, 1, 8), (0, 1, 2), (1, 8, 0)),
        ((1, 8), (0, 1), (1, 8, 0)),
        ((2, 3, 8), (1, 0, 2), (2, 8, 24)),
        ((2, 1, 3, 8), (0, 2, 1, 3), (1, 8, 0)),
        ((2, 3, 4, 8), (2, 1, 0, 3), (1, 8, 0)),  # three strides: copied
        ((8, 3), (1, 0), (1, 8, 0)),  # columns apart: copied
    ],
)
def test_rows_of_views(
    shape: tuple[int, ...], permuted: tuple[int, ...], strides: tuple[int, int, int]
) -> None:
    x = random(*shape).permute(permuted)
    stored, count, outer, inner = rows_triton._rows(x)
    assert (count, outer, inner) == strides
    row = torch.arange(x.numel() // x.shape[-1])
    begins = row // count * outer + row % count * inner
    reach = (begins[:, None] + torch.arange(x.shape[-1])).to(DEVICE)
    flat = stored.as_strided((int(reach.max()) + 1,), (1,))
    assert torch.equal(flat[reach], x.reshape(-1, x.shape[-1]))


def test_a_cache_with_columns_apart_is_refused() -> None:
    q, cache = random(1, 2, 16), random(1, 1, 16, 8).mT
    at = torch.tensor([0], device=DEVICE)
    with pytest.raises(ValueError, match="contiguous"):
        attention_triton.decode_attention(q, cache, cache, at, 1.0, 0, 0.0, None)
    with pytest.raises(ValueError, match="contiguous"):
        rope_triton.rope_update(q, q, q, q[0, :1], q[0, :1], cache, cache, at, 0, False, *NO_NORM)


@by_both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [7, 2048, 5000])
def test_argmax(width: int, dtype: torch.dtype, ops: Ops) -> None:
    logits = random(6, width + 3, dtype=dtype)[:, 2:-1]
    places = [0, width - 1, width // 2, width // 3, 0, 0]
    for row, place in enumerate(places):
        logits[row, place] = 9
    logits[2, place + 5 :: 2] = math.nan
    logits[2, width // 2] = logits[3, -1] = 9  # NaN beside it, an equal behind it
    logits[4] = -math.inf
    logits[5] = math.nan
    assert ops.argmax(logits).tolist() == places


def arguments(name: str) -> tuple[object, ...]:
    """What an op of that name may be called with in a step."""
    product = random(2, 1, 8 * 16)
    q, k, v = product.split([64, 32, 32], dim=-1)
    table, at = random(2, 1, 16), torch.tensor([3, 6], device=DEVICE)
    caches = [random(2, 2, 9, 16, seed=seed) for seed in (1, 2)]
    return {
        "rms_norm": (product, random(128), 1e-5),
        "add_rms_norm": (product, random(2, 1, 128, seed=4), random(128), 1e-5, 1.0, False),
        "silu_mul": (k, v),
        "gelu_mul": (k, v, True),
        "rope_update": (q, k, v, table, table, *caches, at, 0, False, random(16), random(16)),
        "argmax": (product[:, 0],),
        "decode_attention": (q, *caches, at, 0.25, 4, 3.0, random(4)),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "rms_norm",
        "add_rms_norm",
        "silu_mul",
        "gelu_mul",
        "rope_update",
        "decode_attention",
        "argmax",
    ],
)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.salience, name).default, arguments(name))
    found = getattr(fused, name)(*arguments(name))
    outputs = found if isinstance(found, tuple) else (found,)
    assert all(output.is_contiguous() for output in outputs)
