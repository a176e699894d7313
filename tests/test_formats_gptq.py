"""GPTQ's layout, against what GPTQModel itself packed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import salience
from helpers_checkpoint import config_of, dequantized, qtensors, refuse
from salience import methods
from salience.cli.app import main
from salience.errors import SalienceError
from salience.formats import FORMATS, Gptq, detect_format, get_format
from salience.inspection import inspect
from salience.qtensor import QTensor
from salience.scheme import Scheme
from salience.source import open_source
from tiny_models import error, llama_config, logits, make_model, save

GOLDEN = Path(__file__).parent / "golden" / "gptq.safetensors"
V1, V2 = Gptq(), Gptq(version=2)
CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False}
BITS = (2, 3, 4, 8)
# Of a linear with 16 outputs, 64 inputs and groups of 32.
SHAPES = {"qweight": (8, 16), "qzeros": (2, 2), "scales": (2, 16), "g_idx": (64,)}


def word(tensor: Tensor) -> set[int]:
    return {value & 0xFFFFFFFF for value in tensor.flatten().tolist()}


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, Tensor]]:
    cases: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(GOLDEN).items():
        case, _, name = key.rpartition(".")
        cases.setdefault(case, {})[name] = tensor
    return cases


def weight(name: str, case: dict[str, Tensor]) -> QTensor:
    scheme = Scheme(int(name[1]), 32, name.endswith("sym"))
    order = case["order"] if not torch.equal(case["order"], torch.arange(64) // 32) else None
    return QTensor(case["codes"], case["group_scales"], case["zeros"], scheme, order)


GOLDEN_CASES = (
    *("w2_v2", "w3_v2", "w4_v2", "w8_v2", "w4_v2_act_order", "w3_v2_sym", "w4_v1"),
    *("w2_v1_sym", "w3_v1_sym", "w4_v1_sym", "w8_v1_sym"),
)


@pytest.mark.parametrize("name", [n for n in GOLDEN_CASES if n not in ("w3_v2_sym", "w4_v1")])
def test_writes_the_bytes_of_gptqmodel(golden: dict[str, dict[str, Tensor]], name: str) -> None:
    """Version 1 when symmetric, else version 2."""
    written = V1.write(weight(name, golden[name]))
    assert set(written) == V1.tensors
    for key, tensor in written.items():
        peer = golden[name][key]
        assert tensor.dtype == peer.dtype and tensor.shape == peer.shape
        assert tensor.is_contiguous()
        assert tensor.numpy().tobytes() == peer.numpy().tobytes()


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_reads_gptqmodel(golden: dict[str, dict[str, Tensor]], name: str) -> None:
    want = weight(name, golden[name])
    qt = (V1 if "v1" in name else V2).read(golden[name], want.scheme)
    assert torch.equal(qt.q, want.q)
    assert torch.equal(qt.zeros, want.zeros)
    assert torch.equal(qt.scales, want.scales)
    assert (qt.g_idx is None) == (want.g_idx is None)
    assert torch.equal(qt.dequantize(), want.dequantize())


def test_golden_words() -> None:
    """reference/formats.md, section 0."""
    for bits, words in (
        (2, [0xE4E4E4E4] * 2),
        (3, [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
        (4, [0x76543210] * 4),
        (8, [0x03020100, 0x07060504] * 4),
    ):
        codes = (torch.arange(32) % min(2**bits, 8)).to(torch.uint8).expand(32, 32)
        qt = QTensor(codes, torch.ones(32, 1).half(), codes[:, :1].clone(), Scheme(bits, 32))
        stored = V1.write(qt)["qweight"]
        assert [value & 0xFFFFFFFF for value in stored[:, 5].tolist()] == words


def random_weight(
    bits: int, sym: bool, rows: int, groups: int, size: int, act_order: bool, seed: int
) -> QTensor:
    random = torch.Generator().manual_seed(seed)
    columns = groups * size
    zeros = torch.randint(2**bits, (rows, groups), generator=random, dtype=torch.uint8)
    g_idx = None
    if act_order:
        g_idx = (torch.arange(columns) // size)[torch.randperm(columns, generator=random)].int()
    return QTensor(
        torch.randint(2**bits, (rows, columns), generator=random, dtype=torch.uint8),
        torch.rand(rows, groups, generator=random).half(),
        zeros.fill_(2 ** (bits - 1)) if sym else zeros,
        Scheme(bits, size, sym),
        g_idx,
    )


@settings(deadline=None)
@given(
    bits=st.sampled_from(BITS),
    sym=st.booleans(),
    rows=st.integers(1, 3),
    groups=st.integers(1, 4),
    size=st.sampled_from([32, 64]),
    act_order=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip(
    bits: int, sym: bool, rows: int, groups: int, size: int, act_order: bool, seed: int
) -> None:
    qt = random_weight(bits, sym, 32 * rows, groups, size, act_order, seed)
    config = V1.config({"a": qt.scheme}, [], (), act_order)
    fmt = detect_format(config)
    assert fmt.scheme(config, "a") == qt.scheme and config["desc_act"] == act_order
    back = fmt.read(V1.write(qt), qt.scheme)
    assert torch.equal(back.q, qt.q)
    assert torch.equal(back.zeros, qt.zeros)
    assert torch.equal(back.scales, qt.scales)
    in_order = torch.arange(qt.in_features) // size
    assert torch.equal(*(in_order if t.g_idx is None else t.g_idx.long() for t in (back, qt)))


@settings(deadline=None)
@given(
    bits=st.sampled_from(BITS),
    sym=st.booleans(),
    zero=st.integers(0, 255),
    seed=st.integers(0, 2**32 - 1),
)
def test_version_1_never_borrows(bits: int, sym: bool, zero: int, seed: int) -> None:
    """Trap 6 of formats.md: a field of a version 1 file is one less than the middle or the file is
    not written.
    """
    qt = random_weight(bits, sym, 32, 2, 32, False, seed)
    zeros = qt.zeros.clone()
    zeros[seed % 32, seed % 2] = zero % 2**bits
    qt = QTensor(qt.q, qt.scales, zeros, qt.scheme)
    middle = 2 ** (bits - 1)
    if sym and zero % 2**bits != middle:
        refuse(lambda: V1.write(qt), "zero other than", middle, "make it asymmetric")
        return
    assert V1.config({"a": qt.scheme}, [])["checkpoint_format"] == ("gptq" if sym else "gptq_v2")
    fields = sum((middle - 1 if sym else 0) << shift for shift in range(0, 96, bits))
    if sym:
        stored = V1.write(qt)["qzeros"]
        wanted = {(fields >> 32 * i) & 0xFFFFFFFF for i in range(3)}
        assert word(stored) <= wanted
    else:
        assert torch.equal(V2.read(V1.write(qt), qt.scheme).zeros, zeros)


@pytest.mark.parametrize(
    ("bits", "v1", "v2"),
    [
        (2, 0x55555555, 0xAAAAAAAA),
        (4, 0x77777777, 0x88888888),
        (8, 0x7F7F7F7F, 0x80808080),
    ],
)
def test_mislabelled_versions(bits: int, v1: int, v2: int) -> None:
    """vllm#38966: a symmetric checkpoint named "gptq" that stores zeros as version 2 does."""
    qt = random_weight(bits, True, 32, 2, 32, False, 0)
    tensors = V1.write(qt)
    assert word(tensors["qzeros"]) == {v1}
    for stored in (v1, v2):
        for fmt in (V1, V2):
            words = torch.full_like(tensors["qzeros"], stored - 2**32 * (stored >= 2**31))
            back = fmt.read(tensors | {"qzeros": words}, qt.scheme)
            assert torch.equal(back.zeros, qt.zeros)


