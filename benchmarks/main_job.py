"""The main job, measured: a float model, rounded to nearest, and AWQ; then one chat reply.

    python benchmarks/main_job.py                                    # what `make demo` runs
    python benchmarks/main_job.py --calibration valid.txt --text test.txt --samples 128 \
        --max-chunks 0 -o benchmarks/results/main_job.json

Every step is the command `salience` in a process of its own, so that its peak memory is its own.
Without --calibration and --text, half the topics of Python's documentation calibrate and the other
half evaluate.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from salience.machine import describe

stderr = Console(stderr=True)


def salience(*args: object) -> dict[str, Any]:
    """Run `salience ARGS --json`; its object, with the wall seconds and peak memory."""
    command = [sys.executable, "-m", "salience", *map(str, args), "--json"]
    stderr.print("[dim]$ salience", *map(str, args), soft_wrap=True)
    start = time.perf_counter()
    # A wrapper reports the peak memory of its one child, the command.
    code = (
        "import resource, subprocess, sys;"
        "done = subprocess.run(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024);"
        "sys.exit(done.returncode)"
    )
    none = subprocess.DEVNULL
    done = subprocess.run(
        [sys.executable, "-c", code, *command], stdin=none, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit(done.returncode)
    printed, peak = done.stdout.strip().rsplit("\n", 1)
    wall = time.perf_counter() - start
    return json.loads(printed) | {"wall_seconds": wall, "peak_rss_bytes": int(peak)}


def documentation(folder: Path) -> tuple[Path, Path]:
    """Two text files: even and odd topics of Python's documentation."""
    from pydoc_data.topics import topics

    paths = folder / "calibration.txt", folder / "evaluation.txt"
    for i, path in enumerate(paths):
        path.write_text("\n".join(topics[key] for key in sorted(topics)[i::2]), encoding="utf-8")
    return paths


def show(rows: list[dict[str, Any]], text: str, context: int) -> None:
    table = Table(title=f"perplexity on {text}, context {context}")
    for column in ("", "disk MiB", "bits/weight", "perplexity", "seconds", "peak RSS MiB"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['bytes'] / 2**20:.1f}",
            f"{row['bits_per_weight']:.2f}",
            f"{row['perplexity']:.3f}",
            f"{row['seconds']:.0f}" if row["seconds"] else "-",
            f"{row['peak_rss_bytes'] / 2**20:.0f}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--scheme", default="w4g64")
    parser.add_argument("--calibration", help="calibration text file")
    parser.add_argument("--text", help="evaluation text file")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--max-chunks", type=int, default=6, help="0 for the whole text")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--prompt", default="What is the capital of France? Answer in one sentence."
    )
    parser.add_argument("-o", "--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        run(args, Path(name))


def run(args: argparse.Namespace, folder: Path) -> None:
    calibration, text = documentation(folder)
    calibration, text = args.calibration or calibration, args.text or text
    common = ("--scheme", args.scheme, "--device", args.device)
    plan = salience("plan", args.model, *common, "--samples", args.samples, "-o", folder)
    evaluate = ["--text", text, "--context", args.context, "--device", args.device]
    if args.max_chunks:
        evaluate += ["--max-chunks", args.max_chunks]
    rows = []
    for method in ("float", "rtn", "awq"):
        model, made = args.model, None
        if method != "float":
            model = folder / method
            calibrate = ("--calibration", calibration, "--samples", args.samples)
            calibrate += ("--seqlen", args.seqlen)
            made = salience(
                "quantize", args.model, "-o", model, "--method", method, *common, *calibrate
            )
        looked = salience("inspect", model)
        measured = salience("eval", model, *evaluate)
        rows.append(
            {
                "name": method,
                "bytes": looked["bytes"],
                "bits_per_weight": looked["bits_per_weight"],
                "perplexity": measured["perplexity"],
                "eval_seconds": measured["wall_seconds"],
                "seconds": made and made["wall_seconds"],
                "phase_seconds": made and made["phase_seconds"],
                "peak_rss_bytes": (made or measured)["peak_rss_bytes"],
                "protocol": measured["protocol"],
            }
        )
    show(rows, Path(text).name, args.context)
    answer = salience(
        "chat",
        folder / "awq",
        "--prompt",
        args.prompt,
        "--device",
        args.device,
        "--max-new-tokens",
        48,
    )
    Console().print(f"> {args.prompt}\n{answer['text']}", markup=False)
    if args.out:
        result = {
            "plan": plan,
            "rows": rows,
            "reply": answer,
            "machine": describe(),
            "options": {
                key: Path(value).name if isinstance(value, str) else value
                for key, value in vars(args).items()
                if key != "out"
            },
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
