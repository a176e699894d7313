"""Weights of 2, 3, 4 and 8 bits times 32 tokens and more, on Hopper: CUDA C++, compiled by NVRTC.

Hopper's matrix unit is full only when four warps together issue `wgmma`, which takes its left
operand from registers. So the product is y^T = W x^T: the weight, in the layout of `_fragments`, is
loaded straight into the registers that the instruction wants, unpacked there and multiplied. Few
tokens wait for the weight, many for the matrix unit; unpacking hides behind both, because

    few     each code is unpacked once: one block of the grid has all tokens
    many    256 tokens share what is unpacked: a step of 64 x 16 takes the matrix unit 128 cycles,
            and its unpacking some 20 instructions of each of four warps

What depends on the shape of the problem is a `Configuration`; `configurations` gives those worth
measuring. The kernel is cuda/wgmma.cu.
"""

import functools
from collections.abc import Iterator
from ctypes import c_int32
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salience.errors import SalienceError
from salience.kernels._fragments import BLOCK, ROWS, TILE

_DTYPES = {torch.float16: 0, torch.bfloat16: 1}
_SCALES = {**_DTYPES, torch.float32: 2}
_SHARED = 227 * 1024  # bytes that a block may have on sm_90


@dataclass(frozen=True)
class Configuration:
    """How the work is cut: see cuda/wgmma.cu. A block has 64 * warpgroups * row_tiles rows."""

    tokens: int
    warpgroups: int = 2
    row_tiles: int = 1
    split: int = 1
    stages: int = 4
    depth: int = 2
    buffers: int = 2
    resident: int = 1

    @property
    def rows(self) -> int:
        return ROWS * self.warpgroups * self.row_tiles

    @property
    def threads(self) -> int:
        return 128 * self.warpgroups + 128

    @property
    def shared(self) -> int:
        """Bytes of shared memory: the ring of x, or in its place the sums; 1024 to align it."""
        return max(self.stages * 2 * BLOCK * self.tokens, 4 * self.tokens * (self.rows + 4)) + 1024


def instruction(tokens: int, bf16: bool) -> str:
    """The function `wgmma` of CUDA C++ for so many tokens: sums += a b, b in shared memory."""
    count = tokens // 2
    kind = "bf16" if bf16 else "f16"
    sums = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    a = ", ".join(f"%{count + i}" for i in range(4))
    return f"""
__device__ __forceinline__ void wgmma(float (&d)[{count}], const unsigned (&a)[4],
                                      unsigned long long b) {{
  asm volatile("wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.{kind}.{kind} "
      "{{{sums}}}, {{{a}}}, %{count + 4}, 1, 1, 1, 0;"
      : {operands} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}}
"""


def source(config: Configuration, bf16: bool) -> str:
    """The text to compile."""
    text = Path(__file__).with_name("cuda") / "wgmma.cu"
    return instruction(config.tokens, bf16) + text.read_text()


def macros(
    config: Configuration, bits: int, group: int, bf16: bool, scale: int, stream: bool
) -> dict[str, int]:
    """What wgmma.cu wants defined."""
    return {
        "BITS": bits,
        "GROUP": group,
        "BF16": int(bf16),
        "SCALE": scale,
        "TOKENS": config.tokens,
        "WARPGROUPS": config.warpgroups,
        "ROW_TILES": config.row_tiles,
        "SPLIT": config.split,
        "STAGES": config.stages,
        "DEPTH": config.depth,
        "BUFFERS": config.buffers,
        "RESIDENT": config.resident,
        "STREAM": int(stream),
    }


@functools.cache
def _kernel(
    config: Configuration, bits: int, group: int, bf16: bool, scale: int, stream: bool, device: int
) -> Any:
    from cuda.bindings import driver
    from cuda.core import Program, ProgramOptions

    defined = macros(config, bits, group, bf16, scale, stream)
    options = ProgramOptions(
        arch="sm_90a",
        std="c++17",
        define_macro=[(name, str(value)) for name, value in defined.items()],
    )
    kernel = Program(source(config, bf16), "c++", options).compile("cubin").get_kernel("multiply")
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (error,) = driver.cuKernelSetAttribute(
        attribute, config.shared, kernel.handle, driver.CUdevice(device)
    )
    if error != driver.CUresult.CUDA_SUCCESS:
        raise SalienceError(f"{config} wants more shared memory than the GPU has: {error}")
    return kernel


