"""The 19 traps that checkpoints of low-bit weights are known for, and what becomes of each here.

Numbers are those of the list in the facts on formats (its section 9); each has been reported
against an upstream tool. A trap is closed in one of three ways: it is never written, it is read all
the same, or it is refused by name.
"""

import importlib
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, Gemma3Config, Phi3Config, Qwen2Config

import salience
from helpers_checkpoint import config_of, qtensors, refuse, stored_tensors
from salience.blocks.blockwise import run_block
from salience.calibration import Calibration
from salience.formats import AutoAwq, BitsAndBytes, CompressedTensors, detect_format, get_format
from salience.inspection import inspect
from salience.qtensor import QTensor
from salience.scheme import Scheme
from salience.serving import Served, findings
from salience.source import open_source
from salience.structure import apply_fold, discover_folds, find_blocks, sink_groups
from tiny_architectures import architecture
from tiny_models import (
    VOCABULARY,
    error,
    first_inputs,
    llama_config,
    logits,
    make_model,
    random_tokens,
    save,
)

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}


def random_qtensor(scheme: Scheme, rows: int = 32, columns: int = 128) -> QTensor:
    """Codes, scales and zeros of every value the scheme has."""
    generator = torch.Generator().manual_seed(1)
    groups, top = scheme.groups(columns), scheme.levels + 1

    def whole(*shape: int) -> Tensor:
        return torch.randint(top, shape, generator=generator).to(torch.uint8)

    middle = torch.full((rows, groups), top // 2, dtype=torch.uint8)
    zeros = middle if scheme.sym else whole(rows, groups)
    scales = (torch.rand(rows, groups, generator=generator) + 0.5).half()
    return QTensor(whole(rows, columns), scales, zeros, scheme)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def quick(source: Path, out: Path, scheme: str = "w4g32", **more: Any) -> dict[str, Any]:
    """Round to nearest; returns the quantization_config."""
    salience.quantize(str(source), out, method="rtn", scheme=scheme, **more)
    found: dict[str, Any] = config_of(out)["quantization_config"]
    return found


@pytest.fixture
def source(llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama, to be changed."""
    return Path(shutil.copytree(llama, tmp_path / "in"))


@pytest.fixture
def text(text_file: Path) -> Calibration:
    return Calibration(str(text_file), samples=2, seqlen=32)


def test_trap_01_inputs_no_multiple_of_the_group(tmp_path: Path) -> None:
    """Refused by name, on one GPU and on several; padded, it is written and computes the same."""
    model = make_model(llama_config(intermediate_size=96))
    folder = save(model, tmp_path / "in")
    line = refuse(lambda: quick(folder, tmp_path / "no", "w4g64"), "group size 64", "96 inputs")
    assert "mlp.down_proj" in line and "w4g32" in line
    refuse(
        lambda: quick(folder, tmp_path / "no", "w4g32", tensor_parallel=2),
        "down_proj: its 48 inputs on each of 2 GPUs",
        "--pad-intermediate 64",
    )
    assert not (tmp_path / "no").exists()
    quick(folder, tmp_path / "out", "w4g64", pad_intermediate=64)
    assert config_of(tmp_path / "out")["intermediate_size"] == 128
    assert qtensors(tmp_path / "out")["model.layers.0.mlp.down_proj"].in_features == 128


def test_trap_02_outputs_no_multiple_of_a_word(llama: Path, tmp_path: Path) -> None:
    """AWQ's words refuse 12 outputs by name; narrow gates and heads stay float unasked."""
    shapes = {"a.b": (12, 64)}
    check = partial(AutoAwq().check, {"a.b": Scheme(4, 32)}, shapes)
    refuse(check, "a.b has 12")
    found = findings(Served("awq", {"a.b": Scheme(4, 32)}, shapes))
    assert {(f.runtime, f.severity) for f in found} == {("vllm", "refuse"), ("sglang", "refuse")}
    folder = save(make_model(architecture("qwen3_5_moe_text")), tmp_path / "in")
    config = quick(folder, tmp_path / "out", "w4g16")
    assert all(qt.out_features % 8 == 0 for qt in qtensors(tmp_path / "out").values())
    assert any(name.endswith("shared_expert_gate") for name in config["modules_to_not_convert"])


def test_trap_03_group_size_minus_one(tmp_path: Path) -> None:
    """Whole rows go into compressed-tensors as "channel"; in AWQ it is said who refuses them."""
    folder = save(make_model(llama_config(intermediate_size=64)), tmp_path / "in")
    config = quick(folder, tmp_path / "ct", "w4channel", format="compressed-tensors")
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights["strategy"], weights["group_size"]) == ("channel", None)
    report = salience.quantize(str(folder), tmp_path / "awq", method="rtn", scheme="w4channel")
    refused = {f["runtime"] for f in report.serving if "group size -1" in f["problem"]}
    assert refused == {"sglang"}
    # Read as one group a row, whatever the width.
    for qt in (*qtensors(tmp_path / "awq").values(), *qtensors(tmp_path / "ct").values()):
        assert qt.scales.shape == (qt.out_features, 1)
    assert AutoAwq().scheme({"bits": 4, "group_size": -1}, "a") == Scheme(4, -1)


def test_trap_04_symmetric_awq_has_zeros(llama: Path, tmp_path: Path) -> None:
    """zero_point stays true and every zero is 8, for there is no reader that needs neither."""
    config = quick(llama, tmp_path / "out", "w4g32-sym")
    assert config["zero_point"] is True
    stored = stored_tensors(tmp_path / "out")
    words = [tensor for name, tensor in stored.items() if name.endswith(".qzeros")]
    assert len(words) == 21 and all((word == -0x77777778).all() for word in words)  # 0x88888888


def test_trap_05_layouts_that_others_cannot_read(llama: Path, tmp_path: Path) -> None:
    """Only gemm is written; marlin is refused, and of gemv it is said that no runtime reads it."""
    assert quick(llama, tmp_path / "out")["version"] == "gemm"
    refuse(lambda: detect_format({"quant_method": "awq", "version": "marlin", "bits": 4}), "marlin")
    refuse(lambda: get_format("gemv"), "gemv")
    for name in ("awq-gemv", "awq-gemv-fast", "llm-awq"):
        found = findings(Served(name, {"a.b": Scheme()}, {"a.b": (128, 128)}))
        assert {(f.runtime, f.severity) for f in found} == {
            ("vllm", "refuse"),
            ("sglang", "refuse"),
        }


def test_trap_06_gptq_zeros_less_one() -> None:
    """Version 1 is written of symmetric weights only, and a mislabelled one is read by its value.

    Zeros of 0 come back from version 2, which is what asymmetric weights are written as.
    """
    module = pytest.importorskip("salience.formats.gptq")
    fmt = module.Gptq()
    sym, asym = random_qtensor(Scheme(4, 32, True)), random_qtensor(Scheme(4, 32))
    assert (asym.zeros == 0).any() and (asym.zeros == 15).any()
    stored, config = fmt.write(sym), fmt.config({"a": sym.scheme}, [])
    assert config["checkpoint_format"] == "gptq" and (stored["qzeros"] == 0x77777777).all()
    assert detect_format(config).read(stored, sym.scheme).zeros.eq(8).all()
    wrong = {**stored, "qzeros": torch.full_like(stored["qzeros"], -0x77777778)}  # 8, as if v2
    assert detect_format(config).read(wrong, sym.scheme).zeros.eq(8).all()
    stored, config = fmt.write(asym), fmt.config({"a": asym.scheme}, [])
    assert config["checkpoint_format"] == "gptq_v2"
    assert torch.equal(detect_format(config).read(stored, asym.scheme).zeros, asym.zeros)


def test_trap_07_activation_order_is_not_the_default(
    llama: Path, text: Calibration, tmp_path: Path
) -> None:
    """GPTQ visits columns by importance, but groups lie in column order unless asked for."""
    salience.quantize(
        str(llama),
        tmp_path / "ct",
        method="gptq",
        scheme="w4g32",
        format="compressed-tensors",
        calibration=text,
    )
    assert not any(name.endswith("g_idx") for name in stored_tensors(tmp_path / "ct"))
    [group] = config_of(tmp_path / "ct")["quantization_config"]["config_groups"].values()
    assert group["weights"].get("actorder") is None
    shapes = {"a.down_proj": (128, 256)}
    ordered = Served("gptq", {"a.down_proj": Scheme(4, 64)}, shapes, act_order=True)
    said = {f.severity for f in findings(ordered, 2) if "activation order" in f.problem}
    assert said == {"refuse"} and not any("order" in f.problem for f in findings(ordered, 1))


def test_trap_07_gptq_says_so() -> None:
    module = pytest.importorskip("salience.formats.gptq")
    assert module.Gptq().config({"a": Scheme(4, 32, True)}, [])["desc_act"] is False


def test_trap_08_what_fp16_cannot_hold(source: Path, tmp_path: Path) -> None:
    """A weight above 65504 is refused by name; what is written is finite and says it is fp16."""
    quick(source, tmp_path / "good")
    assert config_of(tmp_path / "good")["dtype"] == "float16"
    for name, tensor in stored_tensors(tmp_path / "good").items():
        assert tensor.dtype in (torch.int32, torch.float16), name
        assert not tensor.is_floating_point() or torch.isfinite(tensor).all(), name
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = 1e5
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    refuse(
        lambda: quick(source, tmp_path / "bad"),
        "model.layers.1.input_layernorm.weight overflows fp16",
    )
    assert not (tmp_path / "bad").exists()
    # Served as bf16, scales are rounded; AutoAWQ's own kernel has no bf16 at all.
    for columns, severity in ((256, "warn"), (192, "refuse")):
        shapes = {"a.b": (128, columns)}
        found = findings(Served("awq", {"a.b": Scheme(4, 64)}, shapes, dtype="bfloat16"))
        assert {f.severity for f in found} == {severity}


def test_trap_09_nothing_to_search(source: Path, text: Calibration, tmp_path: Path) -> None:
    """Weights of zeros, and channels that are never on, have finite scales; NaN is refused."""
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].zero_()  # so that down's inputs are 0
    tensors["model.layers.1.input_layernorm.weight"][:40] = 0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    for method in ("awq", "gptq"):
        out = tmp_path / method
        report = salience.quantize(
            str(source), out, method=method, scheme="w4g32", calibration=text
        )
        assert all(0 <= linear.error <= linear.error_rtn for linear in report.linears)
        for name, qt in qtensors(out).items():
            assert torch.isfinite(qt.dequantize()).all(), name
        assert torch.isfinite(logits(salience.load(out, kernel="reference"))).all()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    refuse(
        lambda: salience.quantize(str(source), tmp_path / "no", scheme="w4g32", calibration=text),
        "model.layers.1.mlp.up_proj.weight",
        "not finite",
    )


