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
    EvaConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft_targets import FAMILIES, methods_of, prefix_tuning
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
    "prefix tuning": prefix_tuning("llama"),
    "prefix tuning, longer than the text": prefix_tuning("llama", num_virtual_tokens=20, prefix_projection=True),
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


WITH_CONV = [
    LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    IA3Config(target_modules=["c_attn", "c_proj"], feedforward_modules=["c_proj"], fan_in_fan_out=True),
    prefix_tuning("gpt2"),
]


@pytest.mark.parametrize("model_type", [*FAMILIES, "gpt2"])
def test_other_families_equal_local_peft(tmp_path: Path, model_type: str) -> None:
    save_tiny(tmp_path, tiny_config(model_type))
    for config in WITH_CONV if model_type == "gpt2" else methods_of(model_type):
        ours, theirs = adapt(open_adapted(tmp_path), config)
        assert_same(ours, theirs)
        mask, gradients = torch.ones_like(tokens()), []
        mask[0, :2] = 0
        for model in (ours, theirs):
            labels = tokens().masked_fill(mask == 0, -100)
            model(tokens(), attention_mask=mask, labels=labels, use_cache=False).loss.backward()
            gradients.append([each.grad for each in model.parameters() if each.grad is not None])
        for found, wanted in zip(*gradients, strict=True):
            torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=1e-4)


def test_new_adapters_are_initialized_as_local_ones_are(llama_directory: Path) -> None:
    for init in (True, "gaussian", False):
        results = []
        for model in open_adapted(llama_directory):
            torch.manual_seed(5)
            adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init))
            results.append([each for each in adapted.parameters() if each.requires_grad])
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)


def test_adapters_lie_where_the_client_does_and_follow_it(both: tuple[Any, Any]) -> None:
    client, _ = both
    client.to(torch.bfloat16)
    weight = client.model.layers[1].self_attn.q_proj.weight
    assert isinstance(weight, RemoteTensor) and (weight.dtype, weight.device.type) == (torch.bfloat16, "cpu")
    ours = get_peft_model(client, LoraConfig(target_modules=["q_proj"]), autocast_adapter_dtype=False)
    added = [each for name, each in ours.named_parameters() if "lora" in name]
    assert len(added) == 8 and {(each.device.type, each.dtype) for each in added} == {("cpu", torch.bfloat16)}
    client.to("meta")
    assert client.model.layers[1].mlp.up_proj.weight.is_meta


def test_several_adapters_are_chosen_stacked_scaled_and_switched_off(both: tuple[Any, Any]) -> None:
    one, two = LoraConfig(r=4, target_modules=["q_proj", "up_proj"]), LoraConfig(r=2, target_modules=["q_proj"])
    plain = logits(both[1])
    ours, theirs = adapt(both, one)
    for model in (ours, theirs):
        model.add_adapter("two", two)
        model.set_adapter("two")
    fill(ours, theirs, seed=1)
    seen = []
    for active in ("default", "two", ["default", "two"]):
        for model in (ours, theirs):
            model.base_model.set_adapter(active)
        assert_same(ours, theirs)
        seen.append(logits(ours))
    assert not torch.allclose(seen[0], seen[1]) and not torch.allclose(seen[1], seen[2])
    for model in (ours, theirs):
        model.base_model.model.model.layers[2].self_attn.q_proj.scale_layer(3.0)
    assert_same(ours, theirs)
    assert not torch.allclose(logits(ours), seen[2])
    with ours.disable_adapter():
        torch.testing.assert_close(logits(ours), plain, atol=1e-5, rtol=0)
    for model in (ours, theirs):
        model.delete_adapter("default")
    assert_same(ours, theirs)
    for model in (ours, theirs):
        model.base_model.model.model.layers[2].self_attn.q_proj.unscale_layer()
    torch.testing.assert_close(logits(ours), seen[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(ours.unload()), plain, atol=1e-5, rtol=0)


def test_several_ia3_adapters_multiply(both: tuple[Any, Any]) -> None:
    config = IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"])
    ours, theirs = adapt(both, config)
    for model in (ours, theirs):
        model.add_adapter("two", config)
        model.base_model.set_adapter(["default", "two"])
    fill(ours, theirs, seed=1)
    assert_same(ours, theirs)


def test_dropout_is_for_training_only(both: tuple[Any, Any]) -> None:
    ours, theirs = adapt(both, LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.5))
    ours.eval(), theirs.eval()
    assert_same(ours, theirs)
    ours.train()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(logits(ours))
    assert torch.equal(runs[0], runs[1]) and not torch.allclose(runs[0], runs[2])


