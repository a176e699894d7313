"""Whole model folders that are damaged or hostile: one line of SalienceError from every entrance,
and no code of theirs runs. Unfinished works that are damaged, too.
"""

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

import salience
from fuzz_targets import NAME, check_error
from helpers_bad import QUICK, Runs, save_llama
from helpers_checkpoint import refuse
from salience.blocks.hidden import HiddenStates
from salience.blocks.journal import Journal
from salience.cli.app import main
from salience.errors import SalienceError
from salience.inspection import inspect
from salience.source import open_source

STATE = "weight.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("malformed") / "llama")


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model as awq, compressed-tensors and bitsandbytes."""
    folder = tmp_path_factory.mktemp("made")
    for fmt, method, scheme in (
        ("awq", "rtn", "w4g32"),
        ("compressed-tensors", "rtn", "w4g32"),
        ("bitsandbytes", "nf4", "nf4-dq"),
    ):
        salience.quantize(str(model), folder / fmt, method=method, scheme=scheme, format=fmt)
    return {path.name: path for path in folder.iterdir()}


def copied(folder: Path, out: Path) -> Path:
    return Path(shutil.copytree(folder, out / "copy"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [
        *({"quantization_config": value} for value in ("awq", 4, [1], {"quant_method": []})),
        *({"num_hidden_layers": count} for count in (10**9, 2**63, 10**30, -1, "2", None, 1e9)),
        {"text_config": {"num_hidden_layers": 10**9}},
        *({"hidden_size": size} for size in (2**62, -64, 0, 1.5, [64])),
        *({"vocab_size": size} for size in (2**62, 10**30, -1)),
        *({"head_dim": size} for size in (2**50, -2, "x")),
        {"intermediate_size": 2**62},
        {"num_key_value_heads": 0},
        {"rope_parameters": {"rope_type": "yarn"}},
        {"rope_parameters": 7},
        {"model_type": "../llama"},
        {"model_type": {"a": 1}},
        {"architectures": 3, "vocab_size": 2**40},
        {"tie_word_embeddings": "maybe", "hidden_size": 65},
        {"dtype": {"a": 1}, "hidden_size": 128},
    ],
    ids=lambda changes: str(changes)[:50],
)
def test_config_of_a_folder(changes: dict[str, Any], model: Path, tmp_path: Path) -> None:
    folder = copied(model, tmp_path)
    edit_config(folder, **changes)
    refuse(lambda: salience.load(folder))
    try:
        inspect(open_source(str(folder)))
    except SalienceError as error:
        check_error(error)


def test_skip_list_that_is_none(made: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(made["awq"], tmp_path)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    for junk in (7, "lm_head", {"a": 1}):
        edit_config(folder, quantization_config=config | {"modules_to_not_convert": junk})
        source = open_source(str(folder))
        refuse(lambda source=source: inspect(source), "modules_to_not_convert must be a list")


@pytest.mark.parametrize("shape", [(), (3,), (64, 1)])
def test_groups_of_other_columns(
    shape: tuple[int, ...], made: dict[str, Path], tmp_path: Path
) -> None:
    folder = copied(made["compressed-tensors"], tmp_path)
    name = f"{NAME}.weight_g_idx"
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = torch.zeros(shape, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refuse(lambda: inspect(open_source(str(folder))), f"tensor {name} of {folder}", "columns")
    refuse(lambda: salience.load(folder), NAME, "weight_g_idx must be int32")


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000],
    ids=lambda text: str(text[:10]),
)
def test_config_that_is_none(text: bytes, model: Path, tmp_path: Path) -> None:
    folder = copied(model, tmp_path)
    (folder / "config.json").write_bytes(text)
    for use in (salience.load, lambda path: inspect(open_source(str(path)))):
        refuse(lambda use=use: use(folder), folder / "config.json")


def test_layers_deep_in_a_config(model: Path, tmp_path: Path) -> None:
    folder = copied(model, tmp_path)
    edit_config(folder, vision_config=[{"inner": {"depth": 10**9}}])
    refuse(lambda: open_source(str(folder)), "config.json says depth is 1000000000")


def gguf_llama(path: Path, rows: int = 64) -> Path:
    """A Llama of one layer, whose q has `rows` outputs."""
    shapes = {
        "token_embd": (32, 64),
        "output_norm": (64,),
        "output": (32, 64),
        "blk.0.attn_q": (rows, 64),
        "blk.0.attn_k": (64, 64),
        "blk.0.attn_v": (64, 64),
        "blk.0.attn_output": (64, 64),
        "blk.0.attn_norm": (64,),
        "blk.0.ffn_norm": (64,),
        "blk.0.ffn_gate": (96, 64),
        "blk.0.ffn_up": (96, 64),
        "blk.0.ffn_down": (64, 96),
    }
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list([f"t{i}" for i in range(32)])
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", numpy.ones(shape, numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_tensor_that_cannot_be_rearranged(tmp_path: Path) -> None:
    salience.load(gguf_llama(tmp_path / "good.gguf"))
    path = gguf_llama(tmp_path / "bad.gguf", rows=7)
    refuse(lambda: salience.load(path), f"tensor blk.0.attn_q.weight of {path}")


@pytest.mark.parametrize(
    ("fmt", "part"),
    [
        ("awq", "scales"),
        ("compressed-tensors", "weight_scale"),
        ("bitsandbytes", "weight.nested_absmax"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite(
    fmt: str, part: str, value: float, made: dict[str, Path], tmp_path: Path
) -> None:
    folder = copied(made[fmt], tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{NAME}.{part}"].view(-1)[0] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refuse(lambda: salience.load(folder), f"linear {NAME} of", "scales that are not finite")


def test_offset_that_is_no_number(made: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(made["bitsandbytes"], tmp_path)
    tensors = load_file(folder / "model.safetensors")
    values = json.loads(bytes(tensors[f"{NAME}.{STATE}"].tolist())) | {
        "nested_offset": float("nan")
    }
    tensors[f"{NAME}.{STATE}"] = torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refuse(lambda: salience.load(folder), f"linear {NAME} of", "not finite")


def test_pickles_are_not_models(model: Path, tmp_path: Path) -> None:
    folder = copied(model, tmp_path)
    (folder / "model.safetensors").unlink()
    ran = tmp_path / "ran"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(ran)))
    refuse(lambda: salience.load(folder), "pytorch_model.bin, a pickle")
    refuse(lambda: open_source(str(folder)), "pytorch_model.bin, a pickle")
    assert not ran.exists()


@pytest.mark.parametrize("kind", [None, "llama"])
def test_code_of_a_folder_does_not_run(kind: str | None, model: Path, tmp_path: Path) -> None:
    """Not its config's, model's, tokenizer's or generation's, and not one by an installed name."""
    folder, ran = copied(model, tmp_path), tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\n"
    for name in ("mine", "torch", "configuration_llama", "tokenization_llama", "conftest"):
        (folder / f"{name}.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    parts = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    auto_map = {part: f"mine.{part}" for part in parts}
    edit_config(
        folder,
        auto_map=auto_map,
        custom_generate="mine",
        **({"model_type": kind} if kind else {"model_type": "mine"}),
    )
    path = folder / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["mine.T", "mine.T"]}}
    path.write_text(json.dumps(tokenizer))
    for use in (
        salience.load,
        lambda place: inspect(open_source(str(place))),
        lambda place: open_source(str(place)).tokenizer,
    ):
        try:
            use(folder)
        except SalienceError as error:
            check_error(error)
            assert kind == "llama" or "--trust-remote-code" in str(error)
        else:
            assert kind == "llama"
    assert not ran.exists()


def damage_record(folder: Path) -> Path:
    (folder / "block-00000.json").write_text('{"block": {"name": 3}}')
    return folder


def damage_json(folder: Path) -> Path:
    (folder / "block-00001.json").write_bytes(b"\xff{")
    return folder / "block-00001.json"


def damage_block(folder: Path) -> Path:
    path = folder / "block-00000.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    return path


def damage_job(folder: Path) -> Path:
    (folder / "job.json").write_text("[")
    return folder / "job.json"


def damage_search(folder: Path) -> Path:
    (folder / "search-00000.safetensors").write_bytes(b"nonsense")
    return folder / "search-00000.safetensors"


@pytest.mark.parametrize(
    "damage", [damage_record, damage_json, damage_block, damage_job, damage_search]
)
def test_journals(
    damage: Callable[[Path], Path], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A work that was cut off and damaged is named, and what is whole of it is kept."""

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    def work() -> object:
        options = {"method": "rtn", "scheme": "w4g32", "format": "awq"}
        return salience.quantize(str(model), out, save_search=tmp_path / "search", **options)

    out, folder = tmp_path / "out", tmp_path / "out.partial"
    with monkeypatch.context() as patch:
        patch.setattr("salience.pipeline.quantize.assemble", cut)
        with pytest.raises(KeyboardInterrupt):
            work()
    damaged = damage(folder)
    refuse(work, damaged)
    assert (folder / "block-00001.safetensors").exists() and not out.exists()
    shutil.rmtree(folder)
    work()
    assert out.exists()


