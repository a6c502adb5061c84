"""Adapters on their way to servers: each server is sent what it lacks before it is asked to use it.

All servers of a route are sent theirs before any of them is called: what is opened waits for nobody's slow line, and
the time that an upload takes is nobody's time for a step or a batch.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import grpc.aio

from swarm import PROTOCOL_VERSION
from swarm.errors import AdapterMissing, CacheFull, ProtocolError
from swarm.model.adapters import BlockAdapter, ModelAdapter, of_blocks
from swarm.model.edits import Adapters
from swarm.peers import Connector
from swarm.rpc import errors_from_wire
from swarm.streams import wait_status, write_message
from swarm.v1 import blocks_pb2 as pb
from swarm.v1 import blocks_pb2_grpc as pb_grpc

from .routing import Hop
from .tasks import cancel_and_wait

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_UPLOADS = 3
"""How often adapters are sent for one request: a server that forgets them again and again has no room for them."""

MAX_AT_ONCE = 2
"""Servers that are sent adapters at a time: two keep a line of 1 Mbit/s full, four lose their connections there."""

PART_BYTES = 32 << 10
"""Of a file, in one message: small enough that one comes through a slow line every few seconds."""

LEAST_WINDOW_BYTES, MOST_WINDOW_BYTES = 64 << 10, 8 << 20
"""How much is sent before the server is asked for an answer, which comes when it has got there. More would wait in the
buffers of a slow line, and whatever else goes that way behind it: a connection whose pings take 5 s is given up."""

QUICK_S, LATE_S = 0.25, 1.0
"""Answers by which more is sent at a time, and from which on less."""

LEAST_BYTES_PER_S = 16 << 10
"""A slower upload is given up; servers give up at the same rate."""

STALL_S = 60.0
"""After so long without progress an upload is given up, though the server says that it is alive."""

MAX_PEERS = 256
"""Servers of which it is remembered what they were sent."""

MAX_DIGESTS = 4096
"""Adapters that are remembered of each."""


@dataclass(slots=True, eq=False)
class _Peer:
    """What one server was sent, oldest first."""

    digests: collections.OrderedDict[bytes, None] = field(default_factory=collections.OrderedDict)
    sending: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while something is sent, so that calls at the same time do not send it twice."""
    num_forgotten: int = 0
    """How often it had forgotten some."""


class WhileAlive(Protocol):
    """Network.while_alive."""

    async def __call__(
        self,
        work: Awaitable[None],
        hops: Sequence[Hop],
        timeout_s: float,
        *,
        progress: Callable[[], int],
        stall_s: float,
    ) -> None: ...


class Uploads:
    """What servers were sent. All calls come from one event loop.

    Args:
        while_alive: waits for an answer of hops for so many seconds, and asks whether they are alive if nothing moves.
        timeout_s: how much longer than its bytes one upload may take.
    """

    def __init__(self, connector: Connector, while_alive: WhileAlive, timeout_s: float) -> None:
        self._connector = connector
        self._while_alive = while_alive
        self._timeout_s = timeout_s
        self._slots = asyncio.Semaphore(MAX_AT_ONCE)
        self._peers: collections.OrderedDict[str, _Peer] = collections.OrderedDict()

    async def calling(
        self,
        hops: Sequence[Hop],
        adapters: ModelAdapter | None,
        fingerprint: str,
        call: Callable[[], Awaitable[T]],
    ) -> T:
        """Send hops the adapters that they were not sent yet, and call; if one has forgotten some, do so again.

        Args:
            adapters: of all blocks of the model.
            fingerprint: of the model.
            call: names the adapters by their digests.
        Raises: CacheFull: a hop forgets them faster than they can be used. PeerError, UserError: as the call does.
        """
        num_sent = 0
        while True:
            if adapters is not None:
                await self._send_all(hops, adapters, fingerprint)
            num_sent += 1
            num_forgotten = {hop.peer_id: self._peer(hop.peer_id).num_forgotten for hop in hops}
            try:
                return await call()
            except AdapterMissing as exc:
                if adapters is None or exc.peer_id not in num_forgotten:
                    raise
                if num_sent == MAX_UPLOADS:
                    full = CacheFull(f"peer {exc.peer_id} forgets adapters as fast as they are sent")
                    full.peer_id = exc.peer_id
                    raise full from exc
                logger.info("peer %s has forgotten adapters", exc.peer_id)
                peer = self._peer(exc.peer_id)
                if peer.num_forgotten == num_forgotten[exc.peer_id]:  # else another call has noticed
                    peer.num_forgotten += 1
                    peer.digests.clear()

    async def _send_all(self, hops: Sequence[Hop], adapters: ModelAdapter, fingerprint: str) -> None:
        sending = [asyncio.create_task(self._send(hop, of_blocks(adapters, hop.blocks), fingerprint)) for hop in hops]
        try:
            await asyncio.gather(*sending)
        finally:
            await cancel_and_wait(sending)

    async def _send(self, hop: Hop, adapters: Adapters | None, fingerprint: str) -> None:
        files = {adapter.digest: adapter for adapter in adapters or () if adapter is not None}
        peer = self._peer(hop.peer_id)
        async with peer.sending:
            lacking = [files[digest] for digest in files if digest not in peer.digests]
            if lacking:
                async with self._slots:
                    await self._upload(hop, lacking, fingerprint)
            for digest in files:
                peer.digests[digest] = None
                peer.digests.move_to_end(digest)
            while len(peer.digests) > max(MAX_DIGESTS, len(files)):
                peer.digests.popitem(last=False)

    async def _upload(self, hop: Hop, adapters: Sequence[BlockAdapter], fingerprint: str) -> None:
        timeout_s = self._timeout_s + sum(len(adapter.to_bytes()) for adapter in adapters) / LEAST_BYTES_PER_S
        async with self._connector.lease(hop.address) as channel, errors_from_wire(hop.peer_id):
            writer = _Writer(pb_grpc.BlocksStub(channel), timeout_s)
            try:
                writing = writer.write(adapters, fingerprint)
                await self._while_alive(writing, [hop], timeout_s, progress=lambda: writer.num_written, stall_s=STALL_S)
            finally:
                writer.call.cancel()

    def _peer(self, peer_id: str) -> _Peer:
        peer = self._peers.setdefault(peer_id, _Peer())
        self._peers.move_to_end(peer_id)
        if len(self._peers) > MAX_PEERS:
            self._peers.popitem(last=False)
        return peer


