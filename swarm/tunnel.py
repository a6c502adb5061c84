"""gRPC through libp2p: how a peer is called whose gRPC port cannot be dialled.

    client channel -> unix socket -> [open_tunnel] -> p2pd ~~ libp2p stream, perhaps through a relay ~~ p2pd
                                                                      -> [serve_tunnel] -> gRPC port

Each connection that gRPC makes becomes one libp2p stream, byte for byte, or one TCP connection, where the peers have
managed to dial each other meanwhile (swarm/punching.py). The gRPC channel runs TLS with the pinned
certificate over it, so relays see ciphertext. When either end of a connection closes or fails, what it sent before
is still delivered and both ends are closed; p2pd knows no half-closed streams, and gRPC needs none.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swarm.dht import STREAM_BUFFER_BYTES, Dht
from swarm.dial_back import stop_handling
from swarm.dialling import Anywhere, DiallingRule
from swarm.errors import PeerError, PeerUnavailable, ResourceError
from swarm.p2pd import finish, open_socket_directory
from swarm.pipes import Stream, cancel_all, join_streams
from swarm.punching import Puncher, answer_punches
from swarm.relays import TUNNEL_PROTOCOL, open_relayed_stream, relays_of

if TYPE_CHECKING:
    from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo

logger = logging.getLogger(__name__)

PROTOCOL = TUNNEL_PROTOCOL
MAX_STREAMS = 1024
MAX_STREAMS_PER_PEER = 64
MAX_STREAMS_PER_RELAY = MAX_STREAMS // 2
"""One of our relays brings streams of many peers, but must leave room for other ways."""
MAX_RELAYS_TRIED = 4
CONNECT_TIMEOUT_S = 10.0

HEAD_START_S = 0.5
"""How long a peer is dialled before its relays are asked, one after the other: in one home network it can be."""


@dataclass(frozen=True, slots=True)
class Way:
    """How the streams of a tunnel reach the peer."""

    relay_id: str = ""
    """Peer id of the relay; empty: libp2p has a connection to the peer."""
    is_punched: bool = False
    """Whether it is one TCP connection, which both have dialled."""

    def __str__(self) -> str:
        if self.is_punched:
            return "directly (punched)"
        return f"through relay {self.relay_id}" if self.relay_id else "over libp2p"


Entering = Callable[[int, str, bool], AbstractContextManager[None]]
"""Told of a connection while it is carried: the local port from which it goes on, the peer id or host from which it
comes, and whether that is a relay of ours."""


def _enter_unnoticed(_port: int, _origin: str, _is_relay: bool) -> AbstractContextManager[None]:
    return nullcontext()


@asynccontextmanager
async def serve_tunnel(
    dht: Dht,
    target: tuple[str, int],
    relays: Collection[str] = (),
    rule: DiallingRule | None = None,
    entering: Entering = _enter_unnoticed,
) -> AsyncIterator[None]:
    """Carry streams that arrive over libp2p to the gRPC port `target`, until the context ends.

    Args:
        relays: peer ids of our relays, whose streams come from many peers, and which may introduce callers.
        rule: where such callers may be dialled.
        entering: told whose each connection to that port is, before a byte is carried.
    """
    connections: dict[asyncio.Task[None], str] = {}

    async def carry(stream: Stream, origin: str) -> None:
        try:
            port = await asyncio.open_connection(*target, limit=STREAM_BUFFER_BYTES)
        except OSError as exc:
            logger.warning("the gRPC port %s:%d refuses a tunnel stream: %s", *target, exc)
        else:
            with entering(port[1].get_extra_info("sockname")[1], origin, origin in relays):
                await join_streams(stream, port)
        finally:
            stream[1].close()

    def begin(stream: Stream, origin: str) -> None:
        """Carry one more, from a peer or a host."""
        of_origin = list(connections.values()).count(origin)
        allowed = MAX_STREAMS_PER_RELAY if origin in relays else MAX_STREAMS_PER_PEER
        if len(connections) >= MAX_STREAMS or of_origin >= allowed:
            logger.info("refused a tunnel stream of %s: too many", origin)
            stream[1].close()
            return
        task = asyncio.create_task(carry(stream, origin))
        connections[task] = origin
        task.add_done_callback(connections.pop)

    async def accept(info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        begin((reader, writer), info.peer_id.to_base58())

    await dht.p2p.add_binary_stream_handler(PROTOCOL, accept)
    try:
        async with answer_punches(dht, rule or Anywhere(), relays, begin):
            yield
    finally:
        await finish(stop_handling(dht.p2p, PROTOCOL))
        await finish(cancel_all(connections))


@asynccontextmanager
async def open_tunnel(
    dht: Dht,
    peer_id: str,
    multiaddrs: Sequence[str],
    *,
    timeout_s: float = CONNECT_TIMEOUT_S,
    on_way: Callable[[Way], None] | None = None,
    puncher: Puncher | None = None,
) -> AsyncIterator[str]:
    """Yield a gRPC target whose connections end at a peer's gRPC port.

    Args:
        multiaddrs: where the peer may be, and its relays; if none works, libp2p looks for it in the swarm.
        on_way: told how the peer is reached.
        puncher: has a direct connection to the peer already, or looks for one if the way leads through a relay.
    Raises: PeerUnavailable: it cannot be reached, or serves no tunnel.
    """
    punched = puncher.take(peer_id) if puncher is not None else None
    if punched is not None:
        way = Way(is_punched=True)
    else:
        way = await find_way(dht, peer_id, multiaddrs, timeout_s=timeout_s)
    logger.info("peer %s is reached %s", peer_id, way)
    if on_way is not None:
        on_way(way)
    connections: set[asyncio.Task[None]] = set()

    async def carry(connection: Stream) -> None:
        nonlocal punched
        try:
            onward, punched = punched, None
            if onward is None:
                onward = await _open_stream(dht, peer_id, way, timeout_s)
                if way.relay_id and puncher is not None:
                    puncher.begin(peer_id, way.relay_id)
            await join_streams(connection, onward)
        except PeerError as exc:
            logger.debug("tunnel: %s", exc)  # gRPC sees its connection closed and reports UNAVAILABLE
        finally:
            connection[1].close()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(carry((reader, writer)))
        connections.add(task)
        task.add_done_callback(connections.discard)

    try:
        with open_socket_directory() as directory:
            path = directory / "grpc.sock"
            try:
                server = await asyncio.start_unix_server(accept, path=path, limit=STREAM_BUFFER_BYTES)
            except OSError as exc:
                raise ResourceError(f"cannot open a local socket for a tunnel: {exc.strerror or exc}") from exc
            try:
                yield f"unix:{path}"
            finally:
                server.close()
                await finish(cancel_all(connections))
    finally:
        if punched is not None:  # nobody has come to use it
            punched[1].close()


async def find_way(dht: Dht, peer_id: str, multiaddrs: Sequence[str], *, timeout_s: float = CONNECT_TIMEOUT_S) -> Way:
    """Connect to a peer over libp2p or through its relays, in the order in which it names them; see that it answers.

    Each has a head start before the next one, which begins at once when those before it have failed.

    Raises: PeerUnavailable: no way leads to its tunnel.
    """
    deadline_s = asyncio.get_running_loop().time() + timeout_s
    plain = [text for text in multiaddrs if "/p2p-circuit" not in text]
    relays = list(relays_of(multiaddrs).items())[:MAX_RELAYS_TRIED]
    ways = [(peer_id, plain, Way()), *((relay_id, addresses, Way(relay_id)) for relay_id, addresses in relays)]
    tries: list[asyncio.Task[Way]] = []
    try:
        for dialled_id, addresses, way in ways:
            tries.append(asyncio.create_task(_reach(dht, peer_id, dialled_id, addresses, way, deadline_s)))
            is_last = len(tries) == len(ways)
            if (found := await _first_way(tries, None if is_last else HEAD_START_S)) is not None:
                return found
        failures = "; ".join(dict.fromkeys(str(failed.exception()) for failed in tries))
        raise PeerUnavailable(f"no way leads to peer {peer_id}: {failures}")
    finally:
        await cancel_all(tries)
        await asyncio.gather(*tries, return_exceptions=True)


async def _first_way(tries: Sequence[asyncio.Task[Way]], timeout_s: float | None) -> Way | None:
    """Wait until one of them succeeds; None: all have failed, or none has ended for a while."""
    pending = set(tries)
    while pending:
        done, pending = await asyncio.wait(pending, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for finished in done:
            with suppress(PeerError):
                return finished.result()
        if not done:
            break
    return None


async def _reach(
    dht: Dht, peer_id: str, dialled_id: str, multiaddrs: Sequence[str], way: Way, deadline_s: float
) -> Way:
    """Dial the peer or its relay, and see that the peer's tunnel answers on this way."""
    now_s = asyncio.get_running_loop().time
    await dht.connect(dialled_id, multiaddrs, timeout_s=max(0.1, deadline_s - now_s()))
    probe = await _open_stream(dht, peer_id, way, max(0.1, deadline_s - now_s()))
    probe[1].close()
    return way


async def _open_stream(dht: Dht, peer_id: str, way: Way, timeout_s: float) -> Stream:
    if way.is_punched:
        raise PeerUnavailable(f"the direct connection to peer {peer_id} has ended")
    if way.relay_id:
        return await open_relayed_stream(dht, way.relay_id, peer_id, timeout_s=timeout_s)
    return await dht.open_stream(peer_id, PROTOCOL, timeout_s=timeout_s)
