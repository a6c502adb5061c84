"""Answers that wait for their callers: room for them is found before they are computed, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc.aio

from swarm.errors import CacheFull, PeerUnavailable
from swarm.streams import PART_TIMEOUT_S, write_message
from swarm.v1 import blocks_pb2 as pb

LEAST_ROOM_BYTES = 256 << 20
"""Room for answers, where that of adapters, whose gradients are most of them, is not larger."""

LEAST_BYTES_PER_S = 64 << 10
"""Who takes an answer more slowly holds room that others need."""

MAX_WAIT_S = 120.0
"""After so long without room the caller is sent elsewhere."""


@dataclass(frozen=True, slots=True)
class AnswerStatistics:
    used_bytes: int
    num_waiting: int
    """Batches that wait for room before they run."""
    total_bytes: int


@dataclass(slots=True, eq=False)
class _Waiting:
    caller: str
    num_bytes: int
    admitted: asyncio.Future[None]


class AnswerRoom:
    """Bytes of answers that may be in memory at a time.

    Who has least of it comes first, then who has asked first: one that takes its answers slowly waits for itself.
    An answer larger than the room is let in alone.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._used: collections.Counter[str] = collections.Counter()
        """Caller -> bytes."""
        self._waiting: list[_Waiting] = []

    def statistics(self) -> AnswerStatistics:
        return AnswerStatistics(self._used.total(), len(self._waiting), self._max_bytes)

    @asynccontextmanager
    async def hold(self, caller: str, num_bytes: int) -> AsyncIterator[None]:
        """Wait for room, and keep it while the body runs.

        Raises: CacheFull: there was none for too long.
        """
        waiting = _Waiting(caller, num_bytes, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._admit()
        try:
            try:
                async with asyncio.timeout(MAX_WAIT_S):
                    await waiting.admitted
            except TimeoutError as exc:
                raise CacheFull(f"answers that others have not taken yet left no room for {MAX_WAIT_S:.0f} s") from exc
            yield
        finally:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            else:
                self._used[caller] -= num_bytes
                self._used += collections.Counter()  # forgets who has none
            self._admit()

    def _admit(self) -> None:
        while self._waiting:
            first = min(self._waiting, key=lambda each: self._used[each.caller])
            used = self._used.total()
            if used and used + first.num_bytes > self._max_bytes:
                return
            self._waiting.remove(first)
            self._used[first.caller] += first.num_bytes
            if not first.admitted.done():  # else cancelled, and its task has not run since
                first.admitted.set_result(None)


async def answer(context: grpc.aio.ServicerContext, first: pb.ComputeResponse, more: list[bytes]) -> None:
    """Send a result. Raises: PeerUnavailable: the caller does not take it, or too slowly."""

    async def write(message: pb.ComputeResponse) -> None:
        async with asyncio.timeout(PART_TIMEOUT_S):
            await context.write(message)

    timeout_s = PART_TIMEOUT_S + sum(map(len, more)) / LEAST_BYTES_PER_S
    try:
        async with asyncio.timeout(timeout_s):
            await write_message(write, first, more)
    except TimeoutError as exc:
        raise PeerUnavailable(
            f"the caller did not take a part of its results within {PART_TIMEOUT_S:.0f} s, or all within "
            f"{timeout_s:.0f} s"
        ) from exc
