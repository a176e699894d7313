"""The backend of GPUs: what it takes, its tensors, and what it chooses to multiply with."""

import functools
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from salience import grid, kernels
from salience.errors import SalienceError, StorageError
from salience.kernels import choice, cuda_program, gpu, mma_cuda, wgmma_cuda
from salience.kernels.choice import Entry, Shape, Timed
from salience.linear import QuantLinear
from salience.qtensor import QTensor
from salience.scheme import Scheme

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DEVICE = CUDA if torch.cuda.is_available() else CPU  # the CPU interprets
GPU = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
SHAPE = Shape(4, 128, 4096, 4096, torch.float16)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A cache folder of the test's own, and nothing remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "_SHIPPED", tmp_path / "shipped")
    remembered = (choice._table, gpu.chosen, gpu.triton_fault, gpu._warn_of_nothing)
    for function in remembered:
        function.cache_clear()
    yield tmp_path / "salience" / "kernels"
    for function in remembered:
        function.cache_clear()


class Named:
    """A variant that takes up to some tokens and gives all ones times what it was told."""

    def __init__(self, name: str, most: int = 4096) -> None:
        self.name, self.most = name, most

    def supports(self, shape: Shape, tokens: int, device: torch.device) -> bool:
        return tokens <= self.most

    def options(self, shape: Shape, tokens: int) -> list[dict[str, int]]:
        return [{"split": 1}, {"split": 2}]

    def multiply(
        self,
        x: Tensor,
        packed: list[Tensor],
        bits: int,
        group_size: int,
        out_features: int,
        split: int = 1,
    ) -> Tensor:
        return x.new_full((len(x), out_features), split)


def quantized(scheme: str = "w4g32", rows: int = 80, columns: int = 160) -> QTensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) / 8
    return grid.quantize(weight.to(DEVICE), Scheme.parse(scheme))


@pytest.mark.parametrize("scheme", ["w2g32", "w3g160", "w3channel", "w4g32-sym", "w8g160"])
def test_what_is_packed_can_be_unpacked(scheme: str) -> None:
    qt, backend = quantized(scheme), gpu.Gpu()
    found = backend.unpack(backend.pack(qt), qt.scheme, 160, 80)
    for name in ("q", "scales", "zeros"):
        assert torch.equal(getattr(found, name), getattr(qt, name))


def test_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "VARIANTS", (Named("some"),))
    backend = gpu.Gpu()
    for scheme in ("w2g64", "w3g32", "w4g96", "w8g128", "w4channel", "w4g128-sym"):
        assert backend.supports(Scheme.parse(scheme), CUDA, 384, 7)
        assert not backend.supports(Scheme.parse(scheme), CPU, 384, 7)
    assert backend.supports(Scheme.parse("w4channel"), CUDA, 101, 7)
    for scheme in ("w5g64", "w4g16", "w4g256", "nf4", "w1g32"):
        assert not backend.supports(Scheme.parse(scheme), CUDA, 384, 7)


def test_what_it_refuses_to_pack() -> None:
    qt = quantized()
    g_idx = torch.arange(160, device=DEVICE).flip(0).int() // 32
    with pytest.raises(SalienceError, match="kernel gpu takes no act-order weight; use reference"):
        gpu.Gpu().pack(QTensor(qt.q, qt.scales, qt.zeros, qt.scheme, g_idx))
    with pytest.raises(SalienceError, match="kernel gpu takes no w5g32; use reference"):
        gpu.Gpu().pack(quantized("w5g32"))


