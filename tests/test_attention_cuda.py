"""Attention in CUDA C++: run on the CPU by the kernel's own text, compiled for Hopper, on a GPU."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import cuda_on_cpu
from salience.kernels import cuda_program
from salience.kernels.fused import attention_cuda
from test_fused import attended, attention64, close, random

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
DIMS = [(64, 64), (80, 80), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128), (48, 112)]
with_gxx = pytest.mark.skipif(
    cuda_on_cpu.COMPILER is None or torch.cuda.is_available(),
    reason="no g++, or a GPU that is right",
)


def emulated(case, folder, monkeypatch, splits=2, warps=2, stale=0):
    monkeypatch.setattr(cuda_program, "kernel", cuda_on_cpu.Compiler(folder, stale=stale))
    attention = partial(attention_cuda.decode_attention, splits=splits, warps=warps)
    attended(attention, **case)


@with_gxx
def test_emulated(monkeypatch, kernels):
    """Pieces with several tiles, one and none; a position that was another before the wait."""
    case = {"dim": 64, "values": 48, "sinks": True, "length": 150, "batch": 4}
    for stale in (0, -70):
        positions = [149, 14, 80, -1]
        emulated(case | {"positions": positions}, kernels, monkeypatch, stale=stale)


@pytest.mark.slow
@with_gxx
@pytest.mark.parametrize(
    ("case", "how"),
    [
        ({"dim": 128, "values": 128, "group": 4, "length": 300, "dtype": BF16}, {}),
        ({"dim": 128, "values": 128, "group": 1, "window": 50}, {"splits": 4, "warps": 1}),
        ({"dim": 128, "values": 128, "group": 16, "softcap": 3.0}, {"splits": 1}),
        ({"dim": 80, "values": 80, "group": 7, "softcap": 3.0, "sinks": True, "window": 60}, {}),
        ({"dim": 96, "values": 112, "group": 20, "dtype": BF16}, {"splits": 8, "warps": 1}),
        ({"dim": 256, "values": 256, "group": 2, "length": 200}, {"stale": 1000}),
        ({"dim": 256, "values": 256, "group": 12}, {"splits": 1, "warps": 3, "stale": 1}),
        ({"dim": 192, "values": 128, "group": 9, "batch": 3}, {"splits": 4}),
    ],
    ids=str,
)
def test_emulated_shapes(case, how, monkeypatch, kernels):
    emulated({"length": 150} | case, kernels, monkeypatch, **how)


@pytest.mark.slow
@with_gxx
def test_emulated_calls(monkeypatch, kernels):
    """int32 positions, one for all rows; q with a row of its own; sinks of bf16."""
    monkeypatch.setattr(cuda_program, "kernel", cuda_on_cpu.Compiler(kernels))
    q = random(3, 1, 6 * 64 + 32, dtype=FP16)[..., 16:-16]
    k, v = random(3, 2, 70, 64, dtype=FP16), random(3, 2, 70, 64, dtype=FP16, seed=1)
    at = torch.tensor([65], dtype=torch.int32).expand(3)
    sinks = random(6, dtype=BF16)
    found = attention_cuda.decode_attention(q, k, v, at, 0.2, 0, 0.0, sinks, splits=2, warps=1)
    close(found, attention64(q.view(3, 6, 64), k, v, at, 0.2, 0, 0.0, sinks))


def test_how_the_context_is_cut():
    """Two blocks a processor at most, a tile of keys for each; few blocks have more warps."""
    pairs = (8, 16, 32, 64, 128, 264, 512)
    found = [attention_cuda.cut(n, 4096, 132) for n in pairs]
    assert found == [(8, 8), (4, 8), (8, 4), (4, 4), (1, 8), (1, 8), (1, 8)]
    assert attention_cuda.cut(264, 200, 132) == (1, 4)
    assert attention_cuda.cut(8, 40, 132) == (4, 4)
    assert attention_cuda.cut(1, 1, 132) == (1, 4)


def call(dim, values, group, dtype=FP16, batch=2, sinks=None, softcap=0.0, position=torch.int64):
    return (
        torch.zeros(batch, 2 * group, dim, dtype=dtype),
        *(torch.zeros(batch, 2, 640, width, dtype=dtype) for width in (dim, values)),
        torch.zeros(batch, dtype=position), 0.1, 0, softcap,
        None if sinks is None else torch.zeros(2 * group, dtype=sinks),
    )  # fmt: skip


def test_what_it_takes():
    takes = attention_cuda.takes
    for dim, values in DIMS:
        assert takes(*call(dim, values, 3)[:4]) and takes(*call(dim, values, 3, BF16)[:4])
    assert not takes(*call(20, 20, 3)[:4]) and not takes(*call(272, 16, 3)[:4])
    assert not takes(*call(64, 64, 3, FP32)[:4])
    q, k, v, at, *_ = call(64, 64, 3)
    assert takes(q.flatten(1), k.transpose(1, 2).contiguous().transpose(1, 2), v, at.int())
    assert not takes(q, k.bfloat16(), v, at) and not takes(q, k, v, at.short())
    assert not takes(random(2, 6, 65, dtype=FP16)[..., 1:], k, v, at)  # rows 130 bytes apart
    assert not takes(q, k.mT.contiguous().mT, v, at)
    assert takes(random(1, 6 * 64 + 4, dtype=FP16)[:, 4:].unflatten(1, (6, 64))[:, :0], k, v, at)


class Recorded:
    """In place of `cuda_program.kernel`: what would be compiled and launched."""

    def __init__(self, monkeypatch):
        self.compiled, self.launched = {}, []
        monkeypatch.setattr(cuda_program, "kernel", self.kernel)

    def kernel(self, source, name, macros, index):
        assert (source, name) == ("attention.cu", "attend")
        self.compiled[macros] = None
        return SimpleNamespace(launch=lambda *a, **more: self.launched.append((a, more)))


def test_what_is_launched(monkeypatch):
    recorded = Recorded(monkeypatch)
    arguments = call(128, 128, 20, batch=1)
    assert attention_cuda.decode_attention(*arguments).shape == (1, 40 * 128)
    [((grid, threads, given), more)] = recorded.launched
    assert grid == (2, 2, 1) and threads == 256  # 2 heads of the cache, 16 and 4 of the others
    assert more["cluster"] == 8 and more["overlap"] and more["shared"] < 100 * 1024
    assert given[0].data_ptr() == arguments[0].data_ptr() and len(given) == 21
    assert given[6:15] == (
        5120,
        128,
        2 * 640 * 128,
        640 * 128,
        128,
        2 * 640 * 128,
        640 * 128,
        128,
        1,
    )
    assert given[15:] == (2, 640, 0, 640, 0.1, 0.0)


@pytest.mark.parametrize("warps", [4, 8])
def test_shared_memory_is_there(warps, monkeypatch):
    recorded = Recorded(monkeypatch)
    for (dim, values), group in itertools.product(DIMS, (1, 4, 8, 16)):
        attention_cuda.decode_attention(*call(dim, values, group), warps=warps)
    assert all(more["shared"] <= 227 * 1024 for _, more in recorded.launched)


def _compile(macros):
    from cuda.bindings import nvrtc

    text = cuda_program.text("attention.cu")
    status, program = nvrtc.nvrtcCreateProgram(text.encode(), b"attention.cu", 0, [], [])
    flags = [f"-D{name}={value}".encode() for name, value in (*macros, ("SM", 90))]
    flags += [b"--gpu-architecture=sm_90a", b"--std=c++17", b"--ptxas-options=-warn-spills"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
    # It is written to, so it must not be the one b" " that all of Python shares.
    log = b" " * (nvrtc.nvrtcGetProgramLogSize(program)[1] + 1)
    nvrtc.nvrtcGetProgramLog(program, log)
    text = log.decode(errors="replace")
    return text if int(status) or "spill" in text.lower() else "", macros


@pytest.mark.slow
def test_every_kind_compiles_without_spills(monkeypatch):
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    try:
        nvrtc.nvrtcVersion()
    except (RuntimeError, OSError) as error:
        pytest.skip(f"no NVRTC: {str(error)[:100]}")
    recorded = Recorded(monkeypatch)
    for (dim, values), group in itertools.product(DIMS, (1, 8, 16)):
        attention_cuda.decode_attention(*call(dim, values, group))
    for splits, warps in itertools.product((1, 2, 8), (4, 8)):
        attention_cuda.decode_attention(*call(128, 128, 4, BF16), splits=splits, warps=warps)
    for sinks, position in itertools.product((FP16, BF16, FP32), (torch.int32, torch.int64)):
        some = call(64, 64, 8, BF16, sinks=sinks, softcap=5.0, position=position)
        attention_cuda.decode_attention(*some)
    with ThreadPoolExecutor() as pool:
        for log, macros in pool.map(_compile, recorded.compiled):
            assert not log, (macros, log[:2000])


# ---- on a GPU --------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("length", [1, 400, 5000])
def test_on_a_gpu(length, dtype):
    sample = random(1, 16, dtype=dtype), *(random(1, 1, 1, 16, dtype=dtype),) * 2
    if not attention_cuda.supports(*sample, torch.zeros(1, dtype=torch.int64, device="cuda")):
        pytest.skip("not for this GPU")
    for dim, values in DIMS:
        for group, splits in ((4, 0), (16, 2), (7, 8), (1, 1)):
            attention = partial(attention_cuda.decode_attention, splits=splits)
            attended(attention, dim=dim, values=values, group=group, length=length, dtype=dtype)
