"""`salience bench quantize`: phases with seconds and memory, and nothing left behind."""

import mmap
import os
import tempfile
import time
from pathlib import Path

import pytest
import torch

from helpers_bench import Command, make_command, write_shape
from salience.bench.quantize import _Watch


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Command:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return make_command(monkeypatch, capfd)


@pytest.mark.parametrize("method", ["awq", "rtn"])
def test_phases(method: str, command: Command, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    found = command(
        "quantize", "--shape", write_shape(tmp_path), "--scheme", "w4g64", "--method", method,
        "--samples", "2", "--seqlen", "16", "--device", "cpu", "--json", "-o", out,
    )  # fmt: skip
    values = found.json
    assert out.is_file() and os.listdir(tmp_path / "tmp") == []
    phases = values["phases"]
    assert {"search", "write"} <= phases.keys()
    assert ("statistics" in phases) == (method == "awq")
    for phase in phases.values():
        assert phase["seconds"] >= 0 and phase["rss_bytes"] > 2**25 and phase["vram_bytes"] == 0
    assert sum(phase["seconds"] for phase in phases.values()) == pytest.approx(values["seconds"])
    assert values["rss_bytes"] == max(phase["rss_bytes"] for phase in phases.values())
    assert values["checkpoint_bytes"] == 2 * (
        2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128) + 2 * 320 * 64 + 5 * 64
    )
    assert values["quantization"]["method"].startswith(method)


def test_a_model_and_the_table(command: Command, llama: Path, tmp_path: Path) -> None:
    found = command("quantize", llama, "--method", "rtn", "--scheme", "w4g64", "--device", "cpu")
    assert found.status == 0 and "search" in found.stdout and "peak RAM" in found.stdout
    assert os.listdir(tmp_path / "tmp") == []


def test_memory_goes_to_its_phase() -> None:
    watch = _Watch(torch.device("cpu"))
    with watch.running():
        watch.enter("large")
        with mmap.mmap(-1, 2**27) as held:
            for page in range(0, len(held), mmap.PAGESIZE):
                held[page] = 1
            time.sleep(0.05)
        watch.enter("")
        watch.enter("small")
        time.sleep(0.05)
    large, small = watch.phases["large"].rss_bytes, watch.phases["small"].rss_bytes
    assert large - small > 100 * 2**20


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "name a MODEL or a --shape"),
        (["x", "--layers", "2"], "are for a --shape"),
        (["--shape", "nothing"], "there is no shape 'nothing'"),
        (["x", "--max-memory", "much"], "size 'much' is not understood"),
        (["x", "-o", "/nowhere/out.json"], "/nowhere/out.json cannot be written"),
    ],
    ids=str,
)
def test_wrong_use(args: list[str], said: str, command: Command) -> None:
    found = command("quantize", *args)
    assert found.status == 2 and found.stdout == "" and said in found.stderr
