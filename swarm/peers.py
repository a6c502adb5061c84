"""Channels to peers: directly over TLS where a peer can be dialled, else through the tunnel.

Either way the peer's announced certificate is pinned, so relays and impostors see only ciphertext.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass

import grpc
import grpc.aio

from swarm.errors import PeerUnavailable, ProtocolError
from swarm.identity import TLS_NAME, certificate_pem
from swarm.rpc import open_channel
from swarm.v1 import blocks_pb2 as pb

logger = logging.getLogger(__name__)

TunnelOpener = Callable[[str, tuple[str, ...]], AbstractAsyncContextManager[str]]
"""(peer id, multiaddrs) -> a context that yields a gRPC target; see swarm/tunnel.py."""


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """Where and how a peer can be called."""

    peer_id: str
    direct: tuple[str, ...]
    """"host:port" of its gRPC port, best first; empty if it is reachable through the tunnel only."""
    tls_certificate: bytes
    """DER; the only certificate a channel to this peer accepts."""
    multiaddrs: tuple[str, ...]
    """libp2p addresses, for the tunnel."""

    def to_wire(self) -> pb.PeerAddress:
        return pb.PeerAddress(
            peer_id=self.peer_id,
            direct=self.direct,
            tls_certificate=self.tls_certificate,
            multiaddrs=self.multiaddrs,
        )

    @classmethod
    def from_wire(cls, wire: pb.PeerAddress) -> PeerAddress:
        """Raises: ProtocolError: it is too long or incomplete."""
        if not wire.peer_id or not wire.tls_certificate or wire.ByteSize() > 16_384:
            raise ProtocolError("a peer address must name a peer id and a certificate, in at most 16 KiB")
        return cls(wire.peer_id, tuple(wire.direct), wire.tls_certificate, tuple(wire.multiaddrs))


class Connector:
    """Keeps one channel per peer, opened on first use.

    Args:
        open_tunnel: how to reach a peer that cannot be dialled; None: such peers are unavailable.
        connect_timeout_s: for each way that is tried.
    """

    def __init__(self, open_tunnel: TunnelOpener | None, *, connect_timeout_s: float = 3.0) -> None:
        self._open_tunnel = open_tunnel
        self._connect_timeout_s = connect_timeout_s
        self._links: dict[PeerAddress, asyncio.Task[_Link]] = {}

    async def channel(self, address: PeerAddress) -> grpc.aio.Channel:
        """Return a connected channel to the peer.

        Raises: PeerUnavailable: no way leads to it.
        """
        task = self._links.get(address)
        if task is None or (task.done() and not _usable(task)):
            task = asyncio.create_task(self._connect(address))
            self._links[address] = task
        try:
            return (await asyncio.shield(task)).channel
        except PeerUnavailable:
            if self._links.get(address) is task:
                del self._links[address]
            raise

    async def forget(self, peer_id: str) -> None:
        """Close what leads to this peer; the next call connects anew."""
        for address in [address for address in self._links if address.peer_id == peer_id]:
            await self._discard(self._links.pop(address))

    async def aclose(self) -> None:
        """Close all channels and tunnels."""
        links, self._links = list(self._links.values()), {}
        for task in links:
            await self._discard(task)

    async def _discard(self, task: asyncio.Task[_Link]) -> None:
        task.cancel()
        result = (await asyncio.gather(task, return_exceptions=True))[0]
        if isinstance(result, _Link):
            await result.owned.aclose()

    async def _connect(self, address: PeerAddress) -> _Link:
        pem = certificate_pem(address.tls_certificate)
        tried = []
        for target in address.direct:
            async with AsyncExitStack() as owned:
                channel = await owned.enter_async_context(open_channel(target, pem, TLS_NAME))
                if await _becomes_ready(channel, self._connect_timeout_s):
                    return _Link(channel, owned.pop_all())
            tried.append(target)
        if self._open_tunnel is not None and address.multiaddrs:
            async with AsyncExitStack() as owned:
                target = await owned.enter_async_context(self._open_tunnel(address.peer_id, address.multiaddrs))
                channel = await owned.enter_async_context(open_channel(target, pem, TLS_NAME))
                if await _becomes_ready(channel, 2 * self._connect_timeout_s):
                    logger.debug("peer %s is reached through the tunnel", address.peer_id)
                    return _Link(channel, owned.pop_all())
            tried.append("the tunnel")
        error = PeerUnavailable(f"peer {address.peer_id} cannot be reached (tried {', '.join(tried) or 'nothing'})")
        error.peer_id = address.peer_id
        raise error


@dataclass(frozen=True, slots=True)
class _Link:
    channel: grpc.aio.Channel
    owned: AsyncExitStack


def _usable(task: asyncio.Task[_Link]) -> bool:
    return not task.cancelled() and task.exception() is None


async def _becomes_ready(channel: grpc.aio.Channel, timeout_s: float) -> bool:
    """Whether the channel connects; gives up at the first refused attempt."""
    try:
        async with asyncio.timeout(timeout_s):
            state = channel.get_state(try_to_connect=True)
            while state is not grpc.ChannelConnectivity.READY:
                if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
                    return False
                await channel.wait_for_state_change(state)
                state = channel.get_state(try_to_connect=True)
    except TimeoutError:
        return False
    return True
