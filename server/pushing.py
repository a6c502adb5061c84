"""The link from one hop to the next: what leaves this server's span goes straight into the next one's session."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio

from swarm import PROTOCOL_VERSION
from swarm.errors import PeerUnavailable, SwarmError
from swarm.peers import Connector, PeerAddress
from swarm.rpc import errors_from_wire
from swarm.streams import write_message
from swarm.v1 import blocks_pb2 as pb
from swarm.v1 import blocks_pb2_grpc as pb_grpc

from .sessions import ServerSession


class PushLink:
    """A Push stream into a session on the next hop; see `open_push_link`."""

    def __init__(self, call: grpc.aio.StreamUnaryCall, peer_id: str, next_session_id: bytes) -> None:
        self._call = call
        self._peer_id = peer_id
        self._next_session_id = next_session_id
        self._attached = False

    async def send(self, first: pb.SessionRequest, more: list[bytes]) -> None:
        """Pass a step on. Raises: PeerError: the next hop failed."""
        async with errors_from_wire(self._peer_id):
            try:
                if not self._attached:
                    attach = pb.SessionAttach(protocol_version=PROTOCOL_VERSION, session_id=self._next_session_id)
                    await self._call.write(pb.SessionRequest(attach=attach))
                    self._attached = True
                await write_message(self._call.write, first, more)
            except asyncio.InvalidStateError:  # the stream has ended: its status says why
                await self._call
                raise

    async def watch(self, session: ServerSession) -> None:
        """End the session when the next hop ends the link."""
        try:
            async with errors_from_wire(self._peer_id):
                await self._call
                raise PeerUnavailable(f"the next hop {self._peer_id} closed the session")
        except SwarmError as exc:
            session.fail(exc)


@asynccontextmanager
async def open_push_link(
    connector: Connector, address: PeerAddress, session: ServerSession, next_session_id: bytes
) -> AsyncIterator[PushLink]:
    """Connect to the next hop; its failures end `session`. Raises: PeerUnavailable: it cannot be reached."""
    async with connector.lease(address) as channel:
        call = pb_grpc.BlocksStub(channel).Push()
        link = PushLink(call, address.peer_id, next_session_id)
        watcher = asyncio.create_task(link.watch(session))
        try:
            yield link
        except PeerUnavailable:
            await connector.forget(address.peer_id)
            raise
        finally:
            watcher.cancel()
            call.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
