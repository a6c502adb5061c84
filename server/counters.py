"""What an engine has done, counted as it happens: tokens, passes, and how long work waited for its turn.

One engine writes, in its compute thread; whoever reads gets values that do not change any more.
"""

from __future__ import annotations

import bisect
import collections
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .scheduler import Kind

TIME_BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Upper bounds of the buckets that times are counted in."""

RATE_S = 10.0
"""Rates are averages in which what is so long ago counts 1/e."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """How often values were at most each bound, and above the one before it."""

    bounds: tuple[float, ...] = TIME_BOUNDS_S
    counts: tuple[int, ...] = (0,) * (len(TIME_BOUNDS_S) + 1)
    """One for each bound, and one for what lies above the last."""
    total: float = 0.0
    """Sum of the values."""

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self.counts)

    def quantile(self, share: float) -> float:
        """The bound below which at least this share of the values lies; 0 of none, infinite above the last bound."""
        missing = share * self.count
        if not missing:
            return 0.0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            missing -= count
            if missing <= 1e-9:
                return bound
        return math.inf

    def num_above(self, bound: float) -> int:
        """How many values lay above one of the bounds."""
        return sum(self.counts[self.bounds.index(bound) + 1 :])

    def plus(self, other: Histogram) -> Histogram:
        """Both together; their bounds are the same."""
        counts = tuple(ours + theirs for ours, theirs in zip(self.counts, other.counts, strict=True))
        return Histogram(self.bounds, counts, self.total + other.total)

    def since(self, before: Histogram) -> Histogram:
        """What has come since an earlier one."""
        counts = tuple(now - then for now, then in zip(self.counts, before.counts, strict=True))
        return Histogram(self.bounds, counts, self.total - before.total)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCounters:
    """What the engine has done since its start."""

    num_iterations: int = 0
    num_decode_tokens: int = 0
    num_prefill_tokens: int = 0
    num_training_tokens: int = 0
    num_shared_passes: int = 0
    """Iterations that carried steps of more than one session."""
    num_held: int = 0
    """Times that steps were held for others to come."""
    iteration_s: float = 0.0
    training_s: float = 0.0
    num_out_of_pages: int = 0
    """Steps that found no free pages."""
    num_given_up: int = 0
    """Those for which none came free in time."""
    num_sent_away: int = 0
    """Sessions that had to leave their pages to older ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatistics:
    """One moment of an engine."""

    started_at_s: float
    """On the monotonic clock; what is counted begins then."""
    queue_length: int
    """Steps and batches that wait."""
    oldest_wait_s: float
    """For how long the step has waited that has waited longest; 0: none waits."""
    counters: EngineCounters
    batch_sizes: Mapping[int, int]
    """Decode steps in one iteration -> how often."""
    queue_s: Mapping[Kind, Histogram]
    """From the arrival of a step or batch to the beginning of its first pass."""
    pass_s: Mapping[Kind, Histogram]
    """Of iterations with decode steps alone, and of those that carried some prefill."""
    tokens_per_s: Mapping[Kind, float]
    """Lately: averages over about RATE_S."""

    @property
    def step_queue_s(self) -> Histogram:
        """Of steps of either kind."""
        return self.queue_s[Kind.DECODE].plus(self.queue_s[Kind.PREFILL])


class _Buckets:
    """A histogram that grows."""

    def __init__(self) -> None:
        self._counts = [0] * (len(TIME_BOUNDS_S) + 1)
        self._total = 0.0

    def note(self, seconds: float) -> None:
        self._counts[bisect.bisect_left(TIME_BOUNDS_S, seconds)] += 1
        self._total += seconds

    def read(self) -> Histogram:
        return Histogram(TIME_BOUNDS_S, tuple(self._counts), self._total)


class _Rate:
    """How much of something comes in a second."""

    def __init__(self) -> None:
        self._amount = 0.0
        self._at_s = -math.inf

    def note(self, amount: float, now_s: float) -> None:
        self._amount, self._at_s = RATE_S * self.per_s(now_s) + amount, now_s

    def per_s(self, now_s: float) -> float:
        return self._amount * math.exp((self._at_s - now_s) / RATE_S) / RATE_S


class EngineRecord:
    """What an engine notes of itself. Every call is made under the engine's guard."""

    def __init__(self, now_s: float) -> None:
        self._started_at_s = now_s
        self._counters = EngineCounters()
        self._batch_sizes: collections.Counter[int] = collections.Counter()
        self._queue_s = {kind: _Buckets() for kind in Kind}
        self._pass_s = {kind: _Buckets() for kind in (Kind.DECODE, Kind.PREFILL)}
        self._rates = {kind: _Rate() for kind in Kind}

    def read(self, now_s: float, *, queue_length: int, oldest_wait_s: float) -> EngineStatistics:
        """All of it, as it is now."""
        return EngineStatistics(
            started_at_s=self._started_at_s,
            queue_length=queue_length,
            oldest_wait_s=oldest_wait_s,
            counters=self._counters,
            batch_sizes=dict(self._batch_sizes),
            queue_s={kind: each.read() for kind, each in self._queue_s.items()},
            pass_s={kind: each.read() for kind, each in self._pass_s.items()},
            tokens_per_s={kind: each.per_s(now_s) for kind, each in self._rates.items()},
        )

    def begun(self, kind: Kind, waited_s: float) -> None:
        """A step or batch that waited begins."""
        self._queue_s[kind].note(waited_s)

    def held(self) -> None:
        """Steps ran that had been held for others."""
        self._counters = replace(self._counters, num_held=self._counters.num_held + 1)

    def ran(
        self, decodes: Sequence[int], num_prefill_tokens: int, num_sessions: int, *, began_s: float, now_s: float
    ) -> None:
        """An iteration has ended.

        Args:
            decodes: tokens (one per row) of each decode step.
            num_sessions: of which it carried steps.
        """
        counters, num_decode_tokens = self._counters, sum(decodes)
        self._counters = replace(
            counters,
            num_iterations=counters.num_iterations + 1,
            num_shared_passes=counters.num_shared_passes + (num_sessions > 1),
            iteration_s=counters.iteration_s + now_s - began_s,
            num_decode_tokens=counters.num_decode_tokens + num_decode_tokens,
            num_prefill_tokens=counters.num_prefill_tokens + num_prefill_tokens,
        )
        self._pass_s[Kind.PREFILL if num_prefill_tokens else Kind.DECODE].note(now_s - began_s)
        self._rates[Kind.DECODE].note(num_decode_tokens, now_s)
        self._rates[Kind.PREFILL].note(num_prefill_tokens, now_s)
        if decodes:
            self._batch_sizes[len(decodes)] += 1

    def trained(self, num_tokens: int, seconds: float, now_s: float) -> None:
        """A batch has been computed, or has failed."""
        counters = self._counters
        self._counters = replace(
            counters,
            training_s=counters.training_s + seconds,
            num_training_tokens=counters.num_training_tokens + num_tokens,
        )
        self._rates[Kind.TRAINING].note(num_tokens, now_s)

    def out_of_pages(self) -> None:
        """A step has found no free pages, and waits."""
        self._counters = replace(self._counters, num_out_of_pages=self._counters.num_out_of_pages + 1)

    def gave_up(self) -> None:
        """None came free for it in time."""
        self._counters = replace(self._counters, num_given_up=self._counters.num_given_up + 1)

    def sent_away(self) -> None:
        """A session had to leave its pages to older ones."""
        self._counters = replace(self._counters, num_sent_away=self._counters.num_sent_away + 1)
