"""A model too large to play with: random weights of its shape, streamed from disk, and measured.

    python benchmarks/large_model.py --shape llama-3-8b --efforts fast balanced \
        -o benchmarks/results/llama_3_8b_h100.json
    python benchmarks/large_model.py --shape tinyllama-1.1b --samples 16 --seqlen 256 \
        --max-memory 3GiB -o benchmarks/results/tinyllama_cpu.json

The checkpoint is made on the spot. `plan` and `quantize` run as commands of their own, so that the
peak memory is theirs; `salience bench quantize` is the same in one process, phase by phase.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from main_job import salience
from rich.console import Console

from salience.bench.shapes import SHAPES, shape_config, write_checkpoint
from salience.machine import describe
from salience.placement import resolve_device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--layers", type=int, help="fewer or more blocks than the model has")
    parser.add_argument("--efforts", nargs="+", default=["fast"])
    parser.add_argument("--scheme", default="w4g128")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--max-memory")
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    console = Console(stderr=True)
    options: list[object] = ["--scheme", args.scheme, "--device", args.device]
    options += ["--samples", args.samples, "--seqlen", args.seqlen]
    options += ["--max-memory", args.max_memory] if args.max_memory else []
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        folder.mkdir()
        start = time.perf_counter()
        config = shape_config(args.shape, args.layers)
        total = write_checkpoint(config, folder, resolve_device("auto"))
        console.print(f"made {total / 2**30:.1f} GiB in {time.perf_counter() - start:.0f} s")
        for effort in args.efforts:
            out = Path(name) / effort
            plan = salience("plan", folder, *options, "--effort", effort, "-o", out)
            made = salience("quantize", folder, "-o", out, *options, "--effort", effort)
            kept = ("seconds", "phase_seconds", "peak_vram_bytes", "wall_seconds", "peak_rss_bytes")
            row = {"effort": effort, "plan": plan, **{key: made[key] for key in kept}}
            row |= {"error_rtn": made["error_rtn"], "error": made["error"]}
            rows.append(row)
            console.print({key: value for key, value in row.items() if key != "plan"})
            seconds = sum(plan["seconds"].values())
            console.print(
                f"plan: {seconds:.0f} s, RAM {plan['ram_bytes'] / 2**30:.2f} GiB, "
                f"VRAM {plan['vram_bytes'] / 2**30:.2f} GiB, {plan['seconds']}, {plan['memory']}"
            )
            if args.out:
                result = {"shape": args.shape, "layers": args.layers, "checkpoint_bytes": total}
                result |= {"options": [str(each) for each in options], "rows": rows}
                result |= {"machine": describe()}
                args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
