"""quantize() on tiny models: what it writes, what it reports, and that it keeps the function."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    FalconConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    LlamaForCausalLM,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
)

import salience
from helpers_checkpoint import dequantized, same_files
from helpers_gguf import write_gguf
from salience import containers
from salience.blocks import block, kinds, solved
from salience.blocks.journal import Journal
from salience.calibration import Calibration
from salience.conversion import stored_tensors
from salience.errors import DoesNotFitError, SalienceError, StorageError
from salience.grid import Grid
from salience.methods import Problem, get_method
from salience.pipeline import assemble as assembling
from salience.pipeline import engine
from salience.pipeline import quantize as pipeline
from salience.reports.report import Report
from salience.structure import find_blocks
from tiny_models import (
    VOCABULARY,
    error,
    llama_config,
    logits,
    make_model,
    make_tokenizer,
    random_tokens,
    save,
)

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}


@pytest.fixture(scope="module")
def calibration(text_file: Path) -> Calibration:
    return Calibration(str(text_file), samples=4, seqlen=64)


@pytest.fixture(scope="module")
def awq(
    llama: Path, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Report]:
    out = tmp_path_factory.mktemp("awq") / "w4g32"
    report = salience.quantize(str(llama), out, scheme="w4g32", calibration=calibration)
    return out, report


def test_folder_is_complete(awq: tuple[Path, Report], llama: Path) -> None:
    out, _ = awq
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "salience_report.json",
    }
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (llama / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "zero_point": True,
        "group_size": 32,
        "bits": 4,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    source = json.loads((llama / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    assert kept == {**source, "dtype": "float16"}
    assert [path.name for path in out.parent.iterdir()] == [out.name]  # no temporary folder left


def test_tensors(awq: tuple[Path, Report], llama: Path) -> None:
    stored = load_file(awq[0] / "model.safetensors")
    source = load_file(llama / "model.safetensors")
    linears = {name for name in source if ".layers." in name and "norm" not in name}
    expected = set(source) - linears
    for name in linears:
        owner = name.removesuffix(".weight")
        expected |= {f"{owner}.{part}" for part in ("qweight", "qzeros", "scales")}
    assert set(stored) == expected
    for name in set(source) - linears:
        assert stored[name].dtype == torch.float16
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(stored[name], source[name].half())
    rows, columns = source["model.layers.0.mlp.down_proj.weight"].shape
    owner = "model.layers.0.mlp.down_proj"
    assert stored[f"{owner}.qweight"].shape == (columns, rows // 8)
    assert stored[f"{owner}.qzeros"].shape == (columns // 32, rows // 8)
    assert stored[f"{owner}.scales"].shape == (columns // 32, rows)


def test_report(awq: tuple[Path, Report], llama: Path, text_file: Path) -> None:
    out, report = awq
    assert json.loads((out / "salience_report.json").read_text()) == asdict(report)
    assert (report.model, report.out, report.method, report.scheme, report.format) == (
        str(llama),
        str(out),
        "awq",
        "w4g32",
        "awq",
    )
    assert report.calibration == {
        "text": str(text_file),
        "samples": 4,
        "seqlen": 64,
        "seed": 0,
        "tokens": 256,
    }
    assert report.bits_per_weight == 4 + 20 / 32
    assert report.kept_modules == ["lm_head"]
    phases = {"read", "statistics", "structure", "search", "write"}
    assert set(report.phase_seconds) == phases
    assert report.effort == "fast"
    assert report.options == {"scheme": "w4g32", "rules": [], "skip": [], "only": []}
    assert 0 < sum(report.phase_seconds.values()) <= report.seconds
    assert report.peak_rss_bytes > 2**20
    assert len(report.linears) == 21 and len({linear.name for linear in report.linears}) == 21
    assert [fold["prev"] for fold in report.folds] == [
        "input_layernorm",
        "self_attn.v_proj",
        "post_attention_layernorm",
        "mlp.up_proj",
    ]
    assert all(fold["error"] < 1e-5 for fold in report.folds)
    assert report.error == pytest.approx(sum(linear.error for linear in report.linears) / 21)
    assert report.error_rtn == pytest.approx(
        sum(linear.error_rtn for linear in report.linears) / 21
    )


def test_never_worse_than_plain_rounding(awq: tuple[Path, Report]) -> None:
    _, report = awq
    for linear in report.linears:
        assert linear.error <= linear.error_rtn * (1 + 1e-6), linear.name
        assert linear.kept_rtn or linear.error < linear.error_rtn
    assert report.error < 0.8 * report.error_rtn  # there was something to gain
    assert any(linear.alpha > 0 for linear in report.linears)
    assert any(linear.clip < 1 for linear in report.linears)


def test_same_inputs_same_bytes(
    awq: tuple[Path, Report], llama: Path, calibration: Calibration, tmp_path: Path
) -> None:
    out = tmp_path / "again"
    salience.quantize(str(llama), str(out), scheme="w4g32", calibration=calibration)
    same_files(awq[0], out)


def test_another_text_other_bytes(awq: tuple[Path, Report], llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "other.txt"
    text.write_text("0123456789 " * 400)
    other = Calibration(str(text), samples=4, seqlen=64)
    salience.quantize(str(llama), tmp_path / "out", scheme="w4g32", calibration=other)
    a, b = (load_file(f / "model.safetensors") for f in (awq[0], tmp_path / "out"))
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_loads_as_the_dequantized_model(awq: tuple[Path, Report], llama: Path) -> None:
    out, _ = awq
    dense = LlamaForCausalLM(llama_config()).eval()
    dense.load_state_dict(dequantized(out))
    found = logits(salience.load(out, kernel="reference"))
    assert error(found, logits(dense)) < 1e-5
    assert error(found, logits(salience.load(llama))) < 0.5


def test_awq_is_closer_than_rtn(awq: tuple[Path, Report], llama: Path, tmp_path: Path) -> None:
    report = salience.quantize(str(llama), tmp_path / "rtn", method="rtn", scheme="w4g32")
    assert report.calibration is None
    assert report.folds == []
    assert all(linear.alpha == 0 and linear.clip == 1 for linear in report.linears)
    assert all(linear.error == pytest.approx(linear.error_rtn) for linear in report.linears)
    tokens, float_logits = random_tokens(4, 64, seed=5), salience.load(llama)
    reference = logits(float_logits, tokens)
    errors = [
        error(logits(salience.load(folder, kernel="reference"), tokens), reference)
        for folder in (awq[0], tmp_path / "rtn")
    ]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_on_each_device(
    llama: Path, calibration: Calibration, tmp_path: Path, device: torch.device, method: str
) -> None:
    """A job on a GPU, from the text to a model that runs there, or on a CPU."""
    options: dict[str, Any] = {"scheme": "w4g32", "calibration": calibration, "method": method}
    report = salience.quantize(str(llama), tmp_path / "out", device=str(device), **options)
    assert report.device == str(device) and report.error < 0.9 * report.error_rtn
    found = logits(salience.load(tmp_path / "out", device, dtype=torch.float32))
    assert error(found, logits(salience.load(llama))) < 0.5


def test_rtn_weights_are_the_rounded_source(llama: Path, tmp_path: Path) -> None:
    salience.quantize(str(llama), tmp_path / "rtn", method="rtn", scheme="w4g32")
    dense, source = dequantized(tmp_path / "rtn"), load_file(llama / "model.safetensors")
    for name, weight in source.items():
        if ".layers." in name and "norm" not in name:
            groups = weight.unflatten(1, (-1, 32))
            step = (groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)) / 15
            away = (dense[name] - weight).abs().unflatten(1, (-1, 32))
            # Half a step, a whole one at the ends where the zero was rounded.
            assert (away <= step[..., None] * 1.01).all()
            assert (away > step[..., None] * 0.51).float().mean() < 0.05


def fill_buffers(model: Any) -> None:
    """Give Gemma 4's stored buffers a value of their own."""
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(0.3)


