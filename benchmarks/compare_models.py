"""`salience compare` of nine models in one command: its time, and whether it finds the ladder's
perplexities again.

    python benchmarks/compare_models.py --calibration valid.txt --text test.txt \
        --report report.html -o benchmarks/results/compare_models_cpu.json

Exits with 1 when a perplexity on the whole text is off by more than 0.02 from the one that
`ladder.py` wrote, or when it took longer than --minutes. With --max-chunks it measures a part of
the text, says what the whole would take, and compares nothing.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

LADDER = Path(__file__).parent / "results" / "ladder_h100.json"
MODELS = ("@rtn", "@awq", "@gptq", "@balanced")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--scheme", default="w4g64,w3g64")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--samples", default="128")
    parser.add_argument("--max-chunks", type=int)
    parser.add_argument("--repeats", default="5", help="of each timing")
    parser.add_argument("--report", default="report.html")
    parser.add_argument("--work", default="compare-work")
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    command = [sys.executable, "-m", "salience", "compare", args.model, *args.models]
    command += ["--scheme", args.scheme, "--text", args.text, "--calibration", args.calibration]
    command += ["--samples", args.samples, "--repeats", args.repeats]
    command += ["-o", args.report, "--work", args.work]
    command += ["--force", "--json"]
    if args.max_chunks is not None:
        command += ["--max-chunks", str(args.max_chunks)]
    start = time.perf_counter()
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    took = time.perf_counter() - start
    wanted = {}
    for row in json.loads(LADDER.read_text(encoding="utf-8"))["rows"]:
        name = row["effort"] if row["effort"] != "fast" else row["method"]
        wanted[f"{name} {row['scheme']}"] = row["perplexity"]
    table = Table("model", "perplexity", "ladder's", "load s", "speed s", "text s")
    rows, off, text_seconds, chunks, whole = [], [], 0.0, 1, 1
    for row in found["rows"]:
        receipt = row["receipt"]
        perplexity = row["cells"]["perplexity"]["value"]["value"]
        expected = wanted.get(row["name"])
        seconds = receipt["seconds"]
        text_seconds += seconds["text"]
        chunks = len(receipt["text"]["nll"])
        whole = int(receipt["text"]["protocol"].split()[2])
        rows.append({"name": row["name"], "perplexity": perplexity, "seconds": seconds})
        if expected is not None and abs(perplexity - expected) > 0.02:
            off.append(row["name"])
        parts = [seconds.get(phase, 0.0) for phase in ("load", "speed", "text")]
        shown = [f"{value:.1f}" for value in parts]
        table.add_row(row["name"], f"{perplexity:.3f}", f"{expected or 0:.3f}", *shown)
    Console().print(table)
    estimate = took + text_seconds * (whole / chunks - 1)
    print(
        f"{took / 60:.1f} minutes; {chunks} of {whole} chunks; whole: {estimate / 60:.1f} minutes"
    )
    if args.out:
        made = {"rows": rows, "seconds": took, "estimate": estimate, "chunks": [chunks, whole]}
        made |= {"machine": found["versions"], "off": off if chunks == whole else None}
        args.out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    if chunks == whole and (off or took > 60 * args.minutes):
        sys.exit(1)


if __name__ == "__main__":
    main()
