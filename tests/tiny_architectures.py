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
