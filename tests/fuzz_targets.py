"""What is done to untrusted bytes: each target reads some and may raise SalienceError alone.

`test_malformed.py` runs the targets on a few random inputs, `benchmarks/fuzz_readers.py` on many,
led by coverage. A target is generic over `formats.FORMATS` and `READ_ONLY`: a new format is fuzzed
once it is in one of them and `SCHEMES` has a scheme that it holds, or `golden` its tensors.
"""

import copy
import io
import json
import pickle
import struct
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from salience.blocks.search_files import open_search, search_metadata
from salience.checkpoint import (
    BLOCKS,
    CONFIG_KEY,
    INDEX_NAME,
    GgufCheckpoint,
    SafetensorsCheckpoint,
    open_checkpoint,
    read_json,
)
from salience.cli.console import parse_size
from salience.converting import _open, _plan
from salience.errors import SalienceError
from salience.formats import (
    FORMATS,
    READ_ONLY,
    Format,
    Reader,
    detect_format,
    get_format,
    stored_config,
)
from salience.gguf.tokenizer import vocabulary
from salience.grid import quantize
from salience.linear import QuantLinear
from salience.patterns import matching
from salience.pt_checkpoint import PtCheckpoint
from salience.qtensor import QTensor
from salience.reports.report import read_report
from salience.scheme import Scheme
from salience.source import _check_layers

GOLDEN = Path(__file__).parent / "golden" / "autoawq_gemv.safetensors"
NAME = "model.layers.0.mlp.up_proj"
SCHEMES = tuple(
    Scheme.parse(text)
    for text in (
        "w4g32",
        "w4g32-sym",
        "w4channel",
        "w3g32",
        "w8g32-sym",
        "w8channel-sym",
        "nf4",
        "nf4-dq",
        "fp4",
    )
)
_MEMORY_DISK = "/dev/shm" if Path("/dev/shm").is_dir() else None
_MOST_SECONDS = 2  # of one name's patterns
_MOST_ELEMENTS = 2**22  # a seed is far smaller, so that a fuzzer's input is, too


class Draw:
    """Choices out of bytes; zeros when they are used up."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def byte(self) -> int:
        return (self._data.read(1) or b"\0")[0]

    def below(self, count: int) -> int:
        return int.from_bytes(self._data.read(2), "little") % count

    def of(self, values: Sequence[Any]) -> Any:
        return values[self.below(len(values))]

    def bytes(self, count: int) -> bytes:
        return self._data.read(count).ljust(count, b"\0")

    def rest(self) -> bytes:
        return self._data.read()


# What stands where something else should, in JSON.
JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 5, 7, 9, 31, 33, 64, 127, 2**31, 2**40, 2**63, 10**400),
    *(1.5, -0.0, 1e9, 1e308, float("nan"), float("inf"), "", "four", "128", "4", "gemm", "re:"),
    *("re:(", "re:(a+)+$", "re:(.+)+Q", "re:" + "(.|.)" * 40 + "Q", "re:" + ".*" * 30 + "Q"),
    *("re:" + "(" * 3000, "re:a{99999999999}", "\ud800", "\x1b[2J\n", "x" * 10_000, "Linear"),
    *([], [[]], [None], ["re:(.*)*Q"], [1, 2], [-1, 4], [2**62, 2**62], {}, {"a": {}}, {"": None}),
    *({"config_groups": {}}, [{}], {"format": "dense"}, {"weights": 4}, {"targets": 7}),
)


def json_in(draw: Draw, value: Any) -> Any:
    """A JSON value with a few places of it changed."""
    value = copy.deepcopy(value)
    for _ in range(1 + draw.below(3)):
        at, parent, key = value, None, None
        while isinstance(at, dict | list) and at and (parent is None or draw.below(3)):
            parent = at
            key = draw.of(list(at)) if isinstance(at, dict) else draw.below(len(at))
            at = parent[key]
        junk = copy.deepcopy(draw.of(JUNK))
        if parent is None:
            return junk
        if isinstance(parent, dict) and draw.below(4) == 0:
            del parent[key]
        else:
            parent[key] = junk
    return value


_DTYPES = (
    *(torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
)


def tensor_in(draw: Draw, tensor: Tensor) -> Tensor:
    """A tensor as no tool would have written it: another shape, type or value."""
    kind = draw.below(9)
    if kind == 0:
        return torch.empty([draw.below(5) for _ in range(draw.below(4))], dtype=draw.of(_DTYPES))
    if kind == 1:
        return tensor.to(draw.of(_DTYPES))
    if kind == 2:
        return tensor.flatten()
    if kind == 3:
        return tensor[None]
    if kind == 4:
        return tensor.T.contiguous() if tensor.ndim == 2 else tensor.flatten().repeat(2)
    if kind == 5 and tensor.ndim:
        return tensor[: draw.below(tensor.shape[0] + 1)].clone()
    if kind == 6 and tensor.ndim:
        return torch.cat([tensor, tensor])
    data = bytearray(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for _ in range(1 + draw.below(8)):
        if data:
            place = draw.below(len(data))
            piece = draw.of((b"\xff" * 8, b"\x80\0\0\0\0\0\0\x80", b"\0\x7c", draw.bytes(4), b"9"))
            data[place : place + len(piece)] = piece[: len(data) - place]
    if not data:
        return tensor
    return torch.frombuffer(data, dtype=tensor.dtype).view(tensor.shape)


@cache
def written() -> list[tuple[Format, Scheme, dict[str, Any], dict[str, Tensor]]]:
    """A small weight in every format and scheme: the format, its config and its tensors."""
    found = []
    for fmt in FORMATS:
        for scheme in SCHEMES:
            weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
            try:
                fmt.check({NAME: scheme}, {NAME: (32, 64)})
                tensors = fmt.write(quantize(weight, scheme))
            except SalienceError:
                continue  # what this format does not hold
            kept = ["lm_head", "model.layers.0.mlp.gate"]
            found.append((fmt, scheme, fmt.config({NAME: scheme}, kept), tensors))
    assert {fmt.name for fmt in FORMATS} == {fmt.name for fmt, *_ in found}
    return found


Case = tuple[Reader, Scheme, dict[str, Any], dict[str, Tensor]]


@cache
def golden() -> list[Case]:
    """What AutoAWQ packed, of the layouts that are only read; llm-awq's is one of its two."""
    stored = load_file(GOLDEN)
    found: list[Case] = []
    for version, fmt in zip(("gemv", "gemv_fast", "gemv_fast"), READ_ONLY, strict=True):
        for size in (32, 64):
            names = {local: local.replace("scaled_", "q") for local in fmt.tensors}
            tensors = {local: stored[f"{version}_g{size}.{names[local]}"] for local in names}
            config = {"quant_method": "awq", "bits": 4, "group_size": size, "version": version}
            config |= {"backend": "llm-awq"} if "scaled_zeros" in fmt.tensors else {}
            found.append((fmt, Scheme(4, size), config, tensors))
    assert {fmt.name for fmt in READ_ONLY} == {fmt.name for fmt, *_ in found}
    return found


