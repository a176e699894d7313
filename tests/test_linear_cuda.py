"""The CUDA C++ of linears, its own text on a CPU, against fp64; what it does wrong is noticed."""

from pathlib import Path

import pytest
import torch

import cuda_on_cpu
from salience.kernels import cuda_program
from salience.kernels.mma_cuda import Mma
from salience.kernels.wgmma_cuda import Wgmma
from test_kernels_cuda import packed_weight

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
# y is rounded once by mma, and that is all; wgmma rounds each weight, too
TOLERANCE = {FP16: 4e-4, BF16: 3e-3}
pytestmark = pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="no g++")


_MMA, _WGMMA = Mma(), Wgmma()


def error(
    kernels: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: tuple[int, int, int, int, int],
    options: dict[str, int],
    dtype: torch.dtype = FP16,
    scales: torch.dtype = FP16,
    change: tuple[str, str] = ("", ""),
    late: bool = True,
    variant: Mma | Wgmma = _MMA,
) -> float:
    """Of a product, by what it may be: case is bits, group, rows, columns, tokens."""
    bits, group, rows, columns, tokens = case
    packed, weight = packed_weight(bits, columns if group == -1 else group, rows, columns, scales)

    compiler = cuda_on_cpu.Compiler(kernels, late, seed=tokens, change=change)
    monkeypatch.setattr(cuda_program, "kernel", compiler)
    monkeypatch.setattr(cuda_program, "capability", lambda index: 90)
    monkeypatch.setattr(cuda_program, "tensor_map", cuda_on_cpu.tensor_map)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)
    y = variant.multiply(x, packed, bits, group, rows, **options)
    want = x.double() @ weight.T
    return float((y.double() - want).norm() / want.norm()) / TOLERANCE[dtype]


def config(tiles: int, high: int, deep: int, stages: int, split: int, most: int) -> dict[str, int]:
    names = ("tiles", "high", "deep", "stages", "split", "most")
    return dict(zip(names, (tiles, high, deep, stages, split, most), strict=True))


def test_one(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest that has all: a cluster, teams, tails of rows, columns and tokens."""
    assert error(kernels, monkeypatch, (4, 128, 72, 1000, 13), config(1, 2, 2, 2, 2, 16)) < 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bits(
    bits: int, dtype: torch.dtype, kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with one of two ways to lie, and to be cut; copies that come late, and at once."""
    case, options = (bits, 128, 72, 1000, 9), config(2, 2, 2, 2, 2, 16)
    if (dtype == BF16) == (bits in (2, 4)):
        case, options = (bits, 32, 100, 400, 3), config(1, 1, 4, 4, 1, 8)
    scales = FP32 if bits == 2 else dtype
    for late in (True, False):
        assert error(kernels, monkeypatch, case, options, dtype, scales, late=late) < 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "options", "scales"),
    [
        ((4, 64, 64, 384, 8), config(1, 7, 1, 2, 1, 8), BF16),
        ((4, 256, 80, 768, 20), config(1, 2, 1, 2, 4, 16), FP16),
        ((3, -1, 80, 328, 20), config(4, 1, 2, 4, 1, 8), FP16),
        ((3, 384, 33, 800, 1), config(1, 3, 2, 2, 2, 8), FP16),
        ((4, 128, 130, 640, 33), config(2, 2, 1, 2, 2, 24), FP16),
        ((4, -1, 33, 1000, 17), {}, FP16),
    ],
    ids=str,
)
def test_groups_and_shapes(
    case: tuple[int, int, int, int, int],
    options: dict[str, int],
    scales: torch.dtype,
    kernels: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Groups within a block, of several and of a whole row; more tokens than one block has."""
    assert error(kernels, monkeypatch, case, options, scales=scales) < 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "late"),
    [
        (('asm volatile("cp.async.wait_group %0;"', 'asm volatile("cp.async.wait_group 9;"'), True),
        (("next % STAGES * size", "i * size"), False),
        (("min(block / GROUP_BLOCKS", "min(1 + block / GROUP_BLOCKS"), True),
    ],
    ids=["wait", "buffer", "group"],
)
def test_a_fault_is_seen(
    change: tuple[str, str], late: bool, kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, options = (3, 64, 72, 1000, 9), config(1, 2, 2, 2, 2, 16)
    assert not error(kernels, monkeypatch, case, options, change=change, late=late) < 3


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
    change: tuple[str, str], said: str, kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(cuda_on_cpu.Fault, match=said):
        error(kernels, monkeypatch, (3, 64, 72, 256, 3), config(1, 2, 1, 2, 2, 8), change=change)


def cut(
    tokens: int,
    warpgroups: int,
    row_tiles: int,
    parts: int,
    split: int,
    stages: int = 2,
    depth: int = 2,
    buffers: int = 2,
) -> dict[str, int]:
    names = ("warpgroups", "row_tiles", "parts", "split", "stages", "depth", "buffers")
    values = (warpgroups, row_tiles, parts, split, stages, depth, buffers)
    return {"tokens": tokens} | dict(zip(names, values, strict=True))


def test_one_of_wgmma(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, options = (4, 128, 72, 1000, 19), cut(16, 1, 1, 2, 2)
    assert error(kernels, monkeypatch, case, options, variant=_WGMMA) < 1.5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bits_of_wgmma(
    bits: int, dtype: torch.dtype, kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, options = (bits, 128, 200, 640, 20), cut(32, 1, 2, 1, 2, buffers=4)
    if (dtype == BF16) == (bits in (2, 4)):
        case, options = (bits, 32, 64, 400, 17), cut(16, 1, 1, 3, 1, stages=3)
    scales = FP32 if bits == 2 else dtype
    for late in (True, False):
        found = error(kernels, monkeypatch, case, options, dtype, scales, late=late, variant=_WGMMA)
        assert found < 1.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "options"),
    [
        ((4, 64, 333, 1000, 70), cut(64, 2, 1, 1, 1, stages=4, depth=4)),
        ((4, 256, 80, 1024, 130), cut(128, 1, 1, 1, 4, stages=3)),
        ((3, -1, 130, 328, 257), cut(256, 2, 1, 1, 1, stages=3)),
        ((2, 384, 65, 800, 40), {}),
    ],
    ids=str,
)
def test_shapes_of_wgmma(
    case: tuple[int, int, int, int, int],
    options: dict[str, int],
    kernels: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert error(kernels, monkeypatch, case, options, variant=_WGMMA) < 1.5


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        ("wgmma_wait<BUFFERS - 1>();", "wgmma_wait<BUFFERS>();"),
        ("barrier_wait(full + 8 * stage, phase);", ""),
        ("if (++stage == STAGES) stage = 0, phase ^= 1;\n      }\n    }\n  } else {", "}}} else {"),
    ],
    ids=["operands", "full", "ring"],
)
def test_a_fault_of_wgmma_is_seen(
    change: tuple[str, str], kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        case, options = (4, 128, 72, 2048, 19), cut(16, 1, 1, 1, 2)
        found = error(kernels, monkeypatch, case, options, change=change, variant=_WGMMA)
    except cuda_on_cpu.Fault:
        return
    assert not found < 3
