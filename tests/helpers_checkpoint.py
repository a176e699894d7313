"""Checkpoint folders as tests look at them: tensors, not modules."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from salience.errors import SalienceError
from salience.formats import detect_format
from salience.qtensor import QTensor

# One tensor of each dtype and of odd shapes.
TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b.weight": torch.arange(6, dtype=torch.float32).to(torch.bfloat16).view(2, 3),
    "c.qweight": torch.arange(4, dtype=torch.int32),
    "d": torch.tensor(1.5, dtype=torch.float64),
    "e": torch.zeros(0, 7, dtype=torch.float16),
    "f": torch.tensor([True, False]),
}


def refuse(make: Callable[[], object], *parts: object, kind: type = SalienceError) -> str:
    """The one-line message of the error that `make` raises."""
    with pytest.raises(kind) as error:
        make()
    message = str(error.value)
    assert len(message.splitlines()) == 1
    for part in parts:
        assert str(part) in message
    return message


def config_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return values


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of all shards."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def qtensors(folder: Path) -> dict[str, QTensor]:
    """The quantized linears by name."""
    config = config_of(folder)["quantization_config"]
    fmt, stored = detect_format(config), stored_tensors(folder)
    owners = [n.removesuffix(f".{fmt.marker}") for n in stored if n.endswith(f".{fmt.marker}")]
    found = {}
    for owner in owners:
        names = {local: f"{owner}.{local}" for local in fmt.tensors}
        parts = {local: stored[name] for local, name in names.items() if name in stored}
        found[owner] = fmt.read(parts, fmt.scheme(config, owner))
    return found


def dequantized(folder: Path) -> dict[str, Tensor]:
    """The checkpoint as a dense fp32 state dict."""
    fmt = detect_format(config_of(folder)["quantization_config"])
    coded = qtensors(folder)
    dense = {
        name: tensor.float()
        for name, tensor in stored_tensors(folder).items()
        if not any(name == f"{owner}.{local}" for owner in coded for local in fmt.tensors)
    }
    return dense | {f"{owner}.weight": qt.dequantize() for owner, qt in coded.items()}


def same_files(a: Path, b: Path) -> None:
    """All but the report, which has times in it, is the same to the byte."""
    names = sorted(path.name for path in a.iterdir())
    assert names == sorted(path.name for path in b.iterdir())
    for name in set(names) - {"salience_report.json"}:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
