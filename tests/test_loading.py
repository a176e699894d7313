"""load(): the model that Transformers makes, packed weights only, errors that name the tensor."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaModel, Qwen2Config

import salience
from helpers_checkpoint import qtensors
from salience import grid
from salience.calibration import Calibration
from salience.errors import SalienceError
from salience.formats import get_format
from salience.inspection import inspect
from salience.linear import QuantLinear
from salience.loading import resolve_device
from salience.placement import default_device
from salience.scheme import Scheme
from salience.source import open_source
from tiny_architectures import architecture
from tiny_models import (
    VOCABULARY,
    error,
    llama_config,
    logits,
    make_model,
    random_tokens,
    save,
)

QWEN2 = Qwen2Config(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    eos_token_id=0,
)
# sqrt(96) is no bf16 number: a buffer computed in the wrong dtype shows.
GEMMA3 = Gemma3TextConfig(
    vocab_size=VOCABULARY,
    hidden_size=96,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    sliding_window=8,
    layer_types=["sliding_attention", "full_attention"],
    eos_token_id=0,
    pad_token_id=None,
)
CONFIGS = {"llama": llama_config(), "qwen2 (tied, biases)": QWEN2, "gemma3": GEMMA3}


@pytest.fixture(scope="module")
def calibration(text_file: Path) -> Calibration:
    return Calibration(str(text_file), samples=2, seqlen=64)


@pytest.fixture(scope="module")
def quantized(
    llama: Path, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("load") / "out"
    salience.quantize(str(llama), out, scheme="w4g32", calibration=calibration)
    return out


@pytest.fixture(scope="module")
def quantized_qwen2(calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen2")
    save(make_model(QWEN2), folder / "in")
    salience.quantize(str(folder / "in"), folder / "out", scheme="w4g32", calibration=calibration)
    return folder / "out"


def edited(folder: Path, out: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a checkpoint with its tensors changed."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_equals_transformers(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save(make_model(CONFIGS[name]).bfloat16(), tmp_path / "in")
    ours = salience.load(tmp_path / "in", dtype=dtype)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype=dtype).eval()
    assert torch.equal(logits(ours), logits(theirs))
    assert not ours.training and ours.dtype == dtype
    assert all(not p.requires_grad and p.device.type == "cpu" for p in ours.parameters())
    state = theirs.state_dict()
    assert ours.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())


def test_default_dtype_on_a_cpu_is_fp32(tmp_path: Path) -> None:
    save(make_model(llama_config()).half(), tmp_path / "in")
    model = salience.load(tmp_path / "in")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.dtype == torch.float32


def test_tied_and_untied_heads(llama: Path, quantized: Path, quantized_qwen2: Path) -> None:
    for folder, tied in ((llama, False), (quantized, False), (quantized_qwen2, True)):
        model = salience.load(folder)
        same = model.lm_head.weight is model.get_input_embeddings().weight
        assert same == tied
        assert not model.lm_head.weight.is_meta
        assert isinstance(model.lm_head, nn.Linear)


def test_sharded(tmp_path: Path) -> None:
    model = make_model(llama_config())
    save(model, tmp_path / "in", max_shard_size="100KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 2
    assert torch.equal(logits(salience.load(tmp_path / "in")), logits(model))


def test_names_without_the_prefix(tmp_path: Path) -> None:
    """A checkpoint saved from the bare decoder, its head tied."""
    model = make_model(llama_config(tie_word_embeddings=True))
    bare = LlamaModel(model.config)
    bare.load_state_dict(model.model.state_dict())
    save(bare, tmp_path / "in")
    assert "norm.weight" in load_file(tmp_path / "in" / "model.safetensors")
    assert torch.equal(logits(salience.load(tmp_path / "in")), logits(model))


def test_biases_of_quantized_linears(quantized_qwen2: Path, tmp_path: Path) -> None:
    model = salience.load(quantized_qwen2)
    stored = load_file(quantized_qwen2 / "model.safetensors")
    layer = model.model.layers[1].self_attn.q_proj
    assert isinstance(layer, QuantLinear)
    name = "model.layers.1.self_attn.q_proj.bias"
    assert torch.equal(layer.bias.float(), stored[name].float()) and layer.bias.any()
    assert model.model.layers[1].self_attn.o_proj.bias is None
    silent = edited(quantized_qwen2, tmp_path / "out", lambda t: t[name].zero_())
    assert error(logits(salience.load(silent)), logits(model)) > 1e-3


def test_holds_packed_weights_only(quantized: Path) -> None:
    model = salience.load(quantized, kernel="reference")
    packed = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert len(packed) == 21
    for module in packed.values():
        rows, columns = module.out_features, module.in_features
        held = sum(buffer.nbytes for buffer in module.buffers())
        assert held == rows * columns // 2 + rows * (columns // 32) * (2 + 1)
        assert not list(module.parameters())
    assert {type(m) for m in model.model.layers.modules()}.isdisjoint({nn.Linear})
    floats = {name for name, _ in model.named_parameters()}
    assert floats == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} | {
        f"model.layers.{i}.{norm}.weight"
        for i in range(3)
        for norm in ("input_layernorm", "post_attention_layernorm")
    }


def test_kernels(quantized: Path) -> None:
    few = random_tokens(1, 8)  # so few that the kernel computes in bf16, which shows
    exact = logits(salience.load(quantized, kernel="reference"), few)
    for kernel in ("auto", "cpu_int4"):
        model = salience.load(quantized, kernel=kernel)
        assert {m.kernel for m in model.modules() if isinstance(m, QuantLinear)} == {"cpu_int4"}
        assert 0 < error(logits(model, few), exact) < 5e-2
    with pytest.raises(SalienceError, match="there is no kernel 'marlin'"):
        salience.load(quantized, kernel="marlin")


def test_where_it_is_and_in_which_dtype(quantized: Path, device: torch.device) -> None:
    """fp32 on a CPU; on a GPU the checkpoint's own."""
    model = salience.load(quantized, device)
    assert {t.device.type for t in model.state_dict().values()} == {device.type}
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    assert {p.dtype for p in model.parameters()} == {model.dtype} == {dtype}
    assert error(logits(model), logits(salience.load(quantized, kernel="reference"))) < 5e-2