def readable() -> list[Case]:
    """A small weight in every format that is read."""
    return [*written(), *golden()]


def check_weight(qt: QTensor) -> None:
    """A weight that a reader let through can be used."""
    check_scheme(qt.scheme)
    assert int(qt.q.max()) <= qt.scheme.levels if qt.q.numel() else True
    dense = qt.dequantize()
    assert dense.shape == qt.q.shape
    if dense.numel():
        out = QuantLinear(qt)(torch.ones(1, qt.in_features))
        assert out.shape == (1, qt.out_features)


def check_scheme(scheme: Scheme) -> None:
    """One out of a config, where 4.0 and true are numbers, too."""
    assert isinstance(scheme, Scheme)
    assert type(scheme.bits) is int and type(scheme.group_size) is int
    assert type(scheme.sym) is bool


# Targets. Each gets bytes and a folder of its own.


def safetensors_file(data: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(data)
    read_all(SafetensorsCheckpoint(folder))


def safetensors_header(data: bytes, folder: Path) -> None:
    """As above, of a header whose length is right."""
    head, _, body = data.partition(b"\n")
    safetensors_file(struct.pack("<Q", len(head)) + head + body, folder)


def read_all(checkpoint: Any) -> None:
    """All that can be asked of a checkpoint."""
    for name in sorted(checkpoint.names())[:64]:
        checkpoint.nbytes(name)
        if numpy.prod([float(n) for n in checkpoint.shape(name)]) <= _MOST_ELEMENTS:
            assert checkpoint.tensor(name).shape == checkpoint.shape(name)


def index_file(data: bytes, folder: Path) -> None:
    (folder / "model-00001-of-00001.safetensors").write_bytes(save({"a": torch.zeros(2)}))
    (folder / INDEX_NAME).write_bytes(data)
    read_all(SafetensorsCheckpoint(folder))


def gguf_file(data: bytes, folder: Path) -> None:
    (folder / "model.gguf").write_bytes(data)
    checkpoint = GgufCheckpoint(folder / "model.gguf")
    read_all(checkpoint)
    for name in sorted(checkpoint.names())[:64]:
        if checkpoint.has_blocks(name):
            assert checkpoint.shape(f"{name}{BLOCKS}") == checkpoint.tensor(f"{name}{BLOCKS}").shape
    read_config(checkpoint)


def read_config(checkpoint: GgufCheckpoint) -> None:
    """All that is asked of the config in a file of ours, but for what Transformers does with it."""
    values = checkpoint.config()
    if values is None:
        return
    _check_layers(checkpoint.path, values, checkpoint)
    found = stored_config(SimpleNamespace(**values), checkpoint)
    if found is not None:
        check_scheme(detect_format(found).scheme(found, NAME))


def gguf_config(data: bytes, folder: Path) -> None:
    """A GGUF file whose `salience.config` is any text."""
    keys = {"general.architecture": b"llama", CONFIG_KEY: data}
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, len(keys))
    for key, value in keys.items():
        header += struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", 8)
        header += struct.pack("<Q", len(value)) + value
    (folder / "model.gguf").write_bytes(header.ljust(256, b"\0"))
    read_config(GgufCheckpoint(folder / "model.gguf"))


