"""convert() to GGUF and from it: the same codes under other names, in another order of rows."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor
from transformers import Gemma3TextConfig, PhiConfig, Qwen3Config

import salience
from helpers_checkpoint import config_of, qtensors, refuse, stored_tensors
from salience.checkpoint import GgufCheckpoint
from salience.qtensor import QTensor
from salience.writer import ShardWriter
from test_formats_gguf import SIZES, by_another_tool
from tiny_models import error, llama_config, logits, make_model, save

Q = gguf.GGMLQuantizationType
UP = "model.layers.0.mlp.up_proj"


def quantized(folder: Path, config: Any = None, **options: Any) -> Path:
    """A tiny checkpoint of compressed-tensors, or as the options say."""
    source = save(make_model(config or llama_config(num_hidden_layers=2)), folder / "float")
    options = {"format": "compressed-tensors", "scheme": "w4g64", "method": "rtn"} | options
    salience.quantize(str(source), folder / "in", **options)
    shutil.rmtree(source)
    return folder / "in"


def changed(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A checkpoint with other tensors."""
    tensors = stored_tensors(folder)
    for file in folder.glob("model*"):
        file.unlink()
    change(tensors)
    writer = ShardWriter(folder)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()
    return folder


def same_tensors(a: Path, b: Path, slack: Callable[[str], float] = lambda _name: 0) -> None:
    before, after = stored_tensors(a), stored_tensors(b)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        if slack(name):
            assert (after[name] - tensor).abs().max() <= slack(name), name
        else:
            assert torch.equal(after[name], tensor), name


