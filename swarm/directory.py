"""Who serves what: the port through which servers announce themselves and clients find them.

`HivemindDirectory` (swarm/dht.py) is the real one; `MemoryDirectory` here stands in for it in tests and passes
the same contract suite (tests/network/test_directory_contract.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from swarm.announcement import Announcement, ModelListing
from swarm.errors import BadRequest, ProtocolError

MAX_LIFETIME_S = 600.0
"""How far ahead `expires_at_s` may lie; a server announces itself again well before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryStatistics:
    """What one directory object has done since it was opened."""

    num_announced: int = 0
    num_withdrawn: int = 0
    num_reads: int = 0
    num_dropped: int = 0
    """Records that a read met and refused: malformed, oversized, or announced by somebody else than they name."""


class Directory(Protocol):
    """Announcements of all servers of a swarm, by model."""

    async def announce(self, announcement: Announcement) -> None:
        """Publish, in place of this peer's earlier announcement; readers see it until `expires_at_s`."""

    async def withdraw(self, announcement: Announcement) -> None:
        """Take this peer's announcement back; readers stop seeing it at once."""

    async def servers(self, model_fingerprint: str) -> list[Announcement]:
        """The live servers of a model, one announcement per peer, ordered by peer id; bad records are left out."""

    async def models(self) -> list[ModelListing]:
        """The models that live servers of this swarm serve, ordered by name."""

    def statistics(self) -> DirectoryStatistics:
        """Counts since this object was opened."""


def check_lifetime(announcement: Announcement, now_s: float) -> None:
    """Raise BadRequest unless the announcement expires within the next MAX_LIFETIME_S."""
    lifetime_s = announcement.expires_at_s - now_s
    if not 0 < lifetime_s <= MAX_LIFETIME_S:
        raise BadRequest(
            f"an announcement that expires in {lifetime_s:.0f} s cannot be published: "
            f"choose expires_at_s between 0 and {MAX_LIFETIME_S:.0f} s from now"
        )


def distinct_models(listings: Iterable[ModelListing]) -> list[ModelListing]:
    """One listing per fingerprint, ordered by name."""
    by_fingerprint = {listing.fingerprint: listing for listing in sorted(listings, key=lambda x: x.name, reverse=True)}
    return sorted(by_fingerprint.values(), key=lambda x: (x.name, x.fingerprint))


@dataclass(slots=True)
class MemoryStore:
    """What several MemoryDirectory objects share: the encoded record of each peer, as the network would hold it."""

    records: dict[str, bytes] = field(default_factory=dict)


class MemoryDirectory:
    """A directory in this process; objects over one store see each other."""

    def __init__(self, store: MemoryStore | None = None, *, clock: Callable[[], float] = time.time) -> None:
        self.store = store if store is not None else MemoryStore()
        self._clock = clock
        self._num_announced = self._num_withdrawn = self._num_reads = self._num_dropped = 0

    async def announce(self, announcement: Announcement) -> None:
        check_lifetime(announcement, self._clock())
        self.store.records[announcement.peer_id] = announcement.to_bytes()
        self._num_announced += 1

    async def withdraw(self, announcement: Announcement) -> None:
        self.store.records.pop(announcement.peer_id, None)
        self._num_withdrawn += 1

    async def servers(self, model_fingerprint: str) -> list[Announcement]:
        return [live for live in self._read() if live.model_fingerprint == model_fingerprint]

    async def models(self) -> list[ModelListing]:
        return distinct_models(live.listing for live in self._read())

    def statistics(self) -> DirectoryStatistics:
        return DirectoryStatistics(
            num_announced=self._num_announced,
            num_withdrawn=self._num_withdrawn,
            num_reads=self._num_reads,
            num_dropped=self._num_dropped,
        )

    def _read(self) -> list[Announcement]:
        self._num_reads += 1
        live = []
        for peer_id, data in sorted(self.store.records.items()):
            try:
                announcement = Announcement.from_bytes(data)
            except ProtocolError:
                self._num_dropped += 1
                continue
            if announcement.peer_id != peer_id:
                self._num_dropped += 1
            elif announcement.expires_at_s > self._clock():
                live.append(announcement)
        return live
