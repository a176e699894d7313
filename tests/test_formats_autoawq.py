"""AutoAWQ's gemm layout, against what AutoAWQ itself packed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from salience.errors import SalienceError
from salience.formats import FORMATS, AutoAwq, detect_format, get_format
from salience.qtensor import QTensor
from salience.scheme import Scheme

GOLDEN = Path(__file__).parent / "golden" / "autoawq_gemm.safetensors"
FORMAT = AutoAwq()
# Of a linear with 16 outputs, 64 inputs and groups of 32.
SHAPES = {"qweight": (64, 2), "qzeros": (2, 2), "scales": (2, 16)}


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, Tensor]]:
    cases: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(GOLDEN).items():
        case, _, name = key.rpartition(".")
        cases.setdefault(case, {})[name] = tensor
    return cases


def weight(case: dict[str, Tensor]) -> QTensor:
    group_size = case["codes"].shape[1] // case["zeros"].shape[1]
    return QTensor(case["codes"], case["group_scales"], case["zeros"], Scheme(4, group_size))


@pytest.mark.parametrize("name", ["g64_bias", "g32"])
def test_writes_the_bytes_of_autoawq(golden: dict[str, dict[str, Tensor]], name: str) -> None:
    written = FORMAT.write(weight(golden[name]))
    assert set(written) == FORMAT.tensors
    for key, tensor in written.items():
        peer = golden[name][key]
        assert tensor.dtype == peer.dtype and tensor.shape == peer.shape
        assert tensor.is_contiguous()
        assert tensor.numpy().tobytes() == peer.numpy().tobytes()


@pytest.mark.parametrize("name", ["g64_bias", "g32"])
def test_reads_autoawq(golden: dict[str, dict[str, Tensor]], name: str) -> None:
    want = weight(golden[name])
    qt = FORMAT.read(golden[name], want.scheme)
    assert torch.equal(qt.q, want.q)
    assert torch.equal(qt.zeros, want.zeros)
    assert torch.equal(qt.scales, want.scales)
    assert torch.equal(qt.dequantize(), want.dequantize())


def random_weight(rows: int, groups: int, group_size: int, seed: int) -> QTensor:
    random = torch.Generator().manual_seed(seed)
    shape = (rows, groups * group_size)
    return QTensor(
        torch.randint(16, shape, generator=random, dtype=torch.uint8),
        torch.rand(rows, groups, generator=random).half(),
        torch.randint(16, (rows, groups), generator=random, dtype=torch.uint8),
        Scheme(4, group_size),
    )


@settings(deadline=None)
@given(
    rows=st.integers(1, 6), groups=st.integers(1, 4), size=st.integers(1, 40), seed=st.integers(0)
)
def test_round_trip(rows: int, groups: int, size: int, seed: int) -> None:
    qt = random_weight(8 * rows, groups, size, seed % 2**32)
    back = FORMAT.read(FORMAT.write(qt), qt.scheme)
    assert torch.equal(back.q, qt.q)
    assert torch.equal(back.zeros, qt.zeros)
    assert torch.equal(back.scales, qt.scales)


def test_symmetric_zeros() -> None:
    """Readers want a zeros tensor of 8s, whose word is 0x88888888."""
    qt = random_weight(8, 2, 32, 0)
    sym = QTensor(qt.q, qt.scales, torch.full_like(qt.zeros, 8), Scheme(4, 32, sym=True))
    words = FORMAT.write(sym)["qzeros"].unique().tolist()
    assert [word & 0xFFFFFFFF for word in words] == [0x88888888]


def test_bf16_scales_are_stored_in_fp16() -> None:
    qt = random_weight(8, 2, 32, 0)
    stored = FORMAT.write(QTensor(qt.q, qt.scales.bfloat16(), qt.zeros, qt.scheme))["scales"]
    assert stored.dtype == torch.float16
    assert torch.equal(stored.T.bfloat16(), qt.scales.bfloat16())


def test_config() -> None:
    assert FORMAT.config({"a": Scheme(4, 64)}, ["lm_head"]) == {
        "quant_method": "awq",
        "zero_point": True,
        "group_size": 64,
        "bits": 4,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    kept = ["lm_head", "model.layers.3.mlp.gate"]
    skipped = FORMAT.config({"a": Scheme(4, 64)}, kept)["modules_to_not_convert"]
    assert skipped == ["model.layers.3.mlp.gate"]
    # Symmetric weights store true zeros: without zero_point readers take slower ways or fail.
    assert FORMAT.config({"a": Scheme(4, 64, sym=True)}, [])["zero_point"] is True


@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_config_is_read_back(group_size: int) -> None:
    config = FORMAT.config({"a": Scheme(4, group_size)}, [])
    assert detect_format(config) is get_format("awq")
    assert FORMAT.scheme(config, "any") == Scheme(4, group_size)


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"},
        {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "GEMM"},
        {"quant_method": "awq", "bits": 4, "group_size": 64, "format": "gemm"},
        {"quant_method": "awq", "bits": 4, "group_size": 64},
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"},
    ],
)
def test_detect(config: dict[str, Any]) -> None:
    fmt = detect_format(config)
    assert fmt.name == "awq"
    assert fmt.scheme(config, "any") == Scheme(4, 64)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"quant_method": "magic", "bits": 4, "group_size": 64},
        {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemv"},
        {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemv_fast"},
        {"quant_method": "awq", "bits": 4, "group_size": 64, "format": "marlin"},
    ],
)
def test_detect_refuses(config: dict[str, Any]) -> None:
    assert not any(fmt.detect(config) for fmt in FORMATS)
    with pytest.raises(SalienceError, match="is not one this version reads; it reads awq") as error:
        detect_format(config)
    assert repr(config.get("quant_method")) in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 3},
        {"bits": None},
        {"bits": "4"},
        {"group_size": None},
        {"group_size": "64"},
        {"group_size": 0},
    ],
)
def test_scheme_refuses(changes: dict[str, Any]) -> None:
    with pytest.raises(SalienceError, match=r"bits|group_size"):
        FORMAT.scheme({"quant_method": "awq", "bits": 4, "group_size": 64} | changes, "any")


def check(scheme: Scheme, shapes: dict[str, tuple[int, int]]) -> None:
    FORMAT.check(dict.fromkeys(shapes, scheme), shapes)


def test_check() -> None:
    shapes = {"a": (64, 128), "b": (8, 256)}
    check(Scheme(4, 64), shapes)
    check(Scheme(4, -1), {"a": (64, 128), "b": (8, 128)})
    with pytest.raises(SalienceError, match=r"not w3g64-sym as a wants; use --scheme w4g64-sym,"):
        check(Scheme(3, 64, sym=True), shapes)
    with pytest.raises(SalienceError, match=r"not w3channel as a wants; use --scheme w4channel,"):
        check(Scheme(3, -1), shapes)
    with pytest.raises(SalienceError, match=r"not nf4 as a wants; .* or --format bitsandbytes"):
        check(Scheme(4, 64, codebook="nf4"), shapes)
    with pytest.raises(SalienceError, match="packs 8 outputs a word and b has 12"):
        check(Scheme(4, 64), {"a": (64, 128), "b": (12, 256)})
    with pytest.raises(SalienceError, match="w4channel does not fit linears of different widths"):
        check(Scheme(4, -1), shapes)
    with pytest.raises(SalienceError, match="one scheme for all linears, not w4g32 and w4g64"):
        FORMAT.check({"a": Scheme(4, 64), "b": Scheme(4, 32)}, shapes)


def test_get_format_refuses() -> None:
    with pytest.raises(
        SalienceError, match="there is no format 'magic'; use awq or compressed-tensors or"
    ):
        get_format("magic")


@pytest.mark.parametrize(
    "changes",
    [
        {"qweight": (64, 3)},
        {"qweight": (32, 2)},
        {"qweight": (64,)},
        {"qzeros": (1, 2)},
        {"qzeros": (2, 1)},
        {"scales": (2, 8)},
        {"scales": (16, 2)},
        {"scales": (2,)},
        {"qweight": (0, 2)},
        {"qweight": (64, 0), "qzeros": (2, 0), "scales": (2, 0)},
    ],
    ids=str,
)
def test_read_refuses_shapes(changes: dict[str, tuple[int, ...]]) -> None:
    """Whatever the shapes are, `load` can name the linear."""
    shapes = SHAPES | changes
    tensors = {
        name: torch.zeros(shape, dtype=torch.float16 if name == "scales" else torch.int32)
        for name, shape in shapes.items()
    }
    try:
        qt = FORMAT.read(tensors, Scheme(4, 32))
    except (SalienceError, RuntimeError):
        return
    assert (qt.out_features, qt.in_features) != (16, 64)


@pytest.mark.parametrize("name", ["qweight", "qzeros"])
def test_read_refuses_dtypes(name: str) -> None:
    tensors = {
        key: torch.zeros(shape, dtype=torch.float16 if key == "scales" else torch.int32)
        for key, shape in SHAPES.items()
    }
    FORMAT.read(tensors, Scheme(4, 32))
    tensors[name] = tensors[name].long()
    with pytest.raises(SalienceError, match=f"{name} must be an int32 matrix, not torch.int64"):
        FORMAT.read(tensors, Scheme(4, 32))
