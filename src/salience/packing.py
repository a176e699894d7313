"""Codes of 1 to 8 bits packed into int32 words.

The dense stream, least significant bit first, is what GPTQ and compressed-tensors store: code i
starts at bit i * bits, and word t holds bits 32t .. 32t+31. A 3-bit code may straddle two words;
nothing is wasted but what is left of the last word, which is 0. AutoAWQ stores the same stream of
4-bit codes after interleaving each eight columns, so that one shift yields two fp16 lanes at a time
on a GPU.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

# Nibble i of an AutoAWQ word holds column AWQ_ORDER[i] of its eight.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(n: int, bits: int) -> int:
    """Words that n codes fill or begin."""
    return -(-n * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [..., n] along the last dimension into int32 [..., words(n, bits)]."""
    n = codes.shape[-1]
    if n * bits % 32:
        return pack(pad(codes, (0, -n % 32)), bits)[..., : words(n, bits)].contiguous()
    if 8 % bits == 0:
        fields = codes.unflatten(-1, (-1, 8 // bits))
        return _fold(fields, bits).contiguous().view(torch.int32)
    shifts = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    planes = (codes[..., None] >> shifts) & 1  # [..., n, bits]
    return _fold(planes.flatten(-2).unflatten(-1, (-1, 8)), 1).view(torch.int32)


def unpack(packed: Tensor, bits: int, n: int | None = None) -> Tensor:
    """Undo `pack`: int32 [..., w] to uint8 codes [..., n]; None is all that w words can hold."""
    count = packed.shape[-1]
    if count * 32 % bits:
        packed = pad(packed, (0, -count % bits))
    if packed.stride(-1) != 1 or not packed.is_contiguous():
        # Not `contiguous()`, which leaves a single column any stride.
        packed = packed.clone(memory_format=torch.contiguous_format)
    data = packed.view(torch.uint8)
    if 8 % bits == 0:
        codes = _spread(data, bits).flatten(-2)
    else:
        codes = _fold(_spread(data, 1).flatten(-2).unflatten(-1, (-1, bits)), 1)
    return codes[..., : count * 32 // bits if n is None else n]


def interleave_awq(codes: Tensor) -> Tensor:
    """Put each eight columns [..., 8k] into AutoAWQ's order."""
    return codes.unflatten(-1, (-1, 8))[..., list(AWQ_ORDER)].flatten(-2)


def unpack_awq(packed: Tensor) -> Tensor:
    """AutoAWQ's words int32 [in, out / 8] to uint8 codes [out, in]."""
    words = packed.T.contiguous()
    codes = torch.empty(len(words), 8, len(packed), dtype=torch.uint8, device=packed.device)
    for i, column in enumerate(AWQ_ORDER):
        # By whole columns: more than twice as fast as to unpack, reorder and transpose.
        codes[:, column] = (words >> (4 * i)).bitwise_and_(15)
    return codes.flatten(0, 1)


def unpack_awq_fast(packed: Tensor) -> Tensor:
    """Codes uint8 [N, K] of llm-awq's second layout, int16 [N/4, K]; 64 divides K.

    In 64 columns, four rows share 64 words: word c < 64 belongs to row c // 16, and its nibble t is
    the code of column 32 ((c % 16) // 8) + c % 8 + 8t.
    """
    data = packed.clone(memory_format=torch.contiguous_format)
    shifts = torch.arange(0, 16, 4, dtype=torch.int16, device=packed.device)
    nibbles = ((data[..., None] >> shifts) & 15).to(torch.uint8)  # [N/4, K, t]
    fields = nibbles.view(len(packed), -1, 4, 2, 8, 4)  # [N/4, 64s, row, half, c % 8, t]
    return fields.permute(0, 2, 1, 3, 5, 4).reshape(4 * len(packed), -1)


def _fold(fields: Tensor, bits: int) -> Tensor:
    """Join small fields [..., n], field i at bit i * bits, into one uint8 [...]."""
    out = fields[..., 0].clone()
    for i in range(1, fields.shape[-1]):
        out |= fields[..., i] << (i * bits)
    return out


def _spread(data: Tensor, bits: int) -> Tensor:
    """Cut bytes [...] into their fields [..., 8 / bits]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)
    return (data[..., None] >> shifts).bitwise_and_(2**bits - 1)
