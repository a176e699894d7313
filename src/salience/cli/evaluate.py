"""`eval`."""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape

from salience.cli.console import print_json, progress_bar, stdout
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

    words = read_text(text)
    loaded, tokenizer = load_model(
        model, device, device_map, max_memory, offload_folder, kernel, trust_remote_code
    )
    with progress_bar("perplexity") as progress:
        result = perplexity(loaded, tokenizer, words, context, max_chunks, progress)
    if json:
        print_json(asdict(result))
    else:
        stdout.print(f"perplexity {result.perplexity:.3f} ({escape(result.protocol)})")
