"""QTensor: a quantized weight matrix, and the only thing methods, formats and kernels share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from salience.errors import SalienceError
from salience.scheme import Scheme


@dataclass(frozen=True, slots=True, eq=False)
class QTensor:
    """Codes, scales and zeros, unpacked: w[o, i] = scales[o, g] * (q[o, i] - zeros[o, g]).

    Args:
        q: codes, uint8 [out, in].
        scales: fp16 or bf16 [out, groups].
        zeros: codes that stand for 0, uint8 [out, groups].
        scheme: bits and group size.
        g_idx: group of each column, int32 [in]; None when column i is in group i // group_size.

    Raises:
        SalienceError: shapes or dtypes that do not agree.
    """

    q: Tensor
    scales: Tensor
    zeros: Tensor
    scheme: Scheme
    g_idx: Tensor | None = None

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

    @property
    def out_features(self) -> int:
        return self.q.shape[0]

    @property
    def in_features(self) -> int:
        return self.q.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in]. Exact in fp32: a code times an fp16 scale fits its mantissa."""
        if self.g_idx is not None:
            index = self.g_idx.long()
            codes = self.q.float() - self.zeros.float()[:, index]
            return (codes * self.scales.float()[:, index]).to(dtype)
        grouped = self.q.unflatten(1, (self.zeros.shape[1], -1)).float()
        weight = (grouped - self.zeros.float()[..., None]) * self.scales.float()[..., None]
        return weight.flatten(1).to(dtype)


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
