"""The clip and scale searches against plain ones in fp64, and on inputs made to break them."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from salience import grid
from salience.methods import awq
from salience.methods.awq import (
    CLIP_RATIOS,
    EXPONENTS,
    STRONGER_MUST_GAIN,
    search_grids,
    search_scales,
)
from salience.methods.base import FoldScale, Problem, nearest
from salience.qtensor import QTensor
from salience.scheme import Scheme
from salience.stats import SecondMoment
from salience.structure import Fold


def random_weight(rows: int, columns: int, seed: int, outliers: float = 0.02) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=random)
    loud = torch.rand(rows, columns, generator=random) < outliers
    return torch.where(loud, 6 * weight, weight) * 0.1


def correlated(columns: int, seed: int, tokens: int = 200, loud: int = 0) -> SecondMoment:
    """Inputs that share a few directions; channel 0, 1, ... up to `loud` are large."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(max(columns // 4, 1), columns, generator=random)
    x = torch.randn(tokens, len(mix), generator=random) @ mix
    x += 0.3 * torch.randn(tokens, columns, generator=random)
    x[:, :loud] *= 30
    moment = SecondMoment.empty(columns)
    moment.update(x)
    return moment


def identity(columns: int) -> SecondMoment:
    return SecondMoment(torch.eye(columns), torch.ones(columns), 1)


def loss(qt: QTensor, weight: Tensor, second: Tensor) -> Tensor:
    """Output error of each row, in fp64."""
    error = qt.dequantize(torch.float64) - weight.double()
    return (error @ second.double() * error).sum(1)


def problem(weights: list[Tensor], moment: SecondMoment, scheme: Scheme) -> Problem:
    """Linears with one input, of one block."""
    return Problem(
        (tuple(f"linear{i}" for i in range(len(weights))),),
        torch.cat(weights)[None],
        tuple(len(weight) for weight in weights),
        scheme,
        moment.second[None],
        moment.mean_abs[None],
    )


def stacked(problems: list[Problem]) -> Problem:
    """The problems of several blocks as one batch."""
    return Problem(
        tuple(names for each in problems for names in each.names),
        torch.cat([each.weight for each in problems]),
        problems[0].rows,
        problems[0].scheme,
        torch.cat([each.second for each in problems]),  # type: ignore[misc]
        torch.cat([each.mean_abs for each in problems]),  # type: ignore[misc]
    )


def of_second(weight: Tensor, second: Tensor, scheme: Scheme) -> Problem:
    return problem([weight], SecondMoment(second, torch.ones(len(second)), 1), scheme)


def clipped(weight: Tensor, second: Tensor, scheme: Scheme) -> QTensor:
    one = of_second(weight, second, scheme)
    (qt,) = nearest(one, search_grids(one))
    return qt


