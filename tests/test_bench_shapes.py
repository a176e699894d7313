"""Shapes: the published sizes, and models that are as large as was said."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import salience
from helpers_bench import TINY, write_shape
from salience.bench.shapes import (
    SHAPES,
    build,
    cache_bytes,
    needed_bytes,
    resident,
    shape_config,
    write_checkpoint,
)
from salience.bench.weights import random_weight
from salience.errors import SalienceError
from salience.linear import QuantEmbedding, QuantLinear
from salience.recipe import Recipe
from salience.scheme import Scheme
from salience.source import skeleton

CPU = torch.device("cpu")
W4 = Recipe(Scheme(4, 64))
# What the safetensors headers on the Hub count.
PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-32b": 32_763_876_352,
    "qwen3-8b": 8_190_735_360,
}


def tiny(tmp_path: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    config = shape_config(str(write_shape(tmp_path, **changes)))
    return skeleton(config, dtype, "tiny")


@pytest.mark.parametrize("name", SHAPES)
def test_published_sizes(name: str) -> None:
    one, two = (
        sum(p.numel() for p in skeleton(shape_config(name, n), torch.float16, name).parameters())
        for n in (1, 2)
    )
    layers = shape_config(name).num_hidden_layers
    assert one + (layers - 1) * (two - one) == PARAMETERS[name]


def test_bytes_of_a_cached_token() -> None:
    # Of Llama-3-8B: keys and values, 32 layers, 8 heads of 128 numbers, 2 bytes each.
    assert cache_bytes(shape_config("llama-3-8b"), torch.float16) == 131_072
    assert cache_bytes(shape_config("qwen3-8b"), torch.float32) == 2 * 36 * 8 * 128 * 4


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        (W4, {}),
        (W4, {"tie_word_embeddings": True}),
        (W4, {"model_type": "qwen2"}),  # with biases
        (Recipe(Scheme.parse("nf4-dq")), {}),
        (Recipe(Scheme(3, 32), (("lm_head|embed", Scheme(8, 64)),)), {}),
        (None, {}),
    ],
    ids=str,
)
def test_a_model_is_as_large_as_was_said(
    recipe: Recipe | None, changes: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny(tmp_path, torch.bfloat16, **changes)
    said, _ = needed_bytes(model, recipe, torch.bfloat16, CPU)
    biases = 0
    model = build(model, recipe, torch.bfloat16, CPU)
    for module in model.modules():
        assert recipe is None or not (isinstance(module, torch.nn.Linear) and module.bias)
        if isinstance(module, QuantLinear) and module.bias is not None:
            biases += module.bias.nbytes
    held = resident(model, torch.bfloat16)
    # The biases were counted as parameters; here they are buffers of the packed linears.
    assert held.weights == pytest.approx(said, abs=biases)
    assert 0 < held.read <= held.weights
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])
    with torch.no_grad():
        logits = model(torch.randint(320, (2, 5))).logits
    assert logits.shape == (2, 5, 320) and torch.isfinite(logits).all()
    assert logits.dtype == torch.bfloat16


def test_what_a_step_reads(tmp_path: Path) -> None:
    model = build(tiny(tmp_path), W4, torch.float32, CPU)
    packed = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert len(packed) == 2 * 7
    weights = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128  # of a block
    codes = weights / 2 + 3 * (64 + 32 + 32 + 64 + 128 + 128 + 2 * 64)  # one group for 64 columns
    floats = 4 * (320 * 64 + 5 * 64)  # the head and the norms, not the embeddings
    assert resident(model, torch.float32).read == 2 * codes + floats


def test_copies_are_other_memory(tmp_path: Path) -> None:
    model = build(tiny(tmp_path), W4, torch.float32, CPU)
    places = [
        b.data_ptr() for m in model.modules() if isinstance(m, QuantLinear) for b in m.buffers()
    ]
    assert len(set(places)) == len(places)


def test_rules_reach_the_head(tmp_path: Path) -> None:
    recipe = Recipe(Scheme(4, 64), (("lm_head", Scheme(8, 64)),))
    model = build(tiny(tmp_path), recipe, torch.float32, CPU)
    assert isinstance(model.lm_head, QuantLinear) and model.lm_head.scheme.bits == 8
    assert not isinstance(model.model.embed_tokens, QuantEmbedding)


def test_layers_and_errors(tmp_path: Path) -> None:
    assert shape_config("qwen3-8b", 3).num_hidden_layers == 3
    with pytest.raises(SalienceError, match=r"no shape 'llama-9'.*llama-3-8b.*qwen3-8b"):
        shape_config("llama-9")
    with pytest.raises(SalienceError, match="unknown architecture 'nothing'"):
        shape_config(str(write_shape(tmp_path, model_type="nothing")))
    with pytest.raises(SalienceError, match=r"128 does not divide the 64 inputs.*w4g64"):
        needed_bytes(tiny(tmp_path), Recipe(Scheme(4, 128)), torch.float32, CPU)


@pytest.mark.parametrize("text", ["w4g128", "w4g64-sym", "w3g64", "w1g64", "w8channel", "nf4-dq"])
def test_random_weights_keep_the_size_of_what_they_multiply(text: str) -> None:
    torch.manual_seed(0)
    qt = random_weight(512, 256, Scheme.parse(text), CPU)
    y = torch.randn(64, 512) @ qt.dequantize().T
    assert 0.3 < y.std() < 3
    assert qt.scheme.codebook or len(qt.zeros.unique()) >= (1 if qt.scheme.sym else 2)


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_is_one(tied: bool, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    config = shape_config(str(write_shape(tmp_path, tie_word_embeddings=tied)))
    total = write_checkpoint(config, folder, CPU)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    assert ("lm_head.weight" in index["weight_map"]) is not tied
    model = salience.load(folder)
    with torch.no_grad():
        assert torch.isfinite(model(torch.randint(320, (1, 4))).logits).all()
    report = salience.quantize(
        str(folder), tmp_path / "out", method="rtn", scheme="w4g64", tensor_parallel=1
    )
    assert len(report.linears) == 7 * TINY["num_hidden_layers"]
