"""`salience bench kernels|decode|quantize`."""

import json as json_module
from enum import Enum
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from salience.cli.console import (
    parse_numbers,
    parse_rules,
    parse_size,
    print_json,
    progress_bar,
    size,
    stderr,
    stdout,
)
from salience.errors import SalienceError
from salience.recipe import Recipe
from salience.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from salience.bench.decode import Decoding
    from salience.bench.kernels import Table as KernelTable
    from salience.bench.measure import Rates

app = typer.Typer(name="bench", help="Measure kernels, decoding and quantization on this machine.")


class ActivationName(str, Enum):
    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


SchemesOption = Annotated[
    list[str] | None,
    typer.Option("--scheme", help="Such as w4g128 (default); several, or w4g128,w3g128."),
]
DtypeOption = Annotated[
    ActivationName | None,
    typer.Option("--dtype", help="Of activations (default float16 on a GPU, float32 on a CPU)."),
]
OutOption = Annotated[
    Path | None, typer.Option("-o", "--out", help="Also write the JSON to this file.")
]
PlotOption = Annotated[Path | None, typer.Option("--plot", help="Draw a PNG.")]
ShapeOption = Annotated[
    str | None,
    typer.Option("--shape", help="Random weights: llama-3-8b, qwen2.5-7b, ... or a config.json."),
]
LayersOption = Annotated[
    int | None, typer.Option("--layers", min=1, help="With --shape: so many blocks.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
ModelArgument = Annotated[
    str | None, typer.Argument(help="A folder, a .gguf file, a Hub name, or smollm2-135m.")
]


@app.command()
def kernels(
    scheme: SchemesOption = None,
    shapes: Annotated[
        str | None, typer.Option("--shapes", help="INxOUT,... (default those of Llama 3).")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option("--tokens", help="Rows of x, such as 1,16,256.")
    ] = None,
    dtype: DtypeOption = None,
    kernel: Annotated[
        list[str] | None,
        typer.Option("--kernel", help="Only this one, such as dense or reference; repeatable."),
    ] = None,
    save: Annotated[
        bool, typer.Option("--save", help="First find and keep what is fastest on this GPU.")
    ] = False,
    device: DeviceOption = "auto",
    out: OutOption = None,
    plot: PlotOption = None,
    json: JsonOption = False,
) -> None:
    """Time every kernel for low-bit weights, beside a dense product and what memory allows."""
    schemes = _schemes(scheme)
    wanted = None if shapes is None else [_pair(text) for text in shapes.split(",")]
    counts = None if tokens is None else parse_numbers("--tokens", tokens)
    _check_files(out, plot)
    from salience.bench.kernels import (
        CPU_SHAPES,
        CPU_TOKENS,
        GPU_SHAPES,
        TOKENS,
        bench_kernels,
    )
    from salience.placement import resolve_device

    place = resolve_device(device)
    on_cpu = place.type == "cpu"
    these = wanted or (CPU_SHAPES if on_cpu else GPU_SHAPES)
    many = counts or (CPU_TOKENS if on_cpu else TOKENS)
    kind = _dtype(dtype, place) or _default_dtype(place)
    with progress_bar("kernels") as progress:
        if save:
            from salience.bench.tuning import tune

            table = tune(schemes, these, many, kind, place, progress=progress)
            stderr.print(escape(f"kept in {table}"))
        result = bench_kernels(schemes, these, many, kind, place, kernel or (), progress)
    _finish(result.as_json(), out, json)
    if plot is not None:
        _plot_kernels(result, plot)
    if not json:
        _show_kernels(result)
    for name, reason in result.failed.items():
        stderr.print(escape(f"{name} did not run: {reason}"))
    if result.wrong:
        stderr.print(escape(f"error: wrong results of {', '.join(result.wrong)}"))
        raise typer.Exit(1)


@app.command()
def decode(
    model: ModelArgument = None,
    shape: ShapeOption = None,
    layers: LayersOption = None,
    scheme: Annotated[
        str | None, typer.Option("--scheme", help="With --shape (default w4g128).")
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option("--rule", help='With --shape: "REGEX=SCHEME" for some, as of quantize.'),
    ] = None,
    batch: Annotated[
        str, typer.Option("--batch", help="Sequences at once, each measured.")
    ] = "1,4,16,64",
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="Tokens of a prompt.")] = 128,
    new: Annotated[int, typer.Option("--new", min=2, help="Tokens of a reply.")] = 256,
    context: Annotated[
        int | None, typer.Option("--context", help="Tokens there is room for.")
    ] = None,
    dtype: DtypeOption = None,
    dense: Annotated[bool, typer.Option("--dense", help="Also the same model, float.")] = False,
    transformers: Annotated[
        bool,
        typer.Option(
            "--transformers", help="Also the float model by Transformers' generate (CPU: bf16)."
        ),
    ] = False,
    device: DeviceOption = "auto",
    out: OutOption = None,
    plot: PlotOption = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code the model brings.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Time the generation of tokens by MODEL, or by random weights of a --shape."""
    _one_of(model, shape, layers is None and scheme is None and not rule)
    batches = parse_numbers("--batch", batch)
    recipe = Recipe(Scheme.parse(scheme or "w4g128"), parse_rules(rule))
    _check_files(out, plot)
    from salience.bench.decode import Shape, Stored, Task, bench_decode
    from salience.placement import resolve_device
    from salience.source import open_source

    place = resolve_device(device)
    task = Task(batches, prompt, new, context)
    subject = (
        Shape(shape, recipe, layers, dense or transformers)
        if shape is not None
        else Stored(open_source(str(model), trust_remote_code))
    )
    with progress_bar("decode") as progress:
        result = bench_decode(
            subject, task, _dtype(dtype, place), place, dense, transformers, progress
        )
    _finish(result.as_json(), out, json)
    if plot is not None:
        _plot_decode(result, plot)
    if not json:
        _show_decode(result)


@app.command()
def quantize(
    model: ModelArgument = None,
    shape: ShapeOption = None,
    layers: LayersOption = None,
    method: Annotated[str | None, typer.Option("--method", help="awq, gptq, rtn or nf4.")] = None,
    effort: Annotated[str | None, typer.Option("--effort", help="fast, balanced or best.")] = None,
    scheme: Annotated[str | None, typer.Option("--scheme", help="Such as w4g128.")] = None,
    calibration: Annotated[
        str, typer.Option("--calibration", help='A file, a Hub dataset, or "pydoc".')
    ] = "pydoc",
    samples: Annotated[int, typer.Option("--samples", min=1)] = 128,
    seqlen: Annotated[int, typer.Option("--seqlen", min=1)] = 512,
    max_memory: Annotated[
        str | None, typer.Option("--max-memory", help="Most memory to use, such as 8GiB.")
    ] = None,
    device: DeviceOption = "auto",
    out: OutOption = None,
    json: JsonOption = False,
) -> None:
    """Time the phases of quantizing MODEL or random weights of a --shape; nothing is kept."""
    _one_of(model, shape, layers is None)
    cap = parse_size(max_memory)
    _check_files(out, None)
    from salience.bench.quantize import bench_quantize
    from salience.calibration import Calibration
    from salience.placement import resolve_device

    with progress_bar("quantize") as progress:
        result = bench_quantize(
            model,
            shape,
            layers,
            Calibration(calibration, samples, seqlen),
            resolve_device(device),
            progress,
            method=method,
            effort=effort,
            scheme=scheme,
            max_memory=cap,
        )
    _finish(result.as_json(), out, json)
    if json:
        return
    table = Table("phase", "seconds", "peak RAM", "peak GPU memory", title=escape(result.model))
    for name, phase in result.phases.items():
        vram = size(phase.vram_bytes) if phase.vram_bytes else "-"
        table.add_row(name, f"{phase.seconds:.1f}", size(phase.rss_bytes), vram)
    vram = size(result.vram_bytes) if result.vram_bytes else "-"
    table.add_row("all", f"{result.seconds:.1f}", size(result.rss_bytes), vram)
    stdout.print(table)


def _show_kernels(result: "KernelTable") -> None:
    _show_rates(result.rates)
    names = result.kernels()
    table = Table(title=f"microseconds a call, {result.dtype} on {result.device}")
    for column in ("in x out", "tokens", "floor", *names, "auto / floor"):
        table.add_column(column, justify="left" if column == "in x out" else "right", no_wrap=True)
    scheme = ""
    for row in result.rows:
        if row.scheme != scheme:
            scheme = row.scheme
            table.add_section()
            table.add_row(f"[bold]{scheme}[/bold]")
        texts = [_text(row.seconds.get(name), 1e6) for name in names]
        if row.auto in names:
            texts[names.index(row.auto)] = f"[bold]{texts[names.index(row.auto)]}[/bold]"
        ratio = _text(row.over_floor(row.auto), 1, 2)
        shape = f"{row.columns}x{row.rows}"
        table.add_row(shape, str(row.tokens), _text(row.floor, 1e6), *texts, ratio)
    stdout.print(table)
    for name in result.peers():
        stdout.print(
            f"auto takes {result.ratio(name):.2f} times as long as {name} (geometric mean)"
        )


def _show_decode(result: "Decoding") -> None:
    _show_rates(result.rates)
    table = Table(title=f"{escape(result.model)}: {result.prompt} + {result.new} tokens")
    for column in ("", "batch", "prompt/s", "ms a step", "tokens/s", "floor", "memory", "least"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for variant in result.variants:
        for row in variant.rows:
            table.add_row(
                variant.name,
                str(row.batch),
                f"{row.prefill_tokens_per_second:.0f}",
                f"{row.step_seconds * 1e3:.2f}{'*' if row.interleaved else ''}",
                f"{row.tokens_per_second:.1f}",
                f"{row.share:.0%}",
                size(row.peak_bytes),
                size(row.predicted_bytes),
            )
    stdout.print(table)
    stdout.print(
        "floor: what reading the weights and the cache once takes of a step; least: both of them"
    )
    if any(row.interleaved for variant in result.variants for row in variant.rows):
        stdout.print("*: replies ended before the last prompt was in; use more --new tokens")
    for each in result.variants:
        held = size(each.resident.weights)
        stdout.print(f"{each.name} {each.dtype}: {held}, loaded in {each.load_seconds:.1f} s")
    first, *others = result.variants
    for other in others:
        ratios = [(row.batch, result.ratio(other, row)) for row in first.rows]
        texts = ", ".join(f"{ratio:.2f} (batch {count})" for count, ratio in ratios if ratio)
        stdout.print(f"{first.name} over {other.name}: {texts}")


def _show_rates(rates: "Rates") -> None:
    stdout.print(
        f"this machine copies at {rates.copy / 1e12:.3g} TB/s, reads at {rates.read / 1e12:.3g} "
        f"TB/s, multiplies at {rates.flops / 1e12:.3g} TFLOP/s"
    )


def _plot_kernels(result: "KernelTable", path: Path) -> None:
    from salience.bench.plot import Panel, draw

    panels = []
    for scheme, columns, rows in dict.fromkeys((r.scheme, r.columns, r.rows) for r in result.rows):
        same = [r for r in result.rows if (r.scheme, r.columns, r.rows) == (scheme, columns, rows)]
        lines = {
            name: [(r.tokens, r.over_floor(name)) for r in same if isfinite(r.over_floor(name))]
            for name in result.kernels()
        }
        panels.append(Panel(f"{scheme}, {columns} x {rows}", {k: v for k, v in lines.items() if v}))
    draw(panels, "tokens", "time over floor", path, level=True)


def _plot_decode(result: "Decoding", path: Path) -> None:
    from salience.bench.plot import Panel, draw

    lines = {}
    for variant in result.variants:
        name = f"{variant.name} {variant.dtype}"
        lines[name] = [(row.batch, row.tokens_per_second) for row in variant.rows]
    first = result.variants[0]
    lines[f"floor of {first.name}"] = [(r.batch, r.batch / r.floor_seconds) for r in first.rows]
    draw([Panel(result.model, lines)], "batch", "tokens a second", path, level=False)


def _finish(values: dict[str, Any], out: Path | None, json: bool) -> None:
    """Print and write the JSON, as far as it is wanted."""
    if json:
        print_json(values)
    if out is not None:
        out.write_text(json_module.dumps(values, indent=1) + "\n", encoding="utf-8")


def _check_files(out: Path | None, plot: Path | None) -> None:
    """Refuse a file that cannot be made, before there is something to put in it."""
    if plot is not None and find_spec("matplotlib") is None:
        raise SalienceError("--plot needs matplotlib; pip install matplotlib")
    for path in (out, plot):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise SalienceError(f"{path} cannot be written; name a file in a folder that is there")


def _one_of(model: str | None, shape: str | None, plain: bool) -> None:
    if (model is None) == (shape is None):
        raise SalienceError("name a MODEL or a --shape, one of them")
    if model is not None and not plain:
        raise SalienceError("--layers, --scheme and --rule are for a --shape; MODEL has its own")


def _schemes(texts: list[str] | None) -> list[Scheme]:
    return [Scheme.parse(name) for text in texts or ["w4g128"] for name in text.split(",")]


def _pair(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and 0 < int(part) < 2**20 for part in parts):
        raise SalienceError(f"shape {text!r} is not understood; write it like 4096x14336, INxOUT")
    return int(parts[0]), int(parts[1])


def _dtype(name: ActivationName | None, device: "torch.device") -> "torch.dtype | None":
    import torch

    if name is None:
        return None
    if name is ActivationName.float32 and device.type == "cuda":
        raise SalienceError("--dtype float32 is for CPUs; use float16 or bfloat16")
    dtype: torch.dtype = getattr(torch, name.value)
    return dtype


def _default_dtype(device: "torch.device") -> "torch.dtype":
    import torch

    return torch.float32 if device.type == "cpu" else torch.float16


def _text(value: float | None, factor: float, digits: int = 1) -> str:
    if value is None or not isfinite(value):
        return "-"
    return f"{value * factor:.{digits}f}"
