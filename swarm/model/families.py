"""What is known about single model types: facts that no config states.

`scripts/sweep_models.py` compares every type with the whole model; a type that is not exact stands in REFUSED.
"""

from __future__ import annotations

from transformers import PretrainedConfig

LAYERS = {
    "codegen": "h",
    "bloom": "h",
    "ctrl": "h",
    "dbrx": "blocks",
    "falcon": "h",
    "gpt2": "h",
    "gpt_bigcode": "h",
    "gpt_neo": "h",
    "gptj": "h",
    "mpt": "blocks",
    "opt": "decoder.layers",
} | dict.fromkeys(
    (
        "bamba", "biogpt", "bitnet", "diffllama", "falcon_h1", "gpt_neox_japanese", "granitemoe", "granitemoe_swa",
        "granitemoehybrid", "granitemoeshared", "hunyuan_v1_dense", "hunyuan_v1_moe", "jamba", "jetmoe", "lfm2",
        "lfm2_moe", "lfm3", "llama4_text", "modernbert-decoder", "nanochat", "nemotron", "nemotron_h", "olmoe",
        "persimmon", "phimoe", "stablelm", "xglm",
    ),
    "layers",
)  # fmt: skip
"""Path of the layer list inside the base model, for types whose config has no pipeline plan."""

RETURN_TUPLE = frozenset(("bamba", "bloom", "codegen", "falcon", "glm_moe_dsa", "gpt_neo", "gptj", "mpt"))
"""Types whose base model takes the first element of what a layer returns."""

VERIFIED: frozenset[str] = frozenset()
"""Types whose logits, tokens and gradients equal those of the whole model."""

REFUSED: dict[str, str] = {}
"""Types that cannot be cut, and why."""


def reason_to_refuse(config: PretrainedConfig) -> str | None:
    """Why a model cannot be cut into blocks; None if nothing speaks against it."""
    if config.model_type in REFUSED:
        return REFUSED[config.model_type]
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder, whose decoder blocks also need the encoder's output"
    return None