def folded_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have quantize() write the folded float weights and leave the codes out."""

    def folded(job: Any, block: Any, _: Any) -> dict[str, Tensor]:
        tensors = {}
        for local, parameter in block.module.named_parameters():
            tensors |= stored_tensors(job.skeleton, job.weights, block.full(local), parameter)
        return tensors

    def config(job: Any) -> dict[str, Any]:
        values: dict[str, Any] = json.loads((job.source.path / "config.json").read_text())
        return values

    monkeypatch.setattr(solved, "_tensors", folded)
    monkeypatch.setattr(assembling, "_config", config)
    monkeypatch.setattr(assembling, "to_dtype", lambda tensor, _name, _dtype: tensor)


ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": llama_config,
    "llama-tied": lambda: llama_config(tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SIZES, num_key_value_heads=2),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi": lambda: PhiConfig(**SIZES),
    # Layer norms, biases, ReLU: the up projection is folded into the down projection.
    "opt": lambda: OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=64,
    ),
    # Blocks that return tuples, more of them than a tensor has dimensions.
    "falcon": lambda: FalconConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
        bos_token_id=None,
        eos_token_id=0,
    ),
    # A stored buffer in each block scales its output.
    "gemma4": lambda: Gemma4TextConfig(
        **SIZES,
        num_key_value_heads=2,
        head_dim=16,
        global_head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=16,
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_folds_keep_the_function(
    name: str, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folded copy, its weights not rounded, is the same model for other tokens too."""
    model = make_model(ARCHITECTURES[name]())
    fill_buffers(model)
    source = save(model, tmp_path / "source")
    folded_only(monkeypatch)
    report = salience.quantize(
        str(source), tmp_path / "out", scheme="w4g16", calibration=calibration
    )
    assert sum(linear.alpha > 0 for linear in report.linears) >= 2
    tokens = random_tokens(3, 40, seed=7)
    folded = salience.load(tmp_path / "out")
    assert error(logits(folded, tokens), logits(model, tokens)) < 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "gemma4", "falcon"])
