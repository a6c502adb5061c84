"""Relays: peers that carry connections to servers that nobody can dial.

    client ── "to": server ──> relay <── "register" ── server     a hidden server keeps a stream open to each relay
    client ════ gRPC, TLS ════ relay ════ gRPC, TLS ══ server     the relay opens a stream back to it, and joins both

A relay opens streams only to peers that have registered with it, over the connections that these have made. It reads
nothing: what it carries is TLS between the two ends. Addresses are written as libp2p does,
/ip4/…/tcp/…/p2p/<relay>/p2p-circuit/p2p/<server>. Why libp2p's own relays are not used: docs/decisions/0016.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, Field

from swarm.announcement import PeerId
from swarm.dial_back import Node, stop_handling
from swarm.errors import PeerError, PeerUnavailable
from swarm.p2pd import finish
from swarm.pipes import Stream, cancel_all, join_streams, read_line, write_line

if TYPE_CHECKING:
    from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo

    from swarm.dht import Dht

logger = logging.getLogger(__name__)

PROTOCOL = "/swarm/relay/1"
TUNNEL_PROTOCOL = "/swarm/grpc/1"
"""What a relay opens to the server; see swarm/tunnel.py."""

MAX_REGISTERED = 1024
"""Servers that one relay carries connections to."""
MAX_CARRIED = 1024
"""Connections that a relay carries at once."""
MAX_CARRIED_PER_PEER = 64
"""Those that one caller may have."""
NUM_RELAYS = 2
"""With how many relays a hidden server registers."""
ASK_TIMEOUT_S = 5.0
RETRY_S = 5.0
"""How long a hidden server waits before it looks for relays again."""

_CIRCUIT = "/p2p-circuit"


class Request(BaseModel):
    """First line of a stream: one of the two."""

    register_me: bool = False
    """Carry connections to me for as long as this stream is open."""
    to: PeerId | None = None
    """Carry this stream to a peer that is registered."""


class Reply(BaseModel):
    """The relay's answer; after a good one to `to`, the stream is the peer's."""

    error: Annotated[str, Field(max_length=256)] = ""


def split_circuit(multiaddr: str) -> tuple[str, str] | None:
    """The peer id and the address of the relay that an address leads through; None: it leads through none."""
    relay, circuit, _ = multiaddr.partition(_CIRCUIT)
    peer_id = relay.rpartition("/p2p/")[2]
    return (peer_id, relay) if circuit and peer_id != relay else None


def relays_of(multiaddrs: Sequence[str]) -> dict[str, list[str]]:
    """The relays that addresses lead through: where each may be, by peer id."""
    relays: dict[str, list[str]] = {}
    for peer_id, address in filter(None, map(split_circuit, multiaddrs)):
        relays.setdefault(peer_id, []).append(address)
    return relays


def circuits(relays: Mapping[str, Sequence[str]], peer_id: str) -> list[str]:
    """The addresses of a peer through its relays, which are given as in `relays_of`."""
    through: dict[str, None] = {}
    for relay_id, addresses in relays.items():
        plain = [text.removesuffix(f"/p2p/{relay_id}") for text in addresses if _CIRCUIT not in text]
        outside = [text for text in plain if not text.startswith(("/ip4/127.", "/ip6/::1/"))]
        through |= dict.fromkeys(f"{text}/p2p/{relay_id}{_CIRCUIT}/p2p/{peer_id}" for text in outside or plain)
    return list(through)


@asynccontextmanager
async def serve_relay(dht: Dht, *, max_carried: int = MAX_CARRIED) -> AsyncIterator[None]:
    """Carry connections to the peers that register here, until the context ends."""
    registered: dict[str, asyncio.Task[None]] = {}
    streams: dict[asyncio.Task[None], str] = {}

    async def keep(peer_id: str, stream: Stream) -> None:
        """Know a server until its stream ends; it sends nothing more."""
        task = asyncio.current_task()
        assert task is not None
        registered[peer_id] = task  # of the same peer's streams, the last counts
        try:
            await write_line(stream[1], Reply(), peer_id)
            await stream[0].read(1)
        finally:
            if registered.get(peer_id) is task:
                del registered[peer_id]

    async def carry(caller: str, target: str, stream: Stream) -> None:
        if target not in registered:
            await write_line(stream[1], Reply(error="this relay does not know that peer"), caller)
            return
        try:
            onward = await dht.open_stream(target, TUNNEL_PROTOCOL, timeout_s=ASK_TIMEOUT_S)
        except PeerUnavailable:
            await write_line(stream[1], Reply(error="the peer does not answer its relay"), caller)
            return
        try:
            await write_line(stream[1], Reply(), caller)
            await join_streams(stream, onward)
        finally:
            onward[1].close()

    async def handle(peer_id: str, stream: Stream) -> None:
        try:
            request = await read_line(stream[0], Request, peer_id, timeout_s=ASK_TIMEOUT_S)
            if request.register_me and len(registered) < MAX_REGISTERED:
                await keep(peer_id, stream)
            elif request.to is not None and not request.register_me:
                await carry(peer_id, request.to, stream)
            else:
                await write_line(stream[1], Reply(error="this relay has no room"), peer_id)
        except (PeerError, OSError) as exc:
            logger.debug("relay: %s", exc)
        finally:
            stream[1].close()

    async def accept(info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer_id = info.peer_id.to_base58()
        carried = len(streams) - len(registered)
        if carried >= max_carried or list(streams.values()).count(peer_id) >= MAX_CARRIED_PER_PEER:
            logger.info("refused to relay for peer %s: too many connections", peer_id)
            writer.close()
            return
        task = asyncio.create_task(handle(peer_id, (reader, writer)))
        streams[task] = peer_id
        task.add_done_callback(streams.pop)

    await dht.p2p.add_binary_stream_handler(PROTOCOL, accept)
    try:
        yield
    finally:
        await finish(stop_handling(dht.p2p, PROTOCOL))
        await finish(cancel_all(streams))


async def open_relayed_stream(node: Node, relay_id: str, peer_id: str, *, timeout_s: float) -> Stream:
    """Open a stream to a peer's tunnel through a relay. Raises: PeerUnavailable, ProtocolError."""
    return await _ask_relay(node, relay_id, Request(to=peer_id), timeout_s)


