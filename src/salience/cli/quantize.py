"""`plan`, `quantize` and `report`: before, during and after."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from salience.cli.console import (
    parse_rules,
    parse_size,
    print_json,
    progress_bar,
    show_block,
    show_warning,
    size,
    stdout,
)
from salience.cli.options import (
    ActOrderOption,
    DeviceOption,
    DtypeName,
    EffortOption,
    FormatOption,
    GpusOption,
    JsonOption,
    MemoryOption,
    MethodOption,
    Model,
    OnlyOption,
    PadOption,
    RulesOption,
    SamplesOption,
    SchemeOption,
    SeqlenOption,
    SkipOption,
    TargetOption,
    TextOption,
    TrustOption,
)


def plan(
    model: Model,
    method: MethodOption = None,
    effort: EffortOption = None,
    act_order: ActOrderOption = False,
    scheme: SchemeOption = None,
    rule: RulesOption = None,
    skip: SkipOption = None,
    only: OnlyOption = None,
    format: FormatOption = None,
    samples: SamplesOption = 128,
    seqlen: SeqlenOption = 512,
    out: Annotated[Path, typer.Option("-o", "--out", help="Where it would be written.")] = Path(),
    device: DeviceOption = "auto",
    max_memory: MemoryOption = None,
    tensor_parallel: GpusOption = None,
    pad_intermediate: PadOption = None,
    target_bits: TargetOption = None,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Say what quantizing MODEL needs: memory, disk, time. No weights are read."""
    from salience.calibration import Calibration
    from salience.pipeline.prepare import prepare
    from salience.planning.plan import make_plan
    from salience.serving import summary

    prepared = prepare(
        model,
        method=method and method.value,
        effort=effort and effort.value,
        act_order=act_order,
        scheme=scheme,
        rules=parse_rules(rule),
        skip=skip or (),
        only=only or (),
        format=format and format.value,
        device=device,
        tensor_parallel=tensor_parallel,
        pad_intermediate=pad_intermediate,
        target_bits=target_bits,
        trust_remote_code=trust_remote_code,
        prove=False,
    )
    text = Calibration(samples=samples, seqlen=seqlen) if prepared.job.method.reads_text else None
    result = make_plan(prepared.job, text, out, parse_size(max_memory))
    if json:
        serving = [asdict(each) for each in prepared.serving]
        print_json(asdict(result) | {"intermediate_size": prepared.padding, "serving": serving})
    else:
        table = Table(title=f"Plan for {escape(model)}", show_header=False)
        table.add_row("parameters", f"{result.parameters / 1e6:.1f} M")
        table.add_row("quantized", f"{result.quantized_parameters / 1e6:.1f} M to {result.scheme}")
        if prepared.padding is not None:
            before, after = prepared.padding
            table.add_row("intermediate size", f"{before} widened to {after}")
        table.add_row("bits per quantized weight", f"{result.bits_per_weight:.2f}")
        table.add_row("disk", f"{size(result.source_bytes)} to {size(result.disk_bytes)}")
        table.add_row("disk, while it is made", size(result.temporary_bytes))
        table.add_row("peak RAM", size(result.ram_bytes))
        if result.vram_bytes:
            table.add_row("peak GPU memory", size(result.vram_bytes))
        for phase, count in result.memory.items():
            table.add_row(f"tensors in {phase}", size(count))
        for phase, seconds in result.seconds.items():
            table.add_row(phase, f"about {seconds:.0f} s on {result.device}")
        table.add_row("hidden states", "on the disk" if result.hidden_on_disk else "in memory")
        table.add_row("fits", "yes" if result.fits else "no")
        stdout.print(table)
        for line in (*result.advice, *summary(prepared.serving)):
            stdout.print(escape(line))
    if not result.fits:
        raise typer.Exit(3)


