"""Speed: what is counted, in which order, and the memory beside it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import salience
from salience.errors import DoesNotFitError, SalienceError
from salience.evaluation import speed as module
from salience.evaluation.speed import Spread, measure_speed
from salience.monitor import Sampler
from salience.runtime.timing import Timing
from tiny_models import llama_config, make_model


@pytest.fixture(scope="module")
def model(llama: Path) -> Any:
    return salience.load(llama)


def test_spread() -> None:
    assert Spread.of([3.0, 1.0, 7.0]) == Spread(3.0, 1.0, 7.0, (3.0, 1.0, 7.0))
    assert Spread.of([1.0, 2.0]).median == 1.5


def test_rates_are_of_all_sequences(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prefills = iter([2.0, 1.0, 4.0, 5.0, 5.0, 5.0])
    steps = iter([0.5, 0.25, 1.0, 2.0, 2.0, 2.0])
    seen: list[list[list[int]]] = []

    def prefill(engine: Any, prompts: list[list[int]]) -> float:
        seen.append(prompts)
        return next(prefills)

    def decode(engine: Any, prompts: list[list[int]], new: int) -> Timing:
        seen.append(prompts)
        assert new == 5 and engine.max_batch == len(prompts)
        return Timing(next(steps), 9.0, False)

    monkeypatch.setattr(module, "warm_up", lambda *_: None)
    monkeypatch.setattr(module, "time_prefill", prefill)
    monkeypatch.setattr(module, "time_decode", decode)
    found = measure_speed(model, (2, 3), prompt=10, new=5, repeats=3)
    first, second = found.rows
    assert first.prefill_tokens_per_second == Spread(10.0, 5.0, 20.0, (10.0, 20.0, 5.0))
    assert first.decode_tokens_per_second == Spread(4.0, 2.0, 8.0, (4.0, 8.0, 2.0))
    assert second.prefill_tokens_per_second.median == 3 * 10 / 5
    assert second.decode_tokens_per_second.median == 3 / 2
    assert all(len(prompt) == 10 for prompts in seen for prompt in prompts)
    flat = [tuple(prompt) for prompts in seen for prompt in prompts]
    assert len(set(flat)) == len(flat) == 6 * 2 + 6 * 3  # none is found in the cache


def test_a_real_run(model: Any) -> None:
    with Sampler(interval=0.01) as sampler:
        calls: list[tuple[str, int, int]] = []
        found = measure_speed(
            model, (1, 2), 8, 4, 2, sampler, progress=lambda *call: calls.append(call)
        )
    assert [row.batch for row in found.rows] == [1, 2] and (found.prompt, found.new) == (8, 4)
    for row in found.rows:
        for spread in (row.prefill_tokens_per_second, row.decode_tokens_per_second):
            assert 0 < spread.low <= spread.median <= spread.high and len(spread.values) == 2
        assert row.peak.resident > 0
    names = [mark.name for mark in sampler.marks]
    assert names == [f"{what}, batch {n}" for n in (1, 2) for what in ("prefill", "decode")]
    assert [call[1:] for call in calls] == [(0, 2), (1, 2), (2, 2)]
    assert found.weight_bytes == sum(p.nbytes for p in model.parameters())
    assert found.cache_bytes_per_token == 2 * 3 * 2 * 16 * 4
    json.dumps(asdict(found))


def test_a_model_of_few_positions() -> None:
    model = make_model(llama_config(max_position_embeddings=24))
    found = measure_speed(model, (1,), repeats=1)
    assert (found.prompt, found.new) == (12, 12)


def test_refusals(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SalienceError, match="at least 1"):
        measure_speed(model, (0,))
    with pytest.raises(SalienceError, match="at least 2"):
        measure_speed(model, (1,), new=1)
    monkeypatch.setattr("salience.bench.measure.free_bytes", lambda _: 1000)
    with pytest.raises(DoesNotFitError, match="the cache of batch 4 needs"):
        measure_speed(model, (4,))
