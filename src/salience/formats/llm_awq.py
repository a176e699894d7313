"""llm-awq's second layout, which AutoAWQ calls "gemv_fast"; read, not written.

Of a linear with N outputs, K inputs and G groups, four outputs interleaved:

    qweight                int16 [N/4, K]   codes, `salience.packing.unpack_awq_fast`
    scales                 half  [Gp, N]    fp16, or bf16 of llm-awq
    qzeros | scaled_zeros  half  [Gp, N]    -(scale * zero), rounded to the dtype of the scales

The last one is `qzeros` in AutoAWQ and `scaled_zeros` in llm-awq. Gp is as in `awq_gemv`: rows
beyond G are 0. A weight is scale * code + scaled_zero there. The zero itself is

    zero = round(-scaled_zero / scale)

which is exact: the product was rounded by one part in 2048 (256 of bf16), so that even of a zero of
15 no more than 0.03 is lost. A quotient that is far from an integer, or not within 0..15, was no
such zero, and is refused. Weights on the grid of that integer differ from scale * code +
scaled_zero by what the rounding lost, and are those the quantizer meant.

llm-awq saves a state dict, `*-v2.pt`, and no config of how it was quantized: `implied_config` finds
it in the tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from salience.checkpoint import Checkpoint
from salience.errors import SalienceError
from salience.formats._awq import config_scheme, padded_groups
from salience.formats._awq import variant as awq_variant
from salience.formats._tensors import check_tensor, matrix, need
from salience.packing import unpack_awq_fast
from salience.qtensor import QTensor
from salience.scheme import Scheme

_HALF = (torch.float16, torch.bfloat16)
_FAR = 0.25  # from an integer; rounding moves a zero of 15 by 0.03
_LARGEST_ZERO = 15


@dataclass(frozen=True, slots=True)
class AwqGemvFast:
    """AutoAWQ's gemv_fast layout, 4 bits."""

    name: str = "awq-gemv-fast"
    tensors: frozenset[str] = frozenset({"qweight", "scales", "qzeros"})
    marker: str = "qweight"

    def detect(self, config: Mapping[str, Any]) -> bool:
        return awq_variant(config) == "gemv_fast"

    def scheme(self, config: Mapping[str, Any], name: str) -> Scheme:
        return config_scheme(config)

    def read(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QTensor:
        need(tensors, self.tensors)
        return _read(tensors, "qzeros", scheme)


@dataclass(frozen=True, slots=True)
class LlmAwq:
    """llm-awq's own checkpoints, 4 bits."""

    name: str = "llm-awq"
    tensors: frozenset[str] = frozenset({"qweight", "scales", "scaled_zeros"})
    marker: str = "qweight"

    def detect(self, config: Mapping[str, Any]) -> bool:
        return awq_variant(config) == "llm-awq"

    def scheme(self, config: Mapping[str, Any], name: str) -> Scheme:
        return config_scheme(config)

    def read(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QTensor:
        if "scaled_zeros" not in tensors:
            raise SalienceError(
                "tensor scaled_zeros is missing; llm-awq's first layout, from before its "
                "files were called -v2.pt, is not read"
            )
        need(tensors, self.tensors)
        return _read(tensors, "scaled_zeros", scheme)


def implied_config(stored: Checkpoint) -> dict[str, Any] | None:
    """The `quantization_config` of llm-awq's tensors, which come without; None of any others.

    Raises:
        SalienceError: tensors of a linear that do not fit each other.
    """
    owners = sorted(name[: -len(".scaled_zeros")] for name in stored.names() if _is_zeros(name))
    if not owners:
        return None
    owner = owners[0]
    if f"{owner}.scales" not in stored.names() or f"{owner}.qweight" not in stored.names():
        raise SalienceError(f"{stored.path}: {owner} has scaled_zeros but no qweight or scales")
    scales = stored.tensor(f"{owner}.scales")
    if scales.ndim != 2:
        raise SalienceError(f"{stored.path}: {owner}.scales is {list(scales.shape)}, no matrix")
    filled = _filled(scales)
    shape = stored.shape(f"{owner}.qweight")
    if not filled or len(shape) != 2 or shape[1] % filled:
        raise SalienceError(
            f"{stored.path}: {owner} has {filled} groups in scales, which do not divide the "
            f"columns of its qweight {list(shape)}"
        )
    return {
        "quant_method": "awq",
        "backend": "llm-awq",
        "bits": 4,
        "group_size": shape[1] // filled,
        "zero_point": True,
    }


def _is_zeros(name: str) -> bool:
    return name.endswith(".scaled_zeros")


def _filled(scales: Tensor) -> int:
    """Rows up to the last one that is not 0."""
    filled = scales.ne(0).flatten(1).any(dim=1).nonzero()
    return int(filled[-1]) + 1 if len(filled) else 0


def _read(tensors: Mapping[str, Tensor], zeros_name: str, scheme: Scheme) -> QTensor:
    qweight, scales, scaled = tensors["qweight"], tensors["scales"], tensors[zeros_name]
    quarter, columns = matrix("qweight", qweight, torch.int16)
    rows, groups = 4 * quarter, scheme.groups(columns)
    padded = padded_groups(groups, scheme.group_columns(columns))
    check_tensor("scales", scales, (padded, rows), _HALF)
    check_tensor(zeros_name, scaled, (padded, rows), _HALF)
    if columns % 64:
        raise SalienceError(f"qweight has {columns} columns, which 64 does not divide")
    if scales[groups:].any():
        raise SalienceError(
            f"scales has {_filled(scales)} groups, not the {groups} of group size "
            f"{scheme.group_columns(columns)}"
        )
    scales, scaled = scales[:groups].T.contiguous(), scaled[:groups].T
    zeros = _zeros(zeros_name, scales.float(), scaled.float())
    return QTensor(unpack_awq_fast(qweight), scales, zeros, scheme)


def _zeros(name: str, scales: Tensor, scaled: Tensor) -> Tensor:
    """Integer zeros of their products with the scales; of a scale of 0, any will do."""
    ratio = torch.where((scales == 0) & (scaled == 0), torch.zeros_like(scales), -scaled / scales)
    zeros = ratio.round()
    bad = ~((ratio - zeros).abs() <= _FAR) | (zeros < 0) | (zeros > _LARGEST_ZERO)
    if bad.any():
        row, group = bad.nonzero()[0].tolist()
        raise SalienceError(
            f"{name} / scales of output {row}, group {group} is {-ratio[row, group]:.4g}, not "
            "a zero of 0 to 15 with a minus sign: the file is damaged, or in another layout"
        )
    return zeros.to(torch.uint8)
