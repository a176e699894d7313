"""Random low-bit weights: what no speed depends on, made where it is wanted."""

import math

import torch

from salience.qtensor import NestedScales, QTensor
from salience.scheme import NESTED_BLOCK, Scheme


def random_weight(
    in_features: int, out_features: int, scheme: Scheme, device: torch.device, gain: float = 1.0
) -> QTensor:
    """Random codes and zeros, with scales that give an output of about the input's size.

    Args:
        in_features: columns.
        out_features: rows.
        scheme: how it is coded.
        device: where it is made.
        gain: size of the output, for an input of 1.

    Returns:
        A weight without an order of columns.
    """
    size = (out_features, scheme.groups(in_features))
    codes = torch.randint(
        2**scheme.bits, (out_features, in_features), dtype=torch.uint8, device=device
    )
    if scheme.codebook is not None:
        return _of_codebook(codes, size, scheme, gain / math.sqrt(in_features))
    spread = 0.29 * 2**scheme.bits  # the deviation of uniform codes
    scales = (0.5 + torch.rand(size, device=device)) * (gain / spread / math.sqrt(in_features))
    middle = 2 ** (scheme.bits - 1)
    width = 1 if scheme.sym else max(1, 2**scheme.bits // 8)
    low = middle if scheme.sym else middle - width  # about the mean of the codes
    zeros = torch.randint(low, middle + width, size, dtype=torch.uint8, device=device)
    return QTensor(codes, scales.half(), zeros, scheme)


def _of_codebook(
    codes: torch.Tensor, size: tuple[int, int], scheme: Scheme, scale: float
) -> QTensor:
    zeros = torch.zeros(size, dtype=torch.uint8, device=codes.device)
    if not scheme.double_quant:
        scales = (0.5 + torch.rand(size, device=codes.device)) * scale
        return QTensor(codes, scales, zeros, scheme)
    stored = torch.randint(256, size, dtype=torch.uint8, device=codes.device)
    blocks = torch.full((-(-stored.numel() // NESTED_BLOCK),), scale, device=codes.device)
    table = torch.linspace(-0.5, 0.5, 256, device=codes.device)
    nested = NestedScales(stored, blocks, scale, table)
    return QTensor(codes, nested.dequantize(), zeros, scheme, nested=nested)
