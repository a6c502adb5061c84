"""Saying that a server is overloaded: one line for each period in which something had to wait for long, or was refused.

It is read off two looks at the server's statistics; nothing else counts what happens.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from .counters import EngineStatistics
from .scheduler import Kind
from .server_statistics import ServerStatistics, TenureStatistics

logger = logging.getLogger(__name__)

PERIOD_S = 10.0
"""At most one line in so long."""

LATE_S = {Kind.DECODE: 1.0, Kind.PREFILL: 10.0}
"""Steps that wait longer than this for their first pass say that there are too many. Training may wait."""


def overload(before: ServerStatistics, now: ServerStatistics) -> dict[str, int]:
    """Return what was too much between two looks: name -> how often; empty if nothing was."""
    found = {
        f"refused_{what.value}": count - before.quotas.refused.get(what, 0)
        for what, count in now.quotas.refused.items()
    }
    if now.tenure is not None:
        found |= _in_tenure(_earlier(before, now.tenure), now.tenure)
    return {name: count for name, count in found.items() if count > 0}


def _earlier(before: ServerStatistics, now: TenureStatistics) -> TenureStatistics | None:
    """What was counted of the same blocks; None: of others, and counts have begun anew."""
    old = before.tenure
    return old if old is not None and old.engine.started_at_s == now.engine.started_at_s else None


def _in_tenure(before: TenureStatistics | None, now: TenureStatistics) -> dict[str, int]:
    counts = _counts(now)
    if before is not None:
        earlier = _counts(before)
        counts = {name: count - earlier[name] for name, count in counts.items()}
    late = {
        f"late_{kind.name.lower()}_steps": _num_late(None if before is None else before.engine, now.engine, kind)
        for kind in LATE_S
    }
    return counts | late | {"sessions_waiting": now.sessions.num_waiting}


def _counts(tenure: TenureStatistics) -> dict[str, int]:
    counters, sessions, room = tenure.engine.counters, tenure.sessions, tenure.room
    return {
        "steps_without_pages": counters.num_out_of_pages,
        "steps_given_up": counters.num_given_up,
        "sessions_sent_away": counters.num_sent_away,
        "sessions_reclaimed": sessions.num_reclaimed,
        "sessions_waited": sessions.num_waited,
        "sessions_refused": sessions.num_refused,
        "messages_waited": room.num_waited,
        "messages_refused": room.num_refused,
    }


def _num_late(before: EngineStatistics | None, now: EngineStatistics, kind: Kind) -> int:
    num_late = now.queue_s[kind].num_above(LATE_S[kind])
    return num_late if before is None else num_late - before.queue_s[kind].num_above(LATE_S[kind])


def describe(found: dict[str, int], before: ServerStatistics, now: ServerStatistics) -> str:
    """Return the line: what was too much, then how full the server is; key=value throughout."""
    parts: dict[str, object] = dict(found)
    if (tenure := now.tenure) is not None:
        steps = tenure.engine.step_queue_s
        if (earlier := _earlier(before, tenure)) is not None:
            steps = steps.since(earlier.engine.step_queue_s)
        parts |= {
            "queue_p95_s": f"{steps.quantile(0.95):g}",
            "oldest_wait_s": f"{tenure.engine.oldest_wait_s:.1f}",
            "queue_length": tenure.engine.queue_length,
            "sessions": tenure.sessions.num_sessions,
            "free_pages": tenure.sessions.num_free_pages,
            "pages": tenure.sessions.num_pages,
            "message_bytes": tenure.room.used_bytes,
            "messages_waiting": tenure.room.num_waiting,
        }
    return " ".join(f"{name}={value}" for name, value in parts.items())


async def log_overload(
    read: Callable[[], ServerStatistics], *, wait: Callable[[float], Awaitable[None]] = asyncio.sleep
) -> None:
    """Say it, once in PERIOD_S at most, until cancelled."""
    before = read()
    while True:
        await wait(PERIOD_S)
        now = read()
        if found := overload(before, now):
            logger.warning("overloaded: period_s=%g %s", PERIOD_S, describe(found, before, now))
        before = now
