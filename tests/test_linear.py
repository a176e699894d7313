"""QuantLinear against the dense linear it stands for."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from salience import grid, kernels
from salience.errors import SalienceError
from salience.linear import QuantEmbedding, QuantLinear, packed_bytes
from salience.qtensor import QTensor
from salience.scheme import Scheme


def make(scheme: str = "w4g32", rows: int = 32, columns: int = 64) -> QTensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) / 8
    return grid.quantize(weight, Scheme.parse(scheme))


def dense(qt: QTensor, bias: torch.Tensor | None) -> nn.Linear:
    linear = nn.Linear(qt.in_features, qt.out_features, bias is not None)
    linear.weight = nn.Parameter(qt.dequantize(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.float(), requires_grad=False)
    return linear


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64), (100, 64)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kernel", ["reference", "cpu_int4", "auto"])
def test_agrees_with_dense(shape: tuple[int, ...], with_bias: bool, kernel: str) -> None:
    qt = make()
    bias = torch.randn(32).half() if with_bias else None
    x = torch.randn(shape)
    y, want = QuantLinear(qt, bias, kernel)(x), dense(qt, bias)(x)
    assert y.shape == want.shape and y.dtype == torch.float32
    tolerance = 1e-5 if kernel == "reference" else 1e-2
    assert (y - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("scheme", ["w2g16", "w3g32", "w4g64-sym", "w4channel", "w8g32"])
def test_schemes(scheme: str) -> None:
    qt = make(scheme)
    x = torch.randn(3, 64)
    y, want = QuantLinear(qt)(x), dense(qt, None)(x)
    assert (y - want).norm() <= 1e-2 * want.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_result_has_the_dtype_of_x(dtype: torch.dtype) -> None:
    """Also with a bias of another."""
    assert QuantLinear(make(), torch.randn(32))(torch.randn(2, 64, dtype=dtype)).dtype == dtype


def test_bias_is_added() -> None:
    bias = torch.randn(32)
    y = QuantLinear(make(), bias)(torch.zeros(2, 64))
    torch.testing.assert_close(y, bias.expand(2, 32))


@pytest.mark.parametrize("with_bias", [False, True])
def test_compiles_without_a_break(with_bias: bool) -> None:
    linear = QuantLinear(make(), torch.randn(32) if with_bias else None)
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    for tokens in (1, 5):
        x = torch.randn(2, tokens, 64)
        assert torch.equal(compiled(x), linear(x))


def test_state_is_packed() -> None:
    """What stays is the packed weight and the bias, none of it trained."""
    qt = make()
    linear = QuantLinear(qt, torch.randn(32), kernel="reference")
    assert list(linear.parameters()) == []
    buffers = dict(linear.named_buffers())
    assert set(buffers) == {"packed_0", "packed_1", "packed_2", "bias"}
    assert buffers["packed_0"].shape == (32, 64 // 8)
    assert buffers["packed_0"].dtype == torch.int32
    assert set(linear.state_dict()) == set(buffers)
    packed = sum(buffers[name].nbytes for name in buffers if name != "bias")
    assert packed == 32 * 64 // 2 + 32 * 2 * (2 + 1)


def test_state_round_trip() -> None:
    first, second = QuantLinear(make(), torch.randn(32)), QuantLinear(make(), torch.zeros(32))
    second.load_state_dict(first.state_dict())
    x = torch.randn(3, 64)
    assert torch.equal(first(x), second(x))


def test_moves_to_another_device() -> None:
    linear = QuantLinear(make(), torch.randn(32), "reference").to("meta")
    assert all(buffer.is_meta for buffer in linear.buffers())
    assert linear(torch.empty(2, 64, device="meta")).shape == (2, 32)


# Kernel, scheme: each is on one device or on both.
HELD = [(None, "w4g32"), ("reference", "w4g32"), ("cpu_int4", "w4g32"), (None, "w3g32")]
HELD += [(None, "w8g32"), (None, "w2g16"), (None, "w4channel"), (None, "nf4"), (None, "nf4-dq")]


@pytest.mark.parametrize(("kernel", "scheme"), HELD)
@pytest.mark.parametrize("act_order", [False, True])
def test_there_and_back(
    device: torch.device, kernel: str | None, scheme: str, act_order: bool
) -> None:
    """On another kind of device packed for a kernel that is there; the weight is the same."""
    qt = make(scheme)
    if act_order:
        if qt.scheme.codebook or qt.scheme.group_size == -1:
            pytest.skip("has no such order")
        order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
        g_idx = (torch.arange(64) // qt.scheme.group_size)[order].int()
        qt = QTensor(qt.q, qt.scales, qt.zeros, qt.scheme, g_idx)
    bias, x = torch.randn(32), torch.randn(3, 64)
    linear = QuantLinear(qt, bias, kernel or "auto", torch.float16)
    want = (x.double() @ qt.dequantize(torch.float64).T + bias).to(device)
    linear.to(device)
    assert all(buffer.device.type == device.type for buffer in linear.buffers())
    assert kernels.backend(linear.kernel).supports(qt.scheme, device, 64, 32)
    assert linear.weight.device.type == device.type and linear.weight.dtype == torch.float16
    half = torch.float16 if device.type == "cuda" else torch.float32
    y = linear(x.to(device, half))
    assert (y.double() - want).norm() <= 1e-2 * want.norm()
    for there in (linear, linear.half(), linear.to("cpu")):
        found = there.qtensor()
        for name in ("q", "scales", "zeros", *(["g_idx"] if act_order else [])):
            left, right = getattr(found, name).cpu(), getattr(qt, name)
            assert torch.equal(left, right) and left.dtype == right.dtype
    assert (linear(x).double() - want.cpu()).norm() <= 1e-2 * want.norm()


def test_embeddings_there_and_back(device: torch.device) -> None:
    embedding, ids = QuantEmbedding(make(), torch.float32), torch.tensor([[3, 1, 31]])
    want = make().dequantize()[ids]
    assert torch.equal(embedding.to(device)(ids.to(device)).cpu(), want)
    assert embedding.weight.device.type == device.type
    assert torch.equal(embedding.to("cpu")(ids), want)


def test_no_bias() -> None:
    linear = QuantLinear(make())
    assert linear.bias is None
    assert "bias" not in linear.state_dict()


def test_describes_itself() -> None:
    assert "64, 32, w4g32, kernel=cpu_int4" in repr(QuantLinear(make()))
    assert QuantLinear(make("w3g32")).kernel == "reference"


def test_kernel_that_does_not_fit() -> None:
    with pytest.raises(SalienceError, match=r"cpu_int4 does not support w3g32 \[32, 64\] on cpu"):
        QuantLinear(make("w3g32"), kernel="cpu_int4")
    with pytest.raises(SalienceError, match="there is no kernel 'nonsense'"):
        QuantLinear(make(), kernel="nonsense")


@pytest.mark.parametrize("kernel", ["auto", "cpu_int4", "reference"])
@pytest.mark.parametrize("tokens", [(3,), (2, 3), (100,)])
def test_activation_order(kernel: str, tokens: tuple[int, ...]) -> None:
    """Columns of one group are put side by side, so any kernel will do."""
    qt = make()
    g_idx = (torch.arange(64) // 32)[torch.randperm(64)].int()
    moved = QTensor(qt.q, qt.scales, qt.zeros, qt.scheme, g_idx)
    linear = QuantLinear(moved, kernel=kernel)
    assert linear.kernel == ("reference" if kernel == "reference" else "cpu_int4")
    x = torch.randn(*tokens, 64)
    want = x.double() @ moved.dequantize().double().T
    tolerance = 1e-5 if kernel == "reference" else 1e-2
    assert (linear(x) - want).norm() <= tolerance * want.norm()
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), linear(x))


def test_groups_of_many_sizes_take_the_kernel_that_can() -> None:
    qt = make()
    g_idx = (torch.arange(64) % 3 // 2).int()
    moved = QTensor(qt.q, qt.scales, qt.zeros, qt.scheme, g_idx)
    with pytest.raises(SalienceError, match="cpu_int4 takes no act-order weight; use reference"):
        QuantLinear(moved, kernel="cpu_int4")
    linear = QuantLinear(moved)
    assert linear.kernel == "reference"
    x = torch.randn(3, 64)
    want = x @ moved.dequantize().T
    assert (linear(x) - want).norm() <= 1e-5 * want.norm()


def test_weight_says_what_models_ask_of_it() -> None:
    """DeepSeek-V3.2 casts what it gives to a linear to the dtype of its weight."""
    linear = QuantLinear(make(), None, "reference", torch.bfloat16)
    weight = linear.weight
    assert (weight.dtype, weight.shape, weight.ndim) == (torch.bfloat16, (32, 64), 2)
    assert (weight.device.type, weight.is_floating_point()) == ("cpu", True)
    assert linear.to("meta").weight.device.type == "meta"
    assert QuantLinear(make()).weight.dtype == torch.float16, "that of the scales"
    embedding = QuantEmbedding(make(), torch.float32)
    assert (embedding.weight.dtype, embedding.weight.shape) == (torch.float32, (32, 64))
    assert "weight" not in dict(linear.named_parameters()) | linear.state_dict()


@pytest.mark.parametrize(
    "use",
    [
        lambda w: torch.nn.functional.linear(torch.ones(1, 64), w),
        lambda w: w.sum(),
        lambda w: w.float(),
        lambda w: w[0, 0].item(),
        lambda w: w.T @ torch.ones(32, 1),
    ],
)
def test_weight_has_no_values(use: Callable[[torch.Tensor], object]) -> None:
    with pytest.raises(SalienceError, match=r"wants the values of a packed weight; .* keep="):
        use(QuantLinear(make()).weight)
    assert "packed weight [32, 64]" in repr(QuantLinear(make()).weight)


@pytest.mark.parametrize("scheme", ["w4g32", "w3g32", "nf4", "nf4-dq", "w8channel"])
@pytest.mark.parametrize("rows", [48, 1552])
def test_packed_bytes(scheme: str, rows: int, device: torch.device) -> None:
    """From some rows, what all of them take."""
    weight = torch.randn(rows, 64).to(device)
    qt = grid.quantize(weight, Scheme.parse(scheme))
    for kernel in ("auto", None):
        module = QuantLinear(qt) if kernel else QuantEmbedding(qt, torch.float32)
        want = sum(buffer.nbytes for buffer in module.buffers())
        found = packed_bytes(qt.scheme, (rows, 64), device, kernel)
        tables = 0 if kernel is None or qt.nested is None else 2 * qt.nested.table.nbytes + 256
        assert abs(found - want) <= 0.003 * want + tables  # which are not made of rows
