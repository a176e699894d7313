"""Quantization methods, one file each. Adding one is a file and its name in `METHODS`."""

from salience.errors import SalienceError
from salience.methods.awq import Awq
from salience.methods.base import FoldScale, Method
from salience.methods.nf4 import Nf4
from salience.methods.rtn import Rtn
from salience.scheme import Scheme

METHODS: tuple[Method, ...] = (Awq(), Rtn(), Nf4())

__all__ = ["METHODS", "Awq", "FoldScale", "Method", "Nf4", "Rtn", "check_method", "get_method"]


def get_method(name: str) -> Method:
    """The method called `name`.

    Raises:
        SalienceError: there is none.
    """
    for method in METHODS:
        if method.name == name:
            return method
    raise SalienceError(f"there is no method {name!r}; use {' or '.join(m.name for m in METHODS)}")


def check_method(method: Method, scheme: Scheme) -> None:
    """Refuse a scheme that a method does not make: codebooks have a method of their own.

    Raises:
        SalienceError: naming both options.
    """
    if method.name == "nf4" and scheme.codebook is None:
        raise SalienceError(f"--method nf4 makes no {scheme}; use --scheme nf4 or nf4-dq")
    if method.name != "nf4" and scheme.codebook is not None:
        raise SalienceError(f"--method {method.name} makes no {scheme}; use --method nf4")
