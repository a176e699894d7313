"""4-bit weights on a CPU, with the int4 matrix multiply that torch already has.

Torch packs two codes a byte in an order that suits the processor, and multiplies bf16 activations:

    w = (q - 8) * s + z,   z = (8 - zero) * s,   s and z rounded to bf16

The op unpacks the weight anew for each few tokens, so its time is proportional to their number: the
best for generating, poor for a prompt. For a prompt the same bytes are unpacked to fp32 once, a
tile of rows at a time, and multiplied by the ordinary matrix multiply. That has a cost to start
with, is cheaper for each token, and is exact in the weights: q * scale - zero * scale takes 15 of
fp32's 24 bits.

The op's bf16 costs a relative error of 3e-3 in y, as in any bf16 model. Who asks for fp32 gets
better: x, s and z are each split into a bf16 number and its bf16 remainder, and what is left is the
rounding of y,

    x W ~ op(x_hi; s_hi, z_hi) + op(x_lo; s_hi, z_hi) + op(x_hi; s_lo, z_lo)

for about twice the time. bf16 models keep the single product.

fp32 is used for any dtype of x: on the CPU measured (two Xeon cores, AVX512-BF16, no AMX) it ran at
250 GFLOP/s and bf16 at 150. A CPU with AMX would do better with bf16.

Torch does not promise the order of the codes, and it differs between processors: blocks of 32 or 64
rows, then what is left; in a block all rows of column 0, then of column 1, and so on. `_sources`
learns it by packing numbers that say where they came from. Packed bytes are thus no file format,
and on a processor with some other order `supports` says no.
"""

import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from salience.errors import SalienceError
from salience.qtensor import QTensor
from salience.scheme import Scheme

_GROUP_SIZES = (32, 64, 128, 256)
_ROW_MULTIPLE = 16

# From this many tokens on, unpacking wins. On two cores a 4096 x 4096 weight took the op 0.29 ms a
# token and unpacking 8 ms and then 0.15 ms a token; at 64 they were even for each shape tried. An
# fp32 token costs the op three.
_MANY_TOKENS = 64
_MANY_FP32_TOKENS = 20

# 16 MiB of fp32. With smaller tiles, each multiply of a wide weight reorders x for too few rows.
_TILE_ELEMENTS = 2**22


class CpuInt4:
    """Packed codes uint8 [out, in / 2], s and z bf16 [groups, out, 2] for torch's op, their
    remainders likewise, and the exact scales and zeros, both [groups, out]: 4.69 bits a weight with
    groups of 128.
    """

    name = "cpu_int4"

    def supports(
        self, scheme: Scheme, device: torch.device, in_features: int, out_features: int
    ) -> bool:
        """4 bits in groups of 32, 64, 128 or 256 and a multiple of 16 rows, on a CPU."""
        group_size = scheme.group_columns(in_features)
        return (
            device.type == "cpu"
            and scheme.bits == 4
            and scheme.codebook is None
            and group_size in _GROUP_SIZES
            and in_features % group_size == 0
            and out_features % _ROW_MULTIPLE == 0
            and _order_is_known(out_features % _block_rows())
        )

    def pack(self, qt: QTensor) -> list[Tensor]:
        """The five resident tensors of a weight.

        Raises:
            SalienceError: the groups are in activation order, or `supports` says no.
        """
        if qt.g_idx is not None:
            raise SalienceError(f"kernel {self.name} takes no act-order weight; use reference")
        if not self.supports(qt.scheme, qt.q.device, qt.in_features, qt.out_features):
            shape = f"{qt.out_features} x {qt.in_features} on {qt.q.device}"
            raise SalienceError(f"kernel {self.name} takes no {qt.scheme} {shape}; use reference")
        scales, zeros = qt.scales.t().contiguous(), qt.zeros.t().contiguous()
        s = scales.float()
        high, low = _split(torch.stack([s, (8 - zeros.float()) * s], dim=-1))
        return [_pack_codes(qt.q), high, low, scales, zeros]

    def unpack(
        self, packed: list[Tensor], scheme: Scheme, in_features: int, out_features: int
    ) -> QTensor:
        codes, _, _, scales, zeros = packed
        q = torch.empty(codes.shape[0], in_features, dtype=torch.uint8, device=codes.device)
        one = torch.ones_like(scales, dtype=torch.float32)
        for rows, weight in _tiles(codes, one, torch.zeros_like(one)):
            q[rows] = weight.t().to(torch.uint8)
        return QTensor(q, scales.t().contiguous(), zeros.t().contiguous(), scheme)

    def matmul(
        self, x: Tensor, packed: list[Tensor], bits: int, group_size: int, out_features: int
    ) -> Tensor:
        """x [tokens, in] float times the packed weight: [tokens, out] in the dtype of x."""
        codes, high, low, scales, zeros = packed
        tokens = x.shape[0]
        if x.dtype == torch.float32 and tokens < _MANY_FP32_TOKENS:
            parts = torch.cat(_split(x))
            y = _multiply_packed(parts, codes, high)
            rest = _multiply_packed(parts[:tokens], codes, low)
            return y[:tokens].float().add_(y[tokens:]).add_(rest)
        if x.dtype != torch.float32 and tokens < _MANY_TOKENS:
            return _multiply_packed(x, codes, high).to(x.dtype)
        x32 = x.float()
        out = x32.new_empty(x.shape[0], codes.shape[0])
        for rows, weight in _tiles(codes, scales, zeros):
            torch.mm(x32, weight, out=out[:, rows])
        return out.to(x.dtype)