def test_zeros_that_are_not_symmetric() -> None:
    qt = random_weight(4, True, 32, 2, 32, False, 0)
    tensors = V1.write(qt)
    tensors["qzeros"][1, 2] ^= 1 << 8
    for fmt in (V1, V2):
        refuse(lambda fmt=fmt: fmt.read(tensors, qt.scheme), "must all be 7 (gptq) or 8 (gptq_v2)")  # type: ignore[misc]
    assert V1.read(tensors, Scheme(4, 32)).zeros.unique().tolist() == [7, 8]


@pytest.mark.parametrize("bits", BITS)
def test_asymmetric_version_1(bits: int) -> None:
    """AutoGPTQ stores each zero less one, in its own field."""
    qt = random_weight(bits, False, 32, 2, 32, False, 0)
    qt = QTensor(qt.q, qt.scales, qt.zeros.clamp(min=1), qt.scheme)
    less = QTensor(qt.q, qt.scales, qt.zeros - 1, qt.scheme)
    assert torch.equal(V1.read(V1.write(less), qt.scheme).zeros, qt.zeros)


def test_borrowed_zeros_of_gptqmodel(golden: dict[str, dict[str, Tensor]]) -> None:
    """formats.md, section 3: it decrements whole words, so that z = [0, 8, 15] is [15, 6, 14]."""
    assert 15 in golden["w4_v1"]["zeros"] and 0 in golden["w4_v1"]["zeros"]
    zeros = torch.tensor([0, 8, 15, 1, 1, 1, 1, 1], dtype=torch.uint8)[:, None]
    qt = QTensor(
        torch.zeros(8, 32, dtype=torch.uint8), torch.ones(8, 1).half(), zeros, Scheme(4, 32)
    )
    tensors = V1.write(qt)
    tensors["qzeros"] -= 0x11111111
    assert [(int(tensors["qzeros"]) >> shift) & 15 for shift in (0, 4, 8)] == [15, 6, 14]
    assert torch.equal(V1.read(tensors, qt.scheme).zeros, zeros)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_of_scales(dtype: torch.dtype) -> None:
    qt = random_weight(4, False, 32, 2, 32, True, 0)
    tensors = V1.write(qt)
    assert tensors["scales"].dtype == torch.float16
    back = V2.read(tensors | {"scales": tensors["scales"].to(dtype)}, qt.scheme)
    assert back.scales.dtype == dtype and torch.equal(back.scales, qt.scales.to(dtype))


