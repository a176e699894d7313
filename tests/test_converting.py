"""convert(): the same codes in another format, or a refusal that leaves nothing."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2Config

import salience
from helpers_checkpoint import config_of, dequantized, qtensors, refuse, stored_tensors
from salience import converting
from salience.calibration import Calibration
from salience.codebook import table
from salience.errors import SalienceError, StorageError
from salience.formats import (
    FORMATS,
    AutoAwq,
    CompressedTensors,
    Format,
    detect_format,
    get_format,
)
from salience.qtensor import QTensor
from salience.scheme import Scheme
from salience.writer import ShardWriter
from tiny_models import VOCABULARY, error, logits, make_model, save
from workshop import Workshop, differences

AWQ, CT = AutoAwq(), CompressedTensors()
NAME = "model.layers.0.mlp.up_proj"


def random_qtensor(scheme: Scheme, shape: tuple[int, int], seed: int, g_idx: bool = False) -> Any:
    """Codes, scales and zeros that any method could have made."""
    generator = torch.Generator().manual_seed(seed)
    groups = (shape[0], scheme.groups(shape[1]))
    codes = torch.randint(2**scheme.bits, shape, dtype=torch.uint8, generator=generator)
    scales = torch.rand(groups, generator=generator) * 0.05 + 1e-3
    if scheme.codebook is not None:
        return QTensor(codes, scales, torch.zeros(groups, dtype=torch.uint8), scheme)
    zeros = torch.randint(2**scheme.bits, groups, dtype=torch.uint8, generator=generator)
    if scheme.sym:
        zeros = torch.full_like(zeros, 2 ** (scheme.bits - 1))
    order = None
    if g_idx and groups[1] > 1:
        order = torch.randperm(shape[1], generator=generator).int() // scheme.group_columns(
            shape[1]
        )
    return QTensor(codes, scales.half(), zeros, scheme, order)


def assert_same(a: QTensor, b: QTensor) -> None:
    assert torch.equal(a.q, b.q)
    assert a.scales.dtype == b.scales.dtype and torch.equal(a.scales, b.scales)
    assert torch.equal(a.zeros, b.zeros)
    assert (a.g_idx is None) == (b.g_idx is None)
    if a.g_idx is not None and b.g_idx is not None:
        assert torch.equal(a.g_idx.int(), b.g_idx.int())


@st.composite
def weights(draw: st.DrawFn) -> QTensor:
    if draw(st.integers(0, 3)) == 0:
        scheme = Scheme.parse("nf4")
    else:
        bits = draw(st.sampled_from([4, 4, 4, 2, 3, 8]))
        group = draw(st.sampled_from([-1, 16, 32, 64]))
        scheme = Scheme(bits, group, sym=draw(st.booleans()))
    columns = max(scheme.group_size, 32) * draw(st.integers(1, 4))
    order = scheme.codebook is None and draw(st.booleans()) and draw(st.booleans())
    shape = (8 * draw(st.integers(1, 5)), columns)
    return random_qtensor(scheme, shape, draw(st.integers(0, 2**31)), order)


def written(fmt: Format, qt: QTensor) -> tuple[dict[str, Tensor], QTensor] | None:
    """A weight in a format, and as its readers have it; None if the format refuses it."""
    try:
        fmt.check({NAME: qt.scheme}, {NAME: (qt.out_features, qt.in_features)})
        tensors = fmt.write(qt)
    except SalienceError:
        return None
    config = json.loads(json.dumps(fmt.config({NAME: qt.scheme}, ["lm_head"])))
    reader = detect_format(config)
    return tensors, reader.read(tensors, reader.scheme(config, NAME))


# LLM.int8 has fp32 scales, which no other format holds; tests of its own are elsewhere.
EXACT = [fmt for fmt in FORMATS if fmt.name != "bitsandbytes-int8"]


@pytest.mark.parametrize(
    ("a", "b"), list(product(EXACT, EXACT)), ids=lambda fmt: getattr(fmt, "name", "")
)
@settings(max_examples=40, deadline=None)
@given(qt=weights())
def test_there_and_back(a: Format, b: Format, qt: QTensor) -> None:
    """What both formats take is the same in both, and the same bytes when it comes back."""
    first = written(a, qt)
    if first is None:
        return
    assert_same(first[1], qt)
    second = written(b, first[1])
    if second is None:
        return
    assert_same(second[1], qt)
    third = written(a, second[1])
    assert third is not None
    assert_same(third[1], qt)
    if second[1].scheme == qt.scheme:
        assert third[0].keys() == first[0].keys()
        assert all(torch.equal(first[0][name], tensor) for name, tensor in third[0].items())


def test_awq_and_compressed_tensors_take_each_others_weights() -> None:
    """So that the property above is not true of nothing."""
    qt = random_qtensor(Scheme(4, 32), (16, 64), 0)
    for a, b in ((AWQ, CT), (CT, AWQ)):
        first = written(a, qt)
        assert first is not None
        second = written(b, first[1])
        assert second is not None
        assert_same(second[1], qt)


EXTRAS = {
    "model.embed_tokens.weight": torch.randn(40, 64).bfloat16(),
    "model.layers.0.norm.weight": torch.randn(64),
    "model.layers.0.mlp.gate.weight": torch.randn(4, 64).half(),
    "model.layers.0.attn.bias": torch.tensor([True, False]),
    "steps": torch.tensor(3),
    "nothing": torch.zeros(0, 7, dtype=torch.float64),
}


def make_folder(
    folder: Path,
    fmt: Format,
    linears: Mapping[str, QTensor],
    shard_bytes: int = 10_000,
    **changes: Any,
) -> Path:
    """A checkpoint of an architecture that nobody knows."""
    folder.mkdir()
    writer = ShardWriter(folder, shard_bytes)
    for name, tensor in EXTRAS.items():
        writer.add(name, tensor)
    for name, qt in linears.items():
        for local, tensor in fmt.write(qt).items():
            writer.add(f"{name}.{local}", tensor)
    schemes = {name: qt.scheme for name, qt in linears.items()}
    outside = [name for name in linears if "layers" not in name]
    kept = [name for name in ["lm_head"] if name not in linears]
    config = {"model_type": "unheard-of", "hidden_size": 64, "text_config": {"a": None}}
    config |= {"quantization_config": fmt.config(schemes, kept, outside), **changes}
    writer.write_json("config.json", config)
    writer.finish()
    (folder / "tokenizer.json").write_bytes(b'{"as": "it is"}')
    (folder / "modeling_unheard.py").write_bytes(b"raise SystemExit\n")
    return folder


def twelve(scheme: Scheme, **how: Any) -> dict[str, QTensor]:
    names = [f"model.layers.{i}.mlp.{p}_proj" for i in range(12) for p in ("up", "down")]
    shapes = {"up": (96, 64), "down": (64, 96)}
    return {
        name: random_qtensor(scheme, shapes["up" if "up" in name else "down"], i, **how)
        for i, name in enumerate(names)
    }


def nothing_left(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["in"]


def test_an_unknown_architecture_there_and_back(tmp_path: Path) -> None:
    linears = twelve(Scheme(4, 32))
    source = make_folder(tmp_path / "in", AWQ, linears)
    assert len(list(source.glob("*.safetensors"))) > 3
    seen: list[tuple[str, int, int]] = []
    done = salience.convert(
        source, tmp_path / "ct", "compressed-tensors", progress=lambda *each: seen.append(each)
    )
    assert (done.source_format, done.format, done.lossless) == ("awq", "compressed-tensors", True)
    assert done.linears == 24 and seen[-1] == ("linear", 24, 24)
    between = stored_tensors(tmp_path / "ct")
    assert done.bytes == sum(tensor.nbytes for tensor in between.values())
    found = qtensors(tmp_path / "ct")
    assert found.keys() == linears.keys()
    for name, qt in found.items():
        assert_same(qt, linears[name])
    for name, tensor in EXTRAS.items():
        assert between[name].dtype == tensor.dtype and torch.equal(between[name], tensor)
    salience.convert(tmp_path / "ct", tmp_path / "back", "awq")
    before, after = stored_tensors(source), stored_tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
    for folder in (tmp_path / "ct", tmp_path / "back"):
        for file in ("tokenizer.json", "modeling_unheard.py"):
            assert (folder / file).read_bytes() == (source / file).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"in", "ct", "back"}


def test_configs(tmp_path: Path) -> None:
    """All but the quantization is kept; what is float is named by full paths, a tied head too."""
    source = make_folder(tmp_path / "in", AWQ, twelve(Scheme(4, 32)), vision_config={"b": 1})
    config = config_of(source)
    config["quantization_config"]["modules_to_not_convert"] = ["gate", "model.vision.proj"]
    (source / "config.json").write_text(json.dumps(config))
    salience.convert(source, tmp_path / "ct", "compressed-tensors")
    made = config_of(tmp_path / "ct")
    old, new = config.pop("quantization_config"), made.pop("quantization_config")
    assert made == config
    assert old["quant_method"] == "awq" and new["quant_method"] == "compressed-tensors"
    floats = {"model.embed_tokens", "model.layers.0.mlp.gate", "model.vision.proj", "lm_head"}
    assert set(new["ignore"]) == floats
    salience.convert(tmp_path / "ct", tmp_path / "back", "awq")
    back = config_of(tmp_path / "back")["quantization_config"]
    assert set(back["modules_to_not_convert"]) == floats - {"lm_head"}


def test_layer_2_comes_before_layer_10() -> None:
    names = ["a.10.b", "a.2.b", "a.2.c.1", "b", "a.2"]
    ordered = sorted(names, key=converting._natural)
    assert ordered == ["a.2", "a.2.b", "a.2.c.1", "a.10.b", "b"]


@dataclass(frozen=True, slots=True)
class OnlySymmetric(CompressedTensors):
    """A format like GPTQ v1."""

    def check(self, schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, int]]) -> None:
        for name, scheme in schemes.items():
            if not scheme.sym:
                raise SalienceError(f"{name} is not symmetric")


@pytest.mark.parametrize("middle", [True, False])
def test_zeros_that_are_all_in_the_middle_are_symmetric(
    middle: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AWQ has no word for it, so the zeros are looked at."""
    linears = {name: replace(qt) for name, qt in twelve(Scheme(4, 32, sym=True)).items()}
    if not middle:
        list(linears.values())[-1].zeros[3, 1] = 7
    source = make_folder(tmp_path / "in", AWQ, linears)
    monkeypatch.setattr(converting, "get_format", lambda _name: OnlySymmetric())
    if not middle:
        refuse(lambda: salience.convert(source, tmp_path / "out", "sym"), "is not symmetric")
        return nothing_left(tmp_path)
    salience.convert(source, tmp_path / "out", "sym")
    found = qtensors(tmp_path / "out")
    assert {str(qt.scheme) for qt in found.values()} == {"w4g32-sym"}
    for name, qt in found.items():
        assert_same(qt, linears[name])