def test_dtype_of_quantized(quantized: Path, device: torch.device) -> None:
    model = salience.load(quantized, device, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    found = logits(model)
    assert found.dtype == torch.bfloat16
    assert error(found, logits(salience.load(quantized))) < 0.1


def test_generation_config(quantized: Path, tmp_path: Path) -> None:
    shutil.copytree(quantized, tmp_path / "out")
    path = tmp_path / "out" / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [0, 7], "temperature": 0.25, "do_sample": True}))
    config = salience.load(tmp_path / "out").generation_config
    assert (config.eos_token_id, config.temperature) == ([0, 7], 0.25)
    path.unlink()
    assert salience.load(tmp_path / "out").generation_config.eos_token_id == 0


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"tensor model\.norm\.weight is missing"),
        (lambda t: t.pop("lm_head.weight"), r"tensor lm_head\.weight is missing"),
        (lambda t: t.pop(f"{UP}.qzeros"), rf"linear {UP} .*: tensor qzeros is missing"),
        (
            lambda t: [t.pop(f"{UP}.{part}") for part in ("qweight", "qzeros", "scales")],
            rf"tensor {UP}\.weight is missing",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(32)}),
            r"tensor model\.norm\.weight of .* is \[32\], the model wants \[64\]",
        ),
        (
            lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"][:1].clone()}),
            rf"linear {UP} of .*: scales must be \[128, 2\], not \[128, 1\]",
        ),
        (
            lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"].float()}),
            rf"linear {UP} of .*int32",
        ),
        (
            lambda t: t.update(
                {f"{UP}.{p}": t[f"{UP.replace('up', 'down')}.{p}"].clone()
                 for p in ("qweight", "qzeros", "scales")}
            ),
            rf"linear {UP} of .* holds \[64, 128\], the model wants \[128, 64\]",
        ),
        (
            lambda t: t.update({"model.layers.9.mlp.up_proj.qweight": t[f"{UP}.qweight"].clone()}),
            r"tensor model\.layers\.9\.mlp\.up_proj\.qweight of .* belongs to no linear",
        ),
    ],
)  # fmt: skip
def test_damaged_checkpoints(
    change: Callable[[dict[str, Tensor]], object], message: str, quantized: Path, tmp_path: Path
) -> None:
    broken = edited(quantized, tmp_path / "broken", change)
    with pytest.raises(SalienceError, match=message):
        salience.load(broken)


