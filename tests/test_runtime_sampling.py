"""Sampling against the distribution in fp64, row by row, without a word from the host."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from salience.errors import SalienceError
from salience.runtime.sampling import Features, Sampling, SamplingState, _gumbel

CPU = torch.device("cpu")
VOCABULARY = 40
DRAWS = 20_000


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def oracle(logits: np.ndarray, sampling: Sampling, prompt: list[int], reply: list[int]) -> Any:
    """The probabilities of the next token, one filter after the other."""
    logits = logits.astype(np.float64)
    for token in {*prompt, *reply}:
        scale = sampling.repetition_penalty
        logits[token] = logits[token] / scale if logits[token] > 0 else logits[token] * scale
    for token in set(reply):
        logits[token] -= sampling.presence_penalty + sampling.frequency_penalty * reply.count(token)
    if sampling.temperature == 0:
        return np.eye(len(logits))[logits.argmax()]
    weights = softmax(logits / sampling.temperature)
    order = np.argsort(-weights)
    largest = weights.max()
    if sampling.top_k:
        weights[order[sampling.top_k :]] = 0
    if sampling.top_p < 1:
        before = np.cumsum(weights[order]) - weights[order]
        outside = before >= sampling.top_p * weights.sum()
        weights[order[outside]] = 0
    weights[weights < sampling.min_p * largest] = 0
    return weights / weights.sum()


def draw(logits: Tensor, samplings: list[Sampling], position: int = 0) -> Tensor:
    rows = len(samplings)
    state = SamplingState(rows, logits.shape[-1], CPU)
    for row, sampling in enumerate(samplings):
        state.set(row, sampling, [1])
    positions, active = torch.full((rows,), position), torch.ones(rows, dtype=torch.bool)
    features = Features.of(samplings)
    return state.sample(logits.expand(rows, -1), slice(0, rows), positions, active, features)


def many(logits: Tensor, sampling: Sampling, prompt: list[int], reply: list[int]) -> Tensor:
    """One token for each of many seeds."""
    state = SamplingState(DRAWS, logits.shape[-1], CPU)
    state.set(0, sampling, prompt)
    state.numbers[:], state.top_k[:] = state.numbers[:, :1].clone(), sampling.top_k
    state.prompted[:] = state.prompted[:1].clone()
    state.seeds[0] = torch.arange(DRAWS)
    for token in reply:
        state.counts[:, token] += 1
    positions, active = torch.zeros(DRAWS).long(), torch.ones(DRAWS, dtype=torch.bool)
    features = Features.of([sampling])
    return state.sample(logits.expand(DRAWS, -1), slice(0, DRAWS), positions, active, features)


CASES = {
    "temperature": Sampling(temperature=0.7),
    "hot": Sampling(temperature=3.0),
    "top_k": Sampling(temperature=1.0, top_k=5),
    "top_p": Sampling(temperature=1.0, top_p=0.8),
    "min_p": Sampling(temperature=1.5, min_p=0.1),
    "all filters": Sampling(temperature=1.2, top_k=9, top_p=0.7, min_p=0.05),
    "penalties": Sampling(
        temperature=1.0, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4
    ),
    "one left": Sampling(temperature=1.0, top_p=1e-6),
}


@pytest.mark.parametrize("name", CASES)
def test_distribution(name: str) -> None:
    """Each row has its own seed; together they are draws of the distribution."""
    case = CASES[name]
    logits = 2 * torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(1))
    prompt, reply = [1, 2, 3, 2], [5, 6, 5, 1]
    found = np.bincount(many(logits, case, prompt, reply).numpy(), minlength=VOCABULARY)
    expected = DRAWS * oracle(logits[0].numpy(), case, prompt, reply)
    assert not found[expected == 0].any()
    possible = expected > 0
    chi2 = ((found - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = max(possible.sum() - 1, 1)
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom)


def test_noise_along_positions_and_tokens_is_gumbel() -> None:
    seeds = torch.tensor([[7], [0]]).expand(2, 300)
    noise = _gumbel(seeds, torch.arange(300), 500).double()
    assert noise.isfinite().all()
    uniform = torch.exp(-torch.exp(-noise))
    histogram = torch.histc(uniform, 50, 0, 1) / noise.numel() * 50
    assert (histogram - 1).abs().max() < 0.08
    for shifted in (uniform.roll(1, 0), uniform.roll(1, 1)):
        correlation = torch.corrcoef(torch.stack([uniform.flatten(), shifted.flatten()]))[0, 1]
        assert abs(correlation) < 0.015


def test_noise_of_near_seeds_is_unrelated() -> None:
    seeds = torch.tensor([[0, 1, 2**31, 0, 0], [0, 0, 0, 1, 2]])
    noise = _gumbel(seeds, torch.full((5,), 3), 5000)
    assert (torch.corrcoef(noise) - torch.eye(5)).abs().max() < 0.08


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_is_argmax(dtype: torch.dtype) -> None:
    """Also where another row of the batch draws, and where tokens tie."""
    logits = torch.randn(6, VOCABULARY).to(dtype)
    logits[2, 5] = logits[2, 9] = 50
    state = SamplingState(6, VOCABULARY, CPU)
    samplings = [Sampling(), *[Sampling(temperature=0.5, top_k=3)] * 2, *[Sampling()] * 3]
    for row, sampling in enumerate(samplings):
        state.set(row, sampling, [])
    rows, active = torch.arange(6), torch.ones(6, dtype=torch.bool)
    for features in (Features(), Features.of(samplings)):
        found = state.sample(logits, slice(0, 6), rows, active, features)
        for row in (0, 3, 4, 5):
            assert found[row] == logits[row].argmax()


def test_a_row_depends_on_its_own_seed_only() -> None:
    logits = torch.randn(1, VOCABULARY)
    mine = Sampling(temperature=1.0, seed=123456789012, top_p=0.95)
    other = Sampling(temperature=9.0, seed=5, repetition_penalty=2.0)
    alone = [int(draw(logits, [mine], p)[0]) for p in range(50)]
    among = [int(draw(logits, [other, mine, other], p)[1]) for p in range(50)]
    assert alone == among
    assert len(set(alone)) > 5
    another = Sampling(temperature=1.0, seed=123456789013, top_p=0.95)
    assert alone != [int(draw(logits, [another], p)[0]) for p in range(50)]


@given(st.integers(1, 100), st.sets(st.integers(0, 99), min_size=1), st.integers(0, 2**64))
def test_bitmask(vocabulary: int, allowed: set[int], seed: int) -> None:
    allowed = {token % vocabulary for token in allowed}
    state = SamplingState(2, vocabulary, CPU)
    for row in range(2):
        state.set(row, Sampling(temperature=5.0 * row, seed=seed), [])
    words = np.zeros(-(-vocabulary // 32), dtype=np.uint32)
    for token in allowed:
        words[token // 32] |= np.uint32(1 << token % 32)
    state.bitmask[1] = torch.from_numpy(words.view(np.int32))
    logits = torch.arange(vocabulary).float().repeat(2, 1)
    found = state.sample(
        logits,
        slice(0, 2),
        torch.zeros(2).long(),
        torch.ones(2).bool(),
        Features(True, masked=True),
    )
    assert found[0] == vocabulary - 1  # nothing forbidden
    assert int(found[1]) in allowed


def test_logprobs_are_those_of_the_model() -> None:
    logits = torch.randn(3, VOCABULARY)
    state = SamplingState(3, VOCABULARY, CPU)
    samplings = [Sampling(logprobs=4, temperature=2.0, presence_penalty=1.0), Sampling(logprobs=0)]
    for row, sampling in enumerate(samplings):
        state.set(row, sampling, [])
    features = Features.of(samplings)
    found = state.sample(logits, slice(0, 3), torch.zeros(3).long(), torch.ones(3).bool(), features)
    expected = logits.double().log_softmax(-1)
    torch.testing.assert_close(
        state.logprob.double(), expected.gather(1, found[:, None])[:, 0], atol=1e-5, rtol=0
    )
    top = expected.topk(4)
    assert state.top_tokens[:, :4].equal(top.indices)
    torch.testing.assert_close(state.top_logprobs[:, :4].double(), top.values, atol=1e-5, rtol=0)


def test_counts_are_those_of_active_rows() -> None:
    state = SamplingState(2, 8, CPU)
    sampling = Sampling(frequency_penalty=1.0)
    for row in range(2):
        state.set(row, sampling, [3])
    logits = torch.eye(8)[[4, 5]]
    active = torch.tensor([True, False])
    state.sample(logits, slice(0, 2), torch.zeros(2).long(), active, Features.of([sampling]))
    assert state.counts.nonzero().tolist() == [[0, 4]]
    assert state.prompted.nonzero().tolist() == [[0, 3], [1, 3]]
    state.set(0, sampling, [2])
    assert not state.counts.any()
    assert state.prompted[0].nonzero().tolist() == [[2]]


class NoHostReads(TorchDispatchMode):
    """Fails where the host would wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal"), name
        return func(*args, **(kwargs or {}))


def test_no_host_reads() -> None:
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoHostReads():
        torch.ones(1).item()
    sampling = Sampling(
        temperature=1.0, top_k=3, top_p=0.9, min_p=0.01, presence_penalty=1.0, logprobs=5
    )
    state = SamplingState(4, VOCABULARY, CPU)
    assert state.bitmask.shape == (4, 2)
    logits, rows = torch.randn(4, VOCABULARY), torch.arange(4)
    with NoHostReads():
        for row in range(4):
            state.set(row, sampling, [1, 2])
        features = Features.of([sampling, Sampling()], masked=True)
        state.sample(logits, slice(0, 4), rows, rows > 1, features)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"presence_penalty": float("inf")},
        {"logprobs": 21},
        {"stop": ("",)},
        {"stop": "text"},
    ],
)
def test_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(SalienceError, match=f"^{next(iter(wrong))} is "):
        Sampling(**wrong)
