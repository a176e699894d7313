"""Checkpoints on disk: what is read, and what is refused."""

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from safetensors.torch import save_file
from torch import Tensor

from helpers_checkpoint import TENSORS, refuse
from salience.checkpoint import (
    INDEX_NAME,
    GgufCheckpoint,
    RenamedCheckpoint,
    SafetensorsCheckpoint,
    read_json,
)
from salience.gguf.header import read_gguf_header


def write_sharded(folder: Path, *shards: dict[str, Tensor]) -> None:
    weight_map = {}
    for i, tensors in enumerate(shards, start=1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, folder / name)
        weight_map.update(dict.fromkeys(tensors, name))
    write_index(folder, weight_map)


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def raw(header: object, data: bytes = b"", size: int | None = None) -> bytes:
    """A safetensors file of any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


# Reading safetensors.


@pytest.mark.parametrize("sharded", [False, True])
def test_reads_safetensors(tmp_path: Path, sharded: bool) -> None:
    if sharded:
        items = list(TENSORS.items())
        write_sharded(tmp_path, dict(items[:2]), dict(items[2:]))
    else:
        save_file(TENSORS, tmp_path / "model.safetensors")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert checkpoint.path == tmp_path
    assert checkpoint.names() == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.nbytes(name) == tensor.nbytes
        found = checkpoint.tensor(name)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)


def test_reads_what_the_index_names(tmp_path: Path) -> None:
    """A stray file beside the shards is not part of the checkpoint."""
    write_sharded(tmp_path, {"a": torch.zeros(1)}, {"b": torch.zeros(1)})
    save_file({"a": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert checkpoint.names() == {"a", "b"}
    assert checkpoint.tensor("a").item() == 0


def test_one_file_of_any_name(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "pytorch_model.safetensors")
    assert SafetensorsCheckpoint(tmp_path).names() == {"a"}


def test_missing_tensor(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    for read in (checkpoint.tensor, checkpoint.shape, checkpoint.nbytes):
        refuse(lambda read=read: read("b"), "tensor b is missing", tmp_path)


GOOD = raw({"a": entry("F32", [2], 0, 8), "b": entry("F16", [2], 8, 12)}, bytes(12))
MALFORMED = {
    "empty": b"",
    "short length": b"\x10\x00\x00",
    "no header": struct.pack("<Q", 100),
    "truncated header": GOOD[:40],
    "truncated data": GOOD[:-1],
    "trailing data": GOOD + b"\x00",
    "huge header": raw({}, size=2**63 - 1),
    "wrapping header": raw({}, size=2**64 - 4),
    "large header": raw({}, size=200_000_000),
    "header longer than file": raw({}, size=3),
    "garbage JSON": raw(b'{"a": nonsense}'),
    "not UTF-8": raw(b'{"\xff\xfe": 1}'),
    "JSON list": raw(b"[1, 2]"),
    "JSON string": raw(b'"abc"'),
    "entry without dtype": raw({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "overlapping": raw({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, bytes(12)),
    "hole": raw({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, bytes(12)),
    "beyond the end": raw({"a": entry("F32", [2], 0, 8)}, bytes(4)),
    "backwards": raw({"a": entry("F32", [2], 8, 0)}, bytes(8)),
    "negative": raw({"a": entry("F32", [2], -8, 0)}, bytes(8)),
    "negative shape": raw({"a": entry("F32", [-2], 0, 8)}, bytes(8)),
    "shape beyond offsets": raw({"a": entry("F32", [200], 0, 8)}, bytes(8)),
    "overflowing shape": raw({"a": entry("F32", [2**62, 2**62], 0, 8)}, bytes(8)),
    "unknown dtype": raw({"a": entry("F12", [2], 0, 8)}, bytes(8)),
    "dtype number": raw({"a": {"dtype": 3, "shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "GGUF": b"GGUF" + struct.pack("<I", 3) + bytes(64),
    "a pickle": b"\x80\x02}q\x00.",
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n",
}


def test_the_good_file_is_good(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(GOOD)
    assert SafetensorsCheckpoint(tmp_path).names() == {"a", "b"}


@pytest.mark.parametrize("kind", list(MALFORMED))
@pytest.mark.parametrize("sharded", [False, True])
def test_malformed_safetensors(tmp_path: Path, kind: str, sharded: bool) -> None:
    file = tmp_path / "model.safetensors"
    if sharded:
        file = tmp_path / "model-00002-of-00002.safetensors"
        write_sharded(tmp_path, {"y": torch.zeros(2)}, {"z": torch.zeros(2)})
    file.write_bytes(MALFORMED[kind])
    refuse(lambda: SafetensorsCheckpoint(tmp_path), file)


def test_every_truncation(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    for length in range(len(GOOD)):
        file.write_bytes(GOOD[:length])
        refuse(lambda: SafetensorsCheckpoint(tmp_path), file)


@pytest.mark.parametrize(("dtype", "size"), [("F8_E4M3", 1), ("F8_E5M2", 1), ("U16", 2)])
def test_unsupported_dtype(tmp_path: Path, dtype: str, size: int) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(raw({"x.weight": entry(dtype, [2], 0, 2 * size)}, bytes(2 * size)))
    refuse(
        lambda: SafetensorsCheckpoint(tmp_path),
        *("tensor x.weight", file, f"dtype {dtype}", "convert the checkpoint to BF16"),
    )


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"a": torch.zeros(1)}, {"a": torch.ones(1), "b": torch.zeros(1)})
    index = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    write_index(tmp_path, index)
    refuse(lambda: SafetensorsCheckpoint(tmp_path), "a is in both", *index.values())


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "../../etc/x",
        "/etc/passwd",
        "sub/model.safetensors",
        "..",
        "",
        "model.bin",
        "model.safetensors/",
        None,
        3,
        ["model.safetensors"],
    ],
)
def test_index_stays_in_its_folder(tmp_path: Path, name: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "sub").mkdir()
    for place in (tmp_path, folder, folder / "sub"):
        save_file({"a": torch.zeros(1)}, place / "model.safetensors")
    write_index(folder, {"a": name})
    refuse(lambda: SafetensorsCheckpoint(folder), folder / INDEX_NAME, "no shard beside it")


def test_missing_shard(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"a": torch.zeros(1)}, {"b": torch.zeros(1)})
    lost = tmp_path / "model-00002-of-00002.safetensors"
    lost.unlink()
    refuse(lambda: SafetensorsCheckpoint(tmp_path), f"shard {lost} is missing")
    lost.mkdir()
    refuse(lambda: SafetensorsCheckpoint(tmp_path), f"shard {lost} is missing")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "7", '"a"', "{}", '{"weight_map": []}', '{"weight_map": {}}']
)
def test_malformed_index(tmp_path: Path, text: str) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / INDEX_NAME).write_text(text)
    refuse(lambda: SafetensorsCheckpoint(tmp_path), tmp_path / INDEX_NAME)


def test_index_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_bytes(b"\xff\xfe{}")
    refuse(lambda: SafetensorsCheckpoint(tmp_path), tmp_path / INDEX_NAME)


def test_no_safetensors(tmp_path: Path) -> None:
    refuse(lambda: SafetensorsCheckpoint(tmp_path), tmp_path, "found none")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    refuse(lambda: SafetensorsCheckpoint(tmp_path), tmp_path, "only pytorch_model.bin, a pickle")
    refuse(lambda: SafetensorsCheckpoint(tmp_path / "nowhere"), tmp_path / "nowhere")


# Reading GGUF.


def write_gguf(path: Path, tensors: dict[str, tuple[numpy.ndarray, Q]]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_token_list(["a", "b", "c"])
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantized(kind: Q, rows: int = 3, columns: int = 64) -> numpy.ndarray:
    values = numpy.random.default_rng(int(kind)).standard_normal((rows, columns), numpy.float32)
    return gguf.quantize(values, kind)


@pytest.fixture
def good_gguf(tmp_path: Path) -> Path:
    kinds = (Q.Q4_0, Q.Q4_1, Q.Q8_0, Q.F16, Q.F32, Q.BF16)
    tensors = {kind.name: (quantized(kind), kind) for kind in kinds}
    return write_gguf(tmp_path / "good.gguf", tensors)


def test_reads_gguf(good_gguf: Path) -> None:
    checkpoint = GgufCheckpoint(good_gguf)
    assert checkpoint.architecture == "llama"
    assert checkpoint.names() == {"Q4_0", "Q4_1", "Q8_0", "F16", "F32", "BF16"}
    for name in checkpoint.names():
        data = quantized(Q[name])
        tensor = checkpoint.tensor(name)
        assert checkpoint.shape(name) == (3, 64) == tuple(tensor.shape)
        assert checkpoint.nbytes(name) == data.nbytes
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, torch.from_numpy(gguf.dequantize(data, Q[name])))


def test_gguf_tensor_is_a_copy(good_gguf: Path) -> None:
    """The file is mapped read-only: a view of it could not be written to."""
    checkpoint = GgufCheckpoint(good_gguf)
    for name in ("F32", "Q4_0"):
        before = checkpoint.tensor(name).clone()
        checkpoint.tensor(name).zero_()
        assert torch.equal(checkpoint.tensor(name), before)


def test_q4_0_by_hand(tmp_path: Path) -> None:
    block = bytes.fromhex("c0b95b5a5a4a493939382828271717160606")
    data = numpy.frombuffer(block, numpy.uint8)[None]
    tensor = GgufCheckpoint(write_gguf(tmp_path / "x.gguf", {"t": (data, Q.Q4_0)})).tensor("t")
    d = numpy.frombuffer(block[:2], numpy.float16).astype(float).item()
    low, high = ([byte >> shift & 15 for byte in block[2:]] for shift in (0, 4))
    assert tensor.tolist() == [[d * (code - 8) for code in low + high]]
    assert (tensor[0] - (torch.arange(32) - 8) / 4).abs().max() <= abs(d) / 2 * 1.01


def q4_k_by_hand(block: bytes) -> list[float]:
    """The values of 256 weights in 144 bytes, from the description of the format."""
    d, dmin = (float(v) for v in numpy.frombuffer(block[:4], numpy.float16))
    packed, quants = block[4:16], block[16:]
    values = []
    for j in range(8):
        if j < 4:
            scale, low = packed[j] & 63, packed[j + 4] & 63
        else:
            scale = (packed[j + 4] & 15) | (packed[j - 4] >> 6 << 4)
            low = (packed[j + 4] >> 4) | (packed[j] >> 6 << 4)
        chunk = quants[32 * (j // 2) : 32 * (j // 2 + 1)]
        codes = [(byte >> 4) if j % 2 else (byte & 15) for byte in chunk]
        values += [d * scale * code - dmin * low for code in codes]
    return values


@pytest.mark.parametrize("kind", [Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K], ids=lambda q: q.name)
def test_k_quants(tmp_path: Path, kind: Q) -> None:
    _, size = gguf.GGML_QUANT_SIZES[kind]
    data = numpy.random.default_rng(1).integers(0, 120, (2, 2 * size), numpy.uint8)  # finite fp16
    checkpoint = GgufCheckpoint(write_gguf(tmp_path / "k.gguf", {"t": (data, kind)}))
    assert checkpoint.shape("t") == (2, 512)
    assert checkpoint.nbytes("t") == data.nbytes
    tensor = checkpoint.tensor("t")
    assert torch.equal(tensor, torch.from_numpy(gguf.dequantize(data, kind)))
    if kind is Q.Q4_K:
        want = q4_k_by_hand(data[0].tobytes()[:size])
        torch.testing.assert_close(tensor[0, :256].double(), torch.tensor(want).double())


def test_gguf_missing_tensor(good_gguf: Path) -> None:
    checkpoint = GgufCheckpoint(good_gguf)
    for read in (checkpoint.tensor, checkpoint.shape, checkpoint.nbytes):
        refuse(lambda read=read: read("b"), "tensor b is missing", good_gguf)


def test_gguf_integers_are_no_weights(tmp_path: Path) -> None:
    data = numpy.arange(8, dtype=numpy.int32)
    checkpoint = GgufCheckpoint(write_gguf(tmp_path / "i.gguf", {"t": (data, Q.I32)}))
    refuse(lambda: checkpoint.tensor("t"), "tensor t", "i.gguf", "I32")


def test_every_truncated_gguf(good_gguf: Path, tmp_path: Path) -> None:
    data = good_gguf.read_bytes()
    path = tmp_path / "short.gguf"
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        refuse(lambda: GgufCheckpoint(path), path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GGUF",
        b"GGML" + bytes(64),
        b"GGUF" + struct.pack("<IQQ", 99, 0, 0) + bytes(64),
        b"GGUF" + struct.pack("<IQQ", 3, 2**63, 2**63) + bytes(64),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**62) + bytes(64),
        b"GGUF" + bytes(range(256)),
        b"GGUF" + b"\xff" * 200,
        GOOD,
    ],
)
def test_garbage_gguf(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    refuse(lambda: GgufCheckpoint(path), path)


@pytest.mark.parametrize("alignment", [None, 8, 128])
def test_gguf_header_is_what_their_reader_finds(tmp_path: Path, alignment: int | None) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    kind = gguf.GGUFValueType
    numbers = {"UINT8": 255, "INT8": -128, "UINT16": 2**16 - 1, "INT16": -(2**15)}
    numbers |= {"UINT32": 2**32 - 1, "INT32": -(2**31), "UINT64": 2**64 - 1, "INT64": -(2**63)}
    for name, value in (numbers | {"FLOAT32": 0.1, "FLOAT64": 0.1, "BOOL": True}).items():
        writer.add_key_value(name, value, kind[name])
        writer.add_key_value(f"{name} array", [value, 0, value], kind.ARRAY, kind[name])
    writer.add_string("text", "a\n\u00fc\U0001f600")
    writer.add_array("texts", ["", "b\u4e2d", "c" * 300])
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for each in (Q.F32, Q.Q4_1, Q.F16):
        writer.add_tensor(each.name, quantized(each, rows=5), raw_dtype=each)
    writer.add_tensor("Q6_K", numpy.zeros((5, 210), numpy.uint8), raw_dtype=Q.Q6_K)
    writer.add_tensor("deep", numpy.zeros((2, 3, 5, 7), numpy.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_gguf_header(tmp_path / "x.gguf")
    theirs = gguf.GGUFReader(tmp_path / "x.gguf")
    fields = {k: f for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert {k: f.value() for k, f in found.fields.items()} == {
        k: f.contents() for k, f in fields.items()
    }
    types = {k: [f.kind] if f.of is None else [f.kind, f.of] for k, f in found.fields.items()}
    assert types == {k: [int(t) for t in f.types] for k, f in fields.items()}
    assert {k: (t.shape, t.kind, t.place) for k, t in found.tensors.items()} == {
        t.name: (tuple(t.shape.tolist()[::-1]), int(t.tensor_type), t.data_offset)
        for t in theirs.tensors
    }


def test_big_endian_gguf(tmp_path: Path) -> None:
    path = tmp_path / "big.gguf"
    path.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64))
    refuse(lambda: GgufCheckpoint(path), path, "big-endian")


def test_missing_gguf(tmp_path: Path) -> None:
    refuse(lambda: GgufCheckpoint(tmp_path / "no.gguf"), tmp_path / "no.gguf")


def test_gguf_without_architecture(tmp_path: Path) -> None:
    path = tmp_path / "none.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(64))
    refuse(lambda: GgufCheckpoint(path), path, "architecture")


def test_gguf_architecture_that_is_no_text(good_gguf: Path) -> None:
    data = good_gguf.read_bytes().replace(b"llama", b"\xff\xfe\xfd\xfc\xfb", 1)
    good_gguf.write_bytes(data)
    refuse(lambda: GgufCheckpoint(good_gguf), good_gguf)


# Another checkpoint's names.


def test_renamed(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    inner = SafetensorsCheckpoint(tmp_path)
    names = {"x": "a.weight", "y": "b.weight", "z": "not.there"}
    checkpoint = RenamedCheckpoint(inner, names)
    assert checkpoint.path == tmp_path
    assert checkpoint.names() == {"x", "y"}
    assert checkpoint.shape("x") == (3, 4)
    assert checkpoint.nbytes("y") == 12
    assert torch.equal(checkpoint.tensor("x"), TENSORS["a.weight"])
    for name in ("z", "a.weight"):
        for read in (checkpoint.tensor, checkpoint.shape, checkpoint.nbytes):
            refuse(lambda read=read, name=name: read(name), f"tensor {name} is missing", tmp_path)


def test_renamed_converts(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    seen = []

    def convert(tensor: Tensor, stored: str) -> Tensor:
        seen.append(stored)
        return tensor + 1

    checkpoint = RenamedCheckpoint(SafetensorsCheckpoint(tmp_path), {"x": "a.weight"}, convert)
    assert torch.equal(checkpoint.tensor("x"), TENSORS["a.weight"] + 1)
    assert seen == ["a.weight"]


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"null", b"\xff", b'{"a": 1} x'])
def test_read_json_refuses(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text)
    refuse(lambda: read_json(path), path)
    refuse(lambda: read_json(tmp_path), tmp_path)
    refuse(lambda: read_json(tmp_path / "no.json"), tmp_path / "no.json")
