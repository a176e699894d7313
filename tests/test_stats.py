"""Second moments against fp64, and the monoid that streaming and resuming rest on."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from salience.stats import SecondMoment, output_error

WIDTH = 24


def inputs(tokens: int, seed: int = 0) -> Tensor:
    """Correlated inputs with a mean and channels of very different size."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=random)
    x = torch.randn(tokens, WIDTH, generator=random) @ mix + 0.5
    return x * torch.logspace(-2, 2, WIDTH)


def moment(*parts: Tensor) -> SecondMoment:
    result = SecondMoment.empty(WIDTH)
    for part in parts:
        result.update(part)
    return result


def same(a: SecondMoment, b: SecondMoment) -> None:
    assert a.count == b.count
    torch.testing.assert_close(a.gram, b.gram, rtol=1e-4, atol=1e-4 * a.gram.abs().max().item())
    torch.testing.assert_close(a.abs_sum, b.abs_sum, rtol=1e-5, atol=0)


def test_moments_equal_fp64() -> None:
    x = inputs(500)
    found = moment(x.view(5, 100, WIDTH))
    exact = x.double()
    size = exact.square().mean(0).sqrt()
    error = found.second.double() - exact.T @ exact / 500
    assert (error / size[:, None] / size).abs().max() < 1e-5
    torch.testing.assert_close(found.mean_abs.double(), exact.abs().mean(0), rtol=1e-5, atol=0)
    assert found.count == 500


@given(cuts=st.lists(st.integers(0, 60), min_size=1, max_size=5), order=st.randoms())
def test_update_and_merge_are_one_sum(cuts: list[int], order: object) -> None:
    x = inputs(60)
    edges = [0, *sorted(cuts), 60]
    parts = [x[a:b] for a, b in itertools.pairwise(edges)]
    whole = moment(x)
    same(moment(*parts), whole)
    order.shuffle(parts)  # type: ignore[attr-defined]
    left = SecondMoment.empty(WIDTH)
    for part in parts:
        left.merge(moment(part))
    same(left, whole)
    right = SecondMoment.empty(WIDTH)
    for part in reversed(parts):  # associated from the other end
        other = moment(part)
        other.merge(right)
        right = other
    same(right, whole)


def test_empty_is_neutral() -> None:
    found, x = moment(inputs(10)), inputs(10)
    found.merge(SecondMoment.empty(WIDTH))
    same(found, moment(x))
    empty = SecondMoment.empty(WIDTH)
    assert not empty.second.any() and not empty.mean_abs.any()
    assert empty.second.isfinite().all()


def test_half_precision_inputs_are_summed_in_fp32() -> None:
    x = inputs(2000)
    half = x.to(torch.bfloat16)
    found = moment(half)
    assert found.gram.dtype == torch.float32
    same(found, moment(half.float()))


def test_update_keeps_its_input_and_no_graph() -> None:
    x = inputs(8).requires_grad_()
    before = x.detach().clone()
    found = moment(x)
    assert torch.equal(x.detach(), before) and not found.gram.requires_grad


def test_output_error_of_a_batch() -> None:
    random = torch.Generator().manual_seed(4)
    moments = [moment(inputs(30, seed)) for seed in (5, 6)]
    difference = torch.randn(2, 10, WIDTH, generator=random) / torch.logspace(-2, 2, WIDTH)
    found = output_error(difference, torch.stack([m.second for m in moments]))
    for part, each, m in zip(found, difference, moments, strict=True):
        torch.testing.assert_close(part, output_error(each, m.second))
    alone = output_error(difference, None)
    torch.testing.assert_close(alone, output_error(difference, torch.eye(WIDTH).expand(2, -1, -1)))


@pytest.mark.parametrize("tokens", [1, 7, 200])
def test_output_error_is_that_of_the_outputs(tokens: int) -> None:
    random = torch.Generator().manual_seed(3)
    x = inputs(tokens)
    difference = torch.randn(10, WIDTH, generator=random) / torch.logspace(-2, 2, WIDTH)
    before = difference.clone()
    expected = (x.double() @ difference.double().T).square().mean(0)
    found = output_error(difference, moment(x).second)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)
    assert torch.equal(difference, before)


def test_output_error_is_never_negative() -> None:
    """The error along a direction that no input has is 0; rounding must not make it less."""
    x = inputs(3)
    _, _, directions = torch.linalg.svd(x.double())
    assert (output_error(directions[3:].float(), moment(x).second) >= 0).all()
