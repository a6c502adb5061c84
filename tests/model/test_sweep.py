"""A model cut into spans gives what the whole model gives, for types that stand for all ways of building one."""

from __future__ import annotations

from pathlib import Path

import pytest
from exact import compare
from tiny_configs import tiny_config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from swarm.errors import UnsupportedModel
from swarm.model import families
from swarm.model.anatomy import anatomy_of

TYPES = (
    "bamba", "bloom", "cohere2", "deepseek_v3", "falcon", "falcon_h1", "gemma2", "gemma3_text", "gemma4_text",
    "glm4_moe", "gpt2", "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoehybrid", "jamba", "lfm2",
    "llama", "llama4_text", "mistral", "mixtral", "mpt", "nemotron_h", "olmo2", "opt", "phi3", "qwen2",
    "qwen3_5_text", "qwen3_moe", "qwen3_next", "stablelm",
)  # fmt: skip


@pytest.mark.parametrize("model_type", TYPES)
def test_cut_model_equals_the_whole(model_type: str, tmp_path: Path) -> None:
    comparison = compare(model_type, tmp_path)
    assert comparison.exact, comparison


@pytest.mark.parametrize("model_type", sorted(families.REFUSED))
def test_unsuitable_types_are_refused_by_name(model_type: str) -> None:
    config = tiny_config("llama")
    config.__class__ = type("Named", (type(config),), {"model_type": model_type})
    with pytest.raises(UnsupportedModel, match=model_type):
        anatomy_of(config)


def test_every_causal_lm_type_is_either_verified_or_refused() -> None:
    assert not families.VERIFIED & set(families.REFUSED)
    unknown = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - families.VERIFIED - set(families.REFUSED)
    # Composite types of future releases may appear here: run scripts/sweep_models.py and sort them in.
    assert not unknown, sorted(unknown)


@pytest.mark.parametrize(
    ("model_type", "change"),
    [
        ("gemma4_text", {"num_kv_shared_layers": 2}),
        ("gemma4_text", {"hidden_size_per_layer_input": 8}),
        ("glm_moe_dsa", {"indexer_types": ["full", "shared", "full", "shared"]}),
    ],
)
def test_variants_with_side_channels_are_refused(model_type: str, change: dict[str, object]) -> None:
    config = tiny_config(model_type)
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(UnsupportedModel, match=model_type):
        anatomy_of(config)
