"""GPTQ's codes against a plain recursion in fp64, and on inputs made to break it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from salience import grid
from salience.grid import Grid
from salience.methods import full_grids
from salience.methods import gptq as module
from salience.methods.awq import search_grids
from salience.methods.base import Problem, nearest
from salience.methods.gptq import DAMPING, SWEEPS, compensate, damped
from salience.qtensor import QTensor
from salience.scheme import Scheme


def weights(rows: int, columns: int, seed: int, batch: int = 1) -> Tensor:
    """Normal weights with outliers: [batch, rows, columns]."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(batch, rows, columns, generator=random)
    loud = torch.rand(batch, rows, columns, generator=random) < 0.02
    return torch.where(loud, 6 * weight, weight) * 0.1


def moments(columns: int, seed: int, batch: int = 1, tokens: int = 400) -> Tensor:
    """H of inputs that share a few directions, of channels of different size."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(batch, max(columns // 4, 1), columns, generator=random)
    x = torch.randn(batch, tokens, mix.shape[1], generator=random) @ mix
    x += 0.3 * torch.randn(batch, tokens, columns, generator=random)
    x *= 10 ** (torch.rand(batch, 1, columns, generator=random) - 0.5)
    return x.mT @ x / tokens


def problem(weight: Tensor, second: Tensor | None, scheme: Scheme) -> Problem:
    names = tuple((f"{i}.linear",) for i in range(len(weight)))
    return Problem(names, weight, (weight.shape[1],), scheme, second)


def losses(qts: list[QTensor], weight: Tensor, second: Tensor) -> Tensor:
    """Output error of each row, in fp64: [batch, rows]."""
    error = torch.stack([qt.dequantize(torch.float64) for qt in qts]) - weight.double()
    return (error @ second.double() * error).sum(-1)


def snapped(value: np.ndarray, scale: np.ndarray, zero: np.ndarray, levels: int) -> np.ndarray:
    return np.clip(np.round(value / scale), -zero, levels - zero)


def plain_gptq(w: Tensor, h: Tensor, grids: Grid, damping: float, sweeps: int) -> np.ndarray:
    """Codes of one weight, row by row, as the paper has it: OBQ's update over the inverse of H.

    It removes a column from the inverse by Gaussian elimination (the paper's equation 3), and so
    never makes the Cholesky factor that is under test.
    """
    weight, second = w.double().numpy(), h.double().numpy().copy()
    columns = weight.shape[1]
    second[np.diag_indices(columns)] += damping * np.diag(second).mean()
    order = np.argsort(-np.diag(second), kind="stable")
    size = columns // grids.scales.shape[-1]
    scales, zeros = grids.scales.double().numpy(), grids.zeros.double().numpy()
    codes = np.zeros(weight.shape)
    for r, row in enumerate(weight):
        left = row.copy()
        inverse = np.linalg.inv(second)
        steps = np.zeros(columns)
        for j in order:
            g = j // size
            steps[j] = snapped(left[j], scales[r, g], zeros[r, g], grids.levels)
            error = (left[j] - steps[j] * scales[r, g]) / inverse[j, j]
            left -= error * inverse[j]
            inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        own = np.repeat(scales[r], size)
        for _ in range(sweeps):
            for j in range(columns):
                error = steps * own - row
                best = steps[j] * own[j] - second[j] @ error / second[j, j]
                steps[j] = snapped(best, own[j], zeros[r, j // size], grids.levels)
        codes[r] = steps + np.repeat(zeros[r], size)
    return codes


def signed_steps(qt: QTensor) -> Tensor:
    zeros = qt.zeros.float().repeat_interleave(qt.in_features // qt.zeros.shape[1], 1)
    return qt.q.float() - zeros


ORACLE_SCHEMES = [
    Scheme(2, 16),
    Scheme(3, 8),
    Scheme(4, 32),
    Scheme(8, 16),
    Scheme(4, -1),
    Scheme(3, 16, True),
]


@pytest.mark.parametrize("scheme", ORACLE_SCHEMES, ids=str)
@pytest.mark.parametrize("columns", [32, 64])
@pytest.mark.parametrize("sweeps", [0, 1, 2])
def test_codes_are_those_of_the_plain_recursion(
    scheme: Scheme, columns: int, sweeps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but a few: where a value lies between two codes, fp32 and fp64 may fall apart."""
    monkeypatch.setattr(module, "DAMPING", 0.05)
    monkeypatch.setattr(module, "SWEEPS", sweeps)
    weight, second = weights(12, columns, 1), moments(columns, 2)
    one = problem(weight, second, scheme)
    grids = full_grids(one)
    (qt,) = compensate(one, grids)
    alone = Grid(grids.scales[0], grids.zeros[0], grids.levels)
    expected = plain_gptq(weight[0], second[0], alone, 0.05, sweeps)
    rows = (qt.q.numpy() == expected).all(1)
    # One code that falls apart changes what follows in its row, and no other row.
    assert rows.mean() > 0.8
    assert torch.equal(qt.scales, alone.scales) and torch.equal(qt.zeros.float(), alone.zeros)
    if scheme.bits < 8:
        assert not torch.equal(qt.q, nearest(one, grids)[0].q)


@pytest.mark.parametrize("edge", [1, 3, 16, 31, 64])
def test_the_width_of_updates_does_not_show(edge: int, monkeypatch: pytest.MonkeyPatch) -> None:
    one = problem(weights(16, 64, 3), moments(64, 4), Scheme(3, 16))
    (whole,) = compensate(one, full_grids(one))
    monkeypatch.setattr(module, "_COLUMNS", edge)
    (parts,) = compensate(one, full_grids(one))
    assert (whole.q == parts.q).all(1).float().mean() > 0.8
    found, other = (losses([qt], one.weight, moments(64, 4)).sum() for qt in (whole, parts))
    assert found.item() == pytest.approx(other.item(), rel=1e-2)


def test_more_columns_than_an_update_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real widths: the far columns hear of the near ones' errors."""
    monkeypatch.setattr(module, "SWEEPS", 0)
    columns = 3 * module._COLUMNS
    one = problem(weights(6, columns, 5), moments(columns, 6, tokens=2000), Scheme(3, 128))
    grids = full_grids(one)
    (qt,) = compensate(one, grids)
    alone = Grid(grids.scales[0], grids.zeros[0], grids.levels)
    expected = plain_gptq(one.weight[0], one.second[0], alone, DAMPING, 0)  # type: ignore[index]
    assert (qt.q.numpy() == expected).mean() > 0.95


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([8, 16, -1]),
    sym=st.booleans(),
    rows=st.integers(1, 7),
    tokens=st.sampled_from([1, 5, 200]),
    seed=st.integers(0, 2**31),
)
def test_descent_never_raises_the_damped_error(
    bits: int, group: int, sym: bool, rows: int, tokens: int, seed: int
) -> None:
    """From any codes at all: those of the recursion, of rounding, and random ones."""
    scheme = Scheme(bits, group, sym)
    weight, second = weights(rows, 32, seed, batch=2), moments(32, seed + 1, 2, tokens)
    grids = full_grids(problem(weight, second, scheme))
    made, hurt = Grid(grids.scales, grids.zeros.float(), grids.levels), damped(second, DAMPING)
    size = scheme.group_columns(32)
    scales = made.scales.float().repeat_interleave(size, -1)
    zeros = made.zeros.repeat_interleave(size, -1)
    random = torch.Generator().manual_seed(seed)
    chance = torch.randint(scheme.levels + 1, weight.shape, generator=random) - zeros
    rounded = torch.stack(
        [signed_steps(qt) for qt in nearest(problem(weight, second, scheme), grids)]
    )
    for first in (module._recursion(weight, hurt, made).mT, rounded, chance):
        before = None
        steps = first.mT.contiguous()
        for _ in range(4):
            error = (steps.mT * scales - weight).double()
            now = (error @ hurt.double() * error).sum(-1)
            assert before is None or (now <= before * (1 + 1e-4) + 1e-12).all()
            before, steps = now, module._descent(weight, steps, hurt, made)
            assert ((steps.mT + zeros >= 0) & (steps.mT + zeros <= scheme.levels)).all()


