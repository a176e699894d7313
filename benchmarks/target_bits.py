"""Bits chosen by measured sensitivity against one width for all, at the same size.

    python benchmarks/target_bits.py --calibration wikitext2/valid.txt --text wikitext2/test.txt \
        -o benchmarks/results/target_bits_h100.json

Three checkpoints of the same bits a weight: one width for all; `--target-bits` of that mean; and
the chosen widths dealt out at random among the linears of a kind, which has the very same
histogram and size, so that what is left between the two is the measurement's.
"""

import argparse
import json
import random
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import salience
from salience.evaluation.perplexity import perplexity
from salience.machine import describe
from salience.reports.report import Report
from salience.scheme import Scheme
from salience.source import open_source


def dealt(allocation: dict[str, Any], scheme: Scheme, seed: int) -> list[tuple[str, Scheme]]:
    """The chosen widths as rules, dealt out anew among the groups of a kind."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for group in allocation["groups"]:
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", group["linears"][0]), []).append(group)
    rules = []
    for groups in kinds.values():
        bits = [group["bits"] for group in groups]
        random.Random(seed).shuffle(bits)
        for group, width in zip(groups, bits, strict=True):
            each = Scheme(width, scheme.group_size, scheme.sym)
            rules += [(f"^{re.escape(name)}$", each) for name in group["linears"]]
    return rules


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--schemes", nargs="+", default=["w3g64"])
    parser.add_argument("--method", default="awq")
    parser.add_argument("--effort", default="balanced")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--max-chunks", type=int, default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    tokenizer = open_source(args.model).tokenizer
    text = Path(args.text).read_text(encoding="utf-8")
    calibration = salience.Calibration(args.calibration, args.samples, args.seqlen)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:

        def make(name: str, scheme: str, **options: Any) -> Report:
            out, start = Path(folder) / f"{name}-{scheme}", time.perf_counter()
            report = salience.quantize(
                args.model,
                out,
                method=args.method,
                effort=args.effort,
                scheme=scheme,
                format="compressed-tensors",
                calibration=calibration,
                device=args.device,
                **options,
            )
            took = time.perf_counter() - start
            model = salience.load(out, device=args.device, dtype=torch.float32)
            result = perplexity(model, tokenizer, text, max_chunks=args.max_chunks)
            rows.append(
                {
                    "bits": name,
                    "scheme": scheme,
                    "bits_per_weight": report.bits_per_weight,
                    "perplexity": result.perplexity,
                    "seconds": took,
                    "phase_seconds": report.phase_seconds,
                    "peak_rss_bytes": report.peak_rss_bytes,
                    "peak_vram_bytes": report.peak_vram_bytes,
                    "allocation": report.allocation,
                    "protocol": result.protocol,
                }
            )
            made = {"rows": rows, "machine": describe(), "options": vars(args) | {"out": None}}
            if args.out is not None:
                args.out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
            Console().print(
                f"{name} {scheme}: {report.bits_per_weight:.4f} bits, "
                f"perplexity {result.perplexity:.3f}, {took:.1f} s"
            )
            return report

        for scheme in args.schemes:
            uniform = make("one width", scheme)
            chosen = make("chosen", scheme, target_bits=uniform.bits_per_weight)
            rules = dealt(chosen.allocation, Scheme.parse(scheme), args.seed)
            make("dealt at random", scheme, rules=rules)


if __name__ == "__main__":
    main()
