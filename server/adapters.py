"""Adapters that clients have sent: kept by their digests within a budget, lent to sessions and batches that name them.

What was not used for longest goes first when room is needed; then what only sessions wait with whose connection broke,
which end. What is lent to others stays. A file that comes takes room as its bytes come.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import hashlib
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from swarm.errors import AdapterMissing, BadRequest, CacheFull, PeerUnavailable, ProtocolError
from swarm.model.adapters import BlockAdapter, num_prefix_tokens
from swarm.model.edits import Adapters
from swarm.model.hosted import HostedAdapter
from swarm.model.targets import Targets, check_adapters
from swarm.ranges import BlockRange
from swarm.streams import read_parts
from swarm.v1 import blocks_pb2 as pb

DIGEST_BYTES = 32

LEAST_BYTES = 256 << 10
"""As much an adapter counts at least: its tensors and what describes them take more than a small file."""

LEAST_BYTES_PER_S = 16 << 10
"""Who sends an adapter more slowly holds room that others need."""

SLACK_S = 30.0
"""How much longer than that the way of an adapter may take."""

STALL_S = 20.0
"""How long nothing may come of an adapter whose way has begun."""

MAX_ARRIVING = 16
"""Adapters that may be on their way from one caller at a time."""


@dataclass(slots=True, eq=False)
class _Entry:
    """An adapter that is held."""

    adapter: BlockAdapter
    num_bytes: int
    num_users: int = 0
    num_resting: int = 0
    """Of these, those that give way when room is needed."""
    fits: set[int] = field(default_factory=set)
    """Blocks that it was found to fit."""


class Lease:
    """Adapters that stay where they are until this is closed; a context manager."""

    def __init__(
        self,
        store: AdapterStore,
        entries: Sequence[_Entry | None],
        names: Sequence[bytes] = (),
        *,
        hosted: bool = False,
    ) -> None:
        self._store = store
        self._entries = entries
        self._closed = False
        self.give_way: Callable[[], None] | None = None
        """Ends what holds this, if that may be when room is needed; set by the store."""
        self.names = tuple(names) if any(entry is not None for entry in entries) else ()
        """The digest of each block's adapter; empty if nothing is changed anywhere."""
        self.is_hosted = hosted
        """Whether they are the server's own: their tensors get no gradients."""
        self.adapters: Adapters | None = None
        """One entry for each block; None if nothing is changed anywhere."""
        if any(entry is not None for entry in entries):
            self.adapters = [None if entry is None else entry.adapter for entry in entries]
        self.num_prefix_tokens = num_prefix_tokens(self.adapters)
        """How many tokens stand in front of each sequence."""
        store.count_users(entries, 1)

    @property
    def num_gradient_bytes(self) -> int:
        """What the gradients of their tensors take in an answer, float32."""
        if self.is_hosted or self.adapters is None:
            return 0
        tensors = (tensor for each in self.adapters if each is not None for tensor in each.tensors().values())
        return sum(tensor.numel() for tensor in tensors) * torch.float32.itemsize

    @property
    def entries(self) -> Sequence[_Entry]:
        return [entry for entry in self._entries if entry is not None]

    def rest(self, give_way: Callable[[], None]) -> None:
        """Let the adapters go when room is needed: `give_way` is called then, in the event loop, and closes this."""
        self._store.set_resting(self, give_way)

    def resume(self) -> None:
        """Keep them whatever is needed, as before `rest`."""
        self._store.set_resting(self, None)

    def share(self) -> Lease:
        """A lease of the same adapters that is closed by itself."""
        return Lease(self._store, self._entries, self.names, hosted=self.is_hosted)

    def close(self) -> None:
        if not self._closed:
            self.resume()
            self._closed = True
            self._store.count_users(self._entries, -1)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class _Arrival:
    """A file on its way here: what has come of it, and the room that it has taken."""

    def __init__(self, store: AdapterStore, caller: str) -> None:
        self._store = store
        self.caller = caller
        self.num_bytes = 0
        """The room that it has."""
        self.data = bytearray()
        """One for all, so that many small parts take no more than their bytes."""

    def add(self, part: bytes) -> None:
        """Take a part, and room for it. Raises: CacheFull: there is none."""
        self._store.take_room(self, len(part))
        self.data += part


