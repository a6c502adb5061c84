"""A call without `use_cache` returns a cache, as Hugging Face's models do, and costs no server anything for it."""

from __future__ import annotations

import pytest
import torch
from swarms_help import held, wait_idle
from tiny import load_local, random_ids
from transformers import AutoModel

from swarm import AutoDistributedModel

TOLERANCE = 1e-5


def error(found, wanted):
    """Relative to the largest number: sums in float32 are in another order when tokens come in other passes."""
    return (found - wanted).abs().max() / wanted.abs().max()


@torch.no_grad()
def decode(model, ids, mask=None, num_tokens=6):
    """A loop as people write it: the cache of each call is handed to the next."""
    past, chosen = None, []
    for _ in range(num_tokens):
        output = model(ids, attention_mask=mask, past_key_values=past)
        past, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
        mask = None if mask is None else torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        chosen.append(ids)
    return torch.cat(chosen, dim=1)


@pytest.mark.parametrize("padded", [False, True])
def test_a_decoding_loop_that_names_no_cache_equals_the_local_one(llama, padded):
    ids, mask = random_ids(2, 7), torch.ones(2, 7, dtype=torch.int64)
    if padded:
        mask[1, :3] = 0
    assert torch.equal(decode(llama.remote, ids, mask), decode(llama.local, ids, mask))


def test_no_server_holds_anything_before_the_cache_is_used_and_after_it_is_dropped(llama):
    with torch.no_grad():
        output = llama.remote(random_ids(1, 4))
        assert output.past_key_values.get_seq_length() == 4
        assert held(llama.swarm) == [(0, 0)] * len(llama.swarm.servers)
        following = llama.remote(random_ids(1, 1), past_key_values=output.past_key_values)
        assert following.past_key_values.get_seq_length() == 5
        assert all(num_sessions == 1 for num_sessions, _ in held(llama.swarm))
    del output, following
    wait_idle(llama.swarm)


def test_a_training_step_returns_a_cache_too_and_it_can_be_used(llama):
    ids = random_ids(2, 6)
    outputs = [model(input_ids=ids, labels=ids) for model in (llama.remote, llama.local)]
    for output in outputs:
        output.loss.backward()
    ours, theirs = (model.get_input_embeddings().weight.grad for model in (llama.remote, llama.local))
    assert (ours - theirs).abs().max() <= 1e-4
    with torch.no_grad():
        following = [
            model(ids[:, :1], past_key_values=output.past_key_values).logits
            for model, output in zip((llama.remote, llama.local), outputs, strict=True)
        ]
    assert error(*following) <= TOLERANCE


def test_it_can_be_cropped_reordered_and_repeated_before_its_first_use(llama):
    ids, token = random_ids(2, 6), random_ids(4, 1, seed=3)
    logits = []
    for model in (llama.remote, llama.local):
        with torch.no_grad():
            cache = model(ids).past_key_values
            cache.crop(-2)
            cache.batch_repeat_interleave(2)
            cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
            logits.append(model(token, past_key_values=cache).logits)
    assert error(*logits) <= TOLERANCE


def test_a_longer_input_than_a_session_usually_holds_can_be_continued(llama, monkeypatch):
    monkeypatch.setattr("swarm.client.caches.DEFAULT_SESSION_TOKENS", 4)
    assert torch.equal(decode(llama.remote, random_ids(1, 9)), decode(llama.local, random_ids(1, 9)))


def test_virtual_tokens_are_part_of_it(llama, swarms):
    remote = swarms.join(llama.swarm, llama.path, tuning_mode="deep_ptune", pre_seq_len=3)
    ids, token = random_ids(2, 5), random_ids(2, 1, seed=2)
    with torch.no_grad():
        logits = [
            remote(token, past_key_values=remote(ids, **arguments).past_key_values).logits
            for arguments in ({}, {"use_cache": True})
        ]
    assert error(*logits) <= TOLERANCE


def test_the_base_model_returns_one_and_where_the_config_or_the_call_says_no_there_is_none(llama, swarms):
    ids = random_ids(1, 4)
    base = swarms.join(llama.swarm, llama.path, AutoDistributedModel)
    local = load_local(llama.path, AutoModel)
    with torch.no_grad():
        states = [
            model(ids[:, :1], past_key_values=model(ids).past_key_values).last_hidden_state for model in (base, local)
        ]
        assert error(*states) <= TOLERANCE
        assert base(ids, use_cache=False).past_key_values is None
        assert isinstance(base(ids, return_dict=False), tuple)
        base.config.use_cache = False
        assert base(ids).past_key_values is None
