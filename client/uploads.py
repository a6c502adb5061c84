"""Adapters on their way to servers: each server is sent what it lacks before it is asked to use it."""

from __future__ import annotations

import asyncio
import collections
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import grpc.aio

from swarm import PROTOCOL_VERSION
from swarm.codec import CHUNK_BYTES
from swarm.errors import AdapterMissing, ProtocolError
from swarm.model.adapters import BlockAdapter
from swarm.model.edits import Adapters
from swarm.peers import Connector
from swarm.rpc import errors_from_wire
from swarm.streams import write_message
from swarm.v1 import blocks_pb2 as pb
from swarm.v1 import blocks_pb2_grpc as pb_grpc

from .routing import Hop

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_UPLOADS = 3
"""How often adapters are sent for one request: a server that forgets them again and again has no room for them."""

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


class Uploads:
    """What servers were sent. All calls come from one event loop.

    Args:
        while_alive: waits for an answer of hops for so many seconds, and asks whether they are alive if it takes long.
        timeout_s: how long one upload may take.
    """

    def __init__(
        self,
        connector: Connector,
        while_alive: Callable[[Awaitable[None], Sequence[Hop], float], Awaitable[None]],
        timeout_s: float,
    ) -> None:
        self._connector = connector
        self._while_alive = while_alive
        self._timeout_s = timeout_s
        self._peers: collections.OrderedDict[str, _Peer] = collections.OrderedDict()

    async def calling(
        self, hop: Hop, adapters: Adapters | None, fingerprint: str, call: Callable[[], Awaitable[T]]
    ) -> T:
        """Send a hop the adapters that it was not sent yet, and call it; if it has forgotten some, do so again.

        Args:
            adapters: of the hop's blocks.
            fingerprint: of the model.
            call: names the adapters by their digests.
        Raises: AdapterMissing: it forgets them faster than they can be used. PeerError, UserError: as the call does.
        """
        files = {adapter.digest: adapter for adapter in adapters or () if adapter is not None}
        num_sent = 0
        while True:
            peer = self._peer(hop.peer_id)
            if files:
                await self._send(peer, hop, files, fingerprint)
            num_sent, num_forgotten = num_sent + 1, peer.num_forgotten
            try:
                return await call()
            except AdapterMissing:
                if num_sent == MAX_UPLOADS or not files:
                    raise
                logger.info("%s has forgotten adapters", hop)
                if peer.num_forgotten == num_forgotten:  # else another call has noticed
                    peer.num_forgotten += 1
                    peer.digests.clear()

    async def _send(self, peer: _Peer, hop: Hop, files: dict[bytes, BlockAdapter], fingerprint: str) -> None:
        async with peer.sending:
            lacking = [digest for digest in files if digest not in peer.digests]
            if lacking:
                async with self._connector.lease(hop.address) as channel, errors_from_wire(hop.peer_id):
                    call = pb_grpc.BlocksStub(channel).PutAdapters(timeout=self._timeout_s)
                    try:
                        writing = _write(call, [files[digest] for digest in lacking], fingerprint)
                        await self._while_alive(writing, [hop], self._timeout_s)
                    finally:
                        call.cancel()
            for digest in files:
                peer.digests[digest] = None
                peer.digests.move_to_end(digest)
            while len(peer.digests) > max(MAX_DIGESTS, len(files)):
                peer.digests.popitem(last=False)

    def _peer(self, peer_id: str) -> _Peer:
        peer = self._peers.setdefault(peer_id, _Peer())
        self._peers.move_to_end(peer_id)
        if len(self._peers) > MAX_PEERS:
            self._peers.popitem(last=False)
        return peer


async def _write(call: grpc.aio.StreamUnaryCall, adapters: Sequence[BlockAdapter], fingerprint: str) -> None:
    opening = pb.PutAdaptersOpen(protocol_version=PROTOCOL_VERSION, model_fingerprint=fingerprint)
    try:
        await call.write(pb.PutAdaptersRequest(open=opening))
        for adapter in adapters:
            data = adapter.to_bytes()
            parts = [data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES)]
            file = pb.AdapterFile(digest=adapter.digest, num_bytes=len(data), data=parts[0])
            await write_message(call.write, pb.PutAdaptersRequest(adapter=file), parts[1:])
        await call.done_writing()
    except asyncio.InvalidStateError:
        logger.debug("a server ended the call while adapters were sent")  # its status says why
    if not isinstance(await call, pb.PutAdaptersResponse):
        raise ProtocolError("a server did not say that it has the adapters")


def names_of(adapters: Adapters | None) -> list[bytes]:
    """What a request calls the adapters of its blocks."""
    if adapters is None or all(adapter is None for adapter in adapters):
        return []
    return [b"" if adapter is None else adapter.digest for adapter in adapters]
