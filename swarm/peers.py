"""Channels to peers: directly over TLS where a peer can be dialled, else through the tunnel.

Either way the peer's announced certificate is pinned, so relays and impostors see only ciphertext.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

import grpc
import grpc.aio

from swarm.announcement import AddressFields, Announcement
from swarm.dialling import Anywhere, DiallingRule
from swarm.errors import PeerUnavailable, ProtocolError
from swarm.identity import TLS_NAME, certificate_pem
from swarm.rpc import open_channel
from swarm.rpc_members import CallSigner
from swarm.v1 import blocks_pb2 as pb

logger = logging.getLogger(__name__)

TunnelOpener = Callable[[str, tuple[str, ...]], AbstractAsyncContextManager[str]]
"""(peer id, multiaddrs) -> a context that yields a gRPC target; see swarm/tunnel.py."""

MAX_IDLE_LINKS = 64
"""Links that are kept although nobody uses them at present."""


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
    def of(cls, server: Announcement) -> PeerAddress:
        """Where a server says that it is."""
        return cls(server.peer_id, tuple(server.direct), server.tls_certificate, tuple(server.multiaddrs))

    @classmethod
    def from_wire(cls, wire: pb.PeerAddress) -> PeerAddress:
        """Raises: ProtocolError: a field is malformed or too long."""
        fields = AddressFields.check(wire.peer_id, list(wire.direct), wire.tls_certificate, list(wire.multiaddrs))
        return cls(fields.peer_id, tuple(fields.direct), fields.tls_certificate, tuple(fields.multiaddrs))


@dataclass(slots=True, eq=False)
class _Link:
    """An open channel, and how many use it."""

    channel: grpc.aio.Channel
    owned: AsyncExitStack
    num_users: int = 0
    retired: bool = False
    """Nobody new gets it; it is closed when its last user is gone."""


class Connector:
    """Keeps one channel per peer, opened on first use and shared by all calls to it.

    Args:
        open_tunnel: how to reach a peer that cannot be dialled; None: such peers are unavailable.
        rule: which of a peer's addresses may be dialled at all.
        connect_timeout_s: for each of the two ways.
        sign: of a private swarm, says what calls to a server carry.
    """

    def __init__(
        self,
        open_tunnel: TunnelOpener | None,
        *,
        rule: DiallingRule | None = None,
        connect_timeout_s: float = 3.0,
        sign: CallSigner | None = None,
    ) -> None:
        self._sign = sign
        self._open_tunnel = open_tunnel
        self._rule = rule or Anywhere()
        self._connect_timeout_s = connect_timeout_s
        self._links: dict[PeerAddress, asyncio.Task[_Link]] = {}

    @asynccontextmanager
    async def lease(self, address: PeerAddress) -> AsyncIterator[grpc.aio.Channel]:
        """Use a connected channel to the peer while the body runs.

        Raises: PeerUnavailable: no way leads to it. ProtocolError: its certificate cannot be read.
        """
        link = await self._link(address)
        link.num_users += 1
        try:
            yield link.channel
        finally:
            link.num_users -= 1
            if link.retired and not link.num_users:
                await link.owned.aclose()
            await self._close_idle()

    async def forget(self, peer_id: str) -> None:
        """Let the next call to this peer connect anew; calls in progress go on over their link."""
        for address in [each for each, task in self._links.items() if each.peer_id == peer_id and task.done()]:
            await self._retire(self._links.pop(address))

    async def cut_off(self, unwanted: Callable[[str], bool]) -> None:
        """End the calls in progress to peers with these ids, and their links."""
        for address in [each for each in self._links if unwanted(each.peer_id)]:
            if (task := self._links.pop(address, None)) is not None:
                await self._retire(task, force=True)

    async def renew(self, peer_id: str) -> bool:
        """Connect to a peer once more, for new calls; calls in progress go on over their link.

        Returns: whether that succeeded. If not, everything is as it was.
        """
        address = next((each for each in reversed(self._links) if each.peer_id == peer_id), None)
        if address is None:
            return False
        await asyncio.wait({self._links[address]})
        task = asyncio.create_task(self._connect(address))
        try:
            await task
        except (PeerUnavailable, ProtocolError) as exc:
            logger.debug("no better way to peer %s: %s", peer_id, exc)
            return False
        await self.forget(peer_id)
        if address in self._links:  # somebody is connecting anew
            await self._retire(task)
            return False
        self._links[address] = task
        return True

    async def aclose(self) -> None:
        """Close all channels and tunnels."""
        tasks, self._links = list(self._links.values()), {}
        for task in tasks:
            await self._retire(task, force=True)

    async def _link(self, address: PeerAddress) -> _Link:
        task = self._links.pop(address, None) or asyncio.create_task(self._connect(address))
        self._links[address] = task  # at the end: the most recently used
        try:
            return await asyncio.shield(task)
        finally:
            if task.done() and (task.cancelled() or task.exception() is not None) and self._links.get(address) is task:
                del self._links[address]

    async def _close_idle(self) -> None:
        idle = [
            address
            for address, task in self._links.items()
            if task.done() and not task.cancelled() and task.exception() is None and not task.result().num_users
        ]
        for address in idle[: max(0, len(idle) - MAX_IDLE_LINKS)]:
            await self._retire(self._links.pop(address))

    async def _retire(self, task: asyncio.Task[_Link], *, force: bool = False) -> None:
        if not task.done():
            task.cancel()
        link = (await asyncio.gather(task, return_exceptions=True))[0]
        if isinstance(link, _Link):
            link.retired = True
            if force or not link.num_users:
                await link.owned.aclose()

    async def _connect(self, address: PeerAddress) -> _Link:
        try:
            pem = certificate_pem(address.tls_certificate)
        except ValueError as exc:
            raise _blamed(ProtocolError(f"the certificate of peer {address.peer_id} cannot be read"), address) from exc
        open_to = partial(self._open, pem, address.tls_certificate)
        targets = await self._rule.targets(address.direct)
        if targets and (link := await self._dial(targets, open_to)) is not None:
            return link
        if self._open_tunnel is not None and address.multiaddrs:
            try:
                multiaddrs = tuple(await self._rule.multiaddrs(address.multiaddrs))
                return await self._tunnel(self._open_tunnel(address.peer_id, multiaddrs), open_to)
            except PeerUnavailable as exc:
                raise _blamed(exc, address) from exc
        raise _blamed(PeerUnavailable(f"peer {address.peer_id} cannot be reached"), address)

    def _open(self, pem: bytes, certificate_der: bytes, target: str) -> grpc.aio.Channel:
        return open_channel(target, pem, TLS_NAME, self._sign(certificate_der) if self._sign is not None else None)

    async def _dial(self, targets: list[str], open_to: Callable[[str], grpc.aio.Channel]) -> _Link | None:
        """Dial all targets at once; the first that connects is the link."""
        channels = [open_to(target) for target in targets]
        attempts = {asyncio.create_task(_becomes_ready(each, self._connect_timeout_s)): each for each in channels}
        winner: grpc.aio.Channel | None = None
        try:
            for attempt in asyncio.as_completed(attempts):
                await attempt
                ready = [each for done, each in attempts.items() if done.done() and done.result()]
                if ready:
                    winner = ready[0]
                    break
        finally:
            for pending in attempts:
                pending.cancel()
            await asyncio.gather(*attempts, return_exceptions=True)
            for channel in channels:
                if channel is not winner:
                    await channel.close()
        if winner is None:
            return None
        owned = AsyncExitStack()
        owned.push_async_callback(winner.close)
        return _Link(winner, owned)

    async def _tunnel(
        self, opening: AbstractAsyncContextManager[str], open_to: Callable[[str], grpc.aio.Channel]
    ) -> _Link:
        async with AsyncExitStack() as owned:
            target = await owned.enter_async_context(opening)
            channel = open_to(target)
            owned.push_async_callback(channel.close)
            if not await _becomes_ready(channel, 2 * self._connect_timeout_s):
                raise PeerUnavailable("the peer does not answer through the tunnel")
            return _Link(channel, owned.pop_all())


def _blamed(error: PeerUnavailable | ProtocolError, address: PeerAddress) -> PeerUnavailable | ProtocolError:
    error.peer_id = address.peer_id
    return error


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
