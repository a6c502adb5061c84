"""What can be told of the sessions of a server without telling whose they are."""

from __future__ import annotations

import statistics
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionStatistics:
    """One session, without anything that tells whose it is."""

    age_s: float
    """Since it was opened, for the first time if it was opened again."""
    idle_s: float
    """Since its last step came."""
    batch_size: int
    num_tokens: int
    """In the cache, of each sequence."""
    num_pages: int
    """Shared ones count for each that holds them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionTableStatistics:
    """One moment of a session table."""

    sessions: tuple[SessionStatistics, ...]
    """Those that are open, the oldest first."""
    num_kept: int
    """Caches of sessions whose connection broke, waiting to be opened again."""
    num_waiting: int
    """Sessions that wait for room."""
    num_reclaimed: int
    """Those that had to end because their callers held more than their share of the cache."""
    num_waited: int
    """Sessions that had to wait for room so far."""
    num_refused: int
    """Those for which there was none in time."""
    page_bytes: int
    num_pages: int
    num_free_pages: int
    """Those that can still be found by what they hold included."""
    num_shared_pages: int
    """Held once, used by several sequences."""

    @property
    def num_sessions(self) -> int:
        return len(self.sessions)

    @property
    def num_used_pages(self) -> int:
        return self.num_pages - self.num_free_pages

    @property
    def cache_used_bytes(self) -> int:
        return self.num_used_pages * self.page_bytes

    @property
    def cache_shared_bytes(self) -> int:
        return self.num_shared_pages * self.page_bytes

    @property
    def cache_total_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    @property
    def oldest_session_s(self) -> float:
        return max((each.age_s for each in self.sessions), default=0.0)

    @property
    def median_session_s(self) -> float:
        return statistics.median(each.age_s for each in self.sessions) if self.sessions else 0.0
