"""The layouts of AWQ that are only read, against what AutoAWQ packed and against closed forms."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import salience
from helpers_awq import pack, pack_fast, repacked
from helpers_checkpoint import config_of, dequantized, refuse
from salience.calibration import Calibration
from salience.errors import SalienceError
from salience.formats import AwqGemv, AwqGemvFast, LlmAwq, Reader, detect_format, get_format
from salience.inspection import inspect
from salience.packing import unpack_awq_fast
from salience.qtensor import QTensor
from salience.scheme import Scheme
from salience.source import open_source
from tiny_models import error, llama_config, logits, make_model, random_tokens

GOLDEN = Path(__file__).parent / "golden" / "autoawq_gemv.safetensors"
READERS: dict[str, Reader] = {"gemv": AwqGemv(), "gemv_fast": AwqGemvFast(), "llm-awq": LlmAwq()}


def golden() -> dict[str, dict[str, Tensor]]:
    """AutoAWQ's cases, and those of gemv_fast under llm-awq's names: its packer is the same one."""
    cases: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(GOLDEN).items():
        case, _, name = key.rpartition(".")
        cases.setdefault(case, {})[name] = tensor
    for case in [case for case in cases if "fast" in case]:
        renamed = dict(cases[case])
        renamed["scaled_zeros"] = renamed.pop("qzeros")
        cases[case.replace("gemv_fast", "llm-awq")] = renamed
    return cases


CASES = golden()


def reader(case: str) -> tuple[Reader, Scheme]:
    kind, _, group_size = case.rpartition("_g")
    return READERS[kind], Scheme(4, int(group_size))


def random_weight(
    rows: int, groups: int, size: int, seed: int, dtype: torch.dtype = torch.float16
) -> QTensor:
    random = torch.Generator().manual_seed(seed)
    return QTensor(
        torch.randint(16, (rows, groups * size), generator=random, dtype=torch.uint8),
        (torch.rand(rows, groups, generator=random) * 0.1 + 1e-6).to(dtype),
        torch.randint(16, (rows, groups), generator=random, dtype=torch.uint8),
        Scheme(4, size),
    )


def same(a: QTensor, b: QTensor) -> None:
    for got, want in ((a.q, b.q), (a.zeros, b.zeros), (a.scales, b.scales)):
        assert torch.equal(got, want) and got.dtype == want.dtype


@pytest.mark.parametrize("name", CASES)
def test_reads_autoawq(name: str) -> None:
    case, (form, scheme) = CASES[name], reader(name)
    qt = form.read({key: case[key] for key in form.tensors}, scheme)
    same(qt, QTensor(case["codes"], case["group_scales"], case["zeros"], scheme))


@pytest.mark.parametrize("name", CASES)
def test_the_packers_of_these_tests_are_autoawqs(name: str) -> None:
    case, (form, scheme) = CASES[name], reader(name)
    weight = QTensor(case["codes"], case["group_scales"], case["zeros"], scheme)
    packed = pack(name.rpartition("_g")[0], weight)
    assert set(packed) == form.tensors
    for key, tensor in packed.items():
        assert tensor.dtype == case[key].dtype and torch.equal(tensor, case[key])


def test_words_of_gemv_fast() -> None:
    """The golden vector of the reference: q[n, k] = (k + n) % 16."""
    codes = ((torch.arange(64) + torch.arange(4)[:, None]) % 16).to(torch.uint8)
    ones, zeros = torch.ones(4, 1).half(), torch.zeros(4, 1, dtype=torch.uint8)
    words = pack_fast(QTensor(codes, ones, zeros, Scheme(4, 64)), 64, "qzeros")["qweight"]
    assert [int(w) & 0xFFFF for w in words[0, :4]] == [0x8080, 0x9191, 0xA2A2, 0xB3B3]
    assert [int(words[0, i]) & 0xFFFF for i in (8, 16)] == [0x8080, 0x9191]
    assert torch.equal(unpack_awq_fast(words), codes)


@settings(deadline=None, max_examples=30)
@given(
    kind=st.sampled_from([*READERS]),
    rows=st.integers(1, 3),
    columns=st.integers(1, 4),
    size=st.sampled_from([32, 64, 128, 256, -1]),
    bf16=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip(kind: str, rows: int, columns: int, size: int, bf16: bool, seed: int) -> None:
    """Zeros come back from their rounded products, in bf16 too."""
    width = 256 * columns
    groups = 1 if size == -1 else width // size
    dtype = torch.bfloat16 if bf16 else torch.float16
    weight = random_weight(8 * rows, groups, width // groups, seed, dtype)
    weight = QTensor(weight.q, weight.scales, weight.zeros, Scheme(4, size))
    same(READERS[kind].read(pack(kind, weight), weight.scheme), weight)


def test_a_scale_of_zero() -> None:
    """A group of nothing but zeros, as some tools write it."""
    weight = random_weight(8, 2, 64, 0)
    weight.scales[3, 1] = 0
    qt = LlmAwq().read(pack("llm-awq", weight), weight.scheme)
    assert qt.zeros[3, 1] == 0 and torch.equal(qt.dequantize()[3, 64:], torch.zeros(64))


Change = tuple[str, str, Any, str]
REFUSED: list[Change] = [
    ("gemv", "qweight", torch.zeros(8, 8, dtype=torch.int64), "qweight must be an int32 matrix"),
    ("gemv", "qweight", torch.zeros(8, dtype=torch.int32), "qweight must be an int32 matrix"),
    ("gemv", "qweight", torch.zeros(0, 8, dtype=torch.int32), "qweight must be an int32 matrix"),
    ("gemv", "qweight", torch.zeros(8, 12, dtype=torch.int32), "64 does not divide in_features 96"),
    ("gemv", "qzeros", torch.zeros(8, 1, dtype=torch.int32), r"qzeros must be int32 \[8, 2\]"),
    ("gemv", "qzeros", torch.zeros(8, 2), "qzeros must be int32"),
    ("gemv", "scales", torch.zeros(8, 8).half(), r"scales must be float16 or bfloat16 \[8, 16\]"),
    ("gemv", "scales", torch.zeros(8, 16).int(), "scales must be float16"),
    ("gemv_fast", "qweight", torch.zeros(2, 128).int(), "qweight must be an int16 matrix"),
    ("gemv_fast", "qzeros", torch.zeros(8, 8).half(), r"qzeros must be .* \[16, 8\]"),
    ("gemv_fast", "qzeros", torch.zeros(16, 8).int(), "qzeros must be float16 or bfloat16"),
    ("gemv_fast", "scales", torch.ones(16, 8).half(), "scales has 16 groups, not the 2 of"),
    ("llm-awq", "scales", torch.zeros(8, 16).half(), r"scales must be .* \[16, 8\]"),
    ("llm-awq", "scaled_zeros", torch.full((16, 8), -99.0).half(), "scaled_zeros / scales of out"),
    ("llm-awq", "scaled_zeros", torch.full((16, 8), math.nan).half(), "group 0 is nan, not a zero"),
    ("llm-awq", "scaled_zeros", torch.full((16, 8), -math.inf).half(), "group 0 is -inf, not a"),
    ("llm-awq", "scaled_zeros", torch.full((16, 8), 1e-3).half(), "not a zero of 0 to 15"),
]


@pytest.mark.parametrize(("kind", "name", "value", "match"), REFUSED)
def test_read_refuses(kind: str, name: str, value: Tensor, match: str) -> None:
    weight = random_weight(8, 2, 64, 0)
    tensors = pack(kind, weight)
    READERS[kind].read(tensors, weight.scheme)
    with pytest.raises(SalienceError, match=match):
        READERS[kind].read(tensors | {name: value}, weight.scheme)


@pytest.mark.parametrize("kind", READERS)
def test_read_names_what_is_missing(kind: str) -> None:
    weight = random_weight(8, 2, 64, 0)
    for name in READERS[kind].tensors:
        tensors = pack(kind, weight)
        del tensors[name]
        with pytest.raises(SalienceError, match=f"tensor {name} is missing"):
            READERS[kind].read(tensors, weight.scheme)


def test_the_half_of_a_zero_is_no_zero() -> None:
    weight = random_weight(8, 2, 64, 0)
    tensors = pack("gemv_fast", weight)
    tensors["qzeros"][1, 5] = -3.5 * tensors["scales"][1, 5]
    with pytest.raises(SalienceError, match=r"qzeros / scales of output 5, group 1 is -3.5"):
        AwqGemvFast().read(tensors, weight.scheme)


@pytest.mark.parametrize("kind", READERS)
def test_small_groups_are_refused(kind: str) -> None:
    """AutoAWQ has no layout for these."""
    weight = random_weight(8, 4, 64, 0)
    with pytest.raises(SalienceError, match="group size 16 is not one of this layout"):
        READERS[kind].read(pack(kind, weight), Scheme(4, 16))


def test_they_are_not_written() -> None:
    for form in READERS.values():
        with pytest.raises(
            SalienceError, match=f"format {form.name} is read, not written; use awq"
        ):
            get_format(form.name)


@pytest.fixture(scope="module")
def gemm(llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gemm") / "out"
    text = Calibration(str(text_file), samples=2, seqlen=64)
    salience.quantize(str(llama), out, method="rtn", scheme="w4g32", calibration=text)
    return out


def configure(folder: Path, **changes: Any) -> None:
    config = config_of(folder)
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def check_same(folder: Path, gemm: Path, name: str) -> None:
    """The model computes what the gemm one does, and what its dequantized weights do."""
    source, tokens = open_source(str(folder)), random_tokens()
    assert inspect(source).format == name
    assert inspect(source).scheme == "w4g32"
    ours = logits(salience.load(folder, "cpu"), tokens)
    assert torch.equal(ours, logits(salience.load(gemm, "cpu"), tokens))
    dense = make_model(llama_config())
    dense.load_state_dict(dequantized(gemm))
    assert error(ours, logits(dense, tokens)) < 1e-3


@pytest.mark.parametrize("kind", ["gemv", "gemv_fast", "llm-awq"])
def test_loads(gemm: Path, kind: str, tmp_path: Path) -> None:
    tensors = repacked(gemm, tmp_path / "out", kind)
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    configure(
        tmp_path / "out", **({"backend": kind} if kind == "llm-awq" else {"version": kind.upper()})
    )
    check_same(tmp_path / "out", gemm, READERS[kind].name)


@pytest.mark.parametrize("split", [False, True])
def test_loads_a_v2_file(gemm: Path, split: bool, tmp_path: Path) -> None:
    """llm-awq's own file, or the folder `split_ckpt` makes of it, beside the float config."""
    tensors = repacked(gemm, tmp_path / "out", "llm-awq")
    config = config_of(gemm)
    del config["quantization_config"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    if split:
        for name, tensor in tensors.items():
            torch.save(tensor, tmp_path / "out" / f"{name}.pt")
    else:
        torch.save(tensors, tmp_path / "out" / "llama-w4-g32-awq-v2.pt")
    check_same(tmp_path / "out", gemm, "llm-awq")


def test_a_v2_file_is_no_source_to_quantize(gemm: Path, tmp_path: Path) -> None:
    tensors = repacked(gemm, tmp_path / "in", "llm-awq")
    config = config_of(gemm)
    del config["quantization_config"]
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    torch.save(tensors, tmp_path / "in" / "m-v2.pt")
    refuse(
        lambda: salience.quantize(str(tmp_path / "in"), tmp_path / "out", method="rtn"),
        "is quantized already",
    )


def test_damaged_tensors_are_named(gemm: Path, tmp_path: Path) -> None:
    tensors = repacked(gemm, tmp_path / "out", "llm-awq")
    name = "model.layers.1.self_attn.q_proj"
    tensors[f"{name}.scaled_zeros"] = tensors[f"{name}.scaled_zeros"] * 3
    torch.save(tensors, tmp_path / "out" / "m-v2.pt")
    configure(tmp_path / "out", backend="llm-awq")
    refuse(lambda: salience.load(tmp_path / "out"), "linear", name, "not a zero of 0 to 15")


def test_the_config_of_a_v2_file_must_fit(gemm: Path, tmp_path: Path) -> None:
    tensors = repacked(gemm, tmp_path / "out", "llm-awq")
    config = config_of(gemm)
    del config["quantization_config"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    first = "model.layers.0.mlp.down_proj"  # the first by name, whose scales tell the groups
    tensors[f"{first}.scales"][5] = 1
    torch.save(tensors, tmp_path / "out" / "m-v2.pt")
    refuse(lambda: salience.load(tmp_path / "out"), first, "6 groups in scales", "do not divide")
    del tensors[f"{first}.scales"]
    torch.save(tensors, tmp_path / "out" / "m-v2.pt")
    refuse(lambda: salience.load(tmp_path / "out"), first, "no qweight or scales")


def test_detection_is_by_version() -> None:
    for kind, form in READERS.items():
        config = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": kind}
        assert detect_format(config).name == form.name
        assert form.scheme(config, "any") == Scheme(4, 64)
