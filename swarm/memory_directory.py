"""A directory in this process: buckets in a dictionary instead of the DHT. It stands in for the real one in tests."""

from __future__ import annotations

from dataclasses import dataclass, field

from swarm.announcement import Announcement
from swarm.buckets import CAPACITY, Bucket
from swarm.directory import BucketDirectory, SwarmClock
from swarm.listing import TYPICAL_ENTRY_BYTES, Entry, Page


@dataclass(slots=True)
class MemoryStore:
    """What several MemoryDirectory objects share: what the network would hold."""

    buckets: dict[Bucket, dict[str, Entry]] = field(default_factory=dict)


class MemoryShelves:
    """One peer's access to buckets in this process."""

    def __init__(self, store: MemoryStore, peer_id: str, clock: SwarmClock) -> None:
        self._store = store
        self._peer_id = peer_id
        self._clock = clock
        self._last_write_s = 0.0

    async def write(self, bucket: Bucket, data: bytes, lifetime_s: float) -> bool:
        entries = self._store.buckets.setdefault(bucket, {})
        now_s = self._clock.now_s()
        if self._peer_id not in entries and len(entries) >= CAPACITY:
            ended = [each.peer_id for each in entries.values() if each.written_at_s + each.lifetime_s < now_s]
            if not ended:
                return False
            del entries[ended[0]]
        self._last_write_s = max(now_s, self._last_write_s + 1e-3)
        entries[self._peer_id] = Entry(self._peer_id, self._last_write_s, lifetime_s, data)
        return True

    async def read(self, bucket: Bucket) -> Page:
        entries = tuple(self._store.buckets.get(bucket, {}).values())
        return Page(entries, TYPICAL_ENTRY_BYTES * len(entries))


class MemoryDirectory(BucketDirectory):
    """Objects over one store see each other.

    Args:
        peer_id: whose it is; None: it announces for whomever it is told.
    """

    def __init__(
        self, store: MemoryStore | None = None, *, peer_id: str | None = None, clock: SwarmClock | None = None
    ) -> None:
        self.store = store if store is not None else MemoryStore()
        self._own_clock = clock or SwarmClock()
        super().__init__(self._shelves_of(peer_id or ""), peer_id or "", self._own_clock)
        self._others: dict[str, BucketDirectory] | None = {} if peer_id is None else None

    async def announce(self, announcement: Announcement) -> None:
        if self._others is None:
            await super().announce(announcement)
        else:
            await self._of(announcement.peer_id).announce(announcement)

    async def withdraw(self, announcement: Announcement) -> None:
        if self._others is None:
            await super().withdraw(announcement)
        else:
            await self._of(announcement.peer_id).withdraw(announcement)

    def _of(self, peer_id: str) -> BucketDirectory:
        assert self._others is not None
        if peer_id not in self._others:
            self._others[peer_id] = BucketDirectory(self._shelves_of(peer_id), peer_id, self._own_clock)
        return self._others[peer_id]

    def _shelves_of(self, peer_id: str) -> MemoryShelves:
        return MemoryShelves(self.store, peer_id, self._own_clock)
