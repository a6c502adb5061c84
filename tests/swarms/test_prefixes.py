"""Keys and values of a client in front of its sequences: in one pass with others, and in sessions that are lost."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft_targets import prefix_tuning
from swarms_help import wait_idle
from test_bad_input import assert_refused, compute, open_stub, opening
from test_client_adapters import file, put
from tiny import load_local, random_ids
from torch import Tensor
from transformers import AutoModelForSequenceClassification, DynamicCache, StoppingCriteria

from swarm import AutoDistributedModelForSequenceClassification
from swarm.errors import BadRequest, PromptTooLong, SessionLost
from swarm.model.adapters import BlockAdapter
from swarm.model.changes import PAST, Lora, Prefix
from swarm.v1 import blocks_pb2 as pb

TOLERANCE = 1e-4


def adapt(model: Any, config: PeftConfig, seed: int) -> Any:
    """A PEFT model whose parameters follow from the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(model, config).eval()
        with torch.no_grad():
            for each in model.parameters():
                if each.requires_grad:
                    each.normal_(std=0.3)
    return model


def past(seed: int = 0, num_tokens: int = 5, batch: int = 1) -> DynamicCache:
    """Keys and values of all blocks, the same in each sequence."""
    draw = torch.Generator().manual_seed(seed)
    heads = [torch.randn(2, 1, 2, num_tokens, 16, generator=draw).expand(-1, batch, -1, -1, -1) for _ in range(6)]
    return DynamicCache([(keys.clone(), values.clone()) for keys, values in heads])


def text(model: Any, ids: Tensor, **options: Any) -> Tensor:
    return model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, **options
    )


def test_clients_with_prefixes_adapters_and_nothing_decode_at_the_same_time(llama, swarms):
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"])
    chosen = [
        (prefix_tuning("llama"), 1),
        (prefix_tuning("llama", num_virtual_tokens=21), 2),
        (lora, 3),
        (None, 0),
        (prefix_tuning("llama"), 1),
    ]
    ids = [random_ids(2, 5 + 3 * number, seed=number) for number in range(len(chosen))]
    clients, wanted = [], []
    for each, (config, seed) in zip(ids, chosen, strict=True):
        models = [swarms.join(llama.swarm, llama.path), load_local(llama.path)]
        ours, theirs = (model if config is None else adapt(model, config, seed) for model in models)
        clients.append(ours)
        wanted.append(text(theirs, each))
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(text, clients, ids))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


def test_a_cache_that_begins_with_a_prefix_is_cut_and_goes_on(llama):
    ids, mask = random_ids(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :2] = 0
    results = []
    for model in (llama.remote, llama.local):
        with torch.no_grad():
            whole = torch.cat([torch.ones(2, 5, dtype=torch.int64), mask], dim=1)
            output = model(ids, attention_mask=whole, past_key_values=past(batch=2), use_cache=True)
            logits, cache = [output.logits], output.past_key_values
            assert cache.get_seq_length() == 14
            for removed, count in ((0, 1), (3, 4), (7, 2)):
                cache.crop(-removed) if removed else None
                length = cache.get_seq_length()
                seen = torch.cat([whole[:, :length], torch.ones(2, count, dtype=torch.int64)], dim=1)
                more = random_ids(2, count, seed=count)
                logits.append(model(more, attention_mask=seen, past_key_values=cache).logits)
        results.append(torch.cat(logits, dim=1))
    seen = torch.cat([mask, torch.ones(2, 7, dtype=torch.int64)], dim=1).bool()
    torch.testing.assert_close(results[0][seen], results[1][seen], atol=TOLERANCE, rtol=0)


def test_the_cache_of_a_call_that_asked_for_none_begins_with_the_prefix(llama):
    with torch.no_grad():
        results = []
        for model in (llama.remote, llama.local):
            output = model(random_ids(1, 6), past_key_values=past())
            assert output.past_key_values.get_seq_length() == 11
            again = model(random_ids(1, 3, seed=4), past_key_values=output.past_key_values)
            results.append(torch.cat([output.logits, again.logits], dim=1))
    torch.testing.assert_close(*results, atol=TOLERANCE, rtol=0)


class AtToken(StoppingCriteria):
    """Does something once, in the middle of a generation."""

    def __init__(self, length: int, action: Callable[[], None]) -> None:
        self._length, self._action = length, action

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        if input_ids.shape[1] == self._length:
            self._action()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_a_session_that_a_server_has_lost_is_replayed_behind_its_prefix(llama, swarms):
    ours, theirs = (
        adapt(model, prefix_tuning("llama"), 1)
        for model in (swarms.join(llama.swarm, llama.path), load_local(llama.path))
    )
    ids, lost = random_ids(2, 6), []

    def lose() -> None:
        server = llama.swarm.servers[1]
        lost.append(server.running.sessions.num_sessions)
        server._loop.call_soon_threadsafe(server.running.sessions.fail_all, SessionLost("this server forgets"))

    assert torch.equal(text(ours, ids, stopping_criteria=[AtToken(11, lose)]), text(theirs, ids))
    assert lost == [1]
    assert torch.equal(text(ours, ids, num_beams=3), text(theirs, ids, num_beams=3))


