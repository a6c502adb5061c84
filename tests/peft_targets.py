"""PEFT's methods in the families that are compared with local PEFT, and where they go."""

from __future__ import annotations

from typing import Any

from peft import (
    BeftConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)

FAMILIES = {
    "llama": (["q_proj", "up_proj"], ["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "qwen3": (["q_proj", "up_proj"], ["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "gemma2": (["q_proj", "up_proj"], ["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "mixtral": (["q_proj", "o_proj"], ["k_proj", "v_proj", "o_proj"], ["o_proj"]),
    "falcon": (["query_key_value", "dense_h_to_4h"], ["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
    "bloom": (["query_key_value", "dense_h_to_4h"], ["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
}
"""What LoRA and BEFT change, what IA3 changes, and the feed-forward modules among the latter."""

ONE_HEAD = {"num_attention_heads": 1, "token_dim": 16}
"""PEFT does not see that Falcon's heads have one key and value in common, and fails unless it is told so."""


def prefix_tuning(model_type: str, **options: Any) -> PrefixTuningConfig:
    heads = ONE_HEAD if model_type == "falcon" else {}
    return PrefixTuningConfig(task_type="CAUSAL_LM", **{"num_virtual_tokens": 4, **heads, **options})


def methods_of(model_type: str) -> list[PeftConfig]:
    """Each of PEFT's methods, as one would use it in this family."""
    lora, ia3, feedforward = FAMILIES[model_type]
    return [
        LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=lora),
        IA3Config(task_type="CAUSAL_LM", target_modules=ia3, feedforward_modules=feedforward),
        BeftConfig(task_type="CAUSAL_LM", target_modules=lora),
        prefix_tuning(model_type),
        prefix_tuning(model_type, num_virtual_tokens=9, prefix_projection=True, encoder_hidden_size=24),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=24),
    ]
