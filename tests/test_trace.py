"""A traced and rewritten step: how much of it is replaced, and that the logits stay."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from salience.linear import QuantLinear
from salience.runtime import graph, lowering, record, trace
from salience.runtime.cache import SlotCache, padded
from salience.runtime.merge import merge_linears
from salience.runtime.step import Step, make_step
from test_merge import packed
from tiny_architectures import COMMON, OTHERS, architecture
from tiny_models import VOCABULARY, error, make_model

CAPACITY = padded(100)


def step_of(model: Any, rows: int) -> Step:
    """A step over a cache with random keys and values of all lengths."""
    cache = SlotCache(rows, CAPACITY)
    step = Step(model, cache, VOCABULARY)
    with torch.no_grad():
        cache.at_rows(torch.zeros(rows, dtype=torch.int64))
        step(torch.zeros(rows, 1, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64))
        random = torch.Generator().manual_seed(1)
        for layer in cache.layers:
            for buffer in (layer.keys, layer.values):
                buffer.copy_(torch.randn(buffer.shape, generator=random))
    return step


def inputs(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (rows, 1), generator=random)
    return ids, torch.randint(CAPACITY, (rows,), generator=random)


@torch.no_grad()
def rewritten(step: Step, rows: int) -> tuple[graph.Step, dict[str, int]]:
    gm = record.capture(step, inputs(rows))
    counts = trace.rewrite(gm)
    return graph.runner(gm), counts


# Norms, those with a sum before them, gated activations, attentions, rotations: of two blocks. Some
# versions of Transformers write gemma2's attention so that it is found, too.
COUNTS = {
    "llama": (5, 3, 2, 2, 2),
    "qwen2": (5, 3, 2, 2, 2),
    "qwen3": (9, 3, 2, 2, 2),
    "gemma": (5, 3, 2, 2, 2),
    "gemma2": (9, 3, 2, 0, 0),
    "gemma3_text": (13, 3, 2, 2, 2),
    "mistral": (5, 3, 2, 2, 2),
    "phi3": (5, 3, 2, 2, 2),
    "gpt_neox": (0, 0, 0, 2, 2),
    "cohere": (0, 0, 2, 2, 2),
    "mixtral": (5, 3, 2, 2, 2),
}
PASSES = ("rms_norms", "residual_norms", "gated_activations", "decode_attentions", "rotations")


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", COUNTS)
def test_what_is_replaced(name: str, rows: int) -> None:
    model = make_model(architecture(name))
    step = step_of(model, rows)
    fast, counts = rewritten(step, rows)
    found = tuple(counts[each] for each in PASSES)
    assert found in (COUNTS[name], (*COUNTS[name][:3], 2, 2))
    for seed in range(4):
        ids, positions = inputs(rows, seed)
        with torch.no_grad():
            step.cache.at_rows(positions)
            found = fast(ids, positions)
            written = [layer.keys.clone() for layer in step.cache.layers]
            expected = step(ids, positions)
        assert error(found, expected) < 2e-5
        for layer, keys in zip(step.cache.layers, written, strict=True):
            assert error(keys, layer.keys) < 1e-5


@pytest.mark.parametrize("name", ["llama", "cohere"])
@torch.no_grad()
def test_merged_and_packed_in_bf16(name: str) -> None:
    model = packed(make_model(architecture(name))).bfloat16()
    step = step_of(model, 1)
    ids, positions = inputs(1)
    expected = step(ids, positions)
    merge_linears(model)
    fast = trace.optimize(step, ids, positions)
    assert fast is not step
    assert error(fast(ids, positions), expected) < 5e-2
    assert any(isinstance(m, QuantLinear) for m in model.modules())


@pytest.mark.parametrize("kind", ["float", "packed"])
@torch.no_grad()
def test_one_row_in_bf16(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float weights are read in the order of oneDNN, as far as there is room for copies, and there
    are no views between a product and what is computed from it.
    """
    if not lowering._reorders():
        pytest.skip("no bf16 in oneDNN here")
    model = make_model(architecture("llama")).bfloat16()
    model = packed(model).bfloat16() if kind == "packed" else model
    merge_linears(model)
    step = step_of(model, 1)
    linears = {"float": 9, "packed": 1}[kind]  # the head, and four in each of two blocks
    room = model.lm_head.weight.nbytes
    for most, expected in ((2**20, linears), (room, min(linears, 3)), (0, 0)):
        monkeypatch.setattr(lowering, "_REORDERED_BYTES", most)
        gm = record.capture(step, inputs(1))
        trace.rewrite(gm)
        target = torch.ops.mkldnn._linear_pointwise.default
        assert sum(graph.is_op(node, target) for node in gm.graph.nodes) == expected
        if most > room:
            views = (graph.aten.view.default, graph.aten.reshape.default)
            assert sum(graph.is_op(node, *views) for node in gm.graph.nodes) <= 2 * 6 + 7


