"""The quality ladder on a real model: perplexity and time of each method, effort and scheme.

    python benchmarks/ladder.py --calibration wikitext2/valid.txt --text wikitext2/test.txt \
        -o benchmarks/results/ladder_h100.json

All in one process; the seconds of a row are those of `quantize` by phase, without loading Python.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

import salience
from salience.evaluation.perplexity import perplexity
from salience.machine import describe
from salience.source import open_source

ROWS = (("gptq", "fast"), ("awq", "fast"), ("awq", "balanced"), ("awq", "best"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--schemes", nargs="+", default=["w4g64", "w3g64"])
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-rtn", action="store_true")
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    tokenizer = open_source(args.model).tokenizer
    text = Path(args.text).read_text(encoding="utf-8")
    calibration = salience.Calibration(args.calibration, args.samples, args.seqlen)
    kinds = ROWS if args.no_rtn else (("rtn", "fast"), *ROWS)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for scheme in args.schemes:
            for method, effort in kinds:
                out = Path(folder) / f"{method}-{effort}-{scheme}"
                start = time.perf_counter()
                report = salience.quantize(
                    args.model,
                    out,
                    method=method,
                    effort=effort,
                    scheme=scheme,
                    format="compressed-tensors",
                    calibration=calibration,
                    device=args.device,
                )
                took = time.perf_counter() - start
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
                model = salience.load(out, device=args.device, dtype=torch.float32)
                result = perplexity(model, tokenizer, text)
                rows.append(
                    {
                        "method": method,
                        "effort": effort,
                        "scheme": scheme,
                        "perplexity": result.perplexity,
                        "output_error": report.error / max(report.error_rtn, 1e-30),
                        "seconds": took,
                        "phase_seconds": report.phase_seconds,
                        "peak_vram_bytes": report.peak_vram_bytes,
                        "protocol": result.protocol,
                    }
                )
                phases = " ".join(f"{k} {v:.2f}" for k, v in report.phase_seconds.items())
                Console(stderr=True).print(
                    f"{method} {effort} {scheme}: {result.perplexity:.3f}, {took:.1f} s ({phases})"
                )
                made = {"rows": rows, "machine": describe(), "options": {"samples": args.samples}}
                if args.out:
                    args.out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
