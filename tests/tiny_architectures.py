"""A tiny random config of any decoder that Transformers has."""

import inspect
from typing import Any

from transformers import CONFIG_MAPPING

from tiny_models import VOCABULARY

# What sizes are called, and what they become.
_SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"), 128),
    **dict.fromkeys(("dense_intermediate_size", "intermediate_size_mlp"), 128),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "global_head_dim", "kv_channels"), 16),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("expert_ffn_hidden_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "moe_top_k"), 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "max_seq_len": 128,
    "sliding_window": 8,
    "rotary_dim": 8,
    "mamba_d_state": 16,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_config(kind: str, **changes: Any) -> Any:
    """The config of a model type, as small as its sizes go, with `changes` on top."""
    make = CONFIG_MAPPING[kind]
    known = set(inspect.signature(make.__init__).parameters) | set(
        getattr(make, "__dataclass_fields__", {})
    )
    values = {key: value for key, value in _SIZES.items() if key in known}
    if "layer_types" in known and "layer_types" not in changes:
        types = getattr(make(), "layer_types", None)
        if types:
            # One of each kind.
            values["layer_types"] = list(dict.fromkeys(types))
            layers = next(key for key in ("num_hidden_layers", "n_layer") if key in known)
            values["layer_types"] *= 2 if len(values["layer_types"]) == 1 else 1
            values[layers] = len(values["layer_types"])
    return make(**{**values, **changes})


_MLA = {"num_key_value_heads": 4}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}

# What some need beside sizes. The first part is what the end-to-end tests run.
COMMON: dict[str, dict[str, Any]] = {
    "llama": {},
    "opt": {},
    "gpt_bigcode": {},
    "starcoder2": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi": {},
    "phi3": {},
    "mpt": {},
    "falcon": {"new_decoder_architecture": True},
    "falcon-rw": {"num_kv_heads": 4, "multi_query": False, "alibi": True, "bias": True},
    "falcon-7b": {"multi_query": True},
    "bloom": {},
    "gpt_neox": {},
    "gptj": {},
    "gpt2": {},
    "cohere": {},
    "cohere2": {},
    "stablelm": {},
    "olmo2": {},
    "granite": {},
    "glm": {},
    "glm4": {},
    "exaone4": {},
    "nemotron": {},
    "smollm3": {},
    "deepseek_v3": _MLA,
    "qwen3_next": {},
    "mixtral": {},
    "qwen3_moe": {},
    "codegen": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gpt_oss": {},
    "llama4_text": {},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "lfm2": {},
}
OTHERS: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "apertus": {},
    "arcee": {},
    "aria_text": {},
    "axk1": _MLA,
    "axk2": _MLA,
    "bailing_hybrid": _MLA,
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "beam": {},
    "biogpt": {},
    "bitnet": {},
    "cohere2_moe": {},
    "cwm": {},
    "deepseek_v2": _MLA,
    "deepseek_v32": _MLA,
    "deepseek_v4": {},
    "diffllama": {},
    "doge": {},
    "dots1": {"n_shared_experts": 1},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone_moe": {},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 128},
    "flex_olmo": {},
    "flint": {},
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "global_head_dim": 32,
    },
    "gemma4_unified_text": {},
    "glm4_moe": {},
    "glm4_moe_lite": _MLA,
    "gpt_neox_japanese": {},
    "granite_swa": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoeshared": {},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hyperclovax": {},
    "internlm3": {},
    "iquestcoder": {},
    "jais2": {},
    "jetmoe": {},
    "kolibri1": {},
    "laguna": {},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv"],
        "num_hidden_layers": 3,
        "num_dense_layers": 1,
    },
    "lfm3": {},
    "longcat_flash": {**_MLA, "zero_expert_num": 4},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2, "state_size": 16},
    "mellum": {},
    "mimo_v2_flash": {},
    "minicpm3": _MLA,
    "minimax": {},
    "minimax_m2": {},
    "minimax_m3_vl_text": {},
    "ministral": {},
    "ministral3": {},
    "modernbert-decoder": {},
    "moshi": {},
    "nanochat": {},
    "nemotron_h": {
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "moe_shared_expert_intermediate_size": 64,
    },
    "olmo": {},
    "olmo3": {},
    "olmo_hybrid": {},
    "olmoe": {},
    "openai-gpt": {},
    "persimmon": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_5_moe_text": {},
    "qwen3_5_text": {},
    "recurrent_gemma": {},
    "seed_oss": {},
    "solar_open": {},
    "vaultgemma": {},
    "xglm": {},
    "xlstm": {},
    "youtu": _MLA,
}
REFUSED: dict[str, dict[str, Any]] = {
    "bart": {},
    "falcon_mamba": {"state_size": 16, "time_step_rank": 16},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
    },
    "glm_moe_dsa": _MLA,
    "hy_v4": {},
    "jamba": {
        "mamba_d_state": 16,
        "mamba_dt_rank": 16,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "mamba": {"state_size": 16, "time_step_rank": 16},
    "marian": {},
    "mbart": {},
    "pegasus": {},
    "rwkv": {},
    "trocr": {},
    "zaya": {"num_experts_per_tok": 1},
}
_SAME_TYPE = {"falcon-rw": "falcon", "falcon-7b": "falcon"}


def architecture(name: str) -> Any:
    """The tiny config of one of the names above."""
    changes = {**COMMON, **OTHERS, **REFUSED}[name]
    return tiny_config(_SAME_TYPE.get(name, name), **changes)
