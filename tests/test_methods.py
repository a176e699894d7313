"""Methods by name, what each is made of, and which schemes each makes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from salience import grid
from salience.errors import SalienceError
from salience.methods import (
    AWQ,
    AWQ_GPTQ,
    BEST,
    EFFORTS,
    GPTQ,
    METHODS,
    NF4,
    RTN,
    Method,
    Problem,
    check_method,
    default_format,
    default_scheme,
    full_grids,
    get_method,
)
from salience.methods.base import nearest, no_scales
from salience.scheme import Scheme
from salience.structure import Fold


def test_names() -> None:
    assert [get_method(method.name) for method in METHODS] == list(METHODS)
    message = "there is no method 'magic'; use awq or gptq or rtn or nf4"
    with pytest.raises(SalienceError, match=message):
        get_method("magic")


def test_efforts() -> None:
    assert get_method("awq", "balanced") is AWQ_GPTQ and get_method("awq") is AWQ
    with pytest.raises(SalienceError, match="no effort 'finest'; use fast or balanced or best"):
        get_method("awq", "finest")
    best = get_method("awq", "best")
    assert best.learns is not None and best.end_to_end is not None
    assert best.codes is AWQ_GPTQ.codes
    for name in ("gptq", "rtn", "nf4"):
        for effort in ("balanced", "best"):
            message = f"--effort {effort} is for --method awq, not {name}"
            with pytest.raises(SalienceError, match=message):
                get_method(name, effort)
        assert get_method(name, "fast").name == name
    assert set(EFFORTS["fast"]) == {method.name for method in METHODS}


def test_what_each_needs() -> None:
    assert [m.name for m in (*METHODS, AWQ_GPTQ) if m.reads_text] == ["awq", "gptq", "awq+gptq"]
    assert [m.name for m in (*METHODS, AWQ_GPTQ) if m.folds] == ["awq", "awq+gptq"]
    coded = [m.name for m in (*METHODS, AWQ_GPTQ) if m.reads_moments_to_code]
    assert coded == ["gptq", "awq+gptq"]
    assert not any(m.trusted for m in (*METHODS, AWQ_GPTQ))
    assert AWQ_GPTQ.scales is AWQ.scales and AWQ_GPTQ.codes is GPTQ.codes
    start = replace(BEST, name=AWQ_GPTQ.name, learns=None, end_to_end=None)
    assert start == AWQ_GPTQ and not any(m.learns for m in (*METHODS, AWQ_GPTQ))


def test_defaults() -> None:
    assert [default_scheme(m.name) for m in METHODS] == ["w4g128", "w4g128", "w4g128", "nf4"]
    assert [default_format(m.name) for m in METHODS] == ["awq", "awq", "awq", "bitsandbytes"]


def code(method: Method, weight: torch.Tensor, scheme: Scheme) -> list[torch.Tensor]:
    """The weights that a method that looks at no text makes, for each of a batch."""
    names = tuple((f"{i}.a",) for i in range(len(weight)))
    problem = Problem(names, weight, (weight.shape[1],), scheme)
    fold = Fold("prev", ("a",), "norm", torch.arange(weight.shape[2]), 0.0)
    assert method.scales([problem], fold) == [None] * len(weight)
    return [qt.dequantize() for qt in method.codes(problem, method.grids(problem))]


@pytest.mark.parametrize("scheme", ["nf4", "nf4-dq"])
def test_nf4_is_rounding_on_the_codebook(scheme: str) -> None:
    weight, parsed = torch.randn(3, 8, 128), Scheme.parse(scheme)
    for found, each in zip(code(NF4, weight, parsed), weight, strict=True):
        assert torch.equal(found, grid.quantize(each, parsed).dequantize())


@given(
    bits=st.integers(1, 8),
    group=st.sampled_from([8, 16, -1]),
    sym=st.booleans(),
    batch=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_rtn_is_the_nearest_point_of_the_full_grid(
    bits: int, group: int, sym: bool, batch: int, seed: int
) -> None:
    scheme = Scheme(bits, group, sym)
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(batch, 5, 32, generator=random)
    weight[0, 1] = 0
    for found, each in zip(code(RTN, weight, scheme), weight, strict=True):
        assert torch.equal(found, grid.quantize(each, scheme).dequantize())
    assert RTN.scales is no_scales and RTN.grids is full_grids and RTN.codes is nearest


def test_codebooks_have_a_method_of_their_own() -> None:
    check_method(get_method("nf4"), Scheme.parse("nf4-dq"))
    check_method(get_method("awq"), Scheme.parse("w4g64"))
    with pytest.raises(SalienceError, match="--method nf4 makes no w4g64; use --scheme nf4 or nf4"):
        check_method(get_method("nf4"), Scheme.parse("w4g64"))
    for name in ("awq", "gptq", "rtn"):
        with pytest.raises(SalienceError, match=f"--method {name} makes no nf4; use --method nf4"):
            check_method(get_method(name), Scheme.parse("nf4"))
