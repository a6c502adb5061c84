"""When a step takes too long, and what to do about it: a second one is started elsewhere, and the first answer counts.

How long is too long is learned from the times of earlier steps; how often a session may do it is bounded by what it
has been fed. Both are plain arithmetic on times and counts that the caller names.
"""

from __future__ import annotations

GAIN, DEVIATION_GAIN, DEVIATIONS = 1 / 8, 1 / 4, 4
"""How the bound follows the times: a smoothed mean and a smoothed deviation, as TCP's retransmission timer has them
(RFC 6298, section 2)."""

FLOOR_S = 0.5
"""No bound is shorter: a replay costs about as much, and every machine has its bad moments."""

FEW_TOKENS = 16
"""Steps of up to so many tokens per sequence are taken to be alike; of longer ones, the time per token is learned."""

LONGER = 3.0
"""A long step may take so many times what its tokens have taken so far."""

PATIENCE_S = 5.0
"""The least that a step may take before it is fed elsewhere over budget: its server answers, and does not compute."""


class StepTimes:
    """How long the steps of one route take, or the batches of one server."""

    def __init__(self) -> None:
        self._mean_s: float | None = None
        self._deviation_s = 0.0
        self._token_s = 0.0
        """The longest that a token of a long step took, forgotten little by little."""

    def took(self, num_tokens: int, seconds: float) -> None:
        """Note how long a step of so many tokens per sequence took."""
        if num_tokens > FEW_TOKENS:
            token_s = seconds / num_tokens
            self._token_s = max(token_s, self._token_s + GAIN * (token_s - self._token_s))
        elif self._mean_s is None:
            self._mean_s, self._deviation_s = seconds, seconds / 2
        else:
            self._deviation_s += DEVIATION_GAIN * (abs(seconds - self._mean_s) - self._deviation_s)
            self._mean_s += GAIN * (seconds - self._mean_s)

    def bound_s(self, num_tokens: int) -> float | None:
        """How long a step of so many tokens should take at most; None: nothing is known of such steps."""
        short_s = 0.0 if self._mean_s is None else self._mean_s + DEVIATIONS * self._deviation_s
        if num_tokens <= FEW_TOKENS:
            return None if self._mean_s is None else max(FLOOR_S, short_s)
        return max(FLOOR_S, short_s + LONGER * num_tokens * self._token_s) if self._token_s else None


class Hedges:
    """How much a session may spend on second chances: in a hurry never more tokens than it has been fed.

    One that was answered first was worth its cost and is not counted. Each that was not doubles the bound of the
    next, until one is. What is over budget has to wait for `PATIENCE_S`, so that nobody waits for ever either.
    """

    def __init__(self) -> None:
        self._fed_tokens = 0
        self._spent_tokens = 0
        self._num_lost = 0

    def fed(self, num_tokens: int) -> None:
        self._fed_tokens += num_tokens

    def after_s(self, bound_s: float, num_tokens: int, number: int = 1) -> float:
        """How long to wait before so many tokens are fed elsewhere as well.

        Args:
            number: 1 for the first chance besides the step itself; they are counted for each step.
        """
        is_in_budget = self._spent_tokens + number * num_tokens <= self._fed_tokens
        return max(bound_s, 0.0 if is_in_budget else PATIENCE_S) * 2.0 ** min(self._num_lost + number - 1, 20)

    def ended(self, num_tokens: int, *, won: bool) -> None:
        """Note that so many tokens were fed elsewhere, and whether that gave the answer."""
        self._num_lost = 0 if won else self._num_lost + 1
        self._spent_tokens += 0 if won else num_tokens
