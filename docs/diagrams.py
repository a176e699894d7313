"""Which code lies where in what a format writes, as SVG.

Nothing is known here of any format: a weight of zeros is written, then the same with one code
changed, and the bits that differ are where that code lies. So a diagram shows what the
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
_CELL, _ROW, _LEFT = 20, 34, 56  # a bit is so wide, a word so high, its name so wide
_BYTE, _BYTES, _LINE = 32, 20, 2 * 34 + 24  # a byte is so wide, so many in a line of such a height
_MARKED = (31, 24, 16, 8, 0)


def owners(
    write: Callable[[QTensor], Tensor], base: QTensor, places: Sequence[tuple[int, int]]
) -> list[list[str]]:
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


def _weight(scheme: Scheme, rows: int, columns: int, zero: int = 0) -> QTensor:
    groups = scheme.groups(columns)
    kind = torch.float16 if scheme.codebook is None else torch.float32
    return QTensor(
        torch.zeros(rows, columns, dtype=torch.uint8),
        torch.ones(rows, groups, dtype=kind),
        torch.full((rows, groups), zero, dtype=torch.uint8),
        scheme,
    )


def _words(labels: Sequence[Sequence[str]], names: Sequence[str]) -> str:
    """Words of 32 bits, the highest bit left, a box for each run of bits of one code."""
    left = _LEFT if any(names) else 2
    parts = [_text(left + (31 - bit + 0.5) * _CELL, 12, str(bit), "bit") for bit in _MARKED]
    for index, (name, word) in enumerate(zip(names, labels, strict=True)):
        y = 18 + index * (_ROW + 6)
        parts.append(_text(left - 8, y + 22, name, "name"))
        x = float(left)
        for label, run in groupby(reversed(word)):
            size = len(list(run)) * _CELL
            parts.append(_box(x, y, size, label))
            x += size
    return _svg(left + 32 * _CELL + 2, 18 + len(labels) * (_ROW + 6), parts)


def _box(x: float, y: float, width: float, label: str, height: float = _ROW) -> str:
    shade = f"h{int(label) % _HUES}" if label.isdigit() else "none"
    box = f'<rect class="{shade}" x="{x}" y="{y}" width="{width}" height="{height}"/>'
    return box + _text(x + width / 2, y + height / 2 + 5, label, "")


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x}" y="{y}">{text}</text>' if text else ""


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    # In one line: Markdown would end the figure at an empty one.
    return (
        f'<figure class="bits"><svg width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img" xmlns="http://www.w3.org/2000/svg">'
        f"{''.join(parts)}</svg></figure>"
    )


def _bytes(labels: Sequence[Sequence[str]], heads: Sequence[str]) -> str:
    """Bytes side by side; of those that hold two codes, the high half above the low one."""
    parts = []
    for index, byte in enumerate(labels):
        line, place = divmod(index, _BYTES)
        x, y = _LEFT + place * _BYTE, 18 + line * _LINE
        if not place:
            for k, name in enumerate(("high", "low")):
                parts.append(_text(_LEFT - 8, y + 22 + k * _ROW, name, "name"))
        parts.append(_text(x + _BYTE / 2, y - 6, str(index), "bit"))
        low, high = (heads[index], heads[index]) if index < len(heads) else (byte[0], byte[4])
        if low == high:
            parts.append(_box(x, y, _BYTE, low, 2 * _ROW))
        else:
            parts += [_box(x, y, _BYTE, high), _box(x, y + _ROW, _BYTE, low)]
    lines = -(-len(labels) // _BYTES)
    return _svg(_LEFT + _BYTES * _BYTE + 2, lines * _LINE, parts)


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
    return _words(labels, [f"word {k}" if len(labels) > 1 else "" for k, _ in enumerate(labels)])
