"""Tensors by the model's names, read one at a time, and back by the names they are stored by."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from salience.checkpoint import SafetensorsCheckpoint
from salience.conversion import ModelWeights, stored_module, stored_owner, stored_tensors
from salience.errors import SalienceError
from salience.source import open_source
from tiny_architectures import architecture
from tiny_models import make_model, save


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model = make_model(architecture("mixtral"))
    return model, save(model, tmp_path_factory.mktemp("mixtral"))


def weights_of(folder: Path) -> tuple[Any, ModelWeights]:
    skeleton = open_source(str(folder)).skeleton()
    return skeleton, ModelWeights(SafetensorsCheckpoint(folder), skeleton)


@pytest.mark.parametrize(
    "name", ["mixtral", "gpt_neox", "deepseek_v3", "qwen3_next", "gemma3_text"]
)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    model = make_model(architecture(name))
    folder = save(model, tmp_path / "in")
    skeleton, weights = weights_of(folder)
    stored = load_file(folder / "model.safetensors")
    back: dict[str, torch.Tensor] = {}
    for local, parameter in model.named_parameters():
        tensor = weights.tensor(local)
        assert torch.equal(tensor, parameter), local
        assert weights.shape(local) == tuple(parameter.shape)
        assert weights.nbytes(local) == parameter.nbytes
        back |= stored_tensors(skeleton, weights, local, tensor)
    buffers = {name for name, _ in model.named_buffers()}
    assert {name for name in stored if name not in buffers} <= set(back)
    assert all(torch.equal(stored[key], back[key]) for key in back if key in stored)
    assert set(back) <= set(stored)


def test_only_what_is_asked_for_is_read(
    mixtral: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, weights = weights_of(mixtral[1])
    read: list[str] = []
    right = SafetensorsCheckpoint.tensor

    def spy(self: SafetensorsCheckpoint, name: str) -> torch.Tensor:
        read.append(name)
        return right(self, name)

    monkeypatch.setattr(SafetensorsCheckpoint, "tensor", spy)
    weights.tensor("model.layers.1.self_attn.q_proj.weight")
    assert read == ["model.layers.1.self_attn.q_proj.weight"]
    read.clear()
    weights.tensor("model.layers.1.mlp.experts.down_proj")
    assert read == [f"model.layers.1.block_sparse_moe.experts.{i}.w2.weight" for i in range(8)]


def test_names_of_modules(mixtral: tuple[Any, Path]) -> None:
    skeleton, weights = weights_of(mixtral[1])
    moe = "model.layers.0.block_sparse_moe"
    assert stored_owner(weights, "model.layers.0.mlp.experts") == f"{moe}.experts"
    assert stored_owner(weights, "model.layers.0.mlp.gate") == f"{moe}.gate"
    assert stored_owner(weights, "nothing") == "nothing"
    projection = "model.layers.0.self_attn.q_proj"
    assert stored_module(skeleton, weights, projection) == projection


def test_missing_expert(mixtral: tuple[Any, Path], tmp_path: Path) -> None:
    stored = load_file(mixtral[1] / "model.safetensors")
    for number in range(8):
        del stored[f"model.layers.0.block_sparse_moe.experts.{number}.w2.weight"]
    del stored["model.layers.1.block_sparse_moe.experts.5.w1.weight"]
    (tmp_path / "config.json").write_bytes((mixtral[1] / "config.json").read_bytes())
    save_file(stored, tmp_path / "model.safetensors")
    _, weights = weights_of(tmp_path)
    assert "model.layers.0.mlp.experts.down_proj" not in weights.names()
    with pytest.raises(SalienceError, match=r"mlp\.experts\.down_proj is missing from"):
        weights.tensor("model.layers.0.mlp.experts.down_proj")
    with pytest.raises(SalienceError, match=r"mlp\.experts\.gate_up_proj of .* cannot be made"):
        weights.tensor("model.layers.1.mlp.experts.gate_up_proj")
