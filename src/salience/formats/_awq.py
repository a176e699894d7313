"""What the layouts that go by `quant_method: awq` have in common: their config.

One method name stands for several layouts, which no reader could tell from each other by the names
of the tensors. The config says which one: by its `version` (AutoAWQ) or `format` (GPTQModel), in
any case of letters, or by `backend: llm-awq`, whatever version stands beside it. None is "gemm".
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from salience.errors import SalienceError
from salience.scheme import Scheme

BITS = 4
_CODES_A_WORD = 8  # zeros are padded to whole words, also where they are no codes
_WORDS_AT_ONCE = {64: 2, 32: 4}  # zeros that AutoAWQ's kernels load, for small groups


def variant(config: Mapping[str, Any]) -> str | None:
    """The layout a config names, in lower case; None when it is not of AWQ."""
    if str(config.get("quant_method")).lower() != "awq":
        return None
    if str(config.get("backend")).lower() == "llm-awq":
        return "llm-awq"
    return str(config.get("version") or config.get("format") or "gemm").lower()


def config_scheme(config: Mapping[str, Any]) -> Scheme:
    """The one scheme of all linears.

    Raises:
        SalienceError: bits or a group size that such a checkpoint cannot have.
    """
    bits = config.get("bits", config.get("w_bit"))
    group_size = config.get("group_size", config.get("q_group_size"))
    if bits != BITS or type(group_size) is not int:  # a bool is an int
        raise SalienceError(
            f"quantization_config has bits {bits!r} and group_size {group_size!r}; "
            "an awq checkpoint has bits 4 and a group size"
        )
    return Scheme(BITS, group_size)


def padded_groups(groups: int, group_size: int) -> int:
    """Groups that gemv layouts make room for: whole words of 4-bit zeros, more for small groups.

    Raises:
        SalienceError: a group size that they do not have.
    """
    if group_size < 128 and group_size not in _WORDS_AT_ONCE:
        raise SalienceError(
            f"group size {group_size} is not one of this layout: 32, 64, and 128 or more are"
        )
    unit = _CODES_A_WORD * _WORDS_AT_ONCE.get(group_size, 1)
    return -(-groups // unit) * unit


def need(tensors: Mapping[str, Tensor], names: frozenset[str]) -> None:
    """Refuse tensors of which some are missing."""
    missing = names - tensors.keys()
    if missing:
        raise SalienceError(f"tensor {min(missing)} is missing")


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, int], dtypes: tuple[torch.dtype, ...]
) -> None:
    """Refuse a tensor of another shape or dtype."""
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise SalienceError(
            f"{name} must be {kinds} {list(shape)}, not {tensor.dtype} {list(tensor.shape)}"
        )


def matrix(name: str, tensor: Tensor, dtype: torch.dtype) -> tuple[int, int]:
    """The shape of a tensor that must be a matrix of `dtype` with something in it."""
    if tensor.dtype != dtype or tensor.ndim != 2 or not tensor.numel():
        kind = str(dtype).removeprefix("torch.")
        raise SalienceError(
            f"{name} must be an {kind} matrix, not {tensor.dtype} {list(tensor.shape)}"
        )
    return tensor.shape[0], tensor.shape[1]
