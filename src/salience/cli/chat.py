"""`chat`."""

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from salience.cli.console import print_json, stderr
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
