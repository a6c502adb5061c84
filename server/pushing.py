"""The link from one hop to the next: what leaves this server's span goes straight into the next one's session."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc.aio

from swarm.errors import PeerUnavailable, SwarmError
from swarm.peers import Connector, PeerAddress
from swarm.rpc import errors_from_wire
from swarm.streams import write_message
from swarm.v1 import blocks_pb2 as pb
from swarm.v1 import blocks_pb2_grpc as pb_grpc


class PushLink:
    """A Push stream into a session on the next hop; see `open_push_link`."""

    def __init__(self, call: grpc.aio.StreamUnaryCall, peer_id: str, attach: pb.SessionAttach) -> None:
        self._call = call
        self._peer_id = peer_id
        self._attach: pb.SessionAttach | None = attach

    async def send(self, first: pb.SessionRequest, more: list[bytes]) -> None:
        """Pass a step on. Raises: PeerError: the next hop failed."""
        async with errors_from_wire(self._peer_id):
            try:
                if self._attach is not None:
                    attach, self._attach = self._attach, None
                    await self._call.write(pb.SessionRequest(attach=attach))
                await write_message(self._call.write, first, more)
            except asyncio.InvalidStateError:  # the stream has ended: its status says why
                await self._call
                raise

    async def watch(self, on_end: Callable[[SwarmError], None]) -> None:
        """Say why the next hop ended the link."""
        try:
            async with errors_from_wire(self._peer_id):
                await self._call
                raise PeerUnavailable(f"the next hop {self._peer_id} closed the session")
        except SwarmError as exc:
            on_end(exc)


@asynccontextmanager
async def open_push_link(
    connector: Connector, address: PeerAddress, attach: pb.SessionAttach, *, on_end: Callable[[SwarmError], None]
) -> AsyncIterator[PushLink]:
    """Connect to the next hop, whose session `attach` names. Raises: PeerUnavailable: it cannot be reached.

    Args:
        on_end: called when the next hop ends the link, with the reason.
    """
    async with connector.lease(address) as channel:
        call = pb_grpc.BlocksStub(channel).Push()
        link = PushLink(call, address.peer_id, attach)
        watcher = asyncio.create_task(link.watch(on_end))
        try:
            yield link
        except PeerUnavailable:
            await connector.forget(address.peer_id)
            raise
        finally:
            watcher.cancel()
            call.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
