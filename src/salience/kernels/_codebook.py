"""Codebook weights by look-up: unpack a tile of rows, look its codes up in the table, multiply.

As `_reference` for uniform codes: any device, never more than a few MiB of weights unpacked. Scales
that are stored in 8 bits stay so, and are looked up on each call: one for 64 weights.
"""

import torch
from torch import Tensor

from salience.codebook import table
from salience.errors import SalienceError
from salience.packing import pack, unpack
from salience.qtensor import NestedScales, QTensor
from salience.scheme import NESTED_BLOCK, Scheme

_TILE_ELEMENTS = 2**22


class Codebook:
    """Dense bit stream [out, words of in], table fp32 [2**bits], and the scales: fp32 [out,
    groups], or the codes, scales, table and offset (fp64 [1]) of `NestedScales`.
    """

    name = "codebook"

    def supports(
        self, scheme: Scheme, device: torch.device, in_features: int, out_features: int
    ) -> bool:
        divides = in_features % scheme.group_columns(in_features) == 0
        return scheme.codebook is not None and divides

    def pack(self, qt: QTensor) -> list[Tensor]:
        """The resident tensors of a weight.

        Raises:
            SalienceError: a uniform weight.
        """
        if qt.scheme.codebook is None:
            raise SalienceError(f"kernel {self.name} takes no {qt.scheme}; use reference")
        values = table(qt.scheme.codebook, qt.q.device)
        codes = [pack(qt.q, qt.scheme.bits), values]
        if qt.nested is None:
            return [*codes, qt.scales.clone()]
        offset = torch.tensor([qt.nested.offset], dtype=torch.float64, device=qt.q.device)
        nested = (qt.nested.q, qt.nested.scales, qt.nested.table)
        return [*codes, *(part.clone() for part in nested), offset]

    def unpack(
        self, packed: list[Tensor], scheme: Scheme, in_features: int, out_features: int
    ) -> QTensor:
        words, _, scales, *rest = packed
        nested = None
        if rest:
            nested = NestedScales(scales, rest[0], rest[2].item(), rest[1])
            scales = nested.dequantize()
        codes = unpack(words, scheme.bits, in_features)
        return QTensor(
            codes, scales, torch.zeros_like(scales, dtype=torch.uint8), scheme, None, nested
        )

    def matmul(
        self, x: Tensor, packed: list[Tensor], bits: int, group_size: int, out_features: int
    ) -> Tensor:
        words, values, scales, *rest = packed
        if rest:
            each = rest[0].repeat_interleave(NESTED_BLOCK)[: scales.numel()].view_as(scales)
            scales = (rest[1][scales.int()] * each + rest[2]).float()
        out = x.new_empty(x.shape[0], words.shape[0])
        rows = max(1, _TILE_ELEMENTS // x.shape[1])
        for start in range(0, words.shape[0], rows):
            tile = slice(start, start + rows)
            weight = values[unpack(words[tile], bits, x.shape[1]).int()]
            weight = weight.unflatten(1, (scales.shape[1], -1)) * scales[tile][..., None]
            torch.mm(x, weight.flatten(1).to(x.dtype).T, out=out[:, tile])
        return out
