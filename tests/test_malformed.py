"""Malformed and hostile checkpoints: always one line of SalienceError, never a crash or a hang,
never much memory, never the run of what a file brings.

The corpus is made here, by code. What single readers refuse is tested with them
(`test_checkpoint.py`, `test_formats_*.py`, `test_search.py`) and the command's manners in
`test_cli_bad_input.py`; here are the findings of `benchmarks/fuzz_readers.py`, whole model folders,
and its targets on a few random inputs.
"""

import copy
import json
import os
import pickle
import struct
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import fuzz_targets
import salience
from fuzz_targets import (
    JUNK,
    NAME,
    TARGETS,
    check_error,
    check_weight,
    golden,
    run,
    seeds,
    written,
)
from helpers_bad import Runs
from helpers_checkpoint import refuse
from salience.blocks.search_files import open_search
from salience.checkpoint import (
    INDEX_NAME,
    GgufCheckpoint,
    SafetensorsCheckpoint,
    open_checkpoint,
)
from salience.cli.console import parse_size
from salience.converting import _natural
from salience.errors import SalienceError
from salience.formats import detect_format, stored_config
from salience.formats.base import Format
from salience.gguf.tokenizer import vocabulary
from salience.patterns import matching
from salience.reports.report import read_report
from salience.scheme import Scheme
from salience.source import open_source

# The fuzzer's targets, in short.


def altered(good: bytes) -> st.SearchStrategy[bytes]:
    """A good input with some bytes of it replaced, left out or repeated."""
    places = st.integers(0, len(good))
    pieces = st.one_of(st.binary(max_size=9), st.sampled_from([b"\xff" * 8, b"[" * 2000, b"-1"]))

    def change(edits: list[tuple[int, int, bytes]]) -> bytes:
        data = good
        for start, length, piece in edits:
            data = data[:start] + piece + data[start + length :]
        return data

    return st.lists(st.tuples(places, st.integers(0, 12), pieces), max_size=4).map(change)


@pytest.mark.parametrize("name", list(TARGETS))
def test_target(name: str) -> None:
    """Whatever the bytes, a target raises SalienceError alone."""

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(st.one_of(st.binary(max_size=200), *map(altered, seeds(name))))
    def property(data: bytes) -> None:
        run(name, data)

    property()


@pytest.mark.parametrize("name", sorted(set(TARGETS) - {"config", "tensors"}))
def test_seeds_are_good(name: str) -> None:
    """At least one input that the fuzzer starts from is read to its end."""
    assert any(run(name, data) for data in seeds(name))


# Messages.


def test_messages_are_one_printable_line() -> None:
    assert str(SalienceError("a\nb\x1b[2J \ud800 \u202e é")) == r"a b\x1b[2J \ud800 \u202e é"
    long = str(SalienceError("x" * 10**6 + " the mend"))
    assert len(long) < 2100 and long.endswith("the mend")


# Options.


@pytest.mark.parametrize("text", ["w4g" + "1" * 5000, "w4g1" + "0" * 10, "w\u0664g128"])
def test_scheme_refuses(text: str) -> None:
    refuse(lambda: Scheme.parse(text))


@pytest.mark.parametrize(
    "text", ["9" * 400 + "GB", "1." + "9" * 400 + "GB", "1e400GB", "-1GB", "1iB", "8\u212aB"]
)
def test_size_refuses(text: str) -> None:
    refuse(lambda: parse_size(text))


# Safetensors.


