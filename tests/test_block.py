"""solve(): blocks side by side as each alone, folds proved, and never worse than plain rounding."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from salience import grid
from salience.blocks.block import LoadedBlock, SolvedBlock, Structure, fold_scales, solve
from salience.blocks.blockwise import BlockArguments, observe, record_inputs, run_block
from salience.errors import SalienceError
from salience.grid import Grid
from salience.methods import AWQ, AWQ_GPTQ, GPTQ, NF4, RTN, FoldScale, Method, Problem
from salience.scheme import Scheme
from salience.stats import SecondMoment
from salience.structure import Fold, discover_folds, linears, sink_groups, weight_of
from tiny_models import error, llama_config, make_model, random_tokens

CPU = torch.device("cpu")
METHODS = {"awq": AWQ, "gptq": GPTQ, "awq+gptq": AWQ_GPTQ, "rtn": RTN}
Make = Callable[[], list[LoadedBlock]]


@pytest.fixture(scope="module")
@torch.no_grad()
def make() -> Make:
    """The three blocks of a tiny Llama with their moments, as new each time."""
    model = make_model(llama_config())
    blocks = model.model.layers
    tokens = random_tokens(4, 40)
    parts: list[Tensor] = []
    arguments = record_inputs(model, blocks, tokens, 4, CPU, lambda _, h: parts.append(h))
    hidden = parts[0]
    probe = partial(run_block, blocks[0], hidden[:2], arguments.of(0, 0))
    groups = sink_groups(blocks[0], probe)
    structure = Structure(groups, discover_folds(blocks[0], probe, groups))
    assert len(structure.folds) == 4
    ready: list[tuple[str, nn.Module, dict[str, SecondMoment], Tensor]] = []
    for i, block in enumerate(blocks):
        moments = {
            names[0]: SecondMoment.empty(weight_of(block.get_submodule(names[0])).shape[1])
            for names in groups
        }
        run = partial(run_block, block, hidden, arguments.of(i, 0))
        after = observe(block, list(moments), run, lambda name, x, m=moments: m[name].update(x))
        ready.append((f"model.layers.{i}", block, moments, hidden))
        hidden = after

    def fresh() -> list[LoadedBlock]:
        return [loaded(*each, structure, arguments, i) for i, each in enumerate(ready)]

    return fresh


def loaded(
    name: str,
    block: nn.Module,
    moments: dict[str, SecondMoment],
    hidden: Tensor,
    structure: Structure,
    arguments: BlockArguments,
    index: int,
) -> LoadedBlock:
    module = deepcopy(block)
    run = partial(run_block, module, hidden, arguments.of(index, 0))
    return LoadedBlock(name, module, structure, moments, run)


def without_text(blocks: list[LoadedBlock]) -> list[LoadedBlock]:
    """As the pipeline makes them for a method that reads none."""
    plain = Structure([(name,) for name in linears(blocks[0].module)], [])
    return [replace(block, structure=plain, moments={}, run=None) for block in blocks]


def of_all(scheme: str) -> Callable[[str], Scheme | None]:
    return lambda _name: Scheme.parse(scheme)


def same(a: SolvedBlock, b: SolvedBlock) -> None:
    assert list(a.linears) == list(b.linears)
    for name, one in a.linears.items():
        other = b.linears[name]
        assert torch.equal(one.qtensor.q, other.qtensor.q), name
        assert torch.equal(one.qtensor.scales, other.qtensor.scales)
        assert torch.equal(one.qtensor.zeros, other.qtensor.zeros)
        assert torch.equal(one.grid.scales, other.grid.scales)
        mine, theirs = asdict(one.report), asdict(other.report)
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            wanted = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert mine[key] == wanted, (name, key)
    assert [c.fold.prev for c in a.scales] == [c.fold.prev for c in b.scales]
    for left, right in zip(a.scales, b.scales, strict=True):
        assert (left.alpha, left.beta) == (right.alpha, right.beta)
        assert torch.equal(left.scales, right.scales)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", ["w4g32", "w3g16-sym", "w2channel"])
@torch.no_grad()
def test_blocks_side_by_side_are_solved_as_each_alone(make: Make, method: str, scheme: str) -> None:
    def blocks() -> list[LoadedBlock]:
        return without_text(make()) if method == "rtn" else make()

    together = solve(blocks(), METHODS[method], of_all(scheme))
    folded = blocks()
    alone = [solve([block], METHODS[method], of_all(scheme))[0] for block in folded]
    for found, expected in zip(together, alone, strict=True):
        same(found, expected)
        assert len(found.linears) == 7
    assert len({str(solved.linears["mlp.up_proj"].qtensor.q.tolist()) for solved in together}) == 3
    if METHODS[method].folds:
        assert any(solved.scales for solved in together)


def check_reports(
    blocks: list[LoadedBlock], solved: list[SolvedBlock], slack: float = 1e-5
) -> None:
    for block, each in zip(blocks, solved, strict=True):
        for name, coded in each.linears.items():
            report = coded.report
            assert report.name == block.full(name)
            shape = (report.out_features, report.in_features)
            assert (
                shape == coded.qtensor.q.shape == weight_of(block.module.get_submodule(name)).shape
            )
            assert report.scheme == str(coded.qtensor.scheme)
            assert report.error <= report.error_rtn * (1 + slack), name


@pytest.mark.parametrize("method", ["awq", "gptq", "awq+gptq"])
@torch.no_grad()
def test_never_worse_than_plain_rounding(make: Make, method: str) -> None:
    for scheme in ("w4g32", "w3g64", "w8g16", "w2g16-sym", "w4channel"):
        blocks = make()
        solved = solve(blocks, METHODS[method], of_all(scheme))
        # Rows that were divided and then rounded plainly have other fp16 scales.
        check_reports(blocks, solved, 1e-2)
        for each in solved:
            gained = [
                coded.report.error < 0.95 * coded.report.error_rtn
                for coded in each.linears.values()
            ]
            assert scheme == "w8g16" or sum(gained) >= 4


@torch.no_grad()
def test_folds_keep_the_function(make: Make) -> None:
    """What is left in the module is the float block, its scales folded in."""
    blocks = make()
    before = [block.run() for block in blocks if block.run is not None]
    solved = solve(blocks, AWQ, of_all("w3g32"))
    assert sum(len(each.scales) for each in solved) >= 3
    for block, reference in zip(blocks, before, strict=True):
        assert block.run is not None and error(block.run(), reference) < 1e-5


@torch.no_grad()
def test_schemes_may_differ_within_a_group(make: Make) -> None:
    schemes = {
        "self_attn.q_proj": Scheme(4, 32),
        "self_attn.k_proj": Scheme(3, 16),
        "self_attn.v_proj": Scheme(8, -1),
        "mlp.gate_proj": Scheme(2, 16, True),
        "mlp.up_proj": Scheme(4, 32),
        "self_attn.o_proj": Scheme(4, 64),
        "mlp.down_proj": Scheme(8, 128),
    }

    def of(name: str) -> Scheme | None:
        return schemes[name.split(".", 3)[3]]

    for method in METHODS.values():
        blocks = without_text(make()) if method is RTN else make()
        solved = solve(blocks, method, of)
        check_reports(blocks, solved, 1e-2)
        for each in solved:
            for name, coded in each.linears.items():
                assert coded.qtensor.scheme == schemes[name]
                assert coded.qtensor.q.max() <= schemes[name].levels


@torch.no_grad()
def test_schemes_may_differ_between_blocks(make: Make) -> None:
    """Blocks of other schemes are another batch; the results come in the order of the blocks."""

    def of(name: str) -> Scheme | None:
        return Scheme(8, 32) if name == "model.layers.1.mlp.down_proj" else Scheme(3, 32)

    found = solve(make(), AWQ, of)
    assert [each.linears["mlp.down_proj"].qtensor.scheme.bits for each in found] == [3, 8, 3]
    for i, each in enumerate(found):
        same(each, solve([make()[i]], AWQ, of)[0])


@torch.no_grad()
def test_linears_that_stay_float(make: Make) -> None:
    """They are not coded; of a fold they may still be the source, and a sink."""
    skipped = {"mlp.up_proj", "self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"}

    def of(name: str) -> Scheme | None:
        return None if name.split(".", 3)[3] in skipped else Scheme(3, 16)

    for method in METHODS.values():
        blocks = without_text(make()) if method is RTN else make()
        reference = [block.run() for block in make() if block.run is not None]
        solved = solve(blocks, method, of)
        for block, each, before in zip(blocks, solved, reference, strict=True):
            assert set(each.linears) == set(linears(block.module)) - skipped
            assert block.run is None or error(block.run(), before) < 1e-5
            # No sink of this fold is coded, so that there is nothing to protect.
            assert "input_layernorm" not in [choice.fold.prev for choice in each.scales]


@torch.no_grad()
def test_a_fold_that_fails_on_real_inputs_is_dropped(make: Make) -> None:
    """A fold with a wrong index: the others stay, and the function too."""
    structure = deepcopy(make()[0].structure)
    wrong = next(fold for fold in structure.folds if fold.prev == "post_attention_layernorm")
    wrong.index.copy_(wrong.index.roll(1))
    blocks = [replace(block, structure=structure) for block in make()]
    before = [block.run() for block in blocks if block.run is not None]
    for block, each, reference in zip(
        blocks, solve(blocks, AWQ, of_all("w3g16")), before, strict=True
    ):
        kept = [choice.fold.prev for choice in each.scales]
        assert "post_attention_layernorm" not in kept and len(kept) >= 1
        assert block.run is not None and error(block.run(), reference) < 1e-5
        assert each.linears["mlp.gate_proj"].report.alpha == 0
    right = solve(make(), AWQ, of_all("w3g16"))
    assert any(
        choice.fold.prev == "post_attention_layernorm" for each in right for choice in each.scales
    )


@torch.no_grad()
def test_each_fold_is_tried_alone_when_all_together_fail(make: Make) -> None:
    block = make()[0]
    folds = block.structure.folds
    good = [FoldScale(f, torch.full((len(f.index),), 2.0), 0.5, 0.0) for f in folds[:2]]
    bad = FoldScale(folds[2], torch.full((len(folds[2].index),), torch.inf), 0.5, 0.0)
    assert block.run is not None
    before = block.run()
    assert fold_scales(block.module, [good[0], bad, good[1]], block.run) == good
    assert error(block.run(), before) < 1e-5
    assert all(p.isfinite().all() for p in block.module.parameters())


def narrowed(method: Method, factor: float) -> Method:
    """`method`, its grids so narrow that nothing is right."""

    def grids(problem: Problem) -> Grid:
        found = method.grids(problem)
        return found._replace(scales=(found.scales / factor).half())

    return replace(method, grids=grids)


@pytest.mark.parametrize("method", ["awq", "gptq", "awq+gptq"])
@torch.no_grad()
def test_what_does_not_help_is_not_believed(make: Make, method: str) -> None:
    bad = narrowed(METHODS[method], 50)
    blocks = make()
    for block, each in zip(blocks, solve(blocks, bad, of_all("w4g32")), strict=True):
        for name, coded in each.linears.items():
            report = coded.report
            assert report.kept_rtn and report.clip == 1
            assert report.error <= report.error_rtn * 1.01
            weight = weight_of(block.module.get_submodule(name))
            rounded = grid.quantize(weight, Scheme(4, 32))
            assert torch.equal(coded.qtensor.q, rounded.q)
            if method == "awq":  # what a search file says must make these codes again
                assert torch.equal(coded.grid.scales, rounded.scales)


@torch.no_grad()
def test_trusted_results_stay(make: Make) -> None:
    """Grids that were found on another text may look worse on none."""
    solved = solve(make(), narrowed(AWQ, 50), of_all("w4g32"), trust=True)
    for each in solved:
        for coded in each.linears.values():
            assert not coded.report.kept_rtn
            assert coded.report.error > coded.report.error_rtn


@torch.no_grad()
def test_trusted_scales_that_change_the_function_are_refused(make: Make) -> None:
    def scales(problems: Any, fold: Fold) -> list[FoldScale | None]:
        count = problems[0].weight.shape[-1]
        factors = torch.full((count,), torch.inf)
        return [FoldScale(fold, factors, 0.5, 0.0) for _ in problems[0].names]

    method = replace(AWQ, scales=scales)
    with pytest.raises(SalienceError, match=r"scales for model\.layers\.0 change what it computes"):
        solve(make(), method, of_all("w4g32"), trust=True)
    blocks = [replace(block, run=None) for block in make()]
    with pytest.raises(SalienceError, match=r"scales for model\.layers\.0, whose folds cannot be"):
        solve(blocks, AWQ, of_all("w3g32"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e8])
@torch.no_grad()
def test_weights_that_cannot_be_coded_are_named(make: Make, method: str, value: float) -> None:
    blocks = make()
    blocks[1].module.mlp.up_proj.weight[3, 3] = value
    blocks = without_text(blocks) if method == "rtn" else blocks
    message = r"^model\.layers\.1\.mlp\.up_proj: a group's range is too wide for an fp16 scale$"
    with pytest.raises(SalienceError, match=message):
        solve(blocks, METHODS[method], of_all("w4g32"))


@torch.no_grad()
def test_weights_that_no_codebook_holds(make: Make) -> None:
    blocks = without_text(make())
    blocks[2].module.mlp.up_proj.weight[3, 3] = float("nan")
    message = r"^model\.layers\.2\.mlp\.up_proj: a group's range is too wide for an fp32 scale$"
    with pytest.raises(SalienceError, match=message):
        solve(blocks, NF4, of_all("nf4"))


@pytest.mark.parametrize(("method", "scheme"), [(RTN, "w4g32"), (NF4, "nf4"), (NF4, "nf4-dq")])
@torch.no_grad()
def test_without_text_it_is_rounding(make: Make, method: Method, scheme: str) -> None:
    blocks = without_text(make())
    for block, each in zip(blocks, solve(blocks, method, of_all(scheme)), strict=True):
        assert each.scales == []
        for name, coded in each.linears.items():
            weight = weight_of(block.module.get_submodule(name))
            expected = grid.quantize(weight, Scheme.parse(scheme))
            assert torch.equal(coded.qtensor.q, expected.q)
            assert torch.equal(coded.qtensor.dequantize(), expected.dequantize())
            away = (expected.dequantize(torch.float64) - weight.double()).square().sum()
            found = (away / weight.double().square().sum()).item()
            assert coded.report.error == pytest.approx(found, rel=1e-4)
            assert coded.report.error == pytest.approx(coded.report.error_rtn, rel=1e-5)
            assert (coded.report.clip, coded.report.alpha) == (1, 0) and not coded.report.kept_rtn


class Pair(nn.Module):
    """Two linears that share an input."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        super().__init__()
        self.a = nn.Linear(first.shape[1], first.shape[0], bias=False)
        self.b = nn.Linear(first.shape[1], second.shape[0], bias=False)
        self.a.weight.data, self.b.weight.data = first, second


