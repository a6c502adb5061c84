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
from swarm.errors import PeerUnavailable, ProtocolError, ResourceError
from swarm.identity import TLS_NAME, certificate_pem
from swarm.rpc import open_channel
from swarm.rpc_members import CallSigner
from swarm.throughput import Throughput
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
        self.throughput = Throughput()
        """What the users of channels have seen of them."""
        self.ways: dict[str, str] = {}
        """Peer id -> how a tunnel that was opened to it leads there, in words; for people."""
        self._links: dict[PeerAddress, asyncio.Future[_Link]] = {}
        """Those that are connected, and those that are being; the most recently used at the end."""

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
        await self._retire_links(peer_id)

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
        try:
            link = await self._connect(address)
        except (PeerUnavailable, ProtocolError) as exc:
            logger.debug("no better way to peer %s: %s", peer_id, exc)
            return False
        # Nothing waits between here and the new link's place among the others: it has an owner whoever is cancelled.
        renewed: asyncio.Future[_Link] = asyncio.get_running_loop().create_future()
        renewed.set_result(link)
        before = self._links.get(address)
        if before is not None and not before.done():  # somebody is connecting anew
            await self._retire(renewed)
            return False
        self._links[address] = renewed
        if before is not None:
            await self._retire(before)
        await self._retire_links(peer_id, but=address)
        return True

    async def aclose(self) -> None:
        """Close all channels and tunnels."""
        links, self._links = list(self._links.values()), {}
        for link in links:
            await self._retire(link, force=True)

    async def _link(self, address: PeerAddress) -> _Link:
        link = self._links.pop(address, None)
        if link is None:
            link = asyncio.create_task(self._connect(address))
            link.add_done_callback(partial(self._drop_failed, address))
        self._links[address] = link
        return await asyncio.shield(link)

    def _drop_failed(self, address: PeerAddress, link: asyncio.Future[_Link]) -> None:
        """Keep no failure for those who come later, also where all that waited for the link have given up."""
        if _connected(link) is None and self._links.get(address) is link:
            del self._links[address]

    async def _close_idle(self) -> None:
        connected = [(address, link) for address, future in self._links.items() if (link := _connected(future))]
        idle = [address for address, link in connected if not link.num_users]
        for address in idle[: max(0, len(idle) - MAX_IDLE_LINKS)]:
            if (future := self._links.pop(address, None)) is not None:
                await self._retire(future)

    async def _retire_links(self, peer_id: str, *, but: PeerAddress | None = None) -> None:
        """Retire the links to a peer that are connected, but for the one to this address."""
        of_peer = [each for each in self._links if each.peer_id == peer_id and each != but]
        for address in of_peer:
            if (link := self._links.get(address)) is not None and link.done():
                await self._retire(self._links.pop(address))

    async def _retire(self, future: asyncio.Future[_Link], *, force: bool = False) -> None:
        if not future.done():
            future.cancel()
            await asyncio.wait({future})
        if (link := _connected(future)) is not None:
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
            except ResourceError as exc:
                raise _blamed(PeerUnavailable(f"peer {address.peer_id} cannot be reached: {exc}"), address) from exc
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


def _connected(future: asyncio.Future[_Link]) -> _Link | None:
    """The link, if it is there."""
    return future.result() if future.done() and not future.cancelled() and future.exception() is None else None


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
