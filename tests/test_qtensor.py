"""QTensor: what it refuses, and what its codes stand for."""

import pytest
import torch

from salience.errors import SalienceError
from salience.qtensor import NestedScales, QTensor
from salience.scheme import Scheme


def parts(
    rows: int = 3, columns: int = 8, groups: int = 2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    q = torch.randint(16, (rows, columns), generator=random, dtype=torch.uint8)
    scales = torch.rand(rows, groups, generator=random).half()
    return q, scales, torch.randint(16, (rows, groups), generator=random, dtype=torch.uint8)


def test_dequantize_by_hand() -> None:
    q = torch.tensor([[0, 15, 8, 7]], dtype=torch.uint8)
    qt = QTensor(
        q,
        torch.tensor([[0.5, 2.0]]).half(),
        torch.tensor([[15, 8]], dtype=torch.uint8),
        Scheme(4, 2),
    )
    assert qt.dequantize().tolist() == [[-7.5, 0.0, 0.0, -2.0]]
    assert (qt.out_features, qt.in_features) == (1, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_dequantize_dtype(dtype: torch.dtype) -> None:
    q, scales, zeros = parts()
    weight = QTensor(q, scales, zeros, Scheme(4, 4)).dequantize(dtype)
    want = torch.empty(3, 8, dtype=torch.float64)
    for row in range(3):
        for column in range(8):
            step = int(q[row, column]) - int(zeros[row, column // 4])
            want[row, column] = float(scales[row, column // 4]) * step
    assert weight.dtype == dtype
    assert torch.equal(weight, want.to(dtype))


def test_group_index_is_a_permutation_of_columns() -> None:
    q, scales, zeros = parts()
    plain = QTensor(q, scales, zeros, Scheme(4, 4))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    g_idx = (torch.arange(8) // 4)[order].int()
    moved = QTensor(q[:, order], scales, zeros, Scheme(4, 4), g_idx)
    assert torch.equal(moved.dequantize(), plain.dequantize()[:, order])


def test_whole_row() -> None:
    q, scales, zeros = parts(groups=1)
    qt = QTensor(q, scales, zeros, Scheme(4, -1))
    assert torch.equal(qt.dequantize(), (q.float() - zeros.float()) * scales.float())


def test_refuses() -> None:
    q, scales, zeros = parts()
    scheme = Scheme(4, 4)
    with pytest.raises(SalienceError, match=r"codes must be uint8 \[out, in\], not torch.int32"):
        QTensor(q.int(), scales, zeros, scheme)
    with pytest.raises(SalienceError, match=r"not torch.uint8 \[24\]"):
        QTensor(q.flatten(), scales, zeros, scheme)
    with pytest.raises(SalienceError, match=r"scales must be \[3, 2\], not \[2, 3\]"):
        QTensor(q, scales.T, zeros, scheme)
    with pytest.raises(SalienceError, match=r"zeros must be \[3, 2\], not \[3, 1\]"):
        QTensor(q, scales, zeros[:, :1], scheme)
    with pytest.raises(SalienceError, match="scales must be float and zeros uint8"):
        QTensor(q, scales.int(), zeros, scheme)
    with pytest.raises(SalienceError, match=r"zeros uint8, not torch.float16, torch.float16"):
        QTensor(q, scales, zeros.half(), scheme)
    with pytest.raises(SalienceError, match="group size 3 does not divide in_features 8"):
        QTensor(q, scales, zeros, Scheme(4, 3))
    with pytest.raises(SalienceError, match=r"g_idx must be \[8\], not torch.int32 \[4\]"):
        QTensor(q, scales, zeros, scheme, torch.zeros(4, dtype=torch.int32))


def test_codebook_by_hand() -> None:
    """Zeros play no part."""
    q = torch.tensor([[0, 7, 15, 8] * 16], dtype=torch.uint8)
    scales = torch.tensor([[2.0]])
    for zero in (0, 5):
        zeros = torch.full((1, 1), zero, dtype=torch.uint8)
        weight = QTensor(q, scales, zeros, Scheme.parse("nf4")).dequantize()
        assert torch.equal(weight, torch.tensor([[-2.0, 0.0, 2.0, 2 * 0.07958029955625534] * 16]))


def test_nested_scales() -> None:
    """As the scheme says, or there are none; 256 of a block, counted row by row."""
    table = torch.linspace(-1, 1, 256)
    codes = torch.randint(256, (40, 7), generator=torch.Generator().manual_seed(0)).byte()
    nested = NestedScales(codes, torch.tensor([0.5, 2.0]), 3.0, table)
    scales = nested.dequantize()
    for row, group in ((0, 0), (36, 3), (36, 4), (39, 6)):
        block = (row * 7 + group) // 256
        want = table[int(codes[row, group])] * [0.5, 2.0][block] + 3
        assert scales[row, group] == want
    q, zeros = torch.zeros(40, 448, dtype=torch.uint8), torch.zeros_like(codes)
    QTensor(q, scales, zeros, Scheme.parse("nf4-dq"), nested=nested)
    with pytest.raises(SalienceError, match="a weight of nf4-dq has nested scales or it has none"):
        QTensor(q, scales, zeros, Scheme.parse("nf4-dq"))
    with pytest.raises(SalienceError, match="a weight of nf4 has"):
        QTensor(q, scales, zeros, Scheme.parse("nf4"), nested=nested)
