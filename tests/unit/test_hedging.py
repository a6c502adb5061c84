"""When a step counts as stalled, what trying another route may cost, and which of two results counts."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from swarm.client.hedging import FEW_TOKENS, FLOOR_S, LONGER, PATIENCE_S, Hedges, StepTimes
from swarm.client.racing import MOST_AT_ONCE, Outcome, race
from swarm.client.tasks import cancel_and_wait
from swarm.errors import NoRoute, PeerUnavailable, SwarmError

LONG = 10 * FEW_TOKENS


def times_of(*seconds: float, num_tokens: int = 1) -> StepTimes:
    times = StepTimes()
    for each in seconds:
        times.took(num_tokens, each)
    return times


def test_nothing_is_expected_of_steps_that_were_never_seen():
    assert StepTimes().bound_s(1) is None
    assert times_of(0.1).bound_s(LONG) is None
    assert times_of(1.0, num_tokens=LONG).bound_s(1) is None


def test_fast_steps_are_given_the_floor():
    assert times_of(*[0.01] * 20).bound_s(1) == FLOOR_S


def test_even_steps_have_a_tight_bound_and_uneven_ones_a_wide_one():
    assert times_of(*[1.0] * 50).bound_s(1) == pytest.approx(1.0, rel=0.01)
    uneven = times_of(*[0.5, 1.5] * 25).bound_s(1)
    assert uneven is not None and 2.0 < uneven < 4.0


def test_a_bound_is_almost_never_reached_by_steps_that_are_as_before():
    rng = random.Random(1)
    times = times_of(*(rng.lognormvariate(0, 0.5) for _ in range(20)))
    num_late = 0
    for _ in range(2000):
        seconds, bound_s = rng.lognormvariate(0, 0.5), times.bound_s(1)
        num_late += bound_s is not None and seconds > bound_s
        times.took(1, seconds)
    assert num_late < 2000 * 0.03


def test_the_bound_follows_a_route_that_gets_slower():
    times = times_of(*[1.0] * 20)
    bound_s = times.bound_s(1)
    assert bound_s is not None and bound_s < 3.0
    for _ in range(20):
        times.took(1, 3.0)
    later_s = times.bound_s(1)
    assert later_s is not None and later_s > 3.0


def test_a_long_step_may_take_what_its_tokens_have_taken_so_far():
    times = times_of(*[0.1] * 50)
    times.took(LONG, 0.02 * LONG)
    assert times.bound_s(2 * LONG) == pytest.approx(0.1 + LONGER * 2 * LONG * 0.02, rel=0.05)
    assert times.bound_s(FEW_TOKENS) == FLOOR_S


def test_second_chances_that_are_not_needed_cost_more_than_was_fed_only_after_some_patience():
    hedges, spent, fed = Hedges(), 0, 512
    hedges.fed(512)
    for _ in range(10_000):
        fed += 1
        hedges.fed(1)
        wait_s = hedges.after_s(1.0, fed)
        assert wait_s >= PATIENCE_S or spent + fed <= fed
        if wait_s < PATIENCE_S:
            spent += fed
            hedges.ended(fed, won=False)
        assert spent <= fed
    assert spent > 512


def test_each_second_chance_that_is_not_needed_doubles_the_wait_for_the_next_one():
    hedges = Hedges()
    hedges.fed(10)
    waits = []
    for _ in range(8):
        waits.append(hedges.after_s(1.0, 10))
        hedges.ended(10, won=False)
    assert waits == [1.0, *(PATIENCE_S * 2**number for number in range(1, 8))]


def test_the_chances_of_one_step_wait_longer_and_longer():
    hedges = Hedges()
    hedges.fed(20)
    assert [hedges.after_s(1.0, 10, number) for number in (1, 2, 3, 4)] == [1.0, 2.0, 4 * PATIENCE_S, 8 * PATIENCE_S]


def test_a_second_chance_that_was_needed_costs_nothing_and_one_that_was_not_makes_the_next_one_wait():
    hedges = Hedges()
    hedges.fed(1000)
    waits = []
    for won in (False, False, True, True):
        waits.append(hedges.after_s(1.0, 100))
        hedges.ended(100, won=won)
    assert waits == [1.0, 2.0, 4.0, 1.0]
    assert hedges.after_s(1.0, 801) == PATIENCE_S and hedges.after_s(1.0, 800) == 1.0


# The race; a thing takes so many rounds of the event loop and returns or raises.


async def thing(rounds: int, result: object) -> object:
    for _ in range(rounds):
        await asyncio.sleep(0)
    if isinstance(result, BaseException):
        raise result
    return result


def only(number: int, wait_s: float = 0.0) -> float | None:
    """One other way, after a time."""
    return wait_s if number == 1 else None


def run_race(first: object, second: object, *, first_rounds: int, second_rounds: int) -> tuple[Any, list[Any], int]:
    """Race them, the second one from the start on; return the result, the failures that were noted, who is left."""
    noted: list[SwarmError] = []

    async def note(error: SwarmError) -> None:
        noted.append(error)

    async def test() -> tuple[Any, int]:
        try:
            outcome = await race(
                thing(first_rounds, first), lambda _: thing(second_rounds, second), lambda number: only(number), note
            )
            await cancel_and_wait(list(outcome.left.values()))
            assert outcome.winner == (outcome.result == "second")
            return outcome.result, len(outcome.left)
        except (SwarmError, ZeroDivisionError) as exc:
            return exc, 0
        finally:
            assert asyncio.all_tasks() == {asyncio.current_task()}

    result, num_left = asyncio.run(test())
    return result, noted, num_left


LOST, GONE = PeerUnavailable("lost"), PeerUnavailable("gone")


def test_whichever_gives_a_result_first_counts_and_the_other_one_is_left_to_the_caller():
    assert run_race("first", "second", first_rounds=5, second_rounds=50) == ("first", [], 1)
    assert run_race("first", "second", first_rounds=50, second_rounds=5) == ("second", [], 1)


def test_a_failure_does_not_count_while_the_other_one_may_do_better():
    assert run_race(LOST, "second", first_rounds=5, second_rounds=50) == ("second", [LOST], 0)
    assert run_race("first", GONE, first_rounds=50, second_rounds=5) == ("first", [GONE], 0)
    assert run_race("first", NoRoute("none"), first_rounds=50, second_rounds=5)[0] == "first"


def test_where_both_fail_the_last_failure_is_raised_and_the_other_one_noted():
    assert run_race(LOST, GONE, first_rounds=5, second_rounds=50) == (GONE, [LOST], 0)
    assert run_race(LOST, GONE, first_rounds=50, second_rounds=5) == (LOST, [GONE], 0)


def test_our_own_bug_is_raised_at_once():
    bug = ZeroDivisionError()
    assert run_race("first", bug, first_rounds=500, second_rounds=5) == (bug, [], 0)


def test_a_quick_result_and_an_unknown_bound_start_nothing_else():
    async def test(first: Coroutine[Any, Any, object], after_s: float | None) -> object:
        never: Callable[..., Any] = lambda *_: pytest.fail("started")  # noqa: E731
        return await race(first, never, lambda _: after_s, never)

    assert asyncio.run(test(thing(5, "first"), 60.0)) == Outcome("first", 0, {})
    assert asyncio.run(test(thing(500, "first"), None)) == Outcome("first", 0, {})
    with pytest.raises(PeerUnavailable):
        asyncio.run(test(thing(5, LOST), 60.0))


def test_further_ways_are_tried_while_nothing_comes_and_a_few_at_once():
    async def test() -> None:
        started: list[int] = []
        ends = {2: GONE, 3: "third"}

        async def another(number: int) -> object:
            started.append(number)
            assert len(asyncio.all_tasks()) <= 1 + MOST_AT_ONCE
            return await thing(20 if number in ends else 10**9, ends.get(number, ""))

        noted: list[SwarmError] = []

        async def note(error: SwarmError) -> None:
            noted.append(error)

        outcome = await race(thing(10**9, ""), another, lambda _: 0.0, note)
        assert (outcome.result, outcome.winner, started, noted) == ("third", 3, [1, 2, 3], [GONE])
        assert sorted(outcome.left) == [0, 1]
        await cancel_and_wait(list(outcome.left.values()))

    asyncio.run(test())


def test_a_race_that_is_cancelled_leaves_nothing_behind():
    async def test() -> None:
        racing = asyncio.create_task(
            race(thing(10**9, ""), lambda _: thing(10**9, ""), lambda number: only(number), lambda error: thing(0, ""))
        )
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 4
        racing.cancel()
        await asyncio.gather(racing, return_exceptions=True)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(test())
