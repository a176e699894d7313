"""The fused ops of a decode step on a GPU, beside the PyTorch ops that they replace.

    python benchmarks/fused_gpu.py -o benchmarks/results/fused_gpu_h100.json

First each kernel against fp64, with poison in the caches behind the positions; the script ends with
1 when one is wrong. Then microseconds a call at the shapes of Llama-3-8B: medians of replays of a
CUDA graph of many calls, with so many caches that the L2 holds none. `layer` is all five ops of a
layer one after the other. The floor is the bytes of the caches at 2.96 TB/s. Attention in PyTorch
is what a static cache leads to: over the whole cache, with a mask.

`--sweep` measures attention for other ways to cut the context, `--no-pdl` all without dependent
launches.
"""

import argparse
import itertools
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from salience.kernels import fused
from salience.kernels.choice import microseconds
from salience.kernels.fused import argmax_triton, attention_triton, plain, rope_triton, rows_triton
from salience.machine import describe

HEADS, KV_HEADS, DIM, HIDDEN, INTERMEDIATE, WORDS = 32, 8, 128, 4096, 14336, 128256  # of Llama-3-8B
L2_BYTES = 160e6  # three times an H100's
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 2.4e-2}
Call = Callable[[], Any]


def normal(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def rotated(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """Pairs of x [batch, heads, D] turned by angles [batch, pairs], as complex numbers, fp64."""
    wide, pairs = x.double(), torch.arange(angles.shape[1], device=x.device)
    first = 2 * pairs if interleaved else pairs
    second = first + (1 if interleaved else len(pairs))
    turned = torch.complex(wide[..., first], wide[..., second]) * torch.exp(1j * angles)[:, None]
    wide[..., first], wide[..., second] = turned.real, turned.imag
    return wide


def attention(
    q: Tensor, k: Tensor, v: Tensor, at: Tensor, scale: float, window: int, softcap: float,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """`decode_attention` in fp64."""
    queries = plain.heads(q, k.shape[-1]).double().unflatten(1, (k.shape[1], -1))
    key = torch.arange(k.shape[2], device=q.device)
    seen = key <= at[:, None]
    if window:
        seen &= key > at[:, None] - window
    seen = seen[:, None, None]
    scores = queries @ k.double().nan_to_num().mT * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    weights = scores.masked_fill(~seen, -math.inf).exp()
    whole = weights.sum(-1, keepdim=True)
    if sinks is not None:
        whole += sinks.double().exp().view(1, k.shape[1], -1, 1)
    return (weights / whole @ v.double().nan_to_num()).flatten(1)


def attention_case(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What was found and what is right, of random numbers."""
    given = {"batch": 2, "kv_heads": 2, "group": 4, "dim": 128, "length": 1000, "window": 0}
    given |= {"softcap": 0.0, "sinks": False, "dtype": torch.float16} | case
    batch, kv_heads, dim, dtype = (given[n] for n in ("batch", "kv_heads", "dim", "dtype"))
    heads = kv_heads * given["group"]
    at = torch.randint(given["length"], (batch,), device="cuda")
    at[0] = given["length"] - 1
    qkv = normal(batch, 1, (heads + 2 * kv_heads) * dim, dtype=dtype)
    shape = (batch, given["length"], kv_heads, dim)
    caches = [normal(*shape, dtype=dtype).transpose(1, 2) for _ in range(2)]
    beyond = torch.arange(given["length"], device="cuda") > at[:, None]
    for cache in caches:
        cache.masked_fill_(beyond[:, None, :, None], math.nan)
    sinks = normal(heads) * 2 if given["sinks"] else None
    rest = (dim**-0.5, given["window"], given["softcap"], sinks)
    q = qkv[..., : heads * dim]
    return fused.decode_attention(q, *caches, at, *rest), attention(q, *caches, at, *rest)


def normalized(x: Tensor, weight: Tensor, offset: float = 0.0) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (weight.double() + offset)


def rope_case(
    dim: int, rotary: int, interleaved: bool, norm: bool, dtype: torch.dtype
) -> list[Tensor]:
    """Rotated q and the written lines of both caches, each found and right."""
    batch, heads, kv_heads, length = 3, 8, 2, 50
    parts = [heads * dim, kv_heads * dim, kv_heads * dim]
    q, k, v = normal(batch, 1, sum(parts), dtype=dtype).split(parts, dim=-1)
    angles = torch.rand(batch, rotary // 2, device="cuda", dtype=torch.float64) * 6
    tables = angles.cos().to(dtype), angles.sin().to(dtype)
    at = torch.tensor([0, 49, 17], device="cuda")
    empty = torch.full((batch, kv_heads, length, dim), 7.0, device="cuda", dtype=dtype)
    caches = [empty, empty.clone()]
    weights = (normal(dim, dtype=dtype), normal(dim, dtype=dtype)) if norm else (None, None)
    found = fused.rope_update(q, k, v, *tables, *caches, at, rotary, interleaved, *weights, 1e-5)
    rows = torch.arange(batch, device="cuda")
    written = [cache[rows, :, at].clone() for cache in caches]
    for cache in caches:
        cache[rows, :, at] = 7.0
        if not bool((cache == 7.0).all()):
            raise SystemExit("rope_update wrote beside its line")
    q, k, v = (plain.heads(x, dim) for x in (q, k, v))
    if norm:
        q, k = (normalized(x, weight) for x, weight in zip((q, k), weights, strict=True))
    return [
        found, rotated(q, angles, interleaved),
        written[0], rotated(k, angles, interleaved),
        written[1], v.double(),
    ]  # fmt: skip


def row_cases(dtype: torch.dtype, rows: int, width: int) -> list[Tensor]:
    """Norms and activations, each found and right."""
    x, residual = normal(rows, width, dtype=dtype) * 3, normal(rows, width, dtype=dtype)
    weight, pairs = normal(width, dtype=dtype), []
    for offset, cast_first in ((0.0, True), (1.0, False)):
        y = fused.rms_norm(x, weight, 1e-5, offset, cast_first)
        z, total = fused.add_rms_norm(x, residual, weight, 1e-5, offset, cast_first)
        for found, source in ((y, x), (z, x + residual)):
            pairs += [found, normalized(source, weight, offset)]
        pairs += [total, (x + residual).double()]
    gate, up = normal(rows, 2 * width, dtype=dtype).chunk(2, dim=-1)
    g, u = gate.double(), up.double()
    pairs += [fused.silu_mul(gate, up), F.silu(g) * u]
    at = fused.argmax(gate)[:, None]
    pairs += [gate.gather(1, at), g.max(-1, keepdim=True).values]
    for tanh in (False, True):
        kind = "tanh" if tanh else "none"
        pairs += [fused.gelu_mul(gate, up, tanh), F.gelu(g, approximate=kind) * u]
    return pairs


def correctness() -> dict[str, float]:
    """The largest error of each kind of case, in units of what is allowed."""
    half, brain = torch.float16, torch.bfloat16
    cases: dict[str, Callable[[], Sequence[Tensor]]] = {}
    for dim, dtype in itertools.product((64, 80, 96, 128, 192, 256), (half, brain)):
        name = f"attention {dim} {str(dtype)[6:]}"
        cases[name] = partial(attention_case, {"dim": dim, "dtype": dtype})
    for case in (
        {"batch": 1, "kv_heads": 8, "length": 400}, {"batch": 1, "kv_heads": 8, "length": 5000},
        {"batch": 16, "kv_heads": 8}, {"batch": 70, "kv_heads": 8}, {"group": 1}, {"group": 20},
        {"window": 100}, {"softcap": 5.0}, {"sinks": True}, {"length": 1},
        {"batch": 70, "kv_heads": 8, "softcap": 5.0, "sinks": True, "window": 30},
    ):  # fmt: skip
        cases[f"attention {case}"] = partial(attention_case, case)
    for dim, rotary in ((128, 128), (80, 32), (96, 96)):
        for interleaved, norm in itertools.product((False, True), repeat=2):
            for dtype in (half, brain):
                name = f"rope {dim} {rotary} {interleaved=} {norm=} {str(dtype)[6:]}"
                cases[name] = partial(rope_case, dim, rotary, interleaved, norm, dtype)
    for rows, width in ((1, 4096), (3, 5120), (300, 128)):
        for dtype in (half, brain):
            name = f"rows {rows} x {width} {str(dtype)[6:]}"
            cases[name] = partial(row_cases, dtype, rows, width)
    with ThreadPoolExecutor(12) as pool:  # most of the time goes into compiling
        outputs = list(pool.map(lambda case: case(), cases.values()))
    errors = {}
    for name, tensors in zip(cases, outputs, strict=True):
        worst = 0.0
        for found, want in zip(tensors[::2], tensors[1::2], strict=True):
            size = want.abs().amax(-1, keepdim=True)
            error = ((found.double() - want).abs() / size).max() / TOLERANCE[found.dtype]
            worst = max(worst, float(error) if error.isfinite() else math.inf)
        errors[name] = worst
    return errors


class Step:
    """Tensors of a decode step of Llama-3-8B, and the calls that its layers make."""

    def __init__(self, batch: int, context: int) -> None:
        length = context + 256
        self.touched = batch * context * KV_HEADS * DIM * 2 * 2
        copies = min(64, max(2, math.ceil(L2_BYTES / self.touched)))
        shape = (batch, KV_HEADS, length, DIM)
        self.caches = [(normal(*shape), normal(*shape)) for _ in range(copies)]
        self.x, self.residual = normal(batch, 1, HIDDEN), normal(batch, 1, HIDDEN)
        self.weight = normal(HIDDEN)
        sizes = [HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM]
        self.qkv = normal(batch, 1, sum(sizes)).split(sizes, dim=-1)
        self.gate, self.up = normal(batch, 1, 2 * INTERMEDIATE).chunk(2, dim=-1)
        self.cos, self.sin = normal(batch, 1, DIM), normal(batch, 1, DIM)
        self.at = torch.full((batch,), context - 1, device="cuda")
        self.rows = torch.arange(batch, device="cuda")
        self.mask = (torch.arange(length, device="cuda") <= self.at[:, None])[:, None, None]
        self.scale = DIM**-0.5
        self.logits = normal(batch, WORDS)

    def ours(self) -> dict[str, list[Call]]:
        norm = partial(fused.rms_norm, self.x, self.weight, 1e-5)
        add_norm = partial(fused.add_rms_norm, self.x, self.residual, self.weight, 1e-5)
        silu = partial(fused.silu_mul, self.gate, self.up)
        ropes = [
            partial(fused.rope_update, *self.qkv, self.cos, self.sin, k, v, self.at)
            for k, v in self.caches
        ]
        attentions = [
            partial(fused.decode_attention, self.qkv[0], k, v, self.at, self.scale)
            for k, v in self.caches
        ]
        argmax = partial(fused.argmax, self.logits)
        return self._with_layers(norm, add_norm, silu, argmax, ropes, attentions)

    def theirs(self) -> dict[str, list[Call]]:
        norm = partial(plain.rms_norm, self.x, self.weight, 1e-5, 0.0, True)
        add = partial(plain.add_rms_norm, self.x, self.residual, self.weight, 1e-5, 0.0, True)
        silu = partial(plain.silu_mul, self.gate, self.up)
        ropes = [partial(self._rope, k, v) for k, v in self.caches]
        attentions = [partial(self._attention, k, v) for k, v in self.caches]
        argmax = partial(torch.argmax, self.logits, dim=-1)
        return self._with_layers(norm, add, silu, argmax, ropes, attentions)

    def _with_layers(
        self,
        norm: Call,
        add_norm: Call,
        silu: Call,
        argmax: Call,
        ropes: list[Call],
        attentions: list[Call],
    ) -> dict[str, list[Call]]:
        def layer(rope: Call, attention: Call) -> None:
            for call in (add_norm, rope, attention, add_norm, silu):
                call()

        layers = [partial(layer, *pair) for pair in zip(ropes, attentions, strict=True)]
        return {
            "rms_norm": [norm] * 50,
            "add_rms_norm": [add_norm] * 50,
            "silu_mul": [silu] * 50,
            "argmax": [argmax] * 50,
            "rope_update": ropes * math.ceil(50 / len(ropes)),
            "decode_attention": attentions,
            "layer": layers,
        }

    def _rope(self, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        q, k, v = (plain.heads(x, DIM) for x in self.qkv)
        k_cache[self.rows, :, self.at] = plain.rotated(
            k, self.cos[:, 0], self.sin[:, 0], DIM, False
        )
        v_cache[self.rows, :, self.at] = v
        return plain.rotated(q, self.cos[:, 0], self.sin[:, 0], DIM, False)

    def _attention(self, k: Tensor, v: Tensor) -> Tensor:
        q = plain.heads(self.qkv[0], DIM)[:, :, None]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=self.mask, scale=self.scale, enable_gqa=True
        )

    def sweep(self) -> dict[str, list[Call]]:
        """Attention, its context cut in other ways."""
        found = {}
        for splits, keys, stages, warps in itertools.product(
            (1, 2, 4, 8, 16, 32), (32, 64), (3,), (2, 4)
        ):
            programs = splits * len(self.at) * KV_HEADS
            if programs < 64 or programs > 1100:
                continue
            found[f"{splits} splits, {keys} keys, {stages} stages, {warps} warps"] = [
                partial(
                    attention_triton.decode_attention, self.qkv[0], k, v, self.at, self.scale, 0,
                    0.0, None, splits, keys, stages, warps,
                )
                for k, v in self.caches
            ]  # fmt: skip
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--context", type=int, nargs="+", default=[384, 4096])
    parser.add_argument("--sweep", action="store_true", help="cut the context in other ways, too")
    parser.add_argument("--no-pdl", action="store_true", help="without dependent launches")
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.no_pdl:
        for module in (argmax_triton, attention_triton, rope_triton, rows_triton):
            module.launch_options = lambda x: {"PDL": False}
    errors = correctness()
    for name, error in errors.items():
        if error > 1:
            print(f"WRONG {name}: {error:.3g} of what is allowed")
    print(f"{len(errors)} kinds of calls against fp64: worst {max(errors.values()):.2f} of allowed")
    table = Table("op", "batch", "context", "ours", "PyTorch", "floor")
    rows = []
    for batch, context in itertools.product(args.batch, args.context):
        step = Step(batch, context)
        ours, theirs = step.ours(), step.theirs()
        sweep = step.sweep() if args.sweep else {}
        with ThreadPoolExecutor(12) as pool:
            list(pool.map(lambda calls: calls[0](), [*ours.values(), *sweep.values()]))
        for name in ours:
            row = {"op": name, "batch": batch, "context": context}
            row["us"] = microseconds(ours[name])
            row["torch_us"] = microseconds(theirs[name])
            if name in ("decode_attention", "layer"):
                row["floor_us"] = step.touched / 2.96e6
            rows.append(row)
        for name, calls in sweep.items():
            row = {"op": name, "batch": batch, "context": context, "us": microseconds(calls)}
            rows.append(row)
        del step, ours, theirs, sweep
    for row in rows:
        times = [f"{row[key]:.1f}" if key in row else "" for key in ("us", "torch_us", "floor_us")]
        table.add_row(row["op"], str(row["batch"]), str(row["context"]), *times)
    Console(width=100).print(table)
    if args.out:
        made = {"pdl": not args.no_pdl, "errors": errors, "rows": rows, "machine": describe()}
        args.out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    if max(errors.values()) > 1:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
