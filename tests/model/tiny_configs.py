"""A tiny random config for every causal-LM type of transformers: 4 blocks, small sizes, no value that hides a mistake.

`GENERIC` is applied wherever a config class has the field; `OVERRIDES` says what single types need beyond that.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

NUM_BLOCKS = 4
VOCAB = 96

GENERIC: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "dim": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "attention_dropout": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "hidden_dropout": 0.0,
    "sliding_window": 6,
    "use_sliding_window": True,
    "max_window_layers": 2,
    "attention_chunk_size": 6,
    "use_cache": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
    # mixtures
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    # latent attention
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "index_topk": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    # linear attention and state spaces
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "ssm_state_size": 8,
    "n_groups": 1,
    "mamba_dt_rank": 8,
    # what multiplies hidden states outside the blocks
    "embedding_multiplier": 1.7,
    "embeddings_multiplier": 1.7,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.3,
    "logits_scaling": 1.3,
}

UNSET = object()
"""In OVERRIDES: leave a generic field at the config's own default."""

LATENT = {"num_key_value_heads": 4, "head_dim": 8}
LINEAR_AND_FULL = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
CONV_AND_FULL = ["conv", "full_attention", "conv", "full_attention"]

OVERRIDES: dict[str, dict[str, Any]] = {
    "axk1": LATENT,
    "axk2": LATENT,
    "bailing_hybrid": {"num_key_value_heads": 4, "layer_types": LINEAR_AND_FULL},
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "dots3_note_text": {
        **LATENT, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 16,
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma4_text": {"head_dim": 16, "global_head_dim": 32, "hidden_size_per_layer_input": 0,
                    "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_unified_text": {"head_dim": 16, "global_head_dim": 32,
                            "layer_types": ["sliding_attention", "full_attention"] * 2},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": {**LATENT, "indexer_types": ["full"] * 4},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "window_size": 6},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": LINEAR_AND_FULL, "shared_intermediate_size": 32},
    "inkling_text": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {"num_key_value_heads": 4, "linear_head_dim": 16, "linear_num_heads": 4,
                    "layer_types": LINEAR_AND_FULL},
    "lfm2": {"layer_types": CONV_AND_FULL},
    "lfm2_moe": {"layer_types": CONV_AND_FULL},
    "longcat_flash": LATENT,
    "minicpm3": {**LATENT, "dim_model_base": 32},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe", "attention"]},
    "olmo_hybrid": {"layer_types": LINEAR_AND_FULL},
    "qwen3_next": {"layer_types": LINEAR_AND_FULL},
    "qwen3_5_text": {"layer_types": LINEAR_AND_FULL},
    "qwen3_5_moe_text": {"layer_types": LINEAR_AND_FULL},
    "youtu": LATENT,
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"] * 2, "router_hidden_size": 16},
}  # fmt: skip


def tiny_config(model_type: str) -> PretrainedConfig:
    """Make the tiny config of a type.

    Raises: whatever the config class raises for sizes that do not fit it.
    """
    config_class = CONFIG_MAPPING[model_type]
    known = set(dir(config_class)) | set(vars(config_class())) | set(config_class.attribute_map)
    settable = {
        name: value
        for name, value in GENERIC.items()
        if name in known and not isinstance(getattr(config_class, name, None), property)
    }
    fields = {**settable, **OVERRIDES.get(model_type, {})}
    return config_class(**{name: value for name, value in fields.items() if value is not UNSET})