def test_descent_leaves_its_input_alone() -> None:
    weight, second = weights(4, 32, 7), moments(32, 8)
    grids = full_grids(problem(weight, second, Scheme(3, 8)))
    made = Grid(grids.scales, grids.zeros.float(), grids.levels)
    steps = torch.zeros(1, 32, 4)
    module._descent(weight, steps, damped(second, DAMPING), made)
    assert not steps.any()


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(3, 16), Scheme(2, 64), Scheme(3, -1)])
def test_a_batch_of_blocks_is_coded_as_each_alone(scheme: Scheme) -> None:
    batch = 4
    weight, second = weights(24, 128, 9, batch), moments(128, 10, batch)
    second[1] = 0  # silent
    second[2, :3] = second[2, :, :3] = 0  # dead channels
    together = problem(weight, second, scheme)
    found = compensate(together, search_grids(together))
    for i, qt in enumerate(found):
        one = problem(weight[i : i + 1], second[i : i + 1], scheme)
        (alone,) = compensate(one, search_grids(one))
        assert torch.equal(qt.q, alone.q)
        assert torch.equal(qt.scales, alone.scales) and torch.equal(qt.zeros, alone.zeros)


def test_it_is_much_better_than_rounding() -> None:
    weight, second = weights(64, 128, 11), moments(128, 12)
    one = problem(weight, second, Scheme(3, 32))
    rounded = losses(nearest(one, full_grids(one)), weight, second).sum()
    found = losses(compensate(one, full_grids(one)), weight, second).sum()
    assert found < 0.4 * rounded