def test_config() -> None:
    assert V1.config({"a": Scheme(4, 64, True)}, ["lm_head"]) == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 4,
        "group_size": 64,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "pack_dtype": "int32",
    }
    found = V1.config({"a": Scheme(3, 32)}, ["lm_head", "model.layers.3.mlp.gate"], (), True)
    assert (found["checkpoint_format"], found["sym"], found["desc_act"]) == ("gptq_v2", False, True)
    assert found["dynamic"] == {r"-:^model\.layers\.3\.mlp\.gate$": {}}
    # vLLM reads desc_act without groups as false.
    assert V1.config({"a": Scheme(4, -1)}, [], (), True)["desc_act"] is False


@pytest.mark.parametrize("scheme", ["w4g32", "w2g64-sym", "w3channel", "w8g128-sym"])
def test_config_is_read_back(scheme: str) -> None:
    wanted = Scheme.parse(scheme)
    config = V1.config({"a": wanted}, [])
    assert detect_format(config).name == "gptq"
    assert detect_format(config).scheme(config, "any") == wanted


@pytest.mark.parametrize(
    ("changes", "version"),
    [
        ({}, 1),
        ({"checkpoint_format": "gptq"}, 1),
        ({"checkpoint_format": "gptq_v2"}, 2),
        ({"checkpoint_format": "GPTQ_V2"}, 2),
        ({"format": "gptq_v2"}, 2),
        ({"checkpoint_format": None, "format": "gptq"}, 1),
    ],
)
def test_detect(changes: dict[str, Any], version: int) -> None:
    config = CONFIG | changes
    assert [fmt for fmt in FORMATS if fmt.detect(config)] == [Gptq(version)]
    assert detect_format(config).scheme(config, "any") == Scheme(4, 64, True)


