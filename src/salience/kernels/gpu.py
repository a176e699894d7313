"""Weights of 2, 3, 4 and 8 bits on a GPU: one resident layout, several ways to multiply.

`Gpu` owns the tensors, in the order of `_fragments`; what multiplies them are variants, each best
for some numbers of tokens, GPUs and shapes. All read the same tensors, so that the choice is made
anew for each product, by measured tables (`choice`), or without a table of this GPU by a rule.
"""

import functools
import subprocess
import warnings
from collections.abc import Mapping
from importlib.util import find_spec

import torch
from torch import Tensor

from salience.errors import SalienceError
from salience.kernels import choice
from salience.kernels._fragments import (
    BITS,
    ROWS,
    order_rows,
    pack_fragments,
    restore_rows,
    unpack_fragments,
)
from salience.kernels.choice import Shape, Variant
from salience.kernels.mma_cuda import Mma
from salience.kernels.wgmma_cuda import Wgmma
from salience.qtensor import QTensor
from salience.scheme import Scheme

_FEW_TOKENS = 64  # at which a multiply from the packed weight is about as fast as cuBLAS
_SOME_TOKENS = 2048  # up to which Hopper's own kernel is
_TILE_ELEMENTS = 2**24  # of the weight that are dequantized at a time: 32 MiB, in an H100's L2
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_SM80 = (8, 0)


class Triton:
    """The kernel of `wna16_triton`, for any GPU that Triton knows."""

    name = "triton"

    def supports(self, shape: Shape, tokens: int, device: torch.device) -> bool:
        return triton_fault(device) is None

    def options(self, shape: Shape, tokens: int) -> list[dict[str, int]]:
        if tokens > 4 * _FEW_TOKENS:
            return [{}]
        sizes = (4,) if shape.bits == 8 else (4, 8)
        return [{"split": split, "tiles": tiles} for split in (1, 2, 4, 8, 16) for tiles in sizes]

    def multiply(
        self,
        x: Tensor,
        packed: list[Tensor],
        bits: int,
        group_size: int,
        out_features: int,
        **options: int,
    ) -> Tensor:
        from salience.kernels import wna16_triton

        return wna16_triton.multiply(x, packed, bits, group_size, out_features, **options)


