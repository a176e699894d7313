"""What is done to untrusted bytes: each target reads some and may raise SalienceError alone.

`test_malformed.py` runs the targets on a few random inputs, `benchmarks/fuzz_readers.py` on many,
led by coverage. A target is generic over `formats.FORMATS`: a new format is fuzzed once it is in
that list and `SCHEMES` has a scheme that it holds.
"""

import copy
import io
import json
import pickle
import struct
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from safetensors.torch import save
from torch import Tensor

from salience.checkpoint import INDEX_NAME, GgufCheckpoint, SafetensorsCheckpoint, read_json
from salience.cli.console import parse_size
from salience.errors import SalienceError
from salience.formats import FORMATS, Format, detect_format, stored_config
from salience.grid import quantize
from salience.linear import QuantLinear
from salience.qtensor import QTensor
from salience.report import read_report
from salience.scheme import Scheme
from salience.search_files import open_search, search_metadata

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
            found.append((fmt, scheme, fmt.config({NAME: scheme}, ["lm_head"]), tensors))
    assert {fmt.name for fmt in FORMATS} == {fmt.name for fmt, *_ in found}
    return found


def check_weight(qt: QTensor) -> None:
    """A weight that a reader let through can be used."""
    assert int(qt.q.max()) <= qt.scheme.levels if qt.q.numel() else True
    dense = qt.dequantize()
    assert dense.shape == qt.q.shape
    if dense.numel():
        out = QuantLinear(qt)(torch.ones(1, qt.in_features))
        assert out.shape == (1, qt.out_features)


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
    read_all(GgufCheckpoint(folder / "model.gguf"))


def json_file(data: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(data)
    read_json(folder / "config.json")


def config(data: bytes, _folder: Path) -> None:
    """A changed `quantization_config`, up to the scheme of a linear."""
    draw = Draw(data)
    _, _, good, _ = draw.of(written())
    changed = type("Config", (), {"quantization_config": json_in(draw, good)})
    found = stored_config(changed)
    if found is not None:
        scheme = detect_format(found).scheme(found, NAME)
        assert isinstance(scheme, Scheme)


def config_text(data: bytes, _folder: Path) -> None:
    """As above, of any JSON."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return
    for fmt in FORMATS:
        if isinstance(value, dict) and fmt.detect(value):
            fmt.scheme(value, NAME)


def tensors(data: bytes, _folder: Path) -> None:
    """Changed tensors of a weight, and a changed config now and then."""
    draw = Draw(data)
    fmt, _, good, stored = draw.of(written())
    parts = dict(stored)
    if draw.below(4) == 0:
        good = json_in(draw, good)
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
    if isinstance(good, dict) and fmt.detect(good):
        check_weight(fmt.read(parts, fmt.scheme(good, NAME)))


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
        "option": [b"w4g128", b"w3channel-sym", b"nf4-dq", b"8GiB", b"1.5 MB"],
    }
    return found.get(name, [bytes(range(i, i + 40)) for i in range(0, 200, 40)])


def start() -> None:
    """Make what is made once, out of a fuzzer's first input's time."""
    for name in TARGETS:
        for data in seeds(name):
            run(name, data)