@pytest.mark.parametrize("tokens", [(1,), (3,), (2, 70), (0,), ()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_multiplies(tokens: tuple[int, ...], dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    qt = quantized("w3g32")
    x = torch.randn(*tokens, 160, device=DEVICE).to(dtype)
    packed = gpu.Gpu().pack(qt)
    y = kernels.qmm(x, packed, "gpu", 3, 32, 80)
    want = x.double() @ qt.dequantize(torch.float64).T
    assert y.shape == want.shape and y.dtype == dtype
    assert (y.double() - want).norm() <= 2e-3 * want.norm()


def test_opcheck() -> None:
    pytest.importorskip("triton")
    packed = gpu.Gpu().pack(quantized("w4channel", 16, 20))
    x = torch.randn(2, 1, 20, device=DEVICE)
    torch.library.opcheck(kernels.qmm, (x, packed, "gpu", 4, -1, 16))


def test_what_it_does_not_multiply() -> None:
    packed = gpu.Gpu().pack(quantized())
    with pytest.raises(SalienceError, match=r"multiplies fp16, bf16 and fp32, not torch\.float64"):
        gpu.Gpu().matmul(torch.zeros(1, 160, dtype=torch.float64), packed, 4, 32, 80)


def test_rows_dequantized_in_steps() -> None:
    pytest.importorskip("triton")
    qt = quantized("w4g32", rows=150)
    x = torch.randn(5, 160, device=DEVICE)
    packed = gpu.Gpu().pack(qt)
    whole = gpu.Dequantize().multiply(x, packed, 4, 32, 150)
    assert torch.allclose(whole, x @ qt.dequantize().T, atol=1e-5)
    parts = gpu.Dequantize().multiply(x, packed, 4, 32, 150, rows=64)
    assert torch.allclose(parts, whole, atol=1e-5)


def table(folder: Path, *entries: Entry, name: str = GPU) -> Path:
    return choice.save(name, entries, folder)


def entry(
    columns: int = 4096, group_size: int = 128, bits: int = 4, **buckets: tuple[str, int]
) -> Entry:
    """Buckets by keyword: t16=("mma", 2)."""
    timed = {
        int(name[1:]): [Timed(variant, {"split": split}, 1.0), Timed("last", {}, 2.0)]
        for name, (variant, split) in buckets.items()
    }
    return Entry(Shape(bits, group_size, columns, 4096, torch.float16), timed)


def names(shape: Shape, tokens: int) -> list[str]:
    return [timed.variant for timed in choice.order(GPU, shape, tokens)]


def test_a_table_is_read_by_number_of_tokens(cache: Path) -> None:
    table(cache, entry(t4=("few", 8), t64=("some", 2)))
    assert [names(SHAPE, n)[0] for n in (1, 4, 5, 64)] == ["few", "few", "some", "some"]
    assert names(SHAPE, 65) == []  # a rule knows better than what is best for few
    assert choice.order("another GPU", SHAPE, 1) == ()


def test_the_nearest_shape(cache: Path) -> None:
    table(cache, entry(4096, t1=("narrow", 1)), entry(16384, t1=("wide", 1)))
    table(cache, entry(4096, 32, t1=("small", 1)), entry(4096, bits=3, t1=("three", 1)))

    def found(columns: int, group: int = 128, bits: int = 4) -> str:
        return names(Shape(bits, group, columns, 4096, torch.bfloat16), 1)[0]

    assert (found(5120), found(14336), found(4096, 32)) == ("narrow", "wide", "small")
    assert found(14336, 64, 3) == "three"
    assert names(Shape(2, 128, 4096, 4096, torch.float16), 1) == []
    assert names(Shape(4, 128, 4096, 4096, torch.float32), 1) == []


def test_saving_keeps_other_shapes_and_the_users_go_first(cache: Path) -> None:
    shipped = choice._SHIPPED
    table(shipped, entry(t1=("ours", 1)), entry(8192, t1=("ours wide", 1)))
    assert names(SHAPE, 1)[0] == "ours"
    path = table(cache, entry(t1=("first", 1)), entry(2048, t1=("other", 1)))
    table(cache, entry(t1=("again", 3)))
    assert names(SHAPE, 1)[0] == "again" and path.parent == cache
    assert {e["columns"] for e in json.loads(path.read_text())["entries"]} == {2048, 4096}
    assert names(Shape(4, 128, 8192, 4096, torch.float16), 1)[0] == "ours wide"
    assert sorted(cache.iterdir()) == [path]


def test_a_cache_that_cannot_be_written(cache: Path) -> None:
    cache.parent.parent.mkdir(exist_ok=True)
    cache.parent.write_text("a file")
    with pytest.raises(StorageError, match=r"cannot write .*; set XDG_CACHE_HOME"):
        choice.save(GPU, [entry(t1=("any", 1))])


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        '{"entries": 3}',
        '{"entries": [{"bits": 4}]}',
        '{"entries": [{"bits": 4, "group_size": 0, "columns": 1, "rows": 1, "dtype": "float16", '
        '"buckets": [{"tokens": 1, "order": []}]}]}',
        '{"entries": [{"bits": 4, "group_size": 1, "columns": 1, "rows": 1, "dtype": "nonsense", '
        '"buckets": []}]}',
        "\xff",
    ],
)
def test_a_broken_table_is_ignored_with_a_word(cache: Path, text: str) -> None:
    path = table(cache, entry(t1=("any", 1)))
    path.write_bytes(text.encode("latin-1"))
    with pytest.warns(UserWarning, match=r"is no table of kernels \(.*\) and is ignored") as seen:
        assert names(SHAPE, 1) == []
    assert str(path) in str(seen[0].message) and len(seen) == 1
    assert names(SHAPE, 1) == []  # and no second word


def chosen(shape: Shape, tokens: int) -> tuple[str, dict[str, int]]:
    variant, options = gpu.chosen(shape, tokens, DEVICE)
    return variant.name, dict(options)


def test_chosen_by_the_table(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "VARIANTS", (Named("mma", 16), Named("last"), Named("dequantize")))
    table(cache, entry(t4096=("mma", 2)))
    assert chosen(SHAPE, 16) == ("mma", {"split": 2})
    assert chosen(SHAPE, 32) == ("last", {}), "the first in the table's order that can"
    packed = gpu.Gpu().pack(quantized())
    found = gpu.Gpu().matmul(torch.zeros(3, 160, device=DEVICE), packed, 4, 32, 80)
    assert found.eq(1).all(), "fp32, of which the table has nothing"
    found = gpu.Gpu().matmul(torch.zeros(3, 160, device=DEVICE).half(), packed, 4, 32, 80)
    assert found.eq(2).all(), "and the options are passed on"


def test_chosen_without_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "VARIANTS", (Named("mma", 16), Named("any"), Named("dequantize")))
    names = [chosen(SHAPE, n)[0] for n in (1, 16, 32, 64, 128, 4096)]
    assert names == ["mma", "mma", "any", "any", "dequantize", "dequantize"]


