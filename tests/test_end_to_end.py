"""Tuning a whole model: gradients against autograd, what is written, what stays as it was."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

import salience
from helpers_checkpoint import qtensors
from salience.blocks.blockwise import logits_of
from salience.blocks.outside import embeddings_loaded
from salience.calibration import Calibration
from salience.checkpoint import SafetensorsCheckpoint
from salience.learning import distillation
from salience.learning.end_to_end import head_inputs
from salience.learning.student import Student
from salience.learning.trainer import Trainer
from salience.loading import set_tensor
from salience.methods import BEST, EFFORTS, EndToEnd
from salience.modules import is_transposed
from salience.pipeline import quantize as pipeline
from salience.pipeline.prepare import prepare
from salience.planning.plan import Budget
from salience.reports.report import read_report
from tiny_architectures import architecture
from tiny_models import error, llama_config, make_model, make_tokenizer, random_tokens, save

SETTINGS = EndToEnd(passes=2, steps=8, held_out=8, rate=0.03, float_rate=2e-3)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, SETTINGS)


def use(monkeypatch: pytest.MonkeyPatch, settings: EndToEnd) -> None:
    """Let the effort "best" have these settings."""
    monkeypatch.setitem(EFFORTS["best"], "awq", replace(BEST, learns=None, end_to_end=settings))


@pytest.fixture(scope="module")
def text(text_file: Path) -> Calibration:
    return Calibration(str(text_file), samples=16, seqlen=64)


def made(source: Path, out: Path, text: Calibration, **options: Any) -> dict[str, Tensor]:
    """All tensors of a model quantized to 3 bits, or as the options say."""
    given = {"effort": "best", "scheme": "w3g32", "format": "compressed-tensors", "device": "cpu"}
    salience.quantize(str(source), out, calibration=text, **{**given, **options})
    return load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def balanced(llama: Path, text: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama before anything is tuned."""
    out = tmp_path_factory.mktemp("balanced") / "out"
    made(llama, out, text, effort="balanced")
    return out


def divergences(student: Any, teacher: Any, tokens: Tensor) -> float:
    """The mean KL over tokens, of whole models, in fp64."""
    with torch.no_grad():
        log_p, log_q = (
            torch.log_softmax(model(input_ids=tokens, use_cache=False).logits.double(), -1)
            for model in (teacher, student)
        )
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


