"""A model that runs, from a command's options."""

from pathlib import Path
from typing import Any

from salience.cli.console import parse_size


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
