"""`salience eval`: numbers with intervals on stdout, and one line for what is wrong."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import salience
from helpers_bench import Ran
from helpers_tasks import write_tasks
from salience.cli.app import main
from salience.evaluation.scores import Reference, score
from salience.source import open_source
from tiny_models import llama_config, make_model, save

Run = Callable[..., Ran]
SMALL = ("--context", "64", "--max-chunks", "12")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], text_file: Path) -> Run:
    """`salience eval ARGS`, in this process."""

    def evaluate(*args: object) -> Ran:
        words = ["salience", "eval", *map(str, args), "--text", str(text_file)]
        monkeypatch.setattr(sys, "argv", words)
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return Ran(int(stop.value.code or 0), *capfd.readouterr())

    return evaluate


@pytest.fixture(scope="module")
def packed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    salience.quantize(str(llama), out, method="rtn", scheme="w4g32")
    return out


def test_text_and_reference(run: Run, llama: Path, packed: Path, text_file: Path) -> None:
    found = run(packed, "--reference", llama, *SMALL, "--json")
    values = found.json
    text, tokenizer = text_file.read_text(), open_source(str(llama)).tokenizer
    reference = Reference.record(salience.load(llama), tokenizer, text, 64, 12)
    expected = score(salience.load(packed), tokenizer, text, 64, 12, reference)
    assert values["perplexity"] == pytest.approx(expected.perplexity, rel=1e-9)
    assert values["tokens"] == 12 * 63 and values["context"] == 64
    assert values["protocol"] == expected.protocol and values["protocol"].startswith("12 of ")
    other = values["reference"]
    assert other["model"] == str(llama)
    assert other["kl"] == pytest.approx(expected.mean_kl, rel=1e-9)
    assert other["agreement"] == expected.agreement
    assert other["perplexity"] == pytest.approx(reference.scores.perplexity, rel=1e-9)
    ratio = expected.perplexity / reference.scores.perplexity
    assert other["perplexity_ratio"] == pytest.approx(ratio, rel=1e-9)
    for owner, name in (
        (values, "perplexity"),
        (other, "kl"),
        (other, "agreement"),
        (other, "perplexity_ratio"),
    ):
        low, high = owner[f"{name}_interval"]
        assert low < owner[name] < high
    assert len(values["chunks"]["nll"]) == len(values["chunks"]["kl"]) == 12
    memory = values["memory"]
    assert [mark["name"] for mark in memory["marks"]] == ["reference", "load", "text"]
    assert 0 < memory["loaded"]["resident"] <= memory["peak"]["resident"]
    assert set(values["seconds"]) == {"reference", "load", "text"}
    assert values["machine"]["torch"] and found.stderr == ""


@pytest.mark.slow
def test_everything_in_words(run: Run, llama: Path, packed: Path, tmp_path: Path) -> None:
    folder, out = write_tasks(tmp_path / "tasks"), tmp_path / "out.json"
    found = run(
        packed, "--reference", llama, *SMALL, "--task-folder", folder, "--limit", "4",
        "--speed", "--batch", "1,2", "-o", out,
    )  # fmt: skip
    assert (found.status, found.stderr) == (0, "")
    values = json.loads(out.read_text())
    assert f"perplexity {values['perplexity']:.3f} (" in found.stdout
    assert values["protocol"] in found.stdout
    assert f"divergence {values['reference']['kl']:.5f} (" in found.stdout
    assert "nats a token" in found.stdout and "tiny_choice" in found.stdout
    assert "tokens a second, prompts of 128, replies of 64" in found.stdout
    assert "when loaded" in found.stdout
    assert set(values["tasks"]) == {"tiny_choice", "tiny_generate", "tiny_rolling"}
    choice = values["tasks"]["tiny_choice"]
    low, high = choice["intervals"]["acc,none"]
    assert low <= choice["metrics"]["acc,none"] <= high and choice["n"] == 4
    assert "word_perplexity,none" not in values["tasks"]["tiny_rolling"]["intervals"]
    assert [row["batch"] for row in values["speed"]["rows"]] == [1, 2]
    names = [mark["name"] for mark in values["memory"]["marks"]]
    assert names[:5] == ["reference", "load", "text", "tasks", "speed"]
    assert "decode, batch 2" in names


def test_one_chunk_has_no_interval(run: Run, llama: Path) -> None:
    values = run(llama, "--context", "64", "--max-chunks", "1", "--json").json
    assert values["perplexity_interval"] is None and math.isfinite(values["perplexity"])
    assert "reference" not in values and values["chunks"]["kl"] is None
    assert run(llama, "--context", "64", "--max-chunks", "1").stdout.startswith("perplexity ")


def test_tasks(run: Run, llama: Path, tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks")
    values = run(
        llama, "--context", "64", "--max-chunks", "5", "--tasks", "tiny_choice",
        "--task-folder", folder, "--json",
    ).json  # fmt: skip
    task = values["tasks"]["tiny_choice"]
    scores = task["documents"]["acc,none"]
    assert task["metrics"]["acc,none"] == sum(scores.values()) / len(scores)
    low, high = task["intervals"]["acc,none"]
    assert low < task["metrics"]["acc,none"] < high and len(scores) == task["n"] == 8


def refused(found: Ran) -> str:
    assert found.status == 2 and found.stdout == ""
    assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1
    return found.stderr


def test_wrong_use(run: Run, llama: Path, tmp_path: Path) -> None:
    assert "--batch '1,x' is not understood" in refused(run(llama, "--batch", "1,x"))
    assert "--out" in refused(run(llama, "-o", tmp_path / "none" / "out.json"))
    assert "is no folder" in refused(run("nowhere", *SMALL, "--task-folder", tmp_path / "none"))
    assert "no folder, .gguf file" in refused(run(llama, *SMALL, "--reference", "nowhere"))
    assert "fewer than one chunk" in refused(run(llama, "--context", "200000"))


def test_a_reference_of_another_tokenizer(run: Run, llama: Path, tmp_path: Path) -> None:
    other = save(make_model(llama_config()), tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    said = refused(run(llama, *SMALL, "--reference", other))
    assert "compare models of one tokenizer" in said


def test_the_extra_is_asked_for_first(
    run: Run, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "salience.evaluation.tasks", raising=False)
    said: Any = refused(run(llama, "--tasks", "arc_easy"))
    assert "pip install 'salience[eval]'" in said