def test_each_name_is_listed_once() -> None:
    with pytest.raises(SalienceError, match=r"bitsandbytes-int8 or gptq or gguf or dense$"):
        get_format("magic")
    with pytest.raises(SalienceError, match=r"bitsandbytes-int8, gptq, gguf, awq-gemv"):
        detect_format({"quant_method": "magic"})
    assert get_format("gptq") == V1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint_format": "gptq_p"}, "checkpoint_format 'gptq_p' is another layout"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is another layout"),
        ({"is_marlin_format": True}, "checkpoint_format 'marlin' is another layout"),
        ({"pack_dtype": "int64"}, "pack_dtype 'int64' is not supported; only int32 is"),
        ({"bits": 5}, "bits 5, group_size 64"),
        ({"bits": "4"}, "bits '4', group_size 64"),
        ({"bits": None}, "bits None"),
        ({"group_size": None}, "group_size None"),
        ({"group_size": 0}, "group_size is 0"),
        ({"sym": "yes"}, "sym 'yes'"),
        ({"dynamic": []}, None),
        ({"dynamic": ["a"]}, "dynamic that is no table"),
        ({"dynamic": {"a(": {}}}, "'a(', which is no regular expression"),
        ({"dynamic": {"-:a": {}}}, "keeps it float ('-:a'), yet it is packed"),
        ({"dynamic": {"a": 3}}, "'a' of quantization_config's dynamic is no table"),
        ({"dynamic": {"a": {"bits": 7}}}, "bits 7"),
    ],
)
def test_scheme_refuses(changes: dict[str, Any], message: str | None) -> None:
    config = CONFIG | changes
    if message is None:
        assert detect_format(config).scheme(config, "a") == Scheme(4, 64, True)
    else:
        refuse(lambda: detect_format(config).scheme(config, "a"), message)


def test_exceptions_of_gptqmodel() -> None:
    """Its `dynamic`: the first pattern that matches from the start of the name."""
    table = {
        r"own": {"bits": 2},
        r"-:b\.": {},
        r"+:.*\.down": {"bits": 8},
        r".*\.d": {"group_size": 32, "sym": False},
    }
    config = CONFIG | {"dynamic": table}
    for name, scheme in (
        ("a.up", Scheme(4, 64, True)),
        ("a.down", Scheme(8, 64, True)),
        ("a.deep", Scheme(4, 32)),
    ):
        assert V1.scheme(config, name) == scheme
    refuse(lambda: V1.scheme(config, "b.down"), "keeps it float")


def test_missing_sym_is_symmetric() -> None:
    config = {key: value for key, value in CONFIG.items() if key != "sym"}
    assert V1.scheme(config, "a") == Scheme(4, 64, True)


def check(scheme: str, shapes: dict[str, tuple[int, int]]) -> None:
    V1.check(dict.fromkeys(shapes, Scheme.parse(scheme)), shapes)


def test_check() -> None:
    for scheme, shape in (
        ("w2g64", (16, 64)),
        ("w3g64", (32, 64)),
        ("w4g64", (8, 64)),
        ("w8g64", (4, 64)),
        ("w4channel", (8, 24)),
    ):
        check(scheme, {"a": shape, "b": shape})
    check("w4channel", {"a": (8, 24), "b": (8, 32)})
    for scheme, shape, message in (
        ("w2g4", (8, 16), "2-bit codes of 16 outputs at a time and a has 8"),
        ("w3g8", (32, 40), "3-bit codes of 32 inputs at a time and a has 40"),
        ("w4g4", (12, 32), "4-bit codes of 8 outputs at a time and a has 12"),
        ("w8g2", (4, 30), "8-bit codes of 4 inputs at a time and a has 30"),
        ("w5g64", (32, 64), "not w5g64 as a wants; use --format compressed-tensors"),
        ("nf4", (32, 64), "not nf4 as a wants; use --format bitsandbytes"),
    ):
        refuse(lambda scheme=scheme, shape=shape: check(scheme, {"a": shape}), message)  # type: ignore[misc]
    shapes = {"a": (32, 64), "b": (32, 64)}
    schemes = {"a": Scheme(4, 64), "b": Scheme(8, 32)}
    V1.check(schemes, shapes)
    schemes["b"] = Scheme(4, 64, sym=True)
    refuse(lambda: V1.check(schemes, shapes), "w4g64-sym; use --format compressed-tensors")


