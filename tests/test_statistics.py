"""Intervals hold the truth as often as they say, in simulations where it is known."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from salience.evaluation.statistics import (
    Interval,
    batch_size,
    digits,
    exact,
    mean_interval,
    perplexity_interval,
    perplexity_ratio,
    rate_interval,
    rate_ratio,
    score_difference,
    score_interval,
    sign_test,
    student_quantile,
    verdict,
)

RNG = np.random.default_rng
TOKENS = 127.0


def noise(rng: np.random.Generator, n: int, rho: float) -> np.ndarray:
    """Standard normal values, neighbours correlated by rho."""
    steps = rng.standard_normal(n)
    values = [steps[0]]
    for step in steps[1:]:
        values.append(rho * values[-1] + math.sqrt(1 - rho**2) * step)
    return np.array(values)


def chunks(rng: np.random.Generator, n: int, rho: float, skew: float) -> tuple[np.ndarray, float]:
    """Means of chunks, normal or lognormal, and their expectation."""
    values = noise(rng, n, rho)
    if skew == 0:
        return 3 + 0.3 * values, 3.0
    return np.exp(skew * values), math.exp(skew**2 / 2)


def coverage(trial: Callable[[np.random.Generator], tuple[Interval, float]], times: int) -> float:
    """The share of trials whose interval holds the truth, in percent."""
    rng = RNG(0)
    held = 0
    for _ in range(times):
        interval, truth = trial(rng)
        assert interval.low <= interval.value <= interval.high
        held += interval.low <= truth <= interval.high
    return 100 * held / times


# Of skewed values in small numbers the mean's interval is known to be a little too sure.
CASES = [(n, rho, skew) for n in (10, 20, 40, 80, 146) for rho in (0.0, 0.3) for skew in (0.0, 0.3)]


@pytest.mark.slow
@pytest.mark.parametrize(("n", "rho", "skew"), CASES)
def test_coverage_of_a_mean_over_chunks(n: int, rho: float, skew: float) -> None:
    def trial(rng: np.random.Generator) -> tuple[Interval, float]:
        means, truth = chunks(rng, n, rho, skew)
        return mean_interval((means * TOKENS).tolist(), [TOKENS] * n), truth

    assert 93 <= coverage(trial, 2500) <= 97.6  # the Monte Carlo error is 0.4


@pytest.mark.slow
@pytest.mark.parametrize("n", [10, 40, 146])
@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_coverage_of_a_perplexity_and_its_ratio(n: int, rho: float) -> None:
    """Chunks of unlike length too: perplexity is a ratio of sums."""

    def one(rng: np.random.Generator) -> tuple[Interval, float]:
        tokens = rng.integers(100, 200, n).astype(float)
        nll = (3 + 0.3 * noise(rng, n, rho)) * tokens
        return perplexity_interval(nll.tolist(), tokens.tolist()), math.exp(3)

    def pair(rng: np.random.Generator) -> tuple[Interval, float]:
        tokens = rng.integers(100, 200, n).astype(float)
        first = 3 + 0.3 * noise(rng, n, rho)
        second = first + 0.02 * np.exp(0.3 * noise(rng, n, rho))
        ratio = perplexity_ratio((second * tokens).tolist(), (first * tokens).tolist(), tokens)
        return ratio, math.exp(0.02 * math.exp(0.045))

    for trial in (one, pair):
        assert 93 <= coverage(trial, 2000) <= 97.6


@pytest.mark.slow
@pytest.mark.parametrize("n", [20, 50, 100, 500])
@pytest.mark.parametrize("right", [0.3, 0.6, 0.9])
def test_coverage_of_scores_and_their_difference(n: int, right: float) -> None:
    """Averaged over near scores, since the true coverage of whole counts jumps."""

    def one(rng: np.random.Generator) -> tuple[Interval, float]:
        truth = right + rng.uniform(-0.05, 0.05)
        return score_interval((rng.random(n) < truth).astype(float).tolist()), truth

    def pair(rng: np.random.Generator) -> tuple[Interval, float]:
        first = rng.random(n) < right
        lost, won = rng.uniform(0.05, 0.2), rng.uniform(0.05, 0.2)
        second = np.where(first, rng.random(n) >= lost, rng.random(n) < won)
        truth = (1 - right) * won - right * lost
        return score_difference(second.astype(float).tolist(), first.astype(float).tolist()), truth

    assert 93 <= coverage(one, 2000) <= 97.6
    # On the safe side where few documents differ.
    assert 93 <= coverage(pair, 2000) <= (98 if n >= 50 else 100)


@pytest.mark.slow
@pytest.mark.parametrize("repeats", [3, 5, 10])
def test_coverage_of_rates_and_their_ratio(repeats: int) -> None:
    def one(rng: np.random.Generator) -> tuple[Interval, float]:
        return rate_interval(np.exp(3 + 0.1 * rng.standard_normal(repeats)).tolist()), math.exp(3)

    def ratio(rng: np.random.Generator) -> tuple[Interval, float]:
        first = np.exp(3 + 0.1 * rng.standard_normal(repeats))
        second = np.exp(2 + 0.2 * rng.standard_normal(repeats))
        return rate_ratio(first.tolist(), second.tolist()), math.e

    assert 93 <= coverage(one, 3000) <= 97
    assert 93 <= coverage(ratio, 3000) <= 99  # whole degrees of freedom are on the safe side


def test_a_plain_interval_would_not_do() -> None:
    """What the batches are for: chunks taken for independent are too sure of themselves."""

    def trial(rng: np.random.Generator) -> tuple[Interval, float]:
        means = 3 + 0.3 * noise(rng, 100, 0.5)
        error = means.std(ddof=1) / 10
        return Interval(means.mean(), means.mean() - 1.98 * error, means.mean() + 1.98 * error), 3.0

    def ours(rng: np.random.Generator) -> tuple[Interval, float]:
        return mean_interval((3 + 0.3 * noise(rng, 100, 0.5)).tolist(), [1.0] * 100), 3.0

    assert coverage(trial, 300) < 85 < 90 < coverage(ours, 300)


@pytest.mark.parametrize(
    ("freedom", "value"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227)],
)
def test_student_quantile(freedom: int, value: float) -> None:
    """The tables of every textbook."""
    assert student_quantile(freedom) == pytest.approx(value, rel=1e-5)
    assert student_quantile(10**5) == pytest.approx(1.95996, rel=1e-4)


def test_perplexity_is_of_all_tokens() -> None:
    nll, tokens = [3.0, 40.0, 5.0, 2.0], [1.0, 10.0, 2.0, 1.0]
    assert perplexity_interval(nll, tokens).value == pytest.approx(math.exp(50 / 14))
    ratio = perplexity_ratio([n + t * 0.1 for n, t in zip(nll, tokens, strict=True)], nll, tokens)
    assert ratio.value == pytest.approx(math.exp(0.1))
    assert ratio.low == pytest.approx(ratio.high)


def test_one_chunk_tells_no_interval() -> None:
    found = mean_interval([3.0], [1.0])
    assert (found.value, found.low, found.high) == (3.0, -math.inf, math.inf)
    assert verdict(found, "%", "A", False).kind == "unknown"
    assert rate_interval([5.0]).high == math.inf
    assert rate_ratio([5.0], [4.0]).low == 0.0


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=60))
def test_an_interval_is_around_its_mean(values: list[float]) -> None:
    found = mean_interval(values, [1.0] * len(values))
    assert found.value == pytest.approx(sum(values) / len(values))
    assert found.low <= found.value <= found.high
    assert 1 <= batch_size(len(values)) <= len(values)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=50))
def test_differences_turn_their_sign(pairs: list[tuple[bool, bool]]) -> None:
    ours, theirs = ([float(pair[i]) for pair in pairs] for i in (0, 1))
    there, back = score_difference(ours, theirs), score_difference(theirs, ours)
    assert there.value == pytest.approx(-back.value)
    assert there.low == pytest.approx(-back.high)
    assert -1 <= there.low <= there.value <= there.high <= 1
    assert sign_test(ours, theirs) == sign_test(theirs, ours)


def test_sign_test() -> None:
    """8 of 9 documents that differ: 2 * (1 + 9) / 2^9."""
    ours, theirs = [1.0] * 8 + [0.0] + [1.0] * 5, [0.0] * 8 + [1.0] + [1.0] * 5
    assert sign_test(ours, theirs) == pytest.approx(20 / 512)
    assert sign_test([1.0], [1.0]) == 1.0
    assert sign_test([1.0, 0.0], [0.0, 1.0]) == 1.0


def test_scores_between_right_and_wrong() -> None:
    found = score_interval([0.2, 0.4, 0.9, 0.5])
    assert found.value == pytest.approx(0.5)
    assert found.low == pytest.approx(
        0.5 - 3.18245 * np.std([0.2, 0.4, 0.9, 0.5], ddof=1) / 2, abs=1e-4
    )
    assert score_interval([1.0] * 20).high == 1.0
    assert score_interval([1.0] * 20).low == pytest.approx(0.8389, abs=1e-4)  # Wilson


@pytest.mark.parametrize(
    ("change", "higher", "kind", "text"),
    [
        ((0.1, -0.3, 0.5), False, "same", "not distinguishable from A (+0.1 \u00b1 0.4 %)"),
        ((1.2, 0.9, 1.5), False, "worse", "worse by 1.2 \u00b1 0.3 %"),
        ((-1.2, -1.5, -0.9), False, "better", "better by 1.2 \u00b1 0.3 %"),
        ((-1.2, -1.5, -0.9), True, "worse", "worse by 1.2 \u00b1 0.3 %"),
        ((35.0, 11.0, 70.0), False, "worse", "worse by 35 \u00b1 35 %"),
        ((0.0, 0.0, 0.0), False, "same", "not distinguishable from A (+0 \u00b1 0 %)"),
        ((62.5, 62.5, 62.5), True, "better", "better by 62.5 %"),
    ],
)
def test_verdict(change: tuple[float, float, float], higher: bool, kind: str, text: str) -> None:
    found = verdict(Interval(*change), "%", "A", higher)
    assert (found.kind, found.text) == (kind, text)


@pytest.mark.parametrize(
    ("value", "spread", "text"),
    [
        (18.46372, 0.3, "18.5"),
        (18.46372, 0.12, "18.46"),
        (18.46372, 45, "18"),
        (0.0412, 0.0007, "0.0412"),
        (5.0, math.inf, "5.00"),
        (0.0, 0.0, "0"),
    ],
)
def test_digits(value: float, spread: float, text: str) -> None:
    assert digits(value, spread) == text


def test_verdicts_err_as_often_as_they_say() -> None:
    """Equal models are told apart in 5 % of all cases, models 5 % apart in nearly all."""
    rng, apart, told = RNG(1), 0, 0
    for _ in range(400):
        tokens = [100.0] * 60
        first = 3 + 0.3 * noise(rng, 60, 0.3)
        same = first + 0.01 * noise(rng, 60, 0.0)
        worse = first + 0.05 + 0.02 * noise(rng, 60, 0.0)
        for second, kind in ((same, "same"), (worse, "worse")):
            ratio = perplexity_ratio((second * 100).tolist(), (first * 100).tolist(), tokens)
            percent = Interval(*(100 * (v - 1) for v in (ratio.value, ratio.low, ratio.high)))
            found = verdict(percent, "%", "A", False).kind
            apart += kind == "same" and found != "same"
            told += kind == "worse" and found == "worse"
    assert apart <= 32 and told == 400


def test_exact_has_no_spread() -> None:
    assert exact(3.0).half == 0
