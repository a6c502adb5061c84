"""Generation over three servers gives exactly the tokens that the whole model gives."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from tiny import VOCAB, load_local, random_ids
from transformers import StoppingCriteria, StoppingCriteriaList

from swarm import AutoDistributedConfig, AutoDistributedModel
from swarm.errors import PromptTooLong

NUM_TOKENS = 12


def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    return model.generate(*args, **{"max_new_tokens": NUM_TOKENS, "do_sample": False} | kwargs)


def assert_same(pair: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Generate with both models and compare the tokens."""
    ours, theirs = generate(pair.remote, *args, **kwargs), generate(pair.local, *args, **kwargs)
    assert torch.equal(ours, theirs)
    return ours


def left_padded(batch_size: int, length: int) -> dict[str, torch.Tensor]:
    """Rows with 0, 2, 4, ... tokens of padding in front."""
    ids, mask = random_ids(batch_size, length), torch.ones(batch_size, length, dtype=torch.int64)
    for row in range(batch_size):
        ids[row, : 2 * row], mask[row, : 2 * row] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def test_logits(llama):
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert (llama.remote(ids).logits - llama.local(ids).logits).abs().max() <= 1e-5


def test_the_model_makes_varied_tokens(llama):
    """Otherwise the comparisons below would prove little."""
    assert len(set(assert_same(llama, random_ids(1, 8))[0, 8:].tolist())) > 4


def test_greedy(llama):
    assert_same(llama, random_ids(1, 8), max_new_tokens=40)


def test_greedy_batch(llama):
    assert_same(llama, random_ids(4, 8))


def test_one_token_prompt(llama):
    assert_same(llama, random_ids(1, 1))


def test_sampling_with_a_seed(llama):
    results = []
    for model in (llama.remote, llama.local):
        torch.manual_seed(7)
        results.append(generate(model, random_ids(2, 8), do_sample=True, temperature=1.5, top_k=50, top_p=0.9))
    assert torch.equal(*results)


def test_several_samples_of_one_prompt(llama):
    results = []
    for model in (llama.remote, llama.local):
        torch.manual_seed(7)
        results.append(generate(model, random_ids(1, 8), do_sample=True, num_return_sequences=3))
    assert torch.equal(*results)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_beam_search_of_four(llama, batch_size):
    assert_same(llama, random_ids(batch_size, 8), num_beams=4, num_return_sequences=2)


def test_beam_search_of_a_padded_batch(llama):
    assert_same(llama, **left_padded(2, 8), num_beams=4)


def test_left_padded_batch_of_three(llama):
    assert_same(llama, **left_padded(3, 8))


def test_inputs_embeds(llama):
    embeddings = llama.local.get_input_embeddings()(random_ids(2, 8)).detach()
    assert_same(llama, inputs_embeds=embeddings)


def test_inputs_embeds_padded(llama):
    padded = left_padded(2, 8)
    embeddings = llama.local.get_input_embeddings()(padded["input_ids"]).detach()
    assert_same(llama, inputs_embeds=embeddings, attention_mask=padded["attention_mask"])


class Collector:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_a_streamer_sees_every_token(llama):
    collector = Collector()
    result = generate(llama.remote, random_ids(1, 8), streamer=collector)
    assert collector.tokens == result[0].tolist() and collector.ended


class StopAt(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length, dtype=torch.bool)


def test_stopping_criteria(llama):
    result = assert_same(llama, random_ids(2, 8), stopping_criteria=StoppingCriteriaList([StopAt(13)]))
    assert result.shape == (2, 13)


def test_end_of_sequence_token(llama):
    ids = random_ids(2, 8)
    token = int(generate(llama.local, ids)[0, 12])
    result = assert_same(llama, ids, eos_token_id=token, pad_token_id=0, max_new_tokens=30)
    assert (result[0, 8:] == token).any()