def raw(header: str, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header.encode() + data


def entry(shape: object, size: int, name: str = "a") -> str:
    """A tensor of a header, as JSON."""
    return f'"{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[0,{size}]}}'


def one(shape: object, size: int, name: str = "a", before: str = "") -> bytes:
    """A file of one tensor in `size` bytes."""
    return raw(f"{{{before}{entry(shape, size, name)}}}", bytes(size))


HEADERS = {
    "deep": raw("[" * 100_000),
    "deep object": raw('{"a":' * 50_000),
    "2**62 elements": one([2**62], 8),
    "product wraps to 0": one([2**32, 2**32], 0),
    "beyond 64 bits": one([10**30], 8),
    "many axes wrap": one([2**32] * 64, 0),
    "fraction": one([1.5], 4),
    "metadata of numbers": one([1], 4, before='"__metadata__":{"a":1},'),
    "name of no text": one([1], 4, name="\\ud800"),
}


@pytest.mark.parametrize("kind", list(HEADERS))
def test_safetensors_header(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(HEADERS[kind])
    refuse(lambda: SafetensorsCheckpoint(tmp_path), file)


def test_names_that_are_there_twice(tmp_path: Path) -> None:
    """The last of equal names counts in JSON; what is read is one of them or an error."""
    (tmp_path / "model.safetensors").write_bytes(one([1], 4, before=f"{entry([1], 4)},"))
    try:
        assert SafetensorsCheckpoint(tmp_path).tensor("a").tolist() == [0]
    except SalienceError as error:
        check_error(error)


def test_tensors_of_no_size(tmp_path: Path) -> None:
    """No values, whatever the other axis claims."""
    save_file({"a": torch.zeros(0, 2**40)}, tmp_path / "model.safetensors")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert checkpoint.nbytes("a") == 0 and checkpoint.tensor("a").shape == (0, 2**40)


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    for name in (INDEX_NAME, "model.safetensors"):
        os.mkfifo(tmp_path / name)
        refuse(lambda: SafetensorsCheckpoint(tmp_path), tmp_path / name)
        (tmp_path / name).unlink()


def test_links_of_the_hub_are_followed(tmp_path: Path) -> None:
    """The Hub's cache is made of links to files elsewhere; only the index may name no path."""
    (tmp_path / "model").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "blob")
    (tmp_path / "model" / "model.safetensors").symlink_to(tmp_path / "blob")
    assert SafetensorsCheckpoint(tmp_path / "model").tensor("a").item() == 1
    (tmp_path / "blob").unlink()
    refuse(lambda: SafetensorsCheckpoint(tmp_path / "model"), "model.safetensors is missing")


def test_shard_without_the_tensor_the_index_lists(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "m.safetensors")
    (tmp_path / INDEX_NAME).write_text('{"weight_map": {"b": "m.safetensors"}}')
    checkpoint = SafetensorsCheckpoint(tmp_path)
    refuse(lambda: checkpoint.tensor("b"), "tensor b is missing", tmp_path)


# GGUF.


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(keys: bytes = b"", tensors: bytes = b"", counts: tuple[int, int] = (0, 0)) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, *counts) + keys + tensors


def key(kind: int, value: bytes, name: bytes = b"a") -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(sizes: list[int], kind: int = 0, place: int = 0, axes: int | None = None) -> bytes:
    count = len(sizes) if axes is None else axes
    return text(b"t") + struct.pack(f"<I{len(sizes)}QIQ", count, *sizes, kind, place) + bytes(64)