def test_missing_bias(quantized_qwen2: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.bias"
    broken = edited(quantized_qwen2, tmp_path / "broken", lambda t: t.pop(name))
    with pytest.raises(SalienceError, match=f"tensor {name} is missing"):
        salience.load(broken)


def test_bias_of_the_wrong_shape(quantized_qwen2: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.bias"
    broken = edited(
        quantized_qwen2, tmp_path / "broken", lambda t: t.update({name: torch.ones(1).half()})
    )
    with pytest.raises(SalienceError, match=rf"tensor {name} of .* is \[1\], .* \[32\]"):
        salience.load(broken)


def test_formats_that_are_not_read(quantized: Path, tmp_path: Path) -> None:
    shutil.copytree(quantized, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    config["quantization_config"]["version"] = "marlin"
    path.write_text(json.dumps(config))
    with pytest.raises(SalienceError, match=r"'marlin'.* is not one this version reads"):
        salience.load(tmp_path / "out")


def test_resolve_device(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_device(device) == device == resolve_device(str(device))
    assert resolve_device("auto") == torch.device("cpu")  # in all of these tests
    monkeypatch.setattr("salience.placement.default_device", lambda: device)
    assert resolve_device("auto") == device
    with pytest.raises(SalienceError, match=r"device cuda:99 is not on this machine; use cpu"):
        resolve_device("cuda:99")
    with pytest.raises(SalienceError, match="not understood"):
        resolve_device("chip")


def test_the_default_is_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert default_device().type == ("cuda" if there else "cpu")


def test_the_public_name_stays_a_function(llama: Path) -> None:
    """A submodule of the same name would take its place once it is imported."""
    assert callable(salience.load) and callable(salience.load)
    salience.load(llama)
    assert callable(salience.load)


@pytest.fixture(scope="module", params=["w4g32", "w3g32-sym", "w5channel"])
def compressed(
    llama: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("compressed") / "out"
    salience.quantize(
        str(llama), out, method="rtn", scheme=request.param, format="compressed-tensors"
    )
    return out


def test_compressed_tensors(compressed: Path, llama: Path) -> None:
    """Each linear has the codes of its float weight, with zeros stored or not."""
    model, floats = (
        salience.load(compressed, kernel="reference"),
        load_file(next(llama.glob("*.s*"))),
    )
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            qt = grid.quantize(floats[f"{name}.weight"], module.scheme)
            x = torch.eye(qt.in_features)
            assert error(module(x).T, qt.dequantize()) < 1e-6
    found = inspect(open_source(str(compressed)))
    assert (found.format, found.kept) == ("compressed-tensors", ["lm_head"])
    assert found.scheme == str(model.model.layers[0].mlp.up_proj.scheme)
    assert len(found.modules) == 21


def test_a_scheme_for_each_linear(compressed: Path, llama: Path, tmp_path: Path) -> None:
    """Also for the head."""
    floats = load_file(next(llama.glob("*.s*")))
    schemes = {"model.layers.1.mlp.down_proj": "w8g64-sym", "lm_head": "w6g32"}
    form = get_format("compressed-tensors")

    def change(tensors: dict[str, Tensor]) -> None:
        tensors.pop("lm_head.weight")
        for name, scheme in schemes.items():
            for part in form.tensors:
                tensors.pop(f"{name}.{part}", None)
            written = form.write(grid.quantize(floats[f"{name}.weight"], Scheme.parse(scheme)))
            tensors.update({f"{name}.{part}": tensor for part, tensor in written.items()})

    out = edited(compressed, tmp_path / "out", change)
    config = json.loads((out / "config.json").read_text())
    of_all = {m.name: m.scheme for m in inspect(open_source(str(compressed))).modules} | schemes
    parsed = {name: Scheme.parse(scheme) for name, scheme in of_all.items()}
    # As older tools named it.
    config["compression_config"] = form.config(parsed, [])
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    found = inspect(open_source(str(out)))
    assert {module.name: module.scheme for module in found.modules} == of_all
    assert (found.scheme, found.kept) == (None, [])
    model = salience.load(out, kernel="reference")
    head = grid.quantize(floats["lm_head.weight"], Scheme.parse("w6g32"))
    assert error(model.lm_head(torch.eye(64)).T, head.dequantize()) < 1e-6
    assert torch.isfinite(logits(model)).all()
    # The config that does not say so is refused.
    del parsed["lm_head"]
    config["compression_config"] = form.config(parsed, ["lm_head"])
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(SalienceError, match=r"linear lm_head of .*: .* ignores it"):
        salience.load(out)


@pytest.mark.parametrize("scheme", ["nf4", "nf4-dq"])
def test_nf4(llama: Path, tmp_path: Path, scheme: str) -> None:
    """bitsandbytes keeps the name of the float weight; the head, which has one, stays float."""
    out, floats = tmp_path / "out", load_file(next(llama.glob("*.s*")))
    salience.quantize(str(llama), out, method="nf4", scheme=scheme, format="bitsandbytes")
    model = salience.load(out)
    found = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert len(found) == 21 and {module.kernel for module in found.values()} == {"codebook"}
    for name, module in found.items():
        qt = grid.quantize(floats[f"{name}.weight"], Scheme.parse(scheme))
        assert error(module(torch.eye(qt.in_features)).T, qt.dequantize()) < 1e-6
    assert torch.isfinite(logits(model)).all()
    seen = inspect(open_source(str(out)))
    assert (seen.format, seen.scheme, seen.kept) == ("bitsandbytes", scheme, ["lm_head"])
    # What is stored beside the codes and scales: a table or two, and a few words of JSON.
    weights = sum(floats[f"{name}.weight"].numel() for name in found)
    extra = 8 * 21 * (4 * 16 + 200 + (4 * 256 if scheme == "nf4-dq" else 0)) / weights
    bits = Scheme.parse(scheme).bits_per_weight(64)
    assert bits < seen.bits_per_weight < bits + extra


def test_nf4_tensors(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    salience.quantize(str(llama), out, method="nf4", scheme="nf4", format="bitsandbytes")
    name = "model.layers.1.mlp.up_proj"
    bad = edited(out, tmp_path / "a", lambda tensors: tensors.pop(f"{name}.weight.absmax"))
    with pytest.raises(
        SalienceError, match=f"linear {name} of .*: tensor weight.absmax is missing"
    ):
        salience.load(bad)

    def stray(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight.absmax"] = torch.zeros(1)

    with pytest.raises(SalienceError, match=r"tensor model.norm.weight.absmax of .* no linear"):
        salience.load(edited(out, tmp_path / "b", stray))


@pytest.mark.parametrize(
    ("method", "scheme", "format", "match"),
    [
        ("nf4", "nf4", "awq", "not nf4 as .* wants; .*--format bitsandbytes"),
        ("nf4", "nf4", "compressed-tensors", "use --format bitsandbytes"),
        ("rtn", "w4g64", "bitsandbytes", "use --method nf4 --scheme nf4"),
        ("rtn", "nf4", "bitsandbytes", "--method rtn makes no nf4; use --method nf4"),
        ("nf4", "w4g64", "awq", "--method nf4 makes no w4g64; use --scheme nf4 or nf4-dq"),
    ],
)
def test_codebooks_and_the_rest_do_not_mix(
    llama: Path, tmp_path: Path, method: str, scheme: str, format: str, match: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SalienceError, match=match):
        salience.quantize(str(llama), out, method=method, scheme=scheme, format=format)
    assert not out.exists()


def rounded(folder: Path, out: Path, rules: dict[str, str] | None = None) -> Path:
    """To nearest, with head and embeddings if a rule says so."""
    salience.quantize(
        str(folder),
        out,
        method="rtn",
        scheme="w4g32",
        format="compressed-tensors",
        rules=list((rules or {}).items()),
    )
    return out


def configured(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "keep", [["up_proj"], [r"layers\.0\.", "lm_head"], ["embed_tokens"], ["."]], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keep(llama: Path, tmp_path: Path, keep: list[str], dtype: torch.dtype) -> None:
    """Float modules with the weights that the codes stand for, so the same logits."""
    out = rounded(llama, tmp_path / "out", {"lm_head|embed_tokens": "w8g32"})
    plain = salience.load(out, kernel="reference", dtype=dtype)
    model = salience.load(out, kernel="reference", dtype=dtype, keep=keep)
    coded = qtensors(out)
    chosen = {name for name in coded if any(re.search(each, name) for each in keep)}
    assert chosen
    for name, qt in coded.items():
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear | nn.Embedding) == (name in chosen)
        if name in chosen:
            assert torch.equal(module.weight, qt.dequantize(dtype))
    assert error(logits(model), logits(plain)) < (1e-5 if dtype == torch.float32 else 3e-2)


def test_keep_of_a_transposed_linear_with_a_bias(tmp_path: Path) -> None:
    folder = save(make_model(architecture("gpt2")), tmp_path / "in")
    out = rounded(folder, tmp_path / "out")
    model = salience.load(out, keep=["c_fc", "c_attn"])
    assert type(model.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"
    assert isinstance(model.transformer.h[0].mlp.c_proj, QuantLinear)
    assert error(logits(model), logits(salience.load(out, kernel="reference"))) < 2e-2
    kept = salience.load(out, kernel="reference", keep=["c_fc", "c_attn"])
    assert error(logits(kept), logits(salience.load(out, kernel="reference"))) < 1e-5


def test_wrong_keep(quantized: Path) -> None:
    with pytest.raises(SalienceError, match=r"keep 'gate_up' matches no quantized linear of"):
        salience.load(quantized, keep=["up_proj", "gate_up"])
    with pytest.raises(SalienceError, match=r"keep '\(' is no regular expression"):
        salience.load(quantized, keep=["("])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", ["reference", "cpu_int4"])
@pytest.mark.parametrize("tokens", [1, 40, 100])
def test_linears_in_half_precision(
    quantized: Path, dtype: torch.dtype, kernel: str, tokens: int
) -> None:
    """With fp16 scales, as stored, against fp64; few tokens and many take different ways."""
    model, coded = salience.load(quantized, dtype=dtype, kernel=kernel), qtensors(quantized)
    random = torch.Generator().manual_seed(tokens)
    # Weights, or s and z, and the sum are rounded to the bits that the dtype has.
    tolerance = 1e-2 if dtype == torch.bfloat16 or kernel == "cpu_int4" else 1.5e-3
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        qt, module = coded[name], model.get_submodule(name)
        assert (module.kernel, module.weight.dtype) == (kernel, dtype)
        x = torch.randn(tokens, qt.in_features, generator=random).to(dtype)
        found, want = module(x), x.double() @ qt.dequantize(torch.float64).T
        assert found.dtype == dtype
        assert error(found, want) < tolerance


@pytest.mark.parametrize("scheme", ["nf4", "nf4-dq"])
def test_codebooks_in_half_precision(llama: Path, tmp_path: Path, scheme: str) -> None:
    out = tmp_path / "out"
    salience.quantize(str(llama), out, method="nf4", scheme=scheme, format="bitsandbytes")
    coded = qtensors(out)
    for dtype, tolerance in ((torch.float16, 1.5e-3), (torch.bfloat16, 1e-2)):
        module = salience.load(out, dtype=dtype).model.layers[1].mlp.down_proj
        qt = coded["model.layers.1.mlp.down_proj"]
        x = torch.randn(5, qt.in_features).to(dtype)
        assert error(module(x), x.double() @ qt.dequantize().double().T) < tolerance


def test_the_file_may_change_once_it_is_loaded(llama: Path, tmp_path: Path) -> None:
    """No tensor of the model is a view of it."""
    shutil.copytree(llama, tmp_path / "in")
    model = salience.load(tmp_path / "in")
    before = logits(model)
    with open(tmp_path / "in" / "model.safetensors", "r+b") as file:
        file.seek(20_000)
        file.write(bytes(400_000))
    assert torch.equal(logits(model), before)
    with open("/proc/self/maps") as maps:
        assert str(tmp_path) not in maps.read()


@pytest.mark.parametrize("stored", ["neither", "head", "both"])
def test_tied_float_heads(stored: str, tmp_path: Path) -> None:
    """The head is stored, or only it, or neither's own: all say the same here."""
    model = make_model(llama_config(tie_word_embeddings=True))
    save(model, tmp_path / "in")

    def change(tensors: dict[str, Tensor]) -> None:
        embeddings = tensors["model.embed_tokens.weight"]
        if stored != "neither":
            tensors["lm_head.weight"] = embeddings.clone()
        if stored == "head":
            del tensors["model.embed_tokens.weight"]

    found = salience.load(edited(tmp_path / "in", tmp_path / "out", change))
    assert found.lm_head.weight is found.get_input_embeddings().weight
    assert torch.equal(logits(found), logits(model))


def test_tied_by_the_config_but_stored_with_different_values(tmp_path: Path) -> None:
    """Two weights then, as Transformers has it; also when it is asked to tie them again."""
    folder = save(make_model(llama_config()), tmp_path / "in")
    plain = logits(salience.load(folder))
    model = salience.load(configured(folder, tie_word_embeddings=True))
    assert torch.equal(logits(model), plain)
    model.tie_weights()
    assert torch.equal(logits(model), plain) and not model.config.tie_word_embeddings
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert torch.equal(logits(theirs), plain)


def test_packed_head_of_a_model_that_ties(llama: Path, tmp_path: Path) -> None:
    """Codes for the head, a float weight for the embeddings, and a config that ties them."""
    out = rounded(llama, tmp_path / "out", {"lm_head": "w8g32"})
    plain = logits(salience.load(out))
    model = salience.load(configured(out, tie_word_embeddings=True))
    assert isinstance(model.lm_head, QuantLinear)
    model.tie_weights()
    assert isinstance(model.lm_head, QuantLinear) and torch.equal(logits(model), plain)


@pytest.mark.parametrize("owner", ["model.embed_tokens", "lm_head"])
def test_head_tied_to_packed_embeddings(owner: str, llama: Path, tmp_path: Path) -> None:
    """The codes of one are those of both."""
    other = {"model.embed_tokens": "lm_head", "lm_head": "model.embed_tokens"}[owner]
    out = rounded(llama, tmp_path / "out", {owner: "w8g32"})
    tied = edited(out, tmp_path / "tied", lambda tensors: tensors.pop(f"{other}.weight"))
    model = salience.load(configured(tied, tie_word_embeddings=True), kernel="reference")
    weight = qtensors(out)[owner].dequantize()
    assert error(model.lm_head(torch.eye(64)).T, weight) < 1e-6
    ids = torch.arange(VOCABULARY)
    assert torch.equal(model.get_input_embeddings()(ids), weight)
    model.tie_weights()
    assert torch.isfinite(logits(model)).all()
    kept = salience.load(tied, keep=["."])
    assert torch.equal(kept.lm_head.weight, weight)
    assert kept.lm_head.weight is kept.get_input_embeddings().weight


def test_untied_head_that_is_missing(llama: Path, tmp_path: Path) -> None:
    out = rounded(llama, tmp_path / "out", {"model.embed_tokens": "w8g32"})
    broken = edited(out, tmp_path / "broken", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(SalienceError, match=r"tensor lm_head\.weight is missing"):
        salience.load(broken)


@pytest.mark.parametrize(
    "listed",
    [
        ["model.layers.1.mlp.up_proj", "self_attn"],
        ["model"],
        None,
    ],
)
def test_what_a_config_lists_as_float_decides_nothing(
    quantized: Path, tmp_path: Path, listed: list[str] | None
) -> None:
    """The shard headers do: names lists of other tools mean different things to each."""
    shutil.copytree(quantized, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    config["quantization_config"]["modules_to_not_convert"] = listed
    path.write_text(json.dumps(config))
    assert torch.equal(logits(salience.load(tmp_path / "out")), logits(salience.load(quantized)))


def test_float_linear_that_no_list_names(llama: Path, quantized: Path, tmp_path: Path) -> None:
    weight = load_file(llama / "model.safetensors")[f"{UP}.weight"]

    def change(tensors: dict[str, Tensor]) -> None:
        for part in ("qweight", "qzeros", "scales"):
            del tensors[f"{UP}.{part}"]
        tensors[f"{UP}.weight"] = weight

    model = salience.load(edited(quantized, tmp_path / "out", change))
    assert type(model.get_submodule(UP)) is nn.Linear
    assert torch.equal(model.get_submodule(UP).weight, weight)


def test_stored_bias_that_the_model_lacks(quantized: Path, llama: Path, tmp_path: Path) -> None:
    """Of a packed and of a float linear. Zeros, which some tools store everywhere, do nothing."""
    for folder, name in ((quantized, UP), (llama, "lm_head")):
        rows = 128 if name == UP else VOCABULARY
        zeros = {f"{name}.bias": torch.zeros(rows)}
        out = edited(folder, tmp_path / f"zeros-{name}", lambda t, more=zeros: t.update(more))
        assert torch.equal(logits(salience.load(out)), logits(salience.load(folder)))
        ones = {f"{name}.bias": torch.ones(rows)}
        out = edited(folder, tmp_path / f"ones-{name}", lambda t, more=ones: t.update(more))
        with pytest.raises(
            SalienceError, match=rf"tensor {name}\.bias of .* has no place: .* has no bias; config"
        ):
            salience.load(out)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_float_weights_that_are_not_finite(quantized: Path, tmp_path: Path, value: float) -> None:
    for name in ("model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"):
        out = edited(quantized, tmp_path / name, lambda t, n=name: t[n].view(-1)[5:6].fill_(value))
        with pytest.raises(SalienceError, match=f"tensor {name} of .* has values that are not fin"):
            salience.load(out)


def test_tensors_that_transformers_ignores(tmp_path: Path) -> None:
    """DeepSeek-V3's extra block, which predicts a second token, is not part of the model."""
    folder = save(make_model(architecture("deepseek_v3")), tmp_path / "in")
    out = rounded(folder, tmp_path / "out")
    stored = load_file(out / "model.safetensors")
    packed = {n.replace("layers.0.", "layers.61."): t.clone() for n, t in stored.items()}
    more = edited(out, tmp_path / "more", lambda tensors: tensors.update(packed))
    assert len(load_file(more / "model.safetensors")) > len(stored)
    assert torch.equal(logits(salience.load(more)), logits(salience.load(out)))
