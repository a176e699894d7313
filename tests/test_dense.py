"""quantize --format dense, and --dtype: the folded float weights, and what is stored float."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import salience
from helpers_checkpoint import config_of, dequantized, refuse, stored_tensors
from salience.calibration import Calibration
from salience.formats import get_format
from salience.planning.bytes import checkpoint_bytes
from salience.scheme import Scheme
from salience.source import open_source
from salience.structure import codable
from tiny_models import error, llama_config, logits, make_model, save
from workshop import Workshop, differences, finished_blocks

HALF, BRAIN = torch.float16, torch.bfloat16


@pytest.fixture(scope="module")
def calibration(text_file: Path) -> Calibration:
    return Calibration(str(text_file), samples=2, seqlen=64)


@pytest.fixture(scope="module")
def dense(llama: Path, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dense") / "out"
    salience.quantize(str(llama), out, scheme="w4g32", format="dense", calibration=calibration)
    return out


def test_the_function_is_the_same(llama: Path, dense: Path) -> None:
    assert error(logits(salience.load(dense)), logits(salience.load(llama))) < 4e-3
    before, after = stored_tensors(llama), stored_tensors(dense)
    assert before.keys() == after.keys()
    assert all(t.dtype == HALF and t.shape == before[n].shape for n, t in after.items())
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(after[name], before[name].half())


def test_the_weights_are_easier(
    llama: Path, dense: Path, calibration: Calibration, tmp_path: Path
) -> None:
    """Rounded to nearest, they are AWQ; the model they were made of is not."""
    floats = logits(salience.load(llama))
    wrong = {}
    for name, source in (("plain", llama), ("folded", dense)):
        out = tmp_path / name
        salience.quantize(str(source), out, method="rtn", scheme="w4g32", calibration=calibration)
        wrong[name] = error(logits(salience.load(out)), floats)
    assert wrong["folded"] < 0.95 * wrong["plain"]


def test_it_is_a_float_checkpoint(llama: Path, dense: Path) -> None:
    config, source = config_of(dense), config_of(llama)
    assert "quantization_config" not in config
    assert config.pop("dtype") == "float16"
    source.pop("dtype")
    assert config == source
    report = json.loads((dense / "salience_report.json").read_text())
    assert report["format"] == "dense" and report["bits_per_weight"] == 16
    assert report["error"] < report["error_rtn"]
    model = open_source(str(dense)).skeleton()
    schemes = {name: Scheme(4, 32) for name in codable(model) if "layers" in name}
    tensors = stored_tensors(dense).values()
    planned = checkpoint_bytes(model, schemes, get_format("dense"))
    assert planned == sum(tensor.nbytes for tensor in tensors)


def test_dense_tied_weights(calibration: Calibration, tmp_path: Path) -> None:
    save(make_model(llama_config(tie_word_embeddings=True)), tmp_path / "in")
    options: dict[str, Any] = {"scheme": "w4g32", "calibration": calibration}
    salience.quantize(str(tmp_path / "in"), tmp_path / "out", format="dense", **options)
    before, after = (logits(salience.load(tmp_path / name)) for name in ("in", "out"))
    assert error(after, before) < 4e-3
    assert "lm_head.weight" not in stored_tensors(tmp_path / "out")


def test_what_dense_is_not_for(llama: Path, calibration: Calibration, tmp_path: Path) -> None:
    def run(**options: Any) -> object:
        source, out = str(llama), tmp_path / "out"
        return salience.quantize(
            source, out, format="dense", calibration=calibration, **{"scheme": "w4g32", **options}
        )

    refuse(lambda: run(method="rtn"), "--method rtn", "--method awq")
    refuse(lambda: run(method="nf4", scheme="nf4"), "--method nf4")
    refuse(lambda: run(rules=[("lm_head", "w8g32")]), "lm_head", "dense")
    refuse(lambda: run(dtype="float32"), "float32", "bfloat16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["awq", "compressed-tensors", "dense"])
def test_bfloat16(format: str, llama: Path, calibration: Calibration, tmp_path: Path) -> None:
    """What is float is bf16; scales stay fp16, and the codes are those of an fp16 checkpoint."""
    options: dict[str, Any] = {"scheme": "w4g32", "format": format, "calibration": calibration}
    for dtype in ("float16", "bfloat16"):
        salience.quantize(str(llama), tmp_path / dtype, dtype=dtype, **options)
    assert config_of(tmp_path / "bfloat16")["dtype"] == "bfloat16"
    half, brain = (stored_tensors(tmp_path / name) for name in ("float16", "bfloat16"))
    assert half.keys() == brain.keys()
    for name, tensor in brain.items():
        if name.endswith(("scales", "_scale")) or not tensor.is_floating_point():
            assert half[name].dtype == tensor.dtype and torch.equal(half[name], tensor)
        else:
            assert half[name].dtype == HALF and tensor.dtype == BRAIN
            assert error(tensor, half[name]) < 2**-8
    model = salience.load(tmp_path / "bfloat16")  # in fp32, on a CPU
    assert error(logits(model), logits(salience.load(tmp_path / "float16"))) < 5e-2
    own = salience.load(tmp_path / "bfloat16", dtype=BRAIN)
    assert {p.dtype for p in own.parameters()} == {BRAIN}
    assert error(logits(own), logits(model)) < 5e-2


def test_bfloat16_to_dense(llama: Path, calibration: Calibration, tmp_path: Path) -> None:
    """The dtype of a dense conversion is the checkpoint's."""
    options: dict[str, Any] = {"scheme": "w4g32", "calibration": calibration, "dtype": "bfloat16"}
    salience.quantize(str(llama), tmp_path / "in", **options)
    salience.convert(tmp_path / "in", tmp_path / "out", "dense")
    assert config_of(tmp_path / "out")["dtype"] == "bfloat16"
    made, exact = stored_tensors(tmp_path / "out"), dequantized(tmp_path / "in")
    for name, tensor in made.items():
        assert tensor.dtype == BRAIN and torch.equal(tensor, exact[name].to(BRAIN))