def _split(value: Tensor) -> tuple[Tensor, Tensor]:
    """An fp32 tensor as the sum of two bf16 ones."""
    high = value.bfloat16()
    return high, (value - high).bfloat16()


def _pack_codes(codes: Tensor) -> Tensor:
    """Codes [out, in] in torch's order: uint8 [out, in / 2]."""
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2)
    return packed


def _multiply_packed(x: Tensor, codes: Tensor, op_scales: Tensor) -> Tensor:
    """x [tokens, in] times a packed weight by torch's op: bf16 [tokens, out]."""
    group_size = x.shape[1] // op_scales.shape[0]
    x16 = x.bfloat16().contiguous()  # With fp16 or fp32 the op is some 40 times slower.
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x16, codes, group_size, op_scales)
    return y


def _tiles(codes: Tensor, scales: Tensor, zeros: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Dequantize a packed weight by tiles of whole blocks: the rows, and the weight fp32 [in, n].

    A tile is transposed because the bytes are. The next tile overwrites it.
    """
    (groups, out_features), in_features = scales.shape, 2 * codes.shape[1]
    block = _block_rows()
    whole = out_features - out_features % block
    step = max(1, _TILE_ELEMENTS // (block * in_features)) * block
    edges = [*range(0, whole, step), whole]
    tiles = [(slice(start, end), block) for start, end in itertools.pairwise(edges)]
    if whole < out_features:
        tiles.append((slice(whole, out_features), out_features - whole))
    # One buffer for all: the page faults of a new one took longer than filling it.
    most = max(rows.stop - rows.start for rows, _ in tiles)
    buffer = torch.empty(most * in_features, device=codes.device)
    for rows, height in tiles:
        weight = buffer[: (rows.stop - rows.start) * in_features].view(in_features, -1)
        columns = weight.view(in_features, -1, height)  # [in, blocks, rows of a block]
        blocks = codes[rows].view(-1, in_features, height // 2)
        low, high = _nibble_rows(height)
        columns[..., low] = (blocks & 15).transpose(0, 1)
        columns[..., high] = (blocks >> 4).transpose(0, 1)
        scale = scales[:, None, rows].float()
        grouped = weight.view(groups, in_features // groups, -1)
        torch.addcmul(zeros[:, None, rows] * -scale, grouped, scale, out=grouped)
        yield rows, weight


def _sources(rows: int) -> Tensor:
    """Where the nibbles of a packed weight [rows, 2] come from: 2 * row + column, [bytes, 2]."""
    numbers = torch.arange(rows * 2, device="cpu").view(rows, 2)
    found = torch.zeros_like(numbers)
    for shift in range(0, (rows * 2 - 1).bit_length(), 4):  # a code holds four bits of a number
        packed = _pack_codes((numbers >> shift) & 15).flatten()
        found |= torch.stack([packed & 15, packed >> 4], dim=-1).long() << shift
    return found


@functools.cache
def _block_rows() -> int:
    """Rows of a whole block on this processor: two for each byte before the first of column 1."""
    columns = _sources(512)[:, 0] % 2
    return 2 * int((columns.cumsum(0) == 0).sum())


@functools.cache
def _nibble_rows(block: int) -> tuple[slice, slice]:
    """The rows of a block that the low nibbles of a column's bytes hold, and the high ones."""
    half = block // 2
    low, high = (_sources(block)[:half] // 2).t().tolist()
    step = low[1] - low[0]
    return slice(low[0], low[0] + half * step, step), slice(high[0], high[0] + half * step, step)


@functools.cache
def _order_is_known(tail: int) -> bool:
    """Whether the codes of two blocks and a tail of rows come back from the packed bytes."""
    n = 2 * _block_rows() + tail
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (n, 32), generator=random, device="cpu")
    scales = torch.ones(1, n, device="cpu")
    tiles = _tiles(_pack_codes(codes), scales, torch.zeros_like(scales))
    return all(torch.equal(weight.t(), codes[rows].float()) for rows, weight in tiles)