def pt_file(data: bytes, folder: Path) -> None:
    (folder / "model-v2.pt").write_bytes(data)
    read_all(open_checkpoint(folder))


def pt_pickle(data: bytes, folder: Path) -> None:
    """The pickle in a .pt file, where the sums of the zip would keep a fuzzer out."""
    with zipfile.ZipFile(folder / "model-v2.pt", "w") as file:
        for name, part in (("data.pkl", data), ("byteorder", b"little"), ("data/0", bytes(64))):
            file.writestr(f"archive/{name}", part)
        file.writestr("archive/version", b"3\n")
    read_all(PtCheckpoint(folder))


def tokenizer_file(data: bytes, folder: Path) -> None:
    """What the vocabulary of a GGUF file is made of."""
    (folder / "tokenizer.json").write_bytes(data)
    vocabulary(folder, 16)


def json_file(data: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(data)
    read_json(folder / "config.json")


def config(data: bytes, _folder: Path) -> None:
    """A changed `quantization_config`, up to the scheme of a linear."""
    draw = Draw(data)
    _, _, good, _ = draw.of(readable())
    changed = type("Config", (), {"quantization_config": json_in(draw, good)})
    found = stored_config(changed)
    if found is not None:
        check_scheme(detect_format(found).scheme(found, NAME))


def quantize_config(data: bytes, folder: Path) -> None:
    """AutoGPTQ's file beside the weights."""
    (folder / "model.safetensors").write_bytes(save({"a": torch.zeros(2)}))
    (folder / "quantize_config.json").write_bytes(data)
    found = stored_config(SimpleNamespace(), SafetensorsCheckpoint(folder))
    if found is not None:
        check_scheme(detect_format(found).scheme(found, NAME))


def pattern(data: bytes, _folder: Path) -> None:
    """A regular expression of compressed-tensors, and a key of GPTQModel's `dynamic`."""
    text = data.decode("utf-8", "replace")
    start = time.process_time()
    refused = None
    try:
        matching({"re:": text}, NAME)
    except SalienceError as error:
        refused = error
    config = {"bits": 4, "group_size": 32, "dynamic": {text: {"bits": 8}, "": {}}}
    check_scheme(get_format("gptq").scheme(config, NAME))
    assert time.process_time() - start < _MOST_SECONDS
    if refused:
        raise refused


def config_text(data: bytes, _folder: Path) -> None:
    """As above, of any JSON."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return
    for fmt in (*FORMATS, *READ_ONLY):
        if isinstance(value, dict) and fmt.detect(value):
            check_scheme(fmt.scheme(value, NAME))


def tensors(data: bytes, _folder: Path) -> None:
    """Changed tensors of a weight, and a changed config now and then."""
    draw = Draw(data)
    fmt, _, good, stored = draw.of(readable())
    if draw.below(4) == 0:
        good = json_in(draw, good)
    parts = parts_in(draw, fmt, stored)
    if isinstance(good, dict) and fmt.detect(good):
        check_weight(fmt.read(parts, fmt.scheme(good, NAME)))


def parts_in(draw: Draw, fmt: Reader, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a weight with some of them changed."""
    parts = dict(stored)
    for _ in range(1 + draw.below(3)):
        local = draw.of(sorted(fmt.tensors))
        if local in parts and draw.below(8) == 0:
            del parts[local]
        elif local in parts:
            parts[local] = tensor_in(draw, parts[local])
        elif draw.below(2):
            columns = 64
            index = torch.tensor([draw.byte() - 8 for _ in range(columns)], dtype=torch.int32)
            parts[local] = tensor_in(draw, index) if draw.below(2) else index
    return parts


def conversion(data: bytes, folder: Path) -> None:
    """What `convert` does before it writes, of a folder with one weight, in any container."""
    draw = Draw(data)
    fmt, _, good, stored = draw.of(readable())
    changed = draw.below(4)
    found = json_in(draw, good) if changed & 1 else good
    parts = parts_in(draw, fmt, stored) if changed & 2 else stored
    tensors = {f"{NAME}.{local}": tensor.contiguous() for local, tensor in parts.items()}
    tensors["model.norm.weight"] = torch.ones(4)
    tensors[draw.of(("lm_head.weight", "a.0.b", "\u00b2", "x" + "1" * 5000))] = torch.ones(4, 4)
    config: Any = {"model_type": "llama", "dtype": "float16"}
    beside = draw.below(3)
    if beside == 0:
        config["quantization_config"] = found
    elif beside == 1:
        (folder / "quantize_config.json").write_text(json.dumps(found))
    config = json_in(draw, config) if draw.below(2) else config
    (folder / "config.json").write_text(json.dumps(config))
    if draw.below(4) == 0:
        torch.save(tensors, folder / "model-v2.pt")
    else:
        (folder / "model.safetensors").write_bytes(save({k: t.clone() for k, t in tensors.items()}))
    target = draw.of([fmt.name for fmt in FORMATS])
    _plan(_open(folder, get_format(target), None, False), lambda *_: None)


def quant_state(data: bytes, _folder: Path) -> None:
    """The JSON among the tensors of bitsandbytes."""
    errors = []
    for fmt, scheme, _, stored in written():
        for local in stored:
            if "quant_state" in local and data:
                state = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                try:
                    check_weight(fmt.read(stored | {local: state}, scheme))
                    return
                except SalienceError as error:  # of another scheme, or of none
                    errors.append(error)
    if errors:
        raise errors[0]


def search_file(data: bytes, folder: Path) -> None:
    (folder / "search.safetensors").write_bytes(data)
    open_search(folder / "search.safetensors")


def search_pickle(data: bytes, folder: Path) -> None:
    (folder / "search.pt").write_bytes(data)
    open_search(folder / "search.pt")


def report_file(data: bytes, folder: Path) -> None:
    (folder / "salience_report.json").write_bytes(data)
    read_report(folder)


def option(data: bytes, _folder: Path) -> None:
    text = data.decode("utf-8", "replace")
    for parse in (Scheme.parse, parse_size):
        try:
            parse(text)
        except SalienceError as error:
            check_error(error)


Target = Callable[[bytes, Path], None]
TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (
        *(safetensors_file, safetensors_header, index_file, gguf_file, json_file, config),
        *(config_text, tensors, quant_state, search_file, search_pickle, report_file, option),
        *(gguf_config, pt_file, pt_pickle, tokenizer_file, quantize_config, pattern, conversion),
    )
}


