"""What the scheduler knows of time: what an iteration costs, and when sessions send their next step.

Both learn from what they are told; neither reads a clock.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass


class CostModel:
    """How long an iteration takes, by the number of its tokens (rows times length, over all its pieces)."""

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Learn from an iteration that ran."""

    def iteration_s(self, num_tokens: int) -> float:
        """Return how long an iteration of so many tokens takes; 0.0 as long as none was observed."""
        raise NotImplementedError

    def tokens_within(self, seconds: float) -> int:
        """Return the most tokens whose iteration takes at most `seconds`."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Expected:
    """A decode step that a session, whose last output has left, will send."""

    at_s: float
    """When it usually would come, absolute."""
    until_s: float
    """When it is overdue, absolute: from then on nobody waits for it."""
    num_rows: int
    return_s: float
    """How long the session usually takes from output to next step."""


class ReturnTimes:
    """When the sessions' next decode steps come: per session, mean and deviation of the time from output to step."""

    def left(self, session: Hashable, num_rows: int, now_s: float) -> None:
        """An output of the session (of the last prefill chunk, or of a decode step) has left the engine."""

    def returned(self, session: Hashable, now_s: float) -> float | None:
        """The session's next step has come. Returns its usual return time, None if this was its first."""
        raise NotImplementedError

    def forget(self, session: Hashable) -> None:
        """The session was closed."""

    def expected(self, now_s: float) -> tuple[Expected, ...]:
        """Return the steps to come, overdue ones included until their session counts as idle."""
        raise NotImplementedError
