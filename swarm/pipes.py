"""Streams between peers: short messages of one line each, and joining two streams into one connection.

A line is a JSON object of at most 4 KiB. What it may hold is said by a pydantic model, as it comes from a stranger.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from swarm.errors import PeerUnavailable, ProtocolError

logger = logging.getLogger(__name__)

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
M = TypeVar("M", bound=BaseModel)

FLUSH_TIMEOUT_S = 2.0
"""How long what one end has sent may take to reach the other after the first has closed."""

_CHUNK_BYTES = 256 * 1024
_MAX_LINE_BYTES = 4096


async def read_line(reader: asyncio.StreamReader, model: type[M], peer_id: str, *, timeout_s: float) -> M:
    """Read one message. Raises: PeerUnavailable: none comes. ProtocolError: it is not what it should be."""
    try:
        async with asyncio.timeout(timeout_s):
            line = await reader.readuntil(b"\n")
        if len(line) > _MAX_LINE_BYTES:
            raise ValueError("it is too long")
        return model.model_validate_json(line)
    except TimeoutError as exc:
        raise PeerUnavailable(f"peer {peer_id} did not answer within {timeout_s:.1f} s") from exc
    except (OSError, asyncio.IncompleteReadError) as exc:
        raise PeerUnavailable(f"peer {peer_id} closed the stream without an answer") from exc
    except (ValidationError, ValueError, asyncio.LimitOverrunError) as exc:
        raise ProtocolError(f"peer {peer_id} sent a line that cannot be read") from exc


async def write_line(writer: asyncio.StreamWriter, message: BaseModel, peer_id: str) -> None:
    """Send one message. Raises: PeerUnavailable: nobody takes it."""
    try:
        writer.write(message.model_dump_json().encode() + b"\n")
        await writer.drain()
    except OSError as exc:
        raise PeerUnavailable(f"peer {peer_id} closed the stream") from exc


def no_wait(_num_bytes: int) -> float:
    """Let bytes pass at once."""
    return 0.0


async def join_streams(left: Stream, right: Stream, pace: Callable[[int], float] = no_wait) -> None:
    """Carry bytes both ways until one side ends; then deliver what is on its way and close both.

    Args:
        pace: called with each number of bytes that come in, says how many seconds they have to wait.
    """
    directions = {
        asyncio.create_task(_pipe(left[0], right[1], pace)),
        asyncio.create_task(_pipe(right[0], left[1], pace)),
    }
    writers = (left[1], right[1])
    try:
        await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        for writer in writers:
            writer.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_TIMEOUT_S):
                await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)
    finally:
        for direction in directions:
            direction.cancel()
        for writer in writers:
            writer.transport.abort()
        await asyncio.wait(directions)


async def cancel_all(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait, not for long, until they have ended."""
    running = set(tasks)
    for task in running:
        task.cancel()
    if running:
        await asyncio.wait(running, timeout=FLUSH_TIMEOUT_S)


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pace: Callable[[int], float]) -> None:
    try:
        while data := await reader.read(_CHUNK_BYTES):
            if (wait_s := pace(len(data))) > 0:
                await asyncio.sleep(wait_s)
            writer.write(data)
            await writer.drain()
    except OSError as exc:
        logger.debug("a connection between peers broke: %s", exc)