def test_without_text_it_is_rounding() -> None:
    one = problem(weights(8, 64, 13), None, Scheme(4, 16))
    (found,), (rounded,) = compensate(one, full_grids(one)), nearest(one, full_grids(one))
    assert torch.equal(found.q, rounded.q)


@pytest.mark.parametrize("scheme", [Scheme(4, 16), Scheme(4, -1), Scheme(3, 16, True)], ids=str)
def test_uncorrelated_inputs_are_rounding(scheme: Scheme) -> None:
    """With a diagonal H there is nothing that another column could make up for."""
    second = torch.diag(torch.logspace(-2, 2, 64))[None]
    one = problem(weights(8, 64, 14), second, scheme)
    (found,), (rounded,) = compensate(one, full_grids(one)), nearest(one, full_grids(one))
    assert torch.equal(found.q, rounded.q)


def test_dead_columns_are_rounded_to_nearest() -> None:
    weight, second = weights(16, 64, 15), moments(64, 16)
    dead = [0, 5, 17, 63]
    second[:, dead] = 0
    second[:, :, dead] = 0
    one = problem(weight, second, Scheme(3, 16))
    (found,), (rounded,) = compensate(one, full_grids(one)), nearest(one, full_grids(one))
    assert torch.equal(found.q[:, dead], rounded.q[:, dead])
    assert not torch.equal(found.q, rounded.q)


BITS = [2, 3, 4, 8]
GROUPS = [32, 64, 128, -1]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", GROUPS)
def test_nothing_to_see_is_finite(bits: int, group: int) -> None:
    """Rows and groups of zeros, on inputs from none at all to plenty."""
    scheme = Scheme(bits, group, sym=(BITS.index(bits) + GROUPS.index(group)) % 2 == 1)
    weight = weights(8, 128, 17)
    weight[0, 0] = 0
    weight[0, 1, 32:64] = 0
    weight[0, 2] = 0.25
    weight[0, 3] = -0.25
    plenty = moments(128, 18)
    dead = plenty.clone()
    dead[:, :40] = dead[:, :, :40] = 0
    silent = torch.zeros_like(plenty)
    few = moments(128, 19, tokens=7)
    token = torch.randn(1, 128, generator=torch.Generator().manual_seed(20))
    repeated = (token.T @ token)[None]
    twins = plenty[:, :1, :1].expand(1, 128, 128).contiguous()  # all channels are one
    tiny, huge = 1e-12 * plenty, 1e12 * plenty
    for second in (plenty, dead, silent, few, repeated, twins, tiny, huge):
        one = problem(weight, second, scheme)
        for grids in (full_grids(one), search_grids(one)):
            (qt,) = compensate(one, grids)
            assert qt.q.max() <= scheme.levels and qt.dequantize().isfinite().all()
            assert not qt.dequantize()[0].any()
            if group == 32:
                assert not qt.dequantize()[1, 32:64].any()
        assert torch.equal(weight[0, 2], torch.full((128,), 0.25))  # the input stays
    none = problem(torch.zeros(1, 4, 128), plenty, scheme)
    (qt,) = compensate(none, full_grids(none))
    assert not qt.dequantize().any()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [8, 32, -1])
