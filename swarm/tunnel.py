"""gRPC through libp2p: how a peer is called that has no address of its own.

    client channel -> unix socket -> [open_tunnel] -> p2pd ~~ libp2p stream, perhaps relayed ~~ p2pd
                                                                      -> [serve_tunnel] -> gRPC port

Each connection that gRPC makes becomes one libp2p stream, byte for byte. The gRPC channel runs TLS with the pinned
certificate over it, so relays see ciphertext. When either end of a connection closes or fails, what it sent before
is still delivered and both ends are closed; p2pd knows no half-closed streams, and gRPC needs none.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from swarm.dht import STREAM_BUFFER_BYTES, Dht
from swarm.errors import PeerUnavailable, ResourceError
from swarm.p2pd import finish, open_socket_directory

if TYPE_CHECKING:
    from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo

logger = logging.getLogger(__name__)

PROTOCOL = "/swarm/grpc/1"
MAX_STREAMS = 1024
MAX_STREAMS_PER_PEER = 64
CONNECT_TIMEOUT_S = 10.0

_CHUNK_BYTES = 256 * 1024
_FLUSH_TIMEOUT_S = 2.0

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def serve_tunnel(dht: Dht, target: tuple[str, int]) -> AsyncIterator[None]:
    """Carry streams that arrive over libp2p to the gRPC port `target`, until the context ends."""
    connections: dict[asyncio.Task[None], str] = {}

    async def carry(stream: Stream) -> None:
        try:
            port = await asyncio.open_connection(*target, limit=STREAM_BUFFER_BYTES)
        except OSError as exc:
            logger.warning("the gRPC port %s:%d refuses a tunnel stream: %s", *target, exc)
        else:
            await _join(stream, port)
        finally:
            stream[1].close()

    async def accept(info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer_id = info.peer_id.to_base58()
        if len(connections) >= MAX_STREAMS or list(connections.values()).count(peer_id) >= MAX_STREAMS_PER_PEER:
            logger.info("refused a tunnel stream of peer %s: too many", peer_id)
            writer.close()
            return
        task = asyncio.create_task(carry((reader, writer)))
        connections[task] = peer_id
        task.add_done_callback(connections.pop)

    await dht.p2p.add_binary_stream_handler(PROTOCOL, accept)
    try:
        yield
    finally:
        await finish(_stop_serving(dht, connections))


@asynccontextmanager
async def open_tunnel(
    dht: Dht, peer_id: str, multiaddrs: Sequence[str], *, timeout_s: float = CONNECT_TIMEOUT_S
) -> AsyncIterator[str]:
    """Yield a gRPC target whose connections end at a peer's gRPC port.

    Args:
        multiaddrs: where the peer may be; if none works, libp2p looks for it in the swarm.
    Raises: PeerUnavailable: it cannot be reached, or serves no tunnel.
    """
    deadline_s = asyncio.get_running_loop().time() + timeout_s
    await _connect(dht, peer_id, multiaddrs, timeout_s)
    remaining_s = deadline_s - asyncio.get_running_loop().time()
    probe = await dht.open_stream(peer_id, PROTOCOL, timeout_s=max(0.1, remaining_s))
    probe[1].close()
    connections: set[asyncio.Task[None]] = set()

    async def carry(connection: Stream) -> None:
        try:
            await _join(connection, await dht.open_stream(peer_id, PROTOCOL, timeout_s=timeout_s))
        except PeerUnavailable as exc:
            logger.debug("tunnel: %s", exc)  # gRPC sees its connection closed and reports UNAVAILABLE
        finally:
            connection[1].close()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(carry((reader, writer)))
        connections.add(task)
        task.add_done_callback(connections.discard)

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
            await finish(_cancel(connections))


async def _connect(dht: Dht, peer_id: str, multiaddrs: Sequence[str], timeout_s: float) -> None:
    """Dial the peer; if that fails, ask our initial peers to relay: a peer behind NAT keeps a place at each of them."""
    relays = [f"{address}/p2p-circuit" for address in dht.config.initial_peers if dht.config.relay]
    try:
        await dht.connect(peer_id, multiaddrs, timeout_s=timeout_s / 2 if relays else timeout_s)
    except PeerUnavailable as direct:
        if not relays:
            raise
        try:
            await dht.connect(peer_id, relays, timeout_s=timeout_s / 2)
        except PeerUnavailable as relayed:
            raise PeerUnavailable(f"{direct}; nor through a relay: {relayed}") from relayed


async def _join(left: Stream, right: Stream) -> None:
    """Carry bytes both ways until one side ends; then deliver what is on its way and close both."""
    directions = {
        asyncio.create_task(_pipe(left[0], right[1])),
        asyncio.create_task(_pipe(right[0], left[1])),
    }
    writers = (left[1], right[1])
    try:
        await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        for writer in writers:
            writer.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_TIMEOUT_S):
                await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)
    finally:
        for direction in directions:
            direction.cancel()
        for writer in writers:
            writer.transport.abort()
        await asyncio.wait(directions)


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(_CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
    except OSError as exc:
        logger.debug("a tunnel connection broke: %s", exc)


async def _stop_serving(dht: Dht, connections: dict[asyncio.Task[None], str]) -> None:
    from hivemind.p2p import P2PDaemonError

    with contextlib.suppress(P2PDaemonError, OSError, asyncio.IncompleteReadError, TimeoutError):
        async with asyncio.timeout(_FLUSH_TIMEOUT_S):
            await dht.p2p.remove_binary_stream_handler(PROTOCOL)
    await _cancel(set(connections))


async def _cancel(tasks: set[asyncio.Task[None]]) -> None:
    running = set(tasks)
    for task in running:
        task.cancel()
    if running:
        await asyncio.wait(running, timeout=_FLUSH_TIMEOUT_S)
