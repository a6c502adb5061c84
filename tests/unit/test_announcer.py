"""What a server says about itself, in which order, and when the directory cannot be reached."""

from __future__ import annotations

import asyncio
from typing import Any

from fakes import announcement

from swarm.announcement import Announcement
from swarm.errors import PeerUnavailable
from swarm.server.announcer import announced, next_wait_s


class NoSurvey:
    """Stands for Survey: nobody is called."""

    here = None

    async def visit(self, servers: object, most: int) -> None:
        pass

    async def measure_line(self, servers: object, most: int) -> None:
        pass


class SlowDirectory:
    """Takes announcements one by one, as it is told."""

    def __init__(self) -> None:
        self.taken: list[Announcement] = []
        self.asked = 0
        self.reachable = True
        self.open = asyncio.Event()
        self.open.set()

    async def announce(self, what: Announcement) -> None:
        self.asked += 1
        if not self.reachable:
            raise PeerUnavailable("no network")
        if what.state == "online":
            await self.open.wait()
        self.taken.append(what)

    async def servers(self, fingerprint: str, **more: Any) -> list[Announcement]:
        return []

    async def withdraw(self, what: Announcement) -> None:
        pass


async def test_what_is_said_last_is_written_last():
    directory = SlowDirectory()
    async with announced(directory, announcement("a", 0, 4), NoSurvey(), 3600.0) as (announcer, _):  # type: ignore[arg-type]
        directory.open.clear()
        slow = asyncio.create_task(announcer.say())
        await asyncio.sleep(0)
        leaving = asyncio.create_task(announcer.say(state="draining"))
        await asyncio.sleep(0)
        directory.open.set()
        assert await slow and await leaving
        assert [each.state for each in directory.taken] == ["online", "online", "draining"]


def test_an_announcement_that_failed_is_tried_again_long_before_the_next_period():
    waits_s = [15.0]
    for said in [False, False, False, False, False, True, False]:
        waits_s.append(next_wait_s(said, waits_s[-1], 15.0))
    assert waits_s == [15.0, 1.0, 2.0, 4.0, 7.5, 7.5, 15.0, 1.0]


async def test_a_directory_that_comes_back_hears_of_the_server():
    directory = SlowDirectory()
    directory.reachable = False
    async with announced(directory, announcement("a", 0, 4), NoSurvey(), 0.02):  # type: ignore[arg-type]
        while directory.asked < 3:
            await asyncio.sleep(0.01)
        directory.reachable = True
        while not directory.taken:
            await asyncio.sleep(0.01)
    assert directory.taken[0].state == "online"