@torch.no_grad()
def test_state_is_put_back() -> None:
    step = step_of(make_model(architecture("llama")), 2)
    ids, positions = inputs(2)
    step.cache.at_rows(positions)
    expected = step(ids, positions)
    before = [layer.keys.clone() for layer in step.cache.layers]
    assert trace.optimize(step, ids, positions) is not step
    assert all(torch.equal(a, b.keys) for a, b in zip(before, step.cache.layers, strict=True))
    assert torch.equal(step(ids, positions), expected)


@torch.no_grad()
def test_what_lies_behind_a_position_is_not_read() -> None:
    step = step_of(make_model(architecture("llama")), 1)
    ids, positions = torch.tensor([[7]]), torch.tensor([20])
    step.cache.at_rows(positions)
    fast = trace.optimize(step, ids, positions)
    expected = fast(ids, positions)
    for layer in step.cache.layers:
        layer.keys[:, :, 21:] = torch.nan
        layer.values[:, :, 21:] = torch.nan
    assert torch.equal(fast(ids, positions), expected)


def test_a_wrong_rewrite_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step = step_of(make_model(architecture("llama")), 1)

    def broken(gm: Any) -> int:
        node = next(n for n in gm.graph.nodes if graph.is_op(n, graph.aten.silu.default))
        node.target = graph.aten.relu.default
        return 1

    monkeypatch.setattr(trace, "gated_activations", broken)
    with caplog.at_level(logging.WARNING):
        assert trace.optimize(step, *inputs(1)) is step
    assert "logits differ" in caplog.text
    assert len(caplog.records) == 1


def test_control_flow_by_value_stays_plain(caplog: pytest.LogCaptureFixture) -> None:
    linear = nn.Linear(4, 4)

    def step(ids: Tensor, positions: Tensor) -> Tensor:
        x = ids.float().expand(-1, 4)
        return linear(x) if positions.max() > 3 else x

    with caplog.at_level(logging.WARNING):
        assert trace.optimize(step, *inputs(1)) is step
    assert len(caplog.records) == 1


def test_nothing_that_is_written_to_is_folded() -> None:
    """A sum into fresh zeros begins at zero each time."""

    def step(ids: Tensor, positions: Tensor) -> Tensor:
        total = torch.zeros(2, 4)
        total.index_add_(0, torch.zeros(1, dtype=torch.int64), ids.float().expand(1, 4))
        return total * 2

    fast = trace.optimize(step, torch.tensor([[3]]), torch.tensor([0]))
    assert fast is not step
    for _ in range(2):
        assert fast(torch.tensor([[3]]), torch.tensor([0]))[0].tolist() == [6.0] * 4


@pytest.mark.slow
@pytest.mark.parametrize("name", [*COMMON, *OTHERS])
@torch.no_grad()
def test_all_architectures(name: str) -> None:
    """Merged, and optimized or plain: the logits are the same."""
    model = make_model(architecture(name))
    made = make_step(model, 2, CAPACITY)
    if not isinstance(made, Step):
        pytest.skip("it keeps a state of its own")
    step = step_of(model, 2)
    step.with_mask = made.with_mask
    ids, positions = inputs(2)
    step.cache.at_rows(positions)
    expected = step(ids, positions)
    merge_linears(model)
    assert error(step(ids, positions), expected) < 1e-4
    fast = trace.optimize(step, ids, positions)
    assert error(fast(ids, positions), expected) < 1e-4