ARCHITECTURE = key(8, text(b"llama"), b"general.architecture")
GGUFS = {
    "2**60 keys": header(ARCHITECTURE, counts=(0, 2**60)),
    "2**60 tensors": header(ARCHITECTURE, counts=(2**60, 1)),
    "name of 2**60 bytes": header(struct.pack("<Q", 2**60), counts=(0, 1)),
    "name of 2**64-8 bytes": header(struct.pack("<Q", 2**64 - 8), counts=(0, 1)),
    "array of 2**60 numbers": header(key(9, struct.pack("<IQ", 0, 2**60)), counts=(0, 1)),
    "array of 2**21 numbers": header(key(9, struct.pack("<IQ", 4, 2**21)), counts=(0, 1)),
    "array of 2**60 texts": header(key(9, struct.pack("<IQ", 8, 2**60)), counts=(0, 1)),
    "array of no known type": header(key(9, struct.pack("<IQ", 77, 1)), counts=(0, 1)),
    "arrays of arrays": header(key(9, struct.pack("<IQ", 9, 1) * 5000), counts=(0, 1)),
    "value of no known type": header(key(77, bytes(8)), counts=(0, 1)),
    "a key twice": header(key(0, b"1") * 2 + ARCHITECTURE, counts=(0, 3)),
    "a tensor twice": header(ARCHITECTURE, tensor([1])[:-64] + tensor([1]), (2, 1)),
    "name that is no text": header(ARCHITECTURE + key(0, b"1", b"\xff"), counts=(0, 2)),
    "2**62 elements": header(ARCHITECTURE, tensor([2**62]), (1, 1)),
    "product wraps to 0": header(ARCHITECTURE, tensor([2**32, 2**32]), (1, 1)),
    "no elements": header(ARCHITECTURE, tensor([0]), (1, 1)),
    "no elements, in 2**62 rows": header(ARCHITECTURE, tensor([0, 2**62]), (1, 1)),
    "2**31 axes": header(ARCHITECTURE, tensor([1], axes=2**31), (1, 1)),
    "tensor of no known type": header(ARCHITECTURE, tensor([1], kind=99), (1, 1)),
    "tensor beyond the end": header(ARCHITECTURE, tensor([64]), (1, 1)),
    "place beyond the end": header(ARCHITECTURE, tensor([1], place=2**40), (1, 1)),
    "place that wraps": header(ARCHITECTURE, tensor([1], place=2**64 - 32), (1, 1)),
    "no whole blocks": header(ARCHITECTURE, tensor([33], kind=2), (1, 1)),
    "alignment 0": header(
        ARCHITECTURE + key(4, struct.pack("<I", 0), b"general.alignment"), tensor([1]), (1, 2)
    ),
    "alignment 3": header(
        ARCHITECTURE + key(4, struct.pack("<I", 3), b"general.alignment"), tensor([1]), (1, 2)
    ),
    "alignment 2**31": header(
        ARCHITECTURE + key(4, struct.pack("<I", 2**31), b"general.alignment"), tensor([1]), (1, 2)
    ),
    "layers that are a list": header(
        ARCHITECTURE + key(9, struct.pack("<IQII", 4, 2, 1, 1), b"llama.block_count"),
        counts=(0, 2),
    ),
    "layers that are no number": header(
        ARCHITECTURE + key(8, text(b"many"), b"llama.block_count"), counts=(0, 2)
    ),
}


