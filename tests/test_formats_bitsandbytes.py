"""bitsandbytes' NF4 and FP4 tensors and rounding, against what bitsandbytes itself made."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from salience import grid
from salience.errors import SalienceError
from salience.formats import BitsAndBytes, detect_format, get_format
from salience.scheme import Scheme

FOLDER = Path(__file__).parent / "golden"
FORMAT = BitsAndBytes()
NF4_CASES, MORE_CASES = "bitsandbytes_nf4.safetensors", "bitsandbytes_fp4.safetensors"
STATE = "weight.quant_state.bitsandbytes__nf4"
NF4, NF4_DQ = Scheme.parse("nf4"), Scheme.parse("nf4-dq")


def cases(file: str) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(FOLDER / file).items():
        case, _, name = key.partition(".")
        found.setdefault(case, {})[name] = tensor
    return found


CASES = cases(NF4_CASES) | cases(MORE_CASES)


def stored(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in CASES[name].items() if key.startswith("weight")}


def scheme(name: str) -> Scheme:
    """Of a case named by its scheme, or by a dtype when it is NF4."""
    if name[:3] in ("nf4", "fp4"):
        return Scheme.parse(name)
    return NF4_DQ if name.endswith("-dq") else NF4


def config_scheme(name: str) -> Scheme:
    """What the config says of it: no block size."""
    return replace(scheme(name), group_size=64)


def state_of(name: str) -> str:
    return f"weight.quant_state.bitsandbytes__{scheme(name).codebook}"


def fields(state: Tensor) -> dict[str, Any]:
    return json.loads(bytes(state.tolist()))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CASES)
def test_rounds_and_writes_as_bitsandbytes(name: str) -> None:
    """From a weight of any dtype: the same codes, scales and nested codes."""
    case, peer, state = CASES[name], stored(name), state_of(name)
    written = FORMAT.write(grid.quantize(case["float"], scheme(name)))
    assert set(written) == set(peer)
    for key in set(peer) - {state}:
        assert written[key].dtype == peer[key].dtype
        assert torch.equal(written[key], peer[key]), key
    # We do not know the weight's former dtype; it says what bitsandbytes dequantizes to.
    assert fields(written[state]) == fields(peer[state]) | {"dtype": "float16"}
    if case["float"].dtype == torch.float16:
        assert torch.equal(written[state], peer[state])


@pytest.mark.parametrize("name", CASES)
def test_reads_bitsandbytes(name: str) -> None:
    qt = FORMAT.read(stored(name), config_scheme(name))
    want = CASES[name]["dequantized"]
    assert qt.scheme == scheme(name)
    assert torch.equal(qt.dequantize(want.dtype), want)
    assert (qt.nested is not None) == name.endswith("-dq")


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_quantized_twice(name: str) -> None:
    written, peer = FORMAT.write(FORMAT.read(stored(name), config_scheme(name))), stored(name)
    for key in set(peer) - {state_of(name)}:
        assert torch.equal(written[key], peer[key]), key


def test_both_zeros_of_fp4_are_kept() -> None:
    """Codes 0 and 8, which other encoders use by sign."""
    tensors = stored("fp4")
    data = torch.arange(256, dtype=torch.uint8).repeat(2)[: len(tensors["weight"])]
    tensors["weight"] = data[:, None]
    qt = FORMAT.read(tensors, Scheme.parse("fp4"))
    assert torch.equal(FORMAT.write(qt)["weight"], tensors["weight"])
    values = tensors["weight.quant_map"].double()
    codes = torch.stack([data >> 4, data & 15], -1).view(6, 128).long()
    scales = tensors["weight.absmax"].view(6, 2).repeat_interleave(64, 1).double()
    assert torch.equal(qt.dequantize(torch.float32), (values[codes] * scales).float())


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 40),
    size=st.sampled_from([32, 64, 128]),
    kind=st.sampled_from(["nf4", "fp4"]),
    nested=st.booleans(),
    seed=st.integers(0, 99),
)
def test_round_trip(rows: int, groups: int, size: int, kind: str, nested: bool, seed: int) -> None:
    weight = torch.randn(rows, size * groups, generator=torch.Generator().manual_seed(seed))
    qt = grid.quantize(weight, Scheme(4, size, codebook=kind, double_quant=nested))
    back = FORMAT.read(FORMAT.write(qt), replace(qt.scheme, group_size=64))
    assert back.scheme == qt.scheme
    assert torch.equal(back.q, qt.q)
    assert torch.equal(back.scales, qt.scales)
    assert torch.equal(back.dequantize(), qt.dequantize())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_any_storage_dtype(dtype: torch.dtype) -> None:
    """Sharded training stores the codes as if they were floats."""
    tensors = stored("fp16")
    want = FORMAT.read(tensors, NF4)
    tensors["weight"] = tensors["weight"].flatten().view(dtype)[:, None]
    assert torch.equal(FORMAT.read(tensors, NF4).q, want.q)


@pytest.mark.parametrize("scheme", [NF4, NF4_DQ, Scheme.parse("fp4"), Scheme.parse("fp4-dq")])
def test_config(scheme: Scheme) -> None:
    """What Transformers 5.23 writes, with the modules that stay float named."""
    config = FORMAT.config({"a": scheme}, ["lm_head"])
    assert config == {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": "float16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": scheme.codebook,
        "bnb_4bit_use_double_quant": scheme.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": ["lm_head"],
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
    assert FORMAT.config({"a": scheme}, [])["llm_int8_skip_modules"] is None
    assert detect_format(config) is get_format("bitsandbytes")
    assert FORMAT.scheme(config, "any") == scheme


def test_scheme_refuses() -> None:
    config = FORMAT.config({"a": NF4}, [])
    with pytest.raises(SalienceError, match="bnb_4bit_quant_type 'int4'; nf4 and fp4 are read"):
        FORMAT.scheme(config | {"bnb_4bit_quant_type": "int4"}, "a")
    del config["bnb_4bit_quant_type"]  # bitsandbytes' default
    assert FORMAT.scheme(config, "a") == Scheme.parse("fp4")


def test_check() -> None:
    shapes = {"a": (3, 64), "b": (5, 128)}
    FORMAT.check({"a": NF4, "b": NF4}, shapes)
    with pytest.raises(SalienceError, match="holds nf4 and fp4, not w4g64 as b wants"):
        FORMAT.check({"a": NF4, "b": Scheme(4, 64)}, shapes)
    with pytest.raises(SalienceError, match="one scheme for all linears, not nf4 and nf4-dq"):
        FORMAT.check({"a": NF4, "b": NF4_DQ}, shapes)
    FORMAT.check({"a": NF4, "b": Scheme.parse("nf4g128")}, shapes)
    with pytest.raises(SalienceError, match="has no blocks of 48, as a wants; use one of 32, 64"):
        FORMAT.check({"a": Scheme.parse("nf4g48")}, shapes)
    with pytest.raises(SalienceError, match="one scheme for all linears, not fp4 and nf4"):
        FORMAT.check({"a": NF4, "b": Scheme.parse("fp4g128")}, shapes)


def encoded(**changes: object) -> Tensor:
    state = fields(stored("fp16-dq")[STATE]) | changes
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("weight", torch.zeros(5, 1, dtype=torch.uint8), "weight of a 87 x 192 weight holds 5"),
        ("weight.absmax", torch.zeros(9, dtype=torch.uint8), "weight.absmax of a 87 x 192 .* 9"),
        ("weight.absmax", torch.zeros(261), "weight.absmax is torch.float32"),
        ("weight.quant_map", torch.zeros(16), "weight.quant_map is not the table of nf4"),
        ("weight.nested_absmax", torch.zeros(3), "nested_absmax"),
        ("weight.nested_quant_map", torch.zeros(16), "nested_quant_map"),
        (STATE, torch.tensor([123], dtype=torch.uint8), "not readable as JSON"),
        (STATE, torch.tensor([255], dtype=torch.uint8), "not readable as JSON"),
        (STATE, torch.tensor([91, 93], dtype=torch.uint8), "is not of quant_type nf4"),
        (STATE, encoded(blocksize=128), "group size 128 does not divide in_features 192"),
        (STATE, encoded(blocksize=32), "weight.absmax of a 87 x 192 weight holds 261 values"),
        (STATE, encoded(blocksize=48), "is of blocksize 48, which there is not"),
        (STATE, encoded(blocksize=None), "is of blocksize None, which there is not"),
        (STATE, encoded(quant_type="fp4"), "is not of quant_type nf4"),
        (STATE, encoded(nested_blocksize=128), "is not of nested_blocksize 256"),
        (STATE, encoded(shape=[87]), "no shape of two numbers"),
        (STATE, encoded(shape=None), "no shape of two numbers"),
        (STATE, encoded(nested_offset=None), "or no nested_offset"),
        (STATE, encoded(shape=[192, 87]), "group size 64 does not divide in_features 87"),
    ],
)
def test_read_refuses(name: str, value: Tensor, match: str) -> None:
    with pytest.raises(SalienceError, match=match):
        FORMAT.read(stored("fp16-dq") | {name: value}, NF4_DQ)


@pytest.mark.parametrize("name", [*stored("fp16-dq")])
def test_read_names_what_is_missing(name: str) -> None:
    tensors = stored("fp16-dq")
    del tensors[name]
    with pytest.raises(SalienceError, match=f"tensor {name} is missing"):
        FORMAT.read(tensors, NF4_DQ)


def test_nesting_that_the_config_denies() -> None:
    with pytest.raises(
        SalienceError, match=r"weight.absmax is torch.uint8, which does not fit nf4"
    ):
        FORMAT.read(stored("fp16-dq"), NF4)
