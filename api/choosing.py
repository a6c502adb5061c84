"""Which token comes next: what a request asks for, on top of what the model's own generation config asks for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LogitsProcessor

# V vocabulary, T tokens so far

MAX_SEED = 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the tokens of a choice are chosen."""

    temperature: float = 1.0
    """0: the likeliest token."""
    top_p: float = 1.0
    """Only the likeliest tokens that reach this probability together."""
    top_k: int = 0
    """Only so many of the likeliest; 0: all."""
    presence_penalty: float = 0.0
    """Taken from the logit of each token that the answer holds."""
    frequency_penalty: float = 0.0
    """The same for each time that it does."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of tokens, by their ids."""
    seed: int | None = None
    num_top_logprobs: int | None = None
    """How many of the likeliest tokens are told with each one; None: no log probabilities at all."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A token and, where they are wanted, log probabilities."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens, whichever was taken."""


class Chooser(LogitsProcessor):
    """Chooses each token in the place of the library, which has one random generator for all threads.

    It comes after the library's own processors and leaves one token possible. Log probabilities are those of what it
    gets: before bias, penalties and temperature.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed % MAX_SEED)
        self._counts: Counter[int] = Counter()
        self.chosen = Chosen(-1)
        """The token of the last step."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Choose from scores [1, V]. Returns: scores that leave one token."""
        logits_V = scores[0].float().cpu()
        token_id = self._choose(self._adjusted(logits_V))
        self._counts[token_id] += 1
        self.chosen = self._described(token_id, logits_V)
        only = torch.full_like(scores, float("-inf"))
        only[0, token_id] = 0.0
        return only

    def _adjusted(self, logits_V: Tensor) -> Tensor:
        sampling, adjusted_V = self._sampling, logits_V
        penalizes = bool(sampling.presence_penalty or sampling.frequency_penalty)
        if sampling.logit_bias or (penalizes and self._counts):
            adjusted_V = logits_V.clone()
        if sampling.logit_bias:
            adjusted_V[list(sampling.logit_bias)] += torch.tensor(list(sampling.logit_bias.values()))
        if penalizes and self._counts:
            counts = torch.tensor(list(self._counts.values()), dtype=torch.float32)
            adjusted_V[list(self._counts)] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        return adjusted_V

    def _choose(self, logits_V: Tensor) -> int:
        sampling = self._sampling
        if sampling.temperature == 0 or sampling.top_k == 1 or sampling.top_p == 0:
            return int(logits_V.argmax())
        ids = None
        logits_V = logits_V / sampling.temperature
        if 0 < sampling.top_k < len(logits_V):
            logits_V, ids = logits_V.topk(sampling.top_k)
        elif sampling.top_p < 1:
            logits_V, ids = logits_V.sort(descending=True)
        probabilities = logits_V.softmax(dim=-1)
        if sampling.top_p < 1:
            before = probabilities.cumsum(dim=-1) - probabilities
            probabilities[before >= sampling.top_p] = 0.0
        place = int(torch.multinomial(probabilities, 1, generator=self._generator))
        return place if ids is None else int(ids[place])

    def _described(self, token_id: int, logits_V: Tensor) -> Chosen:
        if self._sampling.num_top_logprobs is None:
            return Chosen(token_id)
        logprobs_V = logits_V.log_softmax(dim=-1)
        return described(token_id, logprobs_V, self._sampling.num_top_logprobs)


def described(token_id: int, logprobs_V: Tensor, num_top: int) -> Chosen:
    """A token with its log probability and those of the likeliest ones."""
    values, ids = logprobs_V.topk(num_top)
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Chosen(token_id, float(logprobs_V[token_id]), top)
