"""Where PEFT's methods go in the families that are compared with local PEFT."""

FAMILIES = {
    "llama": (["q_proj", "up_proj"], ["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "qwen3": (["q_proj", "up_proj"], ["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "gemma2": (["q_proj", "up_proj"], ["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "mixtral": (["q_proj", "o_proj"], ["k_proj", "v_proj", "o_proj"], ["o_proj"]),
    "falcon": (["query_key_value", "dense_h_to_4h"], ["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
    "bloom": (["query_key_value", "dense_h_to_4h"], ["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
}
"""What LoRA changes, what IA3 changes, and the feed-forward modules among the latter."""
