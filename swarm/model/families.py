"""What is known about single model types: facts that no config states.

`scripts/sweep_models.py` compares every type with the whole model; a type that is not exact stands in REFUSED.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

LAYERS = {
    "codegen": "h",
    "bloom": "h",
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

RETURN_TUPLE = frozenset(
    ("bamba", "bloom", "codegen", "falcon", "falcon_h1", "glm_moe_dsa", "gpt_neo", "gpt_neox_japanese", "gptj", "mpt")
)
"""Types whose base model takes the first element of what a layer returns."""

VERIFIED = frozenset(
    (
        "afmoe", "apertus", "arcee", "aria_text", "axk1", "axk2", "bailing_hybrid", "bamba", "beam", "biogpt",
        "bitnet", "bloom", "codegen", "cohere", "cohere2", "cohere2_moe", "cohere_compass_text", "cwm", "dbrx",
        "deepseek_v2", "deepseek_v3", "deepseek_v32", "diffllama", "doge", "dots1", "dots3_note_text",
        "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "falcon", "falcon_h1", "flex_olmo", "flint",
        "gemma", "gemma2", "gemma3_text", "gemma4_text", "gemma4_unified_text", "glm", "glm4", "glm4_moe",
        "glm4_moe_lite", "glm_moe_dsa", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox",
        "gpt_neox_japanese", "gpt_oss", "gptj", "granite", "granite_swa", "granitemoe", "granitemoe_swa",
        "granitemoehybrid", "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3",
        "hyperclovax", "inkling_text", "internlm3", "iquestcoder", "jais2", "jamba", "jetmoe", "kimi_linear",
        "kolibri1", "laguna", "lfm2", "lfm2_moe", "lfm3", "llama", "llama4_text", "mellum", "mimo_v2_flash",
        "minicpm3", "minimax_m2", "minimax_m3_vl_text", "ministral", "ministral3", "mistral", "mixtral",
        "modernbert-decoder", "mpt", "nanochat", "nemotron", "nemotron_h", "olmo", "olmo2", "olmo3",
        "olmo_hybrid", "olmoe", "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3",
        "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next", "seed_oss", "smollm3", "solar_open",
        "stablelm", "starcoder2", "vaultgemma", "xglm", "youtu",
    )
)  # fmt: skip
"""Types whose logits, tokens and gradients equal those of the whole model."""

EXPANDED = frozenset(
    ("axk1", "deepseek_v2", "deepseek_v3", "diffllama", "glm4_moe_lite", "jetmoe", "minicpm3", "youtu")
)
"""Types that keep less than keys and values (latent attention, fewer heads), and make these of it in each call."""

PACKABLE = EXPANDED | frozenset(
    (
        "afmoe", "apertus", "arcee", "aria_text", "beam", "biogpt", "bitnet", "cohere", "cohere2", "cohere2_moe",
        "cohere_compass_text", "cwm", "dbrx", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe",
        "flex_olmo", "flint", "gemma", "gemma2", "gemma3_text", "gemma4_text", "gemma4_unified_text", "glm", "glm4",
        "glm4_moe", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "granite", "granite_swa", "granitemoe",
        "granitemoe_swa", "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax",
        "internlm3", "iquestcoder", "jais2", "kolibri1", "laguna", "llama", "llama4_text", "mellum", "mimo_v2_flash",
        "minimax_m2", "minimax_m3_vl_text", "ministral", "ministral3", "mistral", "mixtral", "modernbert-decoder",
        "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi", "phi3", "phimoe",
        "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2",
        "vaultgemma",
    )
)  # fmt: skip
"""Types whose blocks can run tokens of many sequences in one row, with the results of one sequence at a time. Others
keep a state beyond keys and values, have ALiBi, or attend in code of their own."""

ENCODER = "it is an encoder; transformers can run it as a decoder, but nobody generates with it"
ENCODER_DECODER = "it is an encoder-decoder, whose decoder blocks also need the encoder's output"
MULTIMODAL = "it wraps a language model together with other modalities; give a checkpoint of the language model alone"
RECURRENT = "its blocks keep a recurrent state in a form of their own and no keys and values, so no session can rewind"
STREAMS = "several residual streams run between its blocks, where one is expected"
SIDE_CHANNEL = "a block hands the next ones more than hidden states, which would be lost between two servers"
SHARED = "blocks share weights with other blocks, which may lie on another server"
NO_CACHE = "it has no KV cache, so it cannot decode token by token"

REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
            "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl",
            "xmod",
        ),
        ENCODER,
    ),
    **dict.fromkeys(
        (
            "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "musicgen",
            "musicgen_melody", "mvp", "pegasus", "plbart", "prophetnet", "trocr", "whisper",
        ),
        ENCODER_DECODER,
    ),
    **dict.fromkeys(
        (
            "dots3_note", "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "git", "got_ocr2", "llama4",
            "mllama", "moshi", "moss_transcribe_diarize", "phi4_multimodal", "qwen3_5", "qwen3_5_moe", "qwen4_exp",
        ),
        MULTIMODAL,
    ),
    **dict.fromkeys(("falcon_mamba", "mamba", "mamba2", "recurrent_gemma", "rwkv", "xlstm"), RECURRENT),
    **dict.fromkeys(("deepseek_v4", "hy_v4", "qwen4_exp_text"), STREAMS),
    **dict.fromkeys(("inkling2_text", "zaya"), SIDE_CHANNEL),
    **dict.fromkeys(("zamba", "zamba2"), SHARED),
    **dict.fromkeys(("cpmant", "openai-gpt", "reformer", "xlm", "xlnet"), NO_CACHE + " the way the others do"),
    "blt": "it works on bytes and patches with three models of its own, not on one list of blocks",
    "ctrl": "its forward scales the embeddings it is given in place",
    "gemma3n_text": "each block has inputs of its own, made from the token ids, which servers never see",
    "gemma4_assistant": "it drafts for another model, whose keys and values it reads",
    "gemma4_unified_assistant": "it drafts for another model, whose keys and values it reads",
    "hrm_text": "it runs its blocks several times over",
    "longcat_flash": "each of its blocks counts as two in its cache",
    "minimax": "its linear attention wants a cache class of its own",
}  # fmt: skip
"""Types that cannot be cut, and why."""


def reason_to_refuse(config: PretrainedConfig) -> str | None:
    """Why a model cannot be cut into blocks; None if nothing speaks against it."""
    if config.model_type in REFUSED:
        return REFUSED[config.model_type]
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder, whose decoder blocks also need the encoder's output"
    if getattr(config, "num_kv_shared_layers", 0):
        return "some of its blocks use the keys and values of earlier ones, which may lie on another server"
    if getattr(config, "hidden_size_per_layer_input", 0):
        return REFUSED["gemma3n_text"]
    if "shared" in (getattr(config, "indexer_types", None) or ()):
        return SIDE_CHANNEL
    if getattr(config, "is_causal", True) is False:
        return "it attends to later tokens, so it cannot decode token by token"
    if _rope_settings(config, "dynamic"):
        return "its dynamic rotary embedding depends on the longest sequence seen so far, also on those of strangers"
    return None


def max_session_tokens(config: PretrainedConfig) -> int | None:
    """How long a session can be so that it does not matter in which pieces it is fed; None: as long as one likes.

    The library chooses longrope's frequencies anew in each call, by its last position: a prompt fed in pieces across
    the original length would mix both kinds.
    """
    lengths = [settings.get("original_max_position_embeddings") for settings in _rope_settings(config, "longrope")]
    if not lengths:
        return None
    own = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
    return min(length or own for length in lengths)


def _rope_settings(config: PretrainedConfig, rope_type: str) -> list[dict[str, Any]]:
    """The rotary settings of this type, which some configs have one of and some one per kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    candidates = [parameters, *parameters.values()]
    return [each for each in candidates if isinstance(each, dict) and each.get("rope_type") == rope_type]


WHOLE = frozenset(("llama", "mistral", "qwen2", "qwen3"))
"""Types whose blocks are built as Llama's: kernels/blocks.c decodes through them in one call."""
