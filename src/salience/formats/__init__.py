"""Checkpoint formats, one file each. Adding one is a file and its name in `FORMATS`."""

from collections.abc import Mapping
from typing import Any

from salience.errors import SalienceError
from salience.formats.autoawq import AutoAwq
from salience.formats.base import Format
from salience.formats.bitsandbytes import BitsAndBytes
from salience.formats.compressed_tensors import CompressedTensors
from salience.formats.gptq import Gptq

FORMATS: tuple[Format, ...] = (
    AutoAwq(),
    CompressedTensors(),
    BitsAndBytes(),
    Gptq(),
    Gptq(version=2),
)

__all__ = [
    "FORMATS",
    "AutoAwq",
    "BitsAndBytes",
    "CompressedTensors",
    "Format",
    "Gptq",
    "detect_format",
    "get_format",
    "stored_config",
]


def get_format(name: str) -> Format:
    """The format called `name`.

    Raises:
        SalienceError: there is none.
    """
    for fmt in FORMATS:
        if fmt.name == name:
            return fmt
    raise SalienceError(f"there is no format {name!r}; use {' or '.join(_names())}")


def detect_format(config: Mapping[str, Any]) -> Format:
    """The format of a checkpoint by its `quantization_config`.

    Raises:
        SalienceError: none or several fit.
    """
    found = [fmt for fmt in FORMATS if fmt.detect(config)]
    if len(found) != 1:
        seen = {
            key: config.get(key)
            for key in ("quant_method", "version", "format", "checkpoint_format", "bits")
        }
        raise SalienceError(
            f"a checkpoint with quantization_config {seen} is not one this version reads; "
            f"it reads {', '.join(_names())}"
        )
    return found[0]


def _names() -> list[str]:
    """Each name once: a format may have several versions to read."""
    return list(dict.fromkeys(fmt.name for fmt in FORMATS))


def stored_config(model_config: Any) -> dict[str, Any] | None:
    """The `quantization_config` of a Transformers config; None for a float model.

    Older tools call it `compression_config`, or put one inside the other.
    """
    for key in ("quantization_config", "compression_config"):
        config = getattr(model_config, key, None)
        if config:
            return dict(config.get("quantization_config") or config)
    return None
