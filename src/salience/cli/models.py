"""`convert` and `inspect`: what is stored, without running it."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from salience.cli.console import print_json, progress_bar, size, stdout
from salience.cli.options import DtypeName, FormatName, GpusOption, JsonOption, Model, TrustOption


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
