"""Comparisons of models that were never there: receipts as a measurement would leave them."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from salience.evaluation.comparison import Comparison, Row, make_row
from salience.evaluation.receipt import Receipt


def receipt(
    rng: np.random.Generator,
    hard: Sequence[float],
    *,
    loss: float = 0.0,
    rate: float = 20.0,
    disk: int = 270_000_000,
    bits: float = 16.0,
    right: Sequence[float] = (),
    layers: int = 0,
    first: bool = False,
) -> Receipt:
    """Chunks as hard as for the other models plus a loss, documents, rates, memory over time."""
    nll = [2047 * (h + loss * (1 + 0.1 * rng.standard_normal())) for h in hard]
    kl = [2047 * abs(loss) * math.exp(0.2 * rng.standard_normal()) for _ in hard]
    agree = [int(2047 * min(1.0, 1 - loss + 0.003 * rng.standard_normal())) for _ in hard]
    seconds = np.linspace(0, 30 + 10 * loss, 60)
    ram = 4e8 + np.minimum(seconds * 1e8, disk * 2) + 2e7 * np.sin(seconds)
    speed = [
        {
            "batch": batch,
            "prefill": (8 * rate * batch**0.2 * np.exp(0.03 * rng.standard_normal(5))).tolist(),
            "decode": (rate * batch**0.6 * np.exp(0.03 * rng.standard_normal(5))).tolist(),
        }
        for batch in (1, 4, 16)
    ]
    tasks: dict[str, Any] = {}
    if len(right):
        tasks["arc_easy"] = {"acc,none": {str(i): float(ok) for i, ok in enumerate(right)}}
    return Receipt(
        format="dense" if loss == 0 else "compressed-tensors",
        scheme="float" if loss == 0 else "w4g64",
        dtype="float32",
        bits=bits,
        disk=disk,
        timeline=[[float(s), float(r), 0.0] for s, r in zip(seconds, ram, strict=True)],
        marks=[[0.0, "load"], [5.0, "loaded"], [6.0, "decode, batch 1"], [15.0, "batch 4"]],
        memory={
            "load": {"ram": int(ram[15]), "vram": 0},
            "peak": {"ram": int(ram.max()), "vram": 0},
        },
        speed=speed,
        text={
            "protocol": f"{len(hard)} of {len(hard)} chunks of 2048 tokens",
            "context": 2048,
            "nll": nll,
            "tokens": [2047] * len(hard),
            "kl": None if first else kl,
            "agree": None if first else agree,
        },
        tasks=tasks,
        layers=[
            [f"model.layers.{i}.mlp.{name}", 0.01 * loss * (i + 1) ** 0.3, 0.02 * (i + 1) ** 0.3]
            for i in range(layers)
            for name in ("gate_proj", "down_proj")
        ],
    )


def many(seed: int = 0, chunks: int = 60) -> Comparison:
    """Nine models, as of the command in the manual, and one that failed."""
    rng = np.random.default_rng(seed)
    hard = (2.9 + 0.3 * rng.standard_normal(chunks)).tolist()
    right = (rng.random(400) < 0.6).astype(float)
    rows = [
        Row(
            "smollm2-135m",
            "smollm2-135m",
            receipt=receipt(rng, hard, right=right.tolist(), first=True),
        )
    ]
    losses = {"rtn": 0.22, "awq": 0.08, "gptq": 0.09, "balanced": 0.055}
    for scheme, worse in (("w4g64", 1.0), ("w3g64", 5.0)):
        for method, loss in losses.items():
            forgets = np.where(rng.random(400) < 0.1 * worse * loss * 5, 0.0, right)
            disk = 109_000_000 if scheme == "w4g64" else 95_000_000
            made = receipt(
                rng,
                hard,
                loss=loss * worse,
                rate=32 - 4 * worse,
                disk=disk,
                bits=4.31 if worse == 1 else 3.3,
                right=forgets.tolist(),
                layers=30,
            )
            name = f"{method} {scheme}"
            rows.append(Row(name, "smollm2-135m", name, receipt=made, quantize_seconds=61.0))
    make_row(rows[0], None)
    for row in rows[1:]:
        make_row(row, rows[0])
    error = "out of memory on cuda; <b>give</b> less"
    rows.append(Row("nf4", "smollm2-135m", "nf4", error=error))
    protocol = {"text": "wikitext2/test.txt: 60 of 60 chunks of 2048 tokens", "intervals": "95 %"}
    command = "salience compare smollm2-135m @rtn @awq @gptq @balanced --scheme w4g64,w3g64"
    machine = {"cpu": "Xeon", "torch": "2.13.0", "salience": "0.1.0", "gpu": None}
    return Comparison(rows, protocol, command, machine, seconds=1400.0)
