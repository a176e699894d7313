"""`--effort best`: whole models of several architectures, in any format, after any kill."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import salience
from helpers_checkpoint import qtensors
from salience.blocks.blockwise import BlockArguments, record_inputs, run_block
from salience.blocks.window import window
from salience.calibration import Calibration
from salience.errors import SalienceError
from salience.learning.pupil import Pupil
from salience.methods import BEST, EFFORTS, Tuning
from salience.pipeline import quantize as pipeline
from salience.pipeline.prepare import prepare
from salience.pipeline.quantize import Variant, quantize_all
from salience.planning.plan import Budget, make_plan
from salience.reports.report import Report
from salience.source import open_source
from salience.structure import find_blocks
from tiny_architectures import COMMON, tiny_config
from tiny_models import TEXT, error, logits, make_model, random_tokens, save
from workshop import Run, Workshop, differences, finished_blocks

QUICK = Tuning(iterations=12, batch_tokens=128, rounding_rate=0.002, range_rate=3e-4, check_every=3)
KINDS = ("llama", "gemma2", "gpt2", "qwen3_moe")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few iterations are enough to see that it works."""
    monkeypatch.setitem(EFFORTS, "best", {"awq": replace(BEST, learns=QUICK, end_to_end=None)})


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT[:20_000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def calibration(text: Path) -> Calibration:
    return Calibration(str(text), samples=64, seqlen=32)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each kind."""
    folder = tmp_path_factory.mktemp("models")
    return {
        kind: save(make_model(tiny_config(kind, **COMMON[kind])), folder / kind) for kind in KINDS
    }


def best(model: Path, out: Path, calibration: Calibration, **options: Any) -> Report:
    options = {"scheme": "w3g16", "format": "compressed-tensors", "effort": "best"} | options
    return salience.quantize(str(model), out, calibration=calibration, device="cpu", **options)


def never_worse(report: Report) -> None:
    for block in report.blocks:
        assert block.loss is not None and block.loss_start is not None
        assert 0 < block.loss <= block.loss_start
        assert (block.loss < block.loss_start) == (block.iterations > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_architectures(
    kind: str, models: dict[str, Path], calibration: Calibration, tmp_path: Path
) -> None:
    report = best(models[kind], tmp_path / "best", calibration)
    never_worse(report)
    assert report.effort == "best" and any(block.iterations for block in report.blocks)
    assert report.phase_seconds["learn"] > 0
    balanced = best(models[kind], tmp_path / "balanced", calibration, effort="balanced")
    assert [b.loss for b in balanced.blocks] == [None] * len(balanced.blocks)
    coded, before = qtensors(tmp_path / "best"), qtensors(tmp_path / "balanced")
    assert coded.keys() == before.keys()
    assert any(not torch.equal(coded[name].q, before[name].q) for name in coded)
    found = logits(salience.load(tmp_path / "best", kernel="reference"))
    assert error(found, logits(salience.load(models[kind]))) < 1


@pytest.mark.parametrize(
    ("scheme", "fmt"),
    [
        ("w4g16-sym", "gptq"),
        ("w2g16", "gptq"),
        ("w8g16", "compressed-tensors"),
        ("w4channel", "compressed-tensors"),
        ("w4g32", "gguf"),
        ("w4g32", "awq"),
    ],
)
def test_formats(
    scheme: str, fmt: str, models: dict[str, Path], calibration: Calibration, tmp_path: Path
) -> None:
    report = best(models["llama"], tmp_path / "out", calibration, scheme=scheme, format=fmt)
    never_worse(report)
    salience.load(tmp_path / "out", kernel="reference")


def test_it_is_closer_to_the_float_model(
    models: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is text enough to learn from."""
    longer = replace(QUICK, iterations=40, batch_tokens=256, check_every=8)
    monkeypatch.setitem(EFFORTS, "best", {"awq": replace(BEST, learns=longer, end_to_end=None)})
    calibration = Calibration(str(text), samples=64, seqlen=64)
    tokens = random_tokens(4, 64, seed=5)
    errors = []
    reference = logits(salience.load(models["gemma2"]), tokens)
    for effort in ("balanced", "best"):
        report = best(models["gemma2"], tmp_path / effort, calibration, effort=effort)
        found = logits(salience.load(tmp_path / effort, kernel="reference"), tokens)
        errors.append(error(found, reference))
    assert errors[1] < 0.97 * errors[0]
    never_worse(report)
    assert all(block.iterations for block in report.blocks)


def test_rules_and_floats(
    models: dict[str, Path], calibration: Calibration, tmp_path: Path
) -> None:
    """Linears of several schemes, linears that stay float, a head that does not learn."""
    report = best(
        models["llama"],
        tmp_path / "out",
        calibration,
        rules=[("down_proj", "w4g32"), ("lm_head", "w8g32")],
        skip=["layers.0.self_attn.o_proj"],
    )
    head = report.blocks.pop()
    assert head.loss is None and head.name == ""
    never_worse(report)
    found = qtensors(tmp_path / "out")
    assert {str(qt.scheme) for qt in found.values()} == {"w3g16", "w4g32", "w8g32"}
    assert "model.layers.0.self_attn.o_proj" not in found


def test_a_block_of_nothing_to_learn(
    models: dict[str, Path], calibration: Calibration, tmp_path: Path
) -> None:
    report = best(models["llama"], tmp_path / "out", calibration, only=["layers.1"])
    assert report.blocks[0].loss is None and report.blocks[1].loss is not None


def test_on_disk_or_not(
    models: dict[str, Path],
    calibration: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same bytes, also after a rehearsal and with a search taken from a file."""
    kept = tmp_path / "search"
    best(models["llama"], tmp_path / "a", calibration, save_search=kept)
    monkeypatch.setattr(pipeline, "choose_budget", lambda *_: Budget(True, True, 0))
    best(models["llama"], tmp_path / "b", calibration)
    best(models["llama"], tmp_path / "c", calibration, from_search=kept, scheme=None)
    names = ("a", "b", "c")
    first, *others = ((tmp_path / name / "model.safetensors").read_bytes() for name in names)
    assert all(other == first for other in others)


@pytest.mark.parametrize(
    ("kind", "scheme", "fmt"),
    [
        ("gpt2", "w3g16", "compressed-tensors"),
        ("qwen3_moe", "w3g16", "compressed-tensors"),
        ("llama", "w4g16", "gptq"),
        ("llama", "w4g32-sym", "gptq"),
        ("llama", "w4g32", "awq"),
        ("llama", "w4g32", "gguf"),
    ],
)
def test_decoded_is_what_was_written(
    kind: str,
    scheme: str,
    fmt: str,
    models: dict[str, Path],
    calibration: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Outputs of the journal's blocks are those of the loaded checkpoint, but for rounding."""
    seen: list[Tensor] = []
    advance = Pupil.advance

    def noted(self: Pupil) -> None:
        advance(self)
        seen.append(self._coded.get(0).clone())

    monkeypatch.setattr(Pupil, "advance", noted)
    out = tmp_path / "out"
    best(models[kind], out, calibration, scheme=scheme, format=fmt)
    model = salience.load(out, keep=["."])
    # The embeddings that a block learned from were not rounded to fp16 yet.
    embeddings = model.get_input_embeddings()
    embeddings.load_state_dict(salience.load(models[kind]).get_input_embeddings().state_dict())
    x, arguments = inputs(model, calibration.tokens(open_source(str(models[kind])).tokenizer))
    for index, block in enumerate(find_blocks(model)[1]):
        with torch.no_grad():
            x = run_block(block, x, arguments.of(index, 0))
        assert error(x, seen[index]) < 2e-3


def inputs(model: Any, tokens: Tensor) -> tuple[Tensor, BlockArguments]:
    """What enters the first block of the first micro-batch, and the arguments of each block."""
    hidden: list[Tensor] = []
    _, blocks = find_blocks(model)
    cpu = torch.device("cpu")
    with torch.no_grad():
        arguments = record_inputs(model, blocks, tokens[:4], 4, cpu, lambda _, x: hidden.append(x))
    return hidden[0], arguments


# A run that is killed and goes on.

WORKED = ("--effort", "best", "--scheme", "w3g16", "--format", "compressed-tensors")
SHORT = ("--samples", "4", "--seqlen", "16", "--device", "cpu", "--calibration")


def run(workshop: Workshop, model: Path, text: Path, folder: Path, **how: Any) -> Run:
    folder.mkdir(exist_ok=True)
    args = ("quantize", model, "-o", "out", *WORKED, *SHORT, text)
    return workshop(*args, cwd=folder, iterations=4, **how)


@pytest.mark.parametrize("how", [{"on_disk": True}, {}], ids=str)
def test_kills(
    how: dict[str, Any], workshop: Workshop, models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    model = models["qwen3_moe"]
    whole = run(workshop, model, text, tmp_path / "whole", **how)
    assert whole.status == 0, whole
    changes = [line for line in whole.changes if not line.startswith("kept ")]
    records = [i for i, line in enumerate(changes, 1) if "os.rename" in line and ".json" in line]
    records = [i for i in records if "block-" in changes[i - 1]]
    assert len(records) == 2
    if how:
        assert any("coded-00001.bin" in line for line in changes)
    # Before and after each block is done, and where the last hidden states are written.
    for kill_at in (records[0] + 2,) if how else (records[1], records[0] + 1):
        folder = tmp_path / f"kill {kill_at}"
        assert run(workshop, model, text, folder, kill_at=kill_at, **how).status == -9
        done = finished_blocks(folder / "out.partial")
        again = run(workshop, model, text, folder, **how)
        assert again.status == 0, again
        assert len(done) == 2 * sum(record < kill_at for record in records)
        assert differences(folder / "out", tmp_path / "whole" / "out") == []
        assert [path.name for path in folder.iterdir()] == ["out"]


# What is refused, planned and shared.


def test_refusals(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    one = Calibration(str(text), samples=1, seqlen=32)
    with pytest.raises(SalienceError, match="--samples 2 or more"):
        best(models["llama"], tmp_path / "out", one)
    with pytest.raises(SalienceError, match="dense rounds nothing, so there is nothing to learn"):
        best(models["llama"], tmp_path / "out", one, format="dense")
    assert list(tmp_path.iterdir()) == []


def test_blocks_that_cannot_run_alone(calibration: Calibration, tmp_path: Path) -> None:
    """Later layers of Gemma 4 take keys and values from earlier ones."""
    config = tiny_config("gemma4_text", num_hidden_layers=4, num_kv_shared_layers=2,
                         layer_types=["sliding_attention", "full_attention"] * 2)  # fmt: skip
    model = save(make_model(config), tmp_path / "model")
    with pytest.raises(SalienceError, match=r"more than hidden states.*use --effort balanced"):
        best(model, tmp_path / "out", calibration)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_beside_other_efforts(
    models: dict[str, Path], calibration: Calibration, tmp_path: Path
) -> None:
    """`quantize_all` makes the same bytes."""
    ways = {"scheme": "w3g16", "format": "compressed-tensors"}
    efforts = ("best", "balanced", "fast")
    made = [Variant(tmp_path / effort, effort=effort, **ways) for effort in efforts]
    quantize_all(str(models["llama"]), made, calibration=calibration, device="cpu")
    best(models["llama"], tmp_path / "alone", calibration)
    files = [tmp_path / name / "model.safetensors" for name in ("best", "alone", "balanced")]
    contents = [file.read_bytes() for file in files]
    assert contents[0] == contents[1] != contents[2]


def test_plan(models: dict[str, Path], calibration: Calibration, tmp_path: Path) -> None:
    """Two sets of hidden states, and the time of the iterations."""
    plans = {}
    for effort in ("balanced", "best"):
        job = prepare(str(models["llama"]), effort=effort, scheme="w3g16",
                      format="compressed-tensors", device="cpu").job  # fmt: skip
        plans[effort] = make_plan(job, calibration, tmp_path)
    best, balanced = plans["best"], plans["balanced"]
    assert best.seconds["learn"] > 0 and "learn" not in balanced.seconds
    assert best.memory["learn"] > 0 and "learn" not in balanced.memory
    hidden = 4 * calibration.samples * calibration.seqlen * 64
    assert best.temporary_bytes - balanced.temporary_bytes == 2 * hidden
    assert window(job.blocks, torch.device("cuda"), True) == 1
