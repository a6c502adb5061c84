"""Keeps what a server says about itself in the directory up to date, and its place in the network."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from swarm.announcement import Announcement
from swarm.directory import Directory
from swarm.errors import SwarmError
from swarm.survey import Survey

from .config import PERIODS_ALIVE

logger = logging.getLogger(__name__)

SURVEYED, SURVEY_PERIODS = 8, 8
"""How many other servers are called to see how far they are, and every how many announcements."""

LINE_SERVERS = 3
"""To how many of them something large is sent, to see what our own line carries, before there is traffic that tells."""

SURVEY_BYTES = 50_000
"""About how much of the directory is read for that: each time another part of a large swarm's."""

WITHDRAW_TIMEOUT_S = 5.0

RETRY_S = 1.0
"""How soon an announcement that failed is tried again; then after twice as long, up to half a period."""


def next_wait_s(said: bool, waited_s: float, period_s: float) -> float:
    """How long to wait before the next announcement.

    After one that failed not a whole period: the network may be back at any moment, and clients forget this server
    meanwhile.

    Args:
        said: whether the one now made is in the directory.
        waited_s: how long was waited before it.
    """
    if said:
        return period_s
    return min(RETRY_S if waited_s == period_s else 2 * waited_s, period_s / 2)


class Announcer:
    """One server's announcement; see `announced`."""

    def __init__(self, directory: Directory, announcement: Announcement, survey: Survey, period_s: float) -> None:
        self._directory = directory
        self._survey = survey
        self._period_s = period_s
        self.current = announcement
        self.measure: Callable[[], dict[str, Any]] = dict
        """Gives the fields that change by themselves, each time that they are announced."""
        self._saying = asyncio.Lock()
        """One announcement after the other, or an older one could be written last."""

    async def say(self, **changes: Any) -> bool:
        """Announce the present state; a directory that cannot be reached is tried again soon.

        Args:
            changes: fields of the announcement, from now on.
        Returns: whether it is in the directory.
        """
        async with self._saying:
            expires_at_s = time.time() + PERIODS_ALIVE * self._period_s
            update = {"expires_at_s": expires_at_s, "coordinates": self._survey.here} | self.measure() | changes
            self.current = self.current.model_copy(update=update)
            try:
                await self._directory.announce(self.current)
            except SwarmError as exc:
                logger.warning("the directory could not be reached, clients may not find this server: %s", exc)
                return False
        return True

    async def others(self, *, max_bytes: float) -> list[Announcement]:
        """What the other servers of the model announce; see Directory.servers.

        Raises: PeerUnavailable: the directory cannot be reached.
        """
        servers = await self._directory.servers(self.current.model_fingerprint, max_bytes=max_bytes)
        return [each for each in servers if each.peer_id != self.current.peer_id]

    async def run(self) -> None:
        """Announce once a period, and look around, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_announcing())
            group.create_task(self._keep_looking_around())

    async def _keep_announcing(self) -> None:
        wait_s = self._period_s
        while True:
            await asyncio.sleep(wait_s)
            wait_s = next_wait_s(await self.say(), wait_s, self._period_s)

    async def _keep_looking_around(self) -> None:
        """See now and then how far other servers are."""
        while True:
            await self._look_around()
            await asyncio.sleep(SURVEY_PERIODS * self._period_s)

    async def _look_around(self) -> None:
        try:
            servers = await self.others(max_bytes=SURVEY_BYTES)
        except SwarmError as exc:
            logger.debug("no other servers can be looked up: %s", exc)
            return
        before = self._survey.here
        online = [each for each in servers if each.state == "online"]
        await self._survey.visit(online, SURVEYED)
        if before is None and self._survey.here is not None:
            await self.say()
        await self._survey.measure_line(online, LINE_SERVERS)

    async def withdraw(self) -> None:
        """Take the announcement back, if the directory answers soon; it expires anyway."""
        try:
            async with asyncio.timeout(WITHDRAW_TIMEOUT_S):
                await self._directory.withdraw(self.current)
        except (SwarmError, TimeoutError) as exc:
            logger.warning("could not withdraw from the directory, the announcement will expire: %s", exc)


@asynccontextmanager
async def announced(
    directory: Directory, announcement: Announcement, survey: Survey, period_s: float
) -> AsyncIterator[tuple[Announcer, asyncio.Task[None]]]:
    """Be in the directory while the body runs; yield what changes the announcement, and what renews it."""
    announcer = Announcer(directory, announcement, survey, period_s)
    await announcer.say()
    task = asyncio.create_task(announcer.run())
    try:
        yield announcer, task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await announcer.withdraw()
