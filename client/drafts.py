"""How far speculative decoding looks ahead: as far as pays, given how long steps take and how often guesses are right.

The library drafts tokens (with a smaller model, or by looking them up in the prompt) and lets the model check them in
one step. Over a slow link a step of ten tokens takes hardly longer than one of a single token; on a loaded processor it
may take three times as long, and the guesses may all be wrong.
"""

from __future__ import annotations

import operator
import time
from typing import Any

from torch import Tensor
from transformers.generation.candidate_generator import CandidateGenerator

MEMORY = 0.9
"""How much of what was seen before counts after a further step."""

PRIOR_GUESSES, PRIOR_RIGHT = 2.0, 1.5
"""What is assumed at first, as if that many guesses had been seen."""

PRIOR_COST = 0.02
"""What a drafted token is taken to cost as long as all steps had the same length, as a share of a step."""

TIME_WEIGHT = 0.3
"""How much a new step counts among those of its length."""

TIME_MEMORY = 0.97
"""How much less what was seen of one length counts with every step of another."""

PROBE_STEPS = 16
"""Where drafting does not pay, one token is drafted every so many steps, to see whether it would by now."""


class DraftLength:
    """Chooses how many tokens to draft."""

    def __init__(self, most: int, least: int = 0) -> None:
        self._most, self._least = most, min(least, most)
        self._guesses, self._right = PRIOR_GUESSES, PRIOR_RIGHT
        self._times: dict[int, tuple[float, int]] = {}
        """Tokens drafted -> seconds of such steps, and the number of the last one."""
        self._num_steps = self._steps_without = 0

    def choose(self) -> int:
        """How many tokens to draft for the next step, `least` to `most`.

        With a share p of guesses right, a step with n drafted tokens gives 1 + p + … + p^n tokens.
        """
        if len(self._times) == 1 and self._most // 2 not in self._times:
            return max(self._least, self._most // 2)  # what a drafted token costs is not to be seen from one length
        share = self._right / self._guesses
        base_s, token_s = self._line()
        expected, best, best_rate = 1.0, 0, 1.0 / base_s
        power = 1.0
        for number in range(1, self._most + 1):
            power *= share
            expected += power
            rate = expected / (base_s + number * token_s)
            if rate > best_rate:
                best, best_rate = number, rate
        if best == 0 and self._most and self._steps_without >= PROBE_STEPS:
            return 1
        return max(best, self._least)

    def observe(self, num_drafted: int, num_right: int, seconds: float) -> None:
        """Note what came of a step, and how long it took."""
        self._steps_without = 0 if num_drafted else self._steps_without + 1
        if num_drafted:
            tried = num_right + (num_right < num_drafted)  # those after the first wrong one say nothing
            self._guesses = MEMORY * (self._guesses - PRIOR_GUESSES) + tried + PRIOR_GUESSES
            self._right = MEMORY * (self._right - PRIOR_RIGHT) + num_right + PRIOR_RIGHT
        self._num_steps += 1
        before_s, _ = self._times.get(num_drafted, (seconds, 0))
        self._times[num_drafted] = (before_s + TIME_WEIGHT * (seconds - before_s), self._num_steps)

    def _line(self) -> tuple[float, float]:
        """Seconds of a step without drafts, and of each drafted token: the straight line next to what was seen."""
        if not self._times:
            return 1.0, PRIOR_COST
        weights = [TIME_MEMORY ** (self._num_steps - last) for _, last in self._times.values()]
        mean = sum(map(operator.mul, weights, self._times)) / sum(weights)
        mean_s = sum(weight * seconds for weight, (seconds, _) in zip(weights, self._times.values(), strict=True))
        mean_s /= sum(weights)
        spread = together = 0.0
        for weight, (number, (seconds, _)) in zip(weights, self._times.items(), strict=True):
            spread += weight * (number - mean) ** 2
            together += weight * (number - mean) * (seconds - mean_s)
        token_s = max(0.0, together / spread) if spread > 0 else PRIOR_COST * mean_s
        return max(mean_s - mean * token_s, mean_s / 100), token_s


class AdaptiveDrafts(CandidateGenerator):
    """One of the library's candidate generators, told before each step how many tokens to draft."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator
        self._limit_name = next(
            (name for name in ("num_assistant_tokens", "num_output_tokens") if hasattr(generator, name)), None
        )
        self._most = int(getattr(generator, self._limit_name)) if self._limit_name else 0
        # A drafting model keeps a cache, which the library cuts back by one step at a time: it drafts in each of them.
        self._length = DraftLength(self._most, least=int(self._limit_name == "num_assistant_tokens"))
        self._num_drafted, self._began_s, self._is_first = 0, 0.0, True

    @property
    def requires_model_outputs(self) -> bool:
        return bool(getattr(self._generator, "requires_model_outputs", False))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)

    def get_candidates(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """See the library's."""
        self._began_s = time.monotonic()
        candidates, scores = input_ids, None
        wanted = self._length.choose()
        if self._limit_name is None:
            candidates, scores = self._generator.get_candidates(input_ids, *args, **kwargs)
        elif wanted:
            setattr(self._generator, self._limit_name, wanted)
            candidates, scores = self._generator.get_candidates(input_ids, *args, **kwargs)
        self._num_drafted = candidates.shape[1] - input_ids.shape[1]
        return candidates, scores

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """See the library's."""
        seconds = time.monotonic() - self._began_s
        if not self._is_first:  # which carries the prompt
            self._length.observe(self._num_drafted, min(int(num_matches), self._num_drafted), seconds)
        self._is_first = False
        if self._num_drafted:
            self._generator.update_candidate_strategy(input_ids, scores, num_matches)