async def _ask_relay(node: Node, relay_id: str, request: Request, timeout_s: float) -> Stream:
    stream = await node.open_stream(relay_id, PROTOCOL, timeout_s=timeout_s)
    try:
        await write_line(stream[1], request, relay_id)
        reply = await read_line(stream[0], Reply, relay_id, timeout_s=timeout_s)
        if reply.error:
            raise PeerUnavailable(f"relay {relay_id} refuses: {reply.error}")
    except BaseException:
        stream[1].close()
        raise
    return stream


class Registrations:
    """The relays that carry connections to this node: `run` in a task keeps them, `aclose` ends it all.

    Args:
        candidates: says whom to ask, those first that are preferred: peer id -> where it may be.
        on_change: called when relays were found or lost.
    """

    def __init__(
        self, node: Node, candidates: Callable[[], Mapping[str, Sequence[str]]], on_change: Callable[[], None]
    ) -> None:
        self._node = node
        self._candidates = candidates
        self._on_change = on_change
        self._kept: dict[str, asyncio.Task[None]] = {}
        self.addresses: dict[str, list[str]] = {}
        """Peer id of each relay -> where it is."""

    async def run(self) -> None:
        """Stay registered with NUM_RELAYS of the candidates, until cancelled."""
        while True:
            await self.fill()
            kept = list(self._kept.values())
            if kept:
                waiting_s = None if len(kept) >= NUM_RELAYS else RETRY_S
                await asyncio.wait(kept, timeout=waiting_s, return_when=asyncio.FIRST_COMPLETED)
            else:
                await asyncio.sleep(RETRY_S)

    async def aclose(self) -> None:
        """Give the places at all relays back."""
        await cancel_all(self._kept.values())

    async def fill(self) -> None:
        """Ask candidates in turn, until there are enough relays or nobody is left."""
        for peer_id, multiaddrs in self._candidates().items():
            if len(self._kept) >= NUM_RELAYS:
                return
            if peer_id in self._kept:
                continue
            try:
                await self._node.connect(peer_id, multiaddrs, timeout_s=ASK_TIMEOUT_S)
                stream = await _ask_relay(self._node, peer_id, Request(register_me=True), ASK_TIMEOUT_S)
            except PeerError as exc:
                logger.debug("no relay: %s", exc)
                continue
            self.addresses[peer_id] = list(multiaddrs)
            self._kept[peer_id] = asyncio.create_task(self._keep(peer_id, stream))
            logger.info("peer %s relays for this one", peer_id)
            self._on_change()

    async def _keep(self, peer_id: str, stream: Stream) -> None:
        try:
            await stream[0].read(1)
        except OSError as exc:
            logger.debug("relay %s: %s", peer_id, exc)
        finally:
            stream[1].close()
            del self._kept[peer_id], self.addresses[peer_id]
            logger.info("peer %s no longer relays for this one", peer_id)
            self._on_change()