def quantize(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to make.")],
    method: MethodOption = None,
    effort: EffortOption = None,
    act_order: ActOrderOption = False,
    scheme: SchemeOption = None,
    rule: RulesOption = None,
    skip: SkipOption = None,
    only: OnlyOption = None,
    format: FormatOption = None,
    dtype: Annotated[
        DtypeName, typer.Option("--dtype", help="Of what is stored float.")
    ] = DtypeName.float16,
    calibration: TextOption = "pydoc",
    samples: SamplesOption = 128,
    seqlen: SeqlenOption = 512,
    seed: Annotated[int, typer.Option("--seed", help="Which part of the text.")] = 0,
    device: DeviceOption = "auto",
    max_memory: MemoryOption = None,
    save_search: Annotated[
        Path | None, typer.Option("--save-search", help="Also write scales and grids to this file.")
    ] = None,
    from_search: Annotated[
        Path | None,
        typer.Option("--from-search", help="Use scales and grids of this file (or llm-awq's .pt)."),
    ] = None,
    tensor_parallel: GpusOption = None,
    pad_intermediate: PadOption = None,
    target_bits: TargetOption = None,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Quantize MODEL into a new checkpoint folder; after a kill the same command goes on."""
    from salience.calibration import Calibration
    from salience.pipeline.quantize import quantize as run
    from salience.reports.report import widths

    names = [each.value for each in (method, effort) if each is not None]
    with progress_bar(" ".join([*names, scheme or ""]).strip() or "quantize") as progress:
        report = run(
            model,
            out,
            method=method and method.value,
            effort=effort and effort.value,
            act_order=act_order,
            scheme=scheme,
            rules=parse_rules(rule),
            skip=tuple(skip or ()),
            only=tuple(only or ()),
            format=format and format.value,
            dtype=dtype.value,
            calibration=Calibration(calibration, samples, seqlen, seed),
            device=device,
            max_memory=parse_size(max_memory),
            save_search=save_search,
            from_search=from_search,
            tensor_parallel=tensor_parallel,
            pad_intermediate=pad_intermediate,
            target_bits=target_bits,
            trust_remote_code=trust_remote_code,
            progress=progress,
            on_block=lambda block: show_block(
                block.name,
                block.error_rtn,
                block.error,
                block.folds,
                block.seconds,
                block.peak_vram_bytes or block.peak_rss_bytes,
                None
                if block.loss_start is None or block.loss is None
                else (block.loss_start, block.loss),
            ),
            on_warning=show_warning,
        )
    if json:
        keys = ["out", "method", "effort", "scheme", "format", "seconds", "phase_seconds"]
        keys += ["peak_rss_bytes", "peak_vram_bytes", "bits_per_weight", "error_rtn", "error"]
        keys += ["kept_modules", "serving", "calibration", "allocation"]
        values = asdict(report)
        quantized = [linear.name for linear in report.linears]
        print_json({key: values[key] for key in keys} | {"quantized_modules": quantized})
        return
    ratio = report.error / report.error_rtn if report.error_rtn else 1.0
    kept = sum(linear.kept_rtn for linear in report.linears)
    stdout.print(
        f"{escape(str(out))}: {len(report.linears)} linears at "
        f"{report.bits_per_weight:.2f} bits a weight, output error {ratio:.2f} of plain "
        f"rounding's ({kept} linears kept it), {report.seconds:.0f} s, "
        f"{size(report.peak_rss_bytes)} peak"
    )
    if report.allocation:
        stdout.print(f"bits chosen: {widths(report.allocation)}")
    if report.kept_modules:
        some, count = report.kept_modules[:3], len(report.kept_modules)
        more = f" and {count - len(some)} more" if count > len(some) else ""
        stdout.print(escape(f"stayed float: {', '.join(some)}{more}"))


def report(
    quantized: Annotated[Path, typer.Argument(help="The folder salience quantize wrote.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="HTML file to make.")] = Path(
        "report.html"
    ),
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
    json: JsonOption = False,
) -> None:
    """Draw the report of a finished quantization as one HTML page."""
    from salience.reports.page import write_page
    from salience.reports.report import read_report

    write_page(read_report(quantized), out, force)
    if json:
        print_json({"out": str(out)})
    else:
        stdout.print(f"{escape(str(out))}: open it in a browser")
