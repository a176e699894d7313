"""Bits chosen within a target: what a width costs, the best choice, and a job that keeps it."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import salience
from helpers_checkpoint import same_files
from salience.blocks.block import row_errors, solve
from salience.blocks.job import Job
from salience.blocks.journal import Journal
from salience.calibration import Calibration
from salience.errors import SalienceError
from salience.inspection import inspect
from salience.pipeline import quantize as pipeline
from salience.pipeline import sensitivity, target
from salience.pipeline.allocation import Option, allocate
from salience.pipeline.engine import gather
from salience.pipeline.prepare import prepare
from salience.planning.plan import make_plan
from salience.reports.page import page
from salience.reports.report import Report
from salience.scheme import Scheme
from salience.source import open_source
from salience.stats import output_error
from salience.structure import weight_of
from tiny_architectures import COMMON, tiny_config
from tiny_models import error, llama_config, make_model, save

TARGET = 3.7


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[Option]], int]:
    """A few groups, and a budget between the least and the most they may take."""
    whole = st.integers(0, 30)
    costs = st.one_of(st.integers(0, 5).map(float), st.floats(0, 1e3, width=32))
    option = st.builds(Option, whole, costs)
    groups = draw(st.lists(st.lists(option, min_size=1, max_size=4), min_size=1, max_size=6))
    least, most = (sum(end(o.size for o in group) for group in groups) for end in (min, max))
    return groups, draw(st.integers(least, most + 1))


@given(problems())
@settings(max_examples=100, deadline=None)
def test_allocation_is_as_good_as_trying_all(problem: tuple[list[list[Option]], int]) -> None:
    groups, budget = problem

    def total(choice: tuple[int, ...] | list[int]) -> tuple[float, int]:
        taken = [group[o] for group, o in zip(groups, choice, strict=True)]
        return math.fsum(o.cost for o in taken), sum(o.size for o in taken)

    every = map(total, itertools.product(*(range(len(group)) for group in groups)))
    best = min(cost for cost, size in every if size <= budget)
    cost, size = total(allocate(groups, budget))
    assert size <= budget
    assert math.isclose(cost, best, rel_tol=1e-9, abs_tol=1e-12)


def test_allocation_of_a_large_model_is_quick_and_uses_the_budget() -> None:
    random = torch.Generator().manual_seed(0)
    groups = []
    for _ in range(320):
        weights = int(torch.randint(1, 40, (), generator=random)) * 999_983  # no common unit
        scale = float(torch.rand((), generator=random) ** 4)
        groups.append([Option(weights * b, scale * 4.0**-b) for b in (2, 3, 4, 8)])
    budget = sum(int(3.25 * group[0].size / 2) for group in groups)
    size = sum(group[o].size for group, o in zip(groups, allocate(groups, budget), strict=True))
    assert 0.999 * budget < size <= budget


def test_allocation_refuses_what_cannot_be() -> None:
    with pytest.raises(SalienceError, match="takes 7 bits, more than 6"):
        allocate([[Option(3, 0.0)], [Option(4, 1.0), Option(9, 0.0)]], 6)


@pytest.fixture(scope="module")
def calibration(text_file: Path) -> Calibration:
    return Calibration(str(text_file), samples=4, seqlen=48)


@pytest.fixture(scope="module")
def mixed(
    llama: Path, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Report]:
    out = tmp_path_factory.mktemp("mixed") / "out"
    return out, quantize(llama, out, calibration)


def quantize(model: Path, out: Path, calibration: Calibration, **options: Any) -> Report:
    values: dict[str, Any] = {"method": "gptq", "scheme": "w3g32", "format": "compressed-tensors"}
    values |= {"target_bits": TARGET, "device": "cpu"} | options
    return salience.quantize(str(model), out, calibration=calibration, **values)


def measured(
    folder: Path, calibration: Calibration, out: Path, **options: Any
) -> tuple[Job, list[sensitivity.Sensitivity], torch.Tensor]:
    values: dict[str, Any] = {"scheme": "w3g16", "format": "compressed-tensors"} | options
    job = prepare(str(folder), device="cpu", target_bits=4.2, **values).job
    tokens = calibration.tokens(job.source.tokenizer)
    with torch.no_grad(), Journal(out, {}) as journal:
        found = sensitivity.measure(job, journal, tokens, on_disk=False)
    return job, found, tokens


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_neox", "qwen3_moe"])
def test_costs_are_those_of_the_whole_model(
    kind: str, calibration: Calibration, tmp_path: Path
) -> None:
    """Streamed block by block in fp32, against one backward pass through the model in fp64 and the
    checkpoints of one width each."""
    folder = save(make_model(tiny_config(kind, **COMMON[kind])), tmp_path / "model")
    job, found, tokens = measured(folder, calibration, tmp_path / "out", method="gptq")
    # The kernel for stacked experts has no fp64.
    precise = torch.float32 if "moe" in kind else torch.float64
    model = job.skeleton.__class__.from_pretrained(folder, dtype=precise)
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in job.options}
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in job.options}
    for name in job.options:

        def note(_m: object, args: Any, out: torch.Tensor, name: str = name) -> None:
            inputs[name].append(args[0].detach().flatten(0, -2))
            outputs[name].append(out)

        model.get_submodule(name).register_forward_hook(note)
    random = torch.Generator().manual_seed(0)
    total = torch.zeros((), dtype=precise)
    for row in tokens:
        logits = model(input_ids=row[None], use_cache=False).logits
        direction = sensitivity.fisher_direction(logits.detach().float(), random)
        total = total + (logits * direction).sum()
    values = [out for name in job.options for out in outputs[name]]
    gradients = iter(torch.autograd.grad(total, values))
    squares = {
        name: torch.cat([next(gradients).flatten(0, -2) for _ in outputs[name]]).square()
        for name in job.options
    }
    costs = {}
    for bits in (2, 3, 4, 8):
        out = tmp_path / f"w{bits}"
        options = {"scheme": f"w{bits}g16", "target_bits": None}
        quantize(folder, out, calibration, **options)
        coded = salience.load(out, device="cpu", dtype=torch.float32, kernel="reference")
        for name in job.options:
            weight = model.get_submodule(name).weight.detach()
            change = coded.get_submodule(name).qtensor().dequantize() - weight
            errors = (torch.cat(inputs[name]) @ change.to(precise).T).square()
            g = squares[name]
            near = g.sum(1, keepdim=True) * g.sum(0) / g.sum()  # of rank one
            costs[name, bits] = 0.5 * (near * errors).sum().item() / tokens.numel()
    assert sorted(n for group in found for n in group.names) == sorted(job.options)
    for group in found:
        for bits, cost in group.costs.items():
            assert cost == pytest.approx(sum(costs[n, bits] for n in group.names), rel=3e-2)
        assert group.costs[2] > group.costs[4] > group.costs[8] > 0


def test_errors_of_rows_are_those_of_the_report(
    llama: Path, calibration: Calibration, tmp_path: Path
) -> None:
    """With scales folded in on both sides of a linear, and in units of its float output."""
    job = prepare(str(llama), scheme="w3g32", format="compressed-tensors", device="cpu").job
    tokens = calibration.tokens(job.source.tokenizer)
    with torch.no_grad(), Journal(tmp_path / "out", {}) as journal:
        for found in gather(job, journal, tokens, on_disk=False, parts=1):
            block = found.block
            second = {n: block.moments[g[0]].second for g in block.structure.groups for n in g}
            weights = {n: weight_of(block.module.get_submodule(n)).clone() for n in second}
            [solved] = solve([block], job.method, job.schemes.get)
            assert solved.scales
            for name, linear in solved.linears.items():
                energy = output_error(weights[name], second[name]).sum()
                rows = row_errors(block, solved, name, second[name])
                assert (rows.sum() / energy).item() == pytest.approx(linear.report.error, rel=1e-4)


def test_the_direction_has_the_fisher_information_for_covariance() -> None:
    logits = torch.tensor([1.0, -0.5, 0.3, 2.0])
    random = torch.Generator().manual_seed(0)
    found = sensitivity.fisher_direction(logits.expand(200_000, 4), random).double()
    p = logits.double().softmax(-1)
    assert error(found.T @ found / len(found), p.diag() - p[:, None] * p) < 0.02


def test_the_cost_is_the_divergence_of_a_small_change(
    llama: Path, calibration: Calibration, tmp_path: Path
) -> None:
    """At 8 bits, one linear at a time: the KL, but for rows and tokens that go together, of which a
    small random model has many."""
    _, found, tokens = measured(llama, calibration, tmp_path / "out", method="gptq")
    quantize(llama, tmp_path / "w8", calibration, scheme="w8g16", target_bits=None)
    coded = salience.load(tmp_path / "w8", device="cpu", kernel="reference")
    model = salience.load(llama, device="cpu", dtype=torch.float32).double()
    ratios = []
    with torch.no_grad():
        clean = model(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
        for group in found:
            saved = [model.get_submodule(name).weight.clone() for name in group.names]
            for name in group.names:
                value = coded.get_submodule(name).qtensor().dequantize()
                model.get_submodule(name).weight.copy_(value)
            moved = model(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
            for name, weight in zip(group.names, saved, strict=True):
                model.get_submodule(name).weight.copy_(weight)
            kl = (clean.exp() * (clean - moved)).sum(-1).mean().item()
            ratios.append(group.costs[8] / kl)
    assert min(ratios) > 0.5 and max(ratios) < 4
    assert 0.5 < math.exp(sum(map(math.log, ratios)) / len(ratios)) < 2


def test_a_checkpoint_within_the_budget(mixed: tuple[Path, Report]) -> None:
    out, report = mixed
    assert report.bits_per_weight <= TARGET
    # One step of the smallest group more would be above it.
    assert report.bits_per_weight > TARGET - 0.2
    schemes = {linear.name: Scheme.parse(linear.scheme) for linear in report.linears}
    assert len({scheme.bits for scheme in schemes.values()}) > 1
    assert {(scheme.group_size, scheme.sym) for scheme in schemes.values()} == {(32, False)}
    size = count = 0.0
    for linear in report.linears:
        weights = linear.in_features * linear.out_features
        size += weights * schemes[linear.name].bits_per_weight(linear.in_features)
        count += weights
    assert report.bits_per_weight == pytest.approx(size / count)
    stored = {m.name: m.scheme for m in inspect(open_source(str(out))).modules}
    assert {name: str(scheme) for name, scheme in schemes.items()} == {
        name: str(stored[name]) for name in schemes
    }


def test_the_choice_is_in_the_report(mixed: tuple[Path, Report]) -> None:
    out, report = mixed
    found = report.allocation
    assert found == json.loads((out / "salience_report.json").read_text())["allocation"]
    assert sum(found["linears_of_bits"].values()) == len(report.linears)
    expected = found["expected_kl"]
    assert expected == pytest.approx(
        sum(group["costs"][str(group["bits"])] for group in found["groups"])
    )
    assert found["expected_kl_of"]["8"] < expected < found["expected_kl_of"]["3"]
    assert "Bits of each linear" in page(report)


def test_what_runtimes_fuse_has_one_width(mixed: tuple[Path, Report]) -> None:
    _, report = mixed
    schemes = {linear.name: linear.scheme for linear in report.linears}
    for i in range(3):
        block = f"model.layers.{i}"
        assert len({schemes[f"{block}.self_attn.{n}_proj"] for n in "qkv"}) == 1
        assert len({schemes[f"{block}.mlp.{n}_proj"] for n in ("gate", "up")}) == 1
    assert not any("are one linear there" in each["problem"] for each in report.serving)


def test_it_is_better_than_one_width_of_the_same_size(
    mixed: tuple[Path, Report], llama: Path, calibration: Calibration, tmp_path: Path
) -> None:
    """Of a random model, whose linears differ, at the size of 3 bits for all."""
    job, found, tokens = measured(llama, calibration, tmp_path / "out", scheme="w3g32")
    del job, tokens
    assert sum(g.costs[3] for g in found) > mixed[1].allocation["expected_kl"]


def test_gptq_holds_several_widths(llama: Path, calibration: Calibration, tmp_path: Path) -> None:
    report = quantize(llama, tmp_path / "out", calibration, scheme="w4g32-sym", format="gptq")
    model = salience.load(tmp_path / "out", device="cpu")
    for linear in report.linears:
        assert str(model.get_submodule(linear.name).scheme) == linear.scheme
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    fused = [key for key in config["dynamic"] if "qkv_proj" in key or "gate_up_proj" in key]
    assert fused  # the name that vLLM looks for
    assert config["sym"] and config["checkpoint_format"] == "gptq"


def test_rules_are_kept_and_count(llama: Path, calibration: Calibration, tmp_path: Path) -> None:
    rules = [("layers.0.mlp.down", "w8g32"), ("lm_head", "w8g32")]
    report = quantize(
        llama, tmp_path / "out", calibration, rules=rules, skip=["layers.2.self_attn"]
    )
    schemes = {linear.name: linear.scheme for linear in report.linears}
    assert {schemes[name] for name in schemes if "layers.0.mlp.down" in name} == {"w8g32"}
    assert not any("layers.2.self_attn" in name for name in schemes)
    inside = [linear for linear in report.linears if linear.name != "lm_head"]
    weights = [linear.in_features * linear.out_features for linear in inside]
    bits = [Scheme.parse(x.scheme).bits_per_weight(x.in_features) for x in inside]
    mean = sum(w * b for w, b in zip(weights, bits, strict=True)) / sum(weights)
    assert TARGET - 0.3 < mean <= TARGET < report.bits_per_weight


def test_an_interrupted_job_goes_on_with_its_choice(
    mixed: tuple[Path, Report],
    llama: Path,
    calibration: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, _ = mixed

    def stop(report: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(llama, tmp_path / "out", calibration, on_block=stop)

    def never(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(target, "measure", never)
    quantize(llama, tmp_path / "out", calibration)
    same_files(tmp_path / "out", out)


def test_another_target_is_another_job(
    llama: Path, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "choose", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize(llama, tmp_path / "out", calibration)
    with pytest.raises(SalienceError, match=r"--target-bits 3\.7, now it is 4"):
        quantize(llama, tmp_path / "out", calibration, target_bits=4.0)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "awq": ({"format": "awq", "method": "awq"}, "awq holds 4-bit codes, not w3g32"),
    "awq at 4": (
        {"format": "awq", "scheme": "w4g32"},
        "holds only w4g32 here; use --format compressed-tensors or gptq",
    ),
    "gguf": ({"format": "gguf", "scheme": "w4g32"}, "holds only w4g32 here"),
    "dense": ({"format": "dense", "method": "awq"}, "--format dense holds only"),
    "rtn": ({"method": "rtn"}, "--method rtn reads none; use --method awq or gptq"),
    "too little": ({"target_bits": 2.1}, "2.1 is below the 2.562 bits .* at w2g32; use .* more"),
    "too much": ({"target_bits": 9.0}, "9.0 is above the 8.75 bits .* at w8g32; use .* less"),
    "no number": ({"target_bits": math.nan}, "--target-bits is nan"),
    "all have rules": ({"rules": [(".", "w4g32")]}, "holds only rules"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what: str, llama: Path, calibration: Calibration, tmp_path: Path) -> None:
    options, message = REFUSED[what]
    with pytest.raises(SalienceError, match=message) as refusal:
        quantize(llama, tmp_path / "out", calibration, **options)
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_symmetric_gguf_mixes_4_and_8_bits(llama: Path) -> None:
    job = prepare(str(llama), scheme="w4g32-sym", format="gguf", target_bits=5.0).job
    assert {s.bits for schemes in job.options.values() for s in schemes} == {4, 8}


def test_widths_that_nothing_serves_are_left_out_for_several_gpus(
    tmp_path: Path,
) -> None:
    config = llama_config(hidden_size=256, intermediate_size=512, num_key_value_heads=4)
    folder = save(make_model(config), tmp_path / "wide")
    options: dict[str, Any] = {"scheme": "w4g64-sym", "format": "compressed-tensors"}
    every = prepare(str(folder), target_bits=5.0, **options).job.options
    served = prepare(str(folder), target_bits=5.0, tensor_parallel=1, **options).job.options
    assert {s.bits for each in every.values() for s in each} == {2, 3, 4, 8}
    assert {4, 8} <= {s.bits for each in served.values() for s in each}
    options["scheme"] = "w4g64"  # of zeros, only 4 bits are served
    with pytest.raises(SalienceError, match="holds only w4g64 here"):
        prepare(str(folder), target_bits=5.0, tensor_parallel=1, **options)


def test_the_plan_knows_size_and_time(
    llama: Path, calibration: Calibration, mixed: tuple[Path, Report], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"method": "gptq", "scheme": "w3g32", "device": "cpu"}
    options |= {"format": "compressed-tensors", "prove": False}
    job = prepare(str(llama), target_bits=TARGET, **options).job
    plan = make_plan(job, calibration, tmp_path)
    usual = make_plan(prepare(str(llama), **options).job, calibration, tmp_path)
    assert plan.bits_per_weight == TARGET
    assert plan.seconds["sensitivity"] > 0 and "sensitivity" not in usual.seconds
    written = (mixed[0] / "model.safetensors").stat().st_size
    assert plan.disk_bytes == pytest.approx(written, rel=0.1)