def test_several_schemes_are_named_in_dynamic() -> None:
    owner = "model.layers.0.self_attn"
    schemes = {f"{owner}.{part}_proj": Scheme(3, 64) for part in "qkv"}
    schemes |= {f"model.layers.{i}.mlp.up_proj": Scheme(4, 64) for i in range(4)}
    schemes["model.layers.1.mlp.down_proj"] = Scheme(4, -1)
    found = V2.config(schemes, [f"{owner}.o_proj"])
    assert (found["bits"], found["group_size"]) == (4, 64)
    assert all(V2.scheme(found, name) == scheme for name, scheme in schemes.items())
    # What vLLM makes of the three looks for its own name.
    assert V2.scheme(found, f"{owner}.qkv_proj") == Scheme(3, 64)
    refuse(lambda: V2.scheme(found, f"{owner}.o_proj"), "keeps it float")


def zeros_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {
        name: torch.zeros(shape, dtype=torch.float16 if name == "scales" else torch.int32)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"qweight": (8, 24)},
        {"qweight": (4, 16)},
        {"qweight": (8,)},
        {"qweight": (0, 16), "g_idx": (0,)},
        {"qzeros": (1, 2)},
        {"qzeros": (2, 1)},
        {"qzeros": ()},
        {"scales": (2, 8)},
        {"scales": (16, 2)},
        {"scales": (2,)},
        {"g_idx": (32,)},
        {"g_idx": (64, 1)},
        {"qweight": (8, 0), "qzeros": (2, 0), "scales": (2, 0)},
    ],
    ids=str,
)
def test_read_refuses_shapes(changes: dict[str, tuple[int, ...]]) -> None:
    """Whatever the shapes are, `load` can name the linear."""
    assert V2.read(zeros_of(SHAPES), Scheme(4, 32)).q.shape == (16, 64)
    try:
        qt = V2.read(zeros_of(SHAPES | changes), Scheme(4, 32))
    except (SalienceError, RuntimeError):
        return
    assert (qt.out_features, qt.in_features) != (16, 64)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("qweight", torch.zeros(8, 16).long(), "qweight must be an int32 matrix, not torch.int64"),
        ("qzeros", torch.zeros(2, 2).half(), "qzeros must be an int32 matrix, not torch.float16"),
        ("scales", torch.zeros(2, 16).int(), "scales must be float"),
        ("g_idx", torch.zeros(64), "g_idx must be int32 [64], not torch.float32"),
        ("g_idx", torch.full((64,), 2).int(), "g_idx has groups 2 to 2, the weight has 0 to 1"),
        ("g_idx", torch.full((64,), -1).int(), "g_idx has groups -1 to -1, the weight has 0 to 1"),
        *((name, None, f"tensor {name} is missing") for name in SHAPES),
    ],
)
def test_read_refuses(name: str, value: Tensor | None, message: str) -> None:
    tensors = zeros_of(SHAPES) | {name: value}
    found = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    refuse(lambda: V2.read(found, Scheme(4, 32)), message)


def test_words_that_hold_no_whole_number_of_codes() -> None:
    tensors = zeros_of({"qweight": (4, 32), "qzeros": (1, 3), "scales": (1, 32), "g_idx": (32,)})
    refuse(lambda: V2.read(tensors, Scheme(3, 32)), "qweight [4, 32] does not hold a whole number")


# Whole checkpoints.


