"""Gradients through remote blocks equal those of the whole model; what is remote never changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from changing import loss_with_virtual_tokens, virtual_tokens, with_room
from peft import PromptTuningConfig, get_peft_model
from swarms_help import weights
from tiny import HIDDEN, load_local, random_ids
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from swarm import AutoDistributedModelForSequenceClassification
from swarm.client import ClientConfig
from swarm.client.prompts import Prompts
from swarm.errors import BadCheckpoint, BadRequest, PromptTooLong
from swarm.link import JoinLink

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


def hidden(batch_size: int, length: int, *, seed: int = 1) -> Tensor:
    return torch.randn(batch_size, length, HIDDEN, generator=torch.Generator().manual_seed(seed))


def error(ours: Tensor | None, theirs: Tensor | None) -> float:
    assert ours is not None and theirs is not None and ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


def assert_same_training(remote: Any, local: Any, **inputs: Any) -> None:
    """Compare the loss and the gradients of everything that the client owns."""
    losses = []
    for model in (remote, local):
        model.zero_grad()
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
    assert abs(losses[0] - losses[1]) <= LOSS_TOLERANCE
    theirs = dict(local.named_parameters())
    owned = [(name, parameter) for name, parameter in remote.named_parameters() if parameter.requires_grad]
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= {name for name, _ in owned}
    for name, parameter in owned:
        assert error(parameter.grad, theirs[name].grad) <= GRADIENT_TOLERANCE, name


def test_loss_and_gradients(llama):
    ids = random_ids(2, 9)
    assert_same_training(llama.remote, llama.local, input_ids=ids, labels=ids)


def test_gradients_may_travel_with_8_bits_and_hidden_states_as_they_are(llama, swarms):
    remote = swarms.join(llama.swarm, llama.path, dtype="float32", config={"gradient_compression": "int8"})
    ids = random_ids(2, 9)
    results = []
    for model in (remote, llama.remote):
        output = model(input_ids=ids, labels=ids, use_cache=False)
        output.loss.backward()
        results.append((output.logits.detach(), model.get_input_embeddings().weight.grad))
    (ours, our_grad), (theirs, their_grad) = results
    assert torch.equal(ours, theirs)
    assert 0 < error(our_grad, their_grad) < 0.02 * float(their_grad.abs().max())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(llama, side):
    ids, mask = random_ids(3, 8), torch.ones(3, 8, dtype=torch.int64)
    for row in range(3):
        padding = slice(0, 2 * row) if side == "left" else slice(8 - 2 * row, 8)
        ids[row, padding], mask[row, padding] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    assert_same_training(llama.remote, llama.local, **inputs)
    assert_same_training(llama.remote, llama.local, **inputs, position_ids=position_ids)


@pytest.mark.parametrize("mask", [None, torch.ones(2, 9, dtype=torch.int64)], ids=["no mask", "mask"])
@pytest.mark.parametrize("options", [{"use_cache": False}, {}], ids=["no cache", "default cache"])
def test_positions_that_begin_anew_mean_several_texts_where_they_do_locally(llama, mask, options):
    ids, positions = random_ids(2, 9), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(2, -1)
    logits = []
    for model in (llama.remote, llama.local):
        with torch.no_grad():
            output = model(ids, position_ids=positions, attention_mask=mask, **options)
            logits.append(output.logits)
            if not options:
                logits[-1] = torch.cat(
                    [logits[-1], model(ids[:, :2], past_key_values=output.past_key_values).logits], 1
                )
            alone = model(ids[:, 4:], use_cache=False).logits
    assert error(*logits) <= GRADIENT_TOLERANCE
    apart = error(logits[0][:, 4:9], alone) <= GRADIENT_TOLERANCE
    assert apart == (mask is None and bool(options))


def test_micro_batches_change_nothing(llama, swarms):
    remote = swarms.join(llama.swarm, llama.path, config={"micro_batch_tokens": 20})
    ids = random_ids(5, 9)  # 2 + 2 + 1 sequences
    assert_same_training(remote, llama.local, input_ids=ids, labels=ids)


def test_a_sequence_longer_than_a_micro_batch_is_refused(llama, swarms):
    remote = swarms.join(llama.swarm, llama.path, config={"micro_batch_tokens": 8})
    with pytest.raises(PromptTooLong, match="a sequence of 9 tokens does not fit the 8"):
        remote(random_ids(1, 9), use_cache=False)


@pytest.mark.parametrize("index, numbers", [(slice(1, 4), [1, 2, 3]), (2, [2]), (-1, [5]), (slice(None), range(6))])
def test_a_slice_of_remote_blocks_is_those_blocks(llama, index, numbers):
    blocks, layers = llama.remote.remote_blocks[index], [llama.local.model.layers[number] for number in numbers]
    assert len(blocks) == len(layers) and not list(blocks.parameters())
    x_BLD, weight = hidden(2, 7), hidden(2, 7, seed=2)
    results = []
    for run in (blocks, lambda x: through_layers(llama.local, layers, x)):
        x = x_BLD.clone().requires_grad_()
        y = run(x)
        (y * weight).sum().backward()
        results.append((y.detach(), x.grad))
    scale = results[1][0].abs().max().clamp(1)
    assert error(results[0][0], results[1][0]) <= 1e-5 * scale
    gradient_scale = results[1][1].abs().max().clamp(1)
    assert error(results[0][1], results[1][1]) <= GRADIENT_TOLERANCE * gradient_scale


def through_layers(local: Any, layers: list[nn.Module], x_BLD: Tensor) -> Tensor:
    length = x_BLD.shape[1]
    ids = torch.arange(length)[None]
    rotary = local.model.rotary_emb(x_BLD, position_ids=ids)
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    for layer in layers:
        x_BLD = layer(x_BLD, attention_mask=mask, position_ids=ids, position_embeddings=rotary)
    return x_BLD


@pytest.mark.parametrize(
    "x, sentence",
    [
        (torch.zeros(1, 2, HIDDEN + 1), "floating-point hidden states"),
        (torch.zeros(2, HIDDEN), "floating-point hidden states"),
        (torch.zeros(1, 2, HIDDEN, dtype=torch.int64), "floating-point hidden states"),
        (torch.zeros(0, 2, HIDDEN), "floating-point hidden states"),
        (torch.zeros(1, 0, HIDDEN), "floating-point hidden states"),
    ],
)
def test_remote_blocks_refuse_what_does_not_fit(llama, x, sentence):
    with pytest.raises(BadRequest, match=sentence):
        llama.remote.remote_blocks(x)


def test_remote_blocks_refuse_masks_and_prompts_that_do_not_fit(llama):
    x = hidden(2, 5)
    for arguments in (
        {"attention_mask": torch.ones(2, 6)},
        {"position_ids": torch.zeros(3, 5)},
        {"prompts": torch.zeros(5, 1, 2, HIDDEN)},
        {"prompts": torch.zeros(6, 1, 6, HIDDEN)},
        {"prompts": torch.zeros(6, 3, 2, HIDDEN)},
    ):
        with pytest.raises(BadRequest):
            llama.remote.remote_blocks(x, **arguments)


def test_slices_that_are_empty_or_have_steps_are_refused(llama):
    for index in (slice(3, 3), slice(0, 6, 2), slice(5, 2)):
        with pytest.raises(BadRequest, match="non-empty slices"):
            llama.remote.remote_blocks[index]
    with pytest.raises(IndexError):
        llama.remote.remote_blocks[6]


def test_gradients_do_not_flow_through_a_cache(llama):
    with pytest.raises(BadRequest, match="use_cache=False"):
        llama.remote(random_ids(1, 4), use_cache=True)


# Prompt tuning


def tuned(llama: Any, swarms: Any, mode: str) -> Any:
    """A client with prompts that are not zero anywhere."""
    remote = swarms.join(llama.swarm, llama.path, tuning_mode=mode, pre_seq_len=3)
    with torch.no_grad():
        for number, parameter in enumerate(remote.swarm_prompts.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.5)
    return remote


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
@pytest.mark.parametrize("padded", [False, True])
def test_prompt_tuning_equals_the_plain_way(llama, swarms, mode, padded):
    remote = tuned(llama, swarms, mode)
    prompts = remote.swarm_prompts
    trainable = [name for name, parameter in remote.named_parameters() if parameter.requires_grad]
    assert trainable == [f"swarm_prompts.{name}" for name, _ in prompts.named_parameters()]
    copies = [parameter.detach().clone().requires_grad_() for parameter in prompts.parameters()]
    ids, mask = random_ids(2, 6), None
    if padded:
        mask = torch.ones_like(ids)
        mask[1, :2] = 0
    deep = copies[1] if mode == "deep_ptune" else None
    wanted = loss_with_virtual_tokens(llama.local, copies[0], deep, ids, mask)
    wanted.backward()
    loss = remote(input_ids=ids, labels=ids, attention_mask=mask, use_cache=False).loss
    loss.backward()
    assert abs(loss - wanted) <= LOSS_TOLERANCE
    for ours, theirs in zip(prompts.parameters(), copies, strict=True):
        assert error(ours.grad, theirs.grad) <= GRADIENT_TOLERANCE
    assert all(parameter.grad is None for name, parameter in remote.named_parameters() if "swarm_prompts" not in name)


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
def test_prompts_learn_and_nothing_else_does(llama, swarms, mode):
    remote = swarms.join(llama.swarm, llama.path, tuning_mode=mode, pre_seq_len=4)
    frozen = {name: value.clone() for name, value in remote.state_dict().items() if "swarm_prompts" not in name}
    servers = weights(llama.swarm)
    optimizer = torch.optim.Adam([each for each in remote.parameters() if each.requires_grad], lr=0.05)
    ids = random_ids(1, 6)
    losses = []
    for _ in range(15):
        loss = remote(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    state = remote.state_dict()
    assert all(torch.equal(state[name], value) for name, value in frozen.items())
    assert weights(llama.swarm) == servers


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
def test_generation_with_prompts_equals_the_plain_way(llama, swarms, mode):
    remote = tuned(llama, swarms, mode)
    prompts = remote.swarm_prompts
    ids = random_ids(2, 6)
    with torch.no_grad():
        embedded = with_room(llama.local, prompts.pre_seq_len, ids)
        with virtual_tokens(llama.local, prompts.embeddings_PD, prompts.deep_NBPD):
            wanted = llama.local.generate(inputs_embeds=embedded, max_new_tokens=10, do_sample=False)
        ours = remote.generate(ids, max_new_tokens=10, do_sample=False)
        assert torch.equal(ours[:, 6:], wanted)
        with remote.inference_session(max_length=40):
            first = remote.generate(ids, max_new_tokens=4, do_sample=False)
            rest = remote.generate(max_new_tokens=6, do_sample=False)
        assert torch.equal(torch.cat([first, rest], dim=1), ours)


def test_prompts_are_saved_and_loaded_on_another_client(llama, swarms, tmp_path: Path):
    for mode in ("ptune", "deep_ptune"):
        ours = tuned(llama, swarms, mode)
        ours.swarm_prompts.save_pretrained(tmp_path / mode)
        again = swarms.join(llama.swarm, llama.path, prompts=tmp_path / mode)
        assert [name for name, each in again.named_parameters() if each.requires_grad] == [
            f"swarm_prompts.{name}" for name, _ in again.swarm_prompts.named_parameters()
        ]
        ids = random_ids(2, 6)
        with torch.no_grad():
            assert torch.equal(again(ids, use_cache=False).logits, ours(ids, use_cache=False).logits)


def test_prompts_that_are_none_or_of_another_model_are_refused(llama, swarms, tmp_path: Path):
    path, wrong = str(llama.path), tmp_path / "wrong"
    Prompts("ptune", 3, 6, HIDDEN // 2, torch.float32).save_pretrained(wrong)
    with pytest.raises(BadRequest, match="leave these out"):
        swarms.join(llama.swarm, path, tuning_mode="ptune", pre_seq_len=3, prompts=wrong)
    with pytest.raises(BadCheckpoint, match="those of another model"):
        swarms.join(llama.swarm, path, prompts=wrong)
    for name, content in (("prompts.safetensors", "no tensors"), ("prompts.json", "[]")):
        (wrong / name).write_text(content)
        with pytest.raises(BadCheckpoint, match="there are no prompts in"):
            swarms.join(llama.swarm, path, prompts=wrong)


def test_tuning_modes_that_do_not_exist_are_refused(llama, swarms):
    for arguments in ({"tuning_mode": "lora", "pre_seq_len": 4}, {"tuning_mode": "ptune"}, {"pre_seq_len": 4}):
        with pytest.raises(BadRequest, match="tuning_mode"):
            swarms.join(llama.swarm, llama.path, **arguments)


# Heads, and the servers' weights


def test_sequence_classification(llama, swarms):
    torch.manual_seed(0)
    local = load_local(llama.path, AutoModelForSequenceClassification, num_labels=3)
    remote = swarms.join(llama.swarm, llama.path, AutoDistributedModelForSequenceClassification, num_labels=3)
    remote.score.load_state_dict(local.score.state_dict())
    ids, mask, labels = random_ids(3, 7), torch.ones(3, 7, dtype=torch.int64), torch.tensor([0, 2, 1])
    ids[0, 5:], mask[0, 5:] = 0, 0
    results = []
    for model in (remote, local):
        output = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
        output.loss.backward()
        results.append((output.logits.detach(), output.loss.detach(), model.score.weight.grad))
    assert remote.config.num_labels == 3 and results[0][0].shape == (3, 3)
    for ours, theirs in zip(*results, strict=True):
        assert error(ours, theirs) <= GRADIENT_TOLERANCE


def test_a_classifier_with_prompts_looks_at_the_last_token_of_padded_batches(llama, swarms):
    local = load_local(llama.path, AutoModelForSequenceClassification, num_labels=3)
    remote = swarms.join(llama.swarm, llama.path, AutoDistributedModelForSequenceClassification, num_labels=3)
    remote.score.load_state_dict(local.score.state_dict())
    config = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    ours, theirs = (get_peft_model(model, config).eval() for model in (remote, local))
    theirs.load_state_dict(ours.state_dict(), strict=False)
    ids, mask = random_ids(3, 7), torch.ones(3, 7, dtype=torch.int64)
    ids[0, :2], mask[0, :2] = 0, 0
    with torch.no_grad():
        assert error(*(model(ids, attention_mask=mask).logits for model in (ours, theirs))) <= GRADIENT_TOLERANCE
        with pytest.raises(BadRequest, match="pad on the left"):
            ours(ids.flip(1), attention_mask=mask.flip(1))
    how = {"num_labels": 3, "tuning_mode": "ptune", "pre_seq_len": 4}
    own = swarms.join(llama.swarm, llama.path, AutoDistributedModelForSequenceClassification, **how)
    with torch.no_grad():  # with prompts of our own it is told the token ids
        padded, alone = own(ids.flip(1), attention_mask=mask.flip(1)).logits, own(ids[:1, 2:].flip(1)).logits
    assert error(padded[:1], alone) <= GRADIENT_TOLERANCE


def test_training_changes_the_client_and_no_server(llama, swarms):
    before = weights(llama.swarm)
    remote = swarms.join(llama.swarm, llama.path)
    local = load_local(llama.path)
    for name, parameter in local.named_parameters():
        parameter.requires_grad_("layers" not in name)
    ids = random_ids(2, 6)
    results = []
    for model in (remote, local):
        optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
        for _ in range(5):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        results.append(loss.item())
    assert results[0] == pytest.approx(results[1], abs=1e-4)
    assert weights(llama.swarm) == before


def test_two_clients_train_apart(llama, swarms):
    one, two = (swarms.join(llama.swarm, llama.path) for _ in range(2))
    ids = random_ids(1, 6)
    one(input_ids=ids, labels=ids).loss.backward()
    assert two.model.embed_tokens.weight.grad is None
    assert_same_training(two, llama.local, input_ids=ids, labels=ids)


def test_no_initial_peers_and_both_kinds_are_refused(llama):
    peers = JoinLink.parse(llama.swarm.link).initial_peers
    from swarm import AutoDistributedModelForCausalLM
    from swarm.errors import BadLink

    with pytest.raises(BadLink, match="join link or initial_peers"):
        AutoDistributedModelForCausalLM.from_pretrained(str(llama.path))
    with pytest.raises(BadLink, match="not both"):
        AutoDistributedModelForCausalLM.from_pretrained(str(llama.path), join=llama.swarm.link, initial_peers=peers)
    model = AutoDistributedModelForCausalLM.from_pretrained(
        str(llama.path), client_config=ClientConfig(initial_peers=peers)
    )
    model.close()
