"""Triton kernels against fp64: on the GPU if there is one, else interpreted on small shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from salience.kernels import _fragments
from salience.qtensor import QTensor
from salience.scheme import Scheme

kernel = pytest.importorskip("salience.kernels.wna16_triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The rounding of y; the interpreter's to bf16 cuts off.
TOLERANCE = {torch.float16: 6e-4, torch.bfloat16: 6e-3, torch.float32: 2e-6}


def weight(
    bits: int, group_size: int, rows: int, columns: int, scales: torch.dtype = torch.float16
) -> QTensor:
    random = torch.Generator().manual_seed(rows)
    scheme = Scheme(bits, group_size)
    size = (rows, scheme.groups(columns))
    return QTensor(
        torch.randint(2**bits, (rows, columns), dtype=torch.uint8, generator=random).to(DEVICE),
        (torch.rand(size, generator=random) / 50 + 0.001).to(DEVICE, scales),
        torch.randint(2**bits, size, dtype=torch.uint8, generator=random).to(DEVICE),
        scheme,
    )


def pack(qt: QTensor) -> list[Tensor]:
    words = _fragments.pack_fragments(qt.q, qt.scheme.bits)
    return [words, _fragments.order_rows(qt.scales), _fragments.order_rows(qt.zeros)]


def activations(tokens: int, columns: int, dtype: torch.dtype) -> Tensor:
    random = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, columns, generator=random).to(DEVICE, dtype)


def multiply(x: Tensor, qt: QTensor, split: int = 0, tiles: int = 4) -> Tensor:
    scheme = qt.scheme
    return kernel.multiply(
        x, pack(qt), scheme.bits, scheme.group_size, qt.out_features, split=split, tiles=tiles
    )


def check(y: Tensor, x: Tensor, qt: QTensor, tolerance: float | None = None) -> None:
    want = x.double() @ qt.dequantize(torch.float64).T
    assert y.shape == want.shape and y.dtype == x.dtype
    worst = (y.double() - want).norm() / want.norm()
    assert worst <= (tolerance or TOLERANCE[x.dtype]), worst


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that nobody filled hold NaN: what is not written shows."""
    empty = Tensor.new_empty

    def full_of_nan(self: Tensor, *size: int, **options: torch.dtype) -> Tensor:
        made = empty(self, *size, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", full_of_nan)


# bits, group size, rows, columns, tokens, dtype, scales, split, tiles: each value of each at least
# once, rows and columns that fill no tile, groups that fill no block, more tokens than a program's.
CASES = [
    (4, 128, 80, 256, 1, torch.float16, torch.float16, 2, 4),
    (4, 32, 65, 160, 5, torch.bfloat16, torch.float16, 1, 4),
    (4, 64, 128, 640, 3, torch.float16, torch.bfloat16, 3, 8),
    (3, 128, 64, 384, 17, torch.bfloat16, torch.bfloat16, 0, 4),
    (3, -1, 33, 50, 2, torch.float32, torch.float16, 0, 4),
    (2, 64, 64, 192, 70, torch.float16, torch.float16, 2, 4),
    (2, 256, 7, 512, 4, torch.float32, torch.float16, 4, 8),
    (8, 96, 130, 192, 4, torch.float16, torch.float32, 0, 4),
    (8, -1, 64, 101, 9, torch.bfloat16, torch.float16, 0, 4),
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_multiply(case: tuple) -> None:
    bits, group_size, rows, columns, tokens, dtype, scales, split, tiles = case
    qt = weight(bits, group_size, rows, columns, scales)
    x = activations(tokens, columns, dtype)
    check(multiply(x, qt, split, tiles), x, qt)


@settings(max_examples=12, deadline=None)
@given(
    bits=st.sampled_from(_fragments.BITS),
    group_size=st.sampled_from([32, 64, 96, 128, -1]),
    rows=st.integers(1, 140),
    groups=st.integers(1, 3),
    tokens=st.integers(1, 40),
    dtype=st.sampled_from(list(TOLERANCE)),
    split=st.integers(0, 3),
)
def test_random_shapes(
    bits: int, group_size: int, rows: int, groups: int, tokens: int, dtype: torch.dtype, split: int
) -> None:
    columns = 77 * groups if group_size == -1 else group_size * groups
    qt = weight(bits, group_size, rows, columns)
    x = activations(tokens, columns, dtype)
    check(multiply(x, qt, split), x, qt)


def test_x_of_other_strides() -> None:
    qt = weight(4, 32, 48, 96)
    wide = activations(3, 200, torch.float32)
    for x in (wide[:, 8:104], wide[::2, :96], wide[:, :96].T.contiguous().T, wide[:1, 1:97]):
        check(multiply(x, qt), x, qt)


def test_no_tokens() -> None:
    y = multiply(activations(0, 96, torch.float16), weight(4, 32, 48, 96))
    assert y.shape == (0, 48) and y.dtype == torch.float16


def test_the_same_bits_each_time() -> None:
    qt, x = weight(3, 32, 70, 512), activations(4, 512, torch.float32)
    assert torch.equal(multiply(x, qt, split=4), multiply(x, qt, split=4))


def test_one_token_is_as_among_others() -> None:
    """Of a program's tokens each is summed by itself."""
    qt, x = weight(4, 64, 64, 256), activations(9, 256, torch.float32)
    assert torch.equal(multiply(x, qt, split=2)[4:5], multiply(x[4:5], qt, split=2))


def test_exact_where_x_is() -> None:
    """x and scales of few bits: fp32 sums of whole numbers, which no rounding changes."""
    qt = weight(8, 64, 64, 128)
    qt = QTensor(qt.q, torch.full_like(qt.scales, 0.25), qt.zeros, qt.scheme)
    x = (activations(3, 128, torch.float32) * 4).round()
    assert torch.equal(multiply(x, qt), x @ qt.dequantize().T)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_unpacking(case: tuple, dtype: torch.dtype) -> None:
    bits, group_size, rows, columns, _, _, scales, _, _ = case
    qt = weight(bits, group_size, rows, columns, scales)
    for part in (slice(0, rows), slice(rows // 2 // 64 * 64, rows - 3)):
        found = torch.full((part.stop - part.start, columns), float("nan"), device=DEVICE).to(dtype)
        kernel.unpacked(pack(qt), part, columns, bits, group_size, dtype, found)
        want = qt.dequantize(torch.float32)[part]
        if dtype != torch.bfloat16 or DEVICE == "cuda":  # the interpreter cuts off
            assert torch.equal(found, want.to(dtype))
        else:
            assert ((found.float() - want).abs() <= want.abs() / 128).all()


@pytest.mark.parametrize("bits", _fragments.BITS)
def test_decoding_to_half_without_assembly(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    """What runs on AMD's GPUs."""
    monkeypatch.setattr(kernel, "_kind", lambda *_: "plain_fp16")
    qt, x = weight(bits, 32, 48, 96), activations(3, 96, torch.float16)
    check(multiply(x, qt), x, qt)
