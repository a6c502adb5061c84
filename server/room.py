"""Room for messages: tensors that arrive, wait for their turn, or wait to be sent. It is found before they are read.

Who opens calls and sends half of what it announced, or reads nothing of what it is answered, fills its own share of
the room, and waits for itself.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import grpc.aio

from swarm.errors import PeerUnavailable, TooManyRequests
from swarm.streams import PART_TIMEOUT_S, total_timeout_s, write_message
from swarm.v1 import blocks_pb2 as pb

from .callers import Caller

LEAST_ROOM_BYTES = 512 << 20
"""Room for messages where nothing else is said, and a share of it holds the largest batch."""

SMALL_BYTES = 64 << 10
"""Messages of less need no room: those of a session are few, and so are sessions."""

MAX_WAIT_S = 120.0
"""After so long without room the caller is sent elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoomStatistics:
    used_bytes: int
    num_waiting: int
    """Steps and batches that wait for room before they are read."""
    total_bytes: int
    num_waited: int
    """Those that others have kept waiting so far."""
    num_refused: int
    """Those that waited for too long."""


@dataclass(slots=True, eq=False)
class _Entry:
    caller: Caller
    num_bytes: int
    is_oversize: bool
    admitted: asyncio.Future[None]


class Held:
    """Room that was taken, until it is released; none if nothing says how to."""

    def __init__(self, release: Callable[[], None] = lambda: None) -> None:
        self.release = release


class MessageRoom:
    """Bytes of messages that may be in memory at a time.

    Who has least of it comes first, then who has asked first. Nobody has more than a share; what is larger than that
    counts as one, and only one such is in at a time.

    Args:
        share: of the room, for one caller that is not this machine itself.
    """

    def __init__(self, max_bytes: int, share: float = 1.0) -> None:
        self._max_bytes = max_bytes
        self._share = share
        self._used: collections.Counter[Caller] = collections.Counter()
        self._waiting: list[_Entry] = []
        self._oversize: _Entry | None = None
        self._num_waited = self._num_refused = 0

    def statistics(self) -> RoomStatistics:
        """Count everything."""
        return RoomStatistics(
            used_bytes=self._used.total(),
            num_waiting=len(self._waiting),
            total_bytes=self._max_bytes,
            num_waited=self._num_waited,
            num_refused=self._num_refused,
        )

    @asynccontextmanager
    async def hold(self, caller: Caller, num_bytes: int) -> AsyncIterator[None]:
        """Wait for room, and keep it while the body runs. Raises: TooManyRequests: there was none for too long."""
        held = await self.take(caller, num_bytes)
        try:
            yield
        finally:
            held.release()

    async def take(self, caller: Caller, num_bytes: int) -> Held:
        """Wait for room, which stays taken until it is released. Raises: TooManyRequests: see `hold`."""
        most = self._most(caller)
        admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = _Entry(caller, min(num_bytes, most), num_bytes > most, admitted)
        self._waiting.append(entry)
        self._admit()
        self._num_waited += not (admitted.done() or self._waits_for_itself(entry))
        try:
            async with asyncio.timeout(MAX_WAIT_S):
                await entry.admitted
        except BaseException as exc:
            self.release(entry)
            if isinstance(exc, TimeoutError):
                self._num_refused += 1
                raise TooManyRequests(
                    f"messages that others have not sent or taken yet left no room for {MAX_WAIT_S:.0f} s"
                ) from exc
            raise
        return Held(partial(self.release, entry))

    def release(self, entry: _Entry) -> None:
        """Give room back, or no longer wait for it."""
        if entry in self._waiting:
            self._waiting.remove(entry)
        else:
            self._used[entry.caller] -= entry.num_bytes
            self._used += collections.Counter()  # forgets who has none
            if self._oversize is entry:
                self._oversize = None
        self._admit()

    def _most(self, caller: Caller) -> int:
        return self._max_bytes if caller.is_own else int(self._share * self._max_bytes)

    def _waits_for_itself(self, entry: _Entry) -> bool:
        """Whether it is its caller's own messages, or another one of such a size, for which it waits."""
        if entry.is_oversize and self._oversize is not None:
            return True
        used = self._used[entry.caller]
        return used > 0 and used + entry.num_bytes > self._most(entry.caller)

    def _admit(self) -> None:
        while candidates := [entry for entry in self._waiting if not self._waits_for_itself(entry)]:
            first = min(candidates, key=lambda entry: self._used[entry.caller])
            if self._used.total() + first.num_bytes > self._max_bytes:
                return
            self._waiting.remove(first)
            self._used[first.caller] += first.num_bytes
            if first.is_oversize:
                self._oversize = first
            if not first.admitted.done():  # else cancelled, and its task has not run since
                first.admitted.set_result(None)


async def answer(context: grpc.aio.ServicerContext, first: pb.ComputeResponse, more: list[bytes]) -> None:
    """Send a result. Raises: PeerUnavailable: the caller does not take it, or too slowly."""

    async def write(message: pb.ComputeResponse) -> None:
        async with asyncio.timeout(PART_TIMEOUT_S):
            await context.write(message)

    timeout_s = total_timeout_s(sum(map(len, more)))
    try:
        async with asyncio.timeout(timeout_s):
            await write_message(write, first, more)
    except TimeoutError as exc:
        raise PeerUnavailable(
            f"the caller did not take a part of its results within {PART_TIMEOUT_S:.0f} s, or all within "
            f"{timeout_s:.0f} s"
        ) from exc
