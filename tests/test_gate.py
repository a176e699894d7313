"""The gate: its language, and that it passes and fails when it should."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from salience.errors import SalienceError
from salience.evaluation.comparison import Comparison, Row, judge, make_row
from salience.evaluation.gate import check_gate, parse_gate
from salience.evaluation.receipt import Receipt
from salience.evaluation.statistics import Interval

BATCHES = (1, 4, 16)
WHOLE = "perplexity<=1.03x; kl<=0.05; agreement>=0.9; mmlu>=-1.0; decode>=1.5x; disk<=0.35x"


def test_the_example_of_the_help() -> None:
    found = parse_gate(WHOLE, ["mmlu"], BATCHES)
    assert [(c.metric, c.at_most, c.limit, c.kind, c.relative) for c in found] == [
        ("perplexity", True, 1.03, "ratio", True),
        ("kl", True, 0.05, "value", False),
        ("agreement", False, 0.9, "value", False),
        ("mmlu", False, -1.0, "points", True),
        ("decode", False, 1.5, "ratio", True),
        ("disk", True, 0.35, "ratio", True),
    ]


@pytest.mark.parametrize(
    ("text", "metric", "limit", "relative"),
    [
        ("ppl <= 1.03x", "perplexity", 1.03, True),
        ("perplexity<=21", "perplexity", 21.0, False),
        ("mmlu>=61.5", "mmlu", 61.5, False),
        ("mmlu>=+0.5;", "mmlu", 0.5, True),
        ("decode@4>=2x", "decode@4", 2.0, True),
        ("prefill>=100", "prefill", 100.0, False),
        ("ram<=8GiB", "ram", 8 * 2**30, False),
        ("vram@load<=500 MB", "vram@load", 5e8, False),
        ("bits<=4.5", "bits", 4.5, False),
    ],
)
def test_conditions(text: str, metric: str, limit: float, relative: bool) -> None:
    [found] = parse_gate(text, ["mmlu"], BATCHES)
    assert (found.metric, found.limit, found.relative) == (metric, limit, relative)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (" ; ", "is empty"),
        ("perplexity", "not understood"),
        ("perplexity<1.03x", "not understood"),
        ("perplexity=1", "not understood"),
        ("perplexity<=1.03y", "not understood"),
        ("perplexity<=x", "not understood"),
        ("perplexity<=1e9", "not understood"),
        ("perplexity<=1.03x kl<=0.05", "not understood"),
        ("perplexity<=nan", "not understood"),
        ("mmmlu>=-1", "'mmmlu' is no metric and none of --tasks"),
        ("kl<=1.03x", "a limit of kl is written like 0.05"),
        ("mmlu>=0.9x", "a limit of mmlu is written like -1.0"),
        ("disk<=100", "a limit of disk is written like 1.05x or 500MiB"),
        ("kl<=1GiB", "a limit of kl is written like 0.05"),
        ("perplexity<=-1", "a sign is for points of a task"),
        ("decode@3>=1x", "the batches timed are 1, 4, 16"),
    ],
)
def test_what_is_not_understood_is_one_line(text: str, message: str) -> None:
    with pytest.raises(SalienceError, match=r"^--gate ") as caught:
        parse_gate(text, ["mmlu"], BATCHES)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_speed_that_is_not_measured_is_refused() -> None:
    with pytest.raises(SalienceError, match="--no-speed"):
        parse_gate("decode>=1x", [], ())


NUMBERS = st.decimals(0, 10**6, places=3, allow_nan=False).map(str)
METRICS = st.sampled_from(["perplexity", "ppl", "decode", "decode@16", "prefill", "bits"])


@given(
    st.lists(
        st.tuples(METRICS, st.sampled_from(["<=", ">="]), NUMBERS, st.sampled_from(["", "x"])),
        min_size=1,
    ),
    st.sampled_from(["", " ", "  "]),
)
def test_what_is_written_is_read(parts: list[tuple[str, str, str, str]], space: str) -> None:
    text = f"{space};{space}".join(f"{m}{space}{s}{space}{n}{u}" for m, s, n, u in parts)
    for condition, (metric, sign, number, unit) in zip(
        parse_gate(text, [], BATCHES), parts, strict=True
    ):
        assert condition.metric == {"ppl": "perplexity"}.get(metric, metric)
        assert condition.at_most == (sign == "<=")
        assert condition.limit == float(number)
        assert condition.relative == bool(unit)


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        found = parse_gate(text, ["mmlu"], BATCHES)
    except SalienceError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert found and all(math.isfinite(each.limit) for each in found)


def test_a_bound_decides_not_the_value() -> None:
    [most] = parse_gate("kl<=0.05", [], BATCHES)
    assert most.holds(Interval(0.04, 0.03, 0.05))
    assert not most.holds(Interval(0.04, 0.03, 0.051))
    [least] = parse_gate("agreement>=0.9", [], BATCHES)
    assert least.holds(Interval(0.95, 0.9, 0.99))
    assert not least.holds(Interval(0.95, 0.89, 0.99))
    for unknown in (None, Interval(0.04, math.nan, math.nan), Interval(0.04, -math.inf, math.inf)):
        assert not most.holds(unknown)
    [failure] = check_gate([most], {"B": {most: Interval(0.04, 0.03, 0.06)}})
    assert str(failure) == (
        "B: kl is 0.04 (95 %: 0.03 to 0.06), wanted at most 0.05 with 95 % confidence"
    )
    [missing] = check_gate([most], {"B": {}})
    assert str(missing) == "B: kl was not measured, wanted at most 0.05"


def receipt(
    rng: np.random.Generator, hard: Sequence[float], loss: float, rate: float, right: np.ndarray
) -> Receipt:
    """A measurement as it comes: chunks as hard as for the other model, documents alike."""
    nll = [2047 * (h + loss + 0.004 * rng.standard_normal()) for h in hard]
    kl = [2047 * abs(loss) * math.exp(0.2 * rng.standard_normal()) for _ in hard]
    agree = [int(2047 * min(1.0, 1 - loss + 0.003 * rng.standard_normal())) for _ in hard]
    rates = (rate * np.exp(0.03 * rng.standard_normal(5))).tolist()
    return Receipt(
        format="dense",
        scheme="float",
        dtype="float32",
        bits=16,
        disk=1000,
        memory={when: {"ram": 10**9, "vram": 0} for when in ("load", "peak")},
        speed=[{"batch": 1, "prefill": rates, "decode": rates}],
        text={"nll": nll, "tokens": [2047] * len(hard), "kl": kl, "agree": agree},
        tasks={"mmlu": {"acc,none": {str(i): float(ok) for i, ok in enumerate(right)}}},
    )


def compared(seed: int, loss: float, rate: float, forgets: float) -> Comparison:
    """A reference, and a model that lost so much."""
    rng = np.random.default_rng(seed)
    hard = 2.9 + 0.3 * rng.standard_normal(60)
    right = rng.random(1500) < 0.6
    worse = np.where(right, rng.random(1500) >= forgets, rng.random(1500) < 0.02)
    rows = [
        Row("A", "a", receipt=receipt(rng, hard.tolist(), 0.0, 20.0, right)),
        Row("B", "b", receipt=receipt(rng, hard.tolist(), loss, rate, worse)),
    ]
    make_row(rows[0], None)
    make_row(rows[1], rows[0])
    return Comparison(rows, {}, "", {})


GATE = "perplexity<=1.03x; kl<=0.05; agreement>=0.95; mmlu>=-3; decode>=1.5x; disk<=1x"


@pytest.mark.parametrize("seed", range(20))
def test_a_gate_passes_and_fails_as_it_should(seed: int) -> None:
    """A model within every limit by a margin passes; one beyond a limit fails by that line."""
    conditions = parse_gate(GATE, ["mmlu"], (1,))
    good = compared(seed, loss=0.02, rate=36, forgets=0.02)
    judge(good, GATE, conditions)
    assert good.failures == []
    bad = {
        "perplexity": compared(seed, loss=0.04, rate=36, forgets=0.02),
        "decode": compared(seed, loss=0.02, rate=29, forgets=0.02),
        "mmlu": compared(seed, loss=0.02, rate=36, forgets=0.15),
    }
    for metric, comparison in bad.items():
        judge(comparison, GATE, conditions)
        assert [failure.condition.metric for failure in comparison.failures or ()] == [metric]
