"""The grid against an oracle in fp64 that works a group at a time."""

import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from salience import grid
from salience.codebook import nested_table, table
from salience.errors import SalienceError
from salience.qtensor import QTensor
from salience.scheme import Scheme

ALL = [(bits, sym) for bits in range(1, 9) for sym in (False, True)]


def half_to_even(value: float) -> float:
    """Round as Python does: ties to even."""
    return float(round(value))


def oracle_grid(group: list[float], bits: int, sym: bool) -> tuple[float, float]:
    """Scale and zero of one group of weights, in fp64 but for the stored scale."""
    levels = 2**bits - 1
    low, high = min(0.0, *group), max(0.0, *group)
    width = 2 * max(-low, high) if sym else high - low
    scale = float(numpy.float16(numpy.float32(width / levels))) or 1.0
    if sym:
        return scale, 2.0 ** (bits - 1)
    return scale, min(max(half_to_even(-low / scale), 0.0), levels)


def oracle_code(weight: float, scale: float, zero: float, bits: int) -> int:
    return int(min(max(half_to_even(weight / scale) + zero, 0), 2**bits - 1))


def is_tie(value: float) -> bool:
    """Whether fp32 may round this to the other side: a hair from half way between integers."""
    return abs(value - math.floor(value) - 0.5) < 1e-5 * max(1.0, abs(value))