def test_reported_errors_are_those_of_the_files(
    name: str, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Undo the scales in the written weights, and measure them in fp64 on the float model."""
    model = make_model(ARCHITECTURES[name]())
    fill_buffers(model)
    source, out = save(model, tmp_path / "in"), tmp_path / "out"
    right, chosen = block.fold_scales, []

    def spy(*args: Any) -> Any:
        chosen.append(right(*args))
        return chosen[-1]

    monkeypatch.setattr(block, "fold_scales", spy)
    report = salience.quantize(str(source), out, scheme="w4g16", calibration=calibration)
    written = dequantized(out)
    prefix, blocks = find_blocks(model)
    for i, choices in enumerate(chosen):
        for choice in choices:
            scales = choice.scales
            for sink in choice.fold.sinks:
                written[f"{prefix}.{i}.{sink}.weight"] /= scales
            weight = written[f"{prefix}.{i}.{choice.fold.prev}.weight"]
            if weight.ndim == 2:
                factor = torch.ones(len(weight))
                factor[choice.fold.index] = scales
                weight *= factor[:, None]
    seen: dict[str, Tensor] = {}
    for linear in report.linears:
        model.get_submodule(linear.name).register_forward_pre_hook(
            lambda _module, args, key=linear.name: seen.setdefault(key, args[0])
        )
    tokens = calibration.tokens(AutoTokenizer.from_pretrained(source))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    assert len(chosen) == len(blocks) and any(chosen)
    for linear in report.linears:
        x = seen[linear.name].flatten(0, -2).double()
        weight = model.get_submodule(linear.name).weight.detach().double()
        away = x @ (written[f"{linear.name}.weight"].double() - weight).T
        found = (away.square().sum() / (x @ weight.T).square().sum()).item()
        assert linear.error == pytest.approx(found, rel=1e-3), linear.name


def test_linear_that_the_method_does_not_help(
    llama: Path, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search that clips nearly all away is not believed."""
    right = get_method("awq")

    def narrow(problem: Problem) -> Grid:
        found = right.grids(problem)
        scales = (found.scales / 9).half() if problem.weight.shape[1:] == (256, 64) else None
        return found if scales is None else found._replace(scales=scales)

    method = replace(right, grids=narrow)
    monkeypatch.setattr("salience.pipeline.prepare.get_method", lambda *_args: method)
    report = salience.quantize(
        str(llama), tmp_path / "out", scheme="w4g32", calibration=calibration
    )
    for linear in report.linears:
        assert linear.kept_rtn == ("gate_proj" in linear.name or "up_proj" in linear.name)
        if linear.kept_rtn:
            assert linear.clip == 1
            # Its rows may have been divided, and then the fp16 scales differ in their last bit.
            assert linear.error <= linear.error_rtn * 1.01


def test_stored_buffers_are_kept(calibration: Calibration, tmp_path: Path) -> None:
    model = make_model(ARCHITECTURES["gemma4"]())
    fill_buffers(model)
    source = save(model, tmp_path / "source")
    for method in ("awq", "rtn"):
        out = tmp_path / method
        salience.quantize(str(source), out, method=method, scheme="w4g16", calibration=calibration)
        quantized = salience.load(out)
        assert quantized.model.layers[1].layer_scalar.item() == pytest.approx(0.3)


def test_other_architectures_load_again(calibration: Calibration, tmp_path: Path) -> None:
    for name in ("qwen2", "falcon", "llama-tied"):
        model = make_model(ARCHITECTURES[name]())
        source = save(model, tmp_path / name)
        out = tmp_path / f"{name}-q"
        report = salience.quantize(str(source), out, scheme="w4g16", calibration=calibration)
        stored = load_file(out / "model.safetensors")
        assert ("lm_head.weight" in stored) == (not model.config.tie_word_embeddings)
        assert report.error < report.error_rtn
        assert error(logits(salience.load(out)), logits(model)) < 0.5


def test_blocks_are_reported_as_they_finish(
    llama: Path, calibration: Calibration, tmp_path: Path
) -> None:
    seen: list[Any] = []
    report = salience.quantize(
        str(llama),
        tmp_path / "out",
        scheme="w4g32",
        calibration=calibration,
        on_block=seen.append,
    )
    assert seen == report.blocks and len(seen) == 3
    assert all(0 < block.error <= block.error_rtn and block.folds for block in seen)


def test_progress(llama: Path, calibration: Calibration, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    salience.quantize(
        str(llama),
        tmp_path / "out",
        scheme="w4g32",
        calibration=calibration,
        progress=lambda *call: calls.append(call),
    )
    expected = [("block", done, 3) for done in range(4)] + [("shard", done, 3) for done in range(3)]
    assert calls == expected


# Where a run may stop: at its first or second call of something.
STEPS = [
    (engine, "solve"),
    (kinds, "discover_folds"),
    (solved, "stored_tensors"),
    (Journal, "save_block"),
    (pipeline, "collect"),
    (assembling, "_config"),
    (assembling, "make_writer"),
    (Journal, "publish"),
]


# Each step with a refusal and with Ctrl-C; what else is kept, once.
STOPS = [
    *((step, kind) for step in STEPS for kind in (SalienceError, KeyboardInterrupt)),
    *((STEPS[0], kind) for kind in (StorageError, DoesNotFitError, RuntimeError)),
]


@pytest.mark.parametrize(
    ("owner_step", "kind"), STOPS, ids=[f"{step[1]}-{kind.__name__}" for step, kind in STOPS]
)
def test_a_failure_leaves_nothing_or_what_can_be_continued(
    owner_step: tuple[Any, str],
    kind: type[BaseException],
    awq: tuple[Path, Report],
    llama: Path,
    calibration: Calibration,
    tmp_path: Path,
) -> None:
    """Bad input leaves nothing; from all else the same call goes on, to the same bytes."""
    owner, step = owner_step
    right, calls = getattr(owner, step), []

    def fail_late(*args: Any, **named: Any) -> Any:
        calls.append(args)
        if len(calls) < 2 and step in ("solve", "stored_tensors", "save_block"):
            return right(*args, **named)
        raise kind("stop")

    out = tmp_path / "deep" / "out"
    config: dict[str, Any] = {"scheme": "w4g32", "calibration": calibration}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, step, fail_late)
        with pytest.raises(kind, match="stop"):
            salience.quantize(str(llama), out, **config)
    assert calls
    rest = out.parent / "out.partial"
    assert list(out.parent.iterdir()) == ([] if kind is SalienceError else [rest])
    assert not (rest / "published").exists()
    report = salience.quantize(str(llama), out, **config)
    assert list(out.parent.iterdir()) == [out]
    same_files(awq[0], out)
    assert report.linears == awq[1].linears and report.folds == awq[1].folds


def test_shards(
    awq: tuple[Path, Report],
    llama: Path,
    calibration: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = partial(containers.ShardWriter, shard_bytes=40_000)
    monkeypatch.setattr(containers, "ShardWriter", small)
    out = tmp_path / "shards"
    salience.quantize(str(llama), out, scheme="w4g32", calibration=calibration)
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 1
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    whole = load_file(awq[0] / "model.safetensors")
    assert tensors.keys() == whole.keys()
    assert all(torch.equal(tensors[name], whole[name]) for name in whole)
    assert error(logits(salience.load(out)), logits(salience.load(awq[0]))) == 0


def test_fold_that_fails_on_real_text_is_dropped(
    awq: tuple[Path, Report],
    llama: Path,
    calibration: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fold with a wrong index, as if the probe had been misled."""
    right = kinds.discover_folds

    def misled(*args: Any) -> Any:
        folds = right(*args)
        folds[0].index.copy_(folds[0].index.roll(1))
        return folds

    monkeypatch.setattr(kinds, "discover_folds", misled)
    report = salience.quantize(
        str(llama), tmp_path / "out", scheme="w4g32", calibration=calibration
    )
    alphas = {linear.name.split(".", 3)[3]: 0.0 for linear in report.linears}
    for linear in report.linears:
        alphas[linear.name.split(".", 3)[3]] += linear.alpha
    assert alphas["self_attn.q_proj"] == 0 and alphas["mlp.gate_proj"] > 0
    source = logits(salience.load(llama))
    assert error(logits(salience.load(tmp_path / "out")), source) < 0.5


def test_values_that_are_not_finite(llama: Path, calibration: Calibration, tmp_path: Path) -> None:
    model = make_model(llama_config())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    source = save(model, tmp_path / "nan")
    with pytest.raises(SalienceError, match=r"model\.layers\.1\.mlp\.up_proj\.weight .*not finite"):
        salience.quantize(str(source), tmp_path / "out", scheme="w4g32", calibration=calibration)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["awq", "rtn"])
def test_tensor_of_the_wrong_shape(
    method: str, llama: Path, calibration: Calibration, tmp_path: Path
) -> None:
    shutil.copytree(llama, tmp_path / "in")
    tensors = load_file(llama / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:96].clone()
    save_file(tensors, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SalienceError, match=rf"tensor {name} of .* is \[96, 64\], .* \[128, 64\]"):
        salience.quantize(
            str(tmp_path / "in"),
            tmp_path / "out",
            method=method,
            scheme="w4g32",
            calibration=calibration,
        )
    assert not (tmp_path / "out").exists()


def test_bfloat16_source_overflowing_fp16(tmp_path: Path, calibration: Calibration) -> None:
    model = make_model(llama_config()).bfloat16()
    with torch.no_grad():
        model.model.norm.weight[0] = 1e6
    source = save(model, tmp_path / "huge")
    with pytest.raises(SalienceError, match=r"model\.norm\.weight overflows fp16"):
        salience.quantize(str(source), tmp_path / "out", scheme="w4g32", calibration=calibration)
    assert not (tmp_path / "out").exists()


def test_gguf_source(llama: Path, calibration: Calibration, tmp_path: Path) -> None:
    model = salience.load(llama)
    path = tmp_path / "tiny.gguf"
    write_gguf(model, path)
    with torch.no_grad():  # what the file holds of the weights
        for name, parameter in model.named_parameters():
            if ".mlp." in name:
                blocks = parameter.unflatten(1, (-1, 32))
                step = blocks.abs().amax(-1, keepdim=True) / 127
                parameter.copy_((blocks / step).round().mul(step.half()).flatten(1))
            elif parameter.ndim == 2:
                parameter.copy_(parameter.half())
    assert error(logits(salience.load(path)), logits(model)) < 1e-5
    out = tmp_path / "out"
    report = salience.quantize(str(path), out, scheme="w4g32", calibration=calibration)
    assert report.error < report.error_rtn
    assert len(report.linears) == 21
    quantized = salience.load(out, kernel="reference")
    assert error(logits(quantized), logits(model)) < 0.5
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLM"]
    assert config["quantization_config"]["group_size"] == 32
    text = "def f(x):\n    return x + 1  # naïve\n"
    theirs, ours = AutoTokenizer.from_pretrained(out), make_tokenizer()
    assert theirs(text)["input_ids"] == ours(text)["input_ids"]
    assert theirs.chat_template == ours.chat_template
    assert theirs.eos_token_id == 0


def test_bad_options(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for options, message in (
        ({"effort": "finest"}, "there is no effort 'finest'"),
        ({"method": "magic"}, "there is no method 'magic'"),
        ({"method": "gptq", "effort": "balanced"}, "--effort balanced is for --method awq, not"),
        ({"act_order": True}, "--act-order is for --method gptq, not awq"),
        (
            {"act_order": True, "method": "gptq", "scheme": "w4g32"},
            "--format awq has no place for the groups of --act-order",
        ),
        ({"method": "nf4", "scheme": "w4g32"}, "--method nf4 makes no w4g32"),
        ({"scheme": "nf4"}, "--method awq makes no nf4"),
        ({"scheme": "w4g32", "rules": [("nothing", "w8g32")]}, "'nothing' matches no linear"),
        ({"scheme": "w4g32", "rules": [("mlp", "w8")]}, "scheme 'w8' is not understood"),
        ({"scheme": "w4g32", "skip": ["("]}, r"pattern '\(' is no regular expression"),
        ({"scheme": "w4g32", "only": ["model"], "skip": ["model"]}, "leave no linear to quantize"),
        ({"scheme": "w4g32", "rules": [("mlp", "w4g64")]}, "--format awq stores one scheme"),
        ({"scheme": "w4g32", "max_memory": 1000}, "use a shorter --seqlen, --method rtn or a lar"),
        ({"scheme": "w4g32", "save_search": tmp_path / "no" / "x"}, "the folder of .* does not ex"),
        ({"from_search": tmp_path / "no"}, "search file .* does not exist"),
        ({"format": "magic"}, "there is no format 'magic'"),
        ({"scheme": "w4g48"}, "group size 48 does not divide"),
        ({"scheme": "w3g32"}, "--format awq holds 4-bit codes"),
        ({"device": "tpu"}, "tpu"),
    ):
        with pytest.raises(SalienceError, match=message):
            salience.quantize(str(llama), out, **options)  # type: ignore[arg-type]
    out.mkdir()
    (out / "mine.txt").touch()
    with pytest.raises(SalienceError, match="not an empty folder"):
        salience.quantize(str(llama), out, scheme="w4g32")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_output_folder_that_is_empty(llama: Path, calibration: Calibration, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    salience.quantize(str(llama), out, scheme="w4g32", calibration=calibration)
    assert (out / "model.safetensors").is_file()


def test_relative_paths(
    llama: Path, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(llama, tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    salience.quantize("in", "out", scheme="w4g32", calibration=calibration)
    assert (tmp_path / "out" / "model.safetensors").is_file()
