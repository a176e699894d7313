"""`compare`: models beside each other, with intervals, verdicts and a gate."""

import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from salience.cli.console import print_json, progress_bar, stderr, stdout
from salience.cli.options import (
    DeviceOption,
    JsonOption,
    KernelOption,
    SamplesOption,
    SeqlenOption,
    TextOption,
    TrustOption,
)
from salience.errors import SalienceError

if TYPE_CHECKING:
    from salience.evaluation.comparison import Comparison

_GATE_FAILED = 4
_GATE_HELP = (
    "Conditions with which every other model must meet, parted by ';', or the exit status is 4: "
    "METRIC<=LIMIT or METRIC>=LIMIT. Metrics: perplexity (ppl), kl, agreement, decode, decode@4, "
    "prefill, disk, bits, ram, vram, ram@load, vram@load, or a task. Limits: 1.03x is a ratio to "
    "the reference; 0.05 the value itself; a task's +0.5 or -1.0 points of difference to the "
    "reference, and its 61.5 the score in points; 8GiB a size. Each must hold with 95 % "
    'confidence. Such as "perplexity<=1.03x; kl<=0.05; mmlu>=-1.0; decode>=1.5x; disk<=0.35x".'
)


def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="REFERENCE MODEL...",
            help="Folders, .gguf files or Hub names; or recipes made on the fly: MODEL@w4g64:awq "
            "(rtn, awq, gptq, fast, balanced, best), MODEL@nf4, or @awq for the reference with "
            "each --scheme.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="HTML file to make, of one piece.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", help="Markdown file to make.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option("--text", help='For perplexity, KL and agreement: a file, or "pydoc".'),
    ] = None,
    context: Annotated[int, typer.Option("--context", min=2, help="Tokens in a chunk.")] = 2048,
    max_chunks: Annotated[
        int | None, typer.Option("--max-chunks", min=1, help="Of the text, its first.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", help="Of lm-eval, such as mmlu,arc_easy.")
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option("--task-folder", help="Of task YAML files.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Documents of each task.")
    ] = None,
    gate: Annotated[str | None, typer.Option("--gate", help=_GATE_HELP)] = None,
    scheme: Annotated[
        str, typer.Option("--scheme", help="Of recipes that name none, such as w4g64,w3g64.")
    ] = "w4g128",
    calibration: TextOption = "pydoc",
    samples: SamplesOption = 128,
    seqlen: SeqlenOption = 512,
    seed: Annotated[int, typer.Option("--seed", help="Which part of the text.")] = 0,
    batch: Annotated[
        str, typer.Option("--batch", help="Replies at once, for speed; each measured.")
    ] = "1,4,16",
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="Tokens of a prompt there.")] = 128,
    new: Annotated[int, typer.Option("--new", min=2, help="Tokens of a reply there.")] = 64,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Of each timing.")] = 5,
    no_speed: Annotated[bool, typer.Option("--no-speed", help="Do not time anything.")] = False,
    work: Annotated[
        Path | None,
        typer.Option("--work", help="Folder of what is done; kept, to go on from or to add to."),
    ] = None,
    keep: Annotated[
        Path | None, typer.Option("--keep", help="Folder for the checkpoints that are made.")
    ] = None,
    device: DeviceOption = "auto",
    kernel: KernelOption = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace the files.")] = False,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Measure models beside a reference, the first: size, memory, speed, quality, and a verdict.

    Each is loaded and measured in a process of its own. After a kill the same command goes on.
    """
    from salience.calibration import Calibration
    from salience.evaluation.candidates import parse_candidates
    from salience.evaluation.compare import Options
    from salience.evaluation.compare import compare as run
    from salience.evaluation.comparison_page import page
    from salience.evaluation.comparison_text import markdown as as_markdown

    candidates = parse_candidates(models, [each for each in scheme.split(",") if each])
    options = Options(
        text=text,
        context=context,
        max_chunks=max_chunks,
        batches=() if no_speed else _numbers("--batch", batch),
        prompt=prompt,
        new=new,
        repeats=repeats,
        tasks=tuple(each.strip() for each in (tasks or "").split(",") if each.strip()),
        task_folder=None if task_folder is None else str(task_folder.absolute()),
        limit=limit,
        calibration=Calibration(calibration, samples, seqlen, seed),
        device=device,
        kernel=kernel,
        trust_remote_code=trust_remote_code,
    )
    if task_folder is not None and not options.tasks:
        raise SalienceError("--task-folder has tasks to choose from; name some with --tasks")
    for file in (out, markdown):
        if file is not None:
            _check_new(file, force)
    with _work_folder(work, out) as folder, progress_bar("compare") as progress:
        comparison = run(
            candidates,
            options,
            folder,
            keep=keep,
            gate=gate,
            command=shlex.join(["salience", *sys.argv[1:]]),
            progress=progress,
            on_line=lambda line: stderr.print(escape(line)),
        )
        if out is not None:
            _write(out, page(comparison))
        if markdown is not None:
            _write(markdown, as_markdown(comparison))
    if json:
        print_json(comparison.as_json())
    else:
        _show(comparison)
    for line in comparison.failures or ():
        stderr.print(escape(f"gate: {line}"))
    if comparison.failures:
        raise typer.Exit(_GATE_FAILED)


@contextmanager
def _work_folder(work: Path | None, out: Path | None) -> Iterator[Path]:
    """Where work is kept: as named; beside the output until that is there; or nowhere."""
    if work is not None:
        yield work
        return
    if out is None:
        with tempfile.TemporaryDirectory(prefix="salience-compare-") as name:
            yield Path(name)
        return
    folder = out.with_name(f"{out.name}.partial")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _check_new(file: Path, force: bool) -> None:
    """Refuse a file to make that cannot be made, before anything runs."""
    if file.is_dir():
        raise SalienceError(f"{file} is a folder; name a file")
    if file.exists() and not force:
        raise SalienceError(f"{file} exists; pass --force to replace it, or name another")
    if not file.absolute().parent.is_dir():
        raise SalienceError(f"the folder of {file} does not exist; make it first")


def _write(file: Path, text: str) -> None:
    from salience.writer import replacing

    with replacing(file) as part:
        # A lone surrogate, which a name can hold, is no character of UTF-8.
        part.write_bytes(text.encode("utf-8", "replace"))


def _numbers(option: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and 0 < int(part) < 10**6 for part in parts):
        raise SalienceError(f"{option} {text!r} is not understood; write it like 1,4,16")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _show(comparison: "Comparison") -> None:
    from salience.evaluation.comparison_text import beside, ordered, row_verdict, show, title

    for line in comparison.conclusion():
        stdout.print(f"[bold]{escape(line)}[/bold]")
    table = Table(title=escape(f"beside {comparison.reference.name}; intervals of 95 %"))
    table.add_column("")
    for row in comparison.rows:
        table.add_column(escape(row.name), justify="right")
    table.add_row(
        "verdict", *(escape(row_verdict(row, comparison.reference)) for row in comparison.rows)
    )
    for metric in ordered(comparison):
        cells = []
        for row in comparison.rows:
            value, interval = show(metric, row.cells.get(metric))
            said = beside(metric, row.cells.get(metric))
            cells.append("\n".join(part for part in (value, interval, said) if part) or "-")
        table.add_section()
        table.add_row(title(metric), *map(escape, cells))
    stdout.print(table)
