"""Quantization methods, one file each. Adding one is a file and its name in `METHODS`."""

from salience.errors import SalienceError
from salience.methods.awq import Awq
from salience.methods.base import FoldScale, Method
from salience.methods.rtn import Rtn

METHODS: tuple[Method, ...] = (Awq(), Rtn())

__all__ = ["METHODS", "Awq", "FoldScale", "Method", "Rtn", "get_method"]


def get_method(name: str) -> Method:
    """The method called `name`.

    Raises:
        SalienceError: there is none.
    """
    for method in METHODS:
        if method.name == name:
            return method
    raise SalienceError(f"there is no method {name!r}; use {' or '.join(m.name for m in METHODS)}")