def test_hidden_states_that_are_cut_short(tmp_path: Path) -> None:
    with Journal(tmp_path / "out", {}) as journal:
        journal.hidden_file(0).write_bytes(bytes(12))
        hidden = HiddenStates(journal, (2, 4, 8), 1, torch.device("cpu"), on_disk=True)
        refuse(lambda: hidden.get(1), journal.hidden_file(0), "too short")


def test_the_command_says_one_line(
    model: Path,
    made: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    deep, steered = copied(model, tmp_path), copied(made["awq"], tmp_path / "x")
    edit_config(deep, num_hidden_layers=10**9)
    tensors = load_file(steered / "model.safetensors")
    tensors["\x1b[2J\n.qweight"] = torch.zeros(1)
    save_file(tensors, steered / "model.safetensors", {"format": "pt"})
    for command in (
        ("inspect", deep),
        ("quantize", deep, "-o", tmp_path / "out", *QUICK),
        ("plan", deep),
        ("chat", steered, "--prompt", "a"),
    ):
        monkeypatch.setattr(sys, "argv", ["salience", *map(str, command)])
        monkeypatch.setattr(sys, "stdin", None)  # nothing is piped in
        with pytest.raises(SystemExit) as stop:
            main()
        stdout, stderr = capfd.readouterr()
        assert (stop.value.code, stdout) == (2, "")
        assert stderr.startswith("error: ") and stderr[:-1].isprintable()
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    **dict.fromkeys(
        ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    ),
    "added_tokens": [],
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
}


