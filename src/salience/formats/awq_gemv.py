"""AutoAWQ "gemv": for a GPU kernel that multiplies one token; read, not written.

Of a linear with N outputs, K inputs and G groups, packed along K in plain order:

    qweight  int32 [N, K/8]    codes
    qzeros   int32 [N, Gp/8]   zeros, packed along the groups
    scales   fp16  [N, Gp]

Gp is G rounded up to 8, to 16 for groups of 64 and to 32 for groups of 32; what is beyond G is 0.
No server reads it: vLLM takes it for "gemm" and fails at the shapes. Hence nothing here writes it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from salience.formats._awq import BITS, config_scheme, padded_groups
from salience.formats._awq import variant as awq_variant
from salience.formats._tensors import check_tensor, matrix, need
from salience.packing import unpack
from salience.qtensor import QTensor
from salience.scheme import Scheme


@dataclass(frozen=True, slots=True)
class AwqGemv:
    """AutoAWQ's gemv layout, 4 bits."""

    name: str = "awq-gemv"
    tensors: frozenset[str] = frozenset({"qweight", "qzeros", "scales"})
    marker: str = "qweight"

    def detect(self, config: Mapping[str, Any]) -> bool:
        return awq_variant(config) == "gemv"

    def scheme(self, config: Mapping[str, Any], name: str) -> Scheme:
        return config_scheme(config)

    def read(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QTensor:
        need(tensors, self.tensors)
        qweight, qzeros, scales = (tensors[name] for name in ("qweight", "qzeros", "scales"))
        rows, words = matrix("qweight", qweight, torch.int32)
        columns = words * 8
        groups = scheme.groups(columns)
        padded = padded_groups(groups, scheme.group_columns(columns))
        check_tensor("qzeros", qzeros, (rows, padded // 8), (torch.int32,))
        check_tensor("scales", scales, (rows, padded), (torch.float16, torch.bfloat16))
        zeros = unpack(qzeros, BITS, groups)
        return QTensor(
            unpack(qweight, BITS), scales[:, :groups].contiguous(), zeros.contiguous(), scheme
        )
