"""Whom a client knows to serve its model: read from the directory when it is needed, within a budget of bytes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Sequence

from swarm.announcement import Announcement
from swarm.directory import Directory
from swarm.errors import NoRoute, PeerUnavailable

from .routing import Roster

logger = logging.getLogger(__name__)

BURST_SHARE = 0.2
"""So much of what may be read in a minute may be read at once; the rest trickles in."""


class ReadBudget:
    """How much may be read now: never more in any minute than bytes_per_min, the last bucket aside."""

    def __init__(self, bytes_per_min: float, now_s: float) -> None:
        self._burst_bytes = BURST_SHARE * bytes_per_min
        self._bytes_per_s = (1 - BURST_SHARE) * bytes_per_min / 60
        self._bytes = self._burst_bytes
        self._at_s = now_s

    def bytes_at(self, now_s: float) -> float:
        """What may be read at a time; negative after more was read than expected."""
        self._bytes = min(self._burst_bytes, self._bytes + (now_s - self._at_s) * self._bytes_per_s)
        self._at_s = now_s
        return self._bytes

    def spend(self, num_bytes: float) -> None:
        """Note what was read."""
        self._bytes -= num_bytes


class KnownServers:
    """The servers of one model, as columns for routing, kept up to date.

    Args:
        use_direct: False: forget the addresses that could be dialled.
        on_found: told of those that were found, before they become known.
    """

    def __init__(
        self,
        directory: Directory,
        *,
        bytes_per_min: float,
        use_direct: bool,
        on_found: Callable[[Sequence[Announcement]], None] = lambda found: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.roster = Roster()
        self.fingerprint = ""
        """The model that was asked for last; "" before that."""
        self._directory = directory
        self._clock = clock
        self._budget = ReadBudget(bytes_per_min, clock())
        self._use_direct = use_direct
        self._on_found = on_found
        self._refreshed_at_s = -float("inf")
        self._refreshing = asyncio.Lock()

    @property
    def servers(self) -> list[Announcement]:
        return self.roster.servers

    async def read(self, fingerprint: str, *, max_age_s: float, blocks: Collection[int] = ()) -> list[Announcement]:
        """Return the announced servers of the model, at most `max_age_s` old while the directory can be reached.

        Args:
            blocks: for which servers are looked for first.
        Raises: NoRoute: it cannot be reached, and never could.
        """
        if fingerprint != self.fingerprint:
            self.fingerprint, self.roster, self._refreshed_at_s = fingerprint, Roster(), -float("inf")
        if self._age_s <= max_age_s:
            return self.servers
        async with self._refreshing:
            if self._age_s > max_age_s:
                try:
                    self._take(await self._read_within_budget(fingerprint, blocks))
                except PeerUnavailable as exc:
                    if not self.servers:
                        raise NoRoute(f"the directory of the swarm cannot be reached: {exc}") from exc
                    logger.info("the directory cannot be reached, known servers are used on: %s", exc)
                self._refreshed_at_s = self._clock()
        return self.servers

    @property
    def _age_s(self) -> float:
        return self._clock() - self._refreshed_at_s

    async def _read_within_budget(self, fingerprint: str, blocks: Collection[int]) -> list[Announcement]:
        before = self._directory.statistics().num_read_bytes
        max_bytes = max(0.0, self._budget.bytes_at(self._clock()))
        try:
            return await self._directory.servers(fingerprint, max_bytes=max_bytes, blocks=blocks)
        finally:
            self._budget.spend(self._directory.statistics().num_read_bytes - before)

    def _take(self, found: Sequence[Announcement]) -> None:
        self._on_found(found)
        servers = found if self._use_direct else map(_without_direct, found)
        self.roster = Roster(servers, before=self.roster)


def _without_direct(server: Announcement) -> Announcement:
    return server.model_copy(update={"direct": []})
