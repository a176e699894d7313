"""The int4 CPU kernel against fp64, on both sides of its crossover and on each processor kind."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from salience.errors import SalienceError
from salience.kernels import choose, cpu, qmm
from salience.kernels.cpu import CpuInt4
from salience.qtensor import QTensor
from salience.scheme import Scheme

CPU = torch.device("cpu")
KERNEL = CpuInt4()
MANY = cpu._MANY_TOKENS
MANY_FP32 = cpu._MANY_FP32_TOKENS
# Above the crossover only the rounding of y to its own dtype, and fp32 sums, remain.
EXACT = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
# Below it, that of x, s, z and y to bf16; with fp32 that of y alone.
FEW = {torch.float32: 4e-3, torch.float16: 1e-2, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill new tensors with NaN, so that no result can rest on memory that nobody wrote."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def make(rows: int, columns: int, group_size: int, seed: int, sym: bool = False) -> QTensor:
    """Random codes, scales over two decades and zeros over the whole range."""
    random = torch.Generator().manual_seed(seed)
    scheme = Scheme(4, group_size, sym)
    shape = (rows, scheme.groups(columns))
    q = torch.randint(16, (rows, columns), generator=random, dtype=torch.uint8)
    zeros = torch.randint(16, shape, generator=random, dtype=torch.uint8)
    scales = 10 ** (-3 + 2 * torch.rand(shape, generator=random))
    return QTensor(q, scales.half(), zeros.fill_(8) if sym else zeros, scheme)


def check(qt: QTensor, x: torch.Tensor) -> None:
    """Multiply, and compare each row of the weight with fp64 on its own scale."""
    y = KERNEL.matmul(x, KERNEL.pack(qt), 4, qt.scheme.group_size, qt.out_features)
    assert y.dtype == x.dtype and y.shape == (x.shape[0], qt.out_features)
    weight = qt.dequantize(torch.float64)
    expected = x.double() @ weight.T
    size = x.double().norm(dim=1)[:, None] * weight.norm(dim=1)
    many = MANY_FP32 if x.dtype == torch.float32 else MANY
    tolerance = (EXACT if x.shape[0] >= many else FEW)[x.dtype]
    torch.testing.assert_close(y.double() / size, expected / size, atol=tolerance, rtol=0)


@settings(max_examples=50, deadline=None)
@given(
    blocks=st.integers(1, 20),
    groups=st.integers(1, 3),
    group_size=st.sampled_from([32, 64, 128, 256]),
    tokens=st.one_of(
        st.integers(0, 12),
        st.integers(MANY_FP32 - 2, MANY_FP32 + 2),
        st.integers(MANY - 2, MANY + 30),
    ),
    dtype=st.sampled_from(list(EXACT)),
    sym=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_agrees_with_fp64(
    blocks: int,
    groups: int,
    group_size: int,
    tokens: int,
    dtype: torch.dtype,
    sym: bool,
    seed: int,
) -> None:
    qt = make(16 * blocks, groups * group_size, group_size, seed, sym)
    random = torch.Generator().manual_seed(seed + 1)
    check(qt, torch.randn(tokens, qt.in_features, generator=random).to(dtype))


@pytest.mark.parametrize("rows", [16, 32, 48, 64, 80, 112, 576])
@pytest.mark.parametrize("tokens", [1, MANY_FP32 - 1, MANY_FP32, MANY])
def test_blocks_and_tails(rows: int, tokens: int) -> None:
    check(make(rows, 128, 32, rows), torch.randn(tokens, 128))


@pytest.mark.parametrize("rows", [16, 48, 80, 320])
def test_unpacked_weight_is_exact(rows: int) -> None:
    """Tiles smaller than the weight cover each row once, with the very weight of the QTensor."""
    qt = make(rows, 192, 64, seed=3)
    codes, _, _, scales, zeros = KERNEL.pack(qt)
    limit = 2 * 64 * 192
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_TILE_ELEMENTS", limit)
        found = torch.zeros(rows, 192)
        for span, weight in cpu._tiles(codes, scales, zeros):
            assert weight.numel() <= limit
            found[span] += weight.T
        check(qt, torch.randn(MANY, 192))
    assert torch.equal(found, qt.dequantize())


def test_holds_the_weight_once() -> None:
    packed = KERNEL.pack(make(256, 1024, 128, seed=4))
    bits = 8 * sum(t.nbytes for t in packed) / (256 * 1024)
    assert bits == 4 + (2 * 32 + 16 + 8) / 128


def test_takes_x_that_is_not_contiguous() -> None:
    qt = make(64, 128, 64, seed=5)
    for tokens in (3, MANY):
        check(qt, torch.randn(128, tokens).T)


def test_whole_row_groups_through_the_op() -> None:
    qt = make(48, 256, -1, seed=6)
    assert choose(qt.scheme, CPU, 256, 48).name == "cpu_int4"
    x = torch.randn(2, 3, 256)
    y = qmm(x, KERNEL.pack(qt), "cpu_int4", 4, -1, 48)
    expected = x @ qt.dequantize().T
    assert (y - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("kind", ["default", "avx2", "avx512"])
def test_each_processor_kind(kind: str) -> None:
    """The order of the codes differs between them, so the kernel has to learn it anew."""
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "ATEN_CPU_CAPABILITY": kind, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() != kind:
        pytest.skip(f"this processor has no {kind}")


@pytest.mark.parametrize(
    ("scheme", "device", "columns", "rows"),
    [
        (Scheme(3, 128), CPU, 256, 64),
        (Scheme(8, 128), CPU, 256, 64),
        (Scheme(4, 16), CPU, 256, 64),
        (Scheme(4, 512), CPU, 512, 64),
        (Scheme(4, -1), CPU, 512, 64),
        (Scheme(4, 128), CPU, 192, 64),
        (Scheme(4, 128), CPU, 256, 40),
        (Scheme.parse("nf4"), CPU, 256, 64),
        (Scheme(4, 128), torch.device("cuda"), 256, 64),
        (Scheme(4, 128), torch.device("meta"), 256, 64),
    ],
)
def test_supports_says_no(scheme: Scheme, device: torch.device, columns: int, rows: int) -> None:
    assert not KERNEL.supports(scheme, device, columns, rows)


def test_unknown_order_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that packs in another order must not be read in the old one."""
    cpu._order_is_known.cache_clear()
    right = cpu._pack_codes
    monkeypatch.setattr(
        cpu, "_pack_codes", lambda q: right(q).flip(0) if q.shape[1] == 32 else right(q)
    )
    assert not KERNEL.supports(Scheme(4, 128), CPU, 256, 64)
    cpu._order_is_known.cache_clear()


def test_pack_refuses() -> None:
    qt = make(32, 64, 32, seed=7)
    act_order = QTensor(qt.q, qt.scales, qt.zeros, qt.scheme, torch.arange(64).int() % 2)
    with pytest.raises(SalienceError, match="act-order"):
        KERNEL.pack(act_order)
    with pytest.raises(SalienceError, match="w4g32 24 x 64"):
        KERNEL.pack(make(24, 64, 32, seed=8))


if __name__ == "__main__":
    for n in (16, 32, 48, 64, 80, 112, 144, 192):
        for m in (1, 5, MANY):
            check(make(n, 128, 64, seed=n), torch.randn(m, 128))
    print(torch.backends.cpu.get_cpu_capability().lower())
