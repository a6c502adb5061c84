"""Who gets pages of the cache: one decision at a time, then hour by simulated hour, see tests/simulated_cache.py."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated_cache import PAGES_WAIT_S, Cache, Guest
from simulation import Clock, Machine, Server, percentile

from swarm.server.admission import Applicant, choose
from swarm.server.callers import Caller
from swarm.server.scheduler import SchedulerConfig

A, B, C = (Caller(f"192.0.2.{number}") for number in (1, 2, 3))


def test_those_come_first_who_hold_least_then_those_who_came_first():
    first, second, third = Applicant(A, 1), Applicant(B, 1), Applicant(C, 1)
    assert choose([first, second, third], {}, 4).chosen is first
    assert choose([first, second, third], {A: 2, B: 1, C: 1}, 4).chosen is second
    assert choose([first], {}, 0) == choose([first], {A: 9}, 0)


def test_a_large_one_lets_others_past_until_they_have_taken_as_much_as_it_wants():
    large, small = Applicant(A, 4), Applicant(B, 1)
    for _ in range(4):
        now = choose([large, small], {}, 3)
        assert now.chosen is small and now.passed is large
        large.passed_pages += 1
    now = choose([large, small], {}, 3)
    assert now.chosen is None and now.passed is large
    assert choose([large, small], {}, 4).chosen is large


@given(
    st.lists(st.builds(Applicant, st.sampled_from([A, B, C]), st.integers(1, 20), st.integers(0, 20)), min_size=1),
    st.integers(0, 30),
)
def test_whoever_is_let_in_fits(waiting, num_pages):
    now = choose(waiting, {B: 3}, num_pages)
    assert now.chosen is None or (now.chosen in waiting and now.chosen.num_pages <= num_pages)
    assert (now.passed is None) == (now.chosen is not None and now.chosen is not now.passed and _is_first(now, waiting))
    if now.passed is not None:
        assert now.passed.num_pages > num_pages


def _is_first(now, waiting) -> bool:
    return now.chosen is min(waiting, key=lambda each: {B: 3}.get(each.caller, 0))


# Over time


def slow(num_tokens: int) -> float:
    """A pass of few events a second, so that an hour is soon over."""
    return 0.05 + 0.0005 * num_tokens


def run(guests: list[Guest], num_pages: int, until_s: float) -> Cache:
    clock = Clock()
    server = Server(clock, Machine(clock), slow, config=SchedulerConfig())
    cache = Cache(clock, server, num_pages)
    for guest in guests:
        cache.visit(guest)
    clock.run_until(until_s)
    assert 0 <= cache.pool.num_free <= num_pages
    return cache


def smalls(count: int, *, every_s: float, caller: Caller = B, start_s: float = 0.0, **more) -> list[Guest]:
    asked = {"prompt": 4, "num_tokens": 10} | more
    return [Guest(caller, start_s + every_s * number, **asked) for number in range(count)]


@pytest.mark.parametrize("seed", range(3))
def test_under_any_load_everybody_ends_in_time_and_no_page_is_lost(seed):
    rng = random.Random(seed)
    guests, now_s = [], 0.0
    for _ in range(150):
        now_s += rng.expovariate(1.0)
        guests.append(
            Guest(
                rng.choice([A, B, C]), now_s, prompt=rng.randrange(1, 400), num_tokens=rng.randrange(1, 60),
                num_rows=rng.choice([1, 1, 1, 4]), timeout_s=rng.choice([0.0, 5.0, 20.0]),
                patience_s=rng.choice([float("inf"), float("inf"), rng.uniform(0, 10)]),
            )
        )  # fmt: skip
    cache = run(guests, 120, now_s + 300.0)
    ends = Counter(guest.end for guest in guests)
    assert "" not in ends, "somebody still waits"
    assert ends["done"] > 50 and min(ends["refused"], ends["left"]) > 2, ends
    assert cache.pool.num_free == 120 and not cache.waiting and not cache.running and not cache.promised
    for guest in guests:
        if guest.end == "refused":
            assert guest.ended_s == pytest.approx(guest.arrives_s + guest.timeout_s), "not before, and not after"
        if guest.admitted_s is not None:
            assert guest.admitted_s <= guest.arrives_s + guest.timeout_s + 1e-9
        if guest.end == "stuck":
            assert guest.ended_s >= guest.admitted_s + PAGES_WAIT_S - 1e-9


def test_those_that_run_lose_nothing_to_those_that_come():
    """One that takes all pages in the end is the oldest; whoever comes while it grows waits, or goes."""
    oldest = Guest(A, 0.0, prompt=200, num_tokens=440)
    others = smalls(200, every_s=0.3, start_s=0.5, prompt=30, num_tokens=30, timeout_s=5.0)
    cache = run([oldest, *others], 40, 400.0)
    assert oldest.end == "done" and cache.pool.num_free == 40
    assert {guest.end for guest in others} == {"done", "refused", "sent away"}


def test_a_large_session_is_not_starved_by_small_ones_that_would_always_fit():
    large = Guest(A, 20.0, prompt=4, num_tokens=10, num_rows=24, timeout_s=60.0)
    others = smalls(1000, every_s=0.1, timeout_s=60.0)
    run([*others, large], 30, 400.0)
    before = [guest for guest in others if guest.arrives_s > large.arrives_s and guest.admitted_s is not None]
    passed = sum(guest.admitted_s < large.admitted_s for guest in before if large.admitted_s is not None)
    assert large.end == "done" and passed <= large.num_rows
    assert Counter(guest.end for guest in others) == {"done": 1000}


def test_small_sessions_get_in_past_a_large_one_that_never_will():
    holder = Guest(C, 0.0, prompt=300, num_tokens=60, think_s=2.0)  # there for as long as the others come
    large = Guest(A, 1.0, prompt=4, num_tokens=10, num_rows=24, timeout_s=30.0)
    others = smalls(60, every_s=1.0, start_s=2.0, timeout_s=40.0)
    run([holder, large, *others], 40, 100.0)
    assert large.end == "refused" and holder.end == ""
    assert {guest.end for guest in others} == {"done"}
    waits_s = [guest.admitted_s - guest.arrives_s for guest in others]
    assert waits_s[:20] == [0.0] * 20, "as many as the large one has rows go past it at once"
    assert max(waits_s) <= 10.0 and waits_s[-1] == 0.0


def test_a_caller_with_many_sessions_keeps_nobody_else_waiting():
    flood = [Guest(A, 0.01 * number, prompt=100, num_tokens=60, timeout_s=300.0) for number in range(200)]
    others = smalls(20, every_s=5.0, start_s=10.0, timeout_s=300.0)
    run([*flood, *others], 60, 1000.0)
    waits_s = {
        who: [guest.admitted_s - guest.arrives_s for guest in guests if guest.admitted_s is not None]
        for who, guests in (("flood", flood), ("others", others))
    }
    assert len(waits_s["others"]) == 20
    assert percentile(waits_s["others"], 0.9) < 0.2 * percentile(waits_s["flood"], 0.5)


def test_whoever_leaves_while_waiting_takes_nobodys_turn():
    holder = Guest(A, 0.0, prompt=560, num_tokens=60)
    leaving = [Guest(B, 1.0 + 0.01 * number, prompt=8, num_tokens=5, patience_s=2.0) for number in range(10)]
    staying = Guest(C, 1.5, prompt=8, num_tokens=5, num_rows=8, timeout_s=60.0)
    cache = run([holder, *leaving, staying], 40, 120.0)
    assert {guest.end for guest in leaving} <= {"left", "done"} and "left" in {guest.end for guest in leaving}
    assert staying.end == holder.end == "done" and cache.pool.num_free == 40