def check_error(error: SalienceError) -> None:
    """A message is one line that a terminal can show."""
    message = str(error)
    assert message and message.isprintable(), repr(message)
    assert len(message) <= 4000


def run(name: str, data: bytes) -> bool:
    """Run a target in an empty folder; whether it took the bytes for good ones."""
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=_MEMORY_DISK) as folder:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch and numpy warn of what is refused next
                TARGETS[name](data, Path(folder))
        except SalienceError as error:
            check_error(error)
            return False
    return True


# Good inputs, from which to go wrong.


def gguf_bytes(changes: dict[str, Any] | None = None) -> bytes:
    """A small GGUF file with strings, arrays and tensors of several types."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(2)
        writer.add_token_list(["a", "b", "c"])
        writer.add_token_types([1, 2, 3])
        writer.add_rope_freq_base(1e4)
        for name, value in (changes or {}).items():
            writer.add_string(name, value)
        values = numpy.random.default_rng(0).standard_normal((2, 64), numpy.float32)
        for kind in ("F32", "F16", "Q8_0", "Q4_0", "Q4_1"):
            dtype = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(kind, gguf.quantize(values, dtype), raw_dtype=dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


INFO = {"method": "awq", "effort": "fast", "scheme": "w4g32", "model": "m"}


def search_bytes() -> bytes:
    """A small search file: a scale, and a grid."""
    stored = {
        "b|digest": torch.zeros(32, dtype=torch.uint8),
        "b|norm|up|scales": torch.ones(64),
        "b|norm|up|exponents": torch.zeros(2, dtype=torch.float64),
        "b.up|grid_scales": torch.ones(32, 2, dtype=torch.float16),
        "b.up|grid_zeros": torch.zeros(32, 2, dtype=torch.uint8),
    }
    return save(stored, search_metadata(INFO | {"schemes": {"b.up": "w4g32"}}))


def pt_bytes(content: object) -> bytes:
    """A `.pt` file."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def llm_awq_bytes() -> bytes:
    """A small search of llm-awq."""
    prev, sinks = "model.layers.0.norm", ("model.layers.0.q", "model.layers.0.k")
    clip = ("model.layers.0.q", torch.ones(4, 2, 1))
    return pt_bytes({"scale": [(prev, sinks, torch.ones(8))], "clip": [clip]})


