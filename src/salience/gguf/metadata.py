"""What a GGUF file says of its model, by llama.cpp's keys, from a Transformers config.

llama.cpp has a program for each architecture, which knows what is not in the metadata: the
activation, where norms are, which layers look through a window. A config that asks for something
else is refused, because such a file would load and talk nonsense. Mistral is a llama to it.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from salience.errors import SalienceError

Value = bool | int | float | str | list[Any]

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
}
_ACTIVATIONS = {"gemma3": "gelu_pytorch_tanh"}
_GEMMA3_PERIOD = 6  # each sixth layer looks at the whole text
_GEMMA3_27B_LAYERS = 62
_FILE_TYPES = {"w4": 3, "w4-sym": 2, "w8-sym": 7}
_F16 = 1
_QUANTIZATION_VERSION = 2


def architecture(config: Any) -> str:
    """llama.cpp's name of a model's architecture.

    Raises:
        SalienceError: one that is not written, or a variant llama.cpp does not run.
    """
    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES:
        raise SalienceError(
            f"--format gguf writes {', '.join(ARCHITECTURES)}, not {kind}; "
            "use --format compressed-tensors"
        )
    name = ARCHITECTURES[kind]
    _check(config, name)
    return name


def hyperparameters(config: Any, name: str) -> dict[str, Value]:
    """The metadata of a model that llama.cpp computes with.

    Args:
        config: the model's Transformers config.
        name: what the file calls the model.
    """
    arch = architecture(config)
    head_dim = _head_dim(config)
    rope = _rope(config)
    values: dict[str, Value] = {
        "general.type": "model",
        "general.name": name,
        "general.quantization_version": _QUANTIZATION_VERSION,
        f"{arch}.block_count": int(config.num_hidden_layers),
        f"{arch}.context_length": int(config.max_position_embeddings),
        f"{arch}.embedding_length": int(config.hidden_size),
        f"{arch}.feed_forward_length": int(config.intermediate_size),
        f"{arch}.attention.head_count": int(config.num_attention_heads),
        f"{arch}.attention.head_count_kv": int(config.num_key_value_heads),
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.attention.value_length": head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{arch}.rope.dimension_count": head_dim,
        f"{arch}.rope.freq_base": float(rope["rope_theta"]),
        f"{arch}.vocab_size": int(config.vocab_size),
    }
    values |= {f"{arch}.rope.scaling.{key}": value for key, value in _scaling(rope).items()}
    if arch == "gemma3":
        local = config.rope_parameters["sliding_attention"]
        values[f"{arch}.attention.sliding_window"] = int(config.sliding_window)
        values[f"{arch}.rope.freq_base_swa"] = float(local["rope_theta"])
        if config.final_logit_softcapping:
            values[f"{arch}.final_logit_softcapping"] = float(config.final_logit_softcapping)
    return values


def file_type(scheme: str | None) -> int:
    """llama.cpp's number for a file most of whose weights have a scheme; a label, no more."""
    if scheme is None:
        return _F16
    sym = "-sym" if scheme.endswith("-sym") else ""
    return _FILE_TYPES[scheme.partition("g")[0] + sym]


def rope_factors(config: Any) -> Tensor | None:
    """What Llama 3.1's scaling divides each frequency by, fp32 [head_dim / 2]; None without it.

    Waves shorter than the high-frequency bound stay, those longer than the low-frequency bound are
    stretched by the factor, and between the two it goes over smoothly.
    """
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    dim = _head_dim(config)
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    context = float(rope["original_max_position_embeddings"])
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    waves = 2 * math.pi * float(rope["rope_theta"]) ** exponents
    kept = ((context / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - kept) / float(rope["factor"]) + kept)).float()


def _check(config: Any, arch: str) -> None:
    wanted = _ACTIVATIONS.get(arch, "silu")
    act = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if act != wanted:
        raise SalienceError(f"llama.cpp runs {arch} with {wanted}, and this model has {act}")
    _scaling(_rope(config))
    if arch == "gemma3":
        _check_gemma3(config)


def _check_gemma3(config: Any) -> None:
    layers = config.num_hidden_layers
    pattern = [
        "sliding_attention" if (i + 1) % _GEMMA3_PERIOD else "full_attention" for i in range(layers)
    ]
    if list(config.layer_types) != pattern:
        raise SalienceError("llama.cpp runs gemma3 with full attention in each sixth layer only")
    width = _head_dim(config)
    if layers == _GEMMA3_27B_LAYERS:
        width = config.hidden_size // config.num_attention_heads
    if config.query_pre_attn_scalar != width:
        raise SalienceError(
            f"llama.cpp runs this gemma3 with query_pre_attn_scalar {width}, and it has "
            f"{config.query_pre_attn_scalar}"
        )
    for key in ("attn_logit_softcapping", "use_bidirectional_attention"):
        if getattr(config, key, None):
            raise SalienceError(f"llama.cpp runs gemma3 without {key}, and this model has it")


def _head_dim(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _rope(config: Any) -> Mapping[str, Any]:
    """The rope parameters, of gemma3 those of its full attention."""
    rope = config.rope_parameters
    full: Mapping[str, Any] = rope.get("full_attention", rope)
    return full


def _scaling(rope: Mapping[str, Any]) -> dict[str, Value]:
    kind = rope.get("rope_type", "default")
    if kind in ("default", "llama3"):
        return {}  # llama3 is a tensor, see `rope_factors`
    if kind == "linear":
        return {"type": "linear", "factor": float(rope["factor"])}
    if kind == "yarn":
        context = rope.get("original_max_position_embeddings")
        if context is None:
            raise SalienceError("--format gguf wants original_max_position_embeddings of yarn")
        values: dict[str, Value] = {
            "type": "yarn",
            "factor": float(rope["factor"]),
            "original_context_length": int(context),
        }
        keys = {"attention_factor": "yarn_attn_factor", "beta_fast": "yarn_beta_fast"}
        keys["beta_slow"] = "yarn_beta_slow"
        given = {new: rope.get(old) for old, new in keys.items()}
        return values | {new: float(value) for new, value in given.items() if value is not None}
    raise SalienceError(f"--format gguf writes rope of linear, yarn and llama3, not {kind}")
