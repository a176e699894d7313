"""Dense: weights in fp16 or bf16, as every tool reads them.

It is no quantized format and no checkpoint is detected as one. As the output of `quantize` it holds
the float weights with the scales folded in: the same function with weights that are easier to
round, for tools that quantize themselves (llama-quantize, GPTQModel). As the output of `convert` it
holds the dequantized weights, rounded to the dtype.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from salience.errors import SalienceError
from salience.qtensor import QTensor
from salience.scheme import Scheme
from salience.writer import to_dtype

_PIECE = 2**22  # weights that are dequantized at once, in fp32


@dataclass(frozen=True, slots=True)
class Dense:
    """Float weights.

    Args:
        dtype: fp16 or bf16.
    """

    dtype: torch.dtype = torch.float16
    name: str = "dense"
    tensors: frozenset[str] = frozenset({"weight"})
    marker: str = "weight"
    heads: bool = False
    container: str = "safetensors"
    act_order: bool = True
    config_file: str | None = None

    def detect(self, config: Mapping[str, Any]) -> bool:
        return False

    def scheme(self, config: Mapping[str, Any], name: str) -> Scheme:
        raise SalienceError("a dense checkpoint has no scheme")

    def check(self, schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, int]]) -> None:
        """Takes everything."""

    def write(self, qt: QTensor) -> dict[str, Tensor]:
        weight = torch.empty(qt.q.shape, dtype=self.dtype, device=qt.q.device)
        scheme = replace(qt.scheme, double_quant=False)  # the scales are at hand
        rows = max(1, _PIECE // qt.in_features)
        for start in range(0, qt.out_features, rows):
            part = slice(start, start + rows)
            piece = QTensor(qt.q[part], qt.scales[part], qt.zeros[part], scheme, qt.g_idx)
            weight[part] = to_dtype(piece.dequantize(), "weight", self.dtype)
        return {"weight": weight}

    def read(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QTensor:
        raise SalienceError("a dense checkpoint has no codes")

    def config(
        self,
        schemes: Mapping[str, Scheme],
        kept: Sequence[str],
        outside: Sequence[str] = (),
        act_order: bool = False,
    ) -> dict[str, Any]:
        return {}