@pytest.mark.parametrize("sym", [False, True])
def test_the_error_is_below_that_of_rounding(bits: int, group: int, sym: bool) -> None:
    """Of many rows together; a single one may lose, and what is written may not (`test_block`)."""
    weight, second = weights(48, 64, 26), moments(64, 27)
    one = problem(weight, second, Scheme(bits, group, sym))
    for grids in (full_grids(one), search_grids(one)):
        found = losses(compensate(one, grids), weight, second).sum()
        assert found < 0.75 * losses(nearest(one, grids), weight, second).sum()


def test_damping() -> None:
    second = moments(16, 21, batch=2)
    before = second.clone()
    found = damped(second, 0.1)
    assert torch.equal(second, before)
    added = found - second
    for i in range(2):
        torch.testing.assert_close(
            added[i], 0.1 * second[i].diagonal().mean() * torch.eye(16), rtol=1e-3, atol=1e-6
        )
    assert (damped(torch.zeros(1, 4, 4), 0.1).diagonal(dim1=1, dim2=2) > 0).all()
    assert 0 < DAMPING < 1 and SWEEPS >= 1


def test_the_factor_is_that_of_the_inverse() -> None:
    second = damped(moments(48, 22, batch=3), 0.01)
    upper = module._factor(second)
    assert torch.equal(upper, upper.triu())
    inverse = torch.linalg.inv(second.double())
    torch.testing.assert_close(
        (upper.mT @ upper).double(), inverse, rtol=0, atol=1e-3 * inverse.abs().max().item()
    )


def test_a_matrix_without_a_factor_is_damped_more() -> None:
    """Only that one: the others of the batch keep theirs."""
    good = damped(moments(32, 23), 0.1)
    bad = good.clone()
    bad[0, 0, 0] = -1.0  # beyond what rounding does to a second moment
    upper = module._factor(torch.cat([good, bad]))
    assert upper.isfinite().all() and (upper.diagonal(dim1=1, dim2=2) > 0).all()
    assert torch.equal(upper[0], module._factor(good)[0])


def test_groups_are_those_of_the_columns() -> None:
    """Static groups: the order of the work does not show in the checkpoint."""
    one = problem(weights(8, 64, 24), moments(64, 25), Scheme(4, 16))
    grids = full_grids(one)
    (qt,) = compensate(one, grids)
    assert qt.g_idx is None and torch.equal(qt.scales, grids.scales[0])
    away = (qt.dequantize() - one.weight[0]).abs().unflatten(1, (4, 16))
    inside = (qt.q > 0) & (qt.q < 15)
    # Each code is near what its own group's grid has there, moved by no more than a few steps.
    assert (away / grids.scales[0].float()[..., None]).flatten(1)[inside].max() < 8
    assert torch.equal(grid.quantize(one.weight[0], one.scheme).scales, qt.scales)


@pytest.mark.parametrize("descent", [False, True])
@pytest.mark.parametrize(("columns", "rows", "groups"), [(32, 40, 2), (24, 7, 3), (1, 16, 1)])
def test_the_triton_walk_is_the_plain_one(
    descent: bool, columns: int, rows: int, groups: int
) -> None:
    gptq_triton = pytest.importorskip("salience.methods.gptq_triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"  # without a GPU it is interpreted
    random = torch.Generator().manual_seed(columns)
    start = torch.randn(2, columns + 3, rows, generator=random)[:, :columns].to(device)
    second = damped(moments(columns + 2, 1, batch=2), DAMPING)[:, :columns, :columns].to(device)
    scales = (torch.rand(2, groups, rows, generator=random) * 0.2 + 0.1).half().to(device)
    zeros = torch.randint(0, 8, (2, groups, rows), generator=random).float().to(device)
    group = torch.randint(0, groups, (2, columns), generator=random).to(device)
    if descent:
        old = torch.randint(-4, 4, start.shape, generator=random).float().to(device)
        arguments = (second, old, scales, zeros, group, 7)
        want = module.move_columns(start.clone(), *arguments)
        found = gptq_triton.move_columns(start, *arguments)
    else:
        near = second / second.diagonal(dim1=-2, dim2=-1)[..., None]
        arguments = (near, scales, zeros, group, 7)
        want = module.round_columns(start.clone(), *arguments)
        found = gptq_triton.round_columns(start, *arguments)
    assert torch.equal(found[0], want[0])
    torch.testing.assert_close(found[1], want[1], rtol=1e-4, atol=1e-5)
