"""`compare`: made, measured, gone on with, and what a page and a gate say of it."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import salience
from salience.calibration import Calibration
from salience.cli.app import main
from salience.errors import SalienceError
from salience.evaluation import compare as module
from salience.evaluation.candidates import parse_candidates
from salience.evaluation.compare import Options, compare
from salience.evaluation.comparison import Comparison
from salience.evaluation.measure import measure
from salience.evaluation.receipt import Request
from salience.evaluation.scores import Reference, score
from salience.pipeline.quantize import Variant, quantize_all
from salience.source import open_source
from salience.writer import write_json
from tiny_models import TEXT, llama_config, make_model, save
from workshop import Workshop


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_model(llama_config(num_hidden_layers=1)), tmp_path_factory.mktemp("m") / "A")


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, twice as sure of itself, which for a random one is worse, and noisy."""
    model = make_model(llama_config(num_hidden_layers=1))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter += 0.05 * parameter.std() * torch.randn_like(parameter)
        model.lm_head.weight *= 2
    return save(model, tmp_path_factory.mktemp("m") / "broken")


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text(TEXT[50_000:60_000], encoding="utf-8")
    (folder / "calibration.txt").write_text(TEXT[:20_000], encoding="utf-8")
    return Options(
        text=str(folder / "text.txt"),
        context=64,
        max_chunks=12,
        batches=(),
        calibration=Calibration(str(folder / "calibration.txt"), 2, 32),
    )


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Children run in this process; yields what they were."""
    ran: list[str] = []

    def child(self: Any, kind: str, names: str, request: Any, stem: str) -> Any:
        ran.append(f"{kind} {names}")
        write_json(self.work / f"{stem}.request.json", request)
        try:
            if kind == "make":
                quantize_all(
                    request["model"],
                    [Variant(**each) for each in request["variants"]],
                    calibration=Calibration(**request["calibration"]),
                )
            else:
                receipt = measure(Request(**request))
                write_json(Path(request["receipt"]), asdict(receipt))
        except SalienceError as error:
            return module._Ended(2, str(error))
        return module._Ended(0, "")

    monkeypatch.setattr(module._Run, "_child", child)
    return ran


def candidates(*texts: object) -> Any:
    return parse_candidates([str(text) for text in texts], ["w4g32"])


def test_models_beside_the_first(
    small: Path, broken: Path, options: Options, here: list[str], tmp_path: Path
) -> None:
    found = compare(candidates(small, "@rtn", "@awq", broken), options, tmp_path / "work")
    assert here == [
        "make rtn w4g32, awq w4g32",
        *("measure A", "measure rtn w4g32", "measure awq w4g32", "measure broken"),
    ]
    assert [row.name for row in found.rows] == ["A", "rtn w4g32", "awq w4g32", "broken"]
    assert [row.error for row in found.rows] == [""] * 4
    worst = found.rows[3]
    assert worst.verdict is not None and worst.verdict.kind == "worse"
    assert worst.verdict.text.startswith("perplexity worse by ")
    values = {row.name: row.cells["perplexity"].value.value for row in found.rows}
    assert values["broken"] > 1.2 * values["A"]
    kl = {row.name: row.cells["kl"].value.value for row in found.rows[1:]}
    assert 0 < kl["awq w4g32"] < kl["broken"]
    assert found.rows[1].cells["disk"].change is not None
    assert found.rows[1].cells["disk"].change.value < 0.5
    assert found.rows[0].cells["bits"].value.value == 32
    assert json.loads(json.dumps(found.as_json()))["rows"][3]["verdict"]["kind"] == "worse"


def test_quality_is_what_a_direct_computation_gives(
    small: Path, broken: Path, options: Options, here: list[str], tmp_path: Path
) -> None:
    """The reference's hidden states go over the disk to another process; nothing is lost."""
    found = compare(candidates(small, broken), options, tmp_path / "work")
    text = Path(str(options.text)).read_text(encoding="utf-8")
    tokenizer = open_source(str(small)).tokenizer
    ids = torch.tensor(tokenizer(text)["input_ids"])[: 12 * 64].view(12, 64)
    with torch.no_grad():
        p, q = (
            salience.load(folder)(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
            for folder in (small, broken)
        )
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    nll = -q.gather(-1, ids[:, 1:, None]).mean().item()
    cells = found.rows[1].cells
    assert cells["kl"].value.value == pytest.approx(kl, rel=1e-5)
    assert cells["perplexity"].value.value == pytest.approx(torch.tensor(nll).exp().item(), 1e-5)
    agree = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert cells["agreement"].value.value == pytest.approx(agree, abs=1e-9)
    model = salience.load(small)
    reference = Reference.record(model, tokenizer, text, 64, 12)
    again = score(salience.load(broken), tokenizer, text, 64, 12, reference)
    assert again.mean_kl == pytest.approx(kl, rel=1e-5)


def test_an_interrupted_comparison_goes_on(
    small: Path,
    options: Options,
    here: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = module._Run._child

    def interrupted(self: Any, kind: str, names: str, request: Any, stem: str) -> Any:
        if names == "awq w4g32":
            raise KeyboardInterrupt
        return right(self, kind, names, request, stem)

    monkeypatch.setattr(module._Run, "_child", interrupted)
    wanted = candidates(small, "@rtn", "@awq")
    with pytest.raises(KeyboardInterrupt):
        compare(wanted, options, tmp_path / "work")
    monkeypatch.setattr(module._Run, "_child", right)
    here.clear()
    first = compare(wanted, options, tmp_path / "work")
    assert here == ["measure awq w4g32"]
    here.clear()
    second = compare(wanted, options, tmp_path / "work")
    assert here == []
    for row, again in zip(first.rows, second.rows, strict=True):
        assert row.cells == again.cells
    more = compare(candidates(small, "@rtn", "@awq", "@gptq"), options, tmp_path / "work")
    assert here == ["make gptq w4g32", "measure gptq w4g32"]
    assert len(more.rows) == 4


def test_other_options_measure_anew(
    small: Path, broken: Path, options: Options, here: list[str], tmp_path: Path
) -> None:
    compare(candidates(small, broken), options, tmp_path / "work")
    here.clear()
    fewer = Options(**{**vars_of(options), "max_chunks": 6})
    compare(candidates(small, broken), fewer, tmp_path / "work")
    assert here == ["measure A", "measure broken"]


def vars_of(options: Options) -> dict[str, Any]:
    return {name: getattr(options, name) for name in Options.__dataclass_fields__}


def test_one_that_fails_is_a_row(
    small: Path,
    broken: Path,
    options: Options,
    here: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = module._Run._child

    def child(self: Any, kind: str, names: str, request: Any, stem: str) -> Any:
        if kind == "measure" and "rtn" in names:
            return module._Ended(-9, module._message(-9, tmp_path))
        return right(self, kind, names, request, stem)

    monkeypatch.setattr(module._Run, "_child", child)
    gate = "perplexity<=999999x"
    found = compare(candidates(small, "@rtn", broken), options, tmp_path / "work", gate=gate)
    failed = found.rows[1]
    assert "SIGKILL" in failed.error and "memory" in failed.error and failed.cells == {}
    assert found.rows[2].cells["perplexity"].value.value > 0
    assert [str(failure) for failure in found.failures or ()] == [
        f"rtn w4g32: it could not be measured: {failed.error}"
    ]
    assert "Could not be measured: rtn w4g32." in found.conclusion()


def test_a_reference_that_fails_ends_it(
    small: Path, broken: Path, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = module._Ended(2, "no such kernel")
    monkeypatch.setattr(module._Run, "_child", lambda *_: ended)
    with pytest.raises(SalienceError, match="the reference A could not be measured: no such"):
        compare(candidates(small, broken), options, tmp_path / "work")


def test_kept_checkpoints(small: Path, options: Options, here: list[str], tmp_path: Path) -> None:
    keep = tmp_path / "kept"
    compare(candidates(small, "@rtn"), options, tmp_path / "work", keep=keep)
    assert salience.load(keep / "rtn-w4g32") is not None
    here.clear()
    compare(candidates(small, "@rtn"), options, tmp_path / "other", keep=keep)
    assert here == ["measure A", "measure rtn w4g32"]
    (keep / "awq-w4g32").mkdir()
    with pytest.raises(SalienceError, match="awq-w4g32 exists and was made otherwise"):
        compare(candidates(small, "@awq"), options, tmp_path / "other", keep=keep)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gate", "perplexity<1"], "--gate 'perplexity<1' is not understood"),
        (["--gate", "kl<=0.1"], "--gate asks for kl, which needs a --text"),
        (["--gate", "mmlu>=-1"], "'mmlu' is no metric"),
        (["--gate", "decode@2>=1x"], "the batches timed are 1, 4, 16"),
        (["--gate", "decode>=1x", "--no-speed"], "--no-speed"),
        (["--batch", "1,x"], "--batch '1,x' is not understood"),
        (["--text", "nowhere.txt"], "text nowhere.txt does not exist"),
        (["--task-folder", "."], "name some with --tasks"),
        (["--scheme", "w4g48", "@rtn"], "group size 48 does not divide"),
        (["@w4g64:finest"], "there is no method 'finest'"),
        (["missing-folder/model"], "missing-folder"),
        (["-o", "no/such/report.html"], "the folder of no/such/report.html does not exist"),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(
    words: list[str],
    message: str,
    small: Path,
    broken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module._Run, "_child", lambda *_: pytest.fail("something ran"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["salience", "compare", str(small), str(broken), *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == "" and message in said.err
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_whole_command(
    small: Path, broken: Path, options: Options, tmp_path: Path, workshop: Workshop
) -> None:
    """In processes of their own: exit 4, the lines, the files; and again, from what was done."""
    words = ["compare", str(small), "@rtn", str(broken), "--scheme", "w4g32"]
    words += ["--text", str(options.text), "--context", "64", "--max-chunks", "12"]
    words += ["--calibration", options.calibration.text, "--samples", "2", "--seqlen", "32"]
    words += ["--batch", "1,2", "--prompt", "8", "--new", "8", "--repeats", "3"]
    words += ["--gate", "disk<=1.5x; perplexity<=1.2x", "--work", "work"]
    outputs = ["-o", "report.html", "--markdown", "report.md"]
    first = workshop(*words, "--json", *outputs, cwd=tmp_path)
    assert first.status == 4, first.stderr
    gate = [line for line in first.stderr.splitlines() if line.startswith("gate: ")]
    assert len(gate) >= 1 and any(
        line.startswith("gate: broken: perplexity is ") and "wanted at most 1.2x" in line
        for line in gate
    )
    result = json.loads(first.stdout)
    speed = result["rows"][1]["receipt"]["speed"]
    assert [row["batch"] for row in speed] == [1, 2]
    assert all(len(row["decode"]) == 3 for row in speed)
    memory = result["rows"][1]["receipt"]["memory"]
    assert 0 < memory["load"]["ram"] <= memory["peak"]["ram"]
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert "| broken | perplexity worse by" in (tmp_path / "report.md").read_text()
    receipts = {p: p.stat().st_mtime_ns for p in (tmp_path / "work").glob("*.json")}
    second = workshop(*words, "--gate", "disk<=1.5x", cwd=tmp_path)
    assert second.status == 0, second.stderr
    assert "The gate holds for rtn w4g32 and broken." in second.stdout
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "work").glob("*.json")} == receipts


def test_a_comparison_without_quality_says_so(
    small: Path, broken: Path, options: Options, here: list[str], tmp_path: Path
) -> None:
    none = Options(**{**vars_of(options), "text": None})
    found: Comparison = compare(candidates(small, broken), none, tmp_path / "work")
    assert found.metrics[:2] == ["disk", "bits"] and "perplexity" not in found.metrics
    assert found.rows[1].verdict is None


def test_tasks_are_compared_document_by_document(
    small: Path, broken: Path, options: Options, here: list[str], tmp_path: Path
) -> None:
    """A task and a group, of which the gate knows both; scores are lm-eval's own."""
    from helpers_tasks import write_tasks
    from salience.evaluation.tasks import run_tasks

    folder = write_tasks(tmp_path / "tasks")
    values = {"text": None, "tasks": ("tiny_generate", "tiny_group"), "task_folder": str(folder)}
    asked = Options(**{**vars_of(options), **values})
    gate = "tiny_group>=-100; tiny_generate>=+200"
    found = compare(candidates(small, broken), asked, tmp_path / "work", gate=gate)
    own = run_tasks(
        salience.load(broken), open_source(str(broken)).tokenizer, ["tiny_choice"], folder
    )
    cell = found.rows[1].cells["tiny_group"]
    assert cell.value.value == own["tasks"]["tiny_choice"]["metrics"]["acc_norm,none"]
    reference = found.rows[0].cells["tiny_group"].value.value
    assert cell.change is not None
    assert cell.change.value == pytest.approx(cell.value.value - reference)
    assert cell.sign is not None and 0 < cell.sign <= 1
    assert [f.condition.metric for f in found.failures or ()] == ["tiny_generate"]
    with pytest.raises(SalienceError, match="no task 'nothing'"):
        wrong = Options(**{**vars_of(asked), "tasks": ("nothing",)})
        compare(candidates(small, broken), wrong, tmp_path / "other")
