"""What readers of a format refuse of the tensors they are handed."""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

from salience.errors import SalienceError
from salience.scheme import Scheme


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


def in_order(columns: int, scheme: Scheme, device: torch.device) -> Tensor:
    """The group of each column where groups lie side by side: int32 [columns]."""
    return torch.arange(columns, dtype=torch.int32, device=device) // scheme.group_columns(columns)


def group_index(name: str, g_idx: Tensor, columns: int, scheme: Scheme) -> Tensor | None:
    """The stored groups of the columns as int32 [columns], or None when they are in order.

    Raises:
        SalienceError: another shape or dtype, or a group that the weight does not have.
    """
    if g_idx.dtype not in (torch.int32, torch.int64) or tuple(g_idx.shape) != (columns,):
        raise SalienceError(
            f"{name} must be int32 [{columns}], not {g_idx.dtype} {list(g_idx.shape)}"
        )
    last = scheme.groups(columns) - 1
    low, high = (int(end) for end in g_idx.aminmax()) if columns else (0, 0)
    if not 0 <= low <= high <= last:
        raise SalienceError(f"{name} has groups {low} to {high}, the weight has 0 to {last}")
    plain = torch.equal(g_idx.int(), in_order(columns, scheme, g_idx.device))
    return None if plain else g_idx.int()