@functools.lru_cache(maxsize=256)
def _tensor_map(address: int, tokens: int, columns: int, box: int) -> Any:
    """How the copy engine finds x: tiles of `box` tokens by 64 columns, swizzled."""
    from cuda.core._tensor_map import TensorMapL2Promotion, TensorMapSwizzle
    from cuda.core.utils import StridedMemoryView

    view = StridedMemoryView.from_any_interface(_Address(address, (tokens, columns)), stream_ptr=-1)
    return view.as_tensor_map(
        (box, 64),
        swizzle=TensorMapSwizzle.SWIZZLE_128B,
        l2_promotion=TensorMapL2Promotion.L2_256B,
    )


class _Address:
    """Memory of a GPU as NumPy's typing describes it, of two bytes each: fp16 and bf16 alike."""

    def __init__(self, address: int, shape: tuple[int, int]) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, True),
            "shape": shape,
            "typestr": "<f2",
            "version": 3,
        }


class _Stream:
    """A stream of torch, as cuda.core takes it."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


def supports(device: torch.device) -> bool:
    """Whether the GPU is a Hopper: its wgmma is in none before and none after."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def configurations(tokens: int, out_features: int, in_features: int) -> Iterator[Configuration]:
    """The configurations worth measuring for such a product, likeliest first."""
    processors = 132
    fit = min(256, -(-tokens // 32) * 32 if tokens > 32 else 32)
    widths = [fit] if fit <= 64 else sorted({fit, 128, 256} if tokens > 128 else {fit, 64})
    for width in widths[::-1]:
        for warpgroups, row_tiles in ((2, 1), (1, 1), (2, 2), (4, 1)):
            if width * row_tiles > 256 or width * warpgroups > 512:
                continue
            rows = ROWS * warpgroups * row_tiles
            tiles = -(-out_features // rows) * -(-tokens // width)
            for split in (1, 2, 4, 8):
                blocks = -(-in_features // BLOCK) // split
                if split > 1 and (tiles * split > 4 * processors or blocks < 4):
                    continue
                stages = min(4, (_SHARED - 1024) // (2 * BLOCK * width))
                depth = 2 if width * row_tiles > 128 else 4
                config = Configuration(width, warpgroups, row_tiles, split, stages, depth)
                if config.shared <= _SHARED:
                    yield config


def multiply(
    x: Tensor,
    packed: list[Tensor],
    bits: int,
    group_size: int,
    out_features: int,
    config: Configuration,
    dependent: bool = False,
) -> Tensor:
    """y [tokens, out_features] = x [tokens, in] times the weight, in the dtype of x.

    Args:
        x: fp16 or bf16.
        packed: words int32 [tiles, blocks, 64 * bits], scales fp16, bf16 or fp32 and zeros uint8
            [tiles, groups, 16], as `_fragments` makes them.
        group_size: 32, 64, a multiple of 128, or at least `in`: one group a row.
        config: how to cut the work.
        dependent: start before the kernel ahead in the stream has ended, and wait for it before
            x is read (programmatic dependent launch).

    Raises:
        SalienceError: such groups do not fall on the columns that are unpacked at once.
    """
    from cuda.core import LaunchConfig, launch

    words, scales, zeros = packed
    if group_size not in (32, 64) and group_size % BLOCK and group_size < x.shape[1]:
        raise SalienceError(f"the Hopper kernel has no groups of {group_size}; use 32, 64 or 128 n")
    if x.shape[1] % 8:  # the copy engine takes rows of a multiple of 16 bytes
        x = torch.nn.functional.pad(x, (0, -x.shape[1] % 8))
    x = x.contiguous()
    tokens, columns = x.shape
    tiles, blocks = words.shape[:2]
    groups = scales.shape[1]
    y = x.new_empty(tokens, out_features)
    if not tokens:
        return y
    token_tiles = -(-tokens // config.tokens)
    kernel = _kernel(
        config,
        bits,
        group_size if group_size < BLOCK else BLOCK,
        x.dtype == torch.bfloat16,
        _SCALES[scales.dtype],
        token_tiles == 1,
        x.device.index or 0,
    )
    grid = -(-tiles * TILE // config.rows) * token_tiles
    launch_config = LaunchConfig(
        grid=grid,  # of clusters, where there are clusters
        cluster=config.split if config.split > 1 else None,
        block=config.threads,
        shmem_size=config.shared,
        programmatic_stream_serialization=dependent,
    )
    launch(
        _Stream(torch.cuda.current_stream(x.device).cuda_stream),
        launch_config,
        kernel,
        _tensor_map(x.data_ptr(), tokens, columns, config.tokens),
        words.data_ptr(),
        scales.data_ptr(),
        zeros.data_ptr(),
        y.data_ptr(),
        *(
            c_int32(value)
            for value in (
                tokens,
                out_features,
                tiles,
                blocks,
                groups,
                max(1, group_size // BLOCK),
                token_tiles,
            )
        ),
    )
    return y