def compare(weight: Tensor, scheme: Scheme) -> QTensor:
    """Quantize, and check each scale, zero and code."""
    qt = grid.quantize(weight, scheme)
    assert qt.scales.dtype == torch.float16
    size = scheme.group_columns(weight.shape[1])
    for row in range(weight.shape[0]):
        for g in range(weight.shape[1] // size):
            group = weight[row, g * size : (g + 1) * size].double().tolist()
            scale, zero = oracle_grid(group, scheme.bits, scheme.sym)
            assert qt.scales[row, g].item() == scale
            found = qt.zeros[row, g].item()
            if not scheme.sym and is_tie(-min(0.0, *group) / scale):
                assert abs(found - zero) <= 1
            else:
                assert found == zero
            for j, value in enumerate(group):
                code = qt.q[row, g * size + j].item()
                want = oracle_code(value, scale, found, scheme.bits)
                assert abs(code - want) <= is_tie(value / scale), (value, scale, zero)
    return qt


@pytest.mark.parametrize(("bits", "sym"), ALL)
@pytest.mark.parametrize("group_size", [16, -1])
def test_agrees_with_oracle(bits: int, sym: bool, group_size: int) -> None:
    random = torch.Generator().manual_seed(bits)
    weight = torch.randn(6, 48, generator=random) * torch.logspace(-6, 3, 6)[:, None]
    compare(weight, Scheme(bits, group_size, sym))


weights = st.lists(
    st.floats(-1000, 1000, width=32).filter(lambda v: v == 0 or abs(v) > 1e-30),
    min_size=8,
    max_size=8,
)


@settings(deadline=None, max_examples=300)
@given(values=weights, bits=st.integers(1, 8), sym=st.booleans())
def test_error_is_at_most_half_a_step(values: list[float], bits: int, sym: bool) -> None:
    scheme = Scheme(bits, 8, sym)
    weight = torch.tensor([values])
    qt = compare(weight, scheme)
    scale = qt.scales.double().item()
    low, high = min(0.0, *values), max(0.0, *values)
    width = 2 * max(-low, high) if sym else high - low
    # The fp16 scale is not the exact one: the grid is wider or narrower by this at its ends.
    slack = abs(width - (2**bits - 1) * scale) if scale != 1 or width > 1 else 0.0
    error = (qt.dequantize(torch.float64) - weight.double()).abs().max().item()
    assert error <= (scale / 2 + slack) * (1 + 1e-5)


@settings(deadline=None)
@given(
    values=weights,
    bits=st.integers(1, 8),
    sym=st.booleans(),
    shrink=st.floats(0.25, 1, width=32),
)
def test_snap_is_what_encode_stores(
    values: list[float], bits: int, sym: bool, shrink: float
) -> None:
    scheme = Scheme(bits, 4, sym)
    weight = torch.tensor([values])
    low, high = grid.value_range(weight, scheme)
    steps = grid.make_grid(low * shrink, high * shrink, scheme)
    snapped = grid.snap(grid.grouped(weight, scheme), steps).flatten(1)
    qt = grid.encode(weight, steps, scheme)
    assert torch.equal(qt.dequantize(), snapped)
    again = grid.encode(snapped, steps, scheme)
    assert torch.equal(again.q, qt.q)


def test_scale_is_rounded_before_the_codes() -> None:
    """1/15 is not an fp16 number; the codes must be those of the number that is stored."""
    weight = torch.linspace(0, 1, 4096)[None]
    qt = grid.quantize(weight, Scheme(4, -1))
    scale = torch.tensor(1 / 15).half()
    assert qt.scales.item() == scale.item() != 1 / 15
    assert torch.equal(qt.q, torch.round(weight.double() / scale.double()).to(torch.uint8))
    unrounded = torch.round(weight.double() * 15).to(torch.uint8)
    assert not torch.equal(qt.q, unrounded)


@pytest.mark.parametrize(("bits", "sym"), ALL)
def test_zeros_stay_zero(bits: int, sym: bool) -> None:
    qt = grid.quantize(torch.zeros(2, 8), Scheme(bits, 4, sym))
    assert torch.equal(qt.dequantize(), torch.zeros(2, 8))
    assert torch.equal(qt.scales, torch.ones(2, 2).half())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("value", [5.0, -5.0, 3e-4, -60000.0])
def test_constant_group(bits: int, value: float) -> None:
    """A constant is an end of the grid, exact but for the scale's fp16."""
    qt = grid.quantize(torch.full((1, 8), value), Scheme(bits, 8))
    assert qt.dequantize().unique().numel() == 1
    assert qt.dequantize()[0, 0].item() == pytest.approx(value, rel=2**-8)
    assert qt.zeros.item() == (0 if value > 0 else 2**bits - 1)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("width", [1e-9, 4e-7, 1.2e-6, 1.3e-6, 5e-6])
def test_groups_near_the_end_of_fp16(width: float, sign: int) -> None:
    """Where fp16 has few scales left, zeros and codes stay in their range."""
    weight = sign * torch.linspace(width / 8, width, 8)[None]
    for sym in (False, True):
        qt = compare(weight, Scheme(4, 8, sym))
        assert qt.zeros.max() <= 15 and qt.q.max() <= 15


@pytest.mark.parametrize("sign", [1, -1])
def test_zero_is_on_the_grid_of_one_sided_groups(sign: int) -> None:
    """A weight pruned to 0 among others of one sign stays 0."""
    weight = sign * torch.tensor([[0.0, 7.0, 8.0, 9.0]])
    qt = grid.quantize(weight, Scheme(4, 4))
    assert qt.dequantize()[0, 0] == 0
    assert qt.zeros.item() == (0 if sign == 1 else 15)
    assert qt.scales.item() == pytest.approx(9 / 15, rel=1e-3)


def test_ties_round_to_even() -> None:
    # The range -16..14 in 4 bits has the exact step 2 and the zero 8.
    weight = torch.tensor([[-16.0, 14.0, 1.0, 3.0, 5.0, -1.0, -3.0, -5.0]])
    qt = grid.quantize(weight, Scheme(4, 8))
    assert (qt.scales.item(), qt.zeros.item()) == (2.0, 8)
    assert qt.dequantize().tolist() == [[-16.0, 14.0, 0.0, 4.0, 4.0, 0.0, -4.0, -4.0]]


def test_symmetric() -> None:
    weight = torch.tensor([[-15.0, 7.5, 3.0, 0.0]])
    qt = grid.quantize(weight, Scheme(4, 4, sym=True))
    assert (qt.scales.item(), qt.zeros.item()) == (2.0, 8)
    # -15 / 2 is a tie, to even: -8. The other end, 7.5 / 2, is 4.
    assert qt.dequantize().tolist() == [[-16.0, 8.0, 4.0, 0.0]]
    positive = grid.quantize(-weight, Scheme(4, 4, sym=True))
    assert positive.dequantize()[0, 0] == 14  # the grid ends at 7 steps: half a step short


def test_clipped_range_clips() -> None:
    scheme = Scheme(4, 4)
    weight = torch.tensor([[-100.0, 0.0, 7.0, 15.0]])
    narrow = grid.make_grid(torch.tensor([[0.0]]), torch.tensor([[15.0]]), scheme)
    assert grid.encode(weight, narrow, scheme).dequantize().tolist() == [[0.0, 0.0, 7.0, 15.0]]


@pytest.mark.parametrize("sym", [False, True])
def test_scale_overflow_is_refused(sym: bool) -> None:
    scheme = Scheme(4, 4, sym)
    fits = torch.tensor([[0.0, 65504.0 * (7.5 if sym else 15), 0.0, 0.0]])
    assert grid.quantize(fits, scheme).scales.item() == 65504
    with pytest.raises(SalienceError, match="too wide for an fp16 scale"):
        grid.quantize(fits * 1.01, scheme)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_is_refused(value: float) -> None:
    with pytest.raises(SalienceError):
        grid.quantize(torch.tensor([[1.0, value]]), Scheme(4, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_weight(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    found, want = (grid.quantize(w, Scheme(4, 16)) for w in (weight, weight.float()))
    assert torch.equal(found.q, want.q) and torch.equal(found.scales, want.scales)


def test_group_size_must_divide() -> None:
    with pytest.raises(SalienceError, match="does not divide"):
        grid.quantize(torch.zeros(2, 10), Scheme(4, 4))


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 4), groups=st.integers(1, 3), seed=st.integers(0, 99))
def test_nf4_is_nearest(rows: int, groups: int, seed: int) -> None:
    """In fp64 no other value of the table is nearer, but for rounding."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 64 * groups, generator=random) * torch.rand(
        rows, 1, generator=random
    )
    qt = grid.quantize(weight, Scheme.parse("nf4"))
    blocks = weight.double().unflatten(1, (groups, 64))
    assert torch.equal(qt.scales.double(), blocks.abs().amax(dim=-1))
    values = table("nf4").double() * qt.scales.double()[..., None, None]
    best = (blocks[..., None] - values).abs().amin(dim=-1).flatten(1)
    mine = (qt.dequantize().double() - weight.double()).abs()
    assert (mine - best).max() <= 1e-6 * weight.abs().max()


def test_nf4_of_zeros() -> None:
    weight = torch.zeros(2, 128)
    weight[1, 64:] = torch.randn(64)
    for scheme in ("nf4", "nf4-dq"):
        qt = grid.quantize(weight, Scheme.parse(scheme))
        assert torch.equal(qt.dequantize()[weight == 0], torch.zeros(192))


def test_nested_table() -> None:
    """Ascending; each decade's middles, and both ends of the range but -1."""
    values = nested_table()
    assert values.dtype == torch.float32 and len(values) == 256
    assert (values.diff() > 0).all()
    assert values[-1] == 1 and values[0] > -1 and (values == 0).sum() == 1
    assert torch.equal(-values[:127].flip(0), values[128:255])


def test_nf4_refuses() -> None:
    with pytest.raises(SalienceError, match="group size 64 does not divide in_features 96"):
        grid.quantize(torch.zeros(2, 96), Scheme.parse("nf4"))
    with pytest.raises(SalienceError, match="too wide for an fp32 scale"):
        grid.quantize(torch.full((2, 64), torch.inf), Scheme.parse("nf4"))


def test_nf4_in_batches() -> None:
    """The uniform grid's verbs, with dimensions in front."""
    scheme, weight = Scheme.parse("nf4"), torch.randn(3, 4, 128)
    grids = grid.make_grid(*grid.value_range(weight, scheme), scheme)
    assert grids.scales.shape == grids.zeros.shape == (3, 4, 2)
    snapped = grid.snap(grid.grouped(weight, scheme), grids).flatten(-2)
    for one, value in zip(weight, snapped, strict=True):
        assert torch.equal(grid.quantize(one, scheme).dequantize(), value)
