"""Quantization methods, one file each. Adding one is a file and its name in `METHODS`.

A method is three functions (see `base`), so that they combine: GPTQ's codes go with AWQ's clipped
grids, and with its scales too, which is the effort "balanced". On top of that the effort "best"
moves the codes of a whole block by gradient, and then the scales of the whole model.
"""

from dataclasses import replace

from salience.errors import SalienceError
from salience.grid import Grid
from salience.methods.awq import search_grids, search_scales
from salience.methods.base import EndToEnd, FoldScale, Method, Problem, Tuning, full_grids
from salience.methods.gptq import compensate, compensate_in_order, in_order
from salience.methods.nf4 import NF4
from salience.methods.rtn import RTN
from salience.scheme import Scheme

AWQ = Method("awq", search_scales, search_grids)
GPTQ = Method("gptq", grids=search_grids, codes=compensate, reads_moments_to_code=True)
AWQ_GPTQ = Method("awq+gptq", search_scales, search_grids, compensate, reads_moments_to_code=True)


def _grids_in_order(problem: Problem) -> Grid:
    """Clipped grids of groups of columns of like importance."""
    return search_grids(in_order(problem)[0])


# Groups in activation order, for formats that have a place for them.
GPTQ_G_IDX = Method(
    "gptq+g_idx",
    grids=_grids_in_order,
    codes=compensate_in_order,
    reads_moments_to_code=True,
    act_order=True,
)

# The same scales and start, then the codes of each block learned, and at last the whole tuned.
BEST = replace(AWQ_GPTQ, name="best", learns=Tuning(), end_to_end=EndToEnd())

METHODS: tuple[Method, ...] = (AWQ, GPTQ, RTN, NF4)
# What each effort makes of a method.
EFFORTS = {
    "fast": {m.name: m for m in METHODS},
    "balanced": {"awq": AWQ_GPTQ},
    "best": {"awq": BEST},
}

__all__ = [
    "AWQ",
    "AWQ_GPTQ",
    "BEST",
    "EFFORTS",
    "GPTQ",
    "GPTQ_G_IDX",
    "METHODS",
    "NF4",
    "RTN",
    "EndToEnd",
    "FoldScale",
    "Method",
    "Problem",
    "Tuning",
    "check_method",
    "default_format",
    "default_scheme",
    "full_grids",
    "get_method",
]


def get_method(name: str, effort: str = "fast", act_order: bool = False) -> Method:
    """The method called `name`, with an effort, and with groups in activation order or without.

    Raises:
        SalienceError: there is none, or it has no such effort or order.
    """
    if effort not in EFFORTS:
        raise SalienceError(f"there is no effort {effort!r}; use {' or '.join(EFFORTS)}")
    if name not in EFFORTS["fast"]:
        names = " or ".join(m.name for m in METHODS)
        raise SalienceError(f"there is no method {name!r}; use {names}")
    if name not in EFFORTS[effort]:
        fits = " or ".join(EFFORTS[effort])
        raise SalienceError(f"--effort {effort} is for --method {fits}, not {name}")
    found = EFFORTS[effort][name]
    if act_order and found is not GPTQ:
        raise SalienceError(f"--act-order is for --method gptq, not {found.name}")
    return GPTQ_G_IDX if act_order else found


def check_method(method: Method, scheme: Scheme) -> None:
    """Refuse a scheme that a method does not make: codebooks have a method of their own.

    Raises:
        SalienceError: naming both options.
    """
    if method is NF4 and scheme.codebook is None:
        raise SalienceError(f"--method nf4 makes no {scheme}; use --scheme nf4 or nf4-dq or fp4")
    if method is not NF4 and scheme.codebook is not None:
        raise SalienceError(f"--method {method.name} makes no {scheme}; use --method nf4")


def default_scheme(method: str) -> str:
    """The scheme of a method when none is named."""
    return "nf4" if method == NF4.name else "w4g128"


def default_format(method: str) -> str:
    """The format of a method when none is named."""
    return "bitsandbytes" if method == NF4.name else "awq"
