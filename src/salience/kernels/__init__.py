"""The op `salience::qmm`: activations times a packed low-bit weight.

    y[..., out] = x[..., in] @ dequantize(packed)[out, in]^T

Each backend packs a QTensor into the tensors its own kernel reads (a pure reorder of the codes)
and multiplies by them. The op is registered with torch.library, with a fake kernel, so that
torch.compile, meta tensors and CUDA graphs see one opaque call. Adding a kernel is one file with
a class like `_reference.Reference` and its name in `BACKENDS`, fastest first.
"""

from typing import Protocol

import torch
from torch import Tensor

from salience.errors import SalienceError
from salience.kernels._codebook import Codebook
from salience.kernels._reference import Reference
from salience.kernels.cpu import CpuInt4
from salience.kernels.gpu import Gpu
from salience.qtensor import QTensor
from salience.scheme import Scheme


class Backend(Protocol):
    """One way to hold and multiply a low-bit weight."""

    name: str

    def supports(
        self, scheme: Scheme, device: torch.device, in_features: int, out_features: int
    ) -> bool:
        """Whether this backend works for such a weight on this machine."""
        ...

    def pack(self, qt: QTensor) -> list[Tensor]:
        """The resident tensors of a weight, on the device of `qt`."""
        ...

    def unpack(
        self, packed: list[Tensor], scheme: Scheme, in_features: int, out_features: int
    ) -> QTensor:
        """Undo `pack`, exactly: what was loaded can be saved, or packed for another device."""
        ...

    def matmul(
        self, x: Tensor, packed: list[Tensor], bits: int, group_size: int, out_features: int
    ) -> Tensor:
        """x [tokens, in] float times the packed weight: [tokens, out] in the dtype of x."""
        ...


BACKENDS: tuple[Backend, ...] = (Gpu(), CpuInt4(), Reference(), Codebook())


def backend(name: str) -> Backend:
    """The backend called `name`.

    Raises:
        SalienceError: there is none.
    """
    for candidate in BACKENDS:
        if candidate.name == name:
            return candidate
    names = ", ".join(b.name for b in BACKENDS)
    raise SalienceError(f"there is no kernel {name!r}; use auto or one of {names}")


def choose(scheme: Scheme, device: torch.device, in_features: int, out_features: int) -> Backend:
    """The fastest backend that supports such a weight.

    Raises:
        SalienceError: none does.
    """
    for candidate in BACKENDS:
        if candidate.supports(scheme, device, in_features, out_features):
            return candidate
    raise SalienceError(f"no kernel supports {scheme} [{out_features}, {in_features}] on {device}")


@torch.library.custom_op("salience::qmm", mutates_args=())
def qmm(
    x: Tensor, packed: list[Tensor], kernel: str, bits: int, group_size: int, out_features: int
) -> Tensor:
    """x [..., in] times a weight packed by backend `kernel`: [..., out_features], dtype of x."""
    tokens = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    y = backend(kernel).matmul(tokens, packed, bits, group_size, out_features)
    return y.view(*x.shape[:-1], out_features)


@qmm.register_fake
def _(
    x: Tensor, packed: list[Tensor], kernel: str, bits: int, group_size: int, out_features: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)
