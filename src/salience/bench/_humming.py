"""humming-kernels, if it is installed: the fastest other kernels for weights of 1 to 8 bits.

It compiles its kernels when they are first called, for each shape and number of tokens, with the
compiler of a CUDA toolkit. What it raises where there is none is its own affair; the table then
says that it did not run.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from salience.qtensor import QTensor
from salience.scheme import Scheme


def is_installed() -> bool:
    """Whether there is a package to ask."""
    return find_spec("humming") is not None


def supports(scheme: Scheme, in_features: int, out_features: int) -> bool:
    """Uniform codes; what it packs comes in words of 32 codes."""
    return scheme.codebook is None and not in_features % 32 and not out_features % 32


def prepare(qt: QTensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A layer of such a weight, on the GPU that the weight is on."""
    from humming import ops
    from humming.layer import HummingLayer

    scheme = qt.scheme
    config: dict[str, Any] = {
        "dtype": f"uint{scheme.bits}",
        "group_size": max(0, scheme.group_size),  # 0 is a whole row
        "has_zero_point": not scheme.sym,
    }
    layer = HummingLayer(
        shape_n=qt.out_features, shape_k=qt.in_features, weight_config=config, torch_dtype=dtype
    ).to(qt.q.device)
    tensors = {
        "weight": ops.pack_weight(qt.q.int(), scheme.bits),
        "weight_scale": qt.scales.to(dtype),
    }
    if not scheme.sym:
        packed = ops.pack_weight(qt.zeros.T.int().contiguous(), scheme.bits)
        tensors["zero_point"] = packed.T.contiguous()
    layer.load_from_tensors(tensors)
    layer.transform()
    made: Callable[[Tensor], Tensor] = layer
    return made
