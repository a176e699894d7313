"""QuantLinear and QuantEmbedding: modules whose weight stays packed."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from salience import kernels
from salience.errors import SalienceError
from salience.packing import pack, unpack
from salience.qtensor import NestedScales, QTensor
from salience.scheme import NESTED_BLOCK, Scheme

_SOME_ROWS = 512


class QuantLinear(nn.Module):
    """y = x W^T + b with W in low bits, never unpacked as a whole.

    Columns whose groups are in activation order are put into the order of their groups once, and
    the inputs on each call, so that every kernel takes such a weight.

    Args:
        qt: the weight [out, in]; it is packed for its device and not kept.
        bias: float [out] or None.
        kernel: name of a backend of `salience.kernels`, or "auto" for the fastest that fits.
        dtype: what `weight.dtype` says; None is that of the scales.

    Raises:
        SalienceError: a kernel that does not support such a weight.
    """

    def __init__(
        self,
        qt: QTensor,
        bias: Tensor | None = None,
        kernel: str = "auto",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._dtype = dtype or qt.scales.dtype
        self.in_features, self.out_features, self.scheme = (
            qt.in_features,
            qt.out_features,
            qt.scheme,
        )
        order = None if qt.g_idx is None else group_order(qt.g_idx, qt.scheme)
        if order is not None:
            qt = QTensor(qt.q[:, order], qt.scales, qt.zeros, qt.scheme)
        fits = (qt.scheme, qt.q.device, qt.in_features, qt.out_features)
        if kernel == "auto" and qt.g_idx is not None:
            kernel = "reference"  # the one that takes groups of any sizes
        backend = kernels.choose(*fits) if kernel == "auto" else kernels.backend(kernel)
        if not backend.supports(*fits):
            raise SalienceError(
                f"kernel {backend.name} does not support {qt.scheme} [{qt.out_features}, "
                f"{qt.in_features}] on {qt.q.device}; use --kernel auto"
            )
        self.kernel = backend.name
        packed = backend.pack(qt)
        self._packed_names = [f"packed_{i}" for i in range(len(packed))]
        for name, tensor in zip(self._packed_names, packed, strict=True):
            self.register_buffer(name, tensor.contiguous())
        self.order: Tensor | None
        self.register_buffer("order", order)
        self.bias: Tensor | None
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        packed = [self.get_buffer(name) for name in self._packed_names]
        if self.order is not None:
            x = x.index_select(-1, self.order)
        y = torch.ops.salience.qmm(
            x, packed, self.kernel, self.scheme.bits, self.scheme.group_size, self.out_features
        )
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @property
    def weight(self) -> Tensor:
        """What models ask of `linear.weight`: its dtype, shape [out, in] and device, no values."""
        device = self.get_buffer(self._packed_names[0]).device
        return _PackedWeight((self.out_features, self.in_features), self._dtype, device)

    def qtensor(self) -> QTensor:
        """The weight, unpacked: codes, scales and zeros are what they were."""
        packed = [self.get_buffer(name) for name in self._packed_names]
        backend = kernels.backend(self.kernel)
        qt = backend.unpack(packed, self.scheme, self.in_features, self.out_features)
        if self.order is None:
            return qt
        place = self.order.argsort()  # of each column among the sorted ones
        g_idx = (place // self.scheme.group_columns(self.in_features)).int()
        return QTensor(qt.q[:, place], qt.scales, qt.zeros, qt.scheme, g_idx)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What `to`, `cuda` and `half` do. Scales are never cast: they are exact as they are. On
        another kind of device the weight is packed anew, for the fastest kernel there.
        """
        device = self.get_buffer(self._packed_names[0]).device
        place = fn(torch.empty(0, dtype=torch.uint8, device=device)).device
        if place.type != device.type:
            fresh = QuantLinear(self.qtensor().to(place), self.bias, dtype=self._dtype)
            self.kernel, self._packed_names = fresh.kernel, fresh._packed_names
            self._buffers = fresh._buffers
        packed = {name: self.get_buffer(name) for name in self._packed_names}
        for name in packed:
            del self._buffers[name]
        super()._apply(fn, recurse)
        for name, tensor in packed.items():
            data = fn(tensor.flatten().view(torch.uint8))  # bytes, which `half` leaves alone
            self._buffers[name] = data.view(tensor.dtype).view(tensor.shape)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme}, kernel={self.kernel}"


