"""The link from one hop to the next: what leaves this server's span goes straight into the next one's session."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc.aio

from swarm.errors import PeerUnavailable, SwarmError
from swarm.peers import Connector, PeerAddress
from swarm.rpc import errors_from_wire
from swarm.streams import write_message
from swarm.throughput import Throughput
from swarm.v1 import blocks_pb2 as pb
from swarm.v1 import blocks_pb2_grpc as pb_grpc


class PushLink:
    """A Push stream into a session on the next hop, which begins with the first step; see `open_push_link`.

    Until then nobody knows whether the session there is open, and the next hop would wait for us.
    """

    def __init__(
        self,
        stub: pb_grpc.BlocksStub,
        peer_id: str,
        attach: pb.SessionAttach,
        on_end: Callable[[SwarmError], None],
        throughput: Throughput,
    ) -> None:
        self._stub = stub
        self._peer_id = peer_id
        self._throughput = throughput
        self._attach: pb.SessionAttach | None = attach
        self._on_end = on_end
        self._call: grpc.aio.StreamUnaryCall | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def send(self, first: pb.SessionRequest, more: list[bytes]) -> None:
        """Pass a step on. Raises: PeerError: the next hop failed."""
        async with errors_from_wire(self._peer_id):
            call = self._call or self._begin()
            try:
                if self._attach is not None:
                    attach, self._attach = self._attach, None
                    await call.write(pb.SessionRequest(attach=attach))
                began_s = time.monotonic()
                await write_message(call.write, first, more)
                num_bytes = len(first.step.data) + sum(map(len, more))
                self._throughput.sent(self._peer_id, num_bytes, time.monotonic() - began_s)
            except (asyncio.InvalidStateError, grpc.aio.AioRpcError):  # the stream has ended: its status says why
                await call
                raise

    def _begin(self) -> grpc.aio.StreamUnaryCall:
        call = self._call = self._stub.Push()
        self._watcher = asyncio.create_task(self._watch(call))
        return call

    async def _watch(self, call: grpc.aio.StreamUnaryCall) -> None:
        """Say why the next hop ended the link."""
        try:
            async with errors_from_wire(self._peer_id):
                await call
                raise PeerUnavailable(f"the next hop {self._peer_id} closed the session")
        except SwarmError as exc:
            self._on_end(exc)

    async def aclose(self) -> None:
        """Break the stream."""
        if self._call is not None and self._watcher is not None:
            self._watcher.cancel()
            self._call.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)


@asynccontextmanager
async def open_push_link(
    connector: Connector, address: PeerAddress, attach: pb.SessionAttach, *, on_end: Callable[[SwarmError], None]
) -> AsyncIterator[PushLink]:
    """Connect to the next hop, whose session `attach` names. Raises: PeerUnavailable: it cannot be reached.

    Args:
        on_end: called when the next hop ends the link, with the reason.
    """
    async with connector.lease(address) as channel:
        link = PushLink(pb_grpc.BlocksStub(channel), address.peer_id, attach, on_end, connector.throughput)
        try:
            yield link
        except PeerUnavailable:
            await connector.forget(address.peer_id)
            raise
        finally:
            await link.aclose()