@pytest.mark.parametrize("kind", list(GGUFS))
def test_gguf(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(GGUFS[kind])
    refuse(lambda: GgufCheckpoint(path), path)


def test_the_gguf_is_good_but_for_that(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    path.write_bytes(header(ARCHITECTURE, tensor([2]), (1, 1)))
    assert GgufCheckpoint(path).tensor("t").tolist() == [0, 0]


def test_gguf_of_more_layers_than_tensors(tmp_path: Path) -> None:
    path = tmp_path / "deep.gguf"
    layers = key(4, struct.pack("<I", 2**31), b"llama.block_count")
    path.write_bytes(header(ARCHITECTURE + layers, tensor([2]), (1, 2)))
    refuse(lambda: open_source(str(path)), path, "block_count is 2147483648")


# quantization_config: each key of each format with each wrong value.


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all values in a JSON value."""
    yield path
    if isinstance(value, list):
        value = dict(enumerate(value))
    for place, inner in value.items() if isinstance(value, dict) else ():
        yield from places(inner, (*path, place))


def replaced(value: Any, path: tuple[Any, ...], junk: Any) -> Any:
    """A copy of a JSON value with another at a place."""
    if not path:
        return junk
    copied = copy.copy(value)
    copied[path[0]] = replaced(value[path[0]], path[1:], junk)
    return copied


def case(fmt: str, scheme: str) -> tuple[Format, dict[str, Any], dict[str, Tensor]]:
    for found, of, config, tensors in written():
        if (found.name, str(of)) == (fmt, scheme):
            return found, config, dict(tensors)
    raise KeyError(fmt, scheme)


@pytest.mark.parametrize("fmt", [fmt.name for fmt in salience.formats.FORMATS])
def test_quantization_config(fmt: str) -> None:
    """A scheme or one line, whatever stands at a place, in no time."""
    _, good, _ = next((f, config, t) for f, _, config, t in written() if f.name == fmt)
    refused = 0
    for path in places(good):
        for junk in JUNK:
            changed = type("Config", (), {"quantization_config": replaced(good, path, junk)})
            try:
                config = stored_config(changed)
                found = config and detect_format(config).scheme(config, NAME)
                assert not found or 1 <= found.bits <= 8
                assert not found or type(found.group_size) is int
            except SalienceError as error:
                check_error(error)
                refused += 1
    assert refused > 2 * len(JUNK)


@pytest.mark.parametrize(
    "changes",
    [
        *({"bits": bits} for bits in ("four", -1, None, 10**9, True, 3, [4], float("nan"))),
        *({"group_size": size} for size in (0, -2, "128", None, True, 1.5, [128], {})),
        {"version": ["gemm"]},
        {"quant_method": None},
    ],
    ids=str,
)
def test_awq_config(changes: dict[str, Any]) -> None:
    _, good, _ = case("awq", "w4g32")
    refuse(lambda: detect_format(good | changes).scheme(good | changes, NAME))


def test_whole_numbers_with_a_point() -> None:
    """A finding: 4.0 is among 2, 3, 4 and 8, and no width that can be unpacked."""
    _, good, _ = case("gptq", "w4g32")
    for changes in ({"bits": 4.0}, {"bits": 8.0}, {"group_size": 32.0}, {"bits": True}):
        refuse(lambda c=changes: detect_format(good | c).scheme(good | c, NAME), "gptq checkpoint")


def test_group_size_beyond_the_weight() -> None:
    fmt, good, tensors = case("awq", "w4g32")
    scheme = fmt.scheme(good | {"group_size": 2**40}, NAME)
    refuse(lambda: fmt.read(tensors, scheme), "group size 1099511627776 does not divide")


def test_rows_of_no_columns() -> None:
    """A finding in GPTQ's reader, which asks for the groups of what it was given."""
    refuse(lambda: Scheme(4, -1).groups(0), "group size 0 does not divide in_features 0")


# Patterns.


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a+)+$", "(.+)+Q", "(.*)*Q", "(.|.)*Q", "(.+){9}Q", "(?P<a>.+)+Q", "(?=(.+)+Q)"),
        *("(?:.+)+Q", "((.)|(.))*Q", "(.+.?)+Q", "(.?){30}Q", "(?x) ( . + ) + Q", "(?i)(.+)+Q"),
        *(".?" * 30 + "Q", "(.|.)" * 30 + "Q", ".*" * 30 + "Q", ".{0,9}" * 20 + "Q", "a}*" * 30),
        *("(?>.+)+Q", "(.)(?(1)a|b)", "(?#x)a", "[)](.+)+Q", r"\)(.+)+Q", "x" * 10**7),
        *("(" * 5000, "(", "[", "*", ")(", "a{99999999999}", "(?P<1>)", "\\", "(?P<a>x)(?P<a>x)"),
    ],
    ids=lambda p: p[:30],
)
def test_patterns_that_could_take_long(pattern: str) -> None:
    name = "model.layers.11.self_attn.qqqqqqqqqqqqqqqqqqq_proj"
    refuse(lambda: matching({"re:it": pattern}, name), "quantization_config has 're:it'")


def test_many_patterns_that_take_long_together() -> None:
    refuse(lambda: matching({f"{i}": ".*.*.*Q" for i in range(1000)}, NAME), "too long")


@pytest.mark.parametrize("pattern", ["(a+)+$", "-:(.+)+Q", "+:" + ".*" * 30 + "Q", "(" * 3000])
def test_dynamic_patterns_of_gptq(pattern: str) -> None:
    """A finding: they went to `re` as they are."""
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {pattern: {}}}
    scheme = detect_format(config).scheme
    refuse(lambda: scheme(config, "a" * 60 + "Q"), f"quantization_config has {pattern[:20]!r}"[:40])


