"""The plan against what quantize() then writes."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config

import salience
from helpers_checkpoint import refuse
from salience.calibration import Calibration
from salience.cli.app import main
from salience.errors import DoesNotFitError, SalienceError
from salience.formats import AutoAwq, Gguf
from salience.methods import Method, get_method
from salience.pipeline.prepare import prepare
from salience.planning import bytes as plan_bytes
from salience.planning import plan as module
from salience.planning import seconds as plan_seconds
from salience.planning.bytes import checkpoint_bytes, device_memory
from salience.planning.plan import Budget, Plan, choose_budget, make_plan
from salience.recipe import Recipe
from salience.reports.report import read_report
from salience.scheme import Scheme
from salience.source import open_source
from salience.structure import find_blocks, linears
from tiny_models import VOCABULARY, llama_config, make_model, save

CPU = torch.device("cpu")


def schemes_of(model: Any, recipe: Recipe) -> dict[str, Scheme]:
    return recipe.resolve(list(linears(model)), find_blocks(model)[0])


def plan(
    folder: Path,
    scheme: str,
    method: str = "awq",
    samples: int = 8,
    out: Path | None = None,
    effort: str = "fast",
    rules: tuple[tuple[str, Scheme], ...] = (),
    fmt: str = "awq",
    max_memory: int | None = None,
    only: tuple[str, ...] = (),
) -> Plan:
    job = prepare(
        str(folder),
        method=method,
        effort=effort,
        scheme=scheme,
        rules=rules,
        only=only,
        format=fmt,
        device="cpu",
    ).job
    text = Calibration(samples=samples, seqlen=128) if job.method.reads_text else None
    return make_plan(job, text, out or folder, max_memory)


def budget(folder: Path, max_memory: int | None, method: str = "awq", samples: int = 64) -> Budget:
    source = open_source(str(folder))
    model, chosen = source.skeleton(), get_method(method)
    return choose_budget(
        source,
        model,
        schemes_of(model, Recipe(Scheme(4, 32))),
        Calibration(samples=samples, seqlen=128) if chosen.reads_text else None,
        chosen,
        CPU,
        max_memory,
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_seconds, "matmul_flops", lambda _device, _size: 1e11)
    for each in (module, plan_bytes):
        monkeypatch.setattr(each, "peak_rss_bytes", lambda: 2**28)


@pytest.mark.parametrize("scheme", ["w4g16", "w4g32", "w4g64"])
def test_bytes_are_those_of_the_checkpoint(scheme: str, llama: Path, tmp_path: Path) -> None:
    expected = plan(llama, scheme)
    report = salience.quantize(str(llama), tmp_path / "out", method="rtn", scheme=scheme)
    tensors = load_file(tmp_path / "out" / "model.safetensors").values()
    assert expected.disk_bytes == pytest.approx(sum(t.nbytes for t in tensors), rel=0.01)
    assert expected.bits_per_weight == report.bits_per_weight
    assert expected.quantized_parameters == sum(
        linear.in_features * linear.out_features for linear in report.linears
    )
    source = load_file(llama / "model.safetensors").values()
    assert expected.source_bytes == sum(t.nbytes for t in source)
    assert expected.parameters == sum(t.numel() for t in source)


def test_tied_embeddings_and_biases_are_counted_once(tmp_path: Path) -> None:
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=0,
    )
    source = save(make_model(config), tmp_path / "in")
    expected = plan(source, "w4g32")
    salience.quantize(str(source), tmp_path / "out", method="rtn", scheme="w4g32")
    tensors = load_file(tmp_path / "out" / "model.safetensors").values()
    assert expected.disk_bytes == pytest.approx(sum(t.nbytes for t in tensors), rel=0.01)


def test_group_that_does_not_fit(llama: Path, tmp_path: Path) -> None:
    message = r"group size 128 does not divide the 64 inputs .*: w4g64, w4g32, w4g16$"
    with pytest.raises(SalienceError, match=message):
        plan(llama, "w4g128")
    odd = save(make_model(llama_config(intermediate_size=120)), tmp_path / "odd")
    message = r"the 120 inputs of model\.layers\.0\.mlp\.down_proj; .*: none of the usual ones$"
    with pytest.raises(SalienceError, match=message):
        plan(odd, "w4g32")


def test_format_that_does_not_fit(llama: Path) -> None:
    with pytest.raises(SalienceError, match="--format awq holds 4-bit codes, not w3g32"):
        plan(llama, "w3g32")


def test_memory_grows_with_the_text_not_with_the_layers(llama: Path, tmp_path: Path) -> None:
    deep = save(make_model(llama_config(num_hidden_layers=12)), tmp_path / "deep")
    base = plan(llama, "w4g32").ram_bytes
    more_text = plan(llama, "w4g32", samples=8 + 1024).ram_bytes
    assert more_text - base >= 1024 * 128 * 64 * 4
    assert plan(deep, "w4g32").ram_bytes == base


def test_what_does_not_fit_is_said(
    llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fine = plan(llama, "w4g32")
    assert fine.fits and fine.advice == [] and fine.vram_bytes == 0
    assert not fine.hidden_on_disk
    # Half-finished blocks, and hidden states before and after a block.
    assert fine.temporary_bytes == fine.disk_bytes + 2 * 8 * 128 * 64 * 4
    monkeypatch.setattr(module, "available_ram_bytes", lambda: 1000)
    monkeypatch.setattr(module, "free_disk_bytes", lambda _path: 1000)
    tight = plan(llama, "w4g32", out=tmp_path)
    assert not tight.fits and tight.hidden_on_disk and len(tight.advice) == 2
    assert tight.advice[0] == (
        f"{llama} needs {tight.ram_bytes / 2**30:.1f} GiB on cpu and has 0.3 GiB; "
        "use a shorter --seqlen, --method rtn or a larger machine"
    )
    short = (tight.disk_bytes + tight.temporary_bytes - 1000) / 2**20
    assert tight.advice[1] == (
        f"the disk of {tmp_path} is short by {short:.0f} MiB; name another --out"
    )
    plain = plan(llama, "w4g32", method="rtn", max_memory=1000)
    assert "use --method rtn or a larger --max-memory" in plain.advice[0]


def test_hidden_states_go_to_the_disk_before_the_work_is_refused(llama: Path) -> None:
    roomy = plan(llama, "w4g32", samples=4096)
    assert roomy.fits and not roomy.hidden_on_disk
    cap = roomy.ram_bytes - 1
    tight = plan(llama, "w4g32", samples=4096, max_memory=cap)
    assert tight.fits and tight.hidden_on_disk and tight.ram_bytes <= cap
    hidden = 4096 * 128 * 64 * 4
    assert roomy.ram_bytes - tight.ram_bytes == pytest.approx(hidden, rel=0.1)
    none = plan(llama, "w4g32", samples=4096, max_memory=tight.ram_bytes // 2)
    assert not none.fits and none.hidden_on_disk


def test_budget(llama: Path) -> None:
    """In memory, in memory but close, on the disk, not at all: as the cap sinks."""
    far = budget(llama, 2**40)
    assert far == Budget(on_disk=False, is_close=False, temporary_bytes=2 * 4 * 64 * 128 * 64)
    low, high = 0, 2**40  # what it needs in memory, by bisection
    while high - low > 1:
        middle = (low + high) // 2
        try:
            fits = not budget(llama, middle).on_disk
        except DoesNotFitError:
            fits = False
        low, high = (low, middle) if fits else (middle, high)
    in_memory = high
    assert not budget(llama, in_memory).on_disk and budget(llama, in_memory).is_close
    assert not budget(llama, 2 * in_memory).is_close
    assert budget(llama, in_memory - 1).on_disk
    with pytest.raises(DoesNotFitError, match="use a shorter --seqlen, --method rtn or a larger"):
        budget(llama, 1000)
    assert budget(llama, 2**40, method="rtn").temporary_bytes == 0
    assert not budget(llama, None).on_disk  # what this machine has


def test_memory_by_phase(llama: Path) -> None:
    model = open_source(str(llama)).skeleton()
    schemes = schemes_of(model, Recipe(Scheme(4, 32)))
    text = Calibration(samples=64, seqlen=128)

    def memory(method: str, on_disk: bool = False, effort: str = "fast") -> dict[str, int]:
        chosen = get_method(method, effort)
        read = text if chosen.reads_text else None
        return device_memory(model, schemes, read, chosen, CPU, on_disk)

    phases = {"embeddings", "statistics", "folds", "search", "write"}
    assert set(memory("awq")) == phases and set(memory("rtn")) == {"search", "write"}
    hidden = 4 * 64 * 128 * 64
    for phase in phases - {"write"}:
        assert memory("awq")[phase] - memory("awq", on_disk=True)[phase] == hidden
    assert memory("awq")["write"] == 4 * VOCABULARY * 64
    # GPTQ holds factors of H beside it.
    assert memory("awq", effort="balanced")["search"] >= memory("awq")["search"]
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    assert memory("awq")["statistics"] >= 4 * (block + 64**2 * 2 + 128**2) + hidden
    assert memory("rtn")["search"] >= 4 * block
    awq = plan(llama, "w4g32", samples=64)
    assert awq.memory == memory("awq")
    assert awq.ram_bytes > 2**28 + max(awq.memory.values())


def test_memory_of_tuning(llama: Path) -> None:
    """What grows with the text goes to the disk, and codes with it."""
    model = open_source(str(llama)).skeleton()
    schemes = schemes_of(model, Recipe(Scheme(3, 32)))
    best, tokens = get_method("awq", "best"), 64 * 128

    def memory(on_disk: bool, samples: int = 64, seqlen: int = 128) -> int:
        text = Calibration(samples=samples, seqlen=seqlen)
        return device_memory(model, schemes, text, best, CPU, on_disk)["end to end"]

    blocks = sum(p.numel() for p in model.model.layers.parameters())
    hidden = 4 * tokens * 64
    assert memory(False) - memory(True) == hidden + blocks
    assert memory(True, samples=1024) == memory(True, samples=512)  # 4096 tokens a step at most
    assert memory(True, samples=128, seqlen=256) > memory(True, samples=64, seqlen=128)
    groups = sum(model.get_submodule(name).weight.numel() // 32 for name in schemes)
    assert memory(True) > 4 * (8 * groups + 4 * 512 * (64 + 128) + blocks // 3)
    with_it = budget_of(llama, best)
    assert with_it.temporary_bytes > budget_of(llama, get_method("awq", "balanced")).temporary_bytes


def budget_of(folder: Path, method: Method) -> Budget:
    source = open_source(str(folder))
    model = source.skeleton()
    schemes = schemes_of(model, Recipe(Scheme(4, 32)))
    text = Calibration(samples=64, seqlen=128)
    return choose_budget(source, model, schemes, text, method, CPU, None)


def test_time_of_tuning(llama: Path) -> None:
    """As long as the text, and longer than the statistics."""
    best = {n: plan(llama, "w4g32", effort="best", samples=n).seconds for n in (64, 640)}
    assert set(best[64]) == {"read", "statistics", "search", "learn", "end to end"}
    assert best[64]["end to end"] > best[64]["statistics"]
    assert "end to end" not in plan(llama, "w4g32", effort="balanced").seconds
    assert best[640]["end to end"] > 3 * best[64]["end to end"]


def test_time_by_phase(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cost = plan_seconds._Cost(start=1e-5, row=1e-8)
    monkeypatch.setattr(plan_seconds, "_search_cost", lambda *_args: cost)
    awq, rtn = plan(llama, "w4g32"), plan(llama, "w4g32", method="rtn")
    assert set(awq.seconds) == {"read", "statistics", "search"}
    assert set(rtn.seconds) == {"read", "search"}
    assert all(seconds > 0 for seconds in (*awq.seconds.values(), *rtn.seconds.values()))
    assert rtn.seconds["search"] < awq.seconds["search"]
    gptq = plan(llama, "w4g32", method="gptq").seconds
    longer = plan(llama, "w4g32", method="gptq", samples=80).seconds
    assert longer["statistics"] == pytest.approx(10 * gptq["statistics"])
    assert longer["search"] == gptq["search"]
    # Folds are proved on one micro-batch, however long the text is.
    longer = plan(llama, "w4g32", samples=80).seconds
    assert gptq["statistics"] < awq.seconds["statistics"]
    assert awq.seconds["statistics"] < longer["statistics"] < 10 * awq.seconds["statistics"]
    assert longer["search"] == awq.seconds["search"]
    assert rtn.ram_bytes <= awq.ram_bytes


def test_time_of_some_blocks(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text goes no further than the last that is coded; what is not coded takes no search."""
    cost = plan_seconds._Cost(start=1e-5, row=1e-8)
    monkeypatch.setattr(plan_seconds, "_search_cost", lambda *_args: cost)
    args = {"method": "gptq", "fmt": "gptq"}
    count = len(find_blocks(open_source(str(llama)).skeleton())[1])
    whole, first, last = (
        plan(llama, "w4g32", **args, only=only).seconds
        for only in ((), (r"layers\.0\.",), (rf"layers\.{count - 1}\.",))
    )
    assert first["statistics"] == pytest.approx(whole["statistics"] / count)
    assert last["statistics"] == pytest.approx(whole["statistics"])
    assert first["search"] == pytest.approx(last["search"])
    assert first["search"] == pytest.approx(whole["search"] / count)
    learned = plan(llama, "w4g32", effort="best", only=(r"layers\.0\.",)).seconds
    assert learned["statistics"] > first["statistics"]


