"""Packing against golden words of the peers, and round trips."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from salience import packing
from salience.packing import AWQ_ORDER, interleave_awq, pack, unpack, unpack_awq

# The bit of the word at which AutoAWQ puts each of eight columns, as its own unpacker has them.
AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)


def words(packed: Tensor) -> list[str]:
    return [f"{word & 0xFFFFFFFF:08X}" for word in packed.flatten().tolist()]


def counting(n: int, bits: int) -> Tensor:
    return (torch.arange(n) % 2**bits).to(torch.uint8)


@pytest.mark.parametrize(
    ("bits", "n", "golden"),
    [
        (1, 32, ["AAAAAAAA"]),
        (2, 16, ["E4E4E4E4"]),
        (3, 32, ["88FAC688", "C688FAC6", "FAC688FA"]),
        (4, 8, ["76543210"]),
        (8, 8, ["03020100", "07060504"]),
    ],
)
def test_golden_words(bits: int, n: int, golden: list[str]) -> None:
    packed = pack(counting(n, bits), bits)
    assert packed.dtype == torch.int32
    assert words(packed) == golden
    assert torch.equal(unpack(packed, bits), counting(n, bits))


def test_golden_awq() -> None:
    assert AWQ_ORDER == (0, 2, 4, 6, 1, 3, 5, 7)
    assert words(pack(interleave_awq(counting(8, 4)), 4)) == ["75316420"]


def bits_of(codes: list[int], bits: int) -> list[int]:
    """The dense stream by its definition, a bit at a time."""
    stream = sum(code << (i * bits) for i, code in enumerate(codes))
    return [(stream >> (32 * t)) & 0xFFFFFFFF for t in range(len(codes) * bits // 32)]


@settings(deadline=None)
@given(data=st.data(), bits=st.integers(1, 8), rows=st.integers(1, 3), n=st.integers(1, 3))
def test_stream_and_round_trip(data: st.DataObject, bits: int, rows: int, n: int) -> None:
    row = st.lists(st.integers(0, 2**bits - 1), min_size=32 * n, max_size=32 * n)
    codes = data.draw(st.lists(row, min_size=rows, max_size=rows))
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.shape == (rows, n * bits)
    assert [[w & 0xFFFFFFFF for w in line] for line in packed.tolist()] == [
        bits_of(line, bits) for line in codes
    ]
    assert unpack(packed, bits).tolist() == codes


@pytest.mark.parametrize("bits", range(1, 9))
def test_any_layout_in_memory(bits: int) -> None:
    """Transposed codes and words, as the formats hand them over."""
    random = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (64, 32), generator=random, dtype=torch.uint8)
    assert torch.equal(pack(codes.T, bits), pack(codes.T.contiguous(), bits))
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed.T.contiguous().T, bits), codes)


@given(st.lists(st.integers(0, 15), min_size=16, max_size=16))
def test_awq_interleave(codes: list[int]) -> None:
    tensor = torch.tensor(codes, dtype=torch.uint8)
    mixed = interleave_awq(tensor)
    assert torch.equal(unpack_awq(pack(mixed, 4)[None]).flatten(), tensor)
    for word, eight in zip(pack(mixed, 4).tolist(), (codes[:8], codes[8:]), strict=True):
        assert [(word >> shift) & 15 for shift in AWQ_SHIFTS] == eight


@settings(deadline=None)
@given(data=st.data(), bits=st.integers(1, 8))
def test_partial_words(data: st.DataObject, bits: int) -> None:
    """What is left of the last word is 0."""
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=70))
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    stream = sum(code << (i * bits) for i, code in enumerate(codes))
    assert len(packed) == packing.words(len(codes), bits) == -(-len(codes) * bits // 32)
    assert sum((word & 0xFFFFFFFF) << (32 * t) for t, word in enumerate(packed.tolist())) == stream
    assert unpack(packed, bits, len(codes)).tolist() == codes
