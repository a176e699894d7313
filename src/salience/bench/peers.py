"""What a kernel is compared with: every backend of ours, a dense product, and others' kernels.

Each takes a `QTensor` and becomes a callable on activations [tokens, in]. A copy of it
(`copy.deepcopy`) has a weight of its own in memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from salience import kernels
from salience.bench import _humming
from salience.linear import QuantLinear
from salience.qtensor import QTensor
from salience.scheme import Scheme

Prepared = Callable[[Tensor], Tensor]


class Kernel(Protocol):
    """One line of the table."""

    name: str
    ours: bool

    def supports(self, qt: QTensor) -> bool:
        """Whether it multiplies by such a weight on this machine."""
        ...

    def takes(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of its activations where the table is of `dtype`."""
        ...

    def nbytes(self, scheme: Scheme, in_features: int, out_features: int) -> float:
        """About what a copy takes."""
        ...

    def prepare(self, qt: QTensor, dtype: torch.dtype) -> Prepared:
        """The weight as this kernel holds it; `dtype` is that of the activations."""
        ...


class _Packed:
    """What holds codes in about their own size, and takes activations of the table's dtype."""

    def takes(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def nbytes(self, scheme: Scheme, in_features: int, out_features: int) -> float:
        return in_features * out_features * scheme.bits / 8


@dataclass
class Ours(_Packed):
    """A backend of `salience.kernels`, called as models call it."""

    name: str
    ours = True

    def supports(self, qt: QTensor) -> bool:
        fits = (qt.scheme, qt.q.device, qt.in_features, qt.out_features)
        return kernels.backend(self.name).supports(*fits)

    def prepare(self, qt: QTensor, dtype: torch.dtype) -> Prepared:
        linear: Prepared = QuantLinear(qt, None, self.name, dtype)
        return linear


class Dense:
    """The dequantized weight and torch's own product: cuBLAS on a GPU, oneDNN or MKL on a CPU."""

    name = "dense"
    ours = False

    def supports(self, qt: QTensor) -> bool:
        return True

    def takes(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def nbytes(self, scheme: Scheme, in_features: int, out_features: int) -> float:
        return 2.0 * in_features * out_features

    def prepare(self, qt: QTensor, dtype: torch.dtype) -> Prepared:
        weight = torch.empty(qt.q.shape, dtype=dtype, device=qt.q.device)
        for rows, some in zip(weight.split(1024), _parts(qt, 1024), strict=True):
            rows.copy_(some.dequantize(dtype))
        return partial(F.linear, weight=weight)


class TinyGemm(_Packed):
    """torch's own kernel for 4 bits on NVIDIA GPUs: w = (q - 8) * scale + z, all in bf16."""

    name = "tinygemm"
    ours = False
    _GROUPS = (32, 64, 128, 256)
    _INNER_TILES = 8

    def supports(self, qt: QTensor) -> bool:
        scheme = qt.scheme
        return (
            qt.q.device.type == "cuda"
            and torch.version.hip is None
            and torch.cuda.get_device_capability(qt.q.device) >= (8, 0)
            and (scheme.bits, scheme.codebook) == (4, None)
            and scheme.group_columns(qt.in_features) in self._GROUPS
            and not qt.in_features % (16 * self._INNER_TILES)
            and not qt.out_features % 8
        )

    def takes(self, dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16

    def prepare(self, qt: QTensor, dtype: torch.dtype) -> Prepared:
        pairs = (qt.q[:, ::2] << 4) | qt.q[:, 1::2]
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), self._INNER_TILES)
        scales = qt.scales.T.float()
        shift = (8 - qt.zeros.T.float()) * scales
        grid = torch.stack([scales, shift], dim=-1).bfloat16().contiguous()
        size = qt.scheme.group_columns(qt.in_features)
        return partial(_tinygemm, packed=packed, group_size=size, grid=grid)


class Humming(_Packed):
    """humming-kernels."""

    name = "humming"
    ours = False

    def supports(self, qt: QTensor) -> bool:
        fits = _humming.supports(qt.scheme, qt.in_features, qt.out_features)
        return fits and qt.q.device.type == "cuda" and _humming.is_installed()

    def prepare(self, qt: QTensor, dtype: torch.dtype) -> Prepared:
        return _humming.prepare(qt, dtype)


def candidates() -> tuple[Kernel, ...]:
    """All that a table can have, peers first."""
    own = (Ours(backend.name) for backend in kernels.BACKENDS)
    return (Dense(), TinyGemm(), Humming(), *own)


def _tinygemm(x: Tensor, packed: Tensor, group_size: int, grid: Tensor) -> Tensor:
    y: Tensor = torch.ops.aten._weight_int4pack_mm(x, packed, group_size, grid)
    return y


def _parts(qt: QTensor, rows: int) -> list[QTensor]:
    """A weight as several of some rows each."""
    return [pick_rows(qt, slice(start, start + rows)) for start in range(0, qt.out_features, rows)]


def pick_rows(qt: QTensor, rows: slice | Tensor) -> QTensor:
    """Some rows of a weight without an order of columns, for `dequantize`: its scales are whole."""
    scheme = Scheme(qt.scheme.bits, qt.scheme.group_size, qt.scheme.sym, qt.scheme.codebook)
    return QTensor(qt.q[rows], qt.scales[rows], qt.zeros[rows], scheme)
