"""What the scheduler knows of time: what an iteration costs, and when sessions send their next step.

Both learn from what they are told; neither reads a clock.
"""

from __future__ import annotations

import bisect
import collections
import math
from collections.abc import Hashable
from dataclasses import dataclass

SAMPLES = 7
"""An estimate is the median of so many of the latest iterations of about the same size."""

TRUSTED_SAMPLES = 3
"""A median of fewer yields to what other sizes say."""


class CostModel:
    """How long an iteration takes, by the number of its tokens (rows times length, over all its pieces).

    Keeps the latest iterations by size, in half octaves, and interpolates between their medians. A curve, not a
    line: a CPU's cost is flat up to about 8 tokens and then climbs faster than a line through both would tell.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, collections.deque[tuple[float, int]]] = {}
        self._curve: list[tuple[int, float]] = []
        self._looked_up: dict[int, float] = {}

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Learn from an iteration that ran."""
        if num_tokens < 1 or not 0 < seconds < math.inf:
            return
        size = int(2 * math.log2(num_tokens))
        samples = self._sizes.pop(size, None) or collections.deque(maxlen=SAMPLES)
        samples.append((seconds, num_tokens))
        self._sizes[size] = samples  # the size seen last comes last
        self._curve = _consistent([*self._sizes.values()])
        self._looked_up.clear()

    def iteration_s(self, num_tokens: int) -> float:
        """Return how long an iteration of so many tokens takes; 0.0 as long as none was observed.

        Outside of what was observed, in proportion: a small iteration is never overrated, nor a large one underrated.
        """
        seconds = self._looked_up.get(num_tokens)
        if seconds is None:
            seconds = self._looked_up[num_tokens] = self._look_up(num_tokens)
        return seconds

    def _look_up(self, num_tokens: int) -> float:
        if not self._curve:
            return 0.0
        at = bisect.bisect_left(self._curve, num_tokens, key=lambda point: point[0])
        if at == 0 or at == len(self._curve):
            tokens, seconds = self._curve[min(at, len(self._curve) - 1)]
            return seconds * num_tokens / tokens
        (left, left_s), (right, right_s) = self._curve[at - 1 : at + 1]
        return left_s + (right_s - left_s) * (num_tokens - left) / (right - left)

    def tokens_within(self, seconds: float) -> int:
        """Return the most tokens whose iteration takes at most `seconds`; 0 as long as none was observed."""
        if not self._curve:
            return 0
        at = bisect.bisect_right(self._curve, seconds, key=lambda point: point[1])
        if at == 0 or at == len(self._curve):
            tokens, point_s = self._curve[min(at, len(self._curve) - 1)]
            return int(tokens * seconds / point_s)
        (left, left_s), (right, right_s) = self._curve[at - 1 : at + 1]
        return left + int((right - left) * (seconds - left_s) / (right_s - left_s))

    def saving_s(self, num_tokens: int, more_tokens: int) -> float:
        """Return what it saves to run two lots of tokens in one iteration instead of two; never negative."""
        apart_s = self.iteration_s(num_tokens) + self.iteration_s(more_tokens)
        return max(0.0, apart_s - self.iteration_s(num_tokens + more_tokens))


def _consistent(sizes: list[collections.deque[tuple[float, int]]]) -> list[tuple[int, float]]:
    """Return (tokens, seconds) by tokens: more tokens take no less time, and no more time per token.

    Where medians contradict that, the size seen last is believed (noise, or the machine has become slower or faster).
    """
    curve: list[tuple[int, float]] = []
    for samples in sorted(reversed(sizes), key=lambda samples: len(samples) < TRUSTED_SAMPLES):
        seconds, tokens = sorted(samples)[len(samples) // 2]
        low = max((s if t <= tokens else s * tokens / t for t, s in curve), default=0.0)
        high = min((s * tokens / t if t <= tokens else s for t, s in curve), default=math.inf)
        curve.append((tokens, min(max(seconds, low), high)))
    return sorted(curve)


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


MEAN_WEIGHT, DEVIATION_WEIGHT = 1 / 8, 1 / 4
"""Weights of a new sample, those of TCP's round-trip estimate (RFC 6298, section 2)."""

DEVIATIONS = 2.0
"""A step is overdue so many mean deviations after its usual time."""

LEAST_S = 0.001
"""Return times are not told apart more finely."""

OUTLIER = 4.0
"""A longer time than so many usual ones counts as just that: somebody paused."""

IDLE_S = 1.0
"""A session silent for longer than this, and than OUTLIER usual times, is not decoding at present."""


@dataclass(slots=True)
class _Return:
    mean_s: float | None = None
    deviation_s: float = 0.0
    left_s: float | None = None
    next: Expected | None = None
    idle_from_s: float = math.inf

    def leave(self, num_rows: int, now_s: float) -> None:
        self.left_s = now_s
        if self.mean_s is not None:
            until_s = now_s + self.mean_s + max(DEVIATIONS * self.deviation_s, LEAST_S)
            self.next = Expected(now_s + self.mean_s, until_s, num_rows, self.mean_s)
            self.idle_from_s = now_s + max(IDLE_S, self._usual_most_s(self.mean_s))

    def come_back(self, now_s: float) -> None:
        if self.left_s is not None:
            self._learn(max(0.0, now_s - self.left_s))
        self.left_s = self.next = None

    def _learn(self, sample_s: float) -> None:
        if self.mean_s is None:
            self.mean_s, self.deviation_s = sample_s, sample_s / 2
            return
        error_s = min(sample_s, self._usual_most_s(self.mean_s)) - self.mean_s
        self.deviation_s += DEVIATION_WEIGHT * (abs(error_s) - self.deviation_s)
        self.mean_s += MEAN_WEIGHT * error_s

    def _usual_most_s(self, mean_s: float) -> float:
        return OUTLIER * max(mean_s + self.deviation_s, LEAST_S)


class ReturnTimes:
    """When the sessions' next decode steps come: per session, mean and deviation of the time from output to step."""

    def __init__(self) -> None:
        self._sessions: dict[Hashable, _Return] = {}

    def left(self, session: Hashable, num_rows: int, now_s: float) -> None:
        """An output of the session (of a decode step, or of the end of a prefill) has left the engine."""
        self._sessions.setdefault(session, _Return()).leave(num_rows, now_s)

    def returned(self, session: Hashable, now_s: float) -> float | None:
        """The session's next step has come. Returns its usual return time, None if nothing is known of it yet."""
        state = self._sessions.get(session)
        if state is None:
            return None
        state.come_back(now_s)
        return state.mean_s

    def forget(self, session: Hashable) -> None:
        """The session was closed."""
        self._sessions.pop(session, None)

    def expected(self, now_s: float) -> tuple[Expected, ...]:
        """Return the steps to come, overdue ones included until their session counts as idle."""
        sessions = self._sessions.values()
        return tuple([each.next for each in sessions if each.next is not None and now_s < each.idle_from_s])