def test_norms_that_fp16_lacks(calibration: Calibration, tmp_path: Path) -> None:
    save(make_model(llama_config()).bfloat16(), tmp_path / "in")
    file = tmp_path / "in" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] *= 1e5
    save_file(tensors, file, metadata={"format": "pt"})
    options: dict[str, Any] = {"scheme": "w4g32", "calibration": calibration}
    source, out = str(tmp_path / "in"), tmp_path / "out"
    refuse(
        lambda: salience.quantize(source, out, **options),
        "model.norm.weight overflows fp16",
        "--dtype bfloat16",
    )
    assert not out.exists()
    salience.quantize(source, out, dtype="bfloat16", **options)
    assert torch.equal(stored_tensors(out)["model.norm.weight"], tensors["model.norm.weight"])
    refuse(
        lambda: salience.convert(out, tmp_path / "dense", "dense", dtype="float16"),
        "model.norm.weight overflows fp16",
        "--dtype bfloat16",
    )


def test_killed_and_continued(
    llama: Path, text_file: Path, tmp_path: Path, workshop: Workshop
) -> None:
    place = tmp_path.resolve()
    command = ("quantize", llama, "--format", "dense", "--scheme", "w4g32", "--device", "cpu")
    command += ("--calibration", text_file, "--samples", "2", "--seqlen", "64")
    whole = workshop(*command, "--dtype", "bfloat16", "-o", "whole", cwd=place)
    assert whole.status == 0 and "16.00 bits" in whole.stdout
    options = ("--dtype", "bfloat16", "-o", "out")
    run = workshop(*command, *options, cwd=place, kill_at=2 * len(whole.changes) // 3)
    assert run.status == -9 and not (place / "out").exists()
    assert finished_blocks(place / "out.partial")
    assert "--dtype bfloat16" in workshop(*command, "-o", "out", cwd=place).line
    assert workshop(*command, *options, cwd=place).status == 0
    # The report has the name of the folder.
    assert differences(place / "out", place / "whole") == ["salience_report.json"]