def same_codes(found: dict[str, QTensor], wanted: dict[str, QTensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, qt in found.items():
        assert qt.scheme == wanted[name].scheme
        for part in ("q", "scales", "zeros"):
            assert torch.equal(getattr(qt, part), getattr(wanted[name], part)), (name, part)


def kinds(file: Path) -> dict[str, Any]:
    return {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(file).tensors}


@pytest.mark.parametrize(
    ("fmt", "scheme", "kind"),
    [
        ("awq", "w4g32", Q.Q4_1),
        ("awq", "w4g64", Q.Q4_1),
        ("gptq", "w4g64", Q.Q4_1),
        ("gptq", "w4g64-sym", Q.Q4_0),
        ("compressed-tensors", "w4g32-sym", Q.Q4_0),
        ("compressed-tensors", "w8g64-sym", Q.Q8_0),
    ],
)
def test_there_and_back(fmt: str, scheme: str, kind: Any, tmp_path: Path) -> None:
    source = quantized(tmp_path, format=fmt, scheme=scheme)
    done = salience.convert(source, tmp_path / "gguf", "gguf")
    assert (done.format, done.lossless, done.linears) == ("gguf", True, 14)
    found = kinds(tmp_path / "gguf" / "model.gguf")
    assert {each for name, each in found.items() if "blk" in name and "norm" not in name} == {kind}
    assert found["token_embd.weight"] == found["output.weight"] == Q.F16
    assert done.bytes == sum(
        t.n_bytes for t in gguf.GGUFReader(tmp_path / "gguf/model.gguf").tensors
    )
    expected = logits(salience.load(source))
    for path in (tmp_path / "gguf", tmp_path / "gguf" / "model.gguf"):
        assert torch.equal(logits(salience.load(path)), expected)
    back = salience.convert(tmp_path / "gguf", tmp_path / "back", fmt)
    same_tensors(source, tmp_path / "back")
    assert back.bytes == sum(tensor.nbytes for tensor in stored_tensors(source).values())
    old, new = (config_of(folder) for folder in (source, tmp_path / "back"))
    old.pop("quantization_config"), new.pop("quantization_config")
    assert old == new
    same_codes(qtensors(tmp_path / "back"), qtensors(source))


ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: llama_config(
        num_hidden_layers=2,
        attention_bias=True,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=128, tie_word_embeddings=True),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES, head_dim=32, query_pre_attn_scalar=32, sliding_window=16
    ),
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_architectures(kind: str, tmp_path: Path) -> None:
    source = quantized(tmp_path, ARCHITECTURES[kind]())
    salience.convert(source, tmp_path / "gguf", "gguf")
    expected = logits(salience.load(source))
    assert error(logits(salience.load(tmp_path / "gguf")), expected) < 1e-6
    salience.convert(tmp_path / "gguf", tmp_path / "back", "compressed-tensors")

    def slack(name: str) -> float:  # GGUF has Gemma's norms as 1 + weight in fp32
        return 2**-24 if kind == "gemma3" and name.endswith("norm.weight") else 0

    same_tensors(source, tmp_path / "back", slack)


def test_a_lone_file(tmp_path: Path) -> None:
    """The config and the tokenizer are inside."""
    source = quantized(tmp_path, format="awq")
    salience.convert(source, tmp_path / "gguf", "gguf")
    lone = tmp_path / "lone" / "any.gguf"
    lone.parent.mkdir()
    (tmp_path / "gguf" / "model.gguf").rename(lone)
    for i, path in enumerate((lone, lone.parent)):
        out = tmp_path / f"back{i}"
        salience.convert(path, out, "awq")
        same_tensors(source, out)
        assert (out / "tokenizer.json").is_file() and (out / "chat_template.jinja").is_file()
        config, made = config_of(source), config_of(out)
        assert made.pop("quantization_config")["bits"] == 4
        config.pop("quantization_config")
        assert made == config
        assert torch.equal(logits(salience.load(out)), logits(salience.load(source)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_floats_that_fp16_lacks(dtype: torch.dtype, tmp_path: Path) -> None:
    """They are stored as they are, and have their former dtype afterwards."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith(("norm.weight", "lm_head.weight", "embed_tokens.weight")):
                tensors[name] = (tensor.double() * (1 + 2**-7 + 2**-20) * 1e-6).to(dtype)

    source = changed(quantized(tmp_path), change)
    if dtype == torch.bfloat16:
        config = config_of(source) | {"dtype": "bfloat16"}
        (source / "config.json").write_text(json.dumps(config))
    salience.convert(source, tmp_path / "gguf", "gguf")
    wanted = {torch.bfloat16: Q.BF16, torch.float32: Q.F32}[dtype]
    assert kinds(tmp_path / "gguf" / "model.gguf")["output.weight"] == wanted
    salience.convert(tmp_path / "gguf", tmp_path / "back", "compressed-tensors")
    same_tensors(source, tmp_path / "back")


def test_dense(tmp_path: Path) -> None:
    source = quantized(tmp_path)
    salience.convert(source, tmp_path / "gguf", "gguf")
    salience.convert(source, tmp_path / "a", "dense")
    salience.convert(tmp_path / "gguf", tmp_path / "b", "dense")
    same_tensors(tmp_path / "a", tmp_path / "b")


def test_a_head_that_is_the_embeddings(tmp_path: Path) -> None:
    """Stored once more it is left out; another one stays, and the model is no longer tied."""
    source = quantized(tmp_path, ARCHITECTURES["qwen3"]())
    for factor in (1, 2):
        changed(
            source,
            lambda t, by=factor: t.update(  # type: ignore[misc]
                {"lm_head.weight": t["model.embed_tokens.weight"] * by}
            ),
        )
        out = tmp_path / f"gguf{factor}"
        salience.convert(source, out, "gguf")
        assert ("output.weight" in GgufCheckpoint(out / "model.gguf").names()) == (factor == 2)
        assert config_of(out)["tie_word_embeddings"] == (factor == 1)
        assert error(logits(salience.load(out)), logits(salience.load(source))) < 1e-6


def test_biases_of_zeros_are_left_out(tmp_path: Path) -> None:
    source = changed(quantized(tmp_path), lambda t: t.update({f"{UP}.bias": torch.zeros(128)}))
    salience.convert(source, tmp_path / "gguf", "gguf")
    assert torch.equal(logits(salience.load(tmp_path / "gguf")), logits(salience.load(source)))
    changed(source, lambda t: t.update({f"{UP}.bias": torch.ones(128)}))
    refuse(lambda: salience.convert(source, tmp_path / "out", "gguf"), f"{UP}.bias", "has no place")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "gguf"}


REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "whole rows": ({"scheme": "w4channel"}, ("not one for whole rows", "_proj")),
    "3 bits": ({"scheme": "w3g32"}, ("w3g32", "codes of 4 bits")),
    "small groups": ({"scheme": "w4g16"}, ("multiple of 32 columns",)),
    "nf4": ({"scheme": "nf4", "method": "nf4", "format": "bitsandbytes"}, ("uniform codes",)),
    "order": (
        {"scheme": "w4g32-sym", "method": "gptq", "format": "gptq", "act_order": True},
        ("groups in activation order", "model.layers.0."),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_gguf_cannot_hold(case: str, tmp_path: Path, text_file: Path) -> None:
    options, parts = REFUSED[case]
    if "act_order" in options:
        text = salience.Calibration(str(text_file), samples=2, seqlen=64)
        options = options | {"calibration": text}
    source = quantized(tmp_path, **options)
    written: list[object] = []
    refuse(
        lambda: salience.convert(
            source, tmp_path / "out", "gguf", progress=lambda *each: written.append(each)
        ),
        *parts,
    )
    assert not written and {path.name for path in tmp_path.iterdir()} == {"in"}


def test_an_architecture_that_gguf_lacks(tmp_path: Path) -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    source = quantized(tmp_path, PhiConfig(**sizes))
    refuse(lambda: salience.convert(source, tmp_path / "out", "gguf"), "qwen3", "not phi")
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of a model wide enough for K-quants."""
    folder = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    quantized(folder, llama_config(**sizes), format="gguf", scheme="w4g32")
    return folder / "in" / "model.gguf"


@pytest.mark.parametrize(
    ("kind", "target"), [(Q.Q4_0, "awq"), (Q.Q4_0, "gptq"), (Q.Q8_0, "compressed-tensors")]
)
def test_exact_blocks_of_other_tools(kind: Q, target: str, wide: Path, tmp_path: Path) -> None:
    file = tmp_path / "other.gguf"
    values = by_another_tool(wide, file, kind)
    salience.convert(file, tmp_path / "out", target)
    found = qtensors(tmp_path / "out")
    assert len(found) == 7
    assert {qt.scheme.group_size for qt in found.values()} == {32}
    down = torch.from_numpy(values["blk.0.ffn_down.weight"])
    assert torch.equal(found["model.layers.0.mlp.down_proj"].dequantize(), down)
    expected = logits(salience.load(file, kernel="reference"))
    assert error(logits(salience.load(tmp_path / "out", kernel="reference")), expected) < 1e-5
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize("kind", [Q.Q4_1, Q.Q6_K])
def test_other_blocks_are_refused_by_name(kind: Q, wide: Path, tmp_path: Path) -> None:
    file = tmp_path / "other.gguf"
    by_another_tool(wide, file, kind)
    refuse(
        lambda: salience.convert(file, tmp_path / "out", "compressed-tensors"),
        "tensor blk.0.attn_k.weight",
        f"is {kind.name} and not codes",
        "salience quantize",
    )
    assert {path.name for path in tmp_path.iterdir()} == {"other.gguf"}