def test_output_hidden_states_at_the_client(llama):
    ids = random_ids(2, 9)
    with torch.no_grad():
        ours = llama.remote(ids, output_hidden_states=True).hidden_states
        theirs = llama.local(ids, output_hidden_states=True).hidden_states
        none = llama.remote(ids).hidden_states
    assert len(ours) == 2 and none is None
    assert (ours[0] - theirs[0]).abs().max() <= 1e-5 and (ours[-1] - theirs[-1]).abs().max() <= 1e-5


def test_output_scores(llama):
    options = {"output_scores": True, "return_dict_in_generate": True}
    ours, theirs = (generate(model, random_ids(1, 8), **options) for model in (llama.remote, llama.local))
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all((mine - other).abs().max() <= 1e-5 for mine, other in zip(ours.scores, theirs.scores, strict=True))


def test_prompt_lookup_decoding(llama):
    ids = random_ids(1, 6).repeat(1, 4)
    result = generate(llama.remote, ids, prompt_lookup_num_tokens=3, max_new_tokens=20)
    assert torch.equal(result, generate(llama.local, ids, max_new_tokens=20))


def test_assisted_by_a_local_model(llama, tiny_model):
    assistant = load_local(tiny_model("llama", num_hidden_layers=1))
    result = generate(llama.remote, random_ids(1, 8), assistant_model=assistant)
    assert torch.equal(result, generate(llama.local, random_ids(1, 8)))


def test_assisted_by_the_model_itself(llama):
    """Every guess is right, so that every rollback is by one token at most."""
    result = generate(llama.remote, random_ids(1, 8), assistant_model=llama.local, max_new_tokens=20)
    assert torch.equal(result, generate(llama.local, random_ids(1, 8), max_new_tokens=20))


def test_without_a_cache(llama):
    assert_same(llama, random_ids(1, 8), use_cache=False, max_new_tokens=4)


def test_threads_that_generate_at_once_each_get_their_own(llama):
    prompts = [random_ids(1 + number % 2, 5 + number, seed=number) for number in range(6)]
    wanted = [generate(llama.local, prompt) for prompt in prompts]
    results: list[Any] = [None] * len(prompts)

    def work(number: int) -> None:
        results[number] = generate(llama.remote, prompts[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert all(result is not None and torch.equal(result, want) for result, want in zip(results, wanted, strict=True))


def test_two_clients_at_once(llama, swarms):
    other = swarms.join(llama.swarm, llama.path)
    with llama.remote.inference_session(max_length=64), other.inference_session(max_length=64):
        for turn in range(2):
            ids = random_ids(1, 4, seed=turn)
            assert torch.equal(generate(llama.remote, ids, max_new_tokens=2), generate(other, ids, max_new_tokens=2))


def test_bf16_servers_are_close_to_the_fp32_model(swarms):
    swarm, path = swarms.get(ranges=((0, 3), (3, 6)), dtype="bfloat16")
    remote, local = swarms.join(swarm, path), load_local(path)
    ids = random_ids(2, 12)
    with torch.no_grad():
        ours, theirs = remote(ids).logits, local(ids).logits
    assert ours.dtype == torch.float32
    assert (ours - theirs).abs().max() <= 0.06 * theirs.abs().max()
    assert generate(remote, ids).shape == (2, 12 + NUM_TOKENS)


def test_the_base_model(llama, swarms):
    remote = swarms.join(llama.swarm, llama.path, AutoDistributedModel)
    ids = random_ids(2, 7)
    with torch.no_grad():
        ours, theirs = remote(ids, output_hidden_states=True), llama.local.model(ids, output_hidden_states=True)
    assert (ours.last_hidden_state - theirs.last_hidden_state).abs().max() <= 1e-5
    assert (ours.hidden_states[0] - theirs.hidden_states[0]).abs().max() <= 1e-5


def test_the_config_needs_no_swarm(llama):
    config = AutoDistributedConfig.from_pretrained(str(llama.path))
    assert config.num_hidden_layers == 6 and config.vocab_size == VOCAB


def test_a_prompt_longer_than_servers_allow_is_refused_and_the_next_one_works(llama):
    with pytest.raises(PromptTooLong), llama.remote.inference_session(max_length=16):
        generate(llama.remote, random_ids(1, 17))
    assert_same(llama, random_ids(1, 8))
