"""The op `salience::qmm` and the reference kernel, against fp64."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from salience import grid
from salience.codebook import table
from salience.errors import SalienceError
from salience.kernels import BACKENDS, _codebook, _reference, backend, choose, qmm
from salience.qtensor import QTensor
from salience.scheme import Scheme

CPU = torch.device("cpu")
# The rounding of the weight and of y to the dtype of x.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def make(
    bits: int, group_size: int, rows: int = 24, columns: int = 128, act_order: bool = False
) -> QTensor:
    random = torch.Generator().manual_seed(bits)
    scheme = Scheme(bits, group_size)
    groups = scheme.groups(columns)
    g_idx = None
    if act_order:
        g_idx = torch.arange(columns) // scheme.group_columns(columns)
        g_idx = g_idx[torch.randperm(columns, generator=random)].int()
    return QTensor(
        torch.randint(2**bits, (rows, columns), generator=random, dtype=torch.uint8),
        (torch.rand(rows, groups, generator=random) / 50 + 0.001).half(),
        torch.randint(2**bits, (rows, groups), generator=random, dtype=torch.uint8),
        scheme,
        g_idx,
    )


def oracle(x: Tensor, qt: QTensor) -> Tensor:
    """In fp64, from the definition of a QTensor."""
    columns = torch.arange(qt.in_features)
    group = columns // qt.scheme.group_columns(qt.in_features) if qt.g_idx is None else qt.g_idx
    group = group.long()
    weight = (qt.q.double() - qt.zeros.double()[:, group]) * qt.scales.double()[:, group]
    return x.double() @ weight.T


def call(x: Tensor, qt: QTensor, kernel: str = "reference") -> Tensor:
    packed = backend(kernel).pack(qt)
    return qmm(x, packed, kernel, qt.scheme.bits, qt.scheme.group_size, qt.out_features)


def check(x: Tensor, qt: QTensor) -> None:
    y, want = call(x, qt), oracle(x, qt)
    assert y.dtype == x.dtype
    assert y.shape == want.shape
    assert (y.double() - want).norm() <= TOLERANCE[x.dtype] * want.norm()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_reference(bits: int, group_size: int, dtype: torch.dtype) -> None:
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    check(x, make(bits, group_size))


@pytest.mark.parametrize("bits", [3, 5, 8])
def test_rows_that_end_within_a_word(bits: int) -> None:
    check(torch.randn(5, 33), make(bits, 11, columns=33))


@pytest.mark.parametrize("bits", [3, 4])
def test_reference_in_activation_order(bits: int) -> None:
    qt = make(bits, 32, act_order=True)
    assert qt.g_idx is not None and not torch.equal(qt.g_idx, qt.g_idx.sort().values)
    check(torch.randn(5, 128), qt)


@pytest.mark.parametrize("shape", [(128,), (1, 128), (3, 128), (2, 3, 128), (2, 0, 128), (0, 128)])
def test_dimensions_of_x(shape: tuple[int, ...]) -> None:
    check(torch.randn(shape), make(4, 32))


def test_x_that_is_not_contiguous() -> None:
    check(torch.randn(128, 6).T, make(4, 32))
    check(torch.randn(4, 2, 128).transpose(0, 1), make(3, 32))


@pytest.mark.parametrize("act_order", [False, True])
def test_tiles_cover_all_rows(monkeypatch: pytest.MonkeyPatch, act_order: bool) -> None:
    monkeypatch.setattr(_reference, "_TILE_ELEMENTS", 128 * 5)
    check(torch.randn(3, 128), make(4, 32, rows=24, act_order=act_order))


def test_packed_is_a_copy() -> None:
    qt = make(4, 32)
    x = torch.randn(2, 128)
    packed = backend("reference").pack(qt)
    before = qmm(x, packed, "reference", 4, 32, 24)
    qt.scales.zero_()
    assert torch.equal(qmm(x, packed, "reference", 4, 32, 24), before)


@pytest.mark.parametrize("name", ["reference", "cpu_int4"])
def test_opcheck(name: str) -> None:
    qt = make(4, 32, rows=32)
    for x in (torch.randn(128), torch.randn(3, 128), torch.randn(2, 2, 128)):
        torch.library.opcheck(qmm, (x, backend(name).pack(qt), name, 4, 32, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(128,), (7, 128), (2, 3, 128)])
def test_fake_tensors(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    packed = backend("reference").pack(make(4, 32))
    with FakeTensorMode() as mode:
        x = torch.empty(shape, dtype=dtype)
        fake = [mode.from_tensor(tensor) for tensor in packed]
        y = qmm(x, fake, "reference", 4, 32, 24)
    assert y.shape == (*shape[:-1], 24)
    assert y.dtype == dtype


def test_meta_tensors() -> None:
    packed = [tensor.to("meta") for tensor in backend("reference").pack(make(4, 32))]
    y = qmm(torch.empty(2, 128, device="meta"), packed, "reference", 4, 32, 24)
    assert y.shape == (2, 24) and y.is_meta


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("scheme", ["nf4", "nf4-dq"])
def test_codebook(monkeypatch: pytest.MonkeyPatch, scheme: str, dtype: torch.dtype) -> None:
    monkeypatch.setattr(_codebook, "_TILE_ELEMENTS", 128 * 5)
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(0))
    qt = grid.quantize(weight, Scheme.parse(scheme))
    values = table("nf4").double()[qt.q.int()]
    exact = (values.unflatten(1, (2, 64)) * qt.scales.double()[..., None]).flatten(1)
    for shape in ((128,), (0, 128), (2, 3, 128)):
        x = torch.randn(shape).to(dtype)
        torch.library.opcheck(qmm, (x, backend("codebook").pack(qt), "codebook", 4, 64, 24))
        y, want = call(x, qt, "codebook"), x.double() @ exact.T
        assert y.dtype == dtype and y.shape == want.shape
        assert (y.double() - want).norm() <= TOLERANCE[dtype] * want.norm()


def test_codebook_takes_no_uniform_weight() -> None:
    with pytest.raises(SalienceError, match="kernel codebook takes no w4g32; use reference"):
        backend("codebook").pack(make(4, 32))
    assert not backend("codebook").supports(Scheme(4, 64), CPU, 128, 64)
    assert not backend("codebook").supports(Scheme.parse("nf4"), CPU, 96, 64)


def test_choose() -> None:
    for scheme in ("nf4", "nf4-dq"):
        assert choose(Scheme.parse(scheme), CPU, 256, 64).name == "codebook"
    assert choose(Scheme(4, 128), CPU, 256, 64).name == "cpu_int4"
    assert choose(Scheme(4, 128), CPU, 256, 24).name == "reference"
    assert choose(Scheme(3, 128), CPU, 256, 64).name == "reference"
    assert choose(Scheme(4, 128), torch.device("meta"), 256, 64).name == "reference"
    assert choose(Scheme(8, -1), CPU, 20, 64).name == "reference"
    assert choose(Scheme(3, 11), CPU, 33, 7).name == "reference"


def test_choose_refuses_what_nothing_supports() -> None:
    with pytest.raises(SalienceError, match=r"no kernel supports w3g16 \[64, 40\] on cpu"):
        choose(Scheme(3, 16), CPU, 40, 64)


def test_names() -> None:
    names = [candidate.name for candidate in BACKENDS]
    assert len(set(names)) == len(names)
    assert [backend(name).name for name in names] == names
    with pytest.raises(SalienceError, match="there is no kernel 'nonsense'; use auto or one of"):
        backend("nonsense")
    with pytest.raises(SalienceError, match="nonsense"):
        qmm(torch.zeros(1, 128), backend("reference").pack(make(4, 32)), "nonsense", 4, 32, 24)


def test_unpacking_undoes_packing() -> None:
    weights = [make(4, 32, rows=48), make(3, 32), make(4, -1), make(4, 32, act_order=True)]
    weight = torch.randn(24, 1280, generator=torch.Generator().manual_seed(0))
    weights += [grid.quantize(weight, Scheme.parse(name)) for name in ("nf4", "nf4-dq")]
    tried = set()
    for qt in weights:
        for kernel in BACKENDS:
            supports = kernel.supports(qt.scheme, CPU, qt.in_features, qt.out_features)
            if not supports and (kernel.name != "gpu" or qt.scheme.codebook):
                continue  # the words of a GPU are packed anywhere
            if qt.g_idx is not None and kernel.name != "reference":
                continue
            tried.add(kernel.name)
            got = kernel.unpack(kernel.pack(qt), qt.scheme, qt.in_features, qt.out_features)
            assert torch.equal(got.q, qt.q) and torch.equal(got.scales, qt.scales)
            assert torch.equal(got.zeros, qt.zeros)
            assert (got.g_idx is None) == (qt.g_idx is None)
            if got.g_idx is not None and qt.g_idx is not None:
                assert torch.equal(got.g_idx, qt.g_idx)
            if got.nested is not None and qt.nested is not None:
                assert torch.equal(got.nested.q, qt.nested.q)
                assert got.nested.offset == qt.nested.offset
    assert tried == {kernel.name for kernel in BACKENDS}