@pytest.fixture(scope="module")
def float_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = llama_config(num_hidden_layers=2)
    return save(make_model(config), tmp_path_factory.mktemp("gptq"))


def quantize(model: Path, out: Path, text: Path, **options: Any) -> Any:
    calibration = salience.Calibration(str(text), samples=4, seqlen=64)
    return salience.quantize(
        str(model), out, format="gptq", method="gptq", calibration=calibration, **options
    )


def dense_logits(folder: Path) -> Tensor:
    dense = make_model(llama_config(num_hidden_layers=2))
    dense.load_state_dict(dequantized(folder))
    return logits(dense)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scheme", ["w2g32-sym", "w3g32", "w4g32", "w4g64-sym", "w8channel"])
def test_quantized_and_loaded(
    float_llama: Path, text_file: Path, tmp_path: Path, scheme: str, act_order: bool
) -> None:
    out = tmp_path / "out"
    report = quantize(float_llama, out, text_file, scheme=scheme, act_order=act_order)
    assert report.options.get("act_order", False) == act_order and report.error <= report.error_rtn
    config = config_of(out)["quantization_config"]
    assert json.loads((out / "quantize_config.json").read_text()) == config
    grouped = act_order and "channel" not in scheme
    assert config["desc_act"] == grouped
    coded = qtensors(out)
    assert len(coded) == 14 and any(qt.g_idx is not None for qt in coded.values()) == grouped
    for block in ("model.layers.0.", "model.layers.1."):
        # vLLM fuses these, and gives the fused linear one g_idx.
        for parts in (
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            ["mlp.up_proj", "mlp.gate_proj"],
        ):
            found = [coded[block + part].g_idx for part in parts]
            assert len({None if g is None else tuple(g.tolist()) for g in found}) == 1
    want = dense_logits(out)
    for kernel, most in (("reference", 1e-5), ("auto", 5e-3)):
        assert error(logits(salience.load(out, kernel=kernel)), want) < most
    looked = inspect(open_source(str(out)))
    assert (looked.format, looked.scheme) == ("gptq", scheme)