def pair(
    index: int, columns: int, tokens: int, outliers: float, size: float, seed: int
) -> LoadedBlock:
    random = torch.Generator().manual_seed(seed + index)
    weight = torch.randn(9, columns, generator=random)
    loud = torch.rand(9, columns, generator=random) < outliers
    weight = size * torch.where(loud, 8 * weight, weight)
    weight[1] = 0
    weight[2, :16] = 0
    mix = torch.randn(max(columns // 4, 1), columns, generator=random)
    x = torch.randn(tokens, len(mix), generator=random) @ mix
    x[:, 3] = 0  # a dead channel
    x[:, 5] *= 20
    moment = SecondMoment.empty(columns)
    moment.update(x)
    return LoadedBlock(f"blocks.{index}", Pair(weight[:4], weight[4:]), PAIR, {"a": moment}, None)


PAIR = Structure([("a", "b")], [])


@settings(max_examples=50, deadline=None)
@given(
    method=st.sampled_from(sorted(METHODS)),
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([8, 16, -1]),
    sym=st.booleans(),
    count=st.integers(1, 3),
    columns=st.sampled_from([16, 48]),
    tokens=st.sampled_from([1, 4, 150]),
    outliers=st.sampled_from([0.0, 0.05, 0.5]),
    size=st.sampled_from([1e-3, 1.0, 100.0]),
    seed=st.integers(0, 2**31),
)
@torch.no_grad()
def test_what_is_written_is_never_worse_than_rounding(
    method: str,
    bits: int,
    group: int,
    sym: bool,
    count: int,
    columns: int,
    tokens: int,
    outliers: float,
    size: float,
    seed: int,
) -> None:
    """Measured in fp64 on the codes themselves, for each linear of each block."""
    scheme = Scheme(bits, group, sym)
    blocks = [pair(i, columns, tokens, outliers, size, seed) for i in range(count)]
    solved = solve(blocks, METHODS[method], lambda _name: scheme)
    for block, each in zip(blocks, solved, strict=True):
        second = block.moments["a"].second.double()
        for name, coded in each.linears.items():
            weight = block.module.get_submodule(name).weight.double()

            def loss(value: Tensor, w: Tensor = weight, h: Tensor = second) -> float:
                return float(((value.double() - w) @ h * (value.double() - w)).sum())

            written = coded.qtensor.dequantize()
            assert written.isfinite().all()
            energy = loss(torch.zeros_like(weight))
            plain = loss(grid.quantize(weight.float(), scheme).dequantize())
            # fp32 sums: a tie may fall either way.
            assert loss(written) <= plain * (1 + 1e-4) + 1e-6 * energy
            assert coded.report.error_rtn * energy == pytest.approx(
                plain, rel=1e-2, abs=1e-5 * energy
            )
            error = coded.report.error * energy
            assert error == pytest.approx(loss(written), rel=1e-2, abs=1e-5 * energy)