def pickle_of(file: bytes) -> bytes:
    """The pickle in a .pt file."""
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        return archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))


def tokenizer_json(**model: Any) -> bytes:
    """A small tokenizer.json."""
    words = {"a": 0, "b": 1, "ab": 2, "<0x0A>": 3}
    values = {
        "added_tokens": [{"id": 4, "content": "<s>", "special": True}],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "_"}]},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": "a"}},
                {"type": "ByteLevel", "add_prefix_space": False},
            ],
        },
        "model": {"type": "BPE", "vocab": words, "merges": ["a b", ["a", "b"]], **model},
    }
    return json.dumps(values).encode()


REPORT = {
    **dict.fromkeys(("model", "out", "method", "effort", "scheme", "format", "device"), "x"),
    "calibration": None,
    "versions": {"torch": "2"},
    "seconds": 1.5,
    "kept_modules": ["a"],
    "linears": [
        {"name": "a", "in_features": 8, "error_rtn": 0.5, "error": 0.25, "kept_rtn": False}
    ],
    "blocks": [{"name": "b", "error_rtn": 0.5, "error": 0.25, "folds": 2}],
    "folds": [{"a": 1}],
}


@cache
def seeds(name: str) -> list[bytes]:
    """Good inputs of a target, and the bytes that lead a structured one."""
    square = torch.zeros(4, 4)
    header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    states = [
        bytes(stored[local].tolist())
        for *_, stored in written()
        for local in stored
        if "quant_state" in local
    ]
    found: dict[str, list[bytes]] = {
        "safetensors_file": [save({"a": torch.zeros(2), "b": torch.ones(2, 3).half()})],
        "safetensors_header": [json.dumps(header).encode() + b"\n" + bytes(8)],
        "index_file": [b'{"weight_map": {"a": "model-00001-of-00001.safetensors"}}'],
        "gguf_file": [gguf_bytes()],
        "json_file": [b'{"a": [1, 2.5, null, true, {"b": "c"}]}'],
        "config_text": [json.dumps(values).encode() for _, _, values, _ in written()],
        "quant_state": states,
        "search_file": [search_bytes()],
        "search_pickle": [llm_awq_bytes(), pickle.dumps({"scale": [], "clip": []}, 2)],
        "report_file": [json.dumps(REPORT).encode()],
        "gguf_config": [
            json.dumps({"num_hidden_layers": 0, "quantization_config": values}).encode()
            for fmt, _, values, _ in written()
            if fmt.name == "gguf"
        ],
        "pt_file": [pt_bytes({"a": torch.zeros(2, 3), "b": torch.ones(3).half()})],
        "pt_pickle": [pickle_of(pt_bytes({"a": square.T, "b": square[1:]}))],
        "tokenizer_file": [tokenizer_json(), tokenizer_json(byte_fallback=True, unk_token="a")],
        "quantize_config": [
            json.dumps(values).encode() for fmt, _, values, _ in written() if fmt.name == "gptq"
        ],
        "pattern": [
            rb"model\.layers\.(?P<i>\d+)\.mlp\.(up|gate)_proj",
            rb"^(?!.*(layers\.0|lm_head)).*$",
            rb"+:.*[a-z]{1,3}?\.mlp",
        ],
        # Which weight, nothing changed, in safetensors, to each format in turn.
        "conversion": [
            struct.pack("<7H", i, 0, 0, 0, 0, 1, i % len(FORMATS)) for i in range(len(readable()))
        ],
        "option": [b"w4g128", b"w3channel-sym", b"nf4-dq", b"8GiB", b"1.5 MB"],
    }
    return found.get(name, [bytes(range(i, i + 40)) for i in range(0, 200, 40)])


def start(names: Sequence[str] = tuple(TARGETS)) -> None:
    """Make what is made once for these targets, out of a fuzzer's first input's time."""
    for fmt, scheme, _, parts in readable():
        check_weight(fmt.read(parts, scheme))
    for name in names:
        for data in seeds(name):
            run(name, data)
