"""Few tokens times a low-bit weight, in CUDA C++: `cuda/mma.cu` says how."""

from dataclasses import dataclass

import torch
from torch import Tensor

from salience.kernels import cuda_program
from salience.kernels._fragments import BLOCK, TILE
from salience.kernels.choice import Shape


@dataclass(frozen=True, slots=True)
class Config:
    """How the work of one product is shared out.

    Args:
        most: tokens of a thread block, a multiple of 8; 0 for what fits.
        tiles: of 16 rows, that a warp has.
        high: warps of a team, one above the other.
        deep: teams of a thread block, which share the columns.
        stages: blocks of 128 columns under way.
        split: thread blocks of a cluster, which share the columns (sm90 and later).
    """

    most: int = 0
    tiles: int = 1
    high: int = 2
    deep: int = 4
    stages: int = 2
    split: int = 1


_TOKEN_BYTES = 272  # of a block of x in shared memory
_SHARED_BYTES = 99 * 1024  # of a thread block; GPUs have at least that
_FEW_WARPS, _MANY_WARPS = 900, 9000  # of a launch: enough to fill a GPU, few enough to do much each

# Tiles, high, deep, stages: those that were fastest for some shape on an H100. Deep ones are for
# weights of few rows, high ones for many tokens.
_WORTH_TRYING = (
    *((tiles, 1, deep, 2) for tiles in (1, 2) for deep in (4, 8, 16)),
    *((tiles, high, deep, 2) for tiles in (1, 2) for high in (2, 4) for deep in (2, 4, 8)),
    *((2, 4, 1, 2), (2, 8, 2, 2), (4, 1, 4, 2), (4, 1, 8, 2), (4, 2, 2, 2), (4, 2, 4, 2)),
    *((2, 1, 8, 3), (1, 2, 8, 3), (2, 4, 2, 3)),
)


def usual(tokens: int, columns: int, rows: int, bits: int) -> Config:
    """What does well without having been measured: about 2048 warps, more of them one above the
    other where x is large.
    """
    tiles = 2 if bits <= 4 else 1
    deep = 16
    while deep > 2 and (deep * rows > 2048 * TILE * tiles or columns < BLOCK * deep):
        deep //= 2
    high = max(1 if tokens <= 8 else 2, 8 // deep)
    return Config(tiles=tiles, high=high, deep=min(deep, 8) if tokens > 8 else deep)


class Mma:
    """The variant for few tokens on NVIDIA GPUs."""

    name = "mma"

    def supports(self, shape: Shape, tokens: int, device: torch.device) -> bool:
        """Half precision, up to 64 tokens, groups of 32, 64, multiples of 128, or whole rows."""
        return (
            device.type == "cuda"
            and shape.dtype in (torch.float16, torch.bfloat16)
            and tokens <= 64
            and cuda_program.takes_groups(shape.group_size, shape.columns)
            and cuda_program.available()
        )

    def options(self, shape: Shape, tokens: int) -> list[dict[str, int]]:
        """What is worth measuring."""
        most = 8 if tokens <= 8 else 16 if tokens <= 16 else 32
        clusters = (1, 2) if cuda_program.capability(torch.cuda.current_device()) >= 90 else (1,)
        found = []
        for tiles, high, deep, stages in _WORTH_TRYING:
            for split in clusters if tokens > 8 and high > 1 else (1,):
                warps = high * deep * split * -(-shape.rows // (TILE * tiles * high))
                if (
                    _FEW_WARPS <= warps <= _MANY_WARPS
                    and shape.columns >= BLOCK * deep * split * (stages - 1)
                    and stages * deep * min(most, tokens) * _TOKEN_BYTES <= _SHARED_BYTES
                    and tiles * shape.bits <= 16
                ):
                    found.append(
                        {"most": most, "tiles": tiles, "high": high, "deep": deep}
                        | {"stages": stages, "split": split}
                    )
        return found or [{}]

    def multiply(
        self,
        x: Tensor,
        packed: list[Tensor],
        bits: int,
        group_size: int,
        out_features: int,
        **options: int,
    ) -> Tensor:
        """x [tokens, in] half-precision times a packed weight: [tokens, out]; options of Config."""
        config = Config(**options) if options else usual(len(x), x.shape[1], out_features, bits)
        words, scales, zeros = packed
        columns, index = x.shape[1], x.device.index
        if columns % 8 or x.stride(0) % 8 or x.stride(1) != 1 or x.data_ptr() % 16:
            x = torch.nn.functional.pad(x, (0, -columns % 8)).contiguous()
        y = x.new_empty(len(x), out_features)
        size = columns if group_size == -1 else group_size
        most = config.most or (8 if len(x) <= 8 else 16)
        macros = {
            "BITS": bits,
            "SUBS": BLOCK // size if size < BLOCK and size < columns else 1,
            "GROUP_BLOCKS": -(-size // BLOCK),
            "TOKENS": most,
            "TILES": config.tiles,
            "HIGH": config.high,
            "DEEP": config.deep,
            "STAGES": config.stages,
            "SPLIT": config.split,
            "BF16": int(x.dtype == torch.bfloat16),
            "SCALE": cuda_program.SCALES[scales.dtype],
        }
        kernel = cuda_program.kernel("mma.cu", "mma", tuple(macros.items()), index)
        rows, here = TILE * config.tiles * config.high, min(len(x), most)
        staged = config.deep * config.stages * here * _TOKEN_BYTES
        numbers = (len(x), out_features, columns, x.stride(0), scales.shape[1])
        kernel.launch(
            (1, -(-out_features // rows), -(-len(x) // most)),
            32 * config.high * config.deep,
            (x, words, scales, zeros, y, *numbers),
            shared=max(staged, 4 * config.deep * here * rows),
            cluster=config.split,
            overlap=cuda_program.capability(index) >= 90,
        )
        return y