@pytest.mark.parametrize(
    ("method", "effort", "scheme"),
    [
        ("awq", "fast", "w4g32"),
        ("awq", "balanced", "w3g32"),
        ("gptq", "fast", "w4channel"),
        ("rtn", "fast", "w4g128"),
        ("nf4", "fast", "nf4"),
    ],
)
def test_the_small_search_is_that_of_the_method(method: str, effort: str, scheme: str) -> None:
    cost = plan_seconds._search_cost(Scheme.parse(scheme), get_method(method, effort), CPU)
    assert 0 <= cost.start < 1 and 0 <= cost.row < 1 and cost.start + cost.row > 0


def test_more_than_one_scheme(llama: Path, tmp_path: Path) -> None:
    rules = (("down_proj", Scheme(8, 32)), ("lm_head", Scheme(8, 64)))
    expected = plan(llama, "w3g32", rules=rules, fmt="compressed-tensors")
    assert expected.scheme == "w3g32 w8g32 w8g64"
    report = salience.quantize(
        str(llama),
        tmp_path / "out",
        method="rtn",
        scheme="w3g32",
        rules=rules,
        format="compressed-tensors",
    )
    assert expected.bits_per_weight == report.bits_per_weight
    assert expected.quantized_parameters == sum(
        linear.in_features * linear.out_features for linear in report.linears
    )
    found = [
        linear.in_features
        * linear.out_features
        * Scheme.parse(linear.scheme).bits_per_weight(linear.in_features)
        for linear in report.linears
    ]
    assert expected.bits_per_weight == pytest.approx(
        sum(found) / expected.quantized_parameters, rel=1e-9
    )


