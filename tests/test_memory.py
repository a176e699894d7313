"""Peak memory does not grow with the number of blocks, and stays under what was allowed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tiny_models import llama_config, make_model, save
from workshop import Workshop

MIB = 2**20


def quantized(source: Path, out: Path, text: Path, *options: str) -> dict[str, Any]:
    """`salience quantize` in a process of its own: its JSON and its peak resident bytes."""
    command = [sys.executable, "-m", "salience", "quantize", str(source), "-o", str(out), "--json"]
    command += ["--scheme", "w4g32", "--calibration", str(text), "--device", "cpu"]
    code = (
        "import resource, subprocess, sys;"
        "done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE);"
        "print(done.stdout.decode().strip());"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024);"
        "sys.exit(done.returncode)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command, *options],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    printed, peak = done.stdout.strip().rsplit("\n", 1)
    return json.loads(printed) | {"peak": int(peak)}


def wide(layers: int, folder: Path, intermediate_size: int = 1536) -> Path:
    config = llama_config(
        hidden_size=512,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    return save(make_model(config), folder)


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_blocks(
    workshop: Workshop, tmp_path: Path, text_file: Path
) -> None:
    """12 blocks have 100 MiB more fp32 weights than 4, and the process the same peak."""
    options = ("--scheme", "w4g32", "--samples", "2", "--seqlen", "64", "--only", "q_proj")
    peaks = {}
    for layers in (4, 12):
        folder = wide(layers, tmp_path / f"in{layers}")
        command = ("quantize", folder, "-o", f"out{layers}", "--calibration", text_file, *options)
        done = workshop(*command, cwd=tmp_path.resolve())
        assert done.status == 0, done.stderr
        peaks[layers] = done.peak
    assert abs(peaks[12] - peaks[4]) < 25 * MIB


@pytest.mark.slow
def test_peak_memory_stays_under_what_is_allowed(tmp_path: Path, text_file: Path) -> None:
    """With hidden states of 64 MiB and half of that left for them, they go to the disk."""
    source = wide(2, tmp_path / "in", intermediate_size=512)
    options = ("--samples", "64", "--seqlen", "512", "--only", "q_proj")
    command = [sys.executable, "-m", "salience", "plan", str(source), "--device", "cpu", "--json"]
    command += ["--scheme", "w4g32", *options, "-o", str(tmp_path / "out")]
    planned = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    assert not planned["hidden_on_disk"]
    allowed = planned["ram_bytes"] - 32 * MIB
    limit = ("--max-memory", f"{allowed // MIB}MiB")
    planned = json.loads(subprocess.run([*command, *limit], stdout=subprocess.PIPE).stdout)
    assert planned["fits"] and planned["hidden_on_disk"]
    big = tmp_path / "big.txt"
    big.write_text(text_file.read_text() * 4)
    made = quantized(source, tmp_path / "out", big, *options, *limit)
    assert made["peak"] <= allowed
