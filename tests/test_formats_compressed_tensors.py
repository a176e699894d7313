"""compressed-tensors' pack-quantized layout, against what compressed-tensors itself packed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from salience.errors import SalienceError
from salience.formats import CompressedTensors, detect_format, get_format, stored_config
from salience.qtensor import QTensor
from salience.scheme import Scheme

FOLDER = Path(__file__).parent / "golden"
FORMAT = CompressedTensors()


def cases(file: str) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(FOLDER / file).items():
        case, _, name = key.rpartition(".")
        found.setdefault(case, {})[name] = tensor
    return found


NEW, OLD = cases("compressed_tensors.safetensors"), cases("compressed_tensors_old.safetensors")
OLD_SCHEMES = {"g_idx": "w4g16"}


def weight(case: dict[str, Tensor], scheme: Scheme) -> QTensor:
    return QTensor(case["codes"], case["group_scales"], case["zeros"], scheme)


@pytest.mark.parametrize("name", NEW)
def test_writes_the_bytes_of_compressed_tensors(name: str) -> None:
    case = NEW[name]
    written = FORMAT.write(weight(case, Scheme.parse(name)))
    assert set(written) == {key for key in case if key.startswith("weight_")}
    for key, tensor in written.items():
        assert tensor.dtype == case[key].dtype and tensor.shape == case[key].shape
        assert tensor.is_contiguous()
        assert torch.equal(tensor, case[key])


@pytest.mark.parametrize(
    ("name", "case"), [*NEW.items(), *((name, case) for name, case in OLD.items())]
)
def test_reads_compressed_tensors(name: str, case: dict[str, Tensor]) -> None:
    """Both packings, and groups in activation order: the codes, and the very weights."""
    scheme = Scheme.parse(OLD_SCHEMES.get(name, name))
    qt = FORMAT.read({key: case[key] for key in case if key in FORMAT.tensors}, scheme)
    assert torch.equal(qt.q, case["codes"])
    assert torch.equal(qt.zeros, case["zeros"])
    assert torch.equal(qt.scales, case["group_scales"])
    assert (qt.g_idx is not None) == (name == "g_idx")
    assert torch.equal(qt.dequantize(case["weight"].dtype), case["weight"])


def test_three_bits_are_dense() -> None:
    assert NEW["w3g32"]["weight_packed"].shape == (12, 64 * 3 // 32)
    assert OLD["w3g32"]["weight_packed"].shape == (44, 7)


def random_weight(rows: int, groups: int, size: int, bits: int, sym: bool, seed: int) -> QTensor:
    random = torch.Generator().manual_seed(seed)
    zeros = torch.randint(2**bits, (rows, groups), generator=random, dtype=torch.uint8)
    return QTensor(
        torch.randint(2**bits, (rows, groups * size), generator=random, dtype=torch.uint8),
        torch.rand(rows, groups, generator=random).half(),
        torch.full_like(zeros, 2 ** (bits - 1)) if sym else zeros,
        Scheme(bits, size, sym=sym),
    )


@settings(deadline=None)
@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 4),
    size=st.integers(1, 40),
    bits=st.integers(2, 8),
    sym=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip(rows: int, groups: int, size: int, bits: int, sym: bool, seed: int) -> None:
    qt = random_weight(rows, groups, size, bits, sym, seed)
    back = FORMAT.read(FORMAT.write(qt), qt.scheme)
    assert torch.equal(back.q, qt.q)
    assert torch.equal(back.zeros, qt.zeros)
    assert torch.equal(back.scales, qt.scales)


def test_groups_in_order_need_no_index() -> None:
    qt = random_weight(4, 2, 8, 4, False, 0)
    for g_idx in (torch.arange(16) // 8, torch.full((16,), -1)):
        tensors = FORMAT.write(qt) | {"weight_g_idx": g_idx.int()}
        assert FORMAT.read(tensors, qt.scheme).g_idx is None


def test_writes_activation_order_as_compressed_tensors_did() -> None:
    """Version 0.17, which had it."""
    case = OLD["g_idx"]
    scheme = Scheme.parse(OLD_SCHEMES["g_idx"])
    stored = {key: case[key] for key in case if key in FORMAT.tensors}
    written = FORMAT.write(FORMAT.read(stored, scheme))
    assert set(written) == set(stored)
    for key, tensor in written.items():
        assert tensor.dtype == stored[key].dtype and torch.equal(tensor, stored[key])


@settings(deadline=None, max_examples=30)
@given(
    groups=st.integers(2, 4), size=st.integers(1, 9), sym=st.booleans(), seed=st.integers(0, 999)
)
def test_activation_order_round_trip(groups: int, size: int, sym: bool, seed: int) -> None:
    qt = random_weight(4, groups, size, 4, sym, seed)
    place = torch.randperm(groups * size, generator=torch.Generator().manual_seed(seed))
    moved = QTensor(qt.q, qt.scales, qt.zeros, qt.scheme, (place // size).int())
    back = FORMAT.read(FORMAT.write(moved), qt.scheme)
    assert torch.equal(back.dequantize(), moved.dequantize())


def test_config_of_activation_order() -> None:
    """The config says so, where there are groups; whole rows have no order, nor index."""
    schemes = {"a": Scheme(4, 64), "b": Scheme(8, -1, sym=True)}
    groups = FORMAT.config(schemes, [], act_order=True)["config_groups"].values()
    assert [g["weights"].get("actorder") for g in groups] == ["group", None]
    assert FORMAT.scheme(FORMAT.config(schemes, [], act_order=True), "a") == schemes["a"]
    groups = FORMAT.config(schemes, [])["config_groups"].values()
    assert all("actorder" not in g["weights"] for g in groups)
    row = random_weight(4, 1, 16, 4, False, 0)
    row = QTensor(row.q, row.scales, row.zeros, Scheme(4, -1), torch.zeros(16).int())
    assert "weight_g_idx" not in FORMAT.write(row)


def group(**changes: Any) -> dict[str, Any]:
    """One config group as llm-compressor writes it, with all its keys."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": 128,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "memoryless_minmax",
        "observer_kwargs": {},
        "scale_dtype": None,
        "zp_dtype": "torch.int8",
    }
    outer = {"targets", "format", "input_activations", "output_activations"} & changes.keys()
    found = {
        "targets": ["Linear"],
        "format": "pack-quantized",
        "input_activations": None,
        "output_activations": None,
    }
    found |= {key: changes[key] for key in outer}
    return {
        **found,
        "weights": weights | {key: changes[key] for key in changes.keys() - outer},
    }


