"""Tasks give what lm-eval gives, and need no network."""

import copy
import importlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

import salience
from helpers_tasks import ROWS, write_tasks
from salience.errors import SalienceError
from tiny_models import llama_config, make_model, save

NAMES = ("tiny_choice", "tiny_rolling", "tiny_generate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "own")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets that are read are not left in the home folder."""
    import datasets.config

    place = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place)


@pytest.fixture(scope="module", params=["float", "packed", "packed head"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    source = tmp_path_factory.mktemp("source")
    tied = request.param == "packed head"
    save(make_model(llama_config(tie_word_embeddings=tied)), source)
    if request.param == "float":
        return salience.load(source)
    more: dict[str, Any] = {}
    if tied:
        head = ("lm_head|embed_tokens", salience.Scheme.parse("w8g32"))
        more = {"rules": [head], "format": "compressed-tensors"}
    out = source / "out"
    salience.quantize(str(source), out, method="rtn", scheme="w4g32", **more)
    return salience.load(out)


def by_lm_eval(model: Any, tokenizer: Any, folder: Path, batch_size: int, **how: Any) -> Any:
    """lm-eval by itself, as its manual has it."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    before, config = os.getcwd(), model.config
    os.chdir(folder)
    # It would want the tool that made such a checkpoint.
    model.config = copy.deepcopy(config)
    vars(model.config).pop("quantization_config", None)
    try:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        model.config = config
        return simple_evaluate(model=lm, tasks=list(NAMES), task_manager=manager, **how)
    finally:
        os.chdir(before)


@pytest.mark.parametrize("how", [{}, {"limit": 3, "num_fewshot": 2}], ids=["all", "some"])
def test_scores_are_those_of_lm_eval(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    how: dict[str, int],
) -> None:
    from salience.evaluation.tasks import run_tasks

    found = run_tasks(model, tokenizer, NAMES, folder, batch_size=2, **how)
    expected = by_lm_eval(model, tokenizer, folder, 2, **how)
    count = how.get("limit", len(ROWS))
    assert set(found["tasks"]) == set(NAMES)
    for name, task in found["tasks"].items():
        theirs = expected["results"][name]
        assert task["metrics"] and task["n"] == count
        for metric, value in task["metrics"].items():
            assert value == theirs[metric]
        samples = expected["samples"][name]
        for metric, scores in task["documents"].items():
            own, kind = metric.split(",")
            values = [sample[own] for sample in samples if sample["filter"] == kind]
            plain = [list(v) if isinstance(v, tuple) else v for v in values]
            assert scores == dict(enumerate(plain)) and len(scores) == count
    assert set(found["tasks"]["tiny_choice"]["metrics"]) == {"acc,none", "acc_norm,none"}
    assert set(found["tasks"]["tiny_generate"]["metrics"]) == {
        "exact_match,first",
        "exact_match,whole",
    }
    assert found["tasks"]["tiny_choice"]["num_fewshot"] == how.get("num_fewshot", 0)


def test_groups_tags_and_the_whole_folder(
    llama: Path, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    from salience.evaluation.tasks import run_tasks

    model = salience.load(llama)
    group = run_tasks(model, tokenizer, ["tiny_group"], folder, limit=4)
    assert set(group["tasks"]) == {"tiny_choice"}
    scores = group["tasks"]["tiny_choice"]["documents"]["acc,none"]
    assert group["groups"]["tiny_group"]["acc,none"] == sum(scores.values()) / 4
    tag = run_tasks(model, tokenizer, ["tiny"], folder, limit=1)
    assert set(tag["tasks"]) == {"tiny_choice", "tiny_generate"}
    assert set(run_tasks(model, tokenizer, (), folder, limit=1)["tasks"]) == set(NAMES)
    json.dumps(group)


def test_nothing_is_said_and_progress_is_told(
    llama: Path,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from salience.evaluation.tasks import run_tasks

    calls: list[tuple[str, int, int]] = []
    before = tokenizer.pad_token
    run_tasks(
        salience.load(llama),
        tokenizer,
        NAMES,
        folder,
        limit=2,
        progress=lambda *call: calls.append(call),
    )
    assert tokenizer.pad_token == before
    assert tuple(capfd.readouterr()) == ("", "")
    kinds = [kind for kind, _, _ in calls]
    assert kinds.count("loglikelihood requests") == 2 * 4
    assert kinds.count("generate_until requests") == 2


def test_bars_come_back(tmp_path: Path, llama: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    import tqdm

    from salience.evaluation.tasks import run_tasks

    broken = write_tasks(tmp_path / "broken")
    (broken / "data" / "rows.jsonl").unlink()
    with pytest.raises(SalienceError, match=r"^tasks tiny_choice: .*rows\.jsonl"):
        run_tasks(salience.load(llama), tokenizer, ["tiny_choice"], broken)
    assert logging.getLogger("lm_eval").level != logging.CRITICAL
    with open(os.devnull, "w") as file:
        assert not tqdm.tqdm(range(2), file=file).disable


@pytest.mark.slow  # reads the names of all of lm-eval's own
def test_an_unknown_task(llama: Path, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    from salience.evaluation.tasks import run_tasks

    with pytest.raises(SalienceError, match="has no task 'tiny_choise'; did you mean tiny_choice"):
        run_tasks(salience.load(llama), tokenizer, ["tiny_choise"], folder)


def test_refusals(llama: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    from salience.evaluation.tasks import run_tasks

    model = salience.load(llama)
    with pytest.raises(SalienceError, match="is no folder"):
        run_tasks(model, tokenizer, ["a"], tmp_path / "none")
    with pytest.raises(SalienceError, match="has no task YAML"):
        run_tasks(model, tokenizer, ["a"], tmp_path)
    with pytest.raises(SalienceError, match="name tasks to run"):
        run_tasks(model, tokenizer)


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "salience.evaluation.tasks", raising=False)
    with pytest.raises(
        SalienceError, match=r"^tasks need lm-eval .* pip install 'salience\[eval\]'$"
    ):
        importlib.import_module("salience.evaluation.tasks")
