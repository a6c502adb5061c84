"""What a client has seen of its peers: failures, and how fast they really are. What was seen long ago counts less."""

from __future__ import annotations

import math
from dataclasses import dataclass

SLOW = 3.0
"""From so many times the announced time on a peer counts as slow; below it is taken at its word, for every machine has
its bad moments and announced rates are those of the last period."""

BATCH_SLOW = 1.5
"""The same for batches, which take so long that bad moments even out: they are shared by what was measured."""

MAX_FACTOR = 100.0
"""Slower than this makes no difference."""

SLACK_S = 0.020
"""A peer that takes less than this longer than announced is not slow."""

HALF_LIFE_S = 60.0
"""How fast it is forgotten that a peer was slow, or failed."""

LEAST_WEIGHT = 0.1
"""What is left of a failure that no longer counts."""

MAX_REMEMBERED = 1024

LEAST_BUSY_S = 0.1
"""A peer that has too many requests is left alone at least so long, whatever it says."""


@dataclass(slots=True)
class _Failures:
    """How often a peer failed, and until when it is avoided."""

    count: float
    """Those of long ago count less."""
    seen_at_s: float
    avoided_until_s: float

    def weight(self, now_s: float) -> float:
        weight: float = self.count * 2.0 ** ((self.seen_at_s - now_s) / HALF_LIFE_S)
        return weight


class FailureMemory:
    """Peers that failed lately, and until when they are avoided."""

    def __init__(self, avoid_s: float, max_avoid_s: float) -> None:
        self._avoid_s = avoid_s
        self._max_avoid_s = max_avoid_s
        self._failures: dict[str, _Failures] = {}

    def failed(self, peer_id: str, now_s: float) -> None:
        """Note a failure; while a peer goes on failing, it is avoided for longer and longer."""
        before = self._failures.get(peer_id)
        count = 1.0 if before is None else 1.0 + before.weight(now_s)
        avoided_s = min(self._max_avoid_s, self._avoid_s * 2 ** min(count - 1, 30))
        self._keep(peer_id, _Failures(count, now_s, now_s + avoided_s))

    def reached(self, peer_id: str) -> None:
        """A peer answers again, and need not be avoided; whether it does what it is asked will be seen."""
        if peer_id in self._failures:
            self._failures[peer_id].avoided_until_s = -math.inf

    def busy(self, peer_id: str, retry_after_s: float, now_s: float) -> None:
        """Leave a peer alone for as long as it says; it has not failed, so its failures stay as many as they are."""
        known = self._failures.get(peer_id) or _Failures(0.0, now_s, -math.inf)
        known.avoided_until_s = max(known.avoided_until_s, now_s + max(retry_after_s, LEAST_BUSY_S))
        self._keep(peer_id, known)

    def _keep(self, peer_id: str, failures: _Failures) -> None:
        self._failures.pop(peer_id, None)
        self._failures[peer_id] = failures
        if len(self._failures) > MAX_REMEMBERED:
            del self._failures[next(iter(self._failures))]

    def succeeded(self, peer_id: str) -> None:
        """A peer did what it was asked: it is as good as any."""
        self._failures.pop(peer_id, None)

    def avoided(self, now_s: float) -> set[str]:
        return {peer_id for peer_id, failures in self._failures.items() if now_s < failures.avoided_until_s}

    def weights(self, now_s: float) -> dict[str, float]:
        """Peer id -> how many failures count against it still; those that are as good as forgotten are."""
        weights = {peer_id: failures.weight(now_s) for peer_id, failures in self._failures.items()}
        return {peer_id: weight for peer_id, weight in weights.items() if weight >= LEAST_WEIGHT}


@dataclass(slots=True)
class _Pace:
    """How much longer than announced a peer took."""

    factor: float
    seen_at_s: float
    num_slow: int
    """Slow times in a row."""


class SpeedMemory:
    """Peers that took longer than they announce.

    Args:
        slow: from so many times on that counts.
    """

    def __init__(self, slow: float = SLOW) -> None:
        self._slow = slow
        self._paces: dict[str, _Pace] = {}

    def took(self, peer_id: str, seconds: float, expected_s: float, now_s: float) -> None:
        """Note how long a peer took for something, and how long it should have."""
        factor = min(max(1.0, (seconds - SLACK_S) / max(expected_s, 1e-6)), MAX_FACTOR)
        pace = self._paces.pop(peer_id, None)
        if pace is None:
            if factor < self._slow:
                return
            pace = _Pace(factor, now_s, 0)
        faded = _faded(pace, now_s)
        # A slow answer counts at once: whoever waits for it should not wait for an average.
        pace.factor = factor if factor > faded else (faded + factor) / 2
        pace.num_slow = pace.num_slow + 1 if factor >= self._slow else 0
        pace.seen_at_s = now_s
        self._paces[peer_id] = pace
        if len(self._paces) > MAX_REMEMBERED:
            del self._paces[next(iter(self._paces))]

    def is_slow(self, peer_id: str) -> bool:
        """Whether a peer was slow twice in a row."""
        pace = self._paces.get(peer_id)
        return pace is not None and pace.num_slow >= 2

    def slowness(self, now_s: float) -> dict[str, float]:
        """Peer id -> factor, of those that were slow."""
        factors = {peer_id: _faded(pace, now_s) for peer_id, pace in self._paces.items()}
        return {peer_id: factor for peer_id, factor in factors.items() if factor >= self._slow}


def _faded(pace: _Pace, now_s: float) -> float:
    age_s: float = now_s - pace.seen_at_s
    return 1 + (pace.factor - 1) * 2.0 ** (-age_s / HALF_LIFE_S)