def group_order(g_idx: Tensor, scheme: Scheme) -> Tensor | None:
    """The order of columns, int64 [in], in which their groups lie side by side; None when the
    groups are not all of one size.
    """
    groups = scheme.groups(len(g_idx))
    sizes = torch.bincount(g_idx.long(), minlength=groups)
    if (sizes != scheme.group_columns(len(g_idx))).any():
        return None
    return g_idx.argsort(stable=True)


class QuantEmbedding(nn.Module):
    """Rows of a low-bit weight, unpacked as they are looked up.

    Args:
        qt: the weight [vocabulary, hidden].
        dtype: of the rows.
    """

    def __init__(self, qt: QTensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = qt.out_features, qt.in_features
        self.scheme, self._dtype = qt.scheme, dtype
        self.register_buffer("packed", pack(qt.q, qt.scheme.bits))
        self.register_buffer("scales", qt.scales.clone())
        self.register_buffer("zeros", qt.zeros.clone())

    @property
    def weight(self) -> Tensor:
        """As that of QuantLinear: dtype, shape and device."""
        size = (self.num_embeddings, self.embedding_dim)
        return _PackedWeight(size, self._dtype, self.get_buffer("packed").device)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] to rows [..., hidden]."""
        rows = ids.flatten()
        codes = unpack(self.get_buffer("packed")[rows], self.scheme.bits, self.embedding_dim)
        scales, zeros = self.get_buffer("scales")[rows], self.get_buffer("zeros")[rows]
        scheme = replace(self.scheme, double_quant=False)  # these scales are whole
        weight = QTensor(codes, scales, zeros, scheme).dequantize(self._dtype)
        return weight.view(*ids.shape, self.embedding_dim)

    def qtensor(self) -> QTensor:
        """The weight, unpacked."""
        codes = unpack(self.get_buffer("packed"), self.scheme.bits, self.embedding_dim)
        return QTensor(codes, self.get_buffer("scales"), self.get_buffer("zeros"), self.scheme)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.scheme}"


class _PackedWeight(Tensor):
    """A tensor of dtype, shape and device alone. Whoever computes with it is told so, where values
    that are not there would give a model that talks nonsense.
    """

    @staticmethod
    def __new__(cls, size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, size, dtype=dtype, device=device)

    def __init__(self, size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self._is_hf_initialized = True  # or Transformers fills it with random values

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"packed weight {list(self.shape)}, {self.dtype}, {self.device}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: object) -> NoReturn:
        raise SalienceError(
            f"{func} wants the values of a packed weight; load the model with keep=[...] naming "
            "the modules whose weight its code reads"
        )


def packed_bytes(
    scheme: Scheme, shape: tuple[int, ...], device: torch.device, kernel: str | None = "auto"
) -> int:
    """Bytes that the packed weight of a linear will take on a device.

    Found by packing some rows: what a kernel adds is its own affair.

    Args:
        scheme: of the weight.
        shape: [out, in].
        device: where it runs.
        kernel: as of `QuantLinear`; None for embeddings.
    """
    out_features, in_features = shape
    if kernel is None:
        scheme = replace(scheme, double_quant=False)  # whose scales are whole
    elif kernel == "auto":
        kernel = kernels.choose(scheme, device, in_features, out_features).name
    few = out_features if out_features < 3 * _SOME_ROWS else _SOME_ROWS + out_features % _SOME_ROWS
    found = _bytes_of(scheme, few, in_features, device, kernel)
    if few < out_features:
        more = _bytes_of(scheme, few + _SOME_ROWS, in_features, device, kernel) - found
        found += more * ((out_features - few) // _SOME_ROWS)
    return found


def _bytes_of(
    scheme: Scheme, rows: int, in_features: int, device: torch.device, kernel: str | None
) -> int:
    """What so many rows take, packed."""
    groups = torch.zeros(rows, scheme.groups(in_features), device=device)
    codes = torch.zeros(rows, in_features, dtype=torch.uint8, device=device)
    scales = groups if scheme.codebook else groups.half()
    nested = None
    if scheme.double_quant:
        blocks = torch.zeros(-(-groups.numel() // NESTED_BLOCK), device=device)
        nested = NestedScales(groups.to(torch.uint8), blocks, 0.0, torch.zeros(256, device=device))
    qt = QTensor(codes, scales, groups.to(torch.uint8), scheme, nested=nested)
    if kernel is None:
        module: nn.Module = QuantEmbedding(qt, torch.float32)
    else:
        module = QuantLinear(qt, None, kernel)
    return sum(buffer.nbytes for buffer in module.buffers())
