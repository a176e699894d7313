"""The layout of GPU weights: where each code lies, and back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from salience.kernels import _fragments


@settings(max_examples=30, deadline=None)
@given(
    bits=st.sampled_from(_fragments.BITS),
    rows=st.integers(1, 140),
    columns=st.integers(1, 300),
    seed=st.integers(0, 99),
)
def test_round_trip(bits, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    words = _fragments.pack_fragments(codes, bits)
    assert words.shape == (-(-rows // 64) * 4, -(-columns // 128), 64 * bits)
    back = _fragments.unpack_fragments(words, bits)
    assert torch.equal(back[:rows, :columns], codes)
    assert not back[rows:].any() and not back[:, columns:].any()


@pytest.mark.parametrize("bits", _fragments.BITS)
def test_as_a_thread_reads_it(bits):
    """Read as the PTX manual says operand A of m16n8k16 lies, thread by thread, code by code."""
    codes = torch.randint(2**bits, (64, 256), dtype=torch.uint8)
    stored = _fragments.pack_fragments(codes, bits).numpy().view(np.uint32)
    for tile, block, lane, step, register, half in np.ndindex(4, 2, 32, 8, 4, 2):
        if (tile + block + lane + step) % 5:
            continue  # a fifth of all, of every kind
        group, thread = lane >> 2, lane & 3
        row = 16 * tile + group + (8 if register in (1, 3) else 0)
        column = 128 * block + 16 * step + 2 * thread + half + (8 if register >= 2 else 0)

        def word(i, tile=tile, block=block, lane=lane):
            full = 2 * bits // 4 * 4
            if i < full:
                return int(stored[tile, block, i // 4 * 128 + 4 * lane + i % 4])
            return int(stored[tile, block, 32 * full + (2 * bits - full) * lane + i - full])

        pair = 4 * step + register
        if bits == 3 and pair >= 30:
            first = 3 * (pair - 30)
            code = sum((word(first + i) >> (15 + 16 * half) & 1) << i for i in range(3))
        else:
            each = 5 if bits == 3 else 16 // bits
            code = word(pair // each) >> (bits * (pair % each) + 16 * half) & (2**bits - 1)
        assert code == codes[row, column]


@pytest.mark.parametrize("rows", [1, 16, 63, 64, 100])
def test_rows_of_scales(rows):
    values = torch.randn(rows, 3)
    ordered = _fragments.order_rows(values)
    assert ordered.shape == (-(-rows // 64) * 4, 3, 16)
    assert torch.equal(_fragments.restore_rows(ordered, rows), values)
    for row in range(rows):
        tile, in_tile = divmod(row, 16)
        at = 2 * (in_tile % 8) + in_tile // 8
        assert torch.equal(ordered[tile, :, at], values[row])
