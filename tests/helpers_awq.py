"""The layouts of AWQ that are only read, packed by their closed forms.

`test_formats_awq_gemv.py` compares these packers with what AutoAWQ wrote.
"""

import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers_checkpoint import qtensors
from salience.qtensor import QTensor


def padded(groups: int, size: int) -> int:
    unit = 8 * {64: 2, 32: 4}.get(size, 1)
    return math.ceil(groups / unit) * unit


def pack_gemv(qt: QTensor, size: int) -> dict[str, Tensor]:
    """The layout by its definition."""
    rows, columns = qt.q.shape
    width = padded(columns // size, size)
    codes, zeros = torch.zeros(rows, columns // 8).long(), torch.zeros(rows, width // 8).long()
    for k in range(8):
        codes |= qt.q[:, k::8].long() << 4 * k
    for g in range(columns // size):
        zeros[:, g // 8] |= qt.zeros[:, g].long() << 4 * (g % 8)
    scales = torch.zeros(rows, width, dtype=qt.scales.dtype)
    scales[:, : columns // size] = qt.scales
    return {"qweight": codes.int(), "qzeros": zeros.int(), "scales": scales}


def pack_fast(qt: QTensor, size: int, zeros_name: str) -> dict[str, Tensor]:
    """The layout by the closed form of its nibbles."""
    rows, columns = qt.q.shape
    words = torch.zeros(rows // 4, columns).long()
    column = torch.arange(columns)
    b, c = column // 64, column % 64
    for t in range(4):
        k = 64 * b + 32 * ((c % 16) // 8) + c % 8 + 8 * t
        words |= qt.q.view(-1, 4, columns)[:, c // 16, k].long() << 4 * t
    width = padded(columns // size, size)
    scales = torch.zeros(width, rows, dtype=qt.scales.dtype)
    scaled = scales.clone()
    scales[: columns // size] = qt.scales.T
    scaled[: columns // size] = -(qt.scales.float() * qt.zeros.float()).to(scales.dtype).T
    return {"qweight": words.to(torch.int16), "scales": scales, zeros_name: scaled}


def pack(kind: str, qt: QTensor) -> dict[str, Tensor]:
    size = qt.scheme.group_columns(qt.in_features)
    if kind == "gemv":
        return pack_gemv(qt, size)
    return pack_fast(qt, size, "qzeros" if kind == "gemv_fast" else "scaled_zeros")


def repacked(gemm: Path, out: Path, kind: str) -> dict[str, Tensor]:
    """Copy a gemm checkpoint but for its weights, and return them in another layout."""
    shutil.copytree(gemm, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = load_file(gemm / "model.safetensors")
    for name, qt in qtensors(gemm).items():
        for local in ("qweight", "qzeros", "scales"):
            del tensors[f"{name}.{local}"]
        tensors |= {f"{name}.{local}": tensor for local, tensor in pack(kind, qt).items()}
    return tensors
