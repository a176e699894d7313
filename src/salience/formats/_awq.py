"""What the layouts that go by `quant_method: awq` have in common: their config.

One method name stands for several layouts, which no reader could tell from each other by the names
of the tensors. The config says which one: by its `version` (AutoAWQ) or `format` (GPTQModel), in
any case of letters, or by `backend: llm-awq`, whatever version stands beside it. None is "gemm".
"""

from collections.abc import Mapping
from typing import Any

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
