"""Checkpoint formats, one file each. Adding one is a file and its name in `FORMATS`, or in
`READ_ONLY` when it cannot be written.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from salience.checkpoint import Checkpoint, read_json
from salience.errors import SalienceError
from salience.formats.autoawq import AutoAwq
from salience.formats.awq_gemv import AwqGemv
from salience.formats.base import Format, Reader
from salience.formats.bitsandbytes import BitsAndBytes
from salience.formats.bitsandbytes_int8 import BitsAndBytesInt8
from salience.formats.compressed_tensors import CompressedTensors
from salience.formats.dense import Dense
from salience.formats.gguf import Gguf
from salience.formats.gptq import Gptq
from salience.formats.llm_awq import AwqGemvFast, LlmAwq, implied_config

FORMATS: tuple[Format, ...] = (
    AutoAwq(),
    CompressedTensors(),
    BitsAndBytes(),
    BitsAndBytesInt8(),
    Gptq(),
    Gptq(version=2),
    Gguf(),
)
READ_ONLY: tuple[Reader, ...] = (AwqGemv(), AwqGemvFast(), LlmAwq())
_TARGETS: tuple[Format, ...] = (*FORMATS, Dense())

__all__ = [
    "FORMATS",
    "READ_ONLY",
    "AutoAwq",
    "AwqGemv",
    "AwqGemvFast",
    "BitsAndBytes",
    "BitsAndBytesInt8",
    "CompressedTensors",
    "Dense",
    "Format",
    "Gguf",
    "Gptq",
    "LlmAwq",
    "Reader",
    "detect_format",
    "get_format",
    "stored_config",
]

# Keys of a config that tell layouts apart.
_TELLING = (
    *("quant_method", "version", "format", "checkpoint_format", "backend", "bits"),
    *("load_in_4bit", "load_in_8bit"),
)

# Layouts that are met and not read, each with the reason: (quant_method, version).
_REFUSED = {
    ("awq", "marlin"): (
        "its weights are permuted for one GPU kernel, and neither Transformers nor vLLM reads "
        "them; take the model's gemm version"
    ),
}


def get_format(name: str) -> Format:
    """The format called `name`, to write; "dense" included.

    Raises:
        SalienceError: there is none, or it is only read.
    """
    for fmt in _TARGETS:
        if fmt.name == name:
            return fmt
    names = " or ".join(_names(_TARGETS))
    if any(fmt.name == name for fmt in READ_ONLY):
        raise SalienceError(f"format {name} is read, not written; use {names}")
    raise SalienceError(f"there is no format {name!r}; use {names}")


def detect_format(config: Mapping[str, Any]) -> Reader:
    """The format of a checkpoint by its `quantization_config`.

    Raises:
        SalienceError: none or several fit.
    """
    readers: tuple[Reader, ...] = (*FORMATS, *READ_ONLY)
    found = [fmt for fmt in readers if fmt.detect(config)]
    if len(found) == 1:
        return found[0]
    seen = {key: config[key] for key in _TELLING if key in config}
    if found:
        names = " and ".join(fmt.name for fmt in found)
        raise SalienceError(f"quantization_config {seen} is of {names} at once; remove a key")
    method, version = config.get("quant_method"), config.get("version") or config.get("format")
    reason = _REFUSED.get((str(method).lower(), str(version).lower()))
    raise SalienceError(
        f"a checkpoint of quant_method {method!r} ({seen}) is not one this version reads"
        f"{f': {reason}' if reason else ''}; it reads {', '.join(_names(readers))}"
    )


def _names(formats: Sequence[Reader]) -> list[str]:
    """Each name once: a format may have several versions to read."""
    return list(dict.fromkeys(fmt.name for fmt in formats))


def stored_config(model_config: Any, stored: Checkpoint | None = None) -> dict[str, Any] | None:
    """The `quantization_config` of a Transformers config; None for a float model.

    Older tools call it `compression_config`, or put one inside the other.

    Args:
        model_config: the Transformers config.
        stored: the tensors; where the config says nothing, those of llm-awq do.
    Raises:
        SalienceError: it is no JSON object.
    """
    for key in ("quantization_config", "compression_config"):
        config = getattr(model_config, key, None)
        if isinstance(config, Mapping):
            config = config.get("quantization_config") or config
        if config and not isinstance(config, Mapping):
            raise SalienceError(f"{key} of config.json must be an object, not {config!r}")
        if config:
            return dict(config)
    if stored is None:
        return None
    beside = stored.path / "quantize_config.json"
    if beside.is_file():
        # Where AutoGPTQ writes it, and for a time it wrote it nowhere else. It named no method.
        return {"quant_method": "gptq", **read_json(beside)}
    return implied_config(stored)
