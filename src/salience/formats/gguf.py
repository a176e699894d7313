"""GGUF blocks: what llama.cpp, and all that is built on it, runs.

A row is cut into blocks of 32 columns, each with a scale of its own:

    Q4_0   18 bytes   fp16 d;          16 bytes of codes   w = d (q - 8)
    Q4_1   20 bytes   fp16 d, fp16 m;  16 bytes of codes   w = d q + m
    Q8_0   34 bytes   fp16 d;          32 int8             w = d q

Byte j of 4-bit codes holds column j in its low half and column j + 16 in its high half. A weight
whose zeros are all 8 is Q4_0, any other of 4 bits Q4_1 with m = -scale * zero rounded to fp16;
symmetric 8 bits are Q8_0. Codes and scales are stored as they are, and so is the zero: what
rounding takes from m is less than a hundredth of a step, so the nearest integer to -m / d is it.
A group of 64 or 128 columns is 2 or 4 blocks with the same scale, which costs bits: 4.5 a weight
for Q4_0 and 5 for Q4_1, whatever the group size. The scheme itself is kept in the file's metadata.

The bytes of one weight are one tensor here, `weight.blocks`, uint8 [out, in / 32, 18 or 20 or 34];
the size of a block names its type. `salience.gguf.writer` puts them into the file.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from salience.checkpoint import BLOCK, BLOCK_BYTES
from salience.errors import SalienceError
from salience.formats._tensors import need
from salience.qtensor import QTensor
from salience.scheme import Scheme

LOCAL = "weight.blocks"
TYPES = {size: kind for kind, size in BLOCK_BYTES.items()}
_MIDDLE = {4: 8, 8: 128}  # the zero of symmetric codes
_CHUNK_ROWS = 256


@dataclass(frozen=True, slots=True)
class Gguf:
    """4 bits, or 8 bits symmetric, in groups of 32 columns or a multiple; mixed at will."""

    name: str = "gguf"
    tensors: frozenset[str] = frozenset({LOCAL})
    marker: str = LOCAL
    heads: bool = True
    container: str = "gguf"
    act_order: bool = False
    config_file: str | None = None

    def detect(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == "gguf"

    def scheme(self, config: Mapping[str, Any], name: str) -> Scheme:
        """As the metadata says; of a file that another tool made, one block is one group."""
        schemes = config.get("schemes") or {}
        if not isinstance(schemes, Mapping):
            raise SalienceError("the schemes of a gguf quantization_config are no object")
        scheme = Scheme.parse(str(schemes.get(name) or config.get("scheme") or f"w4g{BLOCK}"))
        if scheme.codebook is not None:
            raise SalienceError(f"a gguf quantization_config has {scheme}, which no block holds")
        return scheme

    def check(self, schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, int]]) -> None:
        for name, scheme in schemes.items():
            reason = _unfit(scheme)
            if reason is None and shapes[name][1] % BLOCK:
                reason = f"rows of a multiple of {BLOCK} columns, not of {shapes[name][1]}"
            if reason is not None:
                raise SalienceError(f"--format gguf holds {reason} as {name} wants")

    def write(self, qt: QTensor) -> dict[str, Tensor]:
        """The blocks of a weight.

        Raises:
            SalienceError: a scheme, an order of groups, or scales that GGUF has no place for.
        """
        reason = _unfit(qt.scheme)
        if reason is not None:
            raise SalienceError(f"--format gguf holds {reason}")
        if qt.g_idx is not None:
            raise SalienceError(
                "--format gguf holds no groups in activation order; use groups in column order"
            )
        repeat = qt.scheme.group_size // BLOCK
        scales = _half(qt.scales).repeat_interleave(repeat, dim=1)
        middle = bool((qt.zeros == _MIDDLE[qt.scheme.bits]).all())
        codes = qt.q.unflatten(1, (-1, BLOCK))
        head = [_as_bytes(scales)]
        if qt.scheme.bits == 8:
            if not middle:
                raise SalienceError("--format gguf holds 8-bit codes around a zero of 128 only")
            return {LOCAL: torch.cat([*head, codes ^ 128], dim=-1)}
        if not middle:
            zeros = qt.zeros.repeat_interleave(repeat, dim=1)
            minima = _minima(scales, zeros)
            if not torch.isfinite(minima).all():
                raise SalienceError("--format gguf holds fp16 minima, and one is larger than that")
            head.append(_as_bytes(minima))
        low, high = codes[..., : BLOCK // 2], codes[..., BLOCK // 2 :]
        return {LOCAL: torch.cat([*head, low | (high << 4)], dim=-1)}

    def read(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QTensor:
        need(tensors, self.tensors)
        blocks = tensors[LOCAL]
        known = blocks.dtype == torch.uint8 and blocks.ndim == 3 and blocks.shape[-1] in TYPES
        if not known or not blocks.numel():
            raise SalienceError(
                f"blocks must be uint8 [out, in / {BLOCK}, {' or '.join(map(str, TYPES))}], "
                f"not {blocks.dtype} {list(blocks.shape)}"
            )
        scales, zeros = scales_of(blocks), zeros_of(blocks)
        if zeros is None:
            raise SalienceError("its Q4_1 blocks have minima that are no multiple of their scale")
        codes = codes_of(blocks)
        bits = 8 if TYPES[blocks.shape[-1]] == "Q8_0" else 4
        if scheme.bits != bits:
            scheme = Scheme(bits, BLOCK, sym=bits == 8)
        size = scheme.group_columns(codes.shape[1])
        if size % BLOCK or codes.shape[1] % size:
            raise SalienceError(f"scheme {scheme} does not fit rows of {codes.shape[1]} columns")
        scales, zeros = (_first(x, size // BLOCK) for x in (scales, zeros))
        if scheme.sym and not (zeros == _MIDDLE[bits]).all():
            raise SalienceError(f"scheme {scheme} is symmetric and its zeros are not")
        return QTensor(codes, scales, zeros, scheme)

    def config(
        self,
        schemes: Mapping[str, Scheme],
        kept: Sequence[str],
        outside: Sequence[str] = (),
        act_order: bool = False,
    ) -> dict[str, Any]:
        names = {name: str(scheme) for name, scheme in schemes.items()}
        usual = Counter(names.values()).most_common(1)[0][0]
        others = {name: scheme for name, scheme in names.items() if scheme != usual}
        return {"quant_method": "gguf", "scheme": usual, "schemes": others}


def block_bits(scheme: Scheme) -> float:
    """Stored bits a weight: the scales of a block come again for each 32 columns."""
    size = 34 if scheme.bits == 8 else 18 if scheme.sym else 20
    return 8 * size / BLOCK


def is_exact(blocks: Tensor) -> bool:
    """Whether blocks [out, in / 32, bytes] of a known type are codes, scales and integer zeros.

    Those of Q4_0 and Q8_0 are; Q4_1 as llama.cpp quantizes has any minimum.
    """
    if TYPES.get(blocks.shape[-1]) != "Q4_1":
        return blocks.shape[-1] in TYPES
    return all(zeros_of(rows) is not None for rows in blocks.split(_CHUNK_ROWS))


def scales_of(blocks: Tensor) -> Tensor:
    """The fp16 scales [out, in / 32] of blocks."""
    return blocks[..., :2].contiguous().view(torch.float16)[..., 0]


def zeros_of(blocks: Tensor) -> Tensor | None:
    """The uint8 zeros [out, in / 32] of blocks; None when a minimum is no code times the scale."""
    kind = TYPES[blocks.shape[-1]]
    if kind != "Q4_1":
        return torch.full_like(blocks[..., 0], 128 if kind == "Q8_0" else 8)
    scales = scales_of(blocks)
    minima = blocks[..., 2:4].contiguous().view(torch.float16)[..., 0]
    quotient = (-minima.float() / scales.float()).nan_to_num(0, 0, 0).round()
    if ((quotient < 0) | (quotient > 15)).any():
        return None
    zeros = quotient.to(torch.uint8)
    return zeros if torch.equal(_minima(scales, zeros), minima) else None


def codes_of(blocks: Tensor) -> Tensor:
    """The unsigned codes uint8 [out, in] of blocks."""
    kind = TYPES[blocks.shape[-1]]
    if kind == "Q8_0":
        return (blocks[..., 2:] ^ 128).flatten(1)
    data = blocks[..., 2 if kind == "Q4_0" else 4 :]
    return torch.cat([data & 15, data >> 4], dim=-1).flatten(1)


def _unfit(scheme: Scheme) -> str | None:
    """What GGUF holds instead of `scheme`, if it does not hold that."""
    if scheme.codebook is not None:
        return f"uniform codes, not {scheme}"
    if scheme.bits == 8 and not scheme.sym:
        return f"8-bit codes only symmetric, as w8g{BLOCK}-sym, not {scheme}"
    if scheme.bits not in _MIDDLE:
        return f"codes of 4 bits, or 8 symmetric, not {scheme}"
    if scheme.group_size == -1:
        return f"a scale for each group of {BLOCK} columns or a multiple, not one for whole rows"
    if scheme.group_size % BLOCK:
        return f"groups of a multiple of {BLOCK} columns, not {scheme}"
    return None


def _half(scales: Tensor) -> Tensor:
    half = scales.to(torch.float16)
    if not torch.equal(half.float(), scales.float()):
        raise SalienceError(
            "--format gguf holds fp16 scales, and some of its scales are none; "
            "use --format compressed-tensors"
        )
    return half


def _minima(scales: Tensor, zeros: Tensor) -> Tensor:
    return (0 - scales.float() * zeros.float()).half()


def _as_bytes(half: Tensor) -> Tensor:
    """fp16 [out, blocks] to uint8 [out, blocks, 2]."""
    return half.contiguous()[..., None].view(torch.uint8)


def _first(values: Tensor, repeat: int) -> Tensor:
    """One value of each `repeat` blocks, which must be the same."""
    grouped = values.unflatten(1, (-1, repeat))
    if not torch.equal(grouped, grouped[..., :1].expand_as(grouped)):
        raise SalienceError("the blocks of one group differ in their scale or zero")
    return grouped[..., 0].contiguous()
