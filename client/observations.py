"""What a client has seen of its peers: failures, and how fast they really are. What was seen long ago counts less."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from .routing import Hop

logger = logging.getLogger(__name__)

SLOW = 3.0
"""From so many times the announced time on a peer counts as slow; below it is taken at its word, for every machine has
its bad moments and announced rates are those of the last period."""

MAX_FACTOR = 100.0
"""Slower than this makes no difference."""

SLACK_S = 0.020
"""A peer that takes less than this longer than announced is not slow."""

HALF_LIFE_S = 60.0
"""How fast it is forgotten that a peer was slow."""

MAX_REMEMBERED = 1024

MAX_DOUBTS = 64
"""Disagreements that are remembered."""

LEAST_BUSY_S = 0.1
"""A peer that has too many requests is left alone at least so long, whatever it says."""


class FailureMemory:
    """Peers that failed lately, and until when they are avoided."""

    def __init__(self, avoid_s: float, max_avoid_s: float) -> None:
        self._avoid_s = avoid_s
        self._max_avoid_s = max_avoid_s
        self._failures: dict[str, tuple[int, float]] = {}

    def failed(self, peer_id: str, now_s: float) -> None:
        count = self._failures.get(peer_id, (0, 0.0))[0] + 1
        self._failures[peer_id] = (count, now_s + min(self._max_avoid_s, self._avoid_s * 2 ** min(count - 1, 30)))

    def busy(self, peer_id: str, retry_after_s: float, now_s: float) -> None:
        """Leave a peer alone for as long as it says; it has not failed, so its failures stay as many as they are."""
        count, until_s = self._failures.get(peer_id, (0, 0.0))
        self._failures[peer_id] = (count, max(until_s, now_s + max(retry_after_s, LEAST_BUSY_S)))

    def succeeded(self, peer_id: str) -> None:
        self._failures.pop(peer_id, None)

    def avoided(self, now_s: float) -> set[str]:
        return {peer_id for peer_id, (_, until_s) in self._failures.items() if now_s < until_s}


@dataclass(slots=True)
class _Pace:
    """How much longer than announced a peer took."""

    factor: float
    seen_at_s: float
    num_slow: int
    """Slow times in a row."""


class AuditMemory:
    """What audits have found; kept for as long as the client runs."""

    def __init__(self) -> None:
        self._false: dict[str, str] = {}
        self._doubts: dict[tuple[str, ...], str] = {}

    @property
    def false(self) -> frozenset[str]:
        """Ids of peers that have computed something else than their blocks."""
        return frozenset(self._false)

    def is_false(self, hops: Sequence[Hop]) -> bool:
        """Whether one of these peers was found to compute something else."""
        return any(hop.peer_id in self._false for hop in hops)

    def exclude(self, hop: Hop, *, error: float, among_others: float) -> None:
        """Let a peer be used no more that has computed something else than its blocks.

        Args:
            error: relative error of what it has committed to.
            among_others: that between two others.
        """
        what = (
            f"not used: {hop} computed something else, {error:.1%} from two others, which differ by {among_others:.1%}"
        )
        logger.warning("%s", what)
        self._false[hop.peer_id] = what

    def doubt(self, hops: Sequence[Hop], error: float) -> None:
        """Note that one of these peers has computed something else, and nobody can say which."""
        what = f"in doubt: {' or '.join(map(str, hops))} computed something else, they differ by {error:.1%}"
        logger.warning("%s", what)
        self._doubts[tuple(hop.peer_id for hop in hops)] = what
        if len(self._doubts) > MAX_DOUBTS:
            del self._doubts[next(iter(self._doubts))]

    def remarks(self) -> list[str]:
        """All of it, in sentences."""
        return [*self._false.values(), *self._doubts.values()]


class SpeedMemory:
    """Peers that took longer than they announce."""

    def __init__(self) -> None:
        self._paces: dict[str, _Pace] = {}

    def took(self, peer_id: str, seconds: float, expected_s: float, now_s: float) -> None:
        """Note how long a peer took for something, and how long it should have."""
        factor = min(max(1.0, (seconds - SLACK_S) / max(expected_s, 1e-6)), MAX_FACTOR)
        pace = self._paces.pop(peer_id, None)
        if pace is None:
            if factor < SLOW:
                return
            pace = _Pace(factor, now_s, 0)
        faded = _faded(pace, now_s)
        # A slow answer counts at once: whoever waits for it should not wait for an average.
        pace.factor = factor if factor > faded else (faded + factor) / 2
        pace.num_slow = pace.num_slow + 1 if factor >= SLOW else 0
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
        return {peer_id: factor for peer_id, factor in factors.items() if factor >= SLOW}


def _faded(pace: _Pace, now_s: float) -> float:
    age_s: float = now_s - pace.seen_at_s
    return 1 + (pace.factor - 1) * 2.0 ** (-age_s / HALF_LIFE_S)
