"""What the settings of learned rounding are worth: perplexity, losses and seconds of each.

    python benchmarks/tuned_settings.py --calibration valid.txt --text test.txt \
        --rounding-rates 0.001 0.003 0.01 --range-rates 0.0001 0.0003 -o settings.json

Every combination is one quantization. `ms` is what an iteration took, with its share of the losses
held out; the share of the blocks that kept their start is `kept`.
"""

import argparse
import itertools
import json
import math
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import salience
from salience.evaluation.perplexity import perplexity
from salience.machine import describe
from salience.methods import BEST, EFFORTS, Tuning
from salience.source import open_source


def main() -> None:
    usual = Tuning()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--schemes", nargs="+", default=["w4g64", "w3g64"])
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", help="measure perplexity on this text")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--iterations", type=int, nargs="+", default=[usual.iterations])
    parser.add_argument("--batch-tokens", type=int, nargs="+", default=[usual.batch_tokens])
    parser.add_argument("--rounding-rates", type=float, nargs="+", default=[usual.rounding_rate])
    parser.add_argument("--range-rates", type=float, nargs="+", default=[usual.range_rate])
    parser.add_argument("--bounds", type=float, nargs="+", default=[usual.bound])
    parser.add_argument("--device", default="auto")
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    calibration = salience.Calibration(args.calibration, args.samples, args.seqlen)
    tokenizer = open_source(args.model).tokenizer
    text = Path(args.text).read_text(encoding="utf-8") if args.text else None
    columns = ("scheme", "iterations", "tokens", "rounding", "range", "bound")
    table = Table(*columns, "loss", "kept", "ppl", "learn s", "ms")
    rows = []
    settings = itertools.product(
        args.schemes, args.iterations, args.batch_tokens, args.rounding_rates, args.range_rates,
        args.bounds,
    )  # fmt: skip
    for scheme, iterations, tokens, rounding, ranges, bound in settings:
        tuning = replace(
            usual,
            iterations=iterations,
            batch_tokens=tokens,
            rounding_rate=rounding,
            range_rate=ranges,
            bound=bound,
        )
        EFFORTS["best"] = {"awq": replace(BEST, learns=tuning, end_to_end=None)}
        with tempfile.TemporaryDirectory() as folder:
            report = salience.quantize(
                args.model,
                Path(folder) / "out",
                effort="best",
                scheme=scheme,
                format="compressed-tensors",
                calibration=calibration,
                device=args.device,
            )
            found = None
            if text is not None:
                model = salience.load(Path(folder) / "out", device=args.device, dtype=torch.float32)
                found = perplexity(model, tokenizer, text).perplexity
        learned = [b for b in report.blocks if b.loss is not None and b.loss_start]
        ratios = [math.log(b.loss / b.loss_start) for b in learned if b.loss and b.loss_start]
        seconds = report.phase_seconds["learn"]
        row = {
            "scheme": scheme,
            "tuning": asdict(tuning),
            "loss": math.exp(sum(ratios) / max(1, len(ratios))),
            "kept": sum(not b.iterations for b in learned) / max(1, len(learned)),
            "perplexity": found,
            "phase_seconds": report.phase_seconds,
            "seconds": report.seconds,
            "ms": 1e3 * seconds / (iterations * max(1, len(learned))),
            "peak_vram_bytes": report.peak_vram_bytes,
        }
        rows.append(row)
        shown = f"{found:.3f}" if found is not None else "-"
        table.add_row(
            scheme, str(iterations), str(tokens), str(rounding), str(ranges), str(bound),
            f"{row['loss']:.3f}", f"{row['kept']:.2f}", shown, f"{seconds:.1f}", f"{row['ms']:.2f}",
        )  # fmt: skip
        if args.out is not None:
            made = {"rows": rows, "machine": describe(), "calibration": calibration.describe()}
            args.out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    Console().print(table)


if __name__ == "__main__":
    main()
