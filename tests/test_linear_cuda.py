"""The CUDA C++ of linears, its own text on a CPU, against fp64; what it does wrong is noticed."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import cuda_on_cpu
from salience.kernels import cuda_program
from salience.kernels.mma_cuda import Config as Few
from salience.kernels.mma_cuda import Mma
from salience.kernels.wgmma_cuda import Config as Many
from salience.kernels.wgmma_cuda import Wgmma
from test_kernels_cuda import packed_weight

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
TOLERANCE = {FP16: 4e-4, BF16: 3e-3}
# y is rounded once by mma, and that is all; wgmma rounds each weight, too
LIMIT = {"mma": 1.0, "wgmma": 1.5}
MMA, WGMMA = Mma(), Wgmma()
pytestmark = pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="no g++")
by_both = pytest.mark.parametrize("variant", [MMA, WGMMA], ids=["mma", "wgmma"])


Way = tuple[tuple[int, int, int, int], Few | Many]


def error(
    kernels: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: tuple[int, int, int, int, int],
    config: Few | Many | None,
    dtype: torch.dtype = FP16,
    scales: torch.dtype = FP16,
    change: tuple[str, str] = ("", ""),
    late: bool = True,
    variant: Mma | Wgmma = MMA,
) -> float:
    """Of a product, by what it may be: case is bits, group, rows, columns, tokens."""
    bits, group, rows, columns, tokens = case
    options = {} if config is None else asdict(config)
    packed, weight = packed_weight(bits, columns if group == -1 else group, rows, columns, scales)
    compiler = cuda_on_cpu.Compiler(kernels, late, seed=tokens, change=change)
    monkeypatch.setattr(cuda_program, "kernel", compiler)
    monkeypatch.setattr(cuda_program, "capability", lambda index: 90)
    monkeypatch.setattr(cuda_program, "tensor_map", cuda_on_cpu.tensor_map)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)
    y = variant.multiply(x, packed, bits, group, rows, **options)
    want = x.double() @ weight.T
    return float((y.double() - want).norm() / want.norm()) / TOLERANCE[dtype]


def test_one(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest that has all: a cluster, teams, tails of rows, columns and tokens."""
    assert error(kernels, monkeypatch, (4, 128, 72, 1000, 13), Few(16, 1, 2, 2, 2, 2)) < 1


