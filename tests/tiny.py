"""Tiny random models: every weight is far from zero, so that a wrong block, mask or position changes the tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

VOCAB = 256
HIDDEN = 64
NUM_BLOCKS = 6

_COMMON = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "initializer_range": 0.2}

_LLAMA_LIKE = _COMMON | {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}

CONFIGS = {
    "llama": _LLAMA_LIKE,
    "gpt2": _COMMON | {"n_embd": HIDDEN, "n_layer": 4, "n_head": 4, "n_positions": 512},
    "falcon": _COMMON
    | {"hidden_size": HIDDEN, "num_hidden_layers": 4, "num_attention_heads": 4, "alibi": False, "bias": True},
    "bloom": _COMMON | {"hidden_size": HIDDEN, "n_layer": 4, "n_head": 4},
    "qwen3": _LLAMA_LIKE | {"num_hidden_layers": 4},
    "gemma2": _LLAMA_LIKE | {"num_hidden_layers": 4, "sliding_window": 6, "query_pre_attn_scalar": 16},
    "mixtral": _LLAMA_LIKE | {"num_hidden_layers": 4, "num_local_experts": 4, "sliding_window": None},
    "qwen3_next": _LLAMA_LIKE
    | {
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
}


def save_tiny(directory: Path, model_type: str, *, seed: int = 0, **changes: object) -> Path:
    """Make a random model of a type and save it; the same arguments give the same weights."""
    config = CONFIG_MAPPING[model_type](**{**CONFIGS[model_type], **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # not all classes initialize all of theirs
                if parameter.dim() > 1:
                    parameter.normal_(std=0.2)
                else:
                    parameter.nan_to_num_().clamp_(-2, 2).add_(torch.randn_like(parameter) * 0.02)
        model.save_pretrained(directory)
    return directory


def load_local(directory: Path, auto_class: type = AutoModelForCausalLM, **kwargs: object) -> PreTrainedModel:
    """The whole model in this process, float32: what every remote result is compared with."""
    return auto_class.from_pretrained(directory, dtype=torch.float32, **kwargs).eval()


def random_ids(batch_size: int, length: int, *, seed: int = 1) -> torch.Tensor:
    """Token ids without special tokens, [batch_size, length]."""
    return torch.randint(3, VOCAB, (batch_size, length), generator=torch.Generator().manual_seed(seed))
