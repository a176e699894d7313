"""The commands. Heavy imports happen inside each, so that `--help` answers at once."""

import os
import sys
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from salience.cli import bench
from salience.cli.console import (
    parse_size,
    print_json,
    progress_bar,
    show_block,
    show_warning,
    size,
    stderr,
    stdout,
)
from salience.errors import SalienceError
from salience.scheme import Scheme

app = typer.Typer(
    name="salience",
    help="Activation-aware low-bit weights for language models.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench.app)


# The base of what typer raises for wrong options: click's, or in newer versions its own copy of it.
_WrongUseError: type[Any] = typer.BadParameter.__mro__[2]
_INTERRUPTED = 130  # the exit status that shells give Ctrl-C


class MethodName(str, Enum):
    awq = "awq"
    gptq = "gptq"
    rtn = "rtn"
    nf4 = "nf4"


class EffortName(str, Enum):
    fast = "fast"
    balanced = "balanced"


class FormatName(str, Enum):
    awq = "awq"
    compressed_tensors = "compressed-tensors"
    bitsandbytes = "bitsandbytes"
    gptq = "gptq"
    bitsandbytes_int8 = "bitsandbytes-int8"
    gguf = "gguf"
    dense = "dense"


class DtypeName(str, Enum):
    float16 = "float16"
    bfloat16 = "bfloat16"


Model = Annotated[str, typer.Argument(help="A folder, a .gguf file, a Hub name, or smollm2-135m.")]
SchemeOption = Annotated[
    str | None, typer.Option("--scheme", help="Bits and group size: w4g128 (default), w3g64.")
]
RulesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--rule",
        help='"REGEX=SCHEME": another scheme for the linears whose name it matches; repeatable. '
        'Reaches head and embeddings too: "lm_head|embed_tokens=w8g128".',
    ),
]
SkipOption = Annotated[
    list[str] | None, typer.Option("--skip", help="REGEX of linears that stay float; repeatable.")
]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option("--only", help="REGEX that a linear must match to be quantized; repeatable."),
]
MethodOption = Annotated[
    MethodName | None, typer.Option("--method", help="How weights are coded (default awq).")
]
EffortOption = Annotated[
    EffortName | None,
    typer.Option("--effort", help="fast: AWQ (default); balanced: AWQ, then GPTQ's codes."),
]
ActOrderOption = Annotated[
    bool,
    typer.Option(
        "--act-order", help="Groups of columns of like importance: --method gptq --format gptq."
    ),
]
MemoryOption = Annotated[
    str | None,
    typer.Option("--max-memory", help="Most memory of --device to use, such as 8GiB."),
]
FormatOption = Annotated[
    FormatName | None,
    typer.Option(
        "--format",
        help="Checkpoint format (default awq); dense: scales folded in, nothing rounded.",
    ),
]
TextOption = Annotated[
    str,
    typer.Option(
        "--calibration",
        help='A .txt or .jsonl file, a Hub dataset, or "pydoc": Python\'s own documentation.',
    ),
]
SamplesOption = Annotated[int, typer.Option("--samples", min=1, help="Calibration sequences.")]
SeqlenOption = Annotated[int, typer.Option("--seqlen", min=1, help="Tokens in each.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
DeviceMapOption = Annotated[
    str | None,
    typer.Option(
        "--device-map",
        help="Where weights lie: auto, balanced, sequential, cpu or disk. With --max-memory, auto.",
    ),
]
OffloadOption = Annotated[
    Path | None, typer.Option("--offload-folder", help="Keeps what is to lie on the disk.")
]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code the model brings.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
GpusOption = Annotated[
    int | None,
    typer.Option("--tensor-parallel", min=1, help="GPUs that vLLM or SGLang will cut it over."),
]
KernelOption = Annotated[
    str, typer.Option("--kernel", help="auto, gpu, cpu_int4, reference or codebook.")
]


@app.command()
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
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Say what quantizing MODEL needs: memory, disk, time. No weights are read."""
    from salience.calibration import Calibration
    from salience.formats import get_format
    from salience.loading import resolve_device
    from salience.methods import check_method, default_format, default_scheme, get_method
    from salience.plan import make_plan
    from salience.recipe import Recipe
    from salience.source import open_source
    from salience.structure import codable, find_blocks, kept

    name = method.value if method else "awq"
    chosen = get_method(name, effort.value if effort else "fast", act_order)
    source = open_source(model, trust_remote_code)
    skeleton = source.skeleton()
    recipe = Recipe(
        Scheme.parse(default_scheme(name) if scheme is None else scheme),
        _rules(rule),
        tuple(skip or ()),
        tuple(only or ()),
    )
    schemes = recipe.resolve(list(codable(skeleton)), find_blocks(skeleton)[0], kept(skeleton))
    for each in schemes.values():
        check_method(chosen, each)
    result = make_plan(
        source,
        schemes,
        get_format(format.value if format else default_format(name)),
        Calibration(samples=samples, seqlen=seqlen) if chosen.reads_text else None,
        chosen,
        resolve_device(device),
        out,
        parse_size(max_memory),
    )
    if json:
        print_json(asdict(result))
    else:
        table = Table(title=f"Plan for {escape(model)}", show_header=False)
        table.add_row("parameters", f"{result.parameters / 1e6:.1f} M")
        table.add_row("quantized", f"{result.quantized_parameters / 1e6:.1f} M to {result.scheme}")
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
        for line in result.advice:
            stdout.print(escape(line))
    if not result.fits:
        raise typer.Exit(3)


@app.command()
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
    pad_intermediate: Annotated[
        int | None,
        typer.Option(
            "--pad-intermediate",
            min=1,
            help="Widen the MLPs to a multiple of this, by zeros: group size times GPUs.",
        ),
    ] = None,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Quantize MODEL into a new checkpoint folder; after a kill the same command goes on."""
    from salience.calibration import Calibration
    from salience.pipeline import quantize as run

    names = [each.value for each in (method, effort) if each is not None]
    with progress_bar(" ".join([*names, scheme or ""]).strip() or "quantize") as progress:
        report = run(
            model,
            out,
            method=method and method.value,
            effort=effort and effort.value,
            act_order=act_order,
            scheme=scheme,
            rules=_rules(rule),
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
            trust_remote_code=trust_remote_code,
            progress=progress,
            on_block=lambda block: show_block(
                block.name,
                block.error_rtn,
                block.error,
                block.folds,
                block.seconds,
                block.peak_vram_bytes or block.peak_rss_bytes,
            ),
            on_warning=show_warning,
        )
    if json:
        keys = ["out", "method", "effort", "scheme", "format", "seconds", "phase_seconds"]
        keys += ["peak_rss_bytes", "peak_vram_bytes", "bits_per_weight", "error_rtn", "error"]
        keys += ["kept_modules", "serving", "calibration"]
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
    if report.kept_modules:
        some, count = report.kept_modules[:3], len(report.kept_modules)
        more = f" and {count - len(some)} more" if count > len(some) else ""
        stdout.print(escape(f"stayed float: {', '.join(some)}{more}"))


def _rules(texts: list[str] | None) -> tuple[tuple[str, Scheme], ...]:
    rules = []
    for text in texts or ():
        pattern, equals, scheme = text.rpartition("=")
        if not equals:
            raise SalienceError(f'--rule {text!r} is not understood; write it "REGEX=SCHEME"')
        rules.append((pattern, Scheme.parse(scheme)))
    return tuple(rules)


@app.command()
def convert(
    model: Annotated[
        str, typer.Argument(help="A quantized checkpoint folder, a .gguf file, or a Hub name.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to make.")],
    format: Annotated[
        FormatName, typer.Option("--format", help="Format to write. dense: dequantized weights.")
    ],
    dtype: Annotated[
        DtypeName | None,
        typer.Option("--dtype", help="Of --format dense (default the checkpoint's own)."),
    ] = None,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Write a quantized checkpoint in another format: the same codes and scales, or a refusal."""
    from salience.converting import convert as run

    with progress_bar("convert") as progress:
        result = run(
            model,
            out,
            format.value,
            dtype=dtype and dtype.value,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if json:
        print_json(asdict(result))
        return
    kept = "codes and scales are the same" if result.lossless else "dequantized, no codes are left"
    stdout.print(
        f"{escape(str(out))}: {result.linears} linears from {result.source_format} to "
        f"{result.format}, {kept}; {size(result.bytes)}, {result.seconds:.0f} s, "
        f"{size(result.peak_rss_bytes)} peak"
    )


@app.command()
def inspect(
    model: Model,
    tensor_parallel: GpusOption = None,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Show what is in a checkpoint, and what vLLM and SGLang would mind of it."""
    from salience.inspection import inspect as look
    from salience.serving import summary
    from salience.source import open_source

    result = look(open_source(model, trust_remote_code), tensor_parallel or 1)
    if json:
        print_json(asdict(result))
        return
    stdout.print(
        f"{escape(model)}: {result.format} {result.scheme or ''}, {len(result.modules)} linears "
        f"at {result.bits_per_weight:.2f} bits a weight, {size(result.bytes)}"
    )
    table = Table("linear", "in", "out", "scheme")
    for module in result.modules:
        table.add_row(module.name, str(module.in_features), str(module.out_features), module.scheme)
    stdout.print(table)
    if result.kept:
        stdout.print(f"kept float: {', '.join(result.kept)}")
    for line in summary(result.serving):
        stdout.print(escape(line))


@app.command(name="eval")
def evaluate(
    model: Model,
    text: Annotated[
        str, typer.Option("--text", help='A text file, or "pydoc": Python\'s documentation.')
    ] = "pydoc",
    context: Annotated[int, typer.Option("--context", min=2, help="Tokens in a chunk.")] = 2048,
    max_chunks: Annotated[int | None, typer.Option("--max-chunks", min=1)] = None,
    device: DeviceOption = "auto",
    device_map: DeviceMapOption = None,
    max_memory: MemoryOption = None,
    offload_folder: OffloadOption = None,
    kernel: KernelOption = "auto",
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Measure the perplexity of MODEL on a text."""
    from salience.calibration import read_text
    from salience.evaluation.perplexity import perplexity
    from salience.loading import load_source
    from salience.source import open_source

    words = read_text(text)
    source = open_source(model, trust_remote_code)
    tokenizer = source.tokenizer
    loaded = load_source(
        source,
        device,
        kernel=kernel,
        device_map=device_map,
        max_memory=parse_size(max_memory),
        offload_folder=offload_folder,
    )
    with progress_bar("perplexity") as progress:
        result = perplexity(loaded, tokenizer, words, context, max_chunks, progress)
    if json:
        print_json(asdict(result))
    else:
        stdout.print(f"perplexity {result.perplexity:.3f} ({escape(result.protocol)})")


@app.command()
def chat(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", help="What to say.")],
    system: Annotated[str | None, typer.Option("--system", help="A system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 256,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the sampling.")] = 0,
    device: DeviceOption = "auto",
    device_map: DeviceMapOption = None,
    max_memory: MemoryOption = None,
    offload_folder: OffloadOption = None,
    kernel: KernelOption = "auto",
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Ask MODEL one thing and print its reply."""
    from salience.chat.reply import reply
    from salience.loading import load_source
    from salience.source import open_source

    def show(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    source = open_source(model, trust_remote_code)
    tokenizer = source.tokenizer
    loaded = load_source(
        source,
        device,
        kernel=kernel,
        device_map=device_map,
        max_memory=parse_size(max_memory),
        offload_folder=offload_folder,
    )
    result = reply(
        loaded,
        tokenizer,
        prompt,
        system,
        max_new_tokens,
        temperature,
        seed,
        None if json else show,
    )
    if json:
        print_json(asdict(result))
        return
    sys.stdout.write("\n")
    stderr.print(
        f"{result.tokens} tokens, first after {result.first_token_seconds:.2f} s, "
        f"then {result.tokens_per_second:.1f} tokens/s"
    )


@app.command()
def report(
    quantized: Annotated[Path, typer.Argument(help="The folder salience quantize wrote.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="HTML file to make.")] = Path(
        "report.html"
    ),
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
    json: JsonOption = False,
) -> None:
    """Draw the report of a finished quantization as one HTML page."""
    from salience.report import read_report
    from salience.report_page import write_page

    write_page(read_report(quantized), out, force)
    if json:
        print_json({"out": str(out)})
    else:
        stdout.print(f"{escape(str(out))}: open it in a browser")


def main() -> None:
    """Run the command line; errors a user can cause are one line and their own exit status."""
    # Transformers' warnings are for programmers, and stderr is for one line.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False) or 0
    except _WrongUseError as error:
        _fail(f"{error.format_message()} (see --help)", 2)
    except SalienceError as error:
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        status = _INTERRUPTED
    # Some versions of typer raise, others return this.
    if status == _INTERRUPTED:
        print("interrupted; what can be continued goes on with the same command", file=sys.stderr)
    sys.exit(status)


def _fail(message: str, status: int) -> None:
    # Names in a file may hold line ends; the message is one line all the same.
    print("error:", " ".join(message.splitlines()), file=sys.stderr)
    sys.exit(status)
