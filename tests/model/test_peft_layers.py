"""PEFT's methods on a client half equal PEFT on the whole model; what servers cannot apply is refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import fill, open_adapted
from exact import save_tiny
from peft import (
    AdaLoraConfig,
    BeftConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from tiny_configs import VOCAB, tiny_config
from torch import Tensor

from swarm.errors import BadRequest
from swarm.model.peft_layers import read_adapters
from swarm.model.shadows import RemoteLayers, RemoteTensor

TOLERANCE = 1e-4

METHODS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
    "all-linear": LoraConfig(r=2, target_modules="all-linear", init_lora_weights="gaussian"),
    "regex": LoraConfig(r=2, target_modules=r".*layers\.[12]\.mlp\.up_proj"),
    "some layers": LoraConfig(r=2, target_modules=["v_proj"], layers_to_transform=[0, 3]),
    "patterns": LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "k_proj"], rank_pattern={"k_proj": 5}, alpha_pattern={"q_proj": 9}
    ),
    "rslora": LoraConfig(r=4, use_rslora=True, target_modules=["o_proj"]),
    "lora with biases": LoraConfig(r=2, lora_bias=True, target_modules=["gate_proj"]),
    "lora and head": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "lora on embeddings": LoraConfig(r=2, target_modules=["embed_tokens", "o_proj"]),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "beft": BeftConfig(target_modules=["v_proj", "up_proj"]),
    "adalora": AdaLoraConfig(init_r=4, target_r=2, total_step=20, target_modules=["q_proj", "v_proj"]),
    "vera": VeraConfig(r=8, target_modules=["q_proj", "k_proj"]),
}


@pytest.fixture(scope="module")
def llama_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), tiny_config("llama"))


@pytest.fixture
def both(llama_directory: Path) -> tuple[Any, Any]:
    return open_adapted(llama_directory)


def tokens(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(2, VOCAB - 1, (batch, length), generator=torch.Generator().manual_seed(3))


def adapt(both: tuple[Any, Any], config: PeftConfig) -> tuple[Any, Any]:
    """PEFT models of both with the same random parameters."""
    ours, theirs = (get_peft_model(model, copy.deepcopy(config)) for model in both)
    fill(ours, theirs)
    return ours, theirs


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens(), use_cache=False).logits


def assert_same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(logits(ours), logits(theirs), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_logits_and_gradients_equal_local_peft(both: tuple[Any, Any], method: str) -> None:
    plain = logits(both[1])
    ours, theirs = adapt(both, METHODS[method])
    assert_same(ours, theirs)
    assert float((logits(ours) - plain).abs().max()) > 10 * TOLERANCE
    for model in (ours, theirs):
        model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    wanted = {name: each.grad for name, each in theirs.named_parameters() if each.grad is not None}
    found = {name: each.grad for name, each in ours.named_parameters() if each.grad is not None}
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], atol=TOLERANCE, rtol=1e-4, msg=name)