def test_bucket() -> None:
    assert [choice.bucket(n) for n in (1, 2, 3, 16, 17, 4097)] == [1, 2, 4, 16, 32, 8192]


def test_measuring() -> None:
    """Every option of every variant that can, on copies of a weight; the fastest option of each."""
    took = {"slow": 9.0, "fast": 4.0}
    timed = []

    def time(calls: list[functools.partial]) -> float:
        variant, split = calls[0].func.__self__.name, calls[0].keywords["split"]
        timed.append((variant, split, len(calls[0].args[0])))
        assert len(calls) > 1 and all(call().eq(split).all() for call in calls)
        return took[variant] / split

    shape = Shape(3, 32, 96, 70, torch.bfloat16)
    found = choice.measure([Named("slow"), Named("fast", 2)], shape, DEVICE, (1, 4), time)
    assert found.shape == shape
    assert found.buckets[1] == [Timed("fast", {"split": 2}, 2.0), Timed("slow", {"split": 2}, 4.5)]
    assert found.buckets[4] == [Timed("slow", {"split": 2}, 4.5)]
    assert len(timed) == 6
    choice.save(GPU, [found])
    assert choice.order(GPU, shape, 1) == found.buckets[1]


def test_the_weights_it_measures_on_are_packed_as_any() -> None:
    made = choice._random_weights(Shape(3, 32, 160, 80, torch.float16), DEVICE)[0]
    packed = gpu.Gpu().pack(quantized("w3g32"))
    assert [(t.shape, t.dtype) for t in made] == [(t.shape, t.dtype) for t in packed]


