"""`eval` and `chat`: models that run."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from salience.cli.console import parse_size, print_json, progress_bar, stderr, stdout
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


def load_model(
    model: str,
    device: str,
    device_map: str | None,
    max_memory: str | None,
    offload_folder: Path | None,
    kernel: str,
    trust_remote_code: bool,
) -> tuple[Any, Any]:
    """What MODEL and the options on where it runs stand for: a model and its tokenizer."""
    from salience.loading import load_source
    from salience.source import open_source

    source = open_source(model, trust_remote_code)
    tokenizer = source.tokenizer  # before the weights: a model without one is no use here
    limit = parse_size(max_memory)
    loaded = load_source(
        source,
        device,
        kernel=kernel,
        device_map=device_map,
        max_memory=limit,
        offload_folder=offload_folder,
    )
    return loaded, tokenizer


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

    def show(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    loaded, tokenizer = load_model(
        model, device, device_map, max_memory, offload_folder, kernel, trust_remote_code
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
