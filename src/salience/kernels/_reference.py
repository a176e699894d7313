"""The oracle: dequantize in fp32, multiply. Any bits, any group size, any device.

A weight of many columns is dequantized a tile of rows at a time, so that never more than a few
MiB of it exist unpacked.
"""

import torch
from torch import Tensor

from salience.packing import pack, unpack
from salience.qtensor import QTensor
from salience.scheme import Scheme

_TILE_ELEMENTS = 2**22


class Reference:
    """Dense bit stream [out, words of in], scales, zeros [out, groups], g_idx [in] or none."""

    name = "reference"

    def supports(
        self, scheme: Scheme, device: torch.device, in_features: int, out_features: int
    ) -> bool:
        divides = in_features % scheme.group_columns(in_features) == 0
        return scheme.codebook is None and divides

    def pack(self, qt: QTensor) -> list[Tensor]:
        packed = [pack(qt.q, qt.scheme.bits), qt.scales.clone(), qt.zeros.clone()]
        return packed if qt.g_idx is None else [*packed, qt.g_idx.clone()]

    def unpack(
        self, packed: list[Tensor], scheme: Scheme, in_features: int, out_features: int
    ) -> QTensor:
        words, scales, zeros, *rest = packed
        codes = unpack(words, scheme.bits, in_features)
        return QTensor(codes, scales, zeros, scheme, rest[0] if rest else None)

    def matmul(
        self, x: Tensor, packed: list[Tensor], bits: int, group_size: int, out_features: int
    ) -> Tensor:
        words, scales, zeros, *rest = packed
        g_idx = rest[0] if rest else None
        out = x.new_empty(x.shape[0], words.shape[0])
        rows = max(1, _TILE_ELEMENTS // x.shape[1])
        scheme = Scheme(bits, group_size)
        for start in range(0, words.shape[0], rows):
            tile = slice(start, start + rows)
            codes = unpack(words[tile], bits, x.shape[1])
            weight = QTensor(codes, scales[tile], zeros[tile], scheme, g_idx).dequantize(x.dtype)
            torch.mm(x, weight.T, out=out[:, tile])
        return out