def config(*groups: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "version": "0.19.0",
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "ignore": ["lm_head"],
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        **changes,
    }


def test_scheme() -> None:
    assert FORMAT.scheme(config(group()), "a") == Scheme(4, 128)
    assert FORMAT.scheme(config(group(symmetric=True, num_bits=8)), "a") == Scheme(8, 128, True)
    channel = group(strategy="channel", group_size=None)
    assert FORMAT.scheme(config(channel), "a") == Scheme(4, -1)
    assert FORMAT.scheme(config(group(strategy=None, group_size=-1)), "a") == Scheme(4, -1)
    assert FORMAT.scheme(config(group(strategy=None)), "a") == Scheme(4, 128)


def test_targets_as_upstream_resolves_them() -> None:
    """A name before a pattern, a pattern before a class, patterns anchored at the start only."""
    found = config(
        group(num_bits=2, targets=["Linear"]),
        group(num_bits=3, targets=["re:.*down_proj", "re:model.layers.1.*"]),
        group(num_bits=8, targets=["model.layers.1.down_proj"]),
    )
    bits = {
        "model.layers.0.up_proj": 2,
        "model.layers.0.down_proj": 3,
        "model.layers.0.down_proj_extra": 3,
        "model.layers.1.up_proj": 3,
        "model.layers.1.down_proj": 8,
        "other.model.layers.1.up_proj": 2,
    }
    for name, want in bits.items():
        assert FORMAT.scheme(found, name).bits == want


def test_ignored() -> None:
    with pytest.raises(SalienceError, match="ignores it"):
        FORMAT.scheme(config(group()), "lm_head")
    with pytest.raises(SalienceError, match="ignores it"):
        FORMAT.scheme(config(group(), ignore=["re:.*head"]), "lm_head")
    assert FORMAT.scheme(config(group(), ignore=None), "lm_head").bits == 4


@pytest.mark.parametrize(
    ("found", "match"),
    [
        (config(group(), sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
        (config(group(), transform_config={"config_groups": {"R1": {}}}), "transform_config"),
        (config(group(), sparsity_config="x"), "sparsity_config"),
        (config(group(targets=["re:("])), "'re:\\(', which is no regular expression"),
        (config(group(), ignore=["re:*"]), "'re:\\*', which is no regular expression"),
        (config(group(targets=[3])), "targets and ignore .* must be lists of names"),
        (config(), "no group of quantization_config targets it"),
        (config(group(targets=["re:other"])), "no group of quantization_config targets it"),
        (config(group(), config_groups=None), "no config_groups"),
        (config(group(), config_groups={"W4A16": ["Linear"]}), "W4A16 of .* is a preset"),
        (config(group(format="float-quantized")), "format 'float-quantized' is not supported"),
        (config(group(format=None), format="int-quantized"), "format 'int-quantized'"),
        (config(group(input_activations={"num_bits": 8})), "quantized activations"),
        (config(group(output_activations={"num_bits": 8})), "quantized activations"),
        (config(group(type="float")), "weights of type float are not supported"),
        (config(group(dynamic=True)), "weights of type dynamic int are not supported"),
        (config(group(strategy="block")), "strategy 'block' is not supported"),
        (config(group(strategy=None, group_size=None)), "strategy 'tensor' is not supported"),
        (config(group(num_bits=1)), "num_bits 1 with group_size 128"),
        (config(group(num_bits=None)), "num_bits None"),
        (config(group(group_size="128")), "group_size '128'"),
        (config(group(group_size=0)), "group_size is 0"),
        (config({"targets": ["Linear"], "format": "pack-quantized"}), "without weights"),
    ],
)
def test_scheme_refuses(found: dict[str, Any], match: str) -> None:
    assert detect_format(found) is get_format("compressed-tensors")
    with pytest.raises(SalienceError, match=match):
        FORMAT.scheme(found, "a")


def test_config_of_one_scheme() -> None:
    assert FORMAT.config({"a": Scheme(4, 64), "b": Scheme(4, 64)}, ["lm_head", "c.gate"]) == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "version": "0.18.0",
        "ignore": ["lm_head", "c.gate"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": False,
                    "strategy": "group",
                    "group_size": 64,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
        },
    }
    head = FORMAT.config({"a": Scheme(4, 64), "lm_head": Scheme(4, 64)}, [], ["lm_head"])
    assert head["config_groups"]["group_0"]["targets"] == ["Linear", "lm_head"]


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["m.0.q", "m.0.k", "m.1.q", "m.10.q", "lm_head", "m.0.q.x"]),
        st.sampled_from(["w4g64", "w3g64", "w8channel-sym", "w2g16"]).map(Scheme.parse),
        min_size=1,
    )
)
def test_config_is_read_back(schemes: dict[str, Scheme]) -> None:
    found = FORMAT.config(schemes, ["kept"])
    assert {name: FORMAT.scheme(found, name) for name in schemes} == schemes
    with pytest.raises(SalienceError):
        FORMAT.scheme(found, "kept")


