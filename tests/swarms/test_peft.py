"""PEFT on a distributed model: what it computes, learns, saves and generates equals PEFT on the whole model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from changing import loss_with_virtual_tokens
from conftest import THIRDS
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from peft_targets import FAMILIES, methods_of
from swarms_help import weights
from tiny import load_local, random_ids
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from swarm import (
    AutoDistributedModelForSequenceClassification,
    BottleneckConfig,
    add_bottlenecks,
    load_bottlenecks,
)
from swarm.errors import BadRequest

TOLERANCE = 1e-4
CURVE_TOLERANCE = 1e-3

LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"])


def padded_batch() -> dict[str, Tensor]:
    ids, mask = random_ids(3, 8), torch.ones(3, 8, dtype=torch.int64)
    ids[1, 6:], mask[1, 6:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def fill(ours: nn.Module, theirs: nn.Module, seed: int = 0) -> None:
    """Give what two models train the same random values, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    others = {name: each for name, each in theirs.named_parameters() if each.requires_grad}
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if parameter.requires_grad:
                values = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.copy_(values + 1.0 if "ia3" in name else values)
                others.pop(name).copy_(parameter)
    assert not others


def adapt(remote: Any, local: Any, config: PeftConfig) -> tuple[Any, Any]:
    ours, theirs = (get_peft_model(model, copy.deepcopy(config)).eval() for model in (remote, local))
    fill(ours, theirs)
    return ours, theirs


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(random_ids(2, 7), use_cache=False).logits


def assert_same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(logits(ours), logits(theirs), atol=TOLERANCE, rtol=0)


def generated(model: Any, **options: Any) -> Tensor:
    ids = random_ids(2, 6)
    return model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, **options
    )


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(**padded_batch(), use_cache=False).loss.backward()
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    return found


def losses_of(model: Any, num_steps: int = 20) -> list[float]:
    """The losses of some steps of training."""
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=5e-3)
    batch, losses = padded_batch(), []
    for _ in range(num_steps):
        loss = model(**batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_learns_as_locally(ours: Any, theirs: Any, plain: Tensor) -> None:
    """Compare outputs, gradients, the losses of some steps, and greedy text; plain: logits without what is trained."""
    assert_same(ours, theirs)
    assert float((logits(ours)[:, -plain.shape[1] :] - plain).abs().max()) > 10 * TOLERANCE
    found, wanted = gradients(ours), gradients(theirs)
    assert found and found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], atol=TOLERANCE, rtol=1e-4, msg=name)
    curve = losses_of(ours)
    assert curve == pytest.approx(losses_of(theirs), abs=CURVE_TOLERANCE) and curve[-1] < curve[0] - 0.1
    assert torch.equal(generated(ours), generated(theirs))


def base_of(model: Any) -> Any:
    """The model without what PEFT has put into it."""
    return model.base_model if model.active_peft_config.is_prompt_learning else model.unload()


@pytest.fixture(params=FAMILIES)
def family(request: Any, swarms: Any) -> tuple[str, Any, Path]:
    """A model type, a swarm of three servers, and the directory of its model."""
    ranges = THIRDS if request.param == "llama" else ((0, 1), (1, 3), (3, 4))
    return request.param, *swarms.get(request.param, ranges)


def test_methods_compute_learn_and_generate_as_local_ones_and_load_on_both_sides(
    family: tuple[str, Any, Path], swarms: Any, tmp_path: Path
) -> None:
    model_type, swarm, path = family
    remote, somebody = swarms.join(swarm, path), swarms.join(swarm, path)
    before, plain, text = weights(swarm), logits(somebody), generated(somebody)
    for number, config in enumerate(methods_of(model_type)):
        ours, theirs = adapt(remote, load_local(path), config)
        assert_learns_as_locally(ours, theirs, plain)
        assert weights(swarm) == before and torch.equal(logits(somebody), plain)
        for model, name in ((ours, "ours"), (theirs, "theirs")):
            model.save_pretrained(tmp_path / f"{name}-{number}")
        assert_same(ours, PeftModel.from_pretrained(load_local(path), tmp_path / f"ours-{number}"))
        assert ours.peft_config["default"].base_model_name_or_path == str(path)
        remote = base_of(ours)
        loaded = PeftModel.from_pretrained(remote, tmp_path / f"theirs-{number}")
        assert_same(loaded, theirs)
        remote = base_of(loaded)
    assert torch.equal(generated(somebody), text)


