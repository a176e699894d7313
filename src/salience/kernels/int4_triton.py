"""4-bit weights on a GPU: a Triton kernel for few tokens, dequantization and cuBLAS for many.

Few tokens leave a GPU waiting for the weight to arrive, so all that counts is to read each byte of
it once, in long pieces, and to be done unpacking before the next one comes. The product is taken as
y^T = W x^T: with the weight on the left, Hopper's matrix unit takes it from registers, where it was
just unpacked, and it is never written anywhere.

Layout. Codes are reordered in blocks of 128 columns, words int32 [blocks, out, 16]: nibble
4 i + 16 l of word t (bits 16 l + 4 i and up) is column 32 i + 2 t + l of its block. The 64 bytes of
a row lie together, and so do the rows of a block. One shift and one mask give the two neighbours
l = 0, 1 as halves of a register, 1024 + code each when 0x6400 is put over them:

    w = fp16((q - zero) * scale)     q - zero is exact, the product is rounded to the dtype

An `i` covers 32 columns, so any group size that is a multiple of 32 has one scale there.

Narrow weights have fewer tiles than the GPU has processors. Their columns are split among several
programs; each leaves its sums in a scratch, and the last to finish adds them up, in one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from salience.errors import SalienceError
from salience.qtensor import QTensor
from salience.scheme import Scheme

BLOCK = 128  # columns of a block
_WORDS = 16  # of a row of a block
_ROWS = 64  # of a tile: what one group of four warps multiplies at once
_MANY_TOKENS = 128  # beyond, cuBLAS on the unpacked weight is faster
_TILE_ELEMENTS = 2**26  # of the weight that are unpacked at a time: 128 MiB


@triton.jit
def _pair(w, zero, scale, I: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr):  # noqa: E741
    """Columns 32 I .. 32 I + 31 of words [rows, 16], with zeros and scales [rows]: half-precision
    [rows, 32], or exact fp32 without assembly, which the interpreter does not know.
    """
    if ASM:
        zero2 = _twice(-128 - zero.to(tl.float32) if BF16 else zero.to(tl.float32) + 1024, BF16)
        zero2 = zero2[:, None]
        scale2 = _twice(scale, BF16)[:, None]
        if BF16:  # times 1 and plus -0: before sm90 it has no sums or products of their own
            low, high = tl.inline_asm_elementwise(
                """{.reg .b32 a, one, none; mov.b32 one, 0x3F803F80; mov.b32 none, 0x80008000;
                shr.u32 a, $2, $5; lop3.b32 a, a, 0x000F000F, 0x43004300, 0xEA;
                fma.rn.bf16x2 a, a, one, $3; fma.rn.bf16x2 a, a, $4, none;
                mov.b32 {$0, $1}, a;}""",
                "=h,=h,r,r,r,n", [w, zero2, scale2, 4 * I],
                dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=1,
            )  # fmt: skip
        else:
            low, high = tl.inline_asm_elementwise(
                """{.reg .b32 a; shr.u32 a, $2, $5; lop3.b32 a, a, 0x000F000F, 0x64006400, 0xEA;
                sub.rn.f16x2 a, a, $3; mul.rn.f16x2 a, a, $4; mov.b32 {$0, $1}, a;}""",
                "=h,=h,r,r,r,n", [w, zero2, scale2, 4 * I],
                dtype=(tl.float16, tl.float16), is_pure=True, pack=1,
            )  # fmt: skip
    else:
        z = zero.to(tl.float32)[:, None]
        s = scale.to(tl.float32)[:, None]
        low = (((w >> (4 * I)) & 15).to(tl.float32) - z) * s
        high = (((w >> (4 * I + 16)) & 15).to(tl.float32) - z) * s
    return tl.reshape(tl.join(low, high), (w.shape[0], 32))


@triton.jit
def _twice(x, BF16: tl.constexpr):
    """A float tensor as int32, its 16 bits twice."""
    half = x.to(tl.bfloat16 if BF16 else tl.float16)
    bits = half.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return bits | (bits << 16)


@triton.jit
def _multiply(
    x, words, scales, zeros, y, scratch, counters, tokens, out, columns, groups,
    GROUP: tl.constexpr, SPLIT: tl.constexpr, EACH: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr, STAGES: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """ROWS rows of W, TOKENS tokens, and a SPLITth part of the columns."""
    tile, part = tl.program_id(0), tl.program_id(1)
    first = tl.program_id(2) * TOKENS
    row = tile * ROWS + tl.arange(0, ROWS)
    rows = tl.minimum(row, out - 1).to(tl.int64)  # what is read beyond is not stored
    token = first + tl.arange(0, TOKENS)
    inside = (token < tokens)[:, None]
    place = tl.arange(0, 32)
    t = tl.arange(0, 16)
    last = tl.cdiv(columns, 128) - 1
    acc = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    for step in tl.range(0, EACH, num_stages=STAGES):
        block = part * EACH + step  # one beyond the last meets an x of 0
        stored = tl.minimum(block, last).to(tl.int64)
        w = tl.load(
            words + (stored * out + rows)[:, None] * 16 + t[None, :],
            eviction_policy="evict_first",
        )
        for i in tl.static_range(4):
            column = block * 128 + 32 * i
            if i == 0 or (GROUP % 128 != 0 and 32 * i % GROUP == 0):
                group = tl.minimum(column // GROUP, groups - 1)
                zero = tl.load(zeros + group.to(tl.int64) * out + rows)
                scale = tl.load(scales + group.to(tl.int64) * out + rows)
            here = column + place
            part_x = tl.load(
                x + token[:, None].to(tl.int64) * columns + here[None, :],
                mask=inside & (here < columns)[None, :],
                other=0.0,
            )
            weight = _pair(w, zero, scale, i, BF16, ASM)
            if ASM:
                acc = tl.dot(weight, tl.trans(part_x), acc)
            else:
                acc = tl.dot(weight, tl.trans(part_x).to(tl.float32), acc)
    at = token[None, :].to(tl.int64) * out + row[:, None]
    keep = (row < out)[:, None] & (token < tokens)[None, :]
    if SPLIT == 1:
        tl.store(y + at, acc.to(y.dtype.element_ty), mask=keep)
    else:
        size = tl.num_programs(0) * tl.num_programs(2) * ROWS * TOKENS
        mine = (tl.program_id(2) * tl.num_programs(0) + tile) * ROWS * TOKENS
        local = tl.arange(0, ROWS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        tl.store(scratch + part * size + mine + local, acc)
        tl.debug_barrier()
        counter = counters + tl.program_id(2) * tl.num_programs(0) + tile
        if tl.atomic_add(counter, 1, sem="acq_rel") == SPLIT - 1:
            total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
            for other in range(SPLIT):
                total += tl.load(scratch + other * size + mine + local, cache_modifier=".cg")
            tl.store(y + at, total.to(y.dtype.element_ty), mask=keep)
            tl.store(counter, 0)


@triton.jit
def _unpack(
    words, scales, zeros, w, first, count, out, columns, groups,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """A block of ROWS rows, dequantized: w [count, columns] is the weight from row `first` on."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = tl.minimum(first + row, out - 1).to(tl.int64)
    block = tl.program_id(1)
    t = tl.arange(0, 16)
    packed = tl.load(words + (block.to(tl.int64) * out + rows)[:, None] * 16 + t[None, :])
    for i in tl.static_range(4):
        column = block * 128 + 32 * i
        group = tl.minimum(column // GROUP, groups - 1).to(tl.int64)
        zero = tl.load(zeros + group * out + rows)
        scale = tl.load(scales + group * out + rows)
        here = column + tl.arange(0, 32)
        keep = (row < count)[:, None] & (here < columns)[None, :]
        at = row[:, None].to(tl.int64) * columns + here[None, :]
        weight = _pair(packed, zero, scale, i, BF16, ASM)
        tl.store(w + at, weight.to(w.dtype.element_ty), mask=keep)


def pack_words(codes: Tensor) -> Tensor:
    """Codes uint8 [out, in] as int32 [blocks, out, 16]; columns that are missing are 0."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % BLOCK))
    parts = padded.view(codes.shape[0], -1, 4, _WORDS, 2).int()
    words = torch.zeros_like(parts[:, :, 0, :, 0])
    for i in range(4):
        for lane in range(2):
            words |= parts[:, :, i, :, lane] << (4 * i + 16 * lane)
    return words.transpose(0, 1).contiguous()


def unpack_words(words: Tensor) -> Tensor:
    """Undo `pack_words`: codes uint8 [out, columns of the blocks]."""
    nibbles = [(words >> shift) & 15 for i in range(4) for shift in (4 * i, 4 * i + 16)]
    parts = torch.stack(nibbles, dim=-1).to(torch.uint8)  # [blocks, out, 16, 2 i + lane]
    ordered = parts.unflatten(-1, (4, 2)).permute(1, 0, 3, 2, 4)
    return ordered.reshape(words.shape[1], -1)


class TritonInt4:
    """Words int32 [blocks, out, 16], scales fp16 and zeros uint8, both [groups, out], and counters
    int32 of the programs that share a tile, 0 between calls. Calls with a weight must not overlap.
    """

    name = "triton_int4"

    def supports(
        self, scheme: Scheme, device: torch.device, in_features: int, out_features: int
    ) -> bool:
        """4 bits in groups of a multiple of 32, or whole rows, on an NVIDIA GPU from sm80 on."""
        group_size = scheme.group_columns(in_features)
        return (
            device.type == "cuda"
            and torch.cuda.get_device_capability(device) >= (8, 0)
            and scheme.bits == 4
            and scheme.codebook is None
            and in_features % group_size == 0
            and (group_size % 32 == 0 or group_size == in_features)
        )

    def pack(self, qt: QTensor) -> list[Tensor]:
        """The four resident tensors of a weight.

        Raises:
            SalienceError: groups in activation order.
        """
        if qt.g_idx is not None:
            raise SalienceError(f"kernel {self.name} takes no act-order weight; use reference")
        tiles = triton.cdiv(qt.out_features, _ROWS) * triton.cdiv(_MANY_TOKENS, 16)
        counters = torch.zeros(tiles, dtype=torch.int32, device=qt.q.device)
        return [pack_words(qt.q), qt.scales.T.contiguous(), qt.zeros.T.contiguous(), counters]

    def unpack(self, packed: list[Tensor], scheme: Scheme, in_features: int) -> QTensor:
        words, scales, zeros, _ = packed
        codes = unpack_words(words)[:, :in_features]
        return QTensor(codes, scales.T.contiguous(), zeros.T.contiguous(), scheme)

    def matmul(self, x: Tensor, packed: list[Tensor], bits: int, group_size: int) -> Tensor:
        """x [tokens, in] float times the packed weight: [tokens, out] in the dtype of x."""
        x, words = x.contiguous(), packed[0]
        if len(x) <= _MANY_TOKENS and x.dtype != torch.float32:
            return _multiplied(x, packed, group_size)
        y = x.new_empty(len(x), words.shape[1])
        step = max(1, _TILE_ELEMENTS // x.shape[1] // _ROWS) * _ROWS
        for start in range(0, words.shape[1], step):
            rows = slice(start, start + step)
            weight = unpacked(packed, rows, x.shape[1], group_size, x.dtype)
            torch.mm(x, weight.T, out=y[:, rows])
        return y


def split_of(tiles: int, blocks: int, tokens: int) -> int:
    """Programs that share the columns of a tile: more where tiles are few, while each still has a
    few blocks to overlap. As it was fastest on an H100 (benchmarks/results/int4_first_h100.json).
    """
    enough, least = (512, 4) if tokens <= 32 else (400, 8)
    split = 1
    while tiles * split < enough and blocks >= 2 * split * least:
        split *= 2
    return split


def _multiplied(x: Tensor, packed: list[Tensor], group_size: int, split: int = 0) -> Tensor:
    words, scales, zeros, counters = packed
    columns, out = x.shape[1], words.shape[1]
    tokens = min(64, max(16, triton.next_power_of_2(len(x))))
    tiles, strips = triton.cdiv(out, _ROWS), triton.cdiv(len(x), tokens)
    split = split or split_of(tiles * strips, len(words), tokens)
    y = x.new_empty(len(x), out)
    scratch = counters
    if split > 1:
        size = tiles * strips * split * _ROWS * tokens
        scratch = torch.empty(size, dtype=torch.float32, device=x.device)
    _multiply[(tiles, split, strips)](
        x, words, scales, zeros, y, scratch, counters, len(x), out, columns, len(scales),
        GROUP=columns if group_size == -1 else group_size, SPLIT=split,
        EACH=triton.cdiv(len(words), split), ROWS=_ROWS, TOKENS=tokens, STAGES=3,
        BF16=x.dtype == torch.bfloat16, ASM=x.is_cuda, num_warps=4,
    )  # fmt: skip
    return y


def unpacked(
    packed: list[Tensor], rows: slice, columns: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """Some rows of the weight, [rows, columns]; exact in fp32."""
    words, scales, zeros, _ = packed
    out = words.shape[1]
    first, count = rows.start, min(rows.stop, out) - rows.start
    w = torch.empty(count, columns, dtype=dtype, device=words.device)
    _unpack[(triton.cdiv(count, 32), len(words))](
        words, scales, zeros, w, first, count, out, columns, len(scales),
        GROUP=columns if group_size == -1 else group_size, ROWS=32, BF16=dtype == torch.bfloat16,
        ASM=words.is_cuda and dtype != torch.float32,
    )  # fmt: skip
    return w
