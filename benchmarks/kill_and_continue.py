"""Kill a quantization at random moments until it is done, and compare with one left in peace.

    PYTHONPATH=src:tests python benchmarks/kill_and_continue.py --kills 100 \
        -o benchmarks/results/kill_and_continue.json

A tiny Llama is quantized by the command line in forks of a process that has imported everything.
Each run gets SIGKILL at a moment that is uniform over the time that what is left of the job should
take, and the same command is started again, until one run ends by itself; then comes the next job,
of another kind, until there were enough kills. The JSON says how many blocks that had been finished
were done again, and how many results had the same bytes; of the report, times and memory are left
out.
"""

import argparse
import json
import platform
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from salience.reports.report import versions
from tiny_models import TEXT, llama_config, make_model, save
from workshop import Workshop, differences, finished_blocks, published_blocks

JOBS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "awq": (("--save-search", "found"), {}),
    "balanced, hidden states on the disk": (("--effort", "balanced"), {"on_disk": True}),
    "gptq, hidden states saved": (("--method", "gptq"), {"save_seconds": 0}),
    "rtn, many shards": (("--method", "rtn"), {"shard_bytes": 50_000}),
}
BLOCKS = 12
COMMAND = ("quantize", "../model", "-o", "out", "--scheme", "w4g32", "--device", "cpu")
COMMAND += ("--calibration", "../text.txt", "--samples", "4", "--seqlen", "64")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Workshop() as workshop:
        place = Path(folder).resolve()
        save(make_model(llama_config(num_hidden_layers=BLOCKS)), place / "model")
        (place / "text.txt").write_text(TEXT[:40_000], encoding="utf-8")
        summary = measure(workshop, place, options.kills, random.Random(options.seed))
    summary |= {"seed": options.seed, "versions": versions(), "python": platform.python_version()}
    summary |= {"machine": f"{platform.machine()}, {platform.system()} {platform.release()}"}
    text = json.dumps(summary, indent=2)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


def measure(workshop: Workshop, place: Path, kills: int, chance: random.Random) -> dict[str, Any]:
    whole, seconds = {}, {}
    workshop("--help", cwd=place)  # it has imported everything when this returns
    for kind, (more, how) in JOBS.items():
        whole[kind] = place / f"whole {kind}"
        whole[kind].mkdir()
        start = time.perf_counter()
        run = workshop(*COMMAND, *more, cwd=whole[kind], **how)
        seconds[kind] = time.perf_counter() - start
        if run.status:
            sys.exit(run.stderr)
    counts = {"kills": 0, "jobs": 0, "blocks_done_twice": 0, "identical": 0}
    by_kind = dict.fromkeys(JOBS, 0)
    left: list[int] = []
    refused = 0
    while counts["kills"] < kills:
        kind = list(JOBS)[counts["jobs"] % len(JOBS)]
        more, how = JOBS[kind]
        cwd = place / f"job {counts['jobs']}"
        cwd.mkdir()
        counts["jobs"] += 1
        while True:
            done = finished_blocks(cwd / "out.partial")
            # Of a run, about half is spent on the blocks.
            rest = seconds[kind] * (1 - 0.5 * len(done) / 2 / BLOCKS)
            more_kills = counts["kills"] < kills
            when = {"kill_after": chance.uniform(0, rest)} if more_kills else {}
            run = workshop(*COMMAND, *more, cwd=cwd, **how, **when)
            killed = run.status == -9
            published = published_blocks(run)
            after = published or finished_blocks(cwd / "out.partial")
            # Where the run before was killed while it published, blocks may be gone already.
            kept = {name: stamp for name, stamp in done.items() if name in after}
            names = {name for name in kept if kept[name] != after[name]}
            counts["blocks_done_twice"] += len({Path(name).stem for name in names})
            if killed:
                counts["kills"] += 1
                by_kind[kind] += 1
                left.append(len(finished_blocks(cwd / "out.partial")) // 2)
                continue
            # Killed on its way out: the work is done, and the output taken.
            refused += "exists" in run.stderr
            if run.status and "exists" not in run.stderr:
                sys.exit(run.stderr)
            break
        same = not differences(cwd / "out", whole[kind] / "out")
        if (whole[kind] / "found").exists():
            same &= (cwd / "found").read_bytes() == (whole[kind] / "found").read_bytes()
        counts["identical"] += same and not (cwd / "out.partial").exists()
    return {
        **counts,
        "kills_by_kind": by_kind,
        "seconds_of_a_whole_job": {kind: round(value, 2) for kind, value in seconds.items()},
        "kills_by_finished_blocks": {str(count): left.count(count) for count in sorted(set(left))},
        "killed_when_all_was_done": refused,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
