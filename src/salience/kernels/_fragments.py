"""The layout of packed weights on GPUs: codes lie as the matrix unit takes them.

A tensor core multiplies 16 rows by 16 columns of the weight at once, and thread `lane` of the 32
holds eight codes of them, in four registers of two (PTX ISA, mma.m16n8k16 and wgmma, operand A):

    row    = g + 8 h               lane = 4 g + t
    column = 2 t + 8 kh + l        register = h + 2 kh, half l of it

Were the codes stored row by row, each thread would collect its eight from four places, or all
would go through shared memory. So they are reordered once, when the weight is loaded: in tiles of
16 rows and blocks of 128 columns (eight such steps j), each lane has its 64 codes in a row, as
32 pairs, pair 4 j + register. A pair is what one shift and one mask give: two codes, 16 bits apart.

    words of a lane and block   2 * bits
    2, 4, 8 bits                pair P in word P // (16 / bits), from bit bits * (P % (16 / bits))
    3 bits                      word i has pairs 5 i to 5 i + 4, three bits each; of pairs 30 and
                                31 each bit is the highest of a word, 0 to 2 and 3 to 5

Words are stored so that 16 bytes of each lane are one load of the warp: [lane][4 words], then the
next four words of all lanes; of three bits the last two words are one load of 8 bytes. Rows are
padded to 64, columns to 128, with codes 0 that meet a scale or an x of 0. Scales and zeros are
[tiles, groups, 16], where rows g and g + 8 of a tile are neighbours, as a thread needs both. All is
tile after tile, so weights that share their input are joined along the first dimension.

The order is that of NVIDIA GPUs since sm80, for mma as for wgmma, and is a pure reorder:
`unpack_fragments` undoes it exactly.
"""

import torch
from torch import Tensor

ROWS = 64  # rows are padded to a multiple
TILE = 16  # rows of a tile
BLOCK = 128  # columns of a block
BITS = (2, 3, 4, 8)
_TILES_AT_ONCE = 256


def words_of(bits: int) -> int:
    """Words of int32 that a lane has of a block."""
    return 2 * bits


def _places(bits: int) -> list[list[tuple[int, int, int, int]]]:
    """For each of the 32 pairs: (word, shift, bits, their place in the code)."""
    if bits != 3:
        each = 16 // bits
        return [[(pair // each, bits * (pair % each), bits, 0)] for pair in range(32)]
    places = [[(pair // 5, 3 * (pair % 5), 3, 0)] for pair in range(30)]
    return [*places, *([(first + i, 15, 1, i) for i in range(3)] for first in (0, 3))]


def pack_fragments(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [out, in] to words int32 [tiles, blocks, 64 * bits]."""
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -columns % BLOCK, 0, -rows % ROWS))
    #                     tiles h  g  blocks               j  kh t  l
    parts = padded.view(-1, 2, 8, padded.shape[1] // BLOCK, 8, 2, 4, 2)
    parts = parts.permute(0, 3, 2, 6, 4, 5, 1, 7)  # tiles, blocks, g, t, j, kh, h, l
    made = [_pack(some, bits) for some in parts.split(_TILES_AT_ONCE)]
    return torch.cat(made)


def _pack(parts: Tensor, bits: int) -> Tensor:
    tiles, blocks = parts.shape[:2]
    pairs = parts.reshape(tiles, blocks, 32, 32, 2)
    words = torch.zeros(tiles, blocks, 32, words_of(bits), dtype=torch.int32, device=parts.device)
    for pair, places in enumerate(_places(bits)):
        for half in range(2):
            code = pairs[..., pair, half].int()
            for word, shift, count, place in places:
                words[..., word] |= ((code >> place) & (2**count - 1)) << (shift + 16 * half)
    full = words_of(bits) // 4 * 4
    fours = words[..., :full].unflatten(-1, (-1, 4)).transpose(2, 3)
    return torch.cat([fours.flatten(2), words[..., full:].flatten(2)], dim=2)


def unpack_fragments(words: Tensor, bits: int) -> Tensor:
    """Undo `pack_fragments`: codes uint8 [padded rows, padded columns]."""
    return torch.cat([_unpack(some, bits) for some in words.split(_TILES_AT_ONCE)])


def _unpack(stored: Tensor, bits: int) -> Tensor:
    tiles, blocks = stored.shape[:2]
    full = words_of(bits) // 4 * 4
    fours = stored[..., : 32 * full].unflatten(-1, (-1, 32, 4)).transpose(2, 3).flatten(3)
    words = torch.cat([fours, stored[..., 32 * full :].unflatten(-1, (32, -1))], dim=3)
    pairs = torch.zeros(tiles, blocks, 32, 32, 2, dtype=torch.uint8, device=stored.device)
    for pair, places in enumerate(_places(bits)):
        for half in range(2):
            for word, shift, count, place in places:
                found = (words[..., word] >> (shift + 16 * half)) & (2**count - 1)
                pairs[..., pair, half] |= (found << place).to(torch.uint8)
    parts = pairs.view(tiles, blocks, 8, 4, 8, 2, 2, 2).permute(0, 6, 2, 1, 4, 5, 3, 7)
    return parts.reshape(tiles * TILE, blocks * BLOCK)


def order_rows(values: Tensor) -> Tensor:
    """Scales or zeros [out, groups] as [tiles, groups, 16]: rows g and g + 8 are neighbours."""
    padded = torch.nn.functional.pad(values, (0, 0, 0, -values.shape[0] % ROWS))
    return padded.unflatten(0, (-1, 2, 8)).permute(0, 3, 2, 1).flatten(2).contiguous()


def restore_rows(values: Tensor, rows: int) -> Tensor:
    """Undo `order_rows`: [rows, groups]."""
    return values.unflatten(2, (8, 2)).permute(0, 3, 2, 1).flatten(0, 2)[:rows].contiguous()