def test_trap_10_tied_heads(tmp_path: Path) -> None:
    """Stored once, as the embeddings, and float; a file that has it as the head is read, too."""
    model = make_model(llama_config(tie_word_embeddings=True))
    folder = save(model, tmp_path / "in")
    quick(folder, tmp_path / "out")
    stored = stored_tensors(tmp_path / "out")
    assert not any(name.startswith("lm_head") for name in stored)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True
    expected = logits(salience.load(tmp_path / "out", kernel="reference"))
    file = tmp_path / "out" / "model.safetensors"
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    save_file(stored, file, {"format": "pt"})
    assert torch.equal(logits(salience.load(tmp_path / "out", kernel="reference")), expected)
    # The same head a second time, quantized: what is packed is the head.
    qt = random_qtensor(Scheme(4, 32), VOCABULARY, 64)
    extra = {f"lm_head.{part}": tensor for part, tensor in AutoAwq().write(qt).items()}
    save_file(stored | extra, file, {"format": "pt"})
    loaded = salience.load(tmp_path / "out", kernel="reference")
    with torch.no_grad():
        hidden = loaded.model(input_ids=random_tokens(), use_cache=False).last_hidden_state
    assert error(logits(loaded), hidden @ qt.dequantize().T) < 1e-5


def test_trap_11_mixtures_of_experts(tmp_path: Path) -> None:
    """Router and experts stay float, one tensor an expert, by the names the source has."""
    folder = save(make_model(architecture("mixtral")), tmp_path / "in")
    before = stored_tensors(folder)
    experts = {name for name in before if ".experts." in name}
    assert experts and all("block_sparse_moe.experts." in name for name in experts)
    config = quick(folder, tmp_path / "out", "w4g16")
    after = stored_tensors(tmp_path / "out")
    routers = {name for name in before if name.endswith("block_sparse_moe.gate.weight")}
    assert routers
    for name in experts | routers:
        assert after[name].ndim == 2 and torch.equal(after[name], before[name].half())
    listed = config["modules_to_not_convert"]
    for name in routers:
        assert name.removesuffix(".weight") in listed
    found = inspect(open_source(str(tmp_path / "out"))).serving
    assert any("float experts" in each.problem for each in found)
    assert not any("skip list" in each.problem for each in found)


