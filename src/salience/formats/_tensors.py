"""What readers of a format refuse of the tensors they are handed."""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

from salience.errors import SalienceError


def need(tensors: Mapping[str, Tensor], names: AbstractSet[str]) -> None:
    """Refuse tensors of which some are missing."""
    missing = names - tensors.keys()
    if missing:
        raise SalienceError(f"tensor {min(missing)} is missing")


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, int], dtypes: tuple[torch.dtype, ...]
) -> None:
    """Refuse a tensor of another shape or dtype."""
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise SalienceError(
            f"{name} must be {kinds} {list(shape)}, not {tensor.dtype} {list(tensor.shape)}"
        )


def matrix(name: str, tensor: Tensor, dtype: torch.dtype) -> tuple[int, int]:
    """The shape of a tensor that must be a matrix of `dtype` with something in it."""
    if tensor.dtype != dtype or tensor.ndim != 2 or not tensor.numel():
        kind = str(dtype).removeprefix("torch.")
        raise SalienceError(
            f"{name} must be an {kind} matrix, not {tensor.dtype} {list(tensor.shape)}"
        )
    return tensor.shape[0], tensor.shape[1]