def test_the_first_dynamic_pattern_counts() -> None:
    table = {r"+:.*\.up": {"bits": 8}, r".*\.up": {"bits": 2}, r"-:.*gate": {}}
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": table}
    scheme = detect_format(config).scheme
    assert scheme(config, "a.up") == Scheme(8, 32, True)
    assert scheme(config, "a.down") == Scheme(4, 32, True)
    refuse(lambda: scheme(config, "a.gate"), "keeps it float ('-:.*gate')")


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        *((".*lm_head", False), (".*mlp.*", True), (r".*\.up_proj$", True), ("up_proj", False)),
        (r".*layers\.([0-9]|1[0-9]|2[0-7])\.mlp\.(gate|up|down)_proj$", True),
        (r"^(?!.*(layers\.0|lm_head)).*$", False),
        (r"(?:model\.)?(?:language_model\.)?layers\.\d+\..*", True),
        (r"model\.layers\.\d{1,3}?\.mlp\.[^.]*?up_proj", True),
        (r"(?:[a-z]\w*\.)*mlp", False),
        (r"(?:ab)*model", True),
        (r"model\.layers\.(?P<i>\d+)\.mlp\.(up|gate)_proj", True),
    ],
)  # fmt: skip
def test_patterns_of_the_tools(pattern: str, matches: bool) -> None:
    if pattern == r"(?:[a-z]\w*\.)*mlp":  # a repeated group that has several ways
        refuse(lambda: matching({"a": pattern}, NAME), "repeat no groups")
        return
    assert matching({"a": pattern}, NAME) == ["a"] * matches


# Tensors.

STATE = "weight.quant_state.bitsandbytes__nf4"


