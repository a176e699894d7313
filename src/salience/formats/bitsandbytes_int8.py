"""bitsandbytes LLM.int8: one scale a row, codes of 8 bits, symmetric.

Of a linear with N outputs and K inputs:

    weight         int8  [N, K]    codes -127 .. 127
    SCB            fp32  [N]       largest magnitude of each row
    weight_format  uint8 scalar    0: plain rows; older versions had orders for GPUs

A weight is code * SCB / 127. Codes plus 128 are those of w8channel-sym, whose zero is 128, and its
scale is SCB / 127, in fp32: the division of an fp32 number, for which fp16 has no room. What was
made with fp16 scales comes back exactly: 127 times such a scale fits fp32, and divides evenly.

bitsandbytes and vLLM also round the inputs to 8 bits, all but the columns with outliers above
`llm_int8_threshold`; here inputs stay as they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from salience.errors import SalienceError
from salience.formats._bnb import loads_in, quantization_config
from salience.formats._tensors import need
from salience.qtensor import QTensor
from salience.scheme import Scheme

_SCHEME = Scheme(8, -1, sym=True)
_ZERO, _LARGEST = 128, 127


@dataclass(frozen=True, slots=True)
class BitsAndBytesInt8:
    """8-bit codes with one scale a row, for all linears."""

    name: str = "bitsandbytes-int8"
    tensors: frozenset[str] = frozenset({"weight", "SCB", "weight_format"})
    marker: str = "SCB"
    heads: bool = False
    container: str = "safetensors"
    act_order: bool = False
    config_file: str | None = None

    def detect(self, config: Mapping[str, Any]) -> bool:
        return loads_in(config, 8)

    def scheme(self, config: Mapping[str, Any], name: str) -> Scheme:
        return _SCHEME

    def check(self, schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, int]]) -> None:
        for name, scheme in schemes.items():
            if scheme != _SCHEME:
                raise SalienceError(
                    f"--format {self.name} holds {_SCHEME}, not {scheme} as {name} wants; use "
                    f"--scheme {_SCHEME}, or another format"
                )

    def write(self, qt: QTensor) -> dict[str, Tensor]:
        return {
            "weight": (qt.q.to(torch.int16) - _ZERO).to(torch.int8),
            "SCB": (qt.scales.float() * _LARGEST).flatten(),
            "weight_format": torch.tensor(0, dtype=torch.uint8),
        }

    def read(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QTensor:
        need(tensors, {"weight", "SCB"})  # early versions had no weight_format
        weight, scales = tensors["weight"], tensors["SCB"]
        if weight.dtype != torch.int8 or weight.ndim != 2:
            raise SalienceError(
                f"weight must be an int8 matrix, not {weight.dtype} {list(weight.shape)}"
            )
        if scales.dtype != torch.float32 or tuple(scales.shape) != (len(weight),):
            raise SalienceError(
                f"SCB must be float32 {[len(weight)]}, not {scales.dtype} {list(scales.shape)}"
            )
        order = tensors.get("weight_format")
        if order is not None and (order.numel() != 1 or order.item() != 0):
            raise SalienceError(
                f"weight_format is {order.tolist()}: weights in a GPU's order are not read; "
                "save the model again with bitsandbytes 0.45 or newer"
            )
        codes = (weight.to(torch.int16) + _ZERO).to(torch.uint8)
        scales = (scales / _LARGEST)[:, None]
        return QTensor(codes, scales, torch.full_like(scales, _ZERO, dtype=torch.uint8), scheme)

    def config(
        self,
        schemes: Mapping[str, Scheme],
        kept: Sequence[str],
        outside: Sequence[str] = (),
        act_order: bool = False,
    ) -> dict[str, Any]:
        return quantization_config(8, kept)
