"""The kernel for few tokens, its own text on a CPU, against fp64; what it does wrong is noticed."""

import functools
from pathlib import Path

import pytest
import torch

import cuda_on_cpu
from salience.kernels import cuda_program
from salience.kernels.mma_cuda import Mma
from test_kernels_cuda import packed_weight

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
TOLERANCE = {FP16: 4e-4, BF16: 3e-3}  # y is rounded once, and that is all
pytestmark = pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="no g++")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def error(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: tuple[int, int, int, int, int],
    options: dict[str, int],
    dtype: torch.dtype = FP16,
    scales: torch.dtype = FP16,
    change: tuple[str, str] = ("", ""),
    late: bool = True,
) -> float:
    """Of a product, to that of fp64, relative: case is bits, group, rows, columns, tokens."""
    bits, group, rows, columns, tokens = case
    packed, weight = packed_weight(bits, columns if group == -1 else group, rows, columns, scales)

    def kernel(
        source: str, name: str, macros: tuple[tuple[str, int], ...], index: object
    ) -> cuda_on_cpu.Kernel:
        library = cuda_on_cpu.compiled(folder, source, name, (*macros, ("SM", 90)), change)
        return cuda_on_cpu.Kernel(library, seed=tokens, late=late)

    monkeypatch.setattr(cuda_program, "kernel", kernel)
    monkeypatch.setattr(cuda_program, "capability", lambda index: 90)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)
    y = Mma().multiply(x, packed, bits, group, rows, **options)
    want = x.double() @ weight.T
    return float((y.double() - want).norm() / want.norm()) / TOLERANCE[dtype]


def config(tiles: int, high: int, deep: int, stages: int, split: int, most: int) -> dict[str, int]:
    names = ("tiles", "high", "deep", "stages", "split", "most")
    return dict(zip(names, (tiles, high, deep, stages, split, most), strict=True))


def test_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest that has all: a cluster, teams, tails of rows, columns and tokens."""
    assert error(folder, monkeypatch, (4, 128, 72, 1000, 13), config(1, 2, 2, 2, 2, 16)) < 1


@pytest.mark.slow
@pytest.mark.parametrize("late", [True, False], ids=["late", "early"])
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bits(
    bits: int, dtype: torch.dtype, late: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = functools.partial(error, folder, monkeypatch, dtype=dtype, late=late)
    assert check((bits, 128, 72, 1000, 9), config(2, 2, 2, 2, 2, 16), scales=dtype) < 1
    assert check((bits, 32, 100, 400, 3), config(1, 1, 4, 4, 1, 8), scales=FP32) < 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "options", "scales"),
    [
        ((4, 64, 64, 384, 8), config(1, 7, 1, 2, 1, 8), BF16),
        ((4, 256, 80, 768, 20), config(1, 2, 1, 2, 4, 16), FP16),
        ((3, -1, 80, 328, 20), config(4, 1, 2, 4, 1, 8), FP16),
        ((3, 384, 33, 800, 1), config(1, 3, 2, 2, 2, 8), FP16),
        ((2, 32, 65, 96, 5), config(1, 1, 2, 2, 1, 8), FP16),
        ((4, 128, 130, 640, 33), config(2, 2, 1, 2, 2, 24), FP16),
        ((8, 64, 40, 72, 2), {}, FP32),
        ((4, -1, 33, 1000, 17), {}, FP16),
    ],
    ids=str,
)
def test_groups_and_shapes(
    case: tuple[int, int, int, int, int],
    options: dict[str, int],
    scales: torch.dtype,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Groups within a block, of several and of a whole row; more tokens than one block has."""
    assert error(folder, monkeypatch, case, options, scales=scales) < 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "late"),
    [
        (('asm volatile("cp.async.wait_group %0;"', 'asm volatile("cp.async.wait_group 9;"'), True),
        (("next % STAGES * size", "i * size"), False),
        (("min(block / GROUP_BLOCKS", "min(1 + block / GROUP_BLOCKS"), True),
        (("0x00040004u", "0x00040000u"), True),
        (("zero | exponent(0)", "exponent(0)"), True),
    ],
    ids=["wait", "buffer", "group", "bit", "zero"],
)
def test_a_fault_is_seen(
    change: tuple[str, str], late: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, options = (3, 64, 72, 1000, 9), config(1, 2, 2, 2, 2, 16)
    assert not error(folder, monkeypatch, case, options, change=change, late=late) < 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("at.words - 8 * lane", "at.words - 1000000"), "outside of the arguments"),
        (("inbox + 16 * (share", "inbox + 16 * (64 + share"), "outside of shared memory"),
        (("16 * (SPLIT - 1) * max", "32 * (SPLIT - 1) * max"), "all threads wait"),
    ],
    ids=["global", "shared", "wait"],
)
def test_a_fault_is_named(
    change: tuple[str, str], said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(cuda_on_cpu.Fault, match=said):
        error(folder, monkeypatch, (3, 64, 72, 256, 3), config(1, 2, 1, 2, 2, 8), change=change)
