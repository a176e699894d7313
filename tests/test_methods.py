"""Methods by name, and which schemes each makes."""

import pytest
import torch

from salience import grid
from salience.errors import SalienceError
from salience.methods import METHODS, check_method, get_method
from salience.scheme import Scheme
from salience.stats import SecondMoment


def test_names() -> None:
    assert [get_method(method.name) for method in METHODS] == list(METHODS)
    with pytest.raises(SalienceError, match="there is no method 'magic'; use awq or rtn or nf4"):
        get_method("magic")


@pytest.mark.parametrize("scheme", ["nf4", "nf4-dq"])
def test_nf4_is_rounding_on_the_codebook(scheme: str) -> None:
    weight, parsed = torch.randn(8, 128), Scheme.parse(scheme)
    moment = SecondMoment.empty(128, torch.device("cpu"))
    method = get_method("nf4")
    assert method.prepare({"a": weight}, [], {"a": moment}, parsed) == []
    qt = method.quantize(weight, moment, parsed)
    assert torch.equal(qt.dequantize(), grid.quantize(weight, parsed).dequantize())


def test_codebooks_have_a_method_of_their_own() -> None:
    check_method(get_method("nf4"), Scheme.parse("nf4-dq"))
    check_method(get_method("awq"), Scheme.parse("w4g64"))
    with pytest.raises(SalienceError, match="--method nf4 makes no w4g64; use --scheme nf4 or nf4"):
        check_method(get_method("nf4"), Scheme.parse("w4g64"))
    for name in ("awq", "rtn"):
        with pytest.raises(SalienceError, match=f"--method {name} makes no nf4; use --method nf4"):
            check_method(get_method(name), Scheme.parse("nf4"))