def bpe(vocabulary: dict[str, int], *merges: list[str]) -> dict[str, Any]:
    return TOKENIZER | {"model": {"type": "BPE", "vocab": vocabulary, "merges": list(merges)}}


TOKENIZERS: dict[str, Any] = {
    "list": [],
    "empty": {},
    "no model": TOKENIZER | {"model": None},
    "model of no known type": TOKENIZER | {"model": {"type": "X"}},
    "ids beyond 32 bits": bpe({"a": 2**40}),
    "negative ids": bpe({"a": -1}),
    "merges of nothing": bpe({}, ["a", "b"]),
    "unigram of no values": TOKENIZER | {"model": {"type": "Unigram", "vocab": [], "unk_id": 7}},
    "bad expression": TOKENIZER | {
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated",
                          "invert": False}
    },
    "deep": TOKENIZER | {"decoder": json.loads('{"type":"Sequence","decoders":[' * 90 + "]}" * 90)},
}  # fmt: skip


@pytest.mark.parametrize("kind", list(TOKENIZERS))
def test_tokenizer(kind: str, model: Path, tmp_path: Path) -> None:
    folder = copied(model, tmp_path)
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZERS[kind]))
    try:
        tokenizer = open_source(str(folder)).tokenizer
    except SalienceError as error:
        check_error(error)
        assert "no usable tokenizer" in str(error)
    else:
        assert kind == "deep" and tokenizer.decode([]) == ""
