"""Triton kernels against fp64: on the GPU if there is one, else interpreted on small shapes."""

import pytest
import torch
from torch import Tensor

from salience import grid
from salience.errors import SalienceError
from salience.qtensor import QTensor
from salience.scheme import Scheme

int4 = pytest.importorskip("salience.kernels.int4_triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.float32: 1e-6}


def weight(rows: int, columns: int, group_size: int, seed: int = 0) -> QTensor:
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=random) * 0.1
    return grid.quantize(values.to(DEVICE), Scheme(4, group_size))


def activations(tokens: int, columns: int, dtype: torch.dtype) -> Tensor:
    random = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, columns, generator=random).to(DEVICE, dtype)


def relative(found: Tensor, want: Tensor) -> float:
    return float((found.double() - want).norm() / want.norm())


SHAPES = [(80, 256, 64), (64, 384, 128), (72, 160, 32), (65, 192, -1), (64, 256, 96 + 160)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
@pytest.mark.parametrize("split", [1, 2])
def test_few_tokens(
    rows: int, columns: int, group_size: int, split: int, dtype: torch.dtype
) -> None:
    qt = weight(rows, columns, group_size)
    packed = int4.TritonInt4().pack(qt)
    x = activations(5, columns, dtype)
    found = int4._multiplied(x, packed, group_size, split)
    assert found.dtype == dtype
    assert relative(found, x.double() @ qt.dequantize(torch.float64).T) < TOLERANCE[dtype]
    assert not packed[-1].any()  # or the next call would wait for nobody


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_unpacking(rows: int, columns: int, group_size: int, dtype: torch.dtype) -> None:
    qt = weight(rows, columns, group_size)
    packed = int4.TritonInt4().pack(qt)
    for part in (slice(0, rows), slice(32, 200)):
        found = int4.unpacked(packed, part, columns, group_size, dtype)
        want = qt.dequantize(torch.float64)[part]
        assert found.shape == want.shape
        assert (found.double() - want).abs().max() < TOLERANCE[dtype] * want.abs().max()


@pytest.mark.parametrize("tokens", [1, 130])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_any_number_of_tokens(tokens: int, dtype: torch.dtype) -> None:
    qt = weight(96, 128, 64)
    backend = int4.TritonInt4()
    x = activations(tokens, 128, dtype)
    found = backend.matmul(x, backend.pack(qt), 4, 64)
    assert found.dtype == dtype
    assert relative(found, x.double() @ qt.dequantize(torch.float64).T) < TOLERANCE[dtype]


@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_what_is_packed_can_be_unpacked(rows: int, columns: int, group_size: int) -> None:
    qt = weight(rows, columns, group_size)
    backend = int4.TritonInt4()
    found = backend.unpack(backend.pack(qt), qt.scheme, columns)
    for name in ("q", "scales", "zeros"):
        assert torch.equal(getattr(found, name), getattr(qt, name))


def test_the_codes_are_only_reordered() -> None:
    qt = weight(16, 256, 64)
    words = int4.pack_words(qt.q)
    codes = torch.empty_like(qt.q)
    for i in range(4):
        for lane in range(2):
            place = (words >> (4 * i + 16 * lane)) & 15  # [blocks, out, 16]
            for block in range(2):
                columns = slice(128 * block + 32 * i + lane, 128 * block + 32 * i + 32, 2)
                codes[:, columns] = place[block].to(torch.uint8)
    assert torch.equal(codes, qt.q)


@pytest.mark.parametrize(
    ("tiles", "blocks", "tokens", "split"),
    [(64, 32, 16, 8), (448, 32, 16, 2), (896, 64, 16, 1), (64, 32, 64, 4), (64, 112, 64, 8)],
)
def test_split(tiles: int, blocks: int, tokens: int, split: int) -> None:
    assert int4.split_of(tiles, blocks, tokens) == split


def test_act_order_is_refused() -> None:
    qt = weight(16, 128, 32)
    g_idx = torch.arange(128, device=DEVICE).flip(0).int() // 32
    shuffled = QTensor(qt.q, qt.scales, qt.zeros, qt.scheme, g_idx)
    with pytest.raises(SalienceError, match="act-order"):
        int4.TritonInt4().pack(shuffled)