# Two ways for a weight to lie, and two to cut the work
WAYS: dict[str, tuple[Way, Way]] = {
    "mma": (
        ((128, 72, 1000, 9), Few(16, 2, 2, 2, 2, 2)),
        ((32, 100, 400, 3), Few(8, 1, 1, 4, 4, 1)),
    ),
    "wgmma": (
        ((128, 200, 640, 20), Many(32, 1, 2, 1, 2, buffers=4, stages=2)),
        ((32, 64, 400, 17), Many(16, 1, 1, 3, 1, stages=3)),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@by_both
def test_bits(
    variant: Mma | Wgmma,
    bits: int,
    dtype: torch.dtype,
    kernels: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each in one of two ways; copies that come late, and at once."""
    sizes, config = WAYS[variant.name][(dtype == BF16) == (bits in (2, 4))]
    case, scales = (bits, *sizes), FP32 if bits == 2 else dtype
    for late in (True, False):
        found = error(kernels, monkeypatch, case, config, dtype, scales, late=late, variant=variant)
        assert found < LIMIT[variant.name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "config", "scales"),
    [
        ((4, 64, 64, 500, 8), Few(8, 1, 7, 1, 4, 1, together=2), BF16),
        ((4, 256, 80, 768, 20), Few(16, 1, 2, 1, 2, 4), FP16),
        ((3, -1, 80, 328, 20), Few(8, 4, 1, 2, 4, 1), FP16),
        ((3, 384, 33, 800, 1), Few(8, 1, 3, 2, 0, 2), FP16),
        ((2, 32, 65, 96, 5), Few(8, 1, 1, 2, 2, 1), FP16),
        ((4, 128, 130, 640, 33), Few(24, 2, 2, 1, 2, 2), FP16),
        ((8, 64, 40, 72, 2), None, FP32),
        ((2, 32, 64, 400, 4), Few(8, 1, 1, 16, 0, 1), FP16),
        ((4, -1, 33, 1000, 17), None, FP16),
    ],
    ids=str,
)
def test_groups_and_shapes(
    case: tuple[int, int, int, int, int],
    config: Few | None,
    scales: torch.dtype,
    kernels: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Groups within a block, of several and of a whole row; more tokens than one block has; x in
    pairs of blocks and all at once.
    """
    assert error(kernels, monkeypatch, case, config, scales=scales) < 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "late", "config"),
    [
        (('"n"(PENDING)', '"n"(9)'), True, Few(16, 1, 2, 2, 2, 2)),
        (('"n"(PENDING)', '"n"(PENDING + 1)'), True, Few(16, 1, 2, 1, 4, 1, together=2)),
        (("next % ROUND * size", "i * size"), False, Few(16, 1, 2, 2, 2, 2)),
        (("        meet();\n    }", "    }"), True, Few(16, 1, 7, 1, 0, 1)),
        (
            ("min(block / GROUP_BLOCKS", "min(1 + block / GROUP_BLOCKS"),
            True,
            Few(16, 1, 2, 2, 2, 2),
        ),
        (("0x00030003u", "0x00030001u"), True, Few(16, 1, 2, 2, 2, 2)),
        (("0x7171 : 0x7070", "0x7272 : 0x7272"), True, Few(16, 1, 2, 2, 2, 2)),
    ],
    ids=["wait", "wait for two", "buffer", "meet", "group", "bit", "zero"],
)
def test_a_fault_is_seen(
    change: tuple[str, str],
    late: bool,
    config: Few,
    kernels: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = (3, 64, 72, 1000, 9)
    assert not error(kernels, monkeypatch, case, config, change=change, late=late) < 3


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
        error(kernels, monkeypatch, (3, 64, 72, 256, 3), Few(8, 1, 2, 1, 2, 2), change=change)


def test_one_of_wgmma(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, config = (4, 128, 72, 1000, 19), Many(16, 1, 1, 2, 2, stages=2)
    assert error(kernels, monkeypatch, case, config, variant=WGMMA) < LIMIT["wgmma"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "config"),
    [
        ((4, 64, 333, 1000, 70), Many(64, 2, 1, 1, 1, stages=4, depth=4)),
        ((4, 256, 80, 1024, 130), Many(128, 1, 1, 1, 4, stages=3)),
        ((3, -1, 130, 328, 257), Many(256, 2, 1, 1, 1, stages=3)),
        ((2, 384, 65, 800, 40), None),
    ],
    ids=str,
)
def test_shapes_of_wgmma(
    case: tuple[int, int, int, int, int],
    config: Many | None,
    kernels: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert error(kernels, monkeypatch, case, config, variant=WGMMA) < LIMIT["wgmma"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        ("wgmma_wait<BUFFERS - 1>();", "wgmma_wait<BUFFERS>();"),
        ("j == BUFFERS - 2 &&", "j == 0 && done == -1 &&"),
        ("barrier_wait(full + 8 * stage, phase);", ""),
        ("if (++stage == STAGES) stage = 0, phase ^= 1;\n      }\n    }\n  } else {", "}}} else {"),
        ("rank * MINE + i / QUADS, row", "i / QUADS, row"),
    ],
    ids=["operands", "free", "full", "ring", "share"],
)
def test_a_fault_of_wgmma_is_seen(
    change: tuple[str, str], kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        case, config = (4, 128, 72, 2048, 19), Many(16, 1, 1, 1, 2, stages=2)
        found = error(kernels, monkeypatch, case, config, change=change, variant=WGMMA)
    except cuda_on_cpu.Fault:
        return
    assert not found < 3
