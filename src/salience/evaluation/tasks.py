"""Scores of tasks, by lm-eval.

lm-eval is what the field's numbers are made with, so it is run as it is, on the loaded model: the
scores are its own to the last digit. What is taken from it besides is the score of each document,
which its summaries leave out: two models that answered the same questions are compared question by
question, where most are answered alike and only the others tell.

A task is a YAML file that names its data. Data on the disk (`dataset_path: json` with `data_files`,
or a folder) needs no network; its path is taken relative to the folder of tasks.
"""

import copy
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from salience.errors import SalienceError
from salience.placement import input_device

try:
    import datasets
    import tqdm
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise SalienceError(
        f"tasks need lm-eval ({error}); get it with: pip install 'salience[eval]'"
    ) from None

Progress = Callable[[str, int, int], None]

_TALKERS = ("lm_eval", "datasets", "transformers", "evaluate", "accelerate", "huggingface_hub")


def check_tasks(tasks: Sequence[str], folder: Path | None, verbose: bool = False) -> None:
    """Find tasks and their data, for an error before hours of other work; as of `run_tasks`.

    Raises:
        SalienceError: no such task, or data that is not to be had.
    """
    with _quiet(verbose):
        names, manager = _manager(tasks, folder)
        with _task_errors(names):
            manager.load(list(names))


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str] = (),
    folder: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 1,
    progress: Progress | None = None,
    verbose: bool = False,
) -> dict[str, Any]:
    """Run tasks on a loaded model.

    Args:
        model: a Transformers causal language model, on its devices.
        tokenizer: its tokenizer.
        tasks: names of tasks, groups or tags; none is for all tasks of `folder`.
        folder: of task YAML files, beside those that lm-eval brings.
        limit: documents of each task, its first; None for all.
        num_fewshot: examples before each question; None for what the task says.
        batch_size: questions at once. Padding changes sums of floats, so scores of other batch
            sizes can differ in the last digits.
        progress: called with (phase, done, total).
        verbose: let lm-eval write its log to stderr.

    Returns:
        `tasks`, for each by its name `metrics` (lm-eval's own names, such as "acc,none"),
        `higher_is_better`, `documents` (for each metric the score of each document, by its
        number), `n`, `version` and `num_fewshot`; `groups`, metrics by name; and `lm_eval`, the
        version. What lm-eval hands on as a pair, such as the log-likelihood and the words of a
        document, is a list.

    Raises:
        SalienceError: no such task, data that is not to be had, or a task that runs code.
    """
    with _quiet(verbose):
        names, manager = _manager(tasks, folder)
        # It gives its tokenizer a padding token, hence a copy.
        with _plain_config(model.config):
            lm = HFLM(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),
                batch_size=batch_size,
                backend="causal",
            )
        lm._device = cast(Any, input_device(model))
        if progress is not None:
            lm.set_cache_hook(cast(Any, _Counter(progress)))
            progress("reading the data", 0, 1)
        with _task_errors(names):
            found = simple_evaluate(
                model=lm,
                tasks=list(names),
                task_manager=manager,
                num_fewshot=num_fewshot,
                limit=limit,
                bootstrap_iters=0,
            )
    return _summary(found)


@contextmanager
def _task_errors(names: Sequence[str]) -> Iterator[None]:
    """One line for what is wrong with a task or its data."""
    try:
        yield
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SalienceError(f"tasks {', '.join(names)}: {reason}") from error


def _summary(found: Any) -> dict[str, Any]:
    groups = found.get("groups", {})
    return {
        "tasks": {
            name: {
                "metrics": _metrics(found["results"][name]),
                "higher_is_better": found["higher_is_better"].get(name, {}),
                "documents": _documents(samples),
                "n": found["n-samples"][name]["effective"],
                "version": found["versions"].get(name),
                "num_fewshot": found["n-shot"].get(name),
            }
            for name, samples in found["samples"].items()
        },
        "groups": {name: _metrics(values) for name, values in groups.items()},
        "lm_eval": version("lm_eval"),
    }


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a task, without the names and the standard errors."""
    return {
        key: float(value)
        for key, value in values.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }


def _documents(samples: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, Any]]:
    """Scores of each document; a task with several filters has each document several times."""
    scores: dict[str, dict[int, Any]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            column = scores.setdefault(f"{metric},{sample['filter']}", {})
            column[sample["doc_id"]] = _plain(sample[metric])
    return scores


def _plain(value: Any) -> Any:
    """A score as JSON has it."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, str):
        return value
    return float(value)


class _Manager(TaskManager):
    """Finds tasks; reads relative paths of data from their folder."""

    def __init__(self, folder: Path | None, defaults: bool) -> None:
        super().__init__(include_path=folder, include_defaults=defaults)
        self._folder = folder

    def load(self, task_list: Any) -> Any:
        before = os.getcwd()
        if self._folder is not None:
            os.chdir(self._folder)
        try:
            return super().load(task_list)
        finally:
            os.chdir(before)


def _manager(tasks: Sequence[str], folder: Path | None) -> tuple[Sequence[str], _Manager]:
    """The tasks to run, and what finds them."""
    own: list[str] = []
    if folder is not None:
        if not folder.is_dir():
            raise SalienceError(f"--task-folder {folder} is no folder")
        folder = folder.absolute()
        manager = _Manager(folder, defaults=False)
        own = manager.all_tasks
        if not own:
            raise SalienceError(f"--task-folder {folder} has no task YAML file in it")
        wanted = tasks or manager.all_subtasks
        if all(name in own for name in wanted):
            return wanted, manager  # reading the thousands that lm-eval brings takes a while
    if not tasks:
        raise SalienceError("name tasks to run, or a folder of them")
    manager = _Manager(folder, defaults=True)
    for name in tasks:
        if name not in manager.task_index:
            near = get_close_matches(name, [*own, *manager.all_tasks], n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            where = f" and {folder}" if folder else ""
            raise SalienceError(f"lm-eval{where} has no task {name!r}{hint}")
    return tasks, manager


class _Counter:
    """Where lm-eval would keep answers: it is told each as it comes."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._done = 0

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        self._done += 1
        self._progress(f"{kind} requests", self._done, 0)


@contextmanager
def _plain_config(config: Any) -> Iterator[None]:
    """Hide how a model is stored: lm-eval would ask for the tools that load such ones."""
    stored = vars(config).pop("quantization_config", None)
    try:
        yield
    finally:
        if stored is not None:
            config.quantization_config = stored


@contextmanager
def _quiet(verbose: bool) -> Iterator[None]:
    """Keep logs, warnings and bars of lm-eval and what it uses off stderr."""
    if verbose:
        yield
        return
    levels = {name: logging.getLogger(name).level for name in _TALKERS}
    make_bar = tqdm.tqdm.__init__

    def without_bar(bar: Any, *args: Any, **options: Any) -> None:
        make_bar(bar, *args, **{**options, "disable": True})

    for name in _TALKERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    setattr(tqdm.tqdm, "__init__", without_bar)  # noqa: B010, since mypy minds the other way
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        setattr(tqdm.tqdm, "__init__", make_bar)  # noqa: B010
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