def test_generate_in_a_session_begins_it_with_the_prefix(llama, swarms):
    remote = swarms.join(llama.swarm, llama.path)
    ours, theirs = adapt(remote, prefix_tuning("llama"), 1), adapt(load_local(llama.path), prefix_tuning("llama"), 1)
    ids = random_ids(2, 6)
    wanted = text(theirs, ids)
    with remote.inference_session(max_length=20) as session:
        assert torch.equal(text(ours, ids), wanted)
        assert session.position == 17
        with pytest.raises(BadRequest, match="takes only the last token of what continues a session"):
            text(ours, ids)
        session.position = 0
        assert torch.equal(text(ours, ids), wanted)
        session.position = 0
        with ours.disable_adapter():
            assert torch.equal(text(ours, ids), text(load_local(llama.path), ids))


def test_pages_behind_a_prefix_are_shared_by_sessions_with_the_same_one_only(llama):
    hidden = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for seeds in ((1, 1), (1, 2), (1, None)):
            caches = []
            for seed in seeds:
                given = None if seed is None else past(seed)
                output = llama.remote(inputs_embeds=hidden, past_key_values=given, use_cache=True)
                caches.append(output.past_key_values)
            shared = llama.swarm.servers[0].running.sessions.statistics().cache_shared_bytes
            assert (shared > 0) == (seeds == (1, 1))
            del output, caches
            wait_idle(llama.swarm)


def test_a_classifier_with_a_prefix(llama, swarms, tmp_path: Path):
    config, batch = prefix_tuning("llama"), {"input_ids": random_ids(3, 8), "labels": torch.tensor([0, 2, 1])}
    config.task_type = "SEQ_CLS"
    remote = swarms.join(llama.swarm, llama.path, AutoDistributedModelForSequenceClassification, num_labels=3)
    ours = adapt(remote, config, 1)
    theirs = adapt(load_local(llama.path, AutoModelForSequenceClassification, num_labels=3), config, 1)
    torch.testing.assert_close(ours(**batch).loss, theirs(**batch).loss, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("projection", [False, True])
def test_prefixes_saved_on_one_side_load_on_the_other(llama, swarms, tmp_path: Path, projection: bool):
    config = prefix_tuning("llama", prefix_projection=projection)
    ours = adapt(swarms.join(llama.swarm, llama.path), config, 1)
    theirs = adapt(load_local(llama.path), config, 2)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    ours_locally = PeftModel.from_pretrained(load_local(llama.path), tmp_path / "ours")
    theirs_remotely = PeftModel.from_pretrained(swarms.join(llama.swarm, llama.path), tmp_path / "theirs")
    with torch.no_grad():
        for one, other in ((ours_locally, ours), (theirs_remotely, theirs)):
            torch.testing.assert_close(
                one(random_ids(2, 7)).logits, other(random_ids(2, 7)).logits, atol=TOLERANCE, rtol=0
            )


def test_what_cannot_be_a_prefix_is_refused_here(llama, swarms):
    different = past(batch=2)
    different.layers[3].values[1] += 1
    for cache, sentence in ((different, "other keys and values for each sequence"), (DynamicCache(), "does not hold")):
        with pytest.raises(BadRequest, match=sentence):
            llama.remote(random_ids(2, 3), past_key_values=cache)
    with pytest.raises(BadRequest, match="hides what past_key_values holds"):
        llama.remote(random_ids(1, 2), past_key_values=past(), attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1, 1]]))
    prompted = swarms.join(llama.swarm, llama.path, tuning_mode="deep_ptune", pre_seq_len=3)
    with pytest.raises(BadRequest, match="cannot be used together"):
        prompted(random_ids(1, 2), past_key_values=past())
    with pytest.raises(BadRequest, match="use_cache=False"):
        trained = past()
        trained.layers[0].keys.requires_grad_()
        llama.remote(inputs_embeds=torch.zeros(1, 2, 64), past_key_values=trained, use_cache=True)


def prefix(num_tokens: int = 3, width: int = 32) -> BlockAdapter:
    return BlockAdapter([Prefix(PAST, torch.ones(num_tokens, width), torch.ones(num_tokens, width))])


@pytest.mark.parametrize(
    "adapters, error, sentence",
    [
        ([prefix(width=31)] * 2, BadRequest, r"'keys_PI' of the shape \[3, 32\], not \[3, 31\]"),
        ([prefix(), prefix(4)], BadRequest, r"prefixes of \[3, 4\] tokens were given"),
        ([prefix(), None], BadRequest, r"prefixes of \[0, 3\] tokens were given"),
        ([prefix(1025)] * 2, BadRequest, "has the length 1025: use at most 1024"),
        ([BlockAdapter([Lora(PAST, torch.ones(2, 32), torch.ones(32, 2))])] * 2, BadRequest, "no module past_key_val"),
    ],
)
async def test_prefixes_that_do_not_fit_the_blocks(llama, adapters, error, sentence):
    server = next(hop.server for hop in llama.remote.explain_route() if hop.server.start == 2)
    names = [b"" if each is None else each.digest for each in adapters]
    async with open_stub(server) as stub:
        for each in adapters:
            if each is not None:
                await put(stub, server, file(each.to_bytes()))
        await assert_refused(error, sentence, stub.Forward(), compute(server, adapters=names))
        await assert_refused(error, sentence, stub.Session(), pb.SessionRequest(open=opening(server, adapters=names)))


async def test_a_long_prefix_before_many_sequences_counts_as_their_tokens(llama):
    server, long = next(hop.server for hop in llama.remote.explain_route() if hop.server.start == 2), prefix(1024)
    async with open_stub(server) as stub:
        await put(stub, server, file(long.to_bytes()))
        request = compute(server, x_BLD=torch.zeros(9, 1, 64), adapters=[long.digest] * 2)
        await assert_refused(PromptTooLong, "9 x 1025 tokens were sent", stub.Forward(), request)
