"""Which code lies where in what a format writes, as SVG.

Nothing is known here of any format: a weight of zeros is written, then the same with one code (or
scale) changed, and the bits that differ are where that code lies. So a diagram shows what the
writer does, whatever it does.
"""

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from salience.formats import AutoAwq, BitsAndBytes, CompressedTensors, Gguf, Gptq
from salience.qtensor import QTensor
from salience.scheme import Scheme

_HUES = 8
_CELL, _ROW, _LEFT = 22, 34, 64


def owners(write: Callable[[QTensor], Tensor], base: QTensor, places: Sequence[tuple[int, int]]):
    """Who owns each bit of a tensor: row by row of 32 (words) or 8 (bytes), lowest bit first.

    Args:
        write: what makes the stored tensor of a weight.
        base: a weight whose codes at `places` are 0.
        places: row and column of each code, in the order of their labels.

    Returns:
        The label of each bit, "" of those that none of the codes changes.
    """
    plain = _bits(write(base))
    labels = [["" for _ in word] for word in plain.tolist()]
    for label, (row, column) in enumerate(places):
        q = base.q.clone()
        q[row, column] = base.scheme.levels
        made = QTensor(q, base.scales, base.zeros, base.scheme)
        for word, bit in (_bits(write(made)) != plain).nonzero().tolist():
            labels[word][bit] = str(label)
    return labels


def _bits(stored: Tensor) -> Tensor:
    """Bits of each element, lowest first: bool [elements, 32 or 8]."""
    flat = stored.flatten()
    if flat.dtype not in (torch.int32, torch.uint8):
        raise TypeError(f"no diagram of {flat.dtype}")
    width = 8 * flat.element_size()
    shifts = torch.arange(width)
    return ((flat.long()[:, None] >> shifts) & 1).bool()


def _weight(scheme: Scheme, rows: int, columns: int, zero: int = 0, scale: float = 1.0) -> QTensor:
    groups = scheme.groups(columns)
    kind = torch.float16 if scheme.codebook is None else torch.float32
    return QTensor(
        torch.zeros(rows, columns, dtype=torch.uint8),
        torch.full((rows, groups), scale, dtype=kind),
        torch.full((rows, groups), zero, dtype=torch.uint8),
        scheme,
    )


def _words(labels: Sequence[Sequence[str]], names: Sequence[str]) -> str:
    """Words of 32 bits, the highest bit left, a box for each run of bits of one code."""
    width = _LEFT + 32 * _CELL + 2
    parts = []
    for bit in (31, 24, 16, 8, 0):
        x = _LEFT + (31 - bit) * _CELL + _CELL / 2
        parts.append(f'<text class="bit" x="{x}" y="12">{bit}</text>')
    for index, (name, word) in enumerate(zip(names, labels, strict=True)):
        y = 18 + index * (_ROW + 6)
        parts.append(f'<text class="name" x="{_LEFT - 8}" y="{y + 22}">{name}</text>')
        x = float(_LEFT)
        for label, run in groupby(reversed(word)):
            size = len(list(run)) * _CELL
            parts.append(_box(x, y, size, label))
            x += size
    return _svg(width, 18 + len(labels) * (_ROW + 6), parts)


def _box(x: float, y: float, size: float, label: str, hue: str | None = None) -> str:
    shade = hue if hue is not None else f"h{int(label) % _HUES}" if label else "none"
    text = f'<text x="{x + size / 2}" y="{y + 22}">{label}</text>' if label else ""
    return f'<rect class="{shade}" x="{x}" y="{y}" width="{size}" height="{_ROW}"/>{text}'


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    # In one line: Markdown would end the figure at an empty one.
    return (
        f'<figure class="bits"><svg viewBox="0 0 {width} {height + 4}" role="img" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg></figure>'
    )


def _bytes(labels: Sequence[Sequence[str]], heads: Sequence[str]) -> str:
    """Bytes side by side; of those that hold two codes, the high half above the low one."""
    cell = 38
    width = cell * len(labels) + _LEFT
    parts = [
        f'<text class="name" x="{_LEFT - 8}" y="{18 + 22 + k * _ROW}">{name}</text>'
        for k, name in enumerate(("high", "low"))
    ]
    for index, byte in enumerate(labels):
        x = _LEFT + index * cell
        parts.append(f'<text class="bit" x="{x + cell / 2}" y="12">{index}</text>')
        if index < len(heads):
            parts.append(
                f'<rect class="scale" x="{x}" y="18" width="{cell}" height="{2 * _ROW}"/>'
                f'<text x="{x + cell / 2}" y="{18 + _ROW + 5}">{heads[index]}</text>'
            )
            continue
        low, high = byte[0], byte[4]
        if low == high:
            parts.append(
                f'<rect class="h{int(low) % _HUES}" x="{x}" y="18" width="{cell}" '
                f'height="{2 * _ROW}"/><text x="{x + cell / 2}" y="{18 + _ROW + 5}">{low}</text>'
            )
        else:
            parts.append(_box(x, 18, cell, high) + _box(x, 18 + _ROW, cell, low))
    return _svg(width, 18 + 2 * _ROW, parts)


def _awq() -> list[list[str]]:
    base = _weight(Scheme(4, 8), 8, 8)
    return owners(lambda qt: AutoAwq().write(qt)["qweight"][:1], base, [(n, 0) for n in range(8)])


def _gptq(bits: int) -> list[list[str]]:
    count = 32 if bits == 3 else 32 // bits
    base = _weight(Scheme(bits, 32, sym=True), 32, 32, zero=2 ** (bits - 1))
    words = count * bits // 32
    return owners(
        lambda qt: Gptq().write(qt)["qweight"][:words, 0], base, [(0, k) for k in range(count)]
    )


def _compressed(bits: int) -> list[list[str]]:
    count = 32 if bits == 3 else 32 // bits
    base = _weight(Scheme(bits, 32), 1, 32)
    words = count * bits // 32
    return owners(
        lambda qt: CompressedTensors().write(qt)["weight_packed"][0, :words],
        base,
        [(0, k) for k in range(count)],
    )


def _gguf(bits: int, zero: int) -> list[list[str]]:
    sym = zero == 2 ** (bits - 1)
    base = _weight(Scheme(bits, 32, sym=sym), 1, 32, zero=zero)
    return owners(
        lambda qt: next(iter(Gguf().write(qt).values())).flatten(),
        base,
        [(0, k) for k in range(32)],
    )


def _nf4() -> list[list[str]]:
    base = _weight(Scheme.parse("nf4"), 1, 64)
    return owners(
        lambda qt: BitsAndBytes().write(qt)["weight"][:8], base, [(0, k) for k in range(16)]
    )


LABELS: dict[str, Callable[[], list[list[str]]]] = {
    "awq": _awq,
    "compressed-tensors-3": lambda: _compressed(3),
    "compressed-tensors-4": lambda: _compressed(4),
    "gptq-3": lambda: _gptq(3),
    "gptq-4": lambda: _gptq(4),
    "nf4": _nf4,
    "q4_0": lambda: _gguf(4, 8),
    "q4_1": lambda: _gguf(4, 3),
    "q8_0": lambda: _gguf(8, 128),
}
_HEADS = {"nf4": "", "q4_0": "dd", "q4_1": "ddmm", "q8_0": "dd"}


def bits(name: str) -> str:
    """The diagram of a format, as one line of HTML.

    Raises:
        KeyError: there is none of that name.
    """
    labels = LABELS[name]()
    if name in _HEADS:
        return _bytes(labels, _HEADS[name])
    return _words(labels, [f"word {k}" if len(labels) > 1 else "" for k in range(len(labels))])
