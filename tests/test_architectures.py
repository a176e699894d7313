"""Every decoder of Transformers, tiny and random: what is folded, and the whole way to disk.

`python tests/test_architectures.py` writes the table of docs/architectures.md anew.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3Config

import salience
from salience.blocks.blockwise import run_block
from salience.calibration import Calibration
from salience.errors import SalienceError
from salience.formats import AutoAwq
from salience.structure import (
    Fold,
    apply_fold,
    find_blocks,
    kept,
    linears,
    search_folds,
    sink_groups,
)
from tiny_architectures import COMMON, OTHERS, REFUSED, architecture
from tiny_models import error, first_inputs, logits, make_model, save

TABLE = Path(__file__).parent.parent / "docs" / "architectures.md"
BEGIN = "<!-- from here on written by: python tests/test_architectures.py -->\n"
MADE_WITH = "5.23"  # the Transformers of the table

Found = dict[int, tuple[list[tuple[str, ...]], list[Fold], dict[str, str]]]


def float_model(name: str) -> Any:
    return make_model(architecture(name)).requires_grad_(False)


@torch.no_grad()
def folds_of(model: Any) -> Found:
    """Groups, folds, and why there is none, of each block."""
    _, blocks = find_blocks(model)
    hidden, arguments = first_inputs(model, blocks)
    found = {}
    for index, block in enumerate(blocks):
        run = partial(run_block, block, hidden, arguments.of(index, 0))
        groups = sink_groups(block, run)
        found[index] = (groups, *search_folds(block, run, groups))
    return found


@pytest.mark.parametrize("name", COMMON)
def test_folds_keep_the_function(name: str) -> None:
    """All folds of all blocks together, with random scales, on other tokens than found them."""
    model = float_model(name)
    expected = logits(model)
    random = torch.Generator().manual_seed(3)
    count = 0
    for index, (_, folds, _) in folds_of(model).items():
        for fold in folds:
            free = torch.exp(torch.rand(int(fold.index.max()) + 1, generator=random) * 2 - 1)
            apply_fold(find_blocks(model)[1][index], fold, free[fold.index])
            count += 1
    assert count >= 2
    assert error(logits(model), expected) < 1e-4


def dense_copy(folder: Path, out: Path, model: nn.Module) -> Path:
    """A quantized folder with its weights dequantized, under the names they are stored by."""
    config = json.loads((folder / "config.json").read_text())
    scheme = config.pop("quantization_config")
    fmt = AutoAwq()
    stored = load_file(folder / "model.safetensors")
    dense = {}
    for name, tensor in stored.items():
        owner, _, leaf = name.rpartition(".")
        if leaf not in fmt.tensors:
            dense[name] = tensor.float()
        elif leaf == "qweight":
            parts = {key: stored[f"{owner}.{key}"] for key in fmt.tensors}
            weight = fmt.read(parts, fmt.scheme(scheme, owner)).dequantize()
            modules = dict(model.named_modules())
            transposed = owner in modules and type(modules[owner]).__name__ == "Conv1D"
            dense[f"{owner}.weight"] = (weight.T if transposed else weight).contiguous()
    out.mkdir()
    (out / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    save_file(dense, out / "model.safetensors", metadata={"format": "pt"})
    return out


def check_round_trip(name: str, text_file: Path, tmp_path: Path) -> None:
    """Quantize, load, and compare with what plain Transformers makes of the same tensors."""
    model = float_model(name)
    source, out = save(model, tmp_path / "in"), tmp_path / "out"
    assert error(logits(salience.load(source)), logits(model)) < 1e-6
    report = salience.quantize(
        str(source),
        out,
        method="awq",
        scheme="w4g16",
        calibration=Calibration(str(text_file), samples=2, seqlen=32),
    )
    prefix, blocks = find_blocks(model)
    assert {linear.name for linear in report.linears} == {f"{prefix}.{n}" for n in linears(blocks)}
    assert set(report.kept_modules) == set(kept(model))
    assert report.error < report.error_rtn
    found = logits(salience.load(out, kernel="reference"))
    plain, info = AutoModelForCausalLM.from_pretrained(
        dense_copy(out, tmp_path / "dense", model), dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
    assert error(found, logits(plain.eval())) < 1e-4
    assert error(found, logits(model)) < 0.9


@pytest.mark.parametrize("name", COMMON)
def test_round_trip(name: str, text_file: Path, tmp_path: Path) -> None:
    check_round_trip(name, text_file, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_round_trip_of_others(name: str, text_file: Path, tmp_path: Path) -> None:
    check_round_trip(name, text_file, tmp_path)


@pytest.mark.parametrize("name", ["bart", "gemma3n_text", "glm_moe_dsa"])
def test_refused(name: str, text_file: Path, tmp_path: Path) -> None:
    source = save(float_model(name), tmp_path / "in")
    text = Calibration(str(text_file), samples=2, seqlen=32)
    with pytest.raises(SalienceError):
        salience.quantize(str(source), tmp_path / "out", scheme="w4g16", calibration=text)
    assert not (tmp_path / "out").exists()


def test_stored_names_are_those_of_the_source(text_file: Path, tmp_path: Path) -> None:
    """Mixtral's experts are stored one by one, and loaded as two stacked parameters."""
    model = float_model("mixtral")
    source, out = save(model, tmp_path / "in"), tmp_path / "out"
    text = Calibration(str(text_file), samples=2, seqlen=32)
    salience.quantize(str(source), out, scheme="w4g16", calibration=text)
    before, after = (load_file(f / "model.safetensors") for f in (source, out))
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in before
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert set(config["modules_to_not_convert"]) == {
        f"model.layers.{layer}.{moe}.{part}"
        for layer in (0, 1)
        for moe in ("mlp", "block_sparse_moe")
        for part in ("gate", "experts")
    }
    owners = {name.rpartition(".")[0] for name in before}
    assert {name.rpartition(".")[0] for name in after} == owners
    for name, tensor in before.items():
        if ".experts." in name or ".block_sparse_moe.gate." in name:
            assert torch.equal(after[name], tensor.half()), name


