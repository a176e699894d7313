"""Tensors of a pickled state dict, as llm-awq saves them: read without running any of it."""

import pickle
import struct
from pathlib import Path

import torch
from torch import Tensor

from salience.errors import SalienceError

_V2 = "-v2.pt"
# torch.load has no error of its own for a damaged file.
_UNPICKLING_ERRORS = (
    *(pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, TypeError),
    *(LookupError, AttributeError, AssertionError, ArithmeticError, ImportError, struct.error),
)
_PT_DTYPES = frozenset(
    {
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    }
)


class PtCheckpoint:
    """llm-awq's `*-v2.pt`, a pickled state dict, or the folder of `<tensor>.pt` that its
    `split_ckpt` makes of one.

    Only tensors are unpickled (`weights_only`), never code, and they stay on disk until one is
    copied (`mmap`).

    Args:
        folder: with one file that ends in `-v2.pt`, or with one file for each tensor.

    Raises:
        SalienceError: a file that is truncated, in the format from before torch 1.6, or with
            anything but plain tensors in it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self._tensors: dict[str, Tensor] = {}
        files = pt_files(folder)
        whole = [file for file in files if file.name.endswith(_V2)]
        if len(whole) > 1 or (not whole and len(files) < 2):
            found = ", ".join(file.name for file in whole or files) or "none"
            raise SalienceError(f"{folder} should hold one file that ends in {_V2}, found {found}")
        if whole:
            self._file = whole[0]
            state = _unpickled(self._file)
            if not isinstance(state, dict):
                raise SalienceError(f"{self._file} holds a {type(state).__name__}, no state dict")
            for name, value in state.items():
                self._tensors[str(name)] = _plain(self._file, str(name), value)
        else:
            self._file = folder
            for file in files:
                name = file.name.removesuffix(".pt")
                self._tensors[name] = _plain(file, name, _unpickled(file))

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._known(name).shape)

    def nbytes(self, name: str) -> int:
        return self._known(name).nbytes

    def tensor(self, name: str) -> Tensor:
        return self._known(name).clone(memory_format=torch.contiguous_format)

    def _known(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise SalienceError(f"tensor {name} is missing from {self._file}")
        return self._tensors[name]


def pt_files(folder: Path) -> list[Path]:
    """The `.pt` files of a folder."""
    return sorted(file for file in folder.glob("*.pt") if file.is_file())


def _unpickled(file: Path) -> object:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except _UNPICKLING_ERRORS as error:
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise SalienceError(
            f"{file} is truncated, or holds more than tensors ({type(error).__name__}: {reason})"
        ) from None


def _plain(file: Path, name: str, value: object) -> Tensor:
    """A value of a state dict, which must be a tensor that lies in the file as it claims to."""
    if not isinstance(value, Tensor):
        raise SalienceError(f"{name} of {file} is a {type(value).__name__}, no tensor")
    value = value.detach()
    plain = value.layout == torch.strided and value.device.type == "cpu"
    if not plain or value.is_quantized or value.dtype not in _PT_DTYPES:
        raise SalienceError(
            f"tensor {name} of {file} is {value.dtype} {value.layout} on {value.device}, which is "
            "not supported"
        )
    # Not `value.nbytes`, which is counted in 64 bits and wraps.
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise SalienceError(f"tensor {name} of {file} claims more bytes than are stored of it")
    return value
