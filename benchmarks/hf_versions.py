"""Run the tests of `salience.hf` with several versions of Transformers, each in its own folder.

    python benchmarks/hf_versions.py 5.10.4 5.23.0 -o benchmarks/results/hf_versions.json

The seams that `salience.hf` uses are private, so it is these tests that say which versions have
them. A version is installed without its dependencies over the environment that runs this; where it
wants older ones of tokenizers and of the Hub's client, by its own metadata, these are installed
beside it. Exits 1 when a test fails.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PathDistribution
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = ("tests/test_hf.py", "tests/test_examples.py")


def pip_install(folder: Path, *packages: str) -> None:
    options = ["--quiet", "--upgrade", "--no-deps", "--target", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *packages], check=True)


def environment(version: str, root: Path) -> dict[str, str]:
    """Variables under which Python finds this version before the installed one."""
    folder = root / f"transformers-{version}"
    if not (folder / "transformers").is_dir():
        pip_install(folder, f"transformers=={version}")
        metadata = next(folder.glob("transformers-*.dist-info"))
        wanted = PathDistribution(metadata).requires or []
        older = [w for w in wanted if "extra" not in w and w.startswith(("tokenizers", "hugging"))]
        pip_install(folder, *older, "httpx", "httpcore", "h11", "anyio", "certifi", "idna")
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(folder)]),
        "HF_HUB_OFFLINE": "1",
    }


def run(version: str, root: Path) -> dict[str, object]:
    variables = environment(version, root)
    program = "import transformers; print(transformers.__version__)"
    asked = subprocess.run(
        [sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=True
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS],
        env=variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    summary = done.stdout.strip().splitlines()[-1]
    counts = {
        kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", summary)
    }
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return {
        "transformers": asked.stdout.strip(),
        "passes": done.returncode == 0,
        **counts,
        "failures": failed,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="+")
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--root", type=Path, default=Path("/tmp/hf_versions"), help="for installs")
    args = parser.parse_args()
    results = [run(version, args.root) for version in args.versions]
    text = json.dumps({"python": platform.python_version(), "results": results}, indent=2)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")
    return 0 if all(result["passes"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