def test_decoder_of_a_model_that_sees(text_file: Path, tmp_path: Path) -> None:
    """A vision tower larger than the decoder stays float, and the names are those of the Hub."""
    vision = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    decoder = architecture("gemma3_text").to_dict()
    model = make_model(
        Gemma3Config(text_config=decoder, vision_config=vision, mm_tokens_per_image=4)
    )
    assert find_blocks(model)[0] == "model.language_model.layers"
    assert set(kept(model).values()) == {"outside the blocks"}
    assert any(".vision_tower." in name for name in kept(model))
    source, out = save(model, tmp_path / "in"), tmp_path / "out"
    text = Calibration(str(text_file), samples=2, seqlen=32)
    salience.quantize(str(source), out, scheme="w4g16", calibration=text)
    stored = load_file(out / "model.safetensors")
    assert "language_model.model.layers.0.mlp.down_proj.qweight" in stored
    assert error(logits(salience.load(out, kernel="reference")), logits(model)) < 0.5


# The table.


def lines_of(name: str) -> list[str]:
    """The rows of one architecture, blocks that are alike together."""
    model = float_model(name)
    alike: dict[tuple[str, ...], list[int]] = {}
    for index, found in folds_of(model).items():
        alike.setdefault(tuple(rows_of(*found)), []).append(index)
    lines = []
    for rows, indices in alike.items():
        if len(alike) > 1:
            lines += [f"Blocks {', '.join(map(str, indices))} of the tiny model:", ""]
        lines += ["| divided | multiplied | rule | free scales | proof |", "|---|---|---|---|---|"]
        lines += [*rows, ""]
    lines += [stays_float(model), ""]
    return lines


def rows_of(groups: list[tuple[str, ...]], folds: list[Fold], why: dict[str, str]) -> list[str]:
    rows = []
    for group in groups:
        fold = next((fold for fold in folds if group[0] in fold.sinks), None)
        if fold is None:
            rows.append(f"| no fold | {', '.join(group)} | {why[group[0]]} | | |")
        elif fold.sinks[0] == group[0]:
            others = ", ".join(f"({name})" for name, _ in fold.others)
            sinks = ", ".join(fold.sinks) + (f", {others}" if others else "")
            proof = "< 1e-5" if fold.error < 1e-5 else f"{fold.error:.0e}"
            rows.append(f"| {fold.prev} | {sinks} | {fold.rule} | {fold.channels} | {proof} |")
    return rows


def stays_float(model: nn.Module) -> str:
    prefix, _ = find_blocks(model)
    parts: dict[str, list[str]] = {}
    for name, reason in kept(model).items():
        inside = name.startswith(f"{prefix}.")
        short = name.removeprefix(f"{prefix}.").partition(".")[2] if inside else name
        if short not in parts.setdefault(reason, []):
            parts[reason].append(short)
    listed = "; ".join(
        f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''} ({reason})"
        for reason, names in parts.items()
    )
    return f"Stays float: {listed}."


def table() -> str:
    """All architectures, those of one result together, and those that are refused."""
    same: dict[tuple[str, ...], list[str]] = {}
    for name in sorted({**COMMON, **OTHERS}):
        same.setdefault(tuple(lines_of(name)), []).append(name)
    lines = []
    for rows, names in same.items():
        lines += [f"### {', '.join(names)}", "", *rows]
    lines += ["## Refused", "", "| architecture | reason |", "|---|---|"]
    for name in sorted(REFUSED):
        try:
            folds_of(float_model(name))
        except SalienceError as refusal:
            lines.append(f"| {name} | {refusal} |")
    return "\n".join(lines) + "\n"


@pytest.mark.slow
@pytest.mark.skipif(
    not transformers.__version__.startswith(MADE_WITH), reason="made with another Transformers"
)
def test_the_committed_table_is_what_is_found() -> None:
    assert TABLE.read_text(encoding="utf-8").partition(BEGIN)[2] == table()


if __name__ == "__main__":
    torch.set_num_threads(1)
    text = TABLE.read_text(encoding="utf-8").partition(BEGIN)[0] if TABLE.is_file() else ""
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(text + BEGIN + table(), encoding="utf-8")
    sys.stderr.write(f"wrote {TABLE}\n")