def test_mixed_schemes_name_every_module() -> None:
    """vLLM would find the class of a fused module before the names of its parts."""
    schemes = {"a": Scheme(4, 64), "b": Scheme(8, 64), "c": Scheme(4, 64)}
    groups = FORMAT.config(schemes, [])["config_groups"]
    assert [group["targets"] for group in groups.values()] == [["a", "c"], ["b"]]


def test_check() -> None:
    FORMAT.check({"a": Scheme(3, 64), "b": Scheme(8, -1, sym=True)}, {"a": (5, 64), "b": (1, 7)})
    with pytest.raises(SalienceError, match=r"uniform codes, not .* as a wants; use --format bits"):
        FORMAT.check({"a": Scheme(4, 64, codebook="nf4")}, {"a": (64, 64)})
    with pytest.raises(SalienceError, match="2 to 8 bits, not w1g64 as a wants"):
        FORMAT.check({"a": Scheme(1, 64)}, {"a": (64, 64)})


@pytest.mark.parametrize("name", ["weight_packed", "weight_scale", "weight_shape"])
def test_read_names_what_is_missing(name: str) -> None:
    qt = random_weight(4, 2, 8, 4, True, 0)
    tensors = FORMAT.write(qt)
    del tensors[name]
    with pytest.raises(SalienceError, match=f"tensor {name} is missing"):
        FORMAT.read(tensors, qt.scheme)


def test_only_asymmetric_weights_need_zeros() -> None:
    qt = random_weight(4, 2, 8, 4, False, 0)
    tensors = FORMAT.write(qt)
    del tensors["weight_zero_point"]
    with pytest.raises(SalienceError, match="tensor weight_zero_point is missing"):
        FORMAT.read(tensors, qt.scheme)
    FORMAT.read(tensors, Scheme(4, 8, sym=True))


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("weight_packed", torch.zeros(4, 3, dtype=torch.int32), r"must be int32 \[4, 2\]"),
        ("weight_packed", torch.zeros(4, 2, dtype=torch.int64), "not torch.int64"),
        ("weight_zero_point", torch.zeros(2, 2, dtype=torch.int32), r"int32 \[2, 1\]"),
        ("weight_zero_point", torch.zeros(4, 2, dtype=torch.int8), "not torch.int8"),
        ("weight_scale", torch.zeros(4), "weight_scale a matrix"),
        ("weight_scale", torch.zeros(4, 3), r"int32 \[3, 1\]"),
        ("weight_shape", torch.tensor([4]), "weight_shape must be two numbers"),
        ("weight_shape", torch.tensor([4, 32]), r"must be int32 \[4, 4\]"),
        ("weight_g_idx", torch.arange(4) % 2, r"g_idx must be int32 \[16\]"),
        ("weight_g_idx", torch.zeros(16), "weight_g_idx must be int32 .* not torch.float32"),
        ("weight_g_idx", torch.arange(16), r"groups 0 to 15, the weight has 0 to 1"),
        ("weight_g_idx", torch.arange(16) - 3, r"groups -3 to 12, the weight has 0 to 1"),
    ],
)
def test_read_refuses(name: str, value: Tensor, match: str) -> None:
    qt = random_weight(4, 2, 8, 4, False, 0)
    with pytest.raises(SalienceError, match=match):
        FORMAT.read(FORMAT.write(qt) | {name: value}, qt.scheme)


def test_places_of_the_config() -> None:
    class Config:
        pass

    inner = config(group())
    for found in (
        {"quantization_config": inner},
        {"compression_config": inner},
        {"quantization_config": {"quant_method": "x", "quantization_config": inner}},
    ):
        model_config = Config()
        model_config.__dict__.update(found)
        assert stored_config(model_config) == inner
    assert stored_config(Config()) is None
