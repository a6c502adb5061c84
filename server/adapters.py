"""Adapters that clients have sent: kept by their digests within a budget, lent to sessions and batches that name them.

What was not used for longest goes first when room is needed; what is lent stays.
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
from swarm.model.targets import Targets, check_adapters
from swarm.ranges import BlockRange
from swarm.streams import read_bytes
from swarm.v1 import blocks_pb2 as pb

DIGEST_BYTES = 32

LEAST_BYTES = 256 << 10
"""As much an adapter counts at least: its tensors and what describes them take more than a small file."""

LEAST_BYTES_PER_S = 64 << 10
"""Who sends an adapter more slowly holds room that others need."""

SLACK_S = 30.0
"""How much longer than that the way of an adapter may take."""


@dataclass(slots=True, eq=False)
class _Entry:
    """An adapter that is held."""

    adapter: BlockAdapter
    num_bytes: int
    num_users: int = 0
    fits: set[int] = field(default_factory=set)
    """Blocks that it was found to fit."""


class Lease:
    """Adapters that stay where they are until this is closed; a context manager."""

    def __init__(self, store: AdapterStore, entries: Sequence[_Entry | None]) -> None:
        self._store = store
        self._entries = entries
        self._closed = False
        self.adapters: Adapters | None = None
        """One entry for each block; None if nothing is changed anywhere."""
        if any(entry is not None for entry in entries):
            self.adapters = [None if entry is None else entry.adapter for entry in entries]
        self.num_prefix_tokens = num_prefix_tokens(self.adapters)
        """How many tokens stand in front of each sequence."""
        store.count_users(entries, 1)

    def share(self) -> Lease:
        """A lease of the same adapters that is closed by itself."""
        return Lease(self._store, self._entries)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._store.count_users(self._entries, -1)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class AdapterStatistics:
    num_adapters: int
    num_used: int
    """Lent to sessions or batches now."""
    used_bytes: int
    total_bytes: int


class AdapterStore:
    """The adapters of a server. Leases may be closed in any thread; all else is called in the event loop.

    Args:
        max_bytes: of all adapters together, those on their way here included; 0: none are taken.
        device: where the blocks are.
    """

    def __init__(self, max_bytes: int, targets: Targets, device: torch.device) -> None:
        self._max_bytes = max_bytes
        self.targets = targets
        """What can be changed in the blocks."""
        self._device = device
        self._entries: collections.OrderedDict[bytes, _Entry] = collections.OrderedDict()
        self._used_bytes = 0
        self._guard = threading.Lock()
        self._reading = asyncio.Semaphore(1)
        """Files are turned into tensors one at a time: for that moment, both are in memory."""

    @property
    def max_request_bytes(self) -> int:
        """What the adapters of one session or batch may take, so that there is room for somebody else's."""
        return self._max_bytes // 2

    def statistics(self) -> AdapterStatistics:
        with self._guard:
            num_used = sum(entry.num_users > 0 for entry in self._entries.values())
            return AdapterStatistics(len(self._entries), num_used, self._used_bytes, self._max_bytes)

    async def receive(self, wire: pb.AdapterFile, read: Callable[[], Awaitable[Any]]) -> None:
        """Take an adapter, of which `wire` is the first message and `read` gives the others.

        Raises: BadRequest, ProtocolError: it cannot be, or is not what was announced. CacheFull: those that are in use
            leave no room for it.
        """
        self._check(wire)
        deadline_s = SLACK_S + wire.num_bytes / LEAST_BYTES_PER_S
        with self._room(wire.digest, max(LEAST_BYTES, wire.num_bytes)) as keep:
            try:
                async with asyncio.timeout(deadline_s):
                    data = await read_bytes(read, wire.data, wire.num_bytes)
            except TimeoutError as exc:
                raise PeerUnavailable(f"an adapter did not come within {deadline_s:.0f} s") from exc
            async with self._reading:
                parsing = asyncio.create_task(asyncio.to_thread(self._parse, data, wire.digest))
                try:
                    adapter = await asyncio.shield(parsing)
                except asyncio.CancelledError:
                    await asyncio.wait({parsing})  # it cannot be stopped, and takes memory until it ends
                    raise
            keep(wire.digest, adapter)

    def lease(self, digests: Sequence[bytes], blocks: BlockRange) -> Lease:
        """Lend the adapters that a request names, one for each of its blocks; none if it names none.

        Raises: AdapterMissing: not all are here. BadRequest: they do not fit the blocks, or are too many.
        """
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
        return Lease(self, entries)

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

    def _check(self, wire: pb.AdapterFile) -> None:
        if len(wire.digest) != DIGEST_BYTES:
            raise ProtocolError(f"the digest of an adapter has {DIGEST_BYTES} bytes")
        self.check_request(wire.num_bytes)

    def _parse(self, data: bytes, digest: bytes) -> BlockAdapter:
        if hashlib.sha256(data).digest() != digest:
            raise BadRequest("the digest of an adapter is not that of its bytes: they were changed on the way")
        adapter = BlockAdapter.from_bytes(data, max_bytes=self.max_request_bytes)
        return adapter.with_tensors([tensor.to(self._device) for tensor in adapter.tensors().values()])

    @contextlib.contextmanager
    def _room(self, digest: bytes, num_bytes: int) -> Iterator[Callable[[bytes, BlockAdapter], None]]:
        """Room for one that comes; freed at the end unless what is yielded is called with it.

        One that is here already needs none.
        Raises: CacheFull: what is in use leaves none, and nothing was dropped.
        """
        with self._guard:
            if digest in self._entries:
                self._entries.move_to_end(digest)
                num_bytes = 0
            self._drop_unused(self._used_bytes + num_bytes - self._max_bytes)
            self._used_bytes += num_bytes
        kept = False

        def keep(digest: bytes, adapter: BlockAdapter) -> None:
            nonlocal kept
            with self._guard:
                if digest not in self._entries and num_bytes:
                    self._entries[digest], kept = _Entry(adapter, num_bytes), True

        try:
            yield keep
        finally:
            if not kept:
                with self._guard:
                    self._used_bytes -= num_bytes

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
