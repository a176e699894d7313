"""The config that bitsandbytes' 4-bit and 8-bit checkpoints share, as Transformers writes it."""

from collections.abc import Mapping, Sequence
from typing import Any


def loads_in(config: Mapping[str, Any], bits: int) -> bool:
    """Whether a config is of bitsandbytes in so many bits, and in no other.

    The first ones named no method.
    """
    if str(config.get("quant_method", "bitsandbytes")).lower() != "bitsandbytes":
        return False
    other = 12 - bits
    return _says(config, bits) and not _says(config, other)


def _says(config: Mapping[str, Any], bits: int) -> bool:
    key = f"load_in_{bits}bit"
    return bool(config.get(key, config.get(f"_{key}", False)))


def quantization_config(
    bits: int, kept: Sequence[str], kind: str = "fp4", nested: bool = False
) -> dict[str, Any]:
    """The whole config; `kind` and `nested` matter with 4 bits."""
    return {
        "_load_in_4bit": bits == 4,
        "_load_in_8bit": bits == 8,
        "bnb_4bit_compute_dtype": "float16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(kept) or None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": bits == 4,
        "load_in_8bit": bits == 8,
        "quant_method": "bitsandbytes",
    }