@pytest.mark.parametrize("skip", [r"layers\.1\..*v_proj", r"layers\.1\..*gate_proj"])
def test_trap_12_parts_of_a_fused_linear(llama: Path, tmp_path: Path, skip: str) -> None:
    """A pattern that parts q, k and v, or gate and up, is warned of, and on request refused."""
    report = salience.quantize(
        str(llama), tmp_path / "out", method="rtn", scheme="w4g32", skip=(skip,)
    )
    said = {f["linear"] for f in report.serving if "one linear there" in f["problem"]}
    assert len(said) == 1 and said.pop().startswith("model.layers.1.")
    refuse(
        lambda: quick(llama, tmp_path / "no", skip=(skip,), tensor_parallel=1),
        "model.layers.1.",
        "would be float",
    )
    # All of them together are no such case.
    report = salience.quantize(
        str(llama), tmp_path / "all", method="rtn", scheme="w4g32", skip=(r"layers\.1\.",)
    )
    assert not any("one linear there" in f["problem"] for f in report.serving)


@torch.no_grad()
def test_trap_13_fused_in_the_model_itself() -> None:
    """Of Phi-3's fused qkv only v's rows, the last, are divided for o; all heads agree on them."""
    model = make_model(Phi3Config(**SIZES)).requires_grad_(False)
    expected = logits(model)
    _, blocks = find_blocks(model)
    hidden, arguments = first_inputs(model, blocks)
    run = partial(run_block, blocks[0], hidden, arguments.of(0, 0))
    folds = discover_folds(blocks[0], run, sink_groups(blocks[0], run))
    [fold] = [each for each in folds if each.sinks == ("self_attn.o_proj",)]
    assert fold.prev == "self_attn.qkv_proj" and fold.rule == "rows"
    queries, keys = 64, 32
    assert sorted(set(fold.index.tolist())) == list(range(queries + keys, queries + 2 * keys))
    before = blocks[0].self_attn.qkv_proj.weight.clone()
    scales = torch.rand(int(fold.index.max()) + 1, generator=torch.Generator().manual_seed(2)) + 0.5
    apply_fold(blocks[0], fold, scales[fold.index])
    after = blocks[0].self_attn.qkv_proj.weight
    assert torch.equal(after[: queries + keys], before[: queries + keys])
    assert not torch.equal(after[queries + keys :], before[queries + keys :])
    assert error(logits(model), expected) < 1e-5