def search_clip(weight: Tensor, second: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The ranges of which `search_grids` makes grids."""
    lo, hi = awq._clip_rows(weight[None], second[None], scheme)
    return lo[0], hi[0]


def search_scale(
    weights: list[Tensor], fold: Fold, moment: SecondMoment, scheme: Scheme
) -> FoldScale | None:
    (found,) = search_scales([problem(weights, moment, scheme)], fold)
    return found


def not_worse(weight: Tensor, second: Tensor, scheme: Scheme) -> None:
    plain = loss(grid.quantize(weight, scheme), weight, second)
    found = loss(clipped(weight, second, scheme), weight, second)
    # fp32 sums: a tie may fall either way.
    slack = 1e-5 * (weight.double() @ second.double() * weight.double()).sum(1).abs()
    assert (found <= plain * (1 + 1e-5) + slack).all()


SCHEMES = st.builds(
    Scheme,
    bits=st.sampled_from([2, 3, 4]),
    group_size=st.sampled_from([8, 16, -1]),
    sym=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(
    scheme=SCHEMES,
    rows=st.integers(1, 9),
    groups=st.integers(1, 4),
    tokens=st.sampled_from([1, 5, 100]),
    outliers=st.sampled_from([0.0, 0.05, 0.5]),
    size=st.sampled_from([1e-4, 1.0, 100.0]),
    seed=st.integers(0, 2**31),
)
def test_clip_is_never_worse_than_plain_rounding(
    scheme: Scheme,
    rows: int,
    groups: int,
    tokens: int,
    outliers: float,
    size: float,
    seed: int,
) -> None:
    weight = size * random_weight(rows, 16 * groups, seed, outliers)
    not_worse(weight, correlated(16 * groups, seed + 1, tokens).second, scheme)


Choice = tuple[np.ndarray, np.ndarray]


def snapped(row: np.ndarray, lo: float, hi: float, scheme: Scheme) -> np.ndarray:
    """Round one group of a row on the grid of [lo, hi], as `grid` documents it."""
    levels = 2**scheme.bits - 1
    width = 2 * max(-lo, hi) if scheme.sym else hi - lo
    scale = float(np.float16(width / levels)) or 1.0
    zero = 2.0 ** (scheme.bits - 1) if scheme.sym else float(np.clip(round(-lo / scale), 0, levels))
    return (np.clip(np.round(row / scale) + zero, 0, levels) - zero) * scale


def plain_descent(weight: Tensor, second: Tensor, scheme: Scheme) -> Choice:
    """Coordinate descent over the groups of each row, by trying everything for the whole row."""
    rows, columns = weight.shape
    size = scheme.group_columns(columns)
    w, h = weight.double().numpy(), second.double().numpy()
    lo = np.minimum(w.reshape(rows, -1, size).min(-1), 0)
    hi = np.maximum(w.reshape(rows, -1, size).max(-1), 0)
    ratios = (1.0, *CLIP_RATIOS)
    for r in range(rows):

        def cost(group: int, low: float, high: float, r: int = r) -> float:
            error = np.empty(columns)
            for g in range(columns // size):
                part = slice(g * size, (g + 1) * size)
                ends = (low, high) if g == group else (lo[r, g], hi[r, g])
                error[part] = snapped(w[r, part], *ends, scheme) - w[r, part]
            return float(error @ h @ error)

        for g in range(columns // size):
            first_low, first_high = lo[r, g], hi[r, g]
            moves: list[Callable[[float], tuple[float, float]]] = [
                lambda ratio, g=g, a=first_low, b=first_high: (a * ratio, b * ratio)
            ]
            if not scheme.sym:
                moves.append(lambda ratio, g=g, a=first_low, r=r: (a * ratio, hi[r, g]))
                moves.append(lambda ratio, g=g, b=first_high, r=r: (lo[r, g], b * ratio))
            for move in moves:
                tried = [move(ratio) for ratio in ratios] + [(lo[r, g], hi[r, g])]
                costs = [cost(g, *ends) for ends in tried]
                lo[r, g], hi[r, g] = tried[int(np.argmin(costs))]
    return lo, hi


@pytest.mark.parametrize("scheme", [Scheme(3, 8), Scheme(4, 16), Scheme(2, -1), Scheme(3, 8, True)])
def test_clip_equals_a_plain_coordinate_descent(scheme: Scheme) -> None:
    weight, second = random_weight(6, 32, 1, 0.1), correlated(32, 2).second
    lo, hi = search_clip(weight, second, scheme)
    expected_lo, expected_hi = plain_descent(weight, second, scheme)
    np.testing.assert_allclose(lo.numpy(), expected_lo, rtol=1e-6)
    np.testing.assert_allclose(hi.numpy(), expected_hi, rtol=1e-6)
    first_lo, first_hi = grid.value_range(weight, scheme)
    assert not torch.equal(lo, first_lo) and not torch.equal(hi, first_hi)
    made, expected = (
        search_grids(of_second(weight, second, scheme)),
        grid.make_grid(lo, hi, scheme),
    )
    assert torch.equal(made.scales[0], expected.scales) and made.levels == expected.levels
    assert torch.equal(made.zeros[0], expected.zeros)


def independent(weight: Tensor, second: Tensor, scheme: Scheme) -> QTensor:
    """The peers' search: each group by its own block of H, as if the others were exact."""
    columns = weight.shape[1]
    size = scheme.group_columns(columns)
    alone = torch.zeros_like(second)
    for start in range(0, columns, size):
        part = slice(start, start + size)
        alone[part, part] = second[part, part]
    return clipped(weight, alone, scheme)


@pytest.mark.parametrize("bits", [3, 4])
def test_clip_lets_errors_of_correlated_groups_cancel(bits: int) -> None:
    scheme = Scheme(bits, 8)
    weight, second = random_weight(64, 64, 3), correlated(64, 4).second
    joint = loss(clipped(weight, second, scheme), weight, second).sum()
    apart = loss(independent(weight, second, scheme), weight, second).sum()
    plain = loss(grid.quantize(weight, scheme), weight, second).sum()
    assert joint < 0.8 * apart < 0.8 * plain


@pytest.mark.parametrize("scheme", [Scheme(4, 16), Scheme(3, -1, True)])
def test_tiles_do_not_show(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    moment = correlated(64, 6, loud=1)
    one = problem([random_weight(20, 64, 5), random_weight(30, 64, 6)], moment, scheme)
    whole, whole_scale = search_grids(one), search_scales([one], one_fold(64))[0]
    assert whole_scale is not None
    calls: list[int] = []
    right = awq._clip_rows

    def count(part: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        calls.append(part.shape[1])
        return right(part, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(awq, "_clip_rows", count)
    for limit, most in ((1, 1), (7 * len(CLIP_RATIOS) * scheme.group_columns(64), 7)):
        monkeypatch.setattr(awq, "TILE_CANDIDATES", {"cpu": limit})
        calls.clear()
        parts = search_grids(one)
        assert max(calls) == most and sum(calls) == 50
        torch.testing.assert_close(parts, whole, rtol=0, atol=0)
    for limit, most in ((1, 1), (7 * 64, 7)):
        monkeypatch.setattr(awq, "_TILE_WEIGHTS", {"cpu": limit})
        assert max(part.shape[1] for part in awq._tiles(one)) == most
        (scale,) = search_scales([one], one_fold(64))
        assert scale is not None
        assert (scale.alpha, scale.beta) == (whole_scale.alpha, whole_scale.beta)
        torch.testing.assert_close(scale.scales, whole_scale.scales, rtol=1e-6, atol=0)


def blocks(scheme: Scheme) -> list[Problem]:
    """The same linears in four blocks: loud channels, isotropic, silent, one single token."""
    moments = [
        correlated(64, 30, loud=2),
        identity(64),
        SecondMoment.empty(64),
        correlated(64, 31, tokens=1),
    ]
    return [
        problem([random_weight(24, 64, 32 + i), random_weight(8, 64, 42 + i)], moment, scheme)
        for i, moment in enumerate(moments)
    ]


@pytest.mark.parametrize("scheme", [Scheme(4, 16), Scheme(3, -1, True), Scheme(2, 32)])
def test_blocks_side_by_side_are_found_the_grids_of_each_alone(scheme: Scheme) -> None:
    alone = blocks(scheme)
    found = search_grids(stacked(alone))
    for i, one in enumerate(alone):
        own = search_grids(one)
        assert torch.equal(found.scales[i], own.scales[0])
        assert torch.equal(found.zeros[i], own.zeros[0])


@pytest.mark.parametrize("scheme", [Scheme(4, 16), Scheme(3, -1, True), Scheme(2, 32)])
def test_blocks_side_by_side_are_found_the_scales_of_each_alone(scheme: Scheme) -> None:
    alone = blocks(scheme)
    together = search_scales([stacked(alone)], one_fold(64))
    taken = 0
    for one, found in zip(alone, together, strict=True):
        (own,) = search_scales([one], one_fold(64))
        assert (own is None) == (found is None)
        if own is not None and found is not None:
            taken += 1
            assert (own.alpha, own.beta) == (found.alpha, found.beta)
            torch.testing.assert_close(own.scales, found.scales, rtol=1e-6, atol=0)
    assert 0 < taken < len(alone)  # they do not all choose alike


def test_no_text_no_search() -> None:
    scheme, weight = Scheme(4, 16), random_weight(8, 64, 50)
    one = Problem((("a",),), weight[None], (8,), scheme)
    assert search_scales([one], one_fold(64)) == [None]
    made, plain = search_grids(one), grid.make_grid(*grid.value_range(weight, scheme), scheme)
    assert torch.equal(made.scales[0], plain.scales) and torch.equal(made.zeros[0], plain.zeros)


@pytest.mark.parametrize("scheme", [Scheme(4, 16), Scheme(4, 16, True), Scheme(2, -1)])
def test_nothing_to_see_is_finite(scheme: Scheme) -> None:
    weight = random_weight(8, 64, 7)
    weight[0] = 0
    weight[1, 16:32] = 0
    weight[2] = 0.25  # no negative end
    weight[3] = -0.25
    moment = correlated(64, 8)
    dead = SecondMoment(moment.gram.clone(), moment.abs_sum.clone(), moment.count)
    for channels in (slice(5), slice(16, 32)):
        dead.gram[channels] = 0
        dead.gram[:, channels] = 0
        dead.abs_sum[channels] = 0
    silent = SecondMoment.empty(64)
    one = SecondMoment.empty(64)
    one.update(torch.randn(1, 64, generator=torch.Generator().manual_seed(1)))
    fold = Fold("prev", ("sink",), "norm", torch.arange(64), 0.0)
    for inputs in (moment, dead, silent, one):
        not_worse(weight, inputs.second, scheme)
        qt = clipped(weight, inputs.second, scheme)
        assert qt.scales.isfinite().all() and (qt.scales > 0).all()
        assert not qt.dequantize()[0].any() and not qt.dequantize()[1, 16:32].any()
        found = search_scale([weight, -weight], fold, inputs, scheme)
        if found is not None:
            assert found.scales.isfinite().all() and (found.scales > 0).all()
    assert search_scale([torch.zeros(8, 64)], fold, moment, scheme) is None


def test_clip_of_nothing_heard_is_plain_rounding() -> None:
    weight, scheme = random_weight(8, 64, 9), Scheme(4, 16)
    lo, hi = search_clip(weight, torch.zeros(64, 64), scheme)
    first_lo, first_hi = grid.value_range(weight, scheme)
    assert torch.equal(lo, first_lo) and torch.equal(hi, first_hi)


def one_fold(columns: int, index: Tensor | None = None) -> Fold:
    return Fold("prev", ("a", "b"), "rows", torch.arange(columns) if index is None else index, 0.0)


def scale_loss(weight: Tensor, scales: Tensor, second: Tensor, scheme: Scheme) -> float:
    """Output error of rounding weight * scales and dividing again, in fp64 but for the rounding."""
    codes = grid.quantize(weight * scales, scheme).dequantize(torch.float64)
    error = codes / scales.double() - weight.double()
    return float((error @ second.double() * error).sum())


def test_scale_of_alike_channels_is_the_identity() -> None:
    """A circulant weight has the same values in each column, and the inputs are isotropic.

    Powers of two, whose sums are exact: no channel may stand out by a rounding either.
    """
    row = 2.0 ** -torch.arange(64).remainder(5) * random_weight(1, 64, 10)[0].sign()
    weight = torch.stack([row.roll(i) for i in range(64)])
    assert search_scale([weight], one_fold(64), identity(64), Scheme(4, -1)) is None


@pytest.mark.parametrize("bits", [3, 4])
def test_scale_protects_a_loud_channel(bits: int) -> None:
    weights = [random_weight(48, 64, 11), random_weight(16, 64, 12)]
    moment = correlated(64, 13, loud=1)
    scheme = Scheme(bits, 16)
    found = search_scale(weights, one_fold(64), moment, scheme)
    assert found is not None and found.alpha > 0
    assert found.scales.argmax() == 0
    assert (found.scales.max() * found.scales.min()).item() == pytest.approx(1, rel=1e-5)
    for weight in weights:
        plain = scale_loss(weight, torch.ones(64), moment.second, scheme)
        assert scale_loss(weight, found.scales, moment.second, scheme) < plain


def test_scale_that_harms_one_sink_is_not_taken() -> None:
    """The loud channel of the second sink is the end of its grid: exact until it is scaled."""
    scheme = Scheme(3, 16)
    weights = [random_weight(64, 64, 14), random_weight(4, 64, 15).abs().clamp(max=0.8)]
    weights[1][:, 0] = 0.875
    moment = correlated(64, 16, loud=1)
    alone = search_scale(weights[:1], one_fold(64), moment, scheme)
    assert alone is not None
    plain = scale_loss(weights[1], torch.ones(64), moment.second, scheme)
    assert scale_loss(weights[1], alone.scales, moment.second, scheme) > plain
    both = search_scale(weights, one_fold(64), moment, scheme)
    scales = torch.ones(64) if both is None else both.scales
    for weight in weights:
        plain = scale_loss(weight, torch.ones(64), moment.second, scheme)
        assert scale_loss(weight, scales, moment.second, scheme) <= plain * (1 + 1e-6)


def test_scale_ties_the_channels_of_one_row() -> None:
    """Four query heads of 8 channels on two key-value heads."""
    index = torch.arange(16).view(2, 1, 8).expand(2, 2, 8).flatten()
    weight, moment = random_weight(32, 32, 17), correlated(32, 18, loud=1)
    found = search_scale([weight], one_fold(32, index), moment, Scheme(3, 16))
    assert found is not None
    heads = found.scales.view(2, 2, 8)
    assert torch.equal(heads[:, 0], heads[:, 1])
    assert len(found.scales.unique()) == 16
    assert found.scales[0] == found.scales[8] == found.scales.max()


def plain_scales(
    weights: list[Tensor], index: Tensor, moment: SecondMoment, scheme: Scheme
) -> list[np.ndarray]:
    """The scales of each of EXPONENTS, in fp64."""
    joint = torch.cat(weights).double().numpy()
    groups = np.abs(joint).reshape(len(joint), -1, scheme.group_columns(joint.shape[1]))
    room = (groups / groups.max(-1, keepdims=True)).reshape(joint.shape).mean(0)
    activation = moment.abs_sum.double().numpy() / moment.count
    result = []
    owners = index.numpy()
    tied = [
        np.array([values[owners == owner].mean() for owner in owners])
        for values in (activation, room)
    ]
    for alpha, beta in EXPONENTS:
        scales = tied[0] ** alpha / tied[1] ** beta
        result.append(scales / np.sqrt(scales.max() * scales.min()))
    return result


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tied", [False, True])
def test_scale_is_that_of_a_plain_search(seed: int, tied: bool) -> None:
    scheme = Scheme(3, 16)
    weights = [random_weight(24, 64, seed), random_weight(40, 64, seed + 50)]
    weights[0] *= torch.logspace(-0.5, 0.5, 64)
    loud = seed % 3
    moment = correlated(64, seed + 100, loud=loud)
    index = torch.arange(64) // 2 if tied else torch.arange(64)
    candidates = plain_scales(weights, index, moment, scheme)
    losses = np.array(
        [
            [scale_loss(w, torch.tensor(s).float(), moment.second, scheme) for w in weights]
            for s in candidates
        ]
    )
    allowed, totals, best = (losses <= losses[0]).all(1), losses.sum(1), 0
    for i in range(len(EXPONENTS)):
        if allowed[i] and totals[i] < totals[best] * (1 - STRONGER_MUST_GAIN):
            best = i
    found = search_scale(weights, one_fold(64, index), moment, scheme)
    if found is None:
        assert best == 0 and loud == 0
    else:
        assert (found.alpha, found.beta) == EXPONENTS[best]
        np.testing.assert_allclose(found.scales.numpy(), candidates[best], rtol=1e-4)


def test_the_exponents() -> None:
    """From mild to strong, so that a stronger one can be asked to gain more."""
    assert EXPONENTS[0] == (0.0, 0.0)
    assert sorted(EXPONENTS) == list(EXPONENTS)
    assert 0 < STRONGER_MUST_GAIN < 1
    assert len(set(EXPONENTS)) == len(EXPONENTS)
    assert all(0 < ratio < 1 for ratio in CLIP_RATIOS)


def test_sinks_of_other_schemes_have_their_say() -> None:
    """One source, two schemes: each sink is rounded by its own, and none may lose."""
    moment = correlated(64, 23, loud=1)
    schemes = (Scheme(3, 16), Scheme(8, -1))
    weights = (random_weight(32, 64, 20), random_weight(16, 64, 21))
    problems = [problem([w], moment, s) for w, s in zip(weights, schemes, strict=True)]
    (found,) = search_scales(problems, one_fold(64))
    assert found is not None
    index = torch.arange(64)
    joint = [np.abs(w.double().numpy()).reshape(len(w), -1, s.group_columns(64))
             for w, s in zip(weights, schemes, strict=True)]  # fmt: skip
    room = sum((g / g.max(-1, keepdims=True)).reshape(len(g), 64).sum(0) for g in joint) / 48
    activation = moment.mean_abs.double().numpy()
    best, kept = None, None
    for alpha, beta in EXPONENTS:
        scales = activation[index] ** alpha / room[index] ** beta
        scales = torch.tensor(scales / np.sqrt(scales.max() * scales.min())).float()
        losses = np.array(
            [scale_loss(w, scales, moment.second, s) for w, s in zip(weights, schemes, strict=True)]
        )
        if best is None:
            plain = best = losses
            kept = (alpha, beta)
        elif (losses <= plain).all() and losses.sum() < best.sum() * (1 - STRONGER_MUST_GAIN):
            best, kept = losses, (alpha, beta)
    assert (found.alpha, found.beta) == kept