def test_adapters_of_transformers_itself_apply(both: tuple[Any, Any]) -> None:
    for model in both:
        model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]))
    fill(*both)
    assert_same(*both)


def test_a_saved_adapter_loads_on_the_other_side(both: tuple[Any, Any], llama_directory: Path, tmp_path: Path) -> None:
    ours, theirs = adapt(both, METHODS["lora"])
    with torch.no_grad():
        for each in theirs.parameters():
            each.mul_(1.5) if each.requires_grad else None
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    client, whole = open_adapted(llama_directory)
    ours_again = PeftModel.from_pretrained(client, tmp_path / "theirs")
    theirs_again = PeftModel.from_pretrained(whole, tmp_path / "ours", low_cpu_mem_usage=True)
    torch.testing.assert_close(logits(ours_again), logits(theirs), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(logits(theirs_again), logits(ours), atol=TOLERANCE, rtol=0)
    ours_again.load_adapter(tmp_path / "ours", "second", low_cpu_mem_usage=True)
    ours_again.set_adapter("second")
    torch.testing.assert_close(logits(ours_again), logits(ours), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "mica"])
def test_initializations_from_the_weights_are_refused(both: tuple[Any, Any], init: str) -> None:
    with pytest.raises(BadRequest, match="those lie on servers: .*PiSSA"):
        get_peft_model(both[0], LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=init))


def test_merging_is_refused_and_changes_nothing(both: tuple[Any, Any]) -> None:
    ours, theirs = adapt(both, METHODS["lora"])
    for merge in (ours.merge_and_unload, ours.merge_adapter, lambda: ours.merge_and_unload(safe_merge=True)):
        with pytest.raises(BadRequest, match="those lie on servers: .*a local copy of the model"):
            merge()
    assert_same(ours, theirs)


def test_dora_is_refused(both: tuple[Any, Any]) -> None:
    with pytest.raises(BadRequest, match="DoRA"):
        get_peft_model(both[0], LoraConfig(target_modules=["q_proj"], use_dora=True))


def test_training_the_biases_of_remote_blocks_is_refused(tmp_path: Path, both: tuple[Any, Any]) -> None:
    save_tiny(tmp_path, tiny_config("bloom"))
    with pytest.raises(BadRequest, match="bias='none'"):
        get_peft_model(open_adapted(tmp_path)[0], LoraConfig(target_modules=["query_key_value"], bias="lora_only"))
    ours = get_peft_model(open_adapted(tmp_path)[0], LoraConfig(target_modules=["query_key_value"], bias="all"))
    with pytest.raises(BadRequest, match="bias='none'"):
        logits(ours)
    assert_same(*adapt(both, LoraConfig(r=2, target_modules=["q_proj"], bias="all")))  # this model has none


def test_watching_activations_for_an_initialization_is_refused(both: tuple[Any, Any]) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    ours = get_peft_model(both[0], config)
    batch = {"input_ids": tokens(), "attention_mask": torch.ones_like(tokens())}
    with pytest.raises(BadRequest, match="initializations that watch the activations"):
        initialize_lora_eva_weights(ours, [batch])


@pytest.mark.parametrize(
    "config, sentence",
    [
        (LoHaConfig(target_modules=["q_proj"]), "loha.layer.Linear on a Linear .self_attn.q_proj of block 0. cannot"),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["up_proj"]), "never change: use adapters"),
    ],
)
def test_what_would_have_no_effect_is_refused(both: tuple[Any, Any], config: Any, sentence: str) -> None:
    ours = get_peft_model(both[0], config)
    with pytest.raises(BadRequest, match=sentence):
        logits(ours)


def test_batches_of_mixed_adapters_are_refused(both: tuple[Any, Any]) -> None:
    ours = get_peft_model(both[0], METHODS["lora"]).eval()
    with pytest.raises(BadRequest, match="one adapter for all rows"):
        ours(tokens(), adapter_names=["default", "__base__"])


def test_parameters_of_ones_own_in_a_shadow_are_refused(both: tuple[Any, Any]) -> None:
    client, _ = both
    client.model.layers[1].mlp = torch.nn.Linear(64, 64)
    with pytest.raises(BadRequest, match="Linear at mlp of block 1"):
        logits(client)


def test_running_a_shadow_is_refused(both: tuple[Any, Any]) -> None:
    with pytest.raises(BadRequest, match="those lie on servers"):
        both[0].model.layers[0].mlp(torch.zeros(1, 2, 64))


def test_nothing_is_read_without_adapters(both: tuple[Any, Any]) -> None:
    layers = next(module for module in both[0].modules() if isinstance(module, RemoteLayers))
    assert read_adapters(both[0], layers) is None
