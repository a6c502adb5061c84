"""Room for messages: bounded, in shares, given in the order of asking, and least to whom it holds most."""

from __future__ import annotations

import asyncio
import random
from types import TracebackType

import pytest

from swarm.errors import TooManyRequests
from swarm.server import room as rooms
from swarm.server.callers import Caller
from swarm.server.room import MessageRoom


class Holder:
    """A task that holds room until it is told to stop."""

    def __init__(self, room: MessageRoom, caller: str, num_bytes: int) -> None:
        self.inside = False
        self._stop = asyncio.Event()
        self.task = asyncio.create_task(self._hold(room, caller, num_bytes))

    async def _hold(self, room: MessageRoom, caller: str, num_bytes: int) -> None:
        async with room.hold(Caller(caller), num_bytes):
            self.inside = True
            try:
                await self._stop.wait()
            finally:
                self.inside = False

    async def stop(self) -> None:
        self._stop.set()
        await asyncio.wait({self.task})
        await settle()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class Holders:
    """Makes holders, and ends those that are left."""

    def __init__(self, room: MessageRoom) -> None:
        self.room = room
        self.made: list[Holder] = []

    async def add(self, caller: str, num_bytes: int) -> Holder:
        self.made.append(Holder(self.room, caller, num_bytes))
        await settle()
        return self.made[-1]

    async def __aenter__(self) -> Holders:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for holder in self.made:
            holder.task.cancel()
        await asyncio.gather(*(holder.task for holder in self.made), return_exceptions=True)
        statistics = self.room.statistics()
        assert statistics.used_bytes == statistics.num_waiting == 0


async def test_no_more_answers_than_there_is_room_for_and_none_is_overtaken() -> None:
    async with Holders(MessageRoom(100)) as holders:
        first, second = await holders.add("a", 60), await holders.add("b", 60)
        small = await holders.add("c", 10)
        assert first.inside and not second.inside and not small.inside
        assert holders.room.statistics().used_bytes == 60 and holders.room.statistics().num_waiting == 2
        await first.stop()
        assert second.inside and small.inside
        assert holders.room.statistics().used_bytes == 70


async def test_who_does_not_take_its_answers_waits_for_itself() -> None:
    async with Holders(MessageRoom(100)) as holders:
        stuck = [await holders.add("stuck", 30) for _ in range(20)]
        assert sum(each.inside for each in stuck) == 3
        honest = await holders.add("honest", 30)
        assert not honest.inside
        await stuck[0].stop()
        assert honest.inside and sum(each.inside for each in stuck) == 2


async def test_an_answer_larger_than_the_room_is_alone() -> None:
    async with Holders(MessageRoom(100)) as holders:
        small, large = await holders.add("a", 10), await holders.add("b", 500)
        assert small.inside and not large.inside
        await small.stop()
        after = await holders.add("c", 10)
        assert large.inside and not after.inside
        await large.stop()
        assert after.inside


@pytest.mark.parametrize("seed", range(3))
async def test_nothing_is_lost_or_counted_twice_in_any_order(seed: int) -> None:
    draw = random.Random(seed)
    async with Holders(MessageRoom(100)) as holders:
        for _ in range(400):
            action = draw.random()
            running = [each for each in holders.made if not each.task.done()]
            if action < 0.5:
                await holders.add(draw.choice("abc"), draw.randrange(1, 120))
            elif running and action < 0.75:
                draw.choice(running).task.cancel()
            elif inside := [each for each in running if each.inside]:
                await draw.choice(inside).stop()
            if draw.random() < 0.7:
                await settle()
                statistics = holders.room.statistics()
                assert statistics.used_bytes <= 100 or sum(each.inside for each in holders.made) == 1
                assert statistics.num_waiting + sum(each.inside for each in holders.made) == sum(
                    not each.task.done() for each in holders.made
                )


async def test_who_gets_no_room_for_long_is_sent_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "MAX_WAIT_S", 0.01)
    room = MessageRoom(100)
    async with room.hold(Caller("slow"), 80):
        with pytest.raises(TooManyRequests, match="left no room"):
            async with room.hold(Caller("other"), 30):
                pass
        assert room.statistics().num_waiting == 0 and room.statistics().used_bytes == 80
    async with room.hold(Caller("other"), 30):
        assert room.statistics().used_bytes == 30


async def test_nobody_has_more_than_its_share_and_what_is_larger_counts_as_one() -> None:
    async with Holders(MessageRoom(100, 0.5)) as holders:
        greedy = [await holders.add("greedy", 20) for _ in range(5)]
        assert sum(each.inside for each in greedy) == 2
        honest = [await holders.add("honest", 25) for _ in range(2)]
        assert all(each.inside for each in honest)
        for each in (*greedy[:2], *honest):
            await each.stop()
        large, other_large = await holders.add("greedy", 500), await holders.add("honest", 500)
        assert holders.room.statistics().used_bytes <= 100
        assert not (large.inside and other_large.inside)


async def test_whoever_sends_half_of_many_messages_leaves_room_for_others() -> None:
    async with Holders(MessageRoom(1000, 0.5)) as holders:
        for _ in range(300):
            await holders.add("stranger", 100)
        assert holders.room.statistics().used_bytes == 500
        honest = [await holders.add("honest", 100) for _ in range(5)]
        assert all(each.inside for each in honest) and holders.room.statistics().used_bytes == 1000


async def test_this_machine_itself_may_have_all_of_it() -> None:
    room = MessageRoom(100, 0.5)
    own = Caller("own", is_own=True)
    async with room.hold(own, 60), room.hold(own, 40):
        assert room.statistics().used_bytes == 100
