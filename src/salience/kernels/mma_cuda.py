"""Few tokens times a low-bit weight, in CUDA C++: `cuda/mma.cu`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from salience.kernels import cuda_program
from salience.kernels._fragments import BLOCK, TILE

_SCALES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


@dataclass(frozen=True, slots=True)
class Config:
    """How the work is shared, as `cuda/mma.cu` says: tokens of a thread block (a multiple of 8),
    tiles of 16 rows of a warp, warps of a team, teams, blocks under way, thread blocks of a cluster,
    and of a processor at once.
    """

    tokens: int
    tiles: int
    high: int
    deep: int
    stages: int = 2
    split: int = 1
    resident: int = 1


def multiply(
    x: Tensor, packed: list[Tensor], bits: int, group_size: int, out: int, config: Config
) -> Tensor:
    """x [tokens, in] half-precision times a packed weight: [tokens, out].

    Raises:
        RuntimeError: of cuda-core, for a kernel that can't be compiled or launched.
    """
    words, scales, zeros = packed
    columns = x.shape[1]
    if columns % 8 or x.stride(0) % 8 or x.stride(1) != 1 or x.data_ptr() % 16:
        x = torch.nn.functional.pad(x, (0, -columns % 8))
    y = x.new_empty(len(x), out)
    size = columns if group_size == -1 else group_size
    macros = {
        "BITS": bits,
        "SUBS": BLOCK // size if size < BLOCK and size < columns else 1,
        "GROUP_BLOCKS": -(-size // BLOCK),
        "TOKENS": config.tokens,
        "TILES": config.tiles,
        "HIGH": config.high,
        "DEEP": config.deep,
        "STAGES": config.stages,
        "SPLIT": config.split,
        "RESIDENT": config.resident,
        "BF16": int(x.dtype == torch.bfloat16),
        "SCALE": _SCALES[scales.dtype],
    }
    kernel = cuda_program.kernel("mma.cu", "mma", tuple(macros.items()), x.device.index)
    rows = TILE * config.tiles * config.high
    here = min(len(x), config.tokens)
    staged, sums = config.deep * config.stages * here * 272, 4 * config.deep * here * rows
    grid = (1, -(-out // rows), -(-len(x) // config.tokens))
    kernel.launch(
        grid, 32 * config.high * config.deep,
        (x, words, scales, zeros, y, len(x), out, columns, x.stride(0), scales.shape[1]),
        shared=max(staged, sums), cluster=config.split,
        overlap=cuda_program.capability(x.device.index) >= 90,
    )  # fmt: skip
    return y
