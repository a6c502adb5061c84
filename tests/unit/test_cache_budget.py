"""The cache budget: never above its total, those who wait served in order, and nothing lost to those who give up."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import CacheFull, PromptTooLong
from swarm.server.sessions import CacheBudget

SOON_S = 0.0
LATE_S = 60.0


class Visitor:
    """Somebody who wants room; `task` ends when it has it, `leave` gives it back."""

    def __init__(self, budget: CacheBudget, num_bytes: int, order: list[int] | None = None, number: int = 0) -> None:
        self.num_bytes = num_bytes
        self._owned = AsyncExitStack()
        self._order, self._number = order, number
        self.task = asyncio.create_task(self._enter(budget))

    async def _enter(self, budget: CacheBudget) -> None:
        await self._owned.enter_async_context(budget.reserve(self.num_bytes, LATE_S))
        if self._order is not None:
            self._order.append(self._number)

    @property
    def inside(self) -> bool:
        return self.task.done() and not self.task.cancelled() and self.task.exception() is None

    async def leave(self) -> None:
        await self._owned.aclose()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_room_is_held_for_the_body_and_given_back():
    budget = CacheBudget(100)
    async with budget.reserve(60, SOON_S):
        assert budget.used_bytes == 60 and budget.free_bytes == 40
    assert budget.used_bytes == 0


async def test_an_error_in_the_body_gives_the_room_back():
    budget = CacheBudget(100)
    with pytest.raises(KeyError):
        async with budget.reserve(60, SOON_S):
            raise KeyError
    assert budget.used_bytes == 0


async def test_more_than_there_is_in_all_is_refused_at_once():
    with pytest.raises(PromptTooLong, match="3 MiB of cache, this server has 2 MiB"):
        async with CacheBudget(2 << 20).reserve(3 << 20, LATE_S):
            pass


async def test_no_room_in_time_is_cache_full():
    budget = CacheBudget(100)
    async with budget.reserve(60, SOON_S):
        with pytest.raises(CacheFull, match="no room"):
            async with budget.reserve(50, SOON_S):
                pass
        assert budget.used_bytes == 60
        async with budget.reserve(40, SOON_S):
            assert budget.used_bytes == 100
    assert budget.used_bytes == 0


async def test_a_small_request_does_not_wait_behind_a_large_one():
    budget, order = CacheBudget(100), []
    holder = Visitor(budget, 80)
    await settle()
    large, small = Visitor(budget, 60, order, 1), Visitor(budget, 10, order, 2)
    await settle()
    assert small.inside and not large.inside
    await holder.leave()
    await settle()
    assert order == [2, 1] and budget.used_bytes == 70
    await large.leave()
    await small.leave()
    assert budget.used_bytes == 0


async def test_a_waiter_that_gives_up_takes_nothing_with_it():
    budget = CacheBudget(100)
    holder = Visitor(budget, 80)
    await settle()
    large, small = Visitor(budget, 60), Visitor(budget, 20)
    await settle()
    large.task.cancel()
    await settle()
    assert small.inside and budget.used_bytes == 100
    await holder.leave()
    await small.leave()
    assert budget.used_bytes == 0


async def test_a_waiter_cancelled_at_the_moment_it_is_let_in_leaks_nothing():
    for cancel_first in (True, False):
        budget = CacheBudget(100)
        holder = Visitor(budget, 80)
        await settle()
        waiter, next_one = Visitor(budget, 60), Visitor(budget, 70)
        await settle()
        if cancel_first:
            waiter.task.cancel()
            await holder.leave()
        else:
            await holder.leave()
            waiter.task.cancel()
        await settle()
        assert next_one.inside and budget.used_bytes == 70
        await next_one.leave()
        assert budget.used_bytes == 0


actions = st.lists(
    st.tuples(st.sampled_from(["come", "leave", "cancel", "settle"]), st.integers(0, 9), st.integers(1, 120)),
    max_size=40,
)


@given(actions)
@settings(max_examples=80, deadline=None)
def test_whatever_happens_the_books_are_right(script):
    async def run() -> None:
        budget, order = CacheBudget(100), []
        visitors: list[Visitor] = []
        waited: set[int] = set()
        for number, (action, index, num_bytes) in enumerate(script):
            if action == "come":
                visitors.append(Visitor(budget, num_bytes, order, number))
                await settle()
                if not visitors[-1].inside:
                    waited.add(number)
            elif action == "settle":
                await settle()
            elif visitors and action == "cancel":
                visitors[index % len(visitors)].task.cancel()
            elif visitors and (visitor := visitors[index % len(visitors)]).inside:
                await visitor.leave()
                visitors.remove(visitor)
            assert 0 <= budget.used_bytes <= 100
        await settle()
        held = sum(visitor.num_bytes for visitor in visitors if visitor.inside)
        assert budget.used_bytes == held
        late = [number for number in order if number in waited]
        assert late == sorted(late)
        for visitor in visitors:
            visitor.task.cancel()
        await asyncio.gather(*(visitor.task for visitor in visitors), return_exceptions=True)
        for visitor in visitors:
            await visitor.leave()
        assert budget.used_bytes == 0 and budget.free_bytes == 100

    asyncio.run(run())
