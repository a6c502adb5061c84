"""How far speculative decoding looks ahead: near the best fixed length, whatever steps cost and guesses are worth."""

from __future__ import annotations

import random

import pytest
import torch

from swarm.client.drafts import AdaptiveDrafts, DraftLength

MOST = 10


def seconds(num_drafted: int, base_s: float, token_s: float) -> float:
    return base_s + num_drafted * token_s


def rate(share: float, base_s: float, token_s: float, fixed: int | None = None, seed: int = 0) -> float:
    """Tokens per second of a generation of 2000 steps."""
    rng, length = random.Random(seed), DraftLength(MOST)
    total_s, num_tokens = 0.0, 0
    for _ in range(2000):
        number = length.choose() if fixed is None else fixed
        right = 0
        while right < number and rng.random() < share:
            right += 1
        step_s = seconds(number, base_s, token_s) * rng.uniform(0.95, 1.05)
        length.observe(number, right, step_s)
        total_s, num_tokens = total_s + step_s, num_tokens + right + 1
    return num_tokens / total_s


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("token_s", [0.0, 0.01, 0.1])
def test_drafts_are_about_as_long_as_the_best_fixed_length(share, token_s):
    best = max(rate(share, 0.2, token_s, fixed) for fixed in range(MOST + 1))
    found = rate(share, 0.2, token_s)
    assert found >= 0.9 * best
    assert found >= 0.95 * rate(share, 0.2, token_s, fixed=0)


def test_at_first_much_is_drafted_and_never_more_than_may_be():
    assert DraftLength(MOST).choose() > MOST / 2 and DraftLength(0).choose() == 0


def test_drafting_is_tried_again_when_guesses_get_better():
    length = DraftLength(MOST)
    for _ in range(100):
        length.observe(number := length.choose(), 0, 0.1 + 0.05 * number)
    drafted = []
    for _ in range(200):
        drafted.append(number := length.choose())
        length.observe(number, number, 0.1 + 0.05 * number)
    assert drafted[0] == 0 and drafted[-1] == MOST


class Lookup:
    """Drafts as many tokens as it is told to."""

    num_output_tokens = 4
    asked: int = 0

    def get_candidates(self, input_ids):
        self.asked += 1
        return torch.cat([input_ids, torch.full((1, self.num_output_tokens), 7)], dim=1), None

    def update_candidate_strategy(self, input_ids, scores, num_matches):
        pass


def test_where_guesses_are_wrong_and_cost_time_hardly_any_are_asked_for(monkeypatch):
    now_s = 0.0
    monkeypatch.setattr("swarm.client.drafts.time.monotonic", lambda: now_s)
    lookup, ids = Lookup(), torch.zeros(1, 3, dtype=torch.int64)
    drafts = AdaptiveDrafts(lookup)
    for _ in range(100):
        candidates, _ = drafts.get_candidates(ids)
        now_s += 0.1 * (candidates.shape[1] - 2)
        drafts.update_candidate_strategy(candidates, None, 0)
    assert lookup.asked < 30
    assert drafts.num_output_tokens == lookup.num_output_tokens and not drafts.requires_model_outputs


class Assistant(Lookup):
    """A model that drafts, and takes its time."""

    num_output_tokens = None
    num_assistant_tokens = 4


def test_a_drafting_model_drafts_in_every_step_and_its_time_counts(monkeypatch):
    now_s = 0.0
    monkeypatch.setattr("swarm.client.drafts.time.monotonic", lambda: now_s)

    class Slow(Assistant):
        def get_candidates(self, input_ids):
            nonlocal now_s
            now_s += 0.1 * self.num_assistant_tokens
            self.asked += 1
            return torch.cat([input_ids, torch.full((1, self.num_assistant_tokens), 7)], dim=1), None

    assistant, ids, drafted = Slow(), torch.zeros(1, 3, dtype=torch.int64), []
    drafts = AdaptiveDrafts(assistant)
    for step in range(100):
        candidates, _ = drafts.get_candidates(ids)
        drafted.append(candidates.shape[1] - 3)
        now_s += 0.1
        drafts.update_candidate_strategy(candidates, None, drafted[-1] if step % 2 else 0)
    assert assistant.asked == 100 and set(drafted[-20:]) == {1}
