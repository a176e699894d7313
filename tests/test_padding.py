"""Zeros that widen an MLP: the model stays the same function, or is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3TextConfig,
    OPTConfig,
    Phi3Config,
    Starcoder2Config,
)

import salience
from helpers_checkpoint import config_of, dequantized, qtensors, refuse, same_files, stored_tensors
from helpers_gguf import write_gguf
from salience.calibration import Calibration
from salience.pipeline.padding import PaddedSource, pad
from salience.source import Source, open_source
from tiny_models import VOCABULARY, error, llama_config, logits, make_model, save

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama with biases": lambda: llama_config(intermediate_size=72, mlp_bias=True),
    "gate and up in one": lambda: Phi3Config(**SIZES),
    "norms of 1 + w": lambda: Gemma3TextConfig(**SIZES, head_dim=16),
    "no gate, biases": lambda: Starcoder2Config(**SIZES, use_bias=True),
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with 72 inner channels, which no group of 64 divides."""
    return save(make_model(llama_config(intermediate_size=72)), tmp_path_factory.mktemp("odd"))


def padded(source: Source, multiple: int) -> PaddedSource:
    found, widths = pad(source, multiple, CPU)
    assert isinstance(found, PaddedSource) and widths == found.widths
    return found


def dense(source: Source) -> nn.Module:
    """The model with all its weights, as the source gives them."""
    model = source.skeleton()
    weights = source.weights(model)
    tensors = {name: weights.tensor(name) for name, _ in model.named_parameters()}
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    assert not any(p.is_meta for p in model.parameters())
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_function_is_unchanged(kind: str, tmp_path: Path) -> None:
    config = CONFIGS[kind]()
    model = make_model(config)
    source = open_source(str(save(model, tmp_path / "in")))
    wide = padded(source, 64)
    assert wide.widths == (72, 128) and wide.config.intermediate_size == 128
    assert source.config.intermediate_size == 72
    found = dense(wide)
    assert error(logits(found), logits(model)) < 1e-6
    shapes = {name: p.shape for name, p in found.named_parameters()}
    changed = [n for n, p in model.named_parameters() if p.shape != shapes[n]]
    assert changed and all(".mlp." in name for name in changed)
    for name, parameter in model.named_parameters():  # nothing but zeros was added
        assert found.get_parameter(name).count_nonzero() == parameter.count_nonzero()


def test_zeros_are_where_they_belong(odd: Path) -> None:
    wide = padded(open_source(str(odd)), 64)
    weights, stored = wide.weights(wide.skeleton()), stored_tensors(odd)
    for leaf, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        name = f"model.layers.1.mlp.{leaf}.weight"
        tensor, shape = weights.tensor(name), [64, 64]
        shape[dim] = 128
        assert list(tensor.shape) == shape == list(weights.shape(name))
        assert weights.nbytes(name) == tensor.nbytes
        kept, zeros = tensor.split([72, 56], dim)
        assert torch.equal(kept, stored[name]) and not zeros.any()
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(weights.tensor(name), stored[name])
    assert weights.nbytes(name) == stored[name].nbytes


@pytest.mark.parametrize(
    ("method", "effort", "format"),
    [("awq", "fast", "awq"), ("awq", "balanced", "compressed-tensors"), ("gptq", "fast", "awq")],
)
def test_quantized(
    odd: Path, text_file: Path, tmp_path: Path, method: str, effort: str, format: str
) -> None:
    out = tmp_path / "out"
    report = salience.quantize(
        str(odd),
        out,
        method=method,
        effort=effort,
        format=format,
        scheme="w4g64",
        calibration=Calibration(str(text_file), samples=2, seqlen=32),
        pad_intermediate=64,
    )
    assert config_of(out)["intermediate_size"] == 128
    assert report.options["intermediate_size"] == [72, 128]
    assert report.error <= report.error_rtn
    for tensor in stored_tensors(out).values():
        assert not tensor.is_floating_point() or torch.isfinite(tensor).all()
    for name, qt in qtensors(out).items():
        if name.endswith(("gate_proj", "up_proj")):
            assert not qt.dequantize()[72:].any()
    plain = AutoModelForCausalLM.from_config(open_source(str(out)).config, dtype=torch.float32)
    plain.load_state_dict(dequantized(out))
    loaded = salience.load(out, kernel="reference")
    assert error(logits(loaded), logits(plain.eval())) < 1e-5