# Gradients.


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3_moe"])
def test_gradients_are_those_of_the_whole_model(
    name: str, tmp_path: Path, text: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp64, against one graph from all numbers to the loss, through whole logits."""
    monkeypatch.setitem(distillation.LOGITS, "cpu", 2000)  # pieces of six tokens
    source = save(make_model(architecture(name)), tmp_path / "in")
    made(source, tmp_path / "out", text, effort="balanced", scheme="w3g16")
    options = {"effort": "best", "scheme": "w3g16", "format": "compressed-tensors"}
    job = prepare(str(source), device="cpu", **options).job
    pipeline._fill_buffers(job)
    job.skeleton.config._experts_implementation = "eager"  # grouped products know no fp64
    tokens = random_tokens(16, 16)
    with torch.no_grad(), embeddings_loaded(job, head=True):
        targets = head_inputs(job, tokens, None)
        assert targets is not None
        for full, parameter in list(job.skeleton.named_parameters()):
            if not parameter.is_meta:
                set_tensor(job.skeleton, full, parameter.double())
        job.skeleton.tie_weights()
        stored = SafetensorsCheckpoint(tmp_path / "out")
        student = Student(job, stored, True, torch.float64)
        trainer = Trainer(job, student, tokens, targets, SETTINGS, torch.float64)
        # Not at the start, where it would not matter what is multiplied by what.
        generator = torch.Generator().manual_seed(0)
        trainer.moved += 0.01 * torch.randn(trainer.moved.shape, generator=generator).double()
        kl, gradient = trainer.gradient(1)

        whole = {
            full: p.detach() for full, p in job.skeleton.named_parameters(remove_duplicate=False)
        }
        named = {full: p.clone().requires_grad_() for full, p in values_of(trainer).items()}
        with torch.enable_grad():
            logits = run_whole(job, whole | named, tokens[2:4])
            with torch.no_grad():
                teacher = targets[2:4].double()
                expected = run_tail(job, teacher)
            loss = F.kl_div(
                torch.log_softmax(logits, -1),
                torch.log_softmax(expected, -1),
                reduction="sum",
                log_target=True,
            )
            loss = loss / 32
            found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    assert kl == pytest.approx(loss.item(), rel=1e-9)
    weights = dict(zip(named, found, strict=True))
    wanted = by_number(trainer, weights)
    assert wanted.count_nonzero() > 0.4 * len(wanted)  # of the experts most stay unused
    assert error(gradient, wanted) < 1e-6


def test_gradients_with_the_codes_at_hand_or_not(
    llama: Path, balanced: Path, device: torch.device
) -> None:
    """On a GPU, where the codes of all blocks are there, a step is a graph that is replayed."""
    options = {"effort": "best", "scheme": "w3g32", "format": "compressed-tensors"}
    job = prepare(str(llama), device=str(device), **options).job
    pipeline._fill_buffers(job)
    tokens = random_tokens(16, 16)
    found = []
    with torch.no_grad(), embeddings_loaded(job, head=True):
        targets = head_inputs(job, tokens, None)
        assert targets is not None
        for resident in (True, False):
            student = Student(job, SafetensorsCheckpoint(balanced), resident)
            trainer = Trainer(job, student, tokens, targets, SETTINGS)
            for part in (1, 5):
                trainer.moved += 0.01 * torch.sin(torch.arange(len(trainer.moved), device=device))
                kl, gradient = trainer.gradient(part)
                found.append((kl, gradient.clone()))
    for (one, first), (other, second) in zip(found[:2], found[2:], strict=True):
        assert one == pytest.approx(other, rel=1e-3)
        assert error(first, second) < 1e-2
    assert error(found[0][1], found[1][1]) > 0.1  # other tokens, another gradient


def values_of(trainer: Trainer) -> dict[str, Tensor]:
    """Every parameter of the blocks and the norms after them, by full name, moved."""
    student, job = trainer.student, trainer._job
    found = {}
    for index in range(len(job.blocks)):
        moved = trainer.moved[student.part(index)]
        values = student._values(index, student.block(index), moved)
        found |= {f"{job.block_name(index)}.{local}": each for local, each in values.items()}
    return found | {e.name: trainer._value(e, trainer.moved) for e in trainer._outside}


def run_whole(job: Any, parameters: dict[str, Tensor], tokens: Tensor) -> Tensor:
    named = {"input_ids": tokens, "use_cache": False}
    out = functional_call(job.skeleton, parameters, (), named, tie_weights=False)
    return out.logits


def run_tail(job: Any, hidden: Tensor) -> Tensor:
    return logits_of(job.skeleton, job.blocks, hidden, {})


def by_number(trainer: Trainer, weights: dict[str, Tensor | None]) -> Tensor:
    """Gradients of whole weights, taken to the numbers they are made of by the formulas."""
    student, job = trainer.student, trainer._job
    wanted = torch.zeros_like(trainer.moved)
    for index, slots in enumerate(student.slots):
        at, block = student.part(index).start, student.block(index)
        for slot in slots:
            full = f"{job.block_name(index)}.{slot.name}"
            own = weights[f"{full}.weight" if slot.codes else full]
            count = slot.shape.numel()
            if own is not None and slot.codes:
                qt = block.linears[slot.name]
                own = own.T if is_transposed(job.blocks[index].get_submodule(slot.name)) else own
                size = qt.q.shape[1] // qt.scales.shape[1]
                steps = qt.q.double() - qt.zeros.double().repeat_interleave(size, 1)
                sums = (own * steps).unflatten(1, (-1, size)).sum(-1)
                wanted[at : at + count] = (sums * qt.scales.double()).flatten()
            elif own is not None:
                wanted[at : at + count] = own * block.floats[slot.name].double().abs()
            at += count
    for each in trainer._outside:
        own = weights[each.name]
        assert own is not None
        wanted[each.place] = own * each.stored.double().abs()
    return wanted


# What is written.


def test_it_helps_and_says_by_how_much(
    llama: Path, balanced: Path, text: Calibration, tmp_path: Path
) -> None:
    """The report's divergences are those of the loaded checkpoints."""
    before, after = load_file(balanced / "model.safetensors"), made(llama, tmp_path / "out", text)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"weight", "weight_scale"}
    assert "model.norm.weight" in changed and "lm_head.weight" not in changed
    assert all(after[name].ndim == 1 for name in changed if name.endswith(".weight"))
    report = read_report(tmp_path / "out")
    assert report.end_to_end is not None
    record = report.end_to_end
    assert record["steps"] == 2 * 7 and record["held_out_tokens"] == 2 * 64
    assert record["held_out_after"] < 0.99 * record["held_out_before"]
    assert record["trained_after"] < 0.99 * record["trained_before"]
    teacher = salience.load(llama)
    tokens = text.tokens(make_tokenizer())
    for folder, when in ((balanced, "before"), (tmp_path / "out", "after")):
        student = salience.load(folder, kernel="reference")
        held = divergences(student, teacher, tokens[-2:])
        assert held == pytest.approx(record[f"held_out_{when}"], rel=1e-2)  # its head is fp16
        trained = divergences(student, teacher, tokens[:2])
        assert trained == pytest.approx(record[f"trained_{when}"], rel=1e-2)  # its head is fp16


