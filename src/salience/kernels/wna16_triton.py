"""Weights of 2, 3, 4 and 8 bits times activations, in Triton: the way that runs on any GPU.

The product is taken as y^T = W x^T, the weight on the left. Each warp of a program has 16 rows of
the weight, and each lane loads its 64 codes of a block as they lie (`_fragments`). They are those
that the matrix unit of an NVIDIA GPU wants of that lane, so that they go to it from the registers
where they are decoded, through no shared memory and no shuffle. (Other GPUs shuffle.)

    part[r, m] = sum over a group of (q - zero)[r, k] x[m, k]        exact products, fp32 sums
    y[m, r]    = sum over groups of scale[r, group] part[r, m]       in fp32

q - zero is a whole number that fp16 and bf16 hold exactly, and the scale multiplies sums and not
weights: nothing is rounded but the sums, and 16 tokens share a multiplication for 32 or more
weights. x in fp32 is taken as three bf16 numbers that add up to it.

A weight of few rows gives too few programs to keep a GPU busy. Then several share the columns of a
tile; each leaves its sums in a scratch, and a second kernel adds them in their order: the same bits
each time, and nothing resident that two calls could both write.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from salience.kernels._fragments import BLOCK, TILE

_REDUCED = 1024  # elements of y that one program of `_add` adds up
# PTX has no bf16 arithmetic but fma before sm90: times 1, plus -128 - zero.
_DECODE_FP16 = tl.constexpr(
    "{.reg .b32 a; shr.u32 a, $2, $4; lop3.b32 a, a, $5, 0x64006400, 0xEA;"
    " sub.rn.f16x2 a, a, $3; mov.b32 {$0, $1}, a;}"
)
_DECODE_BF16 = tl.constexpr(
    "{.reg .b32 a, one; mov.b32 one, 0x3F803F80; shr.u32 a, $2, $4;"
    " lop3.b32 a, a, $5, 0x43004300, 0xEA; fma.rn.bf16x2 a, a, one, $3; mov.b32 {$0, $1}, a;}"
)


@triton.jit
def _zeros2(zero, BITS: tl.constexpr, KIND: tl.constexpr):
    """What `_pair` takes off: of zeros int32, themselves, or for assembly what the bits put over a
    code add to it, and the zero, as half-precision twice.
    """
    if KIND == "bf16" and BITS != 8:
        half = (-128 - zero).to(tl.float32).to(tl.bfloat16)
    elif KIND == "fp16" or KIND == "bf16":
        half = (1024 + zero).to(tl.float32).to(tl.float16)
    else:
        half = zero
    if KIND == "fp16" or KIND == "bf16":
        bits = half.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        half = bits | (bits << 16)
    return half


@triton.jit
def _pair(words, zero2, P: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr):
    """Pair P of each lane as two tensors of codes less their zero, in the dtype of KIND: fp16 or
    bf16 by assembly; "plain" is fp32, and "plain_fp16" and "plain_bf16" are made from it.
    """
    if BITS == 3 and P >= 30:
        a, b, c = words[3 * (P - 30)], words[3 * (P - 30) + 1], words[3 * (P - 30) + 2]
        word = ((a >> 15) & 0x10001) | ((b >> 14) & 0x20002) | ((c >> 13) & 0x40004)
        shift: tl.constexpr = 0
    elif BITS == 3:
        word = words[P // 5]
        shift: tl.constexpr = 3 * (P % 5)
    else:
        word = words[P // (16 // BITS)]
        shift: tl.constexpr = BITS * (P % (16 // BITS))
    mask: tl.constexpr = 2**BITS - 1
    if KIND == "bf16" and BITS != 8:
        low, high = tl.inline_asm_elementwise(
            _DECODE_BF16, "=h,=h,r,r,n,n", [word, zero2, shift, mask * 0x10001],
            dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=1,
        )  # fmt: skip
    elif KIND == "fp16" or KIND == "bf16":
        low, high = tl.inline_asm_elementwise(
            _DECODE_FP16, "=h,=h,r,r,n,n", [word, zero2, shift, mask * 0x10001],
            dtype=(tl.float16, tl.float16), is_pure=True, pack=1,
        )  # fmt: skip
        if KIND == "bf16":  # of 8 bits: 128 + code has no room in bf16
            low, high = low.to(tl.float32).to(tl.bfloat16), high.to(tl.float32).to(tl.bfloat16)
    else:
        low = (((word >> shift) & mask) - zero2).to(tl.float32)
        high = (((word >> (shift + 16)) & mask) - zero2).to(tl.float32)
        if KIND == "plain_fp16":
            low, high = low.to(tl.float16), high.to(tl.float16)
        elif KIND == "plain_bf16":
            low, high = low.to(tl.bfloat16), high.to(tl.bfloat16)
    return low, high


@triton.jit
def _pairs(
    words, zero2, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr,
    BITS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Pairs FIRST, FIRST + STEP, ..., COUNT of them: [4, 8, tiles, 2 of the pair, 2, 2, ...], one
    dimension for each bit of the number, lowest first.
    """
    if COUNT == 1:
        low, high = _pair(words, zero2, FIRST, BITS, KIND)
        return tl.join(low, high)
    else:
        half: tl.constexpr = COUNT // 2
        return tl.join(
            _pairs(words, zero2, FIRST, STEP, half, BITS, KIND),
            _pairs(words, zero2, FIRST + STEP * half, STEP, half, BITS, KIND),
        )