def test_symmetric_weights_become_awq(tmp_path: Path) -> None:
    linears = twelve(Scheme(4, 32, sym=True))
    source = make_folder(tmp_path / "in", CT, linears)
    salience.convert(source, tmp_path / "out", "awq")
    for name, qt in qtensors(tmp_path / "out").items():
        assert_same(qt, linears[name])


@dataclass(frozen=True, slots=True)
class Careless(CompressedTensors):
    """A format whose writer is wrong in one linear of many, all of one kind."""

    wrong: str = "zeros"

    def write(self, qt: QTensor) -> dict[str, Tensor]:
        if int(qt.q[0, 0]) == 5:
            qt = replace(qt, **{self.wrong: getattr(qt, self.wrong) ^ 1})
        return CT.write(qt)


@pytest.mark.parametrize("wrong", ["zeros", "q"])
def test_what_reads_otherwise_is_refused(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linears = twelve(Scheme(4, 32))
    for i, qt in enumerate(linears.values()):
        qt.q[0, 0] = 5 if i == 20 else 4
    source = make_folder(tmp_path / "in", AWQ, linears)
    monkeypatch.setattr(converting, "get_format", lambda _name: Careless(wrong=wrong))
    what = {"zeros": "its zeros would not be the same", "q": "its codes would not be the same"}
    refuse(lambda: salience.convert(source, tmp_path / "out", "x"), list(linears)[20], what[wrong])
    nothing_left(tmp_path)


def mixed() -> dict[str, QTensor]:
    linears = twelve(Scheme(4, 32))
    name = "model.layers.3.mlp.up_proj"
    return linears | {name: random_qtensor(Scheme(4, 16), (96, 64), 5)}


def with_tiny_scale() -> dict[str, QTensor]:
    """bf16 scales, as llm-compressor writes them for a bf16 model; fp16 has no 1e-9."""
    linears = twelve(Scheme(4, 32))
    for name, qt in linears.items():
        linears[name] = replace(qt, scales=qt.scales.bfloat16())
    linears[NAME].scales[0, 0] = 1e-9
    return linears


REFUSED: dict[str, tuple[Callable[[], dict[str, QTensor]], str, tuple[str, ...]]] = {
    "3 bits": (lambda: twelve(Scheme(3, 32)), "awq", ("4-bit codes", "w3g32")),
    "two group sizes": (mixed, "awq", ("one scheme for all", "w4g16")),
    "rows of two widths": (lambda: twelve(Scheme(4, -1)), "awq", ("one group size",)),
    "uniform as nf4": (lambda: twelve(Scheme(4, 32)), "bitsandbytes", ("holds nf4",)),
    "a quantized head": (
        lambda: twelve(Scheme(4, 32)) | {"lm_head": random_qtensor(Scheme(4, 32), (40, 64), 1)},
        "awq",
        ("lm_head", "compressed-tensors"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_format_cannot_hold(case: str, tmp_path: Path) -> None:
    make, target, parts = REFUSED[case]
    source = make_folder(tmp_path / "in", CT, make())
    written: list[object] = []
    refuse(
        lambda: salience.convert(source, tmp_path / "out", target, progress=written.append),
        *parts,
    )
    assert not written, "it was refused late"
    nothing_left(tmp_path)


def test_scales_that_fp16_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linears = with_tiny_scale()
    source = make_folder(tmp_path / "in", CT, twelve(Scheme(4, 32)))
    for file in source.glob("*.safetensors"):
        file.unlink()
    (source / "model.safetensors.index.json").unlink()
    writer = ShardWriter(source)
    for name, qt in linears.items():
        for local, tensor in CT.write(qt).items():
            writer.add(f"{name}.{local}", qt.scales if local == "weight_scale" else tensor)
    writer.finish()
    refuse(lambda: salience.convert(source, tmp_path / "out", "awq"), NAME, "scales")
    nothing_left(tmp_path)


@pytest.mark.parametrize("sorted_first", [True, False])
def test_groups_in_activation_order(sorted_first: bool, tmp_path: Path) -> None:
    """Found before anything is written, also when the first linear's are in order."""
    linears = twelve(Scheme(4, 32))
    source = make_folder(tmp_path / "in", CT, linears)
    writer_tensors = stored_tensors(source)
    for i, (name, qt) in enumerate(linears.items()):
        order = torch.arange(qt.in_features, dtype=torch.int32) // 32
        writer_tensors[f"{name}.weight_g_idx"] = order if sorted_first and i < 23 else order.flip(0)
    for file in source.glob("model*"):
        file.unlink()
    writer = ShardWriter(source)
    for name, tensor in writer_tensors.items():
        writer.add(name, tensor)
    writer.finish()
    seen: list[object] = []
    refuse(
        lambda: salience.convert(
            source, tmp_path / "out", "awq", progress=lambda *x: seen.append(x)
        ),
        "groups in activation order",
        "model.layers.11.mlp.down_proj" if sorted_first else "model.layers.0.mlp",
    )
    assert not seen
    nothing_left(tmp_path)


def drop(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], object], tuple[str, ...]]] = {
    "no zeros": (drop(f"{NAME}.qzeros"), (NAME, "qzeros is missing")),
    "no codes": (drop(f"{NAME}.qweight"), (f"{NAME}.qzeros", "belongs to no")),
    "no linear": (
        lambda tensors: [tensors.pop(n) for n in list(tensors) if n.endswith(".qweight")],
        ("no tensor named *.qweight",),
    ),
    "cut codes": (
        lambda tensors: tensors.update({f"{NAME}.qweight": torch.zeros(60, 12, dtype=torch.int32)}),
        (NAME,),
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_sources(case: str, tmp_path: Path) -> None:
    change, parts = DAMAGE[case]
    source = make_folder(tmp_path / "in", AWQ, twelve(Scheme(4, 32)))
    tensors = stored_tensors(source)
    for file in source.glob("model*"):
        file.unlink()
    change(tensors)
    writer = ShardWriter(source)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()
    refuse(lambda: salience.convert(source, tmp_path / "out", "compressed-tensors"), *parts)
    nothing_left(tmp_path)


def test_a_config_that_does_not_fit(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "in", CT, mixed())
    config = config_of(source)
    config["quantization_config"]["config_groups"].pop("group_1")
    (source / "config.json").write_text(json.dumps(config))
    name = "model.layers.3.mlp.up_proj"
    refuse(lambda: salience.convert(source, tmp_path / "out", "awq"), name, "no group")
    nothing_left(tmp_path)


def test_wrong_use(llama: Path, tmp_path: Path) -> None:
    source = make_folder(tmp_path / "in", AWQ, twelve(Scheme(4, 32)))

    def run(*args: Any, **options: Any) -> Callable[[], object]:
        return lambda: salience.convert(*args, **options)

    out = tmp_path / "out"
    refuse(run(llama, out, "awq"), "is not quantized", "salience quantize")
    refuse(run(source, out, "ggml"), "no format 'ggml'", "dense")
    refuse(run(source, out, "awq", dtype="float16"), "--dtype is for --format dense")
    refuse(run(source, out, "dense", dtype="float32"), "'float32'", "bfloat16")
    refuse(run(tmp_path / "none", out, "awq"), "none")
    refuse(run(source, source, "compressed-tensors"), "exists")
    nothing_left(tmp_path)
    out.with_name("out.partial").mkdir()
    (out.with_name("out.partial") / "mine.txt").write_text("mine")
    refuse(run(source, out, "compressed-tensors"), "out.partial")
    assert (out.with_name("out.partial") / "mine.txt").read_text() == "mine"


def test_a_disk_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_folder(tmp_path / "in", AWQ, twelve(Scheme(4, 32)))
    monkeypatch.setattr("salience.writer.free_disk_bytes", lambda _path: 10_000)
    refuse(
        lambda: salience.convert(source, tmp_path / "out", "compressed-tensors"),
        "free",
        kind=StorageError,
    )
    nothing_left(tmp_path)


# Dense.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("scheme", ["w4g32", "w3g16", "w4channel-sym"])
def test_dense_against_fp64(dtype: str, scheme: str) -> None:
    qt = random_qtensor(Scheme.parse(scheme), (40, 96), 0)
    group = qt.in_features // qt.scales.shape[1]
    expected = torch.empty(40, 96, dtype=torch.float64)
    for row, column in product(range(40), range(96)):
        scale, zero = (float(t[row, column // group]) for t in (qt.scales, qt.zeros))
        expected[row, column] = scale * (float(qt.q[row, column]) - zero)
    made = replace(get_format("dense"), dtype=getattr(torch, dtype)).write(qt)  # type: ignore[type-var]
    assert list(made) == ["weight"]
    assert torch.equal(made["weight"], expected.to(getattr(torch, dtype)))


def test_dense_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    qts = [random_qtensor(Scheme(4, 32), (24, 96), 0, g_idx=True)]
    qts += [random_qtensor(Scheme.parse("nf4"), (24, 128), 0)]
    for qt in qts:
        monkeypatch.setattr("salience.formats.dense._PIECE", 7 * qt.in_features)
        made = get_format("dense").write(qt)["weight"]
        assert torch.equal(made, qt.dequantize(torch.float16))
    codes = table("nf4")[qts[1].q.int()]
    assert torch.equal(made[0, :64], (codes[0, :64] * qts[1].scales[0, 0]).half())


@pytest.fixture(scope="module")
def quantized(llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("convert") / "awq"
    text = Calibration(str(text_file), samples=2, seqlen=64)
    salience.quantize(str(llama), out, scheme="w4g32", calibration=text)
    return out


@pytest.mark.parametrize(
    "target", [fmt for fmt in FORMATS if fmt.name != "awq"], ids=lambda fmt: fmt.name
)
def test_a_model_there_and_back(target: Format, quantized: Path, tmp_path: Path) -> None:
    """Each format that takes the codes computes the same, and gives them back to the byte."""
    found = qtensors(quantized)
    try:
        target.check(
            {name: qt.scheme for name, qt in found.items()},
            {name: (qt.out_features, qt.in_features) for name, qt in found.items()},
        )
    except SalienceError:
        pytest.skip(f"{target.name} does not hold them")
    salience.convert(quantized, tmp_path / "there", target.name)
    assert torch.equal(logits(salience.load(tmp_path / "there")), logits(salience.load(quantized)))
    salience.convert(tmp_path / "there", tmp_path / "back", "awq")
    file = "model.safetensors"
    assert (tmp_path / "back" / file).read_bytes() == (quantized / file).read_bytes()
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "back" / name).read_bytes() == (quantized / name).read_bytes()
    assert not (tmp_path / "back" / "salience_report.json").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_dense_model(dtype: str, quantized: Path, tmp_path: Path) -> None:
    done = salience.convert(quantized, tmp_path / "out", "dense", dtype=dtype)
    assert not done.lossless
    config = config_of(tmp_path / "out")
    assert "quantization_config" not in config and config["dtype"] == dtype
    made, exact = stored_tensors(tmp_path / "out"), dequantized(quantized)
    assert made.keys() == exact.keys()
    for name, tensor in made.items():
        assert tensor.dtype == getattr(torch, dtype)
        assert torch.equal(tensor, exact[name].to(tensor.dtype)), name
    floats = salience.load(tmp_path / "out")
    size = {"float16": 5e-3, "bfloat16": 5e-2}[dtype]
    assert 0 < error(logits(floats), logits(salience.load(quantized))) < size


def test_the_dense_dtype_is_the_sources(quantized: Path, tmp_path: Path) -> None:
    source = shutil.copytree(quantized, tmp_path / "in")
    config = config_of(source)
    config.pop("dtype")
    (source / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    salience.convert(source, tmp_path / "out", "dense")
    assert config_of(tmp_path / "out")["dtype"] == "bfloat16"
    assert "torch_dtype" not in config_of(tmp_path / "out")


def test_dense_weights_of_transposed_linears(text_file: Path, tmp_path: Path) -> None:
    """GPT-2 stores its weights as [in, out]."""
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=128, n_embd=64, n_layer=2, n_head=4)
    save(make_model(config), tmp_path / "gpt2")
    text = Calibration(str(text_file), samples=2, seqlen=64)
    salience.quantize(str(tmp_path / "gpt2"), tmp_path / "in", scheme="w4g32", calibration=text)
    salience.convert(tmp_path / "in", tmp_path / "out", "dense")
    before, after = (logits(salience.load(tmp_path / name)) for name in ("in", "out"))
    assert error(after, before) < 5e-3


# Killed, and on a full disk.


def command(out: str = "out") -> tuple[str, ...]:
    return ("convert", "in", "-o", out, "--format", "compressed-tensors")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    make_folder(tmp_path / "in", AWQ, twelve(Scheme(4, 32)))
    return tmp_path.resolve()


def test_the_command(place: Path, workshop: Workshop) -> None:
    run = workshop(*command(), cwd=place)
    assert run.status == 0 and run.stderr == ""
    assert "24 linears from awq to compressed-tensors, codes and scales are the same" in run.stdout
    assert run.stdout.count("\n") == 1
    shutil.rmtree(place / "out")
    run = workshop(*command(), "--json", cwd=place)
    values = json.loads(run.stdout)
    assert values["linears"] == 24 and values["lossless"] is True and values["out"] == "out"
    assert "exists" in workshop(*command(), cwd=place).line
    assert "--format" in workshop("convert", "in", "-o", "new", cwd=place).line


def check_killed(workshop: Workshop, place: Path, when: int, tear: bool, whole: Path) -> None:
    run = workshop(*command(), cwd=place, kill_at=when, tear=tear, shard_bytes=20_000)
    assert run.status == -9
    if (place / "out").exists():  # the very end: it is whole
        assert not differences(place / "out", whole)
    again = workshop(*command(), cwd=place, shard_bytes=20_000)
    assert again.status == 0 or "exists" in again.line
    assert not differences(place / "out", whole)
    assert sorted(path.name for path in place.iterdir()) == ["in", "out", "whole"]
    shutil.rmtree(place / "out")


@pytest.mark.parametrize("part", [0.3, 0.7, 0.95])
def test_killed(part: float, place: Path, workshop: Workshop) -> None:
    """No output, or all of it; the same command works afterwards."""
    run = workshop(*command("whole"), cwd=place, shard_bytes=20_000)
    check_killed(workshop, place, int(part * len(run.changes)), True, place / "whole")


@pytest.mark.slow
def test_killed_at_every_change(place: Path, workshop: Workshop) -> None:
    run = workshop(*command("whole"), cwd=place, shard_bytes=20_000)
    for when in range(1, len(run.changes) + 1, 2):  # all of them take a minute
        check_killed(workshop, place, when, when % 4 == 1, place / "whole")


def test_a_full_disk(place: Path, workshop: Workshop) -> None:
    run = workshop(*command(), cwd=place, fail_at=8)
    assert "No space left" in run.line and not (place / "out").exists()
    assert workshop(*command(), cwd=place).status == 0
    assert qtensors(place / "out").keys() == twelve(Scheme(4, 32)).keys()
