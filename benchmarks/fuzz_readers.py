"""Fuzz all that reads untrusted bytes, led by coverage.

    PYTHONPATH=src:tests python benchmarks/fuzz_readers.py --seconds 600 -o RESULT.json

It needs `atheris` (in an environment of its own: it instruments what is imported). Each target of
`tests/fuzz_targets.py` runs in a process of its own for its part of the time, with a limit of
memory, so that a bomb is a finding and not the end of the machine. A finding is any exception but
SalienceError, a message that is not one printable line, an input that takes more than 10 seconds,
a process that dies. The input of each is kept beside the result.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_SLOWEST = 10  # seconds for one input
_MEMORY = 6 << 30
_RSS_MIB = 3000


def fuzz(target: str, corpus: Path, seconds: int) -> None:
    """Fuzz one target in this process; libFuzzer ends it."""
    import resource

    import atheris

    with atheris.instrument_imports(include=["salience", "gguf", "json"]):
        import fuzz_targets

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    fuzz_targets.start([target])
    for i, data in enumerate(fuzz_targets.seeds(target)):
        (corpus / f"seed-{i}").write_bytes(data)
    flags = [f"-max_total_time={seconds}", f"-timeout={_SLOWEST}", f"-rss_limit_mb={_RSS_MIB}"]
    flags += [
        f"-artifact_prefix={corpus.parent}/{target}-",
        "-max_len=8192",
        "-print_final_stats=1",
    ]
    seen: set[tuple[object, ...]] = set()

    def once(data: bytes) -> None:
        try:
            fuzz_targets.run(target, data)
        except Exception as error:  # kept, and the search goes on
            last = traceback.extract_tb(error.__traceback__)[-1]
            if (type(error), last.filename, last.lineno) not in seen:
                seen.add((type(error), last.filename, last.lineno))
                (corpus.parent / f"{target}-{len(seen)}").write_bytes(data)
                text = "".join(traceback.format_exception(error)[-6:])
                print("FINDING", json.dumps(text), file=sys.stderr, flush=True)

    atheris.Setup([sys.argv[0], *flags, str(corpus)], once)
    atheris.Fuzz()


def in_a_process(name: str, corpus: Path, seconds: int) -> dict[str, Any]:
    """Fuzz one target; what came of it."""
    corpus.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--one", name, "--seconds", str(seconds)]
    command += ["--corpus", str(corpus)]
    start = time.perf_counter()
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    took = time.perf_counter() - start
    pattern = r"^(?:stat::number_of_executed_units:|#)\s*(\d+)"
    counts = [int(n) for n in re.findall(pattern, done.stderr, re.MULTILINE)]
    coverage = re.findall(r"cov: (\d+)", done.stderr)
    findings = re.findall(r"^FINDING (.*)$", done.stderr, re.MULTILINE)
    findings = [json.loads(line) for line in findings]
    if done.returncode:  # a hang, a bomb or a death
        findings.append("\n".join(done.stderr.splitlines()[-30:]))
    result = {
        "executions": max(counts, default=0),
        "seconds": round(took, 1),
        "coverage": int(coverage[-1]) if coverage else 0,
        "findings": findings,
    }
    print(name, result["executions"], result["coverage"], *findings, sep="\n", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=600, help="for all targets together")
    parser.add_argument("--jobs", type=int, default=1, help="targets at a time")
    parser.add_argument("--targets", nargs="*", help="default: all")
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--corpus", type=Path, help="kept between runs; default: a temporary one")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        fuzz(args.one, args.corpus, args.seconds)
        return
    import fuzz_targets
    from salience.formats import FORMATS, READ_ONLY

    names = args.targets or list(fuzz_targets.TARGETS)
    corpus = args.corpus or Path(tempfile.mkdtemp(prefix="fuzz-corpus-"))
    each = max(1, args.seconds // len(names))
    with ThreadPoolExecutor(args.jobs) as pool:
        found = list(pool.map(lambda name: in_a_process(name, corpus / name, each), names))
    results = dict(zip(names, found, strict=True))
    summary = {
        "formats": list(dict.fromkeys(fmt.name for fmt in (*FORMATS, *READ_ONLY))),
        "executions": sum(r["executions"] for r in results.values()),
        "seconds": round(sum(r["seconds"] for r in results.values()), 1),
        "findings": sum(len(r["findings"]) for r in results.values()),
        "targets": results,
    }
    if args.out:
        args.out.write_text(json.dumps(summary, indent=1) + "\n")
    print({key: value for key, value in summary.items() if key != "targets"})


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