@dataclass(frozen=True, slots=True)
class AdapterStatistics:
    num_adapters: int
    num_used: int
    """Lent to sessions or batches now."""
    num_arriving: int
    """On their way here."""
    used_bytes: int
    total_bytes: int


class AdapterStore:
    """The adapters of a server. Leases may be closed in any thread; all else is called in the event loop.

    Args:
        max_bytes: of all adapters together, and of what has come of those on their way; 0: none are taken.
        device: where the blocks are.
    """

    def __init__(self, max_bytes: int, targets: Targets, device: torch.device) -> None:
        self._max_bytes = max_bytes
        self.targets = targets
        """What can be changed in the blocks."""
        self._device = device
        self._entries: collections.OrderedDict[bytes, _Entry] = collections.OrderedDict()
        self._resting: collections.OrderedDict[Lease, None] = collections.OrderedDict()
        """Leases that give way when room is needed, in that order."""
        self._arriving: set[_Arrival] = set()
        self._used_bytes = 0
        self._guard = threading.Lock()
        self._hosted: dict[bytes, tuple[BlockRange, Sequence[bytes]]] = {}
        """Digest of a hosted adapter -> our blocks, and the digests of their adapters."""
        self._reading = asyncio.Semaphore(1)
        """Files are turned into tensors one at a time: for that moment, both are in memory."""

    @property
    def max_request_bytes(self) -> int:
        """What the adapters of one session or batch may take, so that there is room for somebody else's."""
        return self._max_bytes // 2

    def statistics(self) -> AdapterStatistics:
        with self._guard:
            num_used = sum(entry.num_users > 0 for entry in self._entries.values())
            num_arriving = len(self._arriving)
            return AdapterStatistics(len(self._entries), num_used, num_arriving, self._used_bytes, self._max_bytes)

    async def receive(self, wire: pb.AdapterFile, read: Callable[[], Awaitable[Any]], *, caller: str = "") -> None:
        """Take an adapter, of which `wire` is the first message and `read` gives the others.

        Args:
            caller: from where it comes, so that nobody's take the room of all.
        Raises: BadRequest, ProtocolError: it cannot be, or is not what was announced. CacheFull: those that are in use
            leave no room for it, or the caller has too many on their way. PeerUnavailable: it came too slowly.
        """
        self._check(wire)
        deadline_s = SLACK_S + wire.num_bytes / LEAST_BYTES_PER_S
        with self._arrival(wire, caller) as arrival:
            try:
                async with asyncio.timeout(deadline_s):
                    await read_parts(
                        read, wire.data, wire.num_bytes, arrival.add if arrival else _ignore, timeout_s=STALL_S
                    )
            except TimeoutError as exc:
                raise PeerUnavailable(f"an adapter did not come within {deadline_s:.0f} s") from exc
            if arrival is None:
                return
            self.take_room(arrival, max(0, LEAST_BYTES - arrival.num_bytes))
            async with self._reading:
                parsing = asyncio.create_task(asyncio.to_thread(self._parse, arrival.data, wire.digest))
                try:
                    adapter = await asyncio.shield(parsing)
                except asyncio.CancelledError:
                    await asyncio.wait({parsing})  # it cannot be stopped, and takes memory until it ends
                    raise
            with self._guard:
                if wire.digest not in self._entries:
                    self._entries[wire.digest] = _Entry(adapter, arrival.num_bytes)
                    arrival.num_bytes = 0  # the entry has it from now on

    def host(self, hosted: HostedAdapter, blocks: BlockRange) -> None:
        """Hold what an adapter of our own changes in these blocks, beside the budget and for good.

        Raises: BadRequest: it does not fit them.
        """
        adapters = [hosted.adapters[number] for number in blocks]
        digests = [hosted.digests[number] for number in blocks]
        try:
            check_adapters(adapters, blocks, self.targets)
        except BadRequest as exc:
            raise BadRequest(f"the adapter {hosted.name!r} cannot be hosted: {exc}") from exc
        for digest, adapter in zip(digests, adapters, strict=True):
            if adapter is not None and digest not in self._entries:
                here = adapter.with_tensors([tensor.to(self._device) for tensor in adapter.tensors().values()])
                self._entries[digest] = _Entry(here, num_bytes=0, num_users=1)  # we are the user who stays
        self._hosted[hosted.listing.digest_bytes] = blocks, digests

    def lease(self, digests: Sequence[bytes], blocks: BlockRange, hosted: bytes = b"") -> Lease:
        """Lend the adapters that a request names, one for each of its blocks; none if it names none.

        Args:
            hosted: digest of an adapter that is hosted here, instead of these.
        Raises: AdapterMissing: not all are here. BadRequest: they do not fit the blocks, or are too many.
        """
        if hosted:
            if digests:
                raise BadRequest("a hosted adapter and others were named: use one or the other")
            digests = self._hosted_digests(hosted, blocks)
        if not digests:
            return Lease(self, [])
        if len(digests) != len(blocks):
            raise BadRequest(f"adapters of {len(digests)} blocks were named, blocks {blocks} are {len(blocks)}")
        missing = {digest for digest in digests if digest and digest not in self._entries}
        if missing:
            raise AdapterMissing(f"{len(missing)} of the adapters that were named are not here: send them again")
        with self._guard:
            entries = [self._entries[digest] if digest else None for digest in digests]
            for digest in filter(None, digests):
                self._entries.move_to_end(digest)
        self.check_request(sum(entry.num_bytes for entry in {id(entry): entry for entry in entries if entry}.values()))
        for number, entry in zip(blocks, entries, strict=True):
            if entry is not None and number not in entry.fits:
                check_adapters([entry.adapter], BlockRange(number, number + 1), self.targets)
                entry.fits.add(number)
        return Lease(self, entries, digests, hosted=bool(hosted))

    def _hosted_digests(self, hosted: bytes, blocks: BlockRange) -> Sequence[bytes]:
        if hosted not in self._hosted:
            raise BadRequest("the adapter that was asked for is not hosted here: use a server that announces it")
        own, digests = self._hosted[hosted]
        return digests[blocks.start - own.start : blocks.end - own.start]

    def check_request(self, num_bytes: int) -> None:
        """Raise BadRequest if the adapters of one request take more than they may."""
        if num_bytes > self.max_request_bytes:
            raise BadRequest(
                f"the adapters of these blocks take {num_bytes} bytes, this server takes at most "
                f"{self.max_request_bytes} at once: use a smaller rank, or servers with more room (--adapter-mib)"
            )

    def count_users(self, entries: Sequence[_Entry | None], change: int) -> None:
        """Note that somebody uses these from now on, or does no longer."""
        with self._guard:
            for entry in entries:
                if entry is not None:
                    entry.num_users += change

    def set_resting(self, lease: Lease, give_way: Callable[[], None] | None) -> None:
        """Note what ends when room is needed, and what that is no longer true of."""
        with self._guard:
            change = (give_way is not None) - (lease.give_way is not None)
            lease.give_way = give_way
            for entry in lease.entries:
                entry.num_resting += change
            if give_way is None:
                self._resting.pop(lease, None)
            else:
                self._resting[lease] = None

    def take_room(self, arrival: _Arrival, num_bytes: int) -> None:
        """Take room for more of a file. Raises: CacheFull: what is in use leaves none, and nothing was dropped."""
        with self._guard:
            theirs = sum(each.num_bytes for each in self._arriving if each.caller == arrival.caller)
            if theirs + num_bytes > max(LEAST_BYTES, self.max_request_bytes):
                raise CacheFull("adapters on their way from one place may take half of the room: send one at a time")
            ending = self._to_end(self._used_bytes + num_bytes - self._max_bytes)
        for give_way in ending:
            give_way()
        with self._guard:
            self._drop_unused(self._used_bytes + num_bytes - self._max_bytes)
            self._used_bytes += num_bytes
            arrival.num_bytes += num_bytes

    def _check(self, wire: pb.AdapterFile) -> None:
        if len(wire.digest) != DIGEST_BYTES:
            raise ProtocolError(f"the digest of an adapter has {DIGEST_BYTES} bytes")
        self.check_request(wire.num_bytes)

    def _parse(self, arrived: bytearray, digest: bytes) -> BlockAdapter:
        data = bytes(arrived)
        arrived.clear()
        if hashlib.sha256(data).digest() != digest:
            raise BadRequest("the digest of an adapter is not that of its bytes: they were changed on the way")
        try:
            adapter = BlockAdapter.from_bytes(data, max_bytes=self.max_request_bytes)
            return adapter.with_tensors([tensor.to(self._device) for tensor in adapter.tensors().values()])
        except (MemoryError, torch.OutOfMemoryError) as exc:
            raise CacheFull(f"no memory on {self._device} for an adapter of {len(data)} bytes at present") from exc

    @contextlib.contextmanager
    def _arrival(self, wire: pb.AdapterFile, caller: str) -> Iterator[_Arrival | None]:
        """A file that comes; None if it is here already. At the end, its room is free unless an entry has it.

        Raises: CacheFull: what is in use leaves no room, or the caller has too many on their way.
        """
        with self._guard:
            if wire.digest in self._entries:
                self._entries.move_to_end(wire.digest)
                arrival = None
            else:
                if sum(each.caller == caller for each in self._arriving) >= MAX_ARRIVING:
                    raise CacheFull(f"{MAX_ARRIVING} adapters are on their way from one place: send one at a time")
                self._to_end(self._used_bytes + max(LEAST_BYTES, wire.num_bytes) - self._max_bytes)
                arrival = _Arrival(self, caller)
                self._arriving.add(arrival)
        try:
            yield arrival
        finally:
            if arrival is not None:
                with self._guard:
                    self._arriving.discard(arrival)
                    self._used_bytes -= arrival.num_bytes

    def _to_end(self, num_bytes: int) -> list[Callable[[], None]]:
        """How to end the resting leases that keep so many bytes from being free, beside what nobody uses.

        Raises: CacheFull: there are not so many.
        """
        num_bytes -= sum(entry.num_bytes for entry in self._entries.values() if not entry.num_users)
        ending: list[Callable[[], None]] = []
        rest: dict[int, int] = {}
        for lease in self._resting:
            if num_bytes <= 0:
                break
            if lease.give_way is None or all(entry.num_resting < entry.num_users for entry in lease.entries):
                continue
            ending.append(lease.give_way)
            for entry in lease.entries:
                rest[id(entry)] = rest.get(id(entry), entry.num_users) - 1
                num_bytes -= 0 if rest[id(entry)] else entry.num_bytes
        if num_bytes > 0:
            raise CacheFull("no room for one more adapter: those in use take it")
        return ending

    def _drop_unused(self, num_bytes: int) -> None:
        """Drop so many bytes of what nobody uses, the oldest first. Raises: CacheFull: there are not so many."""
        unused: list[bytes] = []
        for digest, entry in self._entries.items():
            if num_bytes <= 0:
                break
            if not entry.num_users:
                unused.append(digest)
                num_bytes -= entry.num_bytes
        if num_bytes > 0:
            raise CacheFull("no room for one more adapter: those in use take it")
        for digest in unused:
            self._used_bytes -= self._entries.pop(digest).num_bytes


def _ignore(_part: bytes) -> None:
    """What to do with a file that is here already."""
