"""A relay's second port, at which it sees where peers come from, so that two of them can dial each other.

Their libp2p connections have ports of their own, which their programs cannot dial from; see swarm/punching.py.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from swarm.errors import ResourceError
from swarm.p2pd import finish
from swarm.pipes import Stream, cancel_all, write_line
from swarm.punching import TOKEN_BYTES, Introduction, Meeting
from swarm.reach import place_of
from swarm.relays import ASK_TIMEOUT_S

logger = logging.getLogger(__name__)

MAX_GUESTS = 128
"""Connections at once."""
MAX_GUESTS_FROM_ONE = 8
"""Of one place, as limits count addresses."""
TOKEN_TIMEOUT_S = 3.0
"""How long it may take who comes to say why."""
STAY_S = 20.0
"""How long a peer may stay connected: its router forgets its port soon after."""


class Mirror:
    """Get one from `open_mirror`."""

    def __init__(self) -> None:
        self.port = 0
        self._awaited: dict[bytes, tuple[str, asyncio.Future[Introduction]]] = {}
        """Token -> from where it has to come, as limits count addresses; where it came from."""
        self._guests: dict[asyncio.Task[None], str] = {}
        """With the place where each comes from."""

    async def see(self, stream: Stream, peer_id: str, place: str) -> Introduction:
        """Call a peer to the mirror, and return where it comes from.

        Args:
            stream: to that peer.
            place: where it is, so that nobody else can come in its place.
        Raises: PeerUnavailable: its stream has ended. TimeoutError: it does not come.
        """
        token = secrets.token_bytes(TOKEN_BYTES)
        coming: asyncio.Future[Introduction] = asyncio.get_running_loop().create_future()
        self._awaited[token] = place, coming
        try:
            await write_line(stream[1], Meeting(port=self.port, token=token.hex()), peer_id)
            async with asyncio.timeout(ASK_TIMEOUT_S):
                return await coming
        finally:
            del self._awaited[token]

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take a connection, which a task of its own then looks at."""
        peername = writer.get_extra_info("peername")  # None if the connection is broken already
        here = place_of(peername[0]) if peername else ""
        from_here = list(self._guests.values()).count(here)
        if not peername or len(self._guests) >= MAX_GUESTS or from_here >= MAX_GUESTS_FROM_ONE:
            writer.transport.abort()
            return
        task = asyncio.create_task(self._look(reader, writer, peername[0], peername[1]))
        self._guests[task] = here
        task.add_done_callback(self._guests.pop)

    async def _look(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, port: int) -> None:
        try:
            async with asyncio.timeout(TOKEN_TIMEOUT_S):
                token = await reader.readexactly(TOKEN_BYTES)
            place, coming = self._awaited.get(token, ("", None))
            if coming is not None and not coming.done() and place_of(host) == place:
                coming.set_result(Introduction(host=host, port=port))
                async with asyncio.timeout(STAY_S):
                    await reader.read(1)
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as exc:
            logger.debug("mirror: %s:%d: %r", host, port, exc)
        finally:
            writer.transport.abort()

    async def aclose(self) -> None:
        """End all connections."""
        await cancel_all(self._guests)


@asynccontextmanager
async def open_mirror(host: str, port: int) -> AsyncIterator[Mirror]:
    """Listen while the body runs. Raises: ResourceError: the port is taken."""
    mirror = Mirror()
    try:
        server = await asyncio.start_server(mirror.accept, host, port, limit=TOKEN_BYTES)
    except OSError as exc:
        raise ResourceError(
            f"port {port} on {host} is in use or not allowed: choose another --mirror-port, or 0 for any free one"
        ) from exc
    async with server:
        mirror.port = server.sockets[0].getsockname()[1]
        try:
            yield mirror
        finally:
            await finish(mirror.aclose())
