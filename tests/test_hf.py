"""Transformers' own `from_pretrained` and `save_pretrained`, with our linears in them.

`benchmarks/hf_versions.py` runs this file with each version of Transformers that is supported.
"""

import copy
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    Qwen2Config,
    Qwen3MoeConfig,
    pipeline,
)
from transformers.quantizers import auto

import salience
from helpers_awq import repacked
from helpers_checkpoint import config_of, refuse
from salience import grid, hf
from salience.calibration import Calibration
from salience.errors import SalienceError
from salience.linear import QuantLinear
from salience.scheme import Scheme
from tiny_models import VOCABULARY, error, llama_config, logits, make_model, random_tokens, save

OTHERS = {"gptqmodel", "optimum", "awq", "autoawq", "bitsandbytes", "compressed_tensors"}
# Name of a checkpoint -> how it is made. Each kind of tensor that is stored is in one of them.
KINDS = {
    "awq": {"method": "rtn", "scheme": "w4g32", "format": "awq"},
    "gptq_v1": {"method": "rtn", "scheme": "w4g32-sym", "format": "gptq"},
    "gptq_v2_w3": {"method": "rtn", "scheme": "w3g32", "format": "gptq"},
    "gptq_act_order": {"method": "gptq", "scheme": "w4g32", "format": "gptq", "act_order": True},
    "ct_w3": {"method": "rtn", "scheme": "w3g32", "format": "compressed-tensors"},
    "ct_sym": {"method": "rtn", "scheme": "w4channel-sym", "format": "compressed-tensors"},
    "nf4": {"method": "nf4", "scheme": "nf4", "format": "bitsandbytes"},
    "nf4-dq": {"method": "nf4", "scheme": "nf4-dq", "format": "bitsandbytes"},
    "fp4": {"method": "nf4", "scheme": "fp4", "format": "bitsandbytes"},
    "int8": {"method": "rtn", "scheme": "w8channel-sym", "format": "bitsandbytes-int8"},
}
MODELS = {
    "llama": llama_config(tie_word_embeddings=False),
    "qwen2": Qwen2Config(  # tied, with biases
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=0,
    ),
    "gpt2": GPT2Config(  # weights stored as [in, out]
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64, eos_token_id=0
    ),
}


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    hf.enable(("awq", "gptq", "compressed-tensors", "bitsandbytes"))
    yield
    hf.disable()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Callable[..., Path]:
    """A checkpoint of a model, float or of a kind, each made once."""
    root = tmp_path_factory.mktemp("hf")
    few = Calibration(str(text_file), samples=2, seqlen=64)

    def make(model: str = "llama", kind: str = "float") -> Path:
        out = root / model / kind
        if not out.exists() and kind == "float":
            save(make_model(MODELS[model]), out)
        elif not out.exists():
            salience.quantize(str(make(model)), out, calibration=few, **KINDS[kind])
        return out

    return make


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def edited(
    folder: Path,
    out: Path,
    tensors: Callable[[dict[str, Tensor]], object] | None = None,
    config: Callable[[dict[str, Any]], object] | None = None,
) -> Path:
    """A copy of a checkpoint with some of it changed."""
    shutil.copytree(folder, out)
    if tensors is not None:
        values = load_file(out / "model.safetensors")
        tensors(values)
        save_file(values, out / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        changed = config_of(out)
        config(changed)
        (out / "config.json").write_text(json.dumps(changed))
    return out


def same_checkpoint(a: Path, b: Path) -> None:
    """The same tensors to the byte, and the same `quantization_config`."""
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert config_of(a)["quantization_config"] == config_of(b)["quantization_config"]
    beside = a / "quantize_config.json", b / "quantize_config.json"
    assert beside[0].is_file() == beside[1].is_file()
    if beside[0].is_file():
        assert beside[0].read_bytes() == beside[1].read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_as_salience_loads_it(folder: Callable[..., Path], kind: str, device: torch.device) -> None:
    stored, dtype = folder(kind=kind), torch.float32
    model = load(stored, dtype=dtype, device_map=device)
    ours = salience.load(stored, device, dtype=dtype)
    assert {t.device.type for t in model.state_dict().values()} == {device.type}
    own = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert {n: m.kernel for n, m in own.items()} == {
        n: m.kernel for n, m in ours.named_modules() if isinstance(m, QuantLinear)
    }
    assert len(own) == 21
    assert same(model, ours, device)


def same(a: Any, b: Any, device: torch.device) -> bool:
    """Whether two models give the same logits; to the bit, on a CPU."""
    return error(logits(a), logits(b)) <= (1e-6 if device.type == "cuda" else 0)


def test_without_a_map_it_is_on_the_cpu(folder: Callable[..., Path]) -> None:
    """As any model of Transformers is, also where there is a GPU."""
    for kind in ("float", "awq", "gptq_v1", "nf4"):
        assert {t.device.type for t in load(folder(kind=kind)).state_dict().values()} == {"cpu"}
    model = load(folder(), quantization_config=hf.SalienceConfig("nf4"))
    assert {t.device.type for t in model.state_dict().values()} == {"cpu"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("there", [True, False], ids=["files", "no files"])
def test_round_trip(folder: Callable[..., Path], kind: str, tmp_path: Path, there: bool) -> None:
    stored = edited(folder(kind=kind), tmp_path / "copy")
    model = load(stored)
    if not there:
        shutil.rmtree(stored)
    model.save_pretrained(tmp_path / "out")
    same_checkpoint(folder(kind=kind), tmp_path / "out")


def test_saving_over_itself(folder: Callable[..., Path], tmp_path: Path) -> None:
    stored = edited(folder(kind="awq"), tmp_path / "copy")
    load(stored).save_pretrained(stored)
    same_checkpoint(folder(kind="awq"), stored)


def test_the_config_beside_the_config(folder: Callable[..., Path], tmp_path: Path) -> None:
    """Of a copy of the model too, and of no other format; only the main process writes it."""
    name = "quantize_config.json"
    model = load(folder(kind="gptq_v2_w3"))
    copy.deepcopy(model).save_pretrained(tmp_path / "main")
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    load(folder(kind="awq")).save_pretrained(tmp_path / "awq")
    there = [folder for folder in ("main", "other", "awq") if (tmp_path / folder / name).exists()]
    assert there == ["main"]
    written = json.loads((tmp_path / "main" / name).read_text())
    assert written == config_of(folder(kind="gptq_v2_w3"))["quantization_config"]


LAYOUTS = {
    "gemv": {"version": "GEMV"},
    "gemv_fast": {"version": "gemv_fast"},
    "llm-awq": {"version": "gemv", "backend": "llm-awq"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_that_are_only_read(
    folder: Callable[..., Path], tmp_path: Path, layout: str
) -> None:
    stored, out = tmp_path / "in", tmp_path / "out"
    tensors = repacked(folder(kind="awq"), stored, layout)
    save_file(tensors, stored / "model.safetensors", metadata={"format": "pt"})
    config = config_of(stored)
    config["quantization_config"] |= LAYOUTS[layout]
    (stored / "config.json").write_text(json.dumps(config))
    model = load(stored)
    assert torch.equal(logits(model), logits(load(folder(kind="awq"))))
    command = f"`salience convert {stored} --format awq"
    refuse(lambda: model.save_pretrained(out), "is read, not written", command)
    assert not out.exists()


@pytest.mark.parametrize("model", ["qwen2", "gpt2"])
def test_biases_tied_heads_and_transposed_weights(
    folder: Callable[..., Path], tmp_path: Path, model: str
) -> None:
    stored = folder(model, "awq")
    made = load(stored, dtype=torch.float32)
    assert torch.equal(logits(made), logits(salience.load(stored)))
    assert made.lm_head.weight is made.get_input_embeddings().weight
    load(stored).save_pretrained(tmp_path / "out")
    same_checkpoint(stored, tmp_path / "out")


def test_what_is_never_written_is_saved_from_the_files(
    folder: Callable[..., Path], tmp_path: Path
) -> None:
    def mislabel(config: dict[str, Any]) -> None:  # vllm#38966: a "gptq" that stores 8
        config["quantization_config"]["checkpoint_format"] = "gptq"

    def eights(values: dict[str, Tensor]) -> None:
        for name in values:
            if name.endswith(".qzeros"):
                values[name] = torch.full_like(values[name], -0x77777778)

    stored = edited(folder(kind="gptq_v1"), tmp_path / "in", eights, mislabel)
    model = load(stored)
    assert torch.equal(logits(model), logits(load(folder(kind="gptq_v1"))))
    model.save_pretrained(tmp_path / "out")
    same_checkpoint(stored, tmp_path / "out")


def test_the_tables_are_restored() -> None:
    hf.disable()
    stock = dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    assert stock[0]["awq"] is auto.AwqQuantizer and stock[1]["gptq"] is auto.GPTQConfig
    hf.enable()
    hf.enable()
    assert auto.AUTO_QUANTIZER_MAPPING["awq"] is not auto.AwqQuantizer
    assert auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] is auto.Bnb4BitHfQuantizer
    hf.enable(("bitsandbytes",))
    assert auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_8bit"] is not auto.Bnb8BitHfQuantizer
    hf.disable()
    hf.disable()
    assert stock == (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)


@pytest.mark.parametrize("kind", ["awq", "gptq_v1"])
def test_without_us_transformers_wants_other_packages(
    folder: Callable[..., Path], kind: str
) -> None:
    if any(importlib.util.find_spec(name) for name in OTHERS):
        pytest.skip("one of them is installed")
    hf.disable()
    with pytest.raises(ImportError, match=r"gptqmodel|optimum"):
        load(folder(kind=kind))
    hf.enable()
    load(folder(kind=kind))
    assert not OTHERS & set(sys.modules)


def test_stock_configs_of_other_models_are_left_alone(folder: Callable[..., Path]) -> None:
    # A float model with BitsAndBytesConfig is bitsandbytes' own work.
    for bits, stock in ((4, auto.Bnb4BitHfQuantizer), (8, auto.Bnb8BitHfQuantizer)):
        config = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
        made = auto.AutoHfQuantizer.from_config(config, pre_quantized=False)
        assert type(made) is stock


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("awq", lambda: transformers.AwqConfig(bits=4)),
        ("gptq_v1", lambda: transformers.GPTQConfig(bits=4, group_size=64)),
        ("fp4", lambda: transformers.BitsAndBytesConfig(load_in_4bit=True)),
        ("int8", lambda: transformers.BitsAndBytesConfig(load_in_8bit=True)),
    ],
)
def test_a_config_that_tutorials_pass(
    folder: Callable[..., Path], kind: str, config: Callable[[], Any], tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = load(folder(kind=kind), quantization_config=config())
    model.save_pretrained(tmp_path / "out")
    same_checkpoint(folder(kind=kind), tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"])
@pytest.mark.parametrize("device_map", [None, "cpu", "auto", {"": "cpu"}], ids=str)
def test_dtypes_and_device_maps(folder: Callable[..., Path], dtype: Any, device_map: Any) -> None:
    model = load(folder(kind="awq"), dtype=dtype, device_map=device_map)
    assert model.dtype == (torch.float16 if dtype == "auto" else dtype)
    linear = model.model.layers[0].mlp.up_proj
    assert linear.qtensor().scales.dtype == torch.float16
    assert error(logits(model), logits(salience.load(folder(kind="awq")))) < 0.05
    there = "cuda" if device_map == "auto" and torch.cuda.is_available() else "cpu"
    assert model.device.type == there == linear.get_buffer("packed_0").device.type
    out = model.generate(random_tokens(1, 8).to(there), max_new_tokens=4, do_sample=False)
    assert out.shape[0] == 1 and 9 <= out.shape[1] <= 12


def test_offloaded(folder: Callable[..., Path], tmp_path: Path, device: torch.device) -> None:
    """Floats are; packed weights are buffers, and stay where they run."""
    stored, first = folder(kind="awq"), 0 if device.type == "cuda" else "cpu"
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"]
    places = dict.fromkeys(parts, first) | {"model.layers.1": "disk", "model.layers.2": "cpu"}
    options = {"device_map": places, "offload_folder": tmp_path}
    model = load(stored, **options)
    assert model.model.layers[1].input_layernorm.weight.is_meta
    for layer in model.model.layers:
        assert layer.mlp.up_proj.get_buffer("packed_0").device.type == device.type
    assert same(model, load(stored, device_map=device), device)
    model.save_pretrained(tmp_path / "out")
    same_checkpoint(stored, tmp_path / "out")
    refuse(lambda: load(stored, offload_buffers=True, **options), "without offload_buffers")


@pytest.mark.parametrize("scheme", ["w4g32", "nf4-dq"])
def test_rounded_over_devices(
    folder: Callable[..., Path], device: torch.device, scheme: str
) -> None:
    """What lies beside a GPU runs on it, and is packed for it."""
    first, config = 0 if device.type == "cuda" else "cpu", hf.SalienceConfig(scheme)
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    places = dict.fromkeys([*parts, "model.layers.0", "model.layers.2"], first)
    model = load(
        folder(), quantization_config=config, device_map=places | {"model.layers.1": "cpu"}
    )
    whole = load(folder(), quantization_config=config, device_map=device)
    for layer, other in zip(model.model.layers, whole.model.layers, strict=True):
        packed = layer.mlp.up_proj
        assert packed.get_buffer("packed_0").device.type == device.type
        assert packed.kernel == other.mlp.up_proj.kernel
    assert same(model, whole, device)
    assert error(logits(model), logits(load(folder(), quantization_config=config))) < 0.05


@pytest.mark.slow
def test_compiled(folder: Callable[..., Path]) -> None:
    model = load(folder(kind="awq"))
    tokens = random_tokens()
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        out = compiled(input_ids=tokens, use_cache=False).logits
    assert torch.equal(out, logits(model, tokens))


def test_pipeline(folder: Callable[..., Path]) -> None:
    stored = str(folder(kind="gptq_v1"))
    run = pipeline("text-generation", model=stored, device_map="cpu")
    assert isinstance(run.model.model.layers[0].mlp.up_proj, QuantLinear)
    text = run("The assert statement", max_new_tokens=3, do_sample=False)[0]["generated_text"]
    tokens = AutoTokenizer.from_pretrained(stored)("The assert statement", return_tensors="pt")
    model = load(folder(kind="gptq_v1"))
    expected = model.generate(**tokens, max_new_tokens=3, do_sample=False)
    assert text == AutoTokenizer.from_pretrained(stored).decode(
        expected[0], skip_special_tokens=True
    )


def test_sharded(folder: Callable[..., Path], tmp_path: Path) -> None:
    model = load(folder(kind="awq"))
    model.save_pretrained(tmp_path / "out", max_shard_size="40KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


@pytest.mark.parametrize("kind", ["awq", "gptq_act_order", "nf4-dq"])
def test_moving_keeps_the_weight(
    folder: Callable[..., Path], kind: str, device: torch.device
) -> None:
    model = load(folder(kind=kind), dtype=torch.float32)
    before = logits(model)
    qt = model.model.layers[0].mlp.up_proj.qtensor()
    model.to(device)
    assert error(logits(model), before) < 0.05
    if kind == "awq":  # Transformers casts no model of the other methods
        model.to(torch.bfloat16)
        assert model.model.norm.weight.dtype == torch.bfloat16
        assert error(logits(model), before) < 0.05
    moved = model.model.layers[0].mlp.up_proj.qtensor()
    assert moved.scales.device.type == device.type
    assert torch.equal(moved.scales.cpu(), qt.scales) and moved.scales.dtype == qt.scales.dtype
    assert torch.equal(moved.q.cpu(), qt.q)
    model.to("cpu")
    assert error(logits(model), before) < 0.05
    if kind == "awq":
        model.to("meta")  # another kind of device: packed anew for it
        linear = model.model.layers[0].mlp.up_proj
        assert linear.kernel == "reference" and linear.get_buffer("packed_0").is_meta


MOE = Qwen3MoeConfig(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=128,
    moe_intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=4,
    num_experts_per_tok=2,
    eos_token_id=0,
)


def test_quantized_experts_are_refused(tmp_path: Path) -> None:
    """Transformers 5 has no linear for them, and would leave the experts random."""
    stored = save(make_model(MOE), tmp_path / "moe")
    expert = "model.layers.0.mlp.experts.0.gate_proj"

    def pack(values: dict[str, Tensor]) -> None:
        qt = grid.quantize(values.pop(f"{expert}.weight"), Scheme(4, 32))
        written = salience.formats.get_format("awq").write(qt)
        values.update({f"{expert}.{name}": tensor for name, tensor in written.items()})

    def config(values: dict[str, Any]) -> None:
        values["quantization_config"] = {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": 32,
        }

    bad = edited(stored, tmp_path / "bad", pack, config)
    refuse(lambda: load(bad), f"tensor {expert}.", "Transformers keeps experts")


def test_moe_with_float_experts(tmp_path: Path) -> None:
    save(make_model(MOE), tmp_path / "moe")
    salience.quantize(str(tmp_path / "moe"), tmp_path / "out", method="rtn", scheme="w4g32")
    model = load(tmp_path / "out", dtype=torch.float32)
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 4
    assert torch.equal(logits(model), logits(salience.load(tmp_path / "out")))
    load(tmp_path / "out").save_pretrained(tmp_path / "again")
    same_checkpoint(tmp_path / "out", tmp_path / "again")


def test_errors_name_what_is_wrong(folder: Callable[..., Path], tmp_path: Path) -> None:
    stored, name = folder(kind="awq"), "model.layers.1.mlp.up_proj"

    def marlin(config: dict[str, Any]) -> None:
        config["quantization_config"]["version"] = "marlin"

    refuse(lambda: load(edited(stored, tmp_path / "a", config=marlin)), "marlin")

    def short(values: dict[str, Tensor]) -> None:
        del values[f"{name}.scales"]

    bad = edited(stored, tmp_path / "b", short)
    refuse(lambda: load(bad), f"linear {name} of {bad}: tensor scales is missing")

    def narrow(values: dict[str, Tensor]) -> None:
        for local in ("qweight", "qzeros", "scales"):
            key = f"{name}.{local}"
            values[key] = values[key][:, : values[key].shape[1] // 2].contiguous()

    refuse(lambda: load(edited(stored, tmp_path / "c", narrow)), f"linear {name}", "[128, 64]")

    def stray(values: dict[str, Tensor]) -> None:
        values["model.norm.qweight"] = torch.zeros(1, dtype=torch.int32)

    refuse(lambda: load(edited(stored, tmp_path / "d", stray)), "tensor model.norm.qweight")
    astray = {r"layers\.1\.mlp\.up_proj\.qzeros": "layers.0.mlp.up_proj.qzeros"}
    refuse(lambda: load(stored, key_mapping=astray), f"did not read {name}.qzeros")
    refuse(lambda: hf.enable(("gguf",)), "no format 'gguf'", "awq or gptq")


SCHEMES = ["nf4", "nf4-dq", "fp4", "w4g32", "w4g64-sym", "w8channel", "w3g32"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounded_while_read(folder: Callable[..., Path], tmp_path: Path, scheme: str) -> None:
    floats = load(folder())
    model = load(folder(), quantization_config=hf.SalienceConfig(scheme))
    for name, linear in floats.named_modules():
        if isinstance(linear, torch.nn.Linear) and name != "lm_head":
            want = grid.quantize(linear.weight.detach(), Scheme.parse(scheme))
            got = model.get_submodule(name).qtensor()
            assert torch.equal(got.q, want.q) and torch.equal(got.scales, want.scales)
            assert torch.equal(got.zeros, want.zeros)
    assert torch.equal(model.lm_head.weight, floats.lm_head.weight)
    model.save_pretrained(tmp_path / "out")
    for again in (load(tmp_path / "out"), salience.load(tmp_path / "out")):
        assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_rounded_with_biases_and_transposed_weights(
    folder: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    model = load(folder(name), quantization_config=hf.SalienceConfig("w8g32"))
    assert error(logits(model), logits(load(folder(name)))) < 0.05
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(salience.load(tmp_path / "out")), logits(model))


@pytest.mark.parametrize("kind", ["awq", "nf4", "float"])
def test_stored_bias_that_the_model_lacks(
    folder: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    """Zeros, which some tools store everywhere, do nothing; others would silently be left out."""
    options = {"quantization_config": hf.SalienceConfig("w4g32")} if kind == "float" else {}
    for name, rows in (("model.layers.0.mlp.up_proj", 128), ("lm_head", VOCABULARY)):
        for value in (0, 1):
            bias = {f"{name}.bias": torch.full((rows,), float(value))}
            out = tmp_path / f"{name}-{value}"
            bad = edited(folder(kind=kind), out, lambda t, more=bias: t.update(more))
            if value:
                refuse(partial(load, bad, **options), f"tensor {name}.bias of", "has no place")
            else:
                assert torch.equal(
                    logits(load(bad, **options)), logits(load(folder(kind=kind), **options))
                )


def test_scales_that_are_not_finite(folder: Callable[..., Path], tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    bad = edited(
        folder(kind="awq"), tmp_path / "out", lambda t: t[f"{name}.scales"].fill_(float("nan"))
    )
    refuse(lambda: load(bad), f"linear {name} of", "not finite")


def test_keys_that_are_called_as_methods_are(folder: Callable[..., Path], tmp_path: Path) -> None:
    """A checkpoint's config is kept whole, and takes the place of no code."""
    keys = {"to_dict": 5, "__iter__": 1}
    copy = edited(
        folder(kind="awq"), tmp_path / "out", config=lambda c: c["quantization_config"].update(keys)
    )
    found = load(copy).config.quantization_config.to_dict()
    assert keys.items() <= found.items()


def test_rounded_but_not_all(folder: Callable[..., Path], tmp_path: Path) -> None:
    config = hf.SalienceConfig("w4g32", modules_to_not_convert=["self_attn", "layers.1"])
    model = load(folder(), quantization_config=config)
    own = {name for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    mlp = ("gate_proj", "up_proj", "down_proj")
    assert own == {f"model.layers.{i}.mlp.{part}" for i in (0, 2) for part in mlp}
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(salience.load(tmp_path / "out")), logits(model))


@pytest.mark.parametrize("kind", ["awq", "gptq_v1", "int8"])
def test_rounded_in_another_format(folder: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    """The linears are those of `salience quantize`, which rounds all else to fp16."""
    stored, out = folder(kind=kind), tmp_path / "out"
    config = hf.SalienceConfig(KINDS[kind]["scheme"], format=KINDS[kind]["format"])
    model = load(folder(), quantization_config=config)
    model.save_pretrained(out)
    wanted, found = (load_file(path / "model.safetensors") for path in (stored, out))
    assert wanted.keys() == found.keys()
    floats = {name for name in wanted if wanted[name].dtype != found[name].dtype}
    assert len(floats) == 9 and not any("proj" in name for name in floats)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted.keys() - floats)
    assert config_of(out)["quantization_config"] == config_of(stored)["quantization_config"]
    assert (out / "quantize_config.json").exists() == (kind == "gptq_v1")
    assert torch.equal(logits(load(out)), logits(model))


def test_a_config_that_names_no_method(folder: Callable[..., Path], tmp_path: Path) -> None:
    """As the first ones of bitsandbytes."""

    def unnamed(config: dict[str, Any]) -> None:
        del config["quantization_config"]["quant_method"]

    stored = edited(folder(kind="int8"), tmp_path / "in", config=unnamed)
    model = load(stored)
    assert torch.equal(logits(model), logits(load(folder(kind="int8"))))
    model.save_pretrained(tmp_path / "out")
    same_checkpoint(stored, tmp_path / "out")


def test_what_cannot_be_rounded(folder: Callable[..., Path]) -> None:
    refuse(lambda: hf.SalienceConfig("w4"), "scheme 'w4' is not understood")
    refuse(lambda: hf.SalienceConfig("w3g32", format="awq"), "holds 4-bit codes")
    wide = hf.SalienceConfig("w4g48")
    refuse(lambda: load(folder(), quantization_config=wide), "linear model.layers.0", "48")
    with pytest.raises(ValueError, match="SalienceConfig"):
        load(folder(kind="awq"), quantization_config=hf.SalienceConfig("nf4"))
    with pytest.raises(SalienceError, match="offloaded to disk"):
        load(
            folder(),
            quantization_config=hf.SalienceConfig("nf4"),
            device_map={"model": "cpu", "lm_head": "disk"},
            offload_folder="/nonexistent",
        )
