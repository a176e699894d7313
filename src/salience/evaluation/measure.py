"""One model measured, in a process of its own: `python -m salience.evaluation.measure REQUEST`.

A fresh process for each model, so that its memory is its own and its end does not end the
comparison. The request is a JSON file, the result another; progress goes to stdout, a line of JSON
each. In the order of what disturbs what: load, speed (with memory watched), text, tasks.
"""

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from salience.calibration import read_text
from salience.checkpoint import read_json
from salience.errors import SalienceError
from salience.evaluation.receipt import Receipt, Request
from salience.evaluation.scores import Reference, Scores, score
from salience.evaluation.speed import measure_speed
from salience.inspection import inspect
from salience.linear import QuantLinear
from salience.loading import load_source, resolve_device
from salience.machine import describe, release_memory
from salience.monitor import Memory, Sampler
from salience.reports.report import read_report
from salience.source import open_source
from salience.writer import write_json

_MOST_SAMPLES = 400


Progress = Callable[[str, int, int], None]


def measure(request: Request, progress: Progress | None = None) -> Receipt:
    """Load a model and measure what was asked for.

    Raises:
        SalienceError: a model or text that cannot be used.
        DoesNotFitError: too little memory.
    """
    options, say = request.options, progress or _silent
    device = resolve_device(options["device"])
    source = open_source(request.model, options["trust_remote_code"])
    tokenizer = source.tokenizer
    found = inspect(source)
    receipt = Receipt(found.format, "", "", found.bits_per_weight, found.bytes)
    with Sampler() as sampler:
        sampler.mark("load")
        say("load", 0, 1)
        with _phase(receipt.seconds, "load"):
            model = load_source(source, device, kernel=options["kernel"])
        release_memory()
        sampler.mark("loaded")
        receipt.memory["load"] = _bytes(sampler.sample())
        if options["batches"]:
            with _phase(receipt.seconds, "speed"):
                speed = measure_speed(
                    model,
                    batches=options["batches"],
                    prompt=options["prompt"],
                    new=options["new"],
                    repeats=options["repeats"],
                    sampler=sampler,
                    progress=say,
                )
            receipt.speed = [
                {
                    "batch": row.batch,
                    "prefill": list(row.prefill_tokens_per_second.values),
                    "decode": list(row.decode_tokens_per_second.values),
                }
                for row in speed.rows
            ]
    receipt.memory["peak"] = _bytes(sampler.peak)
    receipt.timeline, receipt.marks = _timeline(sampler)
    kinds = {str(m.scheme) for m in model.modules() if isinstance(m, QuantLinear)}
    receipt.scheme = " ".join(sorted(kinds)) or "float"
    receipt.dtype = str(model.dtype).removeprefix("torch.")
    if options["text"] is not None:
        with _phase(receipt.seconds, "text"):
            receipt.text = asdict(_score(request, model, tokenizer, say))
    if options["tasks"]:
        with _phase(receipt.seconds, "tasks"):
            receipt.tasks = _tasks(options, model, tokenizer, say)
    with suppress(SalienceError):  # a checkpoint that others made has none
        report = read_report(Path(request.model))
        receipt.layers = [[each.name, each.error, each.error_rtn] for each in report.linears]
    receipt.machine = describe()
    return receipt


def _score(request: Request, model: Any, tokenizer: Any, progress: Progress) -> Scores:
    options, folder = request.options, Path(request.hidden)
    text, context, most = read_text(options["text"]), options["context"], options["max_chunks"]
    if request.reference is None:
        recorded = Reference.record(model, tokenizer, text, context, most, folder.parent, progress)
        recorded.keep(folder)
        return recorded.scores
    theirs = read_json(Path(request.reference["receipt"]))
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in theirs["text"].items()
    }
    scores = Scores(**values)
    source = open_source(request.reference["model"], options["trust_remote_code"])
    dtype = getattr(torch, theirs["dtype"])
    device = resolve_device(options["device"])
    # Of the reference little is needed, so it is not loaded where memory is short.
    quantized = theirs["scheme"] != "float"
    other = load_source(source, device if quantized else "cpu", dtype, kernel=options["kernel"])
    reference = Reference.reopen(other, source.tokenizer, text, context, scores, folder)
    del other
    gc.collect()
    release_memory()
    reference.to(device)
    return score(model, tokenizer, text, context, most, reference, progress)


def _tasks(
    options: dict[str, Any], model: Any, tokenizer: Any, progress: Progress
) -> dict[str, dict[str, dict[str, float]]]:
    """Scores of documents, by what was asked for: those of all tasks of a group together."""
    from salience.evaluation.tasks import run_tasks  # needs lm-eval, which is an extra

    wanted, folder = list(options["tasks"]), options["task_folder"]
    found = run_tasks(
        model,
        tokenizer,
        wanted,
        folder=None if folder is None else Path(folder),
        limit=options["limit"],
        progress=progress,
    )["tasks"]
    groups = [name for name in wanted if name not in found]
    loose = [name for name in found if name not in wanted]
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for name in wanted:
        own = [each for each in loose if each.startswith(f"{name}_") or len(groups) == 1]
        pooled: dict[str, dict[str, float]] = {}
        for task in own if name in groups else [name]:
            for metric, documents in found[task]["documents"].items():
                for key, value in documents.items():
                    if isinstance(value, float):
                        pooled.setdefault(metric, {})[f"{task}/{key}"] = value
        scores[name] = pooled
    return scores


def _timeline(sampler: Sampler) -> tuple[list[list[float]], list[list[Any]]]:
    samples = sampler.timeline
    step = max(1, len(samples) // _MOST_SAMPLES)
    lines: list[list[float]] = [
        [round(each.seconds, 3), each.memory.resident, _on_gpu(each.memory)]
        for each in samples[::step]
    ]
    return lines, [[round(each.seconds, 3), each.name] for each in sampler.marks]


def _bytes(memory: Memory) -> dict[str, int]:
    return {"ram": memory.resident, "vram": _on_gpu(memory)}


def _on_gpu(memory: Memory) -> int:
    return memory.gpu_reserved


@contextmanager
def _phase(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the time of what happens inside."""
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def _silent(_phase: str, _done: int, _total: int) -> None:
    """Tell nobody."""


def main() -> None:
    """Measure what the request in argv says; the receipt appears whole or not at all."""
    request = Request(**read_json(Path(sys.argv[1])))

    def say(phase: str, done: int, total: int) -> None:
        print(json.dumps([phase, done, total]), flush=True)

    try:
        receipt = measure(request, say)
        write_json(Path(request.receipt), asdict(receipt))
    except SalienceError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
