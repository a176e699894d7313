"""quantize() with every method, effort, format and recipe: never worse, and it loads again."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma4TextConfig, LlamaForCausalLM

import salience
from helpers_checkpoint import config_of, dequantized, qtensors, same_files, stored_tensors
from salience import grid
from salience.calibration import Calibration
from salience.errors import SalienceError
from salience.pipeline import engine
from salience.pipeline import quantize as pipeline
from salience.pipeline.prepare import prepare
from salience.planning.plan import Budget, make_plan
from salience.reports.report import Report
from salience.scheme import Scheme
from salience.source import open_source
from tiny_models import VOCABULARY, error, llama_config, logits, make_model, random_tokens, save

LINEARS = 7  # of a block
METHODS: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq"},
    "balanced": {"effort": "balanced"},
}


@pytest.fixture(scope="module")
def calibration(text_file: Path) -> Calibration:
    return Calibration(str(text_file), samples=4, seqlen=64)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks, an untied head."""
    config = llama_config(num_hidden_layers=2)
    return save(make_model(config), tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks, a head that is the embeddings."""
    config = llama_config(num_hidden_layers=2, tie_word_embeddings=True)
    return save(make_model(config), tmp_path_factory.mktemp("tied"))


def never_worse(report: Report) -> None:
    assert report.linears
    for linear in report.linears:
        # Rows that were divided and then rounded plainly have other fp16 scales.
        slack = 1e-2 if linear.kept_rtn else 1e-5
        assert linear.error <= linear.error_rtn * (1 + slack), linear.name
    assert report.error <= report.error_rtn


def loads_again(folder: Path, **changes: Any) -> Tensor:
    """The logits of the loaded folder, which must be those of its dequantized weights."""
    config = llama_config(num_hidden_layers=2, **changes)
    dense = LlamaForCausalLM(config).eval()
    missing, unexpected = dense.load_state_dict(dequantized(folder), strict=False)
    dense.tie_weights()
    tied = config.tie_word_embeddings
    assert not unexpected and missing == (["lm_head.weight"] if tied else [])
    codebook = any(qt.scheme.codebook for qt in qtensors(folder).values())
    found = logits(salience.load(folder, kernel="auto" if codebook else "reference"))
    assert error(found, logits(dense)) < 1e-5
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("fmt", "scheme"),
    [
        ("awq", "w4g32"),
        ("awq", "w4g16-sym"),
        ("compressed-tensors", "w3g32"),
        ("compressed-tensors", "w2g32"),
        ("compressed-tensors", "w8g64"),
        ("compressed-tensors", "w4channel"),
        ("compressed-tensors", "w3g32-sym"),
    ],
)
def test_methods_that_look_at_text(
    method: str, fmt: str, scheme: str, two: Path, calibration: Calibration, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = salience.quantize(
        str(two), out, scheme=scheme, format=fmt, calibration=calibration, **METHODS[method]
    )
    never_worse(report)
    assert report.error < (0.97 if scheme == "w8g64" else 0.75) * report.error_rtn
    assert (report.method, report.effort) == (
        ("gptq", "fast") if method == "gptq" else ("awq", "balanced")
    )
    scales = [linear.alpha > 0 for linear in report.linears]
    assert any(scales) == (method == "balanced") or scheme == "w8g64"
    assert bool(report.folds) == (method == "balanced")
    coded = qtensors(out)
    assert set(coded) == {linear.name for linear in report.linears} and len(coded) == 2 * LINEARS
    for qt in coded.values():
        # AutoAWQ's format says nothing of symmetry: all its grids have zeros.
        expected = Scheme.parse(scheme)
        assert (qt.scheme.bits, qt.scheme.group_size) == (expected.bits, expected.group_size)
        assert not expected.sym or (qt.zeros == 2 ** (expected.bits - 1)).all()
    loads_again(out)
    rtn = tmp_path / "rtn"
    salience.quantize(str(two), rtn, scheme=scheme, format=fmt, method="rtn")
    tokens = random_tokens(4, 64, seed=5)
    reference = logits(salience.load(two), tokens)
    errors = [error(logits(salience.load(f), tokens), reference) for f in (out, rtn)]
    assert errors[0] < 0.9 * errors[1]


def test_each_method_is_closer_than_the_one_before(
    two: Path, calibration: Calibration, tmp_path: Path
) -> None:
    errors = {}
    for name, options in {"rtn": {"method": "rtn"}, "awq": {}, **METHODS}.items():
        report = salience.quantize(
            str(two),
            tmp_path / name,
            scheme="w3g32",
            format="compressed-tensors",
            calibration=calibration,
            **options,
        )
        # RTN's own report is of unit covariance; the others say what it has on the text.
        errors[name] = report.error
        errors["rounding"] = report.error_rtn
    assert errors["balanced"] < errors["awq"] < 0.8 * errors["rounding"]
    assert errors["gptq"] < 0.6 * errors["rounding"]


@pytest.mark.parametrize("method", ["awq", "gptq", "balanced", "rtn"])
def test_rules_skip_and_only(
    method: str, two: Path, calibration: Calibration, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = METHODS.get(method, {"method": method})
    report = salience.quantize(
        str(two),
        out,
        scheme="w3g32",
        rules=[("down_proj$", "w8g64"), ("layers\\.1\\..*q_proj", Scheme(4, 16, True))],
        skip=["layers\\.0\\..*k_proj", "o_proj"],
        only=["layers"],
        format="compressed-tensors",
        calibration=calibration,
        **options,
    )
    never_worse(report)
    float_ones = {
        "lm_head",
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.self_attn.o_proj",
    }
    assert set(report.kept_modules) == float_ones
    assert report.options == {
        "scheme": "w3g32",
        "rules": [["down_proj$", "w8g64"], ["layers\\.1\\..*q_proj", "w4g16-sym"]],
        "skip": ["layers\\.0\\..*k_proj", "o_proj"],
        "only": ["layers"],
    }
    coded = qtensors(out)
    assert len(coded) == 2 * LINEARS - 3 and not set(coded) & float_ones
    for linear in report.linears:
        expected = "w3g32"
        expected = "w8g64" if "down_proj" in linear.name else expected
        expected = "w4g16-sym" if linear.name == "model.layers.1.self_attn.q_proj" else expected
        assert linear.scheme == expected == str(coded[linear.name].scheme)
    assert error(loads_again(out), logits(salience.load(two))) < 0.9
    stored = stored_tensors(out)
    for name in float_ones:
        assert stored[f"{name}.weight"].dtype == torch.float16


@pytest.mark.parametrize("method", ["awq", "gptq", "balanced", "rtn"])
@pytest.mark.parametrize("source", ["two", "tied"])
def test_the_head(
    method: str,
    source: str,
    calibration: Calibration,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    folder, out = request.getfixturevalue(source), tmp_path / "out"
    options: dict[str, Any] = METHODS.get(method, {"method": method})
    report = salience.quantize(
        str(folder),
        out,
        scheme="w4g32",
        rules=[("^lm_head$", "w3g32")],
        format="compressed-tensors",
        calibration=calibration,
        **options,
    )
    never_worse(report)
    head = report.linears[-1]
    assert (head.name, head.scheme, head.out_features) == ("lm_head", "w3g32", 320)
    assert len(report.linears) == 2 * LINEARS + 1 and report.kept_modules == []
    if method != "rtn":
        assert not head.kept_rtn and head.error < 0.9 * head.error_rtn
    assert config_of(folder)["tie_word_embeddings"] == (source == "tied")
    assert config_of(out)["tie_word_embeddings"] is False
    stored = stored_tensors(out)
    assert "lm_head.weight_packed" in stored and "lm_head.weight" not in stored
    float_ones = stored_tensors(folder)
    name = "model.embed_tokens.weight"
    assert torch.equal(stored[name], float_ones[name].half())
    found = loads_again(out)  # untied now
    model = salience.load(folder)
    assert error(found, logits(model)) < 0.7
    # The head's error is that of the inputs it has in the float model.
    seen: list[Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    tokens = calibration.tokens(open_source(str(folder)).tokenizer)
    logits(model, tokens)
    weight = model.lm_head.weight.double()
    x = seen[0].flatten(0, -2).double() if method != "rtn" else torch.eye(64).double()
    away = x @ (qtensors(out)["lm_head"].dequantize(torch.float64) - weight).T
    relative = (away.square().sum() / (x @ weight.T).square().sum()).item()
    assert head.error == pytest.approx(relative, rel=1e-3)


@pytest.mark.parametrize("pattern", ["embed_tokens", "embed_tokens|lm_head"])
@pytest.mark.parametrize("source", ["two", "tied"])
def test_the_embeddings(
    pattern: str,
    source: str,
    calibration: Calibration,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Each alone or with the head; tied ones part."""
    folder, out = request.getfixturevalue(source), tmp_path / "out"
    report = salience.quantize(
        str(folder),
        out,
        scheme="w4g32",
        rules=[(pattern, "w3g32")],
        format="compressed-tensors",
        calibration=calibration,
        effort="balanced",
    )
    never_worse(report)
    heads = {"lm_head"} if "lm_head" in pattern else set()
    outside = {"model.embed_tokens"} | heads
    assert {linear.name for linear in report.linears if linear.scheme == "w3g32"} == outside
    assert config_of(out)["tie_word_embeddings"] is False
    stored, floats = stored_tensors(out), stored_tensors(folder)
    assert "model.embed_tokens.weight" not in stored
    if not heads:
        own = "model.embed_tokens.weight" if source == "tied" else "lm_head.weight"
        assert torch.equal(stored["lm_head.weight"], floats[own].half())
    embeddings = salience.load(out).get_input_embeddings()
    expected = qtensors(out)["model.embed_tokens"].dequantize()
    assert torch.equal(embeddings(torch.arange(VOCABULARY).view(2, -1)).flatten(0, 1), expected)
    plain = grid.quantize(floats["model.embed_tokens.weight"].float(), Scheme(3, 32))
    assert torch.equal(plain.dequantize(), expected)
    assert error(logits(salience.load(out)), logits(salience.load(folder))) < 0.8


def test_formats_whose_readers_keep_the_head_float(two: Path, tmp_path: Path) -> None:
    for options in ({"scheme": "w4g32"}, {"method": "nf4"}):
        rules = [("lm_head", options.get("scheme", "nf4"))]
        with pytest.raises(SalienceError, match="take lm_head for float; use --format compressed"):
            salience.quantize(str(two), tmp_path / "out", rules=rules, **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_only_an_early_block(
    method: str, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks behind the last that is coded do not read the text, also where one was interrupted:
    here the last of three would overflow."""
    model = make_model(llama_config(num_hidden_layers=3))
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight *= 1e38
    folder = save(model, tmp_path / "model")
    quantize = partial(
        salience.quantize,
        str(folder),
        method=method,
        scheme="w4g32",
        calibration=calibration,
        format="compressed-tensors",
        dtype="bfloat16",
    )
    with pytest.raises(SalienceError, match="the model overflows"):
        quantize(tmp_path / "all", only=["layers"])
    never_worse(quantize(tmp_path / "whole", only=[r"layers\.1\."]))
    kept = engine.save_solved

    def interrupted(job: Any, journal: Any, index: int, *more: Any) -> None:
        if index == 2:
            raise KeyboardInterrupt
        kept(job, journal, index, *more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "save_solved", interrupted)
        quantize(tmp_path / "parts", only=[r"layers\.1\."])
    never_worse(quantize(tmp_path / "parts", only=[r"layers\.1\."]))
    same_files(tmp_path / "whole", tmp_path / "parts")


def test_only_the_head(tied: Path, calibration: Calibration, tmp_path: Path) -> None:
    """No linear of a block: those are written float."""
    report = salience.quantize(
        str(tied),
        tmp_path / "out",
        scheme="w4g32",
        rules=[("lm_head", "w4g32")],
        only=["lm_head"],
        calibration=calibration,
        format="compressed-tensors",
    )
    never_worse(report)
    assert list(qtensors(tmp_path / "out")) == ["lm_head"]
    assert error(loads_again(tmp_path / "out"), logits(salience.load(tied))) < 0.2


@pytest.mark.parametrize("scheme", ["nf4", "nf4-dq", "fp4", "nf4g32", None])
def test_nf4(scheme: str | None, two: Path, calibration: Calibration, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = salience.quantize(str(two), out, method="nf4", scheme=scheme, calibration=calibration)
    assert (report.format, report.scheme) == ("bitsandbytes", scheme or "nf4")
    assert report.calibration is None and report.folds == []
    never_worse(report)
    assert all(linear.error == pytest.approx(linear.error_rtn) for linear in report.linears)
    config = config_of(out)["quantization_config"]
    assert config["quant_method"] == "bitsandbytes"
    assert config["bnb_4bit_use_double_quant"] == (scheme == "nf4-dq")
    assert config["bnb_4bit_quant_type"] == (scheme or "nf4")[:3]
    if scheme == "nf4g32":  # which only the tensors say
        assert {str(qt.scheme) for qt in qtensors(out).values()} == {scheme}
    assert len(qtensors(out)) == 2 * LINEARS
    limit = 0.8 if scheme == "fp4" else 0.6  # the coarser table
    assert error(loads_again(out), logits(salience.load(two))) < limit


def broken(kind: str, tmp_path: Path) -> Path:
    model = make_model(llama_config(num_hidden_layers=2))
    with torch.no_grad():
        for layer in model.model.layers:
            if kind == "dead channel":
                layer.input_layernorm.weight[5] = 0
                layer.post_attention_layernorm.weight[:3] = 0
                layer.self_attn.v_proj.weight[2] = 0
                layer.mlp.up_proj.weight[7] = 0
            elif kind == "zero group":
                layer.mlp.gate_proj.weight[3, :32] = 0
                layer.self_attn.q_proj.weight[:, 32:] = 0
                layer.mlp.down_proj.weight[4] = 0
            elif kind == "zero linear":
                layer.mlp.up_proj.weight.zero_()
                layer.self_attn.o_proj.weight.zero_()
    return save(model, tmp_path / "in")


@pytest.mark.parametrize("method", ["awq", "gptq", "balanced", "rtn"])
@pytest.mark.parametrize("kind", ["dead channel", "zero group", "zero linear", "one token"])
def test_little_to_see(method: str, kind: str, calibration: Calibration, tmp_path: Path) -> None:
    source, out = broken(kind, tmp_path), tmp_path / "out"
    text = calibration
    if kind == "one token":
        path = tmp_path / "text.txt"
        path.write_text("\0" * 400)  # a byte that is in no other token
        text = Calibration(str(path), samples=4, seqlen=64)
    options: dict[str, Any] = METHODS.get(method, {"method": method})
    report = salience.quantize(str(source), out, scheme="w4g32", calibration=text, **options)
    never_worse(report)
    written = dequantized(out)
    assert all(tensor.isfinite().all() for tensor in written.values())
    if kind == "zero group":
        assert not written["model.layers.1.mlp.gate_proj.weight"][3, :32].any()
        assert not written["model.layers.0.self_attn.q_proj.weight"][:, 32:].any()
    if kind == "zero linear":
        assert not written["model.layers.0.mlp.up_proj.weight"].any()
    found = loads_again(out)
    # What one token says of a model is not what the others need.
    assert error(found, logits(salience.load(source))) < (1.0 if kind == "one token" else 0.6)


def test_one_token_is_one_token(calibration: Calibration, two: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\0" * 400)
    text = Calibration(str(tmp_path / "text.txt"), samples=4, seqlen=64)
    assert len(text.tokens(open_source(str(two)).tokenizer).unique()) == 1


@pytest.mark.parametrize("method", ["awq", "gptq", "balanced"])
def test_the_bytes_do_not_depend_on_where_hidden_states_are(
    method: str,
    two: Path,
    calibration: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor on when it was run, nor on a rehearsal before it."""
    options: dict[str, Any] = METHODS.get(method, {"method": method})
    options |= {"scheme": "w4g32", "calibration": calibration, "rules": [("lm_head", "w4g32")]}
    options |= {"format": "compressed-tensors"}
    calls: list[Budget] = []
    right = pipeline.run_blocks

    def run_blocks(tasks: Any, tokens: Any, on_disk: bool, rehearse: bool) -> None:
        calls.append(Budget(on_disk, rehearse, 0))
        right(tasks, tokens, on_disk, rehearse)
        [(_, journal)] = tasks
        seen = [path.name for path in journal.folder.glob("hidden-*.bin")]
        assert bool(seen) == on_disk

    monkeypatch.setattr(pipeline, "run_blocks", run_blocks)
    for name, budget in {
        "memory": Budget(False, False, 0),
        "again": Budget(False, False, 0),
        "disk, rehearsed": Budget(True, True, 0),
    }.items():
        monkeypatch.setattr(pipeline, "choose_budget", lambda *_args, b=budget: b)
        report = salience.quantize(str(two), tmp_path / name, **options)
        assert calls[-1] == budget
        assert ("rehearsal" in report.phase_seconds) == budget.is_close
        same_files(tmp_path / "memory", tmp_path / name)


def test_blocks_that_share_state_are_rehearsed_in_no_other_order(
    calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest blocks take keys and values from earlier ones: they cannot run before them."""
    config = Gemma4TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        global_head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=16,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    source = save(make_model(config), tmp_path / "in")
    for name, rehearse in {"plain": False, "close": True}.items():
        budget = Budget(False, rehearse, 0)
        monkeypatch.setattr(pipeline, "choose_budget", lambda *_args, b=budget: b)
        report = salience.quantize(
            str(source), tmp_path / name, scheme="w4g16", calibration=calibration
        )
        never_worse(report)
    same_files(tmp_path / "plain", tmp_path / "close")


def test_max_memory_puts_hidden_states_on_the_disk(
    two: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = Calibration(str(text_file), samples=64, seqlen=64)
    seen: list[bool] = []
    right = pipeline.run_blocks

    def run_blocks(*args: Any) -> None:
        seen.append(args[2])
        right(*args)

    monkeypatch.setattr(pipeline, "run_blocks", run_blocks)
    for module in ("plan", "bytes"):
        monkeypatch.setattr(f"salience.planning.{module}.peak_rss_bytes", lambda: 0)
    options: dict[str, Any] = {"scheme": "w4g32", "calibration": calibration}
    salience.quantize(str(two), tmp_path / "memory", max_memory=2**33, **options)
    job = prepare(str(two), scheme="w4g32", device="cpu").job
    need = make_plan(job, calibration, tmp_path).ram_bytes
    salience.quantize(str(two), tmp_path / "disk", max_memory=need - 1, **options)
    assert seen == [False, True]
    same_files(tmp_path / "memory", tmp_path / "disk")
