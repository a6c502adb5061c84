"""Who serves what: the port through which servers announce themselves and clients find them.

`BucketDirectory` does it on top of anything that keeps buckets (`Shelves`): the DHT (swarm/dht_shelves.py), or
a dictionary in this process (swarm/memory_directory.py), for tests. Both pass tests/network/test_directory_contract.py.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from swarm.announcement import Announcement, ModelListing, Participant
from swarm.buckets import MAX_DEPTH, MODELS, Bucket, meeting_root, path_of_model, path_of_server, servers_root
from swarm.errors import BadRequest, PeerUnavailable, ProtocolError
from swarm.listing import Entry, Listing, Page

logger = logging.getLogger(__name__)

V = TypeVar("V", Announcement, ModelListing, Participant)

MAX_LIFETIME_S = 600.0
"""How far ahead `expires_at_s` may lie; a server announces itself again well before."""

MAX_READ_BYTES = 1_000_000
"""What one call reads at most where the caller does not say: all of a swarm of 2,000 servers."""

PARALLEL_READS = 8

UPWARD_EVERY = 8
"""A server in a lower bucket tries the one above with every so many announcements: there may be room again."""

CLOCK_JUMP_S, CLOCK_CHECK_PERIOD_S = 2.0, 600.0
"""A clock that has moved so much against a steady one was set; it is looked at so often anyway."""

MAX_LISTINGS = 16
"""Models whose servers are remembered, and meetings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryStatistics:
    """What one directory object has done since it was opened."""

    num_announced: int = 0
    num_withdrawn: int = 0
    num_reads: int = 0
    """Buckets read."""
    num_read_bytes: int = 0
    num_dropped: int = 0
    """Entries that a read met and refused as malformed."""


class Directory(Protocol):
    """Announcements of all servers of a swarm, by model."""

    async def announce(self, announcement: Announcement) -> None:
        """Publish, in place of this peer's earlier announcement; readers see it until `expires_at_s`."""

    async def withdraw(self, announcement: Announcement) -> None:
        """Take this peer's announcement back; readers stop seeing it at once."""

    async def servers(
        self, model_fingerprint: str, *, max_bytes: float = MAX_READ_BYTES, blocks: Collection[int] = ()
    ) -> list[Announcement]:
        """The live servers of a model, one announcement per peer, ordered by peer id; bad entries are left out.

        In a swarm too large to be read with max_bytes it returns those that it has read, now and before; each call
        goes on where the last one ended.

        Args:
            max_bytes: about how much to read; with 0, it returns what is known.
            blocks: for which servers are looked for first.
        """

    async def models(self) -> list[ModelListing]:
        """The models that live servers of this swarm serve, ordered by name."""

    async def meet(self, name: str, multiaddrs: Sequence[str], lifetime_s: float) -> list[Participant]:
        """Let peers that know this name find us, and return all of them that are there, ordered by peer id.

        Args:
            multiaddrs: where they can dial us; none: we leave.
            lifetime_s: how long we shall be found.
        """

    def statistics(self) -> DirectoryStatistics:
        """Counts since this object was opened."""


class Shelves(Protocol):
    """Something that keeps buckets."""

    async def write(self, bucket: Bucket, data: bytes, lifetime_s: float) -> bool:
        """Put this peer's entry into a bucket, in place of its earlier one there; False: the bucket is full.

        Raises: PeerUnavailable: nobody keeps it.
        """

    async def read(self, bucket: Bucket) -> Page:
        """What lies in a bucket. Raises: PeerUnavailable: there is nobody to ask."""


class SwarmClock:
    """This machine's clock, corrected by its distance to the clocks of the initial peers."""

    def __init__(self, wall: Callable[[], float] = time.time, steady: Callable[[], float] = time.monotonic) -> None:
        self.wall_s = wall
        self.steady_s = steady
        """It only goes forward, whatever is done to the clock."""
        self.offset_s = 0.0
        self.check_again()

    def now_s(self) -> float:
        """The swarm's time."""
        return self.wall_s() + self.offset_s

    def check_again(self) -> None:
        """Note that the offset is about to be measured."""
        self._checked_at_s = self.steady_s()
        self._difference_s = self.wall_s() - self._checked_at_s

    def is_doubtful(self, now_s: float) -> bool:
        """Whether the clock was set since the offset was measured, or that was long ago."""
        was_set = abs(self.wall_s() - now_s - self._difference_s) > CLOCK_JUMP_S
        return was_set or now_s - self._checked_at_s > CLOCK_CHECK_PERIOD_S