def state(text: bytes | None = None, **changes: Any) -> Tensor:
    _, _, tensors = case("bitsandbytes", "nf4-dq")
    values = json.loads(bytes(tensors[STATE].tolist())) | changes
    return torch.tensor(list(text or json.dumps(values).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("fmt", "scheme", "name", "value"),
    [
        ("awq", "w4g32", "qweight", torch.zeros(64, 0, dtype=torch.int32)),
        ("awq", "w4g32", "qweight", torch.zeros(0, 4, dtype=torch.int32)),
        ("awq", "w4g32", "qweight", torch.zeros(64, 5, dtype=torch.int32)),
        ("awq", "w4g32", "qzeros", torch.zeros(2, dtype=torch.int32)),
        ("awq", "w4g32", "scales", torch.zeros(2, 32, dtype=torch.int32)),
        ("awq", "w4g32", "scales", torch.zeros(2, 32, dtype=torch.complex64)),
        ("compressed-tensors", "w4g32", "weight_shape", torch.tensor([2**62, 2**62])),
        ("compressed-tensors", "w4g32", "weight_shape", torch.tensor([-32, -64])),
        ("compressed-tensors", "w4g32", "weight_shape", torch.tensor([32.0, float("nan")])),
        ("compressed-tensors", "w4g32", "weight_shape", torch.tensor(5)),
        ("compressed-tensors", "w4g32", "weight_packed", torch.tensor(5, dtype=torch.int32)),
        ("compressed-tensors", "w4g32", "weight_zero_point", torch.tensor(5, dtype=torch.int32)),
        ("compressed-tensors", "w4g32", "weight_g_idx", torch.full((64,), 2, dtype=torch.int32)),
        ("compressed-tensors", "w4g32", "weight_g_idx", torch.full((64,), -2, dtype=torch.int32)),
        ("compressed-tensors", "w4g32", "weight_g_idx", torch.full((64,), 2**62)),
        ("compressed-tensors", "w4g32", "weight_g_idx", torch.tensor(0)),
        ("compressed-tensors", "w4g32", "weight_g_idx", torch.zeros(64)),
        ("compressed-tensors", "w4channel", "weight_g_idx", torch.zeros(0, dtype=torch.int32)),
        ("bitsandbytes", "nf4-dq", STATE, torch.tensor(2**40)),
        ("bitsandbytes", "nf4-dq", STATE, torch.zeros(0, dtype=torch.uint8)),
        ("bitsandbytes", "nf4-dq", STATE, torch.full((2, 2), 91, dtype=torch.uint8)),
        ("bitsandbytes", "nf4-dq", STATE, torch.full((4,), float("nan"))),
        ("bitsandbytes", "nf4-dq", STATE, state(b"[" * 100_000)),
        ("bitsandbytes", "nf4-dq", STATE, state(b'{"a":' * 50_000)),
        ("bitsandbytes", "nf4-dq", STATE, state(shape=[2**62, 2**62])),
        ("bitsandbytes", "nf4-dq", STATE, state(shape=[-32, -64])),
        ("bitsandbytes", "nf4-dq", STATE, state(shape=[True, 2048])),
        ("bitsandbytes", "nf4-dq", STATE, state(shape=[10**400, 64])),
        ("bitsandbytes", "nf4-dq", STATE, state(shape=[[32], 64])),
        ("bitsandbytes", "nf4-dq", STATE, state(nested_offset="0")),
        ("bitsandbytes", "nf4-dq", STATE, state(blocksize=0)),
        ("bitsandbytes", "nf4-dq", STATE, state(blocksize=64.0)),
        ("gguf", "w4g32", "weight.blocks", torch.zeros(8, 0, 18, dtype=torch.uint8)),
        ("gguf", "w4g32", "weight.blocks", torch.zeros(0, 2, 20, dtype=torch.uint8)),
        ("bitsandbytes", "nf4-dq", "weight.nested_quant_map", torch.zeros(1, 256)),
        ("bitsandbytes", "nf4-dq", "weight.nested_quant_map", torch.zeros(255)),
        ("bitsandbytes", "nf4-dq", "weight.nested_absmax", torch.zeros(1, 1)),
        ("bitsandbytes", "nf4-dq", "weight.absmax", torch.zeros(64, dtype=torch.int8)),
    ],
)
def test_tensors(fmt: str, scheme: str, name: str, value: Tensor) -> None:
    found, _, tensors = case(fmt, scheme)
    check_weight(found.read(tensors, Scheme.parse(scheme)))
    refuse(lambda: found.read(tensors | {name: value}, Scheme.parse(scheme)))


def test_blocks_of_whole_rows_of_nothing() -> None:
    """A finding: how many groups no columns make."""
    fmt, _, _ = case("gguf", "w4g32")
    blocks = {"weight.blocks": torch.zeros(8, 0, 18, dtype=torch.uint8)}
    refuse(lambda: fmt.read(blocks, Scheme.parse("w4channel")), "blocks must be uint8")


def test_codebooks_in_blocks() -> None:
    fmt, good, _ = case("gguf", "w4g32")
    refuse(lambda: fmt.scheme(good | {"scheme": "nf4"}, NAME), "has nf4, which no block holds")


def test_state_without_the_offset() -> None:
    """A finding: the state of a weight without nested scales under a config with them."""
    found, _, tensors = case("bitsandbytes", "nf4-dq")
    bare = json.loads(bytes(tensors[STATE].tolist()))
    del bare["nested_offset"]
    value = torch.tensor(list(json.dumps(bare).encode()), dtype=torch.uint8)
    refuse(lambda: found.read(tensors | {STATE: value}, Scheme.parse("nf4-dq")), "nested_offset")


# Pickled checkpoints.


def llm_awq(folder: Path, **changes: Tensor) -> Path:
    """A folder of llm-awq with one linear."""
    _, _, _, tensors = golden()[-1]
    stored = {f"{NAME}.{local}": tensor for local, tensor in (tensors | changes).items()}
    torch.save(stored, folder / "model-v2.pt")
    return folder


@pytest.mark.parametrize("shape", [(), (3,), (0,), (0, 8)])
def test_scales_that_are_no_matrix(shape: tuple[int, ...], tmp_path: Path) -> None:
    """A finding, in what finds out the group size."""
    stored = open_checkpoint(llm_awq(tmp_path))
    assert stored_config(SimpleNamespace(), stored)["group_size"] == 64
    bad = open_checkpoint(llm_awq(tmp_path, scales=torch.zeros(shape).half()))
    refuse(lambda: stored_config(SimpleNamespace(), bad), tmp_path, NAME)


@pytest.mark.parametrize("count", [2**33, 2**61, 2**62])
def test_tensors_whose_bytes_wrap(count: int, tmp_path: Path) -> None:
    """A finding: 2**62 numbers of 4 bytes each were 0 bytes."""
    torch.save({"a": torch.zeros(1).expand(count)}, tmp_path / "m-v2.pt")
    refuse(lambda: open_checkpoint(tmp_path), "tensor a of", "claims more bytes than are stored")


# Conversion.


@pytest.mark.parametrize("name", ["\u00b2", "x" + "1" * 5000, "a.\u0663.b", ""])
def test_names_that_are_sorted_by_their_numbers(name: str) -> None:
    """A finding: digits that are no numbers, and more of them than Python reads."""
    names = ["a.10.b", "a.2.b", "a.9.b", name]
    assert [n for n in sorted(names, key=_natural) if n != name] == ["a.2.b", "a.9.b", "a.10.b"]


@pytest.mark.parametrize("junk", [5, True, "lm_head", {"a": 1}, [None, 3, "a.b"]])
def test_lists_of_skipped_modules_that_are_none(junk: Any, tmp_path: Path) -> None:
    """A finding; they are read to be written, and here they say nothing."""
    _, good, tensors = case("awq", "w4g32")
    save_file({f"{NAME}.{k}": v for k, v in tensors.items()}, tmp_path / "model.safetensors")
    quantization = good | {"modules_to_not_convert": junk}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    done = salience.convert(tmp_path, tmp_path / "out", "compressed-tensors")
    assert done.linears == 1
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    ignored = written["quantization_config"]["ignore"]
    assert ignored == (["a.b", "lm_head"] if isinstance(junk, list) else ["lm_head"])


# tokenizer.json.

TOKENIZERS: dict[str, dict[str, Any]] = {
    "ids of no number": {"vocab": {"a": "0"}},
    "ids below 0": {"vocab": {"a": -1}},
    "ids with a point": {"vocab": {"a": 0.0}},
    "merges of numbers": {"merges": [1, 2], "byte_fallback": True},
    "merges of lists of numbers": {"merges": [[1, 2]], "byte_fallback": True},
}


@pytest.mark.parametrize("kind", list(TOKENIZERS))
def test_tokenizer_models(kind: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(fuzz_targets.tokenizer_json(**TOKENIZERS[kind]))
    refuse(lambda: vocabulary(tmp_path, 16), tmp_path / "tokenizer.json", "damaged")


@pytest.mark.parametrize("key", ["added_tokens", "pre_tokenizer", "normalizer", "model"])
def test_tokenizer_parts(key: str, tmp_path: Path) -> None:
    good = json.loads(fuzz_targets.tokenizer_json(byte_fallback=True))
    (tmp_path / "tokenizer.json").write_text(json.dumps(good))
    assert vocabulary(tmp_path, 16)
    for junk in (7, "x", [7], {"pretokenizers": [7]}, {"normalizers": 7}, {"pattern": "x"}):
        if key in ("pre_tokenizer", "normalizer") or not isinstance(junk, dict):
            (tmp_path / "tokenizer.json").write_text(json.dumps(good | {key: junk}))
            try:
                vocabulary(tmp_path, 16)
            except SalienceError as error:
                check_error(error)
            else:  # of the other key's
                assert isinstance(junk, dict)


# Searches, reports and journals.


def endless(levels: int = 60) -> list[Any]:
    """A list of 2**levels names that takes no room, as in "a billion laughs"."""
    found: list[Any] = ["model.layers.0.q"]
    for _ in range(levels):
        found = [found, found]
    return found


REPORTS = (b"", b"[]", b"null", b'{"method": "awq"}', b"[" * 100_000, b'{"linears":' * 90_000)


@pytest.mark.parametrize("text", REPORTS, ids=lambda text: str(text[:12]))
def test_reports(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "salience_report.json").write_bytes(text)
    refuse(lambda: read_report(tmp_path), tmp_path / "salience_report.json")


PREV = "model.layers.0.norm"
SCALES: dict[str, Any] = {
    "expanded": [(PREV, ["model.layers.0.q"], torch.ones(1).expand(2**33))],
    "on no device": [(PREV, ["model.layers.0.q"], torch.ones(8, device="meta"))],
    "sparse": [(PREV, ["model.layers.0.q"], torch.ones(8).to_sparse())],
    "nested names": [(PREV, endless(), torch.ones(8))],
    "nested name": [(endless(), ["model.layers.0.q"], torch.ones(8))],
    "numbers": [(1, [2], torch.ones(8))],
    "not a number": [(PREV, ["model.layers.0.q"], torch.full((8,), float("nan")))],
    "text": "scales",
}


@pytest.mark.parametrize("kind", list(SCALES))
def test_searches_of_llm_awq(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "found.pt"
    torch.save({"scale": SCALES[kind], "clip": []}, file)
    refuse(lambda: open_search(file), file)


@pytest.mark.parametrize("clip", [endless(), PREV, torch.ones(1).expand(2**33)])
def test_clips_of_llm_awq(clip: Any, tmp_path: Path) -> None:
    file = tmp_path / "found.pt"
    entry = (clip, torch.ones(2, 2)) if isinstance(clip, list) else (PREV, clip)
    torch.save({"scale": [], "clip": [entry]}, file)
    refuse(lambda: open_search(file), file)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickles_do_not_run(protocol: int, tmp_path: Path) -> None:
    ran, file = tmp_path / "ran", tmp_path / "found.pt"
    file.write_bytes(pickle.dumps({"scale": [Runs(ran)], "clip": []}, protocol))
    refuse(lambda: open_search(file), file, "could run code")
    torch.save(OrderedDict(scale=[Runs(ran)], clip=[]), file)
    refuse(lambda: open_search(file), file, "could run code")
    assert not ran.exists()
    pickle.loads(pickle.dumps(Runs(ran)))
    assert ran.exists()  # this one would have


# Bombs.

BOMBS = """
import resource, sys, time
import fuzz_targets, test_malformed as t
from pathlib import Path

fuzz_targets.start()
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**29,) * 2)
for name, data in t.bombs():
    start = time.process_time()
    assert not fuzz_targets.run(name, data), (name, data[:80])
    assert time.process_time() - start < 5, (name, data[:80])
print("refused")
"""


def bombs() -> Iterator[tuple[str, bytes]]:
    """Small inputs that claim much, each with the target that must refuse it."""
    for data in HEADERS.values():
        yield "safetensors_file", data
    for data in GGUFS.values():
        yield "gguf_file", data
    for shape in ([2**40], [2**62, 2**62], [2**20, 2**20]):
        yield "quant_state", bytes(state(shape=shape).tolist())
        yield "search_file", one(shape, 8)
    for scale in SCALES.values():
        yield "search_pickle", fuzz_targets.pt_bytes({"scale": scale, "clip": []})
    clips = [(endless(), torch.ones(2, 2))]
    yield "search_pickle", fuzz_targets.pt_bytes({"scale": [], "clip": clips})
    yield "index_file", b'{"weight_map":' * 50_000
    yield "report_file", b'{"linears":[' * 50_000
    for count in (2**33, 2**62):
        yield "pt_file", fuzz_targets.pt_bytes({"a": torch.zeros(1).expand(count)})
    for text in (b"(a+)+$", b".*" * 30 + b"Q", b"(" * 8000):
        yield "pattern", text
    for name in ("gguf_config", "quantize_config", "tokenizer_file"):
        yield name, b'{"a":' * 50_000


@pytest.mark.slow
def test_bombs() -> None:
    """Little memory and time, whatever is claimed: half a GiB more than the program itself."""
    paths = os.pathsep.join([*map(str, Path(__file__).parents[:1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", BOMBS],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.stdout == "refused\n", done.stderr
