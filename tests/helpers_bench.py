"""What the tests of `salience bench` share: a tiny shape, quick rates, and runs of the command."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from salience.bench import kernels, measure
from salience.cli.app import main

TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        assert self.status == 0, self.stderr
        return json.loads(self.stdout)


Command = Callable[..., Ran]


def make_command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run `salience bench ARGS` in this process, where the machine is measured in no time."""
    monkeypatch.setattr(measure, "_CPU_BYTES", 2**20)
    monkeypatch.setattr(measure, "_CPU_SIZE", 64)
    monkeypatch.setattr(measure, "_CPU_SECONDS", 0.01)
    monkeypatch.setattr(kernels, "_MOST_COPIES", 3)

    def run(*args: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["salience", "bench", *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return Ran(int(stop.value.code or 0), *capfd.readouterr())

    return run


def write_shape(folder: Path, **changes: Any) -> Path:
    """A config.json of the tiny shape."""
    path = folder / "config.json"
    path.write_text(json.dumps({**TINY, **changes}), encoding="utf-8")
    return path


def assert_png(path: Path) -> None:
    """A PNG with something in it."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data[12:16] == b"IHDR"
    assert int.from_bytes(data[16:20], "big") > 200 and len(data) > 5000