@triton.jit
def _weight(
    words, zero_a, zero_b, FIRST: tl.constexpr, STEPS: tl.constexpr, TILES: tl.constexpr,
    BITS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Columns 16 FIRST to 16 (FIRST + STEPS) of a block, less their zeros: [16 TILES, 16 STEPS].

    Pairs of odd number are of rows g + 8, whose zero is `zero_b`.
    """
    a = _pairs(words, zero_a, 4 * FIRST, 2, 2 * STEPS, BITS, KIND)
    b = _pairs(words, zero_b, 4 * FIRST + 1, 2, 2 * STEPS, BITS, KIND)
    both = tl.join(a, b)  # t, g, tile, l, kh, bits of the step, h
    if STEPS == 2:
        both = tl.permute(both, (2, 6, 1, 5, 4, 0, 3))
    elif STEPS == 4:
        both = tl.permute(both, (2, 7, 1, 6, 5, 4, 0, 3))
    else:
        both = tl.permute(both, (2, 8, 1, 7, 6, 5, 4, 0, 3))
    return tl.reshape(both, (16 * TILES, 16 * STEPS))


@triton.jit
def _fours(block, FOUR: tl.constexpr, LEFT: tl.constexpr, TILES: tl.constexpr):
    """Four (or two) words of each lane, [4, 8, tiles] each; one load of 16 (8) bytes."""
    lane = tl.arange(0, 4)[:, None, None, None] + tl.arange(0, 8)[None, :, None, None] * 4
    place = 128 * FOUR + lane * LEFT + tl.arange(0, LEFT)[None, None, None, :]
    loaded = tl.load(block + place, eviction_policy="evict_first")
    if LEFT == 2:
        return tl.split(loaded)
    else:
        even, odd = tl.split(tl.reshape(loaded, (4, 8, TILES, 2, 2)))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        return a, b, c, d


@triton.jit
def _words(words, tile, stored, blocks, TILES: tl.constexpr, BITS: tl.constexpr):
    """All words of block `stored` of TILES tiles: a tuple of 2 BITS tensors [4, 8, tiles]."""
    tiles = tile.to(tl.int64) + tl.arange(0, TILES)
    block = words + (tiles * blocks + stored)[None, None, :, None] * (64 * BITS)
    if BITS == 2:
        return _fours(block, 0, 4, TILES)
    elif BITS == 3:
        return _fours(block, 0, 4, TILES) + _fours(block, 1, 2, TILES)
    elif BITS == 4:
        return _fours(block, 0, 4, TILES) + _fours(block, 1, 4, TILES)
    else:
        first = _fours(block, 0, 4, TILES) + _fours(block, 1, 4, TILES)
        return first + _fours(block, 2, 4, TILES) + _fours(block, 3, 4, TILES)


@triton.jit
def _of_rows(values, tile, group, groups, TILES: tl.constexpr):
    """Scales or zeros of a group, of rows g and of rows g + 8: two tensors [4, 8, tiles]."""
    tiles = tile.to(tl.int64) + tl.arange(0, TILES)
    at = (tiles * groups + group)[None, None, :] * 16 + 2 * tl.arange(0, 8)[None, :, None]
    at = at + tl.zeros((4, 1, 1), dtype=tl.int32)  # as the words lie among the lanes
    return tl.load(values + at), tl.load(values + at + 1)


@triton.jit(do_not_specialize=["tokens", "groups", "part_size"])
def _multiply(
    x, words, scales, zeros, y, tokens, out, columns, groups, stride, part_size, group_size,
    EACH: tl.constexpr, CHUNK: tl.constexpr, TILES: tl.constexpr, TOKENS: tl.constexpr,
    STAGES: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """16 TILES rows of W, TOKENS tokens, and EACH blocks of the columns; y or, of several, their
    parts of the scratch.
    """
    tile = tl.program_id(0) * TILES
    part = tl.program_id(1)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    inside = (token < tokens)[:, None]
    at_token = token.to(tl.int64)[:, None] * stride
    blocks = tl.cdiv(columns, 128)
    total = tl.zeros((TILES, 2, 8, TOKENS // 8, 4, 2), dtype=tl.float32)
    for step in tl.range(0, EACH, num_stages=STAGES):
        block = part * EACH + step  # one beyond the last meets an x of 0
        packed = _words(words, tile, tl.minimum(block, blocks - 1), blocks, TILES, BITS)
        for i in tl.static_range(128 // CHUNK):
            first = block * 128 + CHUNK * i
            group = tl.minimum(first // group_size, groups - 1)
            zero_a, zero_b = _of_rows(zeros, tile, group, groups, TILES)
            scale_a, scale_b = _of_rows(scales, tile, group, groups, TILES)
            column = first + tl.arange(0, CHUNK)
            some = tl.load(
                x + at_token + column[None, :],
                mask=inside & (column < columns)[None, :],
                other=0.0,
            )
            weight = _weight(
                packed, _zeros2(zero_a.to(tl.int32), BITS, KIND),
                _zeros2(zero_b.to(tl.int32), BITS, KIND),
                CHUNK // 16 * i, CHUNK // 16, TILES, BITS, KIND,
            )  # fmt: skip
            some = tl.trans(some)
            if some.dtype == tl.float32:
                high = some.to(tl.bfloat16)
                some -= high.to(tl.float32)
                middle = some.to(tl.bfloat16)
                low = (some - middle.to(tl.float32)).to(tl.bfloat16)
                sums = tl.dot(weight, low.to(weight.dtype), input_precision="ieee")
                sums = tl.dot(weight, middle.to(weight.dtype), sums, input_precision="ieee")
                sums = tl.dot(weight, high.to(weight.dtype), sums, input_precision="ieee")
            else:
                sums = tl.dot(weight, some.to(weight.dtype), input_precision="ieee")
            scale = tl.join(scale_a.to(tl.float32), scale_b.to(tl.float32))
            scale = tl.permute(scale, (2, 3, 1, 0))[:, :, :, None, :, None]
            total += tl.reshape(sums, (TILES, 2, 8, TOKENS // 8, 4, 2)) * scale
    row = tile * 16 + tl.arange(0, 16 * TILES)
    at = token[None, :].to(tl.int64) * out + row[:, None]
    sums = tl.reshape(total, (16 * TILES, TOKENS))
    keep = (row < out)[:, None] & (token < tokens)[None, :]
    tl.store(y + part.to(tl.int64) * part_size + at, sums.to(y.dtype.element_ty), mask=keep)


@triton.jit
def _add(scratch, y, size, SPLIT: tl.constexpr, SOME: tl.constexpr):
    """y = the sum of SPLIT parts of the scratch, fp32 [SPLIT, size]."""
    at = tl.program_id(0).to(tl.int64) * SOME + tl.arange(0, SOME)
    total = tl.zeros((SOME,), dtype=tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(scratch + part * size + at, mask=at < size, other=0.0)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=at < size)


@triton.jit(do_not_specialize=["first", "count", "groups"])
def _unpack(
    words, scales, zeros, w, first, count, columns, groups, group_size,
    CHUNK: tl.constexpr, TILES: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """A block of 16 TILES rows, dequantized: w [count, columns] is the weight from tile `first`."""
    tile, block = tl.program_id(0) * TILES, tl.program_id(1)
    row = tile * 16 + tl.arange(0, 16 * TILES)
    packed = _words(words, first + tile, block, tl.num_programs(1), TILES, BITS)
    for i in tl.static_range(128 // CHUNK):
        start = block * 128 + CHUNK * i
        group = tl.minimum(start // group_size, groups - 1)
        zero_a, zero_b = _of_rows(zeros, first + tile, group, groups, TILES)
        scale_a, scale_b = _of_rows(scales, first + tile, group, groups, TILES)
        weight = _weight(
            packed, _zeros2(zero_a.to(tl.int32), BITS, KIND),
            _zeros2(zero_b.to(tl.int32), BITS, KIND),
            CHUNK // 16 * i, CHUNK // 16, TILES, BITS, KIND,
        )  # fmt: skip
        scale = tl.join(scale_a.to(tl.float32), scale_b.to(tl.float32))
        scale = tl.permute(scale, (2, 3, 1, 0))[:, :, :, None, :, None]
        values = tl.reshape(weight, (TILES, 2, 8, CHUNK // 8, 4, 2)).to(tl.float32) * scale
        values = tl.reshape(values, (16 * TILES, CHUNK))
        column = start + tl.arange(0, CHUNK)
        keep = (row < count)[:, None] & (column < columns)[None, :]
        at = row[:, None].to(tl.int64) * columns + column[None, :]
        tl.store(w + at, values.to(w.dtype.element_ty), mask=keep)


def multiply(
    x: Tensor,
    packed: list[Tensor],
    bits: int,
    group_size: int,
    out_features: int,
    split: int = 0,
    tiles: int = 4,
) -> Tensor:
    """x [tokens, in] times a weight packed in fragments: [tokens, out_features], dtype of x.

    Args:
        x: fp16, bf16 or fp32, rows of any stride. A weight is read once for each 64 tokens.
        packed: words int32 [tiles, blocks, 64 bits], scales [tiles, groups, 16] and zeros uint8.
        bits: 2, 3, 4 or 8.
        group_size: a multiple of 32, or -1 for whole rows.
        out_features: rows of the weight without padding.
        split: programs that share the columns of a row; 0 for a guess.
        tiles: of 16 rows in a program, 4 or 8.
    """
    words, scales, zeros = packed
    tokens, columns = x.shape
    y = x.new_empty(tokens, out_features)
    if not y.numel():
        return y
    if x.stride(1) != 1:
        x = x.contiguous()
    if words.shape[0] % tiles:
        tiles = 4
    block = min(64, max(16, triton.next_power_of_2(tokens)))
    programs, strips = triton.cdiv(out_features, TILE * tiles), triton.cdiv(tokens, block)
    blocks = words.shape[1]
    split = min(split or _split_of(programs * strips, blocks, block), blocks)
    each = triton.cdiv(blocks, split)
    split = triton.cdiv(blocks, each)
    sums = y if split == 1 else y.new_empty(split, *y.shape, dtype=torch.float32)
    group = columns if group_size == -1 else group_size
    _multiply[(programs, split, strips)](
        x, words, scales, zeros, sums, tokens, out_features, columns, scales.shape[1], x.stride(0),
        y.numel(), group, EACH=each, CHUNK=_chunk(group, columns), TILES=tiles, TOKENS=block,
        STAGES=3, BITS=bits, KIND=_kind(x.dtype, x.is_cuda), num_warps=tiles,
    )  # fmt: skip
    if split > 1:
        _add[(triton.cdiv(y.numel(), _REDUCED),)](sums, y, y.numel(), SPLIT=split, SOME=_REDUCED)
    return y


def unpacked(
    packed: list[Tensor],
    rows: slice,
    columns: int,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Some rows of the weight, from a multiple of 64 on: [rows, columns], each element the exact
    product rounded to `dtype` once (of fp32 scales, the fp32 product).

    Args:
        packed: as of `multiply`.
        rows: start and stop.
        columns: without padding.
        bits: 2, 3, 4 or 8.
        group_size: as of `multiply`.
        dtype: fp16, bf16 or fp32.
        out: a contiguous tensor to write, of that shape and dtype.
    """
    words, scales, zeros = packed
    count = rows.stop - rows.start
    if out is None:
        out = torch.empty(count, columns, dtype=dtype, device=words.device)
    group = columns if group_size == -1 else group_size
    _unpack[(triton.cdiv(count, 4 * TILE), words.shape[1])](
        words, scales, zeros, out, rows.start // TILE, count, columns, scales.shape[1], group,
        CHUNK=_chunk(group, columns), TILES=4, BITS=bits, KIND=_kind(torch.float16, words.is_cuda),
        num_warps=4,
    )  # fmt: skip
    return out


def _chunk(group: int, columns: int) -> int:
    """Columns of a block that have the same group: 32, 64 or 128."""
    return BLOCK if group == columns else math.gcd(group, BLOCK)


def _kind(dtype: torch.dtype, on_gpu: bool) -> str:
    """How codes are decoded. The interpreter knows no assembly, nor do AMD's GPUs this one."""
    if not on_gpu:
        return "plain"
    kind = "fp16" if dtype == torch.float16 else "bf16"
    return kind if torch.version.hip is None else f"plain_{kind}"


def _split_of(programs: int, blocks: int, tokens: int) -> int:
    """Programs that share the columns of a tile: more where tiles are few, while each still has a
    few blocks to overlap.
    """
    enough, least = (512, 4) if tokens <= 32 else (400, 8)
    split = 1
    while programs * split < enough and blocks >= 2 * split * least:
        split *= 2
    return split
