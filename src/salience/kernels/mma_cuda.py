"""Few tokens times a low-bit weight, in CUDA C++: `cuda/mma.cu` says how."""

from dataclasses import asdict, dataclass, replace

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
        stages: blocks of 128 columns of x in shared memory, 2 or 4; 0 for all of x at the start,
            after which no warp waits for another.
        split: thread blocks of a cluster, which share the columns (sm90 and later).
        resident: thread blocks that a processor should have registers for; 0 for as many as the
            compiler makes of it.
        together: of the stages, that come at once: 1, or 2 of 4.
    """

    most: int = 0
    tiles: int = 1
    high: int = 2
    deep: int = 4
    stages: int = 2
    split: int = 1
    resident: int = 0
    together: int = 1


_BLOCK_BYTES = 2 * BLOCK  # of a token's x
_SHARED_BYTES = 99 * 1024  # of a thread block; GPUs have at least that
_FEW_WARPS, _MANY_WARPS = 900, 9000  # of a launch: enough to fill a GPU, few enough to do much each

# Tiles, high, deep, split: those that were fastest for some shape on an H100, or nearly. Deep ones
# are for weights of few rows, high ones for many tokens, odd ones fill its 132 processors evenly.
_WORTH_TRYING = (
    *((1, 1, 16, 1), (2, 1, 16, 1), (2, 1, 8, 1), (4, 1, 8, 1)),
    *((1, 2, 8, 1), (2, 2, 8, 1), (4, 2, 4, 1), (1, 2, 8, 2), (2, 2, 8, 2), (2, 2, 6, 2)),
    *((1, 2, 4, 2), (2, 2, 4, 2), (2, 2, 2, 4), (1, 3, 4, 1), (1, 3, 4, 2), (2, 3, 4, 2)),
    *((1, 4, 4, 1), (2, 4, 2, 1), (2, 4, 1, 1), (1, 4, 4, 2), (2, 4, 4, 2), (4, 2, 4, 2)),
    *((1, 4, 2, 4), (2, 4, 2, 4), (1, 6, 2, 2), (1, 7, 1, 1), (1, 7, 2, 1), (2, 7, 1, 1)),
    *((2, 7, 2, 1), (1, 7, 1, 2), (1, 8, 2, 1), (1, 8, 2, 2)),
)


# Stages and together, with the most tokens that they are worth trying for. What lets warps go on
# without each other is good where they have few rows of many; but much of x takes long to come.
_WAYS = {(2, 1): 64, (4, 1): 64, (4, 2): 8, (0, 1): 4}


def _token_bytes(config: Config, columns: int) -> int:
    """Of a token's x in shared memory: 16 more than it has, so that banks do not collide."""
    if config.stages:
        return config.deep * config.stages * (_BLOCK_BYTES + 16)
    return _BLOCK_BYTES * -(-columns // (BLOCK * config.split)) + 16


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
        clusters = cuda_program.capability(torch.cuda.current_device()) >= 90
        found = []
        for tiles, high, deep, split in _WORTH_TRYING:
            warps = high * deep * split * -(-shape.rows // (TILE * tiles * high))
            if (
                (split > 1 and not clusters)
                or not _FEW_WARPS <= warps <= _MANY_WARPS
                or shape.columns < BLOCK * deep * split
                or tiles * shape.bits > 16
            ):
                continue
            for (stages, together), limit in _WAYS.items():
                one = Config(most, tiles, high, deep, stages, split, 0, together)
                room = min(most, tokens) * _token_bytes(one, shape.columns) <= _SHARED_BYTES
                if tokens <= limit and room:
                    found += [asdict(one), asdict(replace(one, resident=1))]
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
        most = config.most or (8 if len(x) <= 8 else 16)
        here = min(len(x), most)
        if here * _token_bytes(config, columns) > _SHARED_BYTES:  # options of a weight like this
            config = replace(config, stages=2, together=1)
        if columns % 8 or x.stride(0) % 8 or x.stride(1) != 1 or x.data_ptr() % 16:
            x = torch.nn.functional.pad(x, (0, -columns % 8)).contiguous()
        y = x.new_empty(len(x), out_features)
        size = columns if group_size == -1 else group_size
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
            "RESIDENT": config.resident,
            "TOGETHER": config.together,
            "BF16": int(x.dtype == torch.bfloat16),
            "SCALE": cuda_program.SCALES[scales.dtype],
        }
        kernel = cuda_program.kernel("mma.cu", "mma", tuple(macros.items()), index)
        rows, staged = TILE * config.tiles * config.high, here * _token_bytes(config, columns)
        sums = 4 * config.deep * here * (rows + 4)
        inbox = 4 * here * rows + 16 * config.split if config.split > 1 else 0
        numbers = (len(x), out_features, columns, x.stride(0), scales.shape[1])
        kernel.launch(
            (1, -(-out_features // rows), -(-len(x) // most)),
            32 * config.high * config.deep,
            (x, words, scales, zeros, y, *numbers),
            shared=max(staged, sums) + inbox,
            cluster=config.split,
            overlap=cuda_program.capability(index) >= 90,
        )
        return y
