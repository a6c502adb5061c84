"""What a reader of the directory knows of one tree of buckets: which entries count, and which bucket to read next.

Nothing here reads or waits: pages come in, time is an argument.

Clocks. Writers and readers have clocks that may be minutes apart, so an entry counts for its `lifetime_s` from the
moment when this reader first saw it, by the reader's own clock: no clock makes a server immortal. Only where a reader
meets a peer for the first time does it look at when the entry was written: one that seems to have ended already counts
not before a newer one has been seen, as a server with a slow clock will write within one announce period.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from swarm.buckets import FANOUT, LIKELY_FULL, Bucket, sixteenth

V = TypeVar("V")

MAX_BUCKETS = 320
"""Of a tree that a reader looks at: all of three levels, and some below."""

TYPICAL_ENTRY_BYTES = 400

MAX_COST_BYTES = 32_000
"""A larger bucket is planned as one of this size, or a reader with little to spend would never read it."""

MAX_UNREAD_S = 600.0
"""So long an entry is believed beyond its end while its bucket is not read again."""

STALE_S = 60.0
"""A page that is so much older than what is known of its bucket comes from a node that is no longer written to."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What one peer wrote into a bucket."""

    peer_id: str
    written_at_s: float
    """By the writer's clock; of two entries of a peer the later one counts."""
    lifetime_s: float
    """How long it counts; 0 takes back what was there."""
    data: bytes
    may_serve: bool = True
    """Whether its writer may be a server; only in a private swarm some may not."""


@dataclass(frozen=True, slots=True)
class Page:
    """A bucket as one node of the network has it."""

    entries: tuple[Entry, ...] = ()
    num_bytes: int = 0
    """What it took to get it."""


@dataclass(slots=True)
class _Seen(Generic[V]):
    """The latest entry of one peer."""

    entry: Entry
    value: V | None
    """What it says; None: nothing that counts."""
    until_s: float
    """It counts until then, by the reader's clock; minus infinity: it never did."""
    bucket: Bucket


@dataclass(slots=True)
class _State:
    """One bucket."""

    tried_at_s: float = -float("inf")
    read_at_s: float = -float("inf")
    num_entries: int = 0
    num_bytes: int = TYPICAL_ENTRY_BYTES * LIKELY_FULL
    newest_s: float = -float("inf")
    """When the latest entry in it was written."""


@dataclass(slots=True)
class Listing(Generic[V]):
    """One tree, as far as it was read."""

    root: Bucket
    parse: Callable[[Entry, float], V | None]
    """(entry, for how many seconds it counts from now) -> what it says, or None if that is nothing."""
    _states: dict[Bucket, _State] = field(default_factory=dict)
    _seen: dict[str, _Seen[V]] = field(default_factory=dict)
    _forgot_at_s: float = -float("inf")

    def __post_init__(self) -> None:
        self._states[self.root] = _State()

    def observe(self, bucket: Bucket, page: Page, *, now_s: float, swarm_now_s: float) -> bool:
        """Take in a page; False: it is stale, and says nothing.

        Args:
            now_s: a clock that only goes forward.
            swarm_now_s: the time that writers should have.
        """
        state = self._states[bucket]
        newest_s = max((entry.written_at_s for entry in page.entries), default=-float("inf"))
        for entry in page.entries:
            self._observe_entry(bucket, entry, now_s, swarm_now_s)
        state.num_bytes, state.tried_at_s = max(page.num_bytes, TYPICAL_ENTRY_BYTES), now_s
        if newest_s < state.newest_s - STALE_S and now_s - state.read_at_s < MAX_UNREAD_S:
            return False
        state.read_at_s, state.num_entries, state.newest_s = now_s, len(page.entries), newest_s
        if state.num_entries >= LIKELY_FULL:
            for below in bucket.below()[: max(0, MAX_BUCKETS - len(self._states))]:
                self._states.setdefault(below, _State())
        self._forget(now_s)
        return True

    def _observe_entry(self, bucket: Bucket, entry: Entry, now_s: float, swarm_now_s: float) -> None:
        known = self._seen.get(entry.peer_id)
        if known is not None and entry.written_at_s <= known.entry.written_at_s:
            return
        age_s = max(0.0, swarm_now_s - entry.written_at_s)
        if age_s < entry.lifetime_s:
            until_s = now_s + entry.lifetime_s - age_s
        elif known is not None and known.entry.lifetime_s:  # a slow clock: it was renewed since we looked last
            until_s = now_s + entry.lifetime_s
        else:
            until_s = -float("inf")
        value = self.parse(entry, until_s - now_s) if entry.lifetime_s else None
        self._seen[entry.peer_id] = _Seen(entry, value, until_s, bucket)

    def _forget(self, now_s: float) -> None:
        if now_s < self._forgot_at_s + STALE_S:
            return
        self._forgot_at_s = now_s
        ended_s = now_s - 2 * MAX_UNREAD_S
        for peer_id in [each for each, seen in self._seen.items() if self._end_s(seen) < ended_s]:
            del self._seen[peer_id]

    def _end_s(self, seen: _Seen[V]) -> float:
        """When an entry ended, or will end; of one that never counted, when its bucket was read."""
        return max(seen.until_s, self._states[seen.bucket].read_at_s)

    def live(self, now_s: float) -> list[V]:
        """What the entries say that count, ordered by peer id.

        One whose bucket has not been read since it ended is believed for a while: most likely it was renewed.
        """
        found = []
        for peer_id in sorted(self._seen):
            seen = self._seen[peer_id]
            unread = self._states[seen.bucket].read_at_s < seen.until_s
            if seen.value is not None and now_s < seen.until_s + (MAX_UNREAD_S if unread else 0.0):
                found.append(seen.value)
        return found

    def plan(
        self, *, max_bytes: float, since_s: float, blocks: Collection[int] = (), num_model_blocks: int = 0
    ) -> list[Bucket]:
        """Which buckets to read now, most urgent first, as many as are expected to fit into max_bytes.

        First where servers of `blocks` may be; then those never read; then the one that was read longest ago.

        Args:
            since_s: those that were tried since then are left out.
        """
        parts = {sixteenth(block, num_model_blocks) for block in blocks if block < num_model_blocks}
        due = [bucket for bucket, state in self._states.items() if state.tried_at_s < since_s]
        due.sort(key=lambda bucket: (_distance(bucket, parts), self._states[bucket].read_at_s, bucket))
        chosen: list[Bucket] = []
        for bucket in due:
            cost_bytes = min(self._states[bucket].num_bytes, MAX_COST_BYTES)
            if cost_bytes > max_bytes:
                break
            chosen.append(bucket)
            max_bytes -= cost_bytes
        return chosen


def _distance(bucket: Bucket, parts: Collection[int]) -> int:
    """How unlikely a server of a block in some part of the model is there: its range begins there, or before."""
    if not bucket.digits or not parts:
        return 0
    return min((part - bucket.digits[0] for part in parts if part >= bucket.digits[0]), default=FANOUT)