def test_deep_prompts_compute_and_learn_as_local_ones(family: tuple[str, Any, Path], swarms: Any) -> None:
    _, swarm, path = family
    ours, theirs = swarms.join(swarm, path, tuning_mode="deep_ptune", pre_seq_len=3), load_local(path)
    before, batch, prompts = weights(swarm), random_ids(3, 8), ours.swarm_prompts
    with torch.no_grad():
        for each in prompts.parameters():
            each.copy_(torch.randn(each.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    copies = [each.detach().clone().requires_grad_() for each in prompts.parameters()]
    curves = []
    for tensors in (list(prompts.parameters()), copies):
        optimizer = torch.optim.AdamW(tensors, lr=5e-3)
        curves.append([])
        for step in range(20):
            if tensors is copies:
                loss = loss_with_virtual_tokens(theirs, copies[0], copies[1], batch, None)
            else:
                loss = ours(batch, labels=batch, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            if step == 0:
                curves[-1].append([each.grad.clone() for each in tensors])
            optimizer.step()
            curves[-1].append(loss.item())
    for found, wanted in zip(curves[0].pop(0), curves[1].pop(0), strict=True):
        torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=1e-4)
    assert curves[0] == pytest.approx(curves[1], abs=CURVE_TOLERANCE) and curves[0][-1] < curves[0][0] - 0.1
    assert weights(swarm) == before


def test_bottlenecks_compute_learn_and_generate_as_local_ones_and_load_on_both_sides(
    family: tuple[str, Any, Path], swarms: Any, tmp_path: Path
) -> None:
    _, swarm, path = family
    config = BottleneckConfig(size=8, activation="gelu")
    ours, theirs = swarms.join(swarm, path), load_local(path)
    before, plain = weights(swarm), logits(ours)
    for model in (ours, theirs):
        add_bottlenecks(model, config)
    assert torch.equal(logits(ours), plain)  # it begins as nothing
    fill(ours, theirs)
    assert_learns_as_locally(ours, theirs, plain)
    assert weights(swarm) == before
    for model, name in ((ours, "ours"), (theirs, "theirs")):
        model.bottlenecks.save_pretrained(tmp_path / name)
    again = load_local(path)
    load_bottlenecks(again, tmp_path / "ours")
    assert_same(ours, again)
    del ours.bottlenecks
    load_bottlenecks(ours, tmp_path / "theirs")
    assert_same(ours, theirs)


def test_sessions_generate_with_the_adapter_of_their_beginning(pair: Any) -> None:
    ours, theirs = adapt(*pair, LORA)
    wanted, plain = generated(theirs), generated(load_local(pair[0].config.name_or_path))
    assert not torch.equal(wanted, plain)
    assert torch.equal(generated(ours, num_beams=3), generated(theirs, num_beams=3))
    with ours.disable_adapter():
        assert torch.equal(generated(ours), plain)
    with pair[0].inference_session(max_length=40):
        first = ours.generate(input_ids=random_ids(2, 6), max_new_tokens=4, do_sample=False)
        rest = ours.generate(input_ids=None, max_new_tokens=6, do_sample=False)
        assert torch.equal(torch.cat([first, rest], dim=1), wanted)
        with ours.disable_adapter(), pytest.raises(BadRequest, match="opened with other adapters"):
            ours.generate(input_ids=None, max_new_tokens=2, do_sample=False)


def test_adapters_are_exchanged_between_generations(pair: Any) -> None:
    ours, theirs = adapt(*pair, LORA)
    for model in (ours, theirs):
        model.add_adapter("two", LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["up_proj"]))
        model.set_adapter("two")
    fill(ours, theirs, seed=1)
    texts = []
    for name in ("two", "default", "two"):
        for model in (ours, theirs):
            model.set_adapter(name)
        texts.append(generated(ours))
        assert torch.equal(texts[-1], generated(theirs))
    assert torch.equal(texts[0], texts[2]) and not torch.equal(texts[0], texts[1])


def test_a_call_with_a_cache_does_not_drop_gradients(pair: Any) -> None:
    ours = get_peft_model(pair[0], LORA)
    loss = ours(**padded_batch()).loss  # a cache by default, as Hugging Face's models return one
    loss.backward()
    assert all(each.grad is not None for each in ours.parameters() if each.requires_grad)
    with pytest.raises(BadRequest, match="use_cache=False"):
        ours(**padded_batch(), use_cache=True)


def test_a_classifier_trains_its_head_here_and_its_adapter_there(llama: Any, swarms: Any) -> None:
    local = load_local(llama.path, AutoModelForSequenceClassification, num_labels=3)
    remote = swarms.join(llama.swarm, llama.path, AutoDistributedModelForSequenceClassification, num_labels=3)
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"])
    ours, theirs = adapt(remote, local, config)
    batch = {**padded_batch(), "labels": torch.tensor([0, 2, 1])}
    curves = []
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=5e-3)
        curves.append([])
        for _ in range(5):
            loss = model(**batch, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curves[-1].append(loss.item())
    assert curves[0] == pytest.approx(curves[1], abs=CURVE_TOLERANCE)


def test_calls_that_are_for_local_weights_do_no_harm(pair: Any, capsys: Any) -> None:
    model = prepare_model_for_kbit_training(pair[0])
    ours = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    ours.gradient_checkpointing_enable()
    ours.enable_input_require_grads()
    ours.print_trainable_parameters()
    assert "trainable params: " in capsys.readouterr().out
    losses_of(ours.train(), 1)


def test_training_an_adapter_changes_nothing_for_others(pair: Any, llama: Any) -> None:
    before, outputs, text = weights(llama.swarm), logits(llama.remote), generated(llama.remote)
    ours = get_peft_model(pair[0], LORA)
    losses_of(ours, 3)
    generated(ours)
    assert weights(llama.swarm) == before
    assert torch.equal(logits(llama.remote), outputs) and torch.equal(generated(llama.remote), text)