class Dequantize:
    """Some rows of the weight are dequantized into a buffer that stays in the cache, and multiplied
    by the GPU's own library; then the next. Their cost is the same for any number of tokens.
    """

    name = "dequantize"

    def supports(self, shape: Shape, tokens: int, device: torch.device) -> bool:
        return triton_fault(device) is None

    def options(self, shape: Shape, tokens: int) -> list[dict[str, int]]:
        if tokens < _FEW_TOKENS // 2:
            return [{}]
        steps = {_TILE_ELEMENTS * times // 2 // shape.columns for times in (1, 2, 4, 8)}
        return [{"rows": max(ROWS, rows // ROWS * ROWS)} for rows in sorted(steps)]

    def multiply(
        self,
        x: Tensor,
        packed: list[Tensor],
        bits: int,
        group_size: int,
        out_features: int,
        rows: int = 0,
        **options: int,
    ) -> Tensor:
        from salience.kernels.wna16_triton import unpacked

        columns = x.shape[1]
        step = min(out_features, rows or max(1, _TILE_ELEMENTS // columns // ROWS) * ROWS)
        y = x.new_empty(len(x), out_features)
        buffer = x.new_empty(step, columns)
        for start in range(0, out_features, step):
            some = slice(start, min(start + step, out_features))
            weight = buffer[: some.stop - some.start]
            unpacked(packed, some, columns, bits, group_size, x.dtype, weight)
            torch.mm(x, weight.T, out=y[:, some])
        return y


VARIANTS: tuple[Variant, ...] = (Mma(), Wgmma(), Triton(), Dequantize())


class Gpu:
    """Words int32 [tiles, blocks, 64 bits], scales [tiles, groups, 16] and zeros, uint8 like them:
    4.19 bits a weight of four with groups of 128.
    """

    name = "gpu"

    def supports(
        self, scheme: Scheme, device: torch.device, in_features: int, out_features: int
    ) -> bool:
        """2, 3, 4 or 8 bits in groups of a multiple of 32, or whole rows, on a GPU with what one
        of the variants needs.
        """
        if device.type != "cuda" or not _takes(scheme, in_features):
            return False
        if any(_works(variant, device) for variant in VARIANTS):
            return True
        _warn_of_nothing(triton_fault(device))
        return False

    def pack(self, qt: QTensor) -> list[Tensor]:
        """The three resident tensors of a weight.

        Raises:
            SalienceError: a scheme that `supports` refuses, or groups in activation order.
        """
        if qt.g_idx is not None:
            raise SalienceError(f"kernel {self.name} takes no act-order weight; use reference")
        if not _takes(qt.scheme, qt.in_features):
            raise SalienceError(f"kernel {self.name} takes no {qt.scheme}; use reference")
        packed = [pack_fragments(qt.q, qt.scheme.bits), order_rows(qt.scales), order_rows(qt.zeros)]
        if packed[0].is_cuda:
            torch.cuda.synchronize(packed[0].device)  # kernels read weights before they wait
        return packed

    def unpack(
        self, packed: list[Tensor], scheme: Scheme, in_features: int, out_features: int
    ) -> QTensor:
        words, scales, zeros = packed
        codes = unpack_fragments(words, scheme.bits)[:out_features, :in_features].contiguous()
        rows = (restore_rows(scales, out_features), restore_rows(zeros, out_features))
        return QTensor(codes, *rows, scheme)

    def matmul(
        self, x: Tensor, packed: list[Tensor], bits: int, group_size: int, out_features: int
    ) -> Tensor:
        """x [tokens, in] float times the packed weight: [tokens, out] in the dtype of x.

        Raises:
            SalienceError: x is fp64 or no float, or no variant works on this machine.
        """
        if x.dtype not in _DTYPES:
            raise SalienceError(f"kernel gpu multiplies fp16, bf16 and fp32, not {x.dtype}")
        tokens, columns = x.shape
        if not tokens:
            return x.new_empty(0, out_features)
        group = columns if group_size == -1 else group_size
        shape = Shape(bits, group, columns, out_features, x.dtype)
        variant, options = chosen(shape, choice.bucket(tokens), x.device)
        with torch.cuda.device_of(x):  # kernels are launched on the current GPU
            return variant.multiply(x, packed, bits, group_size, out_features, **options)


def _takes(scheme: Scheme, in_features: int) -> bool:
    group = scheme.group_columns(in_features)
    return (
        scheme.bits in BITS
        and scheme.codebook is None
        and in_features > 0
        and in_features % group == 0
        and (group % 32 == 0 or group == in_features)
    )


@functools.cache
def chosen(shape: Shape, tokens: int, device: torch.device) -> tuple[Variant, Mapping[str, int]]:
    """The variant for a product, and its options.

    Args:
        shape: of the weight.
        tokens: a power of 2; the choice holds for more than half of it.
        device: where the weight is.

    Raises:
        SalienceError: none works on this machine.
    """
    able = {v.name: v for v in VARIANTS if v.supports(shape, tokens, device)}
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    for timed in choice.order(gpu, shape, tokens):
        if timed.variant in able:
            return able[timed.variant], timed.options
    few, some = tokens <= _FEW_TOKENS, _FEW_TOKENS // 4 < tokens <= _SOME_TOKENS
    usual = ("wgmma",) * some + (("mma", "triton") if few else ("dequantize",))
    for name in (*usual, *able):
        if name in able:
            return able[name], {}
    raise SalienceError(_nothing(triton_fault(device)))


def _works(variant: Variant, device: torch.device) -> bool:
    usual = Shape(4, 128, 4096, 4096, torch.float16)
    return any(variant.supports(usual, tokens, device) for tokens in choice.TOKENS)


def _nothing(fault: str | None) -> str:
    return f"kernel gpu has nothing to multiply with on this machine: {fault}; use reference"


@functools.cache
def _warn_of_nothing(fault: str | None) -> None:
    warnings.warn(f"{_nothing(fault)}, which is slow", stacklevel=3)


@functools.cache
def triton_fault(device: torch.device) -> str | None:
    """Why Triton cannot run on a device, as far as one can tell without running; None if it can.

    Triton compiles its launcher with the machine's C compiler, the first part of it as soon as
    anyone asks for its driver.
    """
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    import triton

    if device.type != "cuda":
        return None if triton.knobs.runtime.interpret else f"Triton does not run on {device.type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < _SM80:
        return "Triton's kernels need an NVIDIA GPU of compute capability 8.0 or later"
    try:
        triton.runtime.driver.active.get_current_target()
    except (RuntimeError, OSError, ImportError, subprocess.CalledProcessError) as error:
        line = " ".join(str(error).split())[:200]
        return f"Triton does not start, which needs a C compiler and Python's headers ({line})"
    return None