def test_trap_14_biases_only_where_there_are_some(llama: Path, tmp_path: Path) -> None:
    quick(llama, tmp_path / "none")
    assert not any(name.endswith(".bias") for name in stored_tensors(tmp_path / "none"))
    model = make_model(Qwen2Config(**SIZES))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_()
    folder = save(model, tmp_path / "in")
    quick(folder, tmp_path / "out")
    before, after = stored_tensors(folder), stored_tensors(tmp_path / "out")
    biases = {name for name in before if name.endswith(".bias")}
    assert {name.split(".")[-2] for name in biases} == {"q_proj", "k_proj", "v_proj"}
    assert {name for name in after if name.endswith(".bias")} == biases
    for name in biases:
        assert torch.equal(after[name], before[name].half())


def test_trap_15_models_that_see(tmp_path: Path) -> None:
    """The decoder's sizes are in text_config; the tower is listed by the names it is stored by."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    decoder = architecture("gemma3_text").to_dict()
    config = Gemma3Config(text_config=decoder, vision_config=vision, mm_tokens_per_image=4)
    model = make_model(config)
    folder = save(model, tmp_path / "in")
    skips = quick(folder, tmp_path / "out", "w4g16")["modules_to_not_convert"]
    stored = stored_tensors(tmp_path / "out")
    packed = {name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")}
    floats = {name.removesuffix(".weight") for name in stored if "vision_tower" in name}
    tower = {n for n in floats if n.endswith(("q_proj", "k_proj", "v_proj", "out_proj", "fc1"))}
    assert tower and tower <= set(skips)
    assert not any(entry in name for entry in skips for name in packed)
    assert error(logits(salience.load(tmp_path / "out", kernel="reference")), logits(model)) < 0.9
    assert "quantization_config" not in config_of(tmp_path / "out")["text_config"]


def test_trap_16_zeros_of_compressed_tensors() -> None:
    """There for asymmetric weights and not for others; missing ones are named."""
    fmt = CompressedTensors()
    asym, sym = random_qtensor(Scheme(4, 32)), random_qtensor(Scheme(4, 32, True))
    stored = fmt.write(asym)
    assert torch.equal(fmt.read(stored, asym.scheme).dequantize(), asym.dequantize())
    assert "weight_zero_point" not in fmt.write(sym)
    del stored["weight_zero_point"]
    refuse(lambda: fmt.read(stored, asym.scheme), "weight_zero_point is missing")
    # The same codes and zeros as AWQ's: nothing is rounded on the way between the two.
    other = AutoAwq().read(AutoAwq().write(asym), asym.scheme)
    for a, b in zip((asym.q, asym.scales, asym.zeros), (other.q, other.scales, other.zeros)):  # noqa: B905
        assert torch.equal(a, b)


def test_trap_17_bitsandbytes_on_several_gpus(llama: Path, tmp_path: Path) -> None:
    report = salience.quantize(str(llama), tmp_path / "out", method="nf4", tensor_parallel=2)
    assert {(f["severity"], f["runtime"]) for f in report.serving} == {
        ("warn", "vllm"),
        ("warn", "sglang"),
    }
    assert all("vllm#8434" in f["problem"] for f in report.serving)
    assert not inspect(open_source(str(tmp_path / "out"))).serving  # on one it is served
    refuse(partial(BitsAndBytes().check, {"a": Scheme()}, {"a": (64, 64)}), "holds nf4")


def test_trap_18_generation_config(source: Path, tmp_path: Path) -> None:
    """One that Transformers would not save is copied as it is; one that is missing is no error."""
    file = source / "generation_config.json"
    strange = json.dumps({"do_sample": False, "temperature": 0.3, "eos_token_id": 0})
    file.write_text(strange)
    quick(source, tmp_path / "out")
    assert (tmp_path / "out" / file.name).read_text() == strange
    tokens = random_tokens(1, 4)
    model = salience.load(tmp_path / "out", kernel="reference")
    assert model.generate(tokens, max_new_tokens=2, min_new_tokens=2).shape == (1, 6)
    file.unlink()
    quick(source, tmp_path / "without")
    assert not (tmp_path / "without" / file.name).exists()
    assert salience.load(tmp_path / "without").generate(tokens, max_new_tokens=1).shape[1] == 5
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    assert all(
        (tmp_path / "without" / name).read_bytes() == (source / name).read_bytes() for name in names
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "without").chat_template


@pytest.mark.parametrize("version", ["GEMM", "Gemm", None])
def test_trap_19_the_version_in_capitals(llama: Path, tmp_path: Path, version: str | None) -> None:
    """Written in lower case, read in any, and where it is missing."""
    out = tmp_path / "out"
    config = quick(llama, out)
    assert config["version"] == "gemm"
    expected = logits(salience.load(out, kernel="reference"))
    changed = {**config, "version": version}
    if version is None:
        del changed["version"]
    edit_json(out / "config.json", quantization_config=changed)
    assert torch.equal(logits(salience.load(out, kernel="reference")), expected)


def test_every_trap_has_its_test() -> None:
    names: dict[str, Callable[..., None]] = vars(importlib.import_module(__name__))
    found = {int(name.split("_")[2]) for name in names if name.startswith("test_trap_")}
    assert found == set(range(1, 20))