def test_what_does_not_help_is_not_kept(
    llama: Path,
    balanced: Path,
    text: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(monkeypatch, replace(SETTINGS, rate=10.0, float_rate=10.0))
    made(llama, tmp_path / "out", text)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (balanced / name).read_bytes()
    record = read_report(tmp_path / "out").end_to_end
    assert record is not None and record["kept_start"]
    assert record["held_out_after"] == record["held_out_before"]


def test_nor_is_what_is_not_finite(
    llama: Path,
    balanced: Path,
    text: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(monkeypatch, replace(SETTINGS, rate=float("nan")))
    made(llama, tmp_path / "out", text)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (balanced / name).read_bytes()
    assert "NaN" not in (tmp_path / "out" / "salience_report.json").read_text()


def test_on_the_disk_too(
    llama: Path, text: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, replace(SETTINGS, passes=1))
    made(llama, tmp_path / "memory", text)
    monkeypatch.setattr(pipeline, "choose_budget", lambda *_: Budget(True, False, 0))
    made(llama, tmp_path / "disk", text)
    one, other = (tmp_path / each / "model.safetensors" for each in ("memory", "disk"))
    assert one.read_bytes() == other.read_bytes()
    assert not (tmp_path / "disk.partial").exists()


@pytest.mark.parametrize(
    ("fmt", "scheme"),
    [
        ("awq", "w4g32"),
        ("gptq", "w3g32"),
        ("compressed-tensors", "w2g32"),
        ("bitsandbytes-int8", "w8channel-sym"),
    ],
)
def test_formats(
    llama: Path,
    text: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fmt: str,
    scheme: str,
) -> None:
    """Codes and zeros stay, scales move where the format gives them back as they are."""
    use(monkeypatch, replace(SETTINGS, rate=0.01, float_rate=5e-4))
    for effort in ("balanced", "best"):
        made(llama, tmp_path / effort, text, effort=effort, scheme=scheme, format=fmt)
    record = read_report(tmp_path / "best").end_to_end
    assert record is not None
    before, after = qtensors(tmp_path / "balanced"), qtensors(tmp_path / "best")
    assert before.keys() == after.keys() and len(before) == 21
    for name, qt in before.items():
        assert torch.equal(qt.q, after[name].q) and torch.equal(qt.zeros, after[name].zeros)
    moved = [not torch.equal(qt.scales, after[name].scales) for name, qt in before.items()]
    assert all(moved) if fmt != "bitsandbytes-int8" else not any(moved)
    assert record["kept_start"] or record["held_out_after"] < record["held_out_before"]


def test_gguf(llama: Path, text: Calibration, tmp_path: Path) -> None:
    options = {"scheme": "w4g64", "format": "gguf"}
    salience.quantize(
        str(llama), tmp_path / "out", effort="best", calibration=text, device="cpu", **options
    )
    record = read_report(tmp_path / "out").end_to_end
    assert record is not None and not record["kept_start"]
    student, teacher = salience.load(tmp_path / "out", kernel="reference"), salience.load(llama)
    tokens = text.tokens(make_tokenizer())[-2:]
    found = divergences(student, teacher, tokens)
    assert found == pytest.approx(record["held_out_after"], rel=1e-2)  # its head is fp16


def test_coded_embeddings_and_head(text: Calibration, tmp_path: Path) -> None:
    """The teacher has the float ones."""
    source = save(make_model(llama_config(tie_word_embeddings=True)), tmp_path / "in")
    rules = (("lm_head", "w4g32"), ("embed_tokens", "w4g32"))
    made(source, tmp_path / "out", text, rules=rules)
    record = read_report(tmp_path / "out").end_to_end
    assert record is not None and not record["kept_start"]
    student = salience.load(tmp_path / "out", kernel="reference")
    tokens = text.tokens(make_tokenizer())[-2:]
    found = divergences(student, salience.load(source), tokens)
    assert found == pytest.approx(record["held_out_after"], rel=1e-2)  # its head is fp16


# What cannot be.


def test_a_text_of_one_sequence(llama: Path, text_file: Path, tmp_path: Path) -> None:
    warnings: list[str] = []
    text = Calibration(str(text_file), samples=1, seqlen=64)
    made(llama, tmp_path / "out", text, on_warning=warnings.append)
    assert "not tuned end to end: a text of one sequence" in warnings[-1]
    assert read_report(tmp_path / "out").end_to_end == {
        "skipped": "a text of one sequence leaves none to hold out"
    }


def test_blocks_that_leave_something(text: Calibration, tmp_path: Path) -> None:
    """Later blocks of this one take keys from earlier ones."""
    source = save(make_model(architecture("gemma4_text")), tmp_path / "in")
    warnings: list[str] = []
    for effort in ("balanced", "best"):
        out = tmp_path / effort
        made(source, out, text, effort=effort, scheme="w3g16", on_warning=warnings.append)
    assert "is not tuned end to end: its blocks leave something" in warnings[-1]
    one, other = (tmp_path / each / "model.safetensors" for each in ("balanced", "best"))
    assert one.read_bytes() == other.read_bytes()


def test_sequences_of_a_step() -> None:
    settings = EndToEnd()
    shapes = {(128, 512): 8, (128, 2048): 2, (24, 256): 1, (100, 512): 5, (2, 16): 1, (1, 8): 1}
    shapes |= {(512, 512): 8, (127, 64): 1, (64, 8192): 1}
    for shape, size in shapes.items():
        assert settings.step_samples(*shape) == size, shape