def test_an_interrupted_run_needs_the_same_width(odd: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    def run(**more: Any) -> None:
        salience.quantize(str(odd), out, method="rtn", scheme="w4g8", **more)

    with pytest.raises(KeyboardInterrupt):
        run(pad_intermediate=64, on_block=stop)
    refuse(lambda: run(), "--pad-intermediate")
    run(pad_intermediate=64)
    salience.quantize(
        str(odd), tmp_path / "whole", method="rtn", scheme="w4g8", pad_intermediate=64
    )
    same_files(out, tmp_path / "whole")


def test_what_is_even_already_stays(odd: Path, tmp_path: Path) -> None:
    source = open_source(str(odd))
    assert pad(source, 24, CPU) == (source, None)
    for name, more in (("with", {"pad_intermediate": 24}), ("without", {})):
        salience.quantize(str(odd), tmp_path / name, method="rtn", scheme="w4g8", **more)  # type: ignore[arg-type]
    same_files(tmp_path / "with", tmp_path / "without")


def test_gguf(tmp_path: Path) -> None:
    """Under a GGUF file's names, too."""
    model = make_model(llama_config(intermediate_size=96, num_hidden_layers=1))
    path = tmp_path / "in.gguf"
    write_gguf(model, path)
    source = open_source(str(path))
    found = dense(padded(source, 64))
    assert found.get_parameter("model.layers.0.mlp.down_proj.weight").shape == (64, 128)
    assert error(logits(found), logits(dense(source))) < 1e-6
    assert padded(source, 64).config_values()["intermediate_size"] == 128


def test_the_width_of_a_text_model_within_another(tmp_path: Path) -> None:
    """It is in text_config, and there it is changed."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    text = {**SIZES, "head_dim": 16, "layer_types": ["full_attention"] * 2}
    model = make_model(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))
    source = save(model, tmp_path / "in")
    salience.quantize(
        str(source), tmp_path / "out", method="rtn", scheme="w4g64", pad_intermediate=64
    )
    config = config_of(tmp_path / "out")
    assert config["text_config"]["intermediate_size"] == 128
    assert config["vision_config"]["intermediate_size"] == 40
    assert "intermediate_size" not in config
    found = logits(salience.load(tmp_path / "out", kernel="reference"))
    assert error(found, logits(model)) < 0.9


# What cannot be padded.


def refused(source: Path | str, *words: str, multiple: int = 64) -> None:
    refuse(lambda: pad(open_source(str(source)), multiple, CPU), "--pad-intermediate", *words)


def test_without_that_width(tmp_path: Path) -> None:
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=72,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    refused(save(make_model(config), tmp_path / "in"), "has no intermediate_size")


def test_zero_is_no_multiple(odd: Path) -> None:
    refused(odd, "0 is no width", multiple=0)


def test_experts_are_refused(tmp_path: Path) -> None:
    from tiny_architectures import architecture

    config = architecture("mixtral")
    config.intermediate_size = 72
    refused(save(make_model(config), tmp_path / "in"), "experts", "no linear to pad")


def test_a_quantized_model_is_refused(odd: Path, tmp_path: Path) -> None:
    salience.quantize(str(odd), tmp_path / "q", method="rtn", scheme="w4g8")
    refuse(lambda: pad(open_source(str(tmp_path / "q")), 64, CPU), "is quantized already")


def test_what_changes_the_result_is_refused(
    odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros in other places than the weights': the proof is by running, and sees it."""
    good = torch.cat

    def shifted(tensors: Any, dim: int = 0) -> Tensor:
        parts = list(tensors)
        # The zeros of the wide tensors go first, but those of `down_proj`.
        first = len(parts) == 2 and not parts[1].any() and parts[1].shape[dim] == 56 and dim == 1
        return good(parts[::-1] if first else parts, dim)

    monkeypatch.setattr("salience.pipeline.padding.torch.cat", shifted)
    refused(odd, "zeros change what model.layers.0 computes")


def test_a_norm_between_is_refused(tmp_path: Path) -> None:
    """Zeros would count in its mean."""
    from transformers import BitNetConfig

    refused(save(make_model(BitNetConfig(**SIZES)), tmp_path / "in"), "ffn_sub_norm", "no linear")


def test_a_missing_tensor(odd: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(odd, tmp_path / "in"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refuse(
        lambda: pad(open_source(str(folder)), 64, CPU),
        "model.layers.0.mlp.up_proj.weight is missing",
    )
    config = json.loads((folder / "config.json").read_text())
    assert config["intermediate_size"] == 72  # the source is never written to
