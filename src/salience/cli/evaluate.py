"""`eval`."""

import gc
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from salience.cli.console import parse_numbers, print_json, progress_bar, size, stdout
from salience.cli.loaded import load_model
from salience.cli.options import (
    DeviceMapOption,
    DeviceOption,
    JsonOption,
    KernelOption,
    MemoryOption,
    Model,
    OffloadOption,
    TrustOption,
)
from salience.errors import SalienceError

if TYPE_CHECKING:
    from salience.evaluation.scores import Reference, Scores
    from salience.evaluation.statistics import Interval
    from salience.monitor import Sampler


def evaluate(
    model: Model,
    text: Annotated[
        str, typer.Option("--text", help='A text file, or "pydoc": Python\'s documentation.')
    ] = "pydoc",
    context: Annotated[int, typer.Option("--context", min=2, help="Tokens in a chunk.")] = 2048,
    max_chunks: Annotated[int | None, typer.Option("--max-chunks", min=1)] = None,
    reference: Annotated[
        str | None,
        typer.Option("--reference", help="A model to compare each token's distribution with."),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", help="Of lm-eval: arc_easy,hellaswag,...")
    ] = None,
    task_folder: Annotated[
        Path | None,
        typer.Option("--task-folder", help="Of task YAML files; all of them without --tasks."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Documents of each task.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", min=0, help="Examples before each question.")
    ] = None,
    task_batch: Annotated[
        int, typer.Option("--task-batch", min=1, help="Questions of tasks at once.")
    ] = 1,
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Also time prompts and replies.")
    ] = False,
    batch: Annotated[
        str, typer.Option("--batch", help="With --speed: sequences at once, each measured.")
    ] = "1,4,16",
    device: DeviceOption = "auto",
    device_map: DeviceMapOption = None,
    max_memory: MemoryOption = None,
    offload_folder: OffloadOption = None,
    kernel: KernelOption = "auto",
    trust_remote_code: TrustOption = False,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Also write the JSON to this file.")
    ] = None,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Show what lm-eval logs.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Measure MODEL: perplexity, distance to a reference, task scores, speed, memory."""
    batches = parse_numbers("--batch", batch)
    if out is not None and not out.absolute().parent.is_dir():
        raise SalienceError(f"--out {out}: its folder does not exist")
    from salience.calibration import read_text
    from salience.evaluation.scores import Reference, score
    from salience.machine import describe, release_memory
    from salience.monitor import Sampler
    from salience.writer import write_json

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    words = read_text(text)
    if names or task_folder is not None:
        from salience.evaluation.tasks import check_tasks, run_tasks

        check_tasks(names, task_folder, verbose)
    how = (device, device_map, max_memory, offload_folder, kernel, trust_remote_code)
    found: dict[str, Any] = {"model": model}
    seconds: dict[str, float] = {}
    with Sampler() as sampler, progress_bar("eval") as progress:
        recorded: Reference | None = None
        if reference is not None:
            with _phase("reference", sampler, seconds):
                other, tokenizer = load_model(reference, *how)
                recorded = Reference.record(
                    other, tokenizer, words, context, max_chunks, progress=progress
                )
                del other, tokenizer
                gc.collect()
                release_memory()
        with _phase("load", sampler, seconds):
            loaded, tokenizer = load_model(model, *how)
        after_load = sampler.sample()
        with _phase("text", sampler, seconds):
            scores = score(loaded, tokenizer, words, context, max_chunks, recorded, progress)
        found |= _text(scores, recorded, reference)
        if names or task_folder is not None:
            with _phase("tasks", sampler, seconds):
                found |= _with_intervals(
                    run_tasks(
                        loaded,
                        tokenizer,
                        names,
                        task_folder,
                        limit,
                        num_fewshot,
                        task_batch,
                        progress,
                        verbose,
                    )
                )
        if speed:
            from salience.evaluation.speed import measure_speed

            with _phase("speed", sampler, seconds):
                found["speed"] = asdict(
                    measure_speed(loaded, batches, sampler=sampler, progress=progress)
                )
    found["memory"] = {"loaded": asdict(after_load), **sampler.as_json()}
    found |= {"seconds": seconds, "machine": describe()}
    if out is not None:
        write_json(out, found)
    if json:
        print_json(found)
    else:
        _show(found)


@contextmanager
def _phase(name: str, sampler: "Sampler", seconds: dict[str, float]) -> Iterator[None]:
    sampler.mark(name)
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def _text(scores: "Scores", recorded: "Reference | None", name: str | None) -> dict[str, Any]:
    """What was found on the text, each number with its interval."""
    from salience.evaluation.statistics import mean_interval, perplexity_interval, perplexity_ratio

    found: dict[str, Any] = {
        "perplexity": scores.perplexity,
        "perplexity_interval": _bounds(perplexity_interval(scores.nll, scores.tokens)),
        "tokens": sum(scores.tokens),
        "context": scores.context,
        "protocol": scores.protocol,
        "chunks": asdict(scores),
    }
    if recorded is not None and scores.kl is not None and scores.agree is not None:
        theirs = recorded.scores
        ratio = perplexity_ratio(scores.nll, theirs.nll, scores.tokens)
        found["reference"] = {
            "model": name,
            "perplexity": theirs.perplexity,
            "perplexity_ratio": ratio.value,
            "perplexity_ratio_interval": _bounds(ratio),
            "kl": scores.mean_kl,
            "kl_interval": _bounds(mean_interval(scores.kl, scores.tokens)),
            "agreement": scores.agreement,
            "agreement_interval": _bounds(mean_interval(scores.agree, scores.tokens)),
        }
    return found


def _with_intervals(found: dict[str, Any]) -> dict[str, Any]:
    """Task results with an interval for each metric that is a mean over documents."""
    from salience.evaluation.statistics import score_interval

    for task in found["tasks"].values():
        task["intervals"] = {}
        for metric, value in task["metrics"].items():
            scores = list(task["documents"].get(metric, {}).values())
            if all(isinstance(each, float) for each in scores) and scores:
                mean = math.fsum(scores) / len(scores)
                if math.isclose(mean, value, rel_tol=1e-9, abs_tol=1e-12):
                    task["intervals"][metric] = _bounds(score_interval(scores))
    return found


def _bounds(interval: "Interval") -> list[float] | None:
    """Low and high; None where too little was measured to tell."""
    low, high = interval.low, interval.high
    return [low, high] if math.isfinite(low) and math.isfinite(high) else None


def _show(found: Mapping[str, Any]) -> None:
    stdout.print(
        f"perplexity {found['perplexity']:.3f}"
        f"{_between(found['perplexity_interval'], '.3f')}: {escape(found['protocol'])}"
    )
    if "reference" in found:
        other = found["reference"]
        ratio = other["perplexity_ratio"]
        agreement = _between(other["agreement_interval"], ".2%")
        stdout.print(
            f"against {escape(other['model'])} (perplexity {other['perplexity']:.3f}):\n"
            f"  perplexity times {ratio:.4f}"
            f"{_between(other['perplexity_ratio_interval'], '.4f')}\n"
            f"  divergence {other['kl']:.5f}{_between(other['kl_interval'], '.5f')} nats a token\n"
            f"  same likeliest token {other['agreement']:.2%}{agreement}"
        )
    if "tasks" in found:
        _show_tasks(found)
    if "speed" in found:
        _show_speed(found["speed"])
    memory, loaded = found["memory"]["peak"], found["memory"]["loaded"]
    stdout.print(f"RAM {size(loaded['resident'])} when loaded, {size(memory['resident'])} at most")
    if memory["gpu_total"]:
        stdout.print(
            f"VRAM {size(loaded['gpu_reserved'])} when loaded, "
            f"{size(memory['gpu_reserved'])} at most"
        )


def _between(bounds: list[float] | None, form: str) -> str:
    return "" if bounds is None else f" ({bounds[0]:{form}} to {bounds[1]:{form}})"


def _show_tasks(found: Mapping[str, Any]) -> None:
    table = Table("task", "metric", "score", "95 %", "documents", "examples")
    for name, task in found["tasks"].items():
        for metric, value in task["metrics"].items():
            bounds = _between(task["intervals"].get(metric), ".4f").strip(" ()")
            counts = str(task["n"]), str(task["num_fewshot"])
            table.add_row(escape(name), escape(metric), f"{value:.4f}", bounds, *counts)
    for name, metrics in found["groups"].items():
        for metric, value in metrics.items():
            table.add_row(escape(name), escape(metric), f"{value:.4f}", "", "", "")
    stdout.print(table)


def _show_speed(speed: Mapping[str, Any]) -> None:
    title = f"tokens a second, prompts of {speed['prompt']}, replies of {speed['new']}"
    table = Table("batch", "prefill", "decode", "RAM", title=title)
    for row in speed["rows"]:
        rates = [
            f"{rate['median']:.1f} ({rate['low']:.1f} to {rate['high']:.1f})"
            for rate in (row["prefill_tokens_per_second"], row["decode_tokens_per_second"])
        ]
        table.add_row(str(row["batch"]), *rates, size(row["peak"]["resident"]))
    stdout.print(table)
