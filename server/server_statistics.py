"""One moment of a whole server: what metrics, the log and whoever embeds a server read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from swarm.errors import ResourceError
from swarm.ranges import BlockRange

from .adapters import AdapterStatistics
from .connections import Connections
from .counters import EngineStatistics
from .limits import Quotas, QuotaStatistics
from .room import RoomStatistics
from .session_statistics import SessionTableStatistics
from .tenure import Tenure

READ_TIMEOUT_S = 5.0
"""How long another thread waits for the event loop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TenureStatistics:
    """Of the blocks in service; counts begin anew with others."""

    blocks: BlockRange
    engine: EngineStatistics
    sessions: SessionTableStatistics
    adapters: AdapterStatistics
    room: RoomStatistics
    kept_activation_bytes: int
    """Activations that wait for their Backward."""
    num_kept_activation_hits: int
    """Slices whose Backward used some."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStatistics:
    """Counts and sizes only: nothing of who calls, or of what people compute."""

    num_connections: int
    """TCP connections to the gRPC port."""
    quotas: QuotaStatistics
    tenure: TenureStatistics | None
    """None while the server is on its way to other blocks."""


class StatisticsReader:
    """Reads everything at one moment; made in the event loop of the server.

    Args:
        tenure: gives what is in service; None while there is nothing.
    """

    def __init__(self, tenure: Callable[[], Tenure | None], quotas: Quotas, connections: Connections) -> None:
        self._tenure = tenure
        self._quotas = quotas
        self._connections = connections
        self._loop = asyncio.get_running_loop()

    def __call__(self) -> ServerStatistics:
        """Count everything; called in any thread. Raises: ResourceError: the server has ended, or is stuck."""
        if _running_loop() is self._loop:
            return self._read()
        reading = self._read_in_loop()
        try:
            answer = asyncio.run_coroutine_threadsafe(reading, self._loop)
        except RuntimeError as exc:
            reading.close()
            raise ResourceError("the server has ended") from exc
        try:
            return answer.result(READ_TIMEOUT_S)
        except TimeoutError as exc:
            answer.cancel()
            raise ResourceError(f"the server has not answered for {READ_TIMEOUT_S:.0f} s") from exc

    async def _read_in_loop(self) -> ServerStatistics:
        return self._read()

    def _read(self) -> ServerStatistics:
        tenure = self._tenure()
        return ServerStatistics(
            num_connections=self._connections.num_open,
            quotas=self._quotas.statistics(),
            tenure=None if tenure is None else _of_tenure(tenure),
        )


def _of_tenure(tenure: Tenure) -> TenureStatistics:
    return TenureStatistics(
        blocks=tenure.blocks,
        engine=tenure.engine.statistics(),
        sessions=tenure.sessions.statistics(),
        adapters=tenure.adapters.statistics(),
        room=tenure.room.statistics(),
        kept_activation_bytes=tenure.kept.used_bytes,
        num_kept_activation_hits=tenure.kept.num_hits,
    )


def _running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop of this thread."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
