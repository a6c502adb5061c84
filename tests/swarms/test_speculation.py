"""Drafted tokens save round trips where text repeats itself, and none of their own where it does not.

Over a slow line a generation takes as long as its round trips, so these are what is counted; the drafts' clock says
that each takes a tenth of a second, whatever it carries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from swarm import EMBEDDED_MODEL, AutoDistributedModelForCausalLM
from swarm.client.session import InferenceSession
from swarm.server import LocalSwarm

ROUND_TRIP_S = 0.1
NUM_TOKENS = 48

Count = Callable[..., tuple[torch.Tensor, int, int]]


@pytest.fixture(scope="module")
def models() -> Iterator[tuple[Any, Any]]:
    """The embedded model, whole and over three servers."""
    local = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32).eval()
    with LocalSwarm(EMBEDDED_MODEL, [(0, 2), (2, 4), (4, 6)], dtype="float32", in_process=True) as swarm:
        remote = AutoDistributedModelForCausalLM.from_pretrained(EMBEDDED_MODEL, join=swarm.link, dtype="float32")
        yield local, remote
        remote.close()


@pytest.fixture
def count(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> Count:
    """Generates over the swarm: the text, the round trips that it took, and the tokens that these carried."""
    sent: list[int] = []
    step = InferenceSession.step

    def noted(self: InferenceSession, x_BLD: torch.Tensor, **options: Any) -> torch.Tensor:
        sent.append(x_BLD.shape[1])
        return step(self, x_BLD, **options)

    monkeypatch.setattr(InferenceSession, "step", noted)
    clock = SimpleNamespace(monotonic=lambda: ROUND_TRIP_S * len(sent))
    monkeypatch.setattr("swarm.client.drafts.time", clock)

    def run(ids: torch.Tensor, **options: Any) -> tuple[torch.Tensor, int, int]:
        sent.clear()
        options = {"do_sample": False, "max_new_tokens": NUM_TOKENS, "min_new_tokens": NUM_TOKENS} | options
        return models[1].generate(ids, **options), len(sent), sum(sent[1:])

    return run


def greedy(local: Any, ids: torch.Tensor, num_tokens: int) -> torch.Tensor:
    return local.generate(ids, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False)


@pytest.fixture(scope="module", params=["The first argument", "import os", "If the value is"])
def circling(models: tuple[Any, Any], request: pytest.FixtureRequest) -> torch.Tensor:
    """A text that the model goes on with by saying the same over and over."""
    ids = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)(request.param, return_tensors="pt")["input_ids"]
    return greedy(models[0], ids, 260)


def test_where_text_repeats_itself_looking_it_up_halves_the_round_trips(models, count, circling):
    text, plain, _ = count(circling)
    drafted, fewer, _ = count(circling, prompt_lookup_num_tokens=10)
    assert plain == NUM_TOKENS and fewer <= plain / 2
    assert torch.equal(text, drafted) and torch.equal(text, greedy(models[0], circling, NUM_TOKENS))


def test_a_model_that_guesses_right_halves_the_round_trips(models, count, circling):
    drafted, fewer, _ = count(circling, assistant_model=models[0])
    assert fewer <= NUM_TOKENS / 2
    assert torch.equal(drafted, greedy(models[0], circling, NUM_TOKENS))


@pytest.mark.parametrize("num_different", [6, 4096])
def test_where_tokens_are_random_no_round_trip_is_added_and_hardly_a_token(count, num_different):
    ids = torch.randint(0, num_different, (1, 64)) + (0 if num_different == 4096 else 100)
    hot = {"do_sample": True, "temperature": 50.0, "top_k": 0, "prompt_lookup_num_tokens": 10}
    _, num_steps, num_sent = count(ids, **hot)
    assert num_steps <= NUM_TOKENS and num_sent <= 2 * NUM_TOKENS