class Driver:
    """What Triton has instead of a GPU; it starts or fails to."""

    def __init__(self, fault: Exception | None) -> None:
        self.fault = fault

    @property
    def active(self) -> "Driver":
        if self.fault is not None:
            raise self.fault
        return self

    def get_current_target(self) -> None:
        pass


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int] = (9, 0),
    fault: Exception | None = None,
) -> None:
    """A GPU, with Triton alone."""
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.runtime, "driver", Driver(fault))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "no GPU of ours")
    monkeypatch.setattr(cuda_program, "available", lambda: False)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton is there and cannot start: other backends take the weight, and one line says why."""
    pretend(monkeypatch, fault=RuntimeError("Failed to find C compiler.\nPlease specify CC"))
    with pytest.warns(UserWarning, match="needs a C compiler and Python's headers") as seen:
        for _ in range(2):
            assert not gpu.Gpu().supports(Scheme(), CUDA, 256, 64)
    assert len(seen) == 1 and "\n" not in str(seen[0].message)
    assert kernels.choose(Scheme(), CUDA, 256, 64).name == "reference"
    with pytest.raises(SalienceError, match=r"nothing to multiply with .* C compiler"):
        gpu.chosen(SHAPE, 1, CUDA)
    monkeypatch.setattr(gpu, "VARIANTS", (*gpu.VARIANTS, Named("compiled elsewhere")))
    assert gpu.Gpu().supports(Scheme(), CUDA, 256, 64)
    assert gpu.chosen(SHAPE, 1, CUDA)[0].name == "compiled elsewhere"


def test_where_triton_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    assert gpu.triton_fault(CUDA) is None
    assert kernels.choose(Scheme(3, 128), CUDA, 256, 64).name == "gpu"
    assert gpu.chosen(SHAPE, 1, CUDA)[0].name == "triton"
    gpu.triton_fault.cache_clear()
    pretend(monkeypatch, capability=(7, 5))
    assert "compute capability 8.0" in str(gpu.triton_fault(CUDA))
    gpu.triton_fault.cache_clear()
    monkeypatch.setattr(gpu, "find_spec", lambda _: None)
    assert gpu.triton_fault(CUDA) == "Triton is not installed (pip install triton)"


def test_a_linear_on_a_cpu() -> None:
    if DEVICE == CPU:
        with pytest.raises(SalienceError, match=r"kernel gpu does not support w4g32 .* on cpu"):
            QuantLinear(quantized(), kernel="gpu")


@pytest.mark.parametrize("path", sorted(choice._SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_tables(path, monkeypatch, tmp_path):
    """All that a table names is there, with options that it has; the fastest comes first."""
    monkeypatch.setattr(choice, "cache_folder", lambda name: tmp_path)
    monkeypatch.setattr(choice, "_SHIPPED", path.parent)
    choice._table.cache_clear()
    names = {variant.name for variant in gpu.VARIANTS}
    known = {"mma": mma_cuda.Config(), "wgmma": wgmma_cuda.Config(64)}
    entries = choice._read(path)
    assert len(entries) >= 7
    for entry in entries:
        for tokens, order in entry.buckets.items():
            times = [one.microseconds for one in order]
            assert times == sorted(times) and order[0].variant in names
            for one in order:
                fields = asdict(known[one.variant]) if one.variant in known else {"rows"}
                assert set(one.options) <= set(fields)
            gpu_name = json.loads(path.read_text())["gpu"]
            assert choice.order(gpu_name, entry.shape, tokens) == order
    choice._table.cache_clear()