def test_no_weights_are_read(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_args: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("salience.checkpoint.SafetensorsCheckpoint.tensor", read)
    assert plan(llama, "w4g32").parameters == make_model(llama_config()).num_parameters()


def test_checkpoint_bytes_by_hand(llama: Path) -> None:
    model = open_source(str(llama)).skeleton()
    per_block = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128
    floats = 2 * VOCABULARY * 64 + 64 + 3 * 2 * 64
    codes = 3 * per_block // 2
    groups = 3 * per_block // 32 * 20 // 8
    schemes = schemes_of(model, Recipe(Scheme(4, 32)))
    assert checkpoint_bytes(model, schemes, AutoAwq()) == codes + groups + 2 * floats
    # GGUF has a scale and a minimum for each 32 columns: 20 bytes.
    assert checkpoint_bytes(model, schemes, Gguf()) == 3 * per_block // 32 * 20 + 2 * floats


def refused(*words: str, **options: Any) -> None:
    refuse(lambda: prepare(device="cpu", **options), *words)


def test_padding_and_gpus_as_quantize_takes_them(tmp_path: Path) -> None:
    """What is planned is what is made, and what is refused is refused before."""
    odd = str(save(make_model(llama_config(intermediate_size=72)), tmp_path / "odd"))
    refused("group size 64 does not divide the 72 inputs", model=odd, scheme="w4g64")
    prepared = prepare(odd, scheme="w4g64", method="rtn", device="cpu", pad_intermediate=64)
    assert prepared.padding == (72, 128)
    expected = make_plan(prepared.job, None, tmp_path)
    out = tmp_path / "out"
    salience.quantize(odd, out, method="rtn", scheme="w4g64", pad_intermediate=64)
    tensors = load_file(out / "model.safetensors").values()
    assert expected.disk_bytes == pytest.approx(sum(t.nbytes for t in tensors), rel=0.01)
    assert [asdict(each) for each in prepared.serving] == read_report(out).serving
    refused("on each of 2", "layers.0", model=odd, scheme="w4g8", tensor_parallel=2)
    refused("--tensor-parallel is 0", model=odd, scheme="w4g8", tensor_parallel=0)


def test_padding_is_planned_without_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read(*_args: object) -> None:
        raise AssertionError("a weight was read")

    odd = save(make_model(llama_config(intermediate_size=72)), tmp_path / "odd")
    monkeypatch.setattr("salience.checkpoint.SafetensorsCheckpoint.tensor", read)
    options = ["--scheme", "w4g64", "--pad-intermediate", "64", "--out", str(tmp_path)]
    for more in ([], ["--json"]):
        monkeypatch.setattr("sys.argv", ["salience", "plan", str(odd), *options, *more])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
    text, _, json_line = capsys.readouterr().out.rstrip().rpartition("\n")
    assert "72 widened to 128" in text and "vLLM and SGLang" in text
    values = json.loads(json_line)
    assert values["intermediate_size"] == [72, 128]
    assert {each["runtime"] for each in values["serving"]} == {"vllm", "sglang"}
