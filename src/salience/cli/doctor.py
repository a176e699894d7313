"""`doctor`: of this machine, or of a checkpoint."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from salience.cli.console import print_json, size, stdout
from salience.cli.options import GpusOption, JsonOption, TrustOption

_SHOWN = 4  # names of a complaint
_MARKS = {"error": "red", "warning": "yellow", "note": "dim"}
_STATUS = {"works": "green", "fails": "red", "absent": "dim"}
_ANSWERS = {"yes": "green", "in part": "yellow", "no": "red"}


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(help="A folder, a .gguf file, or a Hub name; nothing for this machine."),
    ] = None,
    run: Annotated[
        bool, typer.Option("--run", help="Compute a few tokens in fp32, to look for overflow.")
    ] = False,
    tensor_parallel: GpusOption = None,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Say what this machine can do, or what is wrong with a checkpoint; exit 1 if something is."""
    healthy = (
        _machine(json)
        if model is None
        else _checkpoint(model, run, tensor_parallel or 1, trust_remote_code, json)
    )
    if not healthy:
        raise typer.Exit(1)


def _machine(json: bool) -> bool:
    from salience.doctor.machine import examine

    found = examine()
    if json:
        fits = [asdict(fit) | {"fits": fit.fits} for fit in found.fits]
        print_json(asdict(found) | {"fits": fits, "works": found.works})
        return found.works
    for name, value in _facts(found):
        stdout.print(f"[bold]{name}[/bold]: {escape(value)}")
    table = Table("tried", "status", "ms", "why")
    for kind in dict.fromkeys(trial.kind for trial in found.trials):
        for trial in found.trials:
            if trial.kind == kind:
                color = _STATUS[trial.status]
                status = f"[{color}]{trial.status}[/{color}]"
                table.add_row(
                    escape(f"{kind} {trial.name}"),
                    status,
                    f"{trial.milliseconds:.1f}",
                    escape(trial.detail),
                )
    stdout.print(table)
    stdout.print(_fits_table(found.fits))
    for line in found.warnings:
        stdout.print(f"[yellow]warning[/yellow]: {escape(line)}")
    broken = sum(trial.status == "fails" for trial in found.trials)
    works = "[green]all that was tried works[/green]"
    stdout.print(f"[red]{broken} of {len(found.trials)} trials fail[/red]" if broken else works)
    return found.works


def _facts(found: Any) -> Iterable[tuple[str, str]]:
    for gpu in found.gpus:
        memory = f"{size(gpu.free)} of {size(gpu.total)} free"
        yield "GPU", f"{gpu.name}, compute capability {gpu.capability}, {memory}"
    if not found.gpus:
        yield "GPU", "none that torch sees"
    driver = found.driver or "none"
    yield "CUDA", f"driver {driver}, torch for {found.cuda or 'CPUs'}"
    features = " ".join(found.cpu_features) or "no features known"
    threads = f"{found.threads} threads on {found.cpus:g} processors"
    yield "CPU", f"{found.cpu}, {threads}, torch's kernels for {found.cpu_capability}"
    yield "CPU features", features
    limit = f", the cgroup's limit is {size(found.ram_limit)}" if found.ram_limit else ""
    yield "RAM", f"{size(found.ram_free)} of {size(found.ram)} free{limit}"
    yield "disk", ", ".join(f"{size(free)} free ({name})" for name, free in found.disk_free.items())
    yield "compiler", found.compiler or "none, so Triton cannot start"
    yield "packages", ", ".join(f"{name} {each}" for name, each in found.versions.items())


def _fits_table(fits: list[Any]) -> Table:
    """A row for each size, a column for each device and scheme."""
    columns = list(dict.fromkeys((fit.device, fit.scheme) for fit in fits))
    table = Table("runs here", *(f"{scheme} on {device}" for device, scheme in columns))
    for name in dict.fromkeys(fit.size for fit in fits):
        cells = []
        for device, scheme in columns:
            [fit] = [f for f in fits if (f.size, f.device, f.scheme) == (name, device, scheme)]
            color, word = ("green", "yes") if fit.fits else ("red", "no")
            cells.append(f"[{color}]{word}[/{color}] {size(fit.bytes)}")
        table.add_row(name, *cells)
    return table


def _checkpoint(model: str, run: bool, gpus: int, trusted: bool, json: bool) -> bool:
    from salience.doctor.checkpoint import examine
    from salience.source import open_source

    found = examine(open_source(model, trusted), gpus, run)
    if json:
        print_json(asdict(found) | {"healthy": found.healthy})
        return found.healthy
    stdout.print(
        f"[bold]{escape(model)}[/bold]: {found.format}, {found.linears} quantized linears, "
        f"{size(found.bytes)}"
    )
    for each in found.complaints:
        color, names = _MARKS[each.severity], list(each.where)
        where = ", ".join(names[:_SHOWN]) + (
            f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        )
        said = escape(f"{where}: {each.problem}; {each.mend}")
        stdout.print(f"[{color}]{each.severity}[/{color}]: {said}")
    if not any(each.severity != "note" for each in found.complaints):
        stdout.print("[green]nothing is wrong with it[/green]")
    if found.largest is not None:
        most, module = found.largest
        stdout.print(f"largest activation: {most:.1f} in {escape(module)} (fp16 ends at 65504)")
    table = Table("reader", "reads it", "with")
    for verdict in found.verdicts:
        color = _ANSWERS[verdict.answer]
        lines = escape("\n".join(verdict.lines))
        table.add_row(verdict.runtime, f"[{color}]{verdict.answer}[/{color}]", lines)
    stdout.print(table)
    for trouble, mend in found.mends.items():
        stdout.print(f"[bold]{trouble}[/bold]: {escape(mend)}")
    return found.healthy
