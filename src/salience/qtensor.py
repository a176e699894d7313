"""QTensor: a quantized weight matrix, and the only thing methods, formats and kernels share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from salience.codebook import table
from salience.errors import SalienceError
from salience.scheme import NESTED_BLOCK, Scheme


@dataclass(frozen=True, slots=True, eq=False)
class NestedScales:
    """Scales of a codebook scheme as double quantization stores them, so that no format quantizes
    them again: scales = table[q] * scales[block] + offset, with 256 of them in a block, row by row.

    Args:
        q: uint8 [out, groups].
        scales: fp32 [blocks].
        offset: their mean, an fp32 number.
        table: fp32 [256].
    """

    q: Tensor
    scales: Tensor
    offset: float
    table: Tensor

    def dequantize(self) -> Tensor:
        """The scales of the weight, fp32 [out, groups]."""
        flat = self.q.flatten()
        each = self.scales.repeat_interleave(NESTED_BLOCK)[: len(flat)]
        return (self.table[flat.int()] * each + self.offset).view_as(self.q)


@dataclass(frozen=True, slots=True, eq=False)
class QTensor:
    """Codes, scales and zeros, unpacked: w[o, i] = scales[o, g] * (q[o, i] - zeros[o, g]), or
    scales[o, g] * table[q[o, i]] when the scheme has a codebook.

    Args:
        q: codes, uint8 [out, in].
        scales: [out, groups], fp16 or bf16; fp32 of a codebook scheme and of LLM.int8.
        zeros: codes that stand for 0, uint8 [out, groups]; a codebook scheme has 0s and no use for
            them.
        scheme: bits and group size.
        g_idx: group of each column, int32 [in]; None when column i is in group i // group_size.
        nested: how `scales` are stored, of a scheme with double quantization.

    Raises:
        SalienceError: shapes or dtypes that do not agree.
    """

    q: Tensor
    scales: Tensor
    zeros: Tensor
    scheme: Scheme
    g_idx: Tensor | None = None
    nested: NestedScales | None = None

    def __post_init__(self) -> None:
        if self.q.dtype != torch.uint8 or self.q.ndim != 2:
            raise SalienceError(f"codes must be uint8 [out, in], not {_describe(self.q)}")
        want = (self.q.shape[0], self.scheme.groups(self.q.shape[1]))
        for name, tensor in (("scales", self.scales), ("zeros", self.zeros)):
            if tuple(tensor.shape) != want:
                raise SalienceError(f"{name} must be {list(want)}, not {list(tensor.shape)}")
        if not self.scales.is_floating_point() or self.zeros.dtype != torch.uint8:
            raise SalienceError(
                f"scales must be float and zeros uint8, not {self.scales.dtype}, {self.zeros.dtype}"
            )
        if self.g_idx is not None and tuple(self.g_idx.shape) != (self.q.shape[1],):
            raise SalienceError(f"g_idx must be [{self.q.shape[1]}], not {_describe(self.g_idx)}")
        if self.g_idx is not None and not ((self.g_idx >= 0) & (self.g_idx < want[1])).all():
            raise SalienceError(f"g_idx must hold groups from 0 to {want[1] - 1}")
        if self.scheme.double_quant != (self.nested is not None):
            raise SalienceError(f"a weight of {self.scheme} has nested scales or it has none")

    @property
    def out_features(self) -> int:
        return self.q.shape[0]

    @property
    def in_features(self) -> int:
        return self.q.shape[1]

    def to(self, device: torch.device) -> "QTensor":
        """The same weight on another device."""
        nested = None
        if (own := self.nested) is not None:
            q, scales, table = (t.to(device) for t in (own.q, own.scales, own.table))
            nested = NestedScales(q, scales, own.offset, table)
        q, scales, zeros = (t.to(device) for t in (self.q, self.scales, self.zeros))
        g_idx = None if self.g_idx is None else self.g_idx.to(device)
        return QTensor(q, scales, zeros, self.scheme, g_idx, nested)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in]. Exact in fp32: a code times an fp16 scale fits its mantissa. Of
        fp32 scales, the fp32 products.
        """
        if self.scheme.codebook is not None:
            values = table(self.scheme.codebook, self.q.device)[self.q.int()]
            grouped = values.unflatten(1, (self.scales.shape[1], -1))
            return (grouped * self.scales[..., None]).flatten(1).to(dtype)
        if self.g_idx is not None:
            index = self.g_idx.long()
            codes = self.q.float() - self.zeros.float()[:, index]
            return (codes * self.scales.float()[:, index]).to(dtype)
        grouped = self.q.unflatten(1, (self.zeros.shape[1], -1)).float()
        weight = (grouped - self.zeros.float()[..., None]) * self.scales.float()[..., None]
        return weight.flatten(1).to(dtype)


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