def check_lifetime(announcement: Announcement, now_s: float) -> float:
    """Return how long the announcement counts. Raises: BadRequest: not at all, or longer than MAX_LIFETIME_S."""
    lifetime_s = announcement.expires_at_s - now_s
    if not 0 < lifetime_s <= MAX_LIFETIME_S:
        raise BadRequest(
            f"an announcement that expires in {lifetime_s:.0f} s cannot be published: "
            f"choose expires_at_s between 0 and {MAX_LIFETIME_S:.0f} s from now"
        )
    return lifetime_s


@dataclass(slots=True)
class _Place:
    """Where this peer's entry of one tree lies."""

    path: tuple[int, ...]
    depth: int = 0


class BucketDirectory:
    """The directory as one peer sees it.

    Args:
        met: told of servers that were found, and where they are.
    """

    def __init__(
        self,
        shelves: Shelves,
        peer_id: str,
        clock: SwarmClock,
        met: Callable[[str, Sequence[str]], None] = lambda peer_id, multiaddrs: None,
    ) -> None:
        self._shelves = shelves
        self._peer_id = peer_id
        self._clock = clock
        self._met = met
        self._places: dict[str, _Place] = {}
        """Tree -> where we are in it."""
        self._listings: dict[str, Listing[Announcement]] = {}
        """Fingerprint -> what we know, the one read last at the end."""
        self._meetings: dict[str, Listing[Participant]] = {}
        """Name -> who was there."""
        self._models = self._models_listing()
        self._statistics = DirectoryStatistics()

    async def announce(self, announcement: Announcement) -> None:
        """Publish; see Directory.

        Raises:
            BadRequest: another peer's, too long-lived, or too large.
            PeerUnavailable: nobody took it.
        """
        self._check_own(announcement)
        lifetime_s = check_lifetime(announcement, self._clock.wall_s())
        root = servers_root(announcement.model_fingerprint)
        path = path_of_server(self._peer_id, announcement.start, announcement.num_model_blocks)
        data, listing = announcement.to_bytes(), announcement.listing.to_bytes()
        await self._leave_others(root, path)
        found_room, _ = await asyncio.gather(
            self._put(root, path, data, lifetime_s),
            self._put(MODELS, path_of_model(announcement.model_fingerprint), listing, lifetime_s),
        )
        if not found_room:
            raise PeerUnavailable(
                "the nodes of the DHT refuse this announcement: the directory of this model is full, or this "
                "machine's clock is wrong by many minutes"
            )
        self._count(num_announced=1)

    async def withdraw(self, announcement: Announcement) -> None:
        """Write over this peer's entries that they no longer count.

        Raises: PeerUnavailable: nobody took it.
        """
        self._check_own(announcement)
        root = servers_root(announcement.model_fingerprint)
        places = [(each.tree, self._places.pop(each.tree, _Place(()))) for each in (root, MODELS)]
        writes = (self._shelves.write(Bucket(tree, place.path[: place.depth]), b"", 0.0) for tree, place in places)
        for result in await asyncio.gather(*writes, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result
        self._count(num_withdrawn=1)

    async def servers(
        self, model_fingerprint: str, *, max_bytes: float = MAX_READ_BYTES, blocks: Collection[int] = ()
    ) -> list[Announcement]:
        """Live announcements; see Directory.

        Raises: PeerUnavailable: contact with the swarm is lost and none of the initial peers answers.
        """
        listing = self._listings.pop(model_fingerprint, None) or self._servers_listing(model_fingerprint)
        self._listings[model_fingerprint] = listing
        if len(self._listings) > MAX_LISTINGS:
            del self._listings[next(iter(self._listings))]
        return await self._read(listing, max_bytes, blocks)

    async def models(self) -> list[ModelListing]:
        """What live servers serve.

        Raises: PeerUnavailable: as for `servers`.
        """
        found = await self._read(self._models, MAX_READ_BYTES)
        by_fingerprint = {each.fingerprint: each for each in sorted(found, key=lambda each: each.name, reverse=True)}
        return sorted(by_fingerprint.values(), key=lambda each: (each.name, each.fingerprint))

    async def meet(self, name: str, multiaddrs: Sequence[str], lifetime_s: float) -> list[Participant]:
        """Find and be found; see Directory. Where a meeting is full, we find others, who then know us from us.

        Raises: BadRequest: these are no addresses. PeerUnavailable: as for `servers`.
        """
        root = meeting_root(name)
        data = Participant.of(self._peer_id, multiaddrs).to_bytes() if multiaddrs else b""
        await self._shelves.write(root, data, min(lifetime_s, MAX_LIFETIME_S) if multiaddrs else 0.0)
        listing = self._meetings.pop(name, None) or Listing(
            root, self._counting_dropped(lambda entry, _: Participant.from_bytes(entry.peer_id, entry.data))
        )
        self._meetings[name] = listing
        if len(self._meetings) > MAX_LISTINGS:
            del self._meetings[next(iter(self._meetings))]
        return await self._read(listing, MAX_READ_BYTES)

    def statistics(self) -> DirectoryStatistics:
        """Counts since this directory was opened."""
        return self._statistics

    def forget_found(self) -> None:
        """Know nothing of others until it is read again: some of them do not count any more."""
        self._listings.clear()
        self._meetings.clear()
        self._models = self._models_listing()

    def _models_listing(self) -> Listing[ModelListing]:
        return Listing(MODELS, self._counting_dropped(_parse_model))

    def _servers_listing(self, model_fingerprint: str) -> Listing[Announcement]:
        def parse(entry: Entry, seconds: float) -> Announcement:
            _check_server(entry)
            expires_at_s = max(1.0, self._clock.wall_s() + seconds)
            found = Announcement.from_bytes(
                entry.data, peer_id=entry.peer_id, model_fingerprint=model_fingerprint, expires_at_s=expires_at_s
            )
            if seconds > 0:
                self._met(found.peer_id, found.multiaddrs)
            return found

        return Listing(servers_root(model_fingerprint), self._counting_dropped(parse))

    def _counting_dropped(self, parse: Callable[[Entry, float], V]) -> Callable[[Entry, float], V | None]:
        def parse_or_none(entry: Entry, seconds: float) -> V | None:
            try:
                return parse(entry, seconds)
            except ProtocolError as exc:
                logger.debug("peer %s: %s", entry.peer_id, exc)
                self._count(num_dropped=1)
                return None

        return parse_or_none

    async def _read(self, listing: Listing[V], max_bytes: float, blocks: Collection[int] = ()) -> list[V]:
        """Read what is due and fits, level by level; return what is known then."""
        started_s = self._clock.steady_s()
        while True:
            found = listing.live(self._clock.steady_s())
            sizes = _model_sizes(found) if blocks else [0]
            planned = listing.plan(
                max_bytes=max_bytes,
                since_s=started_s,
                blocks=blocks,
                num_model_blocks=statistics.mode(sizes or [0]),
            )
            if not planned:
                return found
            read_bytes = await asyncio.gather(*(self._read_bucket(listing, each) for each in planned[:PARALLEL_READS]))
            max_bytes -= sum(read_bytes)

    async def _read_bucket(self, listing: Listing[V], bucket: Bucket) -> int:
        """Read one bucket, of another node if the first one is behind; return the bytes that it took."""
        num_bytes = 0
        for _ in range(2):
            page = await self._shelves.read(bucket)
            num_bytes += page.num_bytes
            self._count(num_reads=1, num_read_bytes=page.num_bytes)
            now_s, swarm_now_s = self._clock.steady_s(), self._clock.now_s()
            if listing.observe(bucket, page, now_s=now_s, swarm_now_s=swarm_now_s):
                break
        return num_bytes

    def _check_own(self, announcement: Announcement) -> None:
        if announcement.peer_id != self._peer_id:
            raise BadRequest(f"peer {self._peer_id} cannot announce for {announcement.peer_id}")

    async def _leave_others(self, root: Bucket, path: tuple[int, ...]) -> None:
        """Take back what we wrote about another model, or where our range has begun before."""
        for tree, place in list(self._places.items()):
            if tree == MODELS.tree:
                continue
            if tree != root.tree or path[: place.depth] != place.path[: place.depth]:
                del self._places[tree]
                await self._shelves.write(Bucket(tree, place.path[: place.depth]), b"", 0.0)

    async def _put(self, root: Bucket, path: tuple[int, ...], data: bytes, lifetime_s: float) -> bool:
        """Write into the first bucket on the path that has room; now and then look whether there is some above."""
        place = self._places.setdefault(root.tree, _Place(path))
        if place.path != path:
            place.path, place.depth = path, 0
        if place.depth and self._statistics.num_announced % UPWARD_EVERY == 0:
            place.depth -= 1
        for depth in range(place.depth, MAX_DEPTH + 1):
            place.depth = depth
            if await self._shelves.write(Bucket(root.tree, path[:depth]), data, lifetime_s):
                return True
        place.depth = 0
        return False

    def _count(self, **changes: int) -> None:
        counts = {name: getattr(self._statistics, name) + number for name, number in changes.items()}
        self._statistics = replace(self._statistics, **counts)


def _check_server(entry: Entry) -> None:
    if not entry.may_serve:
        raise ProtocolError("announces itself as a server, but was invited to use the swarm only")


def _parse_model(entry: Entry, _seconds: float) -> ModelListing:
    _check_server(entry)
    return ModelListing.from_bytes(entry.data)


def _model_sizes(found: Sequence[Announcement | ModelListing | Participant]) -> list[int]:
    """How many blocks the model of each announcement has."""
    return [each.num_model_blocks for each in found if isinstance(each, Announcement)]