def test_act_order_that_loses_falls_back_for_all_linears_of_an_input(
    float_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They keep one g_idx even where plain rounding is better for one of them."""

    def spoiled(problem: Any, grids: Any) -> list[QTensor]:
        found = methods.gptq.compensate_in_order(problem, grids)
        rows = problem.rows[0]
        for qt in found:
            if len(problem.rows) == 3:
                qt.q[:rows] = 0
        return found

    monkeypatch.setattr(methods, "GPTQ_G_IDX", replace(methods.GPTQ_G_IDX, codes=spoiled))
    report = quantize(float_llama, tmp_path / "out", text_file, scheme="w4g32", act_order=True)
    kept = {linear.name.rpartition(".")[2]: linear.kept_rtn for linear in report.linears}
    assert [n for n, plain in kept.items() if plain] == ["q_proj", "k_proj", "v_proj"]
    for name, qt in qtensors(tmp_path / "out").items():
        assert (qt.g_idx is None) == kept[name.rpartition(".")[2]]


def test_some_linears_stay_float(float_llama: Path, text_file: Path, tmp_path: Path) -> None:
    quantize(float_llama, tmp_path / "out", text_file, scheme="w4g32", skip=["down_proj"])
    config = config_of(tmp_path / "out")["quantization_config"]
    assert config["dynamic"] == {rf"-:^model\.layers\.{i}\.mlp\.down_proj$": {} for i in range(2)}
    assert error(logits(salience.load(tmp_path / "out")), dense_logits(tmp_path / "out")) < 5e-3


@pytest.fixture(scope="module")
def written(float_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("written") / "out"
    quantize(float_llama, out, text_file, scheme="w4g32-sym", act_order=True)
    return out


def test_command_line(
    float_llama: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """plan, quantize, inspect and eval, without --act-order (trap 7 of formats.md: its default) and
    with it.
    """
    options = ["--method", "gptq", "--format", "gptq", "--scheme", "w4g32"]
    text = ["--calibration", str(text_file), "--samples", "2", "--seqlen", "32"]

    def run(*args: object) -> dict[str, Any]:
        monkeypatch.setattr("sys.argv", ["salience", *map(str, args), "--json"])
        try:
            main()
        except SystemExit as stopped:
            assert not stopped.code, capsys.readouterr().err
        return dict(json.loads(capsys.readouterr().out))

    for flags in ([], ["--act-order"]):
        out = tmp_path / f"out{len(flags)}"
        assert run("plan", float_llama, *options, *flags)["scheme"] == "w4g32"
        report = run("quantize", float_llama, "-o", out, *options, *flags, *text)
        assert (report["format"], report["method"]) == ("gptq", "gptq")
        assert config_of(out)["quantization_config"]["desc_act"] == bool(flags)
        assert any(qt.g_idx is not None for qt in qtensors(out).values()) == bool(flags)
        seen = run("inspect", out)
        assert (seen["format"], seen["scheme"], len(seen["modules"])) == ("gptq", "w4g32", 14)
        found = run("eval", out, "--text", text_file, "--context", 64, "--max-chunks", 1)
        assert 1 < found["perplexity"] < 1e9


def test_files_of_autogptq(written: Path, tmp_path: Path) -> None:
    """gptq_model-*.safetensors, the config in quantize_config.json alone, without a method."""
    tensors = load_file(written / "model.safetensors")
    # AutoGPTQ#555: biases of zeros where the model has none.
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64).half()
    save_file(tensors, tmp_path / "gptq_model-4bit-32g.safetensors")
    config = config_of(written)
    own = config.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(config))
    beside = tmp_path / "quantize_config.json"
    early = {key: own[key] for key in ("bits", "group_size", "desc_act", "sym")}
    beside.write_text(json.dumps(early | {"damp_percent": 0.01, "model_file_base_name": None}))
    want = logits(salience.load(written))
    assert torch.equal(logits(salience.load(tmp_path)), want)
    assert inspect(open_source(str(tmp_path))).format == "gptq"
    beside.write_text("[]")
    refuse(lambda: salience.load(tmp_path), "quantize_config.json should hold a JSON object")


def test_errors_name_the_linear(written: Path, tmp_path: Path) -> None:
    tensors = load_file(written / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    for key, value, message in (
        (f"{name}.g_idx", None, "tensor g_idx is missing"),
        (f"{name}.qzeros", tensors[f"{name}.qzeros"] + 2, "must all be 7"),
        (f"{name}.qweight", tensors[f"{name}.qweight"][:4].clone(), "g_idx must be int32 [32]"),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        changed = {k: t for k, t in (tensors | {key: value}).items() if t is not None}
        save_file(changed, folder / "model.safetensors")
        (folder / "config.json").write_text((written / "config.json").read_text())
        refuse(lambda folder=folder: salience.load(folder), f"linear {name} of {folder}", message)  # type: ignore[misc]


def test_act_order_is_refused_where_it_has_no_place(
    float_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    calibration = salience.Calibration(str(text_file), samples=2, seqlen=32)
    out = tmp_path / "out"
    for options, message in (
        ({"method": "gptq"}, "--format awq has no place for the groups of --act-order; use --form"),
        ({"format": "gptq"}, "--act-order is for --method gptq, not awq"),
        ({"format": "gptq", "effort": "balanced"}, "--act-order is for --method gptq, not awq"),
        ({"method": "rtn", "format": "gptq"}, "--act-order is for --method gptq, not rtn"),
        (
            {"method": "gptq", "format": "gptq", "save_search": tmp_path / "s"},
            "leave --save-search and --from-search away",
        ),
    ):
        refuse(
            lambda options=options: salience.quantize(  # type: ignore[misc]
                str(float_llama),
                out,
                act_order=True,
                scheme="w4g32",
                calibration=calibration,
                **options,
            ),
            message,
        )
    assert not list(tmp_path.iterdir())
