"""Codebook weights by look-up: unpack a tile of rows, look its codes up in the table, multiply.

As `_reference` for uniform codes: any device, never more than a few MiB of weights unpacked.
"""

import torch
from torch import Tensor

from salience.codebook import table
from salience.errors import SalienceError
from salience.packing import pack, unpack
from salience.qtensor import QTensor
from salience.scheme import Scheme

_TILE_ELEMENTS = 2**22


class Codebook:
    """Dense bit stream [out, words of in], scales fp32 [out, groups], table fp32 [2**bits]."""

    name = "codebook"

    def supports(
        self, scheme: Scheme, device: torch.device, in_features: int, out_features: int
    ) -> bool:
        divides = in_features % scheme.group_columns(in_features) == 0
        return scheme.codebook is not None and divides

    def pack(self, qt: QTensor) -> list[Tensor]:
        """The three resident tensors of a weight.

        Raises:
            SalienceError: a uniform weight.
        """
        if qt.scheme.codebook is None:
            raise SalienceError(f"kernel {self.name} takes no {qt.scheme}; use reference")
        values = table(qt.scheme.codebook, qt.q.device)
        return [pack(qt.q, qt.scheme.bits), qt.scales.clone(), values]

    def matmul(self, x: Tensor, packed: list[Tensor], bits: int, group_size: int) -> Tensor:
        words, scales, values = packed
        out = x.new_empty(x.shape[0], words.shape[0])
        rows = max(1, _TILE_ELEMENTS // x.shape[1])
        for start in range(0, words.shape[0], rows):
            tile = slice(start, start + rows)
            weight = values[unpack(words[tile], bits, x.shape[1]).int()]
            weight = weight.unflatten(1, (scales.shape[1], -1)) * scales[tile][..., None]
            torch.mm(x, weight.flatten(1).to(x.dtype).T, out=out[:, tile])
        return out
