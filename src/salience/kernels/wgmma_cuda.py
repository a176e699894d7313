"""Weights of 2, 3, 4 and 8 bits times 16 tokens and more, on Hopper: `cuda/wgmma.cu`.

Hopper's matrix unit is full only when four warps together issue `wgmma`, which takes its left
operand from registers. So the product is y^T = W x^T: the weight, in the layout of `_fragments`, is
loaded straight into the registers that the instruction wants, unpacked there and multiplied. Few
tokens wait for the weight, many for the matrix unit; unpacking hides behind both, because

    few     each code is unpacked once: one block of the grid has all tokens
    many    256 tokens share what is unpacked: a step of 64 x 16 takes the matrix unit 128 cycles,
            and its unpacking some 15 instructions of each of four warps
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from salience.errors import SalienceError
from salience.kernels import cuda_program
from salience.kernels._fragments import BLOCK, ROWS, TILE
from salience.kernels.choice import Shape, bucket

_PROCESSORS = 132
_FEWEST, _MOST = 16, 256  # tokens of a block
_WORTH_TRYING = 12


@dataclass(frozen=True, slots=True)
class Config:
    """How the work of one product is cut.

    Args:
        tokens: of a thread block, a multiple of 16.
        warpgroups: of a part, each with other rows.
        parts: of a thread block, each with other columns; one warpgroup more brings x to all.
        row_tiles: of 64 rows, that a warpgroup has.
        split: thread blocks of a cluster that share the columns.
        stages: blocks of 128 columns of x in shared memory, for each part.
        depth: blocks of the weight under way.
        buffers: unpacked operands, 2 or 4.
        resident: thread blocks that a processor holds at once.
        strip: tiles of tokens that go down the rows together.
    """

    tokens: int
    warpgroups: int = 2
    row_tiles: int = 1
    parts: int = 1
    split: int = 1
    stages: int = 4
    depth: int = 2
    buffers: int = 2
    resident: int = 1
    strip: int = 4

    @property
    def rows(self) -> int:
        """Of a thread block."""
        return ROWS * self.warpgroups * self.row_tiles

    @property
    def threads(self) -> int:
        return 128 * self.warpgroups * self.parts + 128

    @property
    def shared(self) -> int:
        """Bytes of shared memory: rings of x, or in their place the sums; 1024 to align them."""
        ring, sums = self.stages * 2 * BLOCK * self.tokens, 4 * self.tokens * (self.rows + 4)
        return self.parts * max(ring, sums) + 1024

    def macros(
        self, bits: int, group_size: int, columns: int, bf16: bool, scale: int, once: bool
    ) -> dict[str, int]:
        """What wgmma.cu wants defined, for a weight of `columns` in groups of `group_size`.

        Args:
            bits: of a code.
            group_size: at most `columns`.
            columns: of the weight.
            bf16: dtype of x, else fp16.
            scale: dtype of scales, 0 fp16, 1 bf16, 2 fp32.
            once: the weight is read by one row of thread blocks only.
        """
        small = group_size in (32, 64) and group_size < columns
        return {
            "BITS": bits,
            "GROUP": group_size if small else BLOCK,
            "GROUP_BLOCKS": -(-group_size // BLOCK),
            "BF16": int(bf16),
            "SCALE": scale,
            "TOKENS": self.tokens,
            "WARPGROUPS": self.warpgroups,
            "ROW_TILES": self.row_tiles,
            "PARTS": self.parts,
            "SPLIT": self.split,
            "STAGES": self.stages,
            "DEPTH": self.depth,
            "BUFFERS": self.buffers,
            "RESIDENT": self.resident,
            "STREAM": int(once),
        }


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


class Wgmma:
    """The variant for many tokens on Hopper; its instruction is in no GPU before and none after."""

    name = "wgmma"

    def supports(self, shape: Shape, tokens: int, device: torch.device) -> bool:
        """Half precision, 16 tokens and more, groups of 32, 64, multiples of 128, or whole rows."""
        return (
            device.type == "cuda"
            and shape.dtype in (torch.float16, torch.bfloat16)
            and tokens >= _FEWEST
            and cuda_program.takes_groups(shape.group_size, shape.columns)
            and cuda_program.available()
            and torch.cuda.get_device_capability(device)[0] == 9
        )

    def options(self, shape: Shape, tokens: int) -> list[dict[str, int]]:
        """What is worth measuring."""
        found = _configs(shape.bits, shape.rows, shape.columns, tokens)
        return [asdict(config) for config in islice(found, _WORTH_TRYING)]

    def multiply(
        self,
        x: Tensor,
        packed: list[Tensor],
        bits: int,
        group_size: int,
        out_features: int,
        **options: int,
    ) -> Tensor:
        """x [tokens, in] half-precision times a packed weight: [tokens, out]; options of Config.

        Raises:
            SalienceError: such groups do not fall on the columns that are unpacked at once.
        """
        words, scales, zeros = packed
        columns, index = x.shape[1], x.device.index
        size = columns if group_size == -1 else min(group_size, columns)
        if not cuda_program.takes_groups(size, columns):
            raise SalienceError(f"kernel {self.name} has no groups of {size}; use 32, 64 or 128 n")
        if columns % 8 or not x.is_contiguous() or x.data_ptr() % 16:
            x = torch.nn.functional.pad(x, (0, -columns % 8)).contiguous()
        y = x.new_empty(len(x), out_features)
        if not len(x):
            return y
        config = Config(**options) if options else usual(bits, out_features, columns, len(x))
        token_tiles = -(-len(x) // config.tokens)
        bf16 = x.dtype == torch.bfloat16
        macros = config.macros(
            bits, size, columns, bf16, cuda_program.SCALES[scales.dtype], token_tiles == 1
        )
        before = instruction(config.tokens, bf16)
        kernel = cuda_program.kernel("wgmma.cu", "multiply", tuple(macros.items()), index, before)
        tiles, blocks = words.shape[:2]
        high = -(-tiles * TILE // config.rows)
        numbers = (len(x), out_features, tiles, blocks, scales.shape[1], token_tiles, config.strip)
        kernel.launch(
            (high * token_tiles, 1, 1),
            config.threads,
            (
                cuda_program.tensor_map(x, config.tokens),
                *(words, scales, zeros, y),
                *numbers,
            ),
            shared=config.shared,
            cluster=config.split,
            overlap=True,
        )
        return y


def usual(bits: int, rows: int, columns: int, tokens: int) -> Config:
    """What is good for such a product, as far as one can say without measuring."""
    width = min(_MOST, max(_FEWEST, bucket(tokens)))
    tall = -(-rows // ROWS)
    if width == _MOST and tall * -(-tokens // 128) <= _PROCESSORS:
        width = 128
    if width <= 128 and tall * -(-tokens // width) <= _PROCESSORS:
        config = _narrow(width, bits)
    elif width <= 64:
        config = Config(width, warpgroups=4)
    else:
        config = Config(width, stages=3 if width == _MOST else 4)
    tiles = -(-rows // config.rows) * -(-tokens // width)
    if 2 * tiles <= _PROCESSORS and 2 * config.parts * config.depth * BLOCK <= columns:
        config = replace(config, split=2)
    return config


def _narrow(width: int, bits: int) -> Config:
    """As many parts as the rings leave room for, all of the same 64 rows: what few rows need."""
    if width > 64:
        return Config(width, warpgroups=1, parts=3, stages=2)
    depth = _deep(bits) if width <= 32 else 2  # what the registers of five warpgroups hold
    return Config(width, warpgroups=1, parts=4, stages=3, depth=depth)


def _deep(bits: int) -> int:
    """Blocks of the weight that the registers of two thread blocks of a processor still hold."""
    return 2 if bits == 8 else 4


def _configs(bits: int, rows: int, columns: int, tokens: int) -> Iterator[Config]:
    """The configurations worth measuring for a product, those of an H100's likeliest first."""
    width = min(_MOST, max(_FEWEST, bucket(tokens)))
    first = usual(bits, rows, columns, tokens)
    yield first
    if tokens > 512:
        yield Config(_MOST, stages=3, strip=8)
        yield Config(128, warpgroups=3)
        return
    found = {}
    for config in _shapes(width, bits):
        tiles = -(-rows // config.rows) * -(-tokens // config.tokens)
        for split in (1, 2, 4):
            made = replace(config, split=split)
            crowd = tiles * split > _PROCESSORS * config.resident
            short = 4 * split * BLOCK > columns
            if made != first and not (split > 1 and (crowd or short)):
                found[made] = abs(math.log2(tiles * split / _PROCESSORS))
    yield from sorted(found, key=found.__getitem__)


def _shapes(width: int, bits: int) -> Iterator[Config]:
    """Of blocks of so many tokens; each will be split."""
    yield _narrow(min(width, 128), bits)
    if width <= 64:
        yield Config(width, parts=2, depth=_deep(bits) if width <= 32 else 2)
        yield Config(width, warpgroups=4)
        yield Config(width, depth=_deep(bits), resident=2)
        yield Config(width, depth=2, resident=2)
        return
    yield Config(128)
    yield Config(128, warpgroups=1, depth=_deep(bits), resident=2, stages=3)
    yield Config(128, warpgroups=3)
    if width == _MOST:
        yield Config(_MOST, stages=3)