class _Writer:
    """A call that sends adapters, as fast as they arrive."""

    def __init__(self, stub: pb_grpc.BlocksStub, timeout_s: float) -> None:
        self.call = stub.PutAdapters(timeout=timeout_s)
        self.num_written = 0
        """Messages that the line has taken."""
        self._stub = stub
        self._timeout_s = timeout_s
        self._window_bytes = LEAST_WINDOW_BYTES
        self._unanswered_bytes = 0

    async def write(self, adapters: Sequence[BlockAdapter], fingerprint: str) -> None:
        """Send all. Raises: AioRpcError: the server refused. ProtocolError: it did not answer as it should."""
        opening = pb.PutAdaptersOpen(protocol_version=PROTOCOL_VERSION, model_fingerprint=fingerprint)
        try:
            await self._write(pb.PutAdaptersRequest(open=opening))
            for adapter in adapters:
                data = adapter.to_bytes()
                parts = [data[at : at + PART_BYTES] for at in range(0, len(data), PART_BYTES)]
                file = pb.AdapterFile(digest=adapter.digest, num_bytes=len(data), data=parts[0])
                await write_message(self._write, pb.PutAdaptersRequest(adapter=file), parts[1:])
            await self.call.done_writing()
        except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
            logger.debug("a server ended the call while adapters were sent")  # its status says why
            await wait_status(self.call)
        if not isinstance(await self.call, pb.PutAdaptersResponse):
            raise ProtocolError("a server did not say that it has the adapters")

    async def _write(self, message: Any) -> None:
        await self.call.write(message)
        self.num_written += 1
        self._unanswered_bytes += message.ByteSize()
        if self._unanswered_bytes >= self._window_bytes:
            began_s = time.monotonic()
            await self._stub.Describe(pb.DescribeRequest(protocol_version=PROTOCOL_VERSION), timeout=self._timeout_s)
            self._unanswered_bytes = 0
            self._window_bytes = next_window_bytes(self._window_bytes, time.monotonic() - began_s)


def next_window_bytes(window_bytes: int, answer_s: float) -> int:
    """How much to send before the next question, when the last one was answered after so long."""
    if answer_s < QUICK_S:
        return min(2 * window_bytes, MOST_WINDOW_BYTES)
    return max(window_bytes // 2, LEAST_WINDOW_BYTES) if answer_s > LATE_S else window_bytes


def names_of(adapters: Adapters | None) -> list[bytes]:
    """What a request calls the adapters of its blocks."""
    if adapters is None or all(adapter is None for adapter in adapters):
        return []
    return [b"" if adapter is None else adapter.digest for adapter in adapters]
