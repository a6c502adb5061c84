"""What a client has seen of its peers: failures and slowness, both forgotten in time."""

from __future__ import annotations

import pytest

from swarm.client.observations import HALF_LIFE_S, MAX_REMEMBERED, FailureMemory, SpeedMemory


def test_a_peer_is_avoided_twice_as_long_after_each_failure_up_to_a_bound():
    memory = FailureMemory(1.0, 5.0)
    for until_s in (1.0, 2.0, 4.0, 5.0, 5.0):
        memory.failed("A", now_s=100.0)
        assert memory.avoided(100.0 + until_s - 0.01) == {"A"} and memory.avoided(100.0 + until_s) == set()
    memory.succeeded("A")
    assert memory.avoided(100.0) == set()
    memory.failed("A", now_s=200.0)
    assert memory.avoided(200.5) == {"A"} and memory.avoided(201.0) == set()


def test_failures_of_long_ago_no_longer_make_the_next_one_count_for_more():
    memory = FailureMemory(1.0, 60.0)
    for _ in range(5):
        memory.failed("A", now_s=0.0)
    assert memory.avoided(15.9) == {"A"} and memory.weights(0.0) == {"A": 5.0}
    assert memory.weights(HALF_LIFE_S) == {"A": 2.5} and memory.weights(7 * HALF_LIFE_S) == {}
    memory.failed("A", now_s=20 * HALF_LIFE_S)
    assert memory.avoided(20 * HALF_LIFE_S + 1.01) == set()


def test_a_peer_that_is_reached_again_counts_for_less_until_it_succeeds():
    memory = FailureMemory(10.0, 60.0)
    memory.failed("A", now_s=0.0)
    memory.reached("A")
    memory.reached("B")
    assert memory.avoided(1.0) == set() and memory.weights(0.0) == {"A": 1.0}
    memory.succeeded("A")
    assert memory.weights(0.0) == {}


def test_peers_that_come_and_fail_for_weeks_are_not_all_remembered():
    memory = FailureMemory(1.0, 60.0)
    for number in range(3 * MAX_REMEMBERED):
        memory.failed(str(number), now_s=float(number))
    assert len(memory._failures) == MAX_REMEMBERED
    assert str(3 * MAX_REMEMBERED - 1) in memory.weights(3.0 * MAX_REMEMBERED)


def test_ten_thousand_failures_do_not_overflow():
    memory = FailureMemory(1.0, 120.0)
    for _ in range(10_000):
        memory.failed("A", now_s=0.0)
    assert memory.avoided(119.0) == {"A"} and memory.avoided(120.0) == set()


def test_a_peer_that_keeps_what_it_announces_is_not_noted():
    memory = SpeedMemory()
    for seconds in (0.05, 0.1, 0.2, 0.28):
        memory.took("A", seconds, 0.1, now_s=0.0)
    assert memory.slowness(0.0) == {} and not memory.is_slow("A")


def test_a_few_milliseconds_more_than_next_to_nothing_are_not_slow():
    memory = SpeedMemory()
    memory.took("A", 0.015, 0.001, now_s=0.0)
    assert memory.slowness(0.0) == {}


def test_a_slow_peer_is_noted_at_once_left_at_the_second_time_and_forgiven_later():
    memory = SpeedMemory()
    memory.took("A", 1.02, 0.1, now_s=0.0)
    assert memory.slowness(0.0) == {"A": pytest.approx(10.0)} and not memory.is_slow("A")
    memory.took("A", 1.02, 0.1, now_s=1.0)
    assert memory.is_slow("A")
    assert memory.slowness(1.0 + HALF_LIFE_S) == {"A": pytest.approx(5.5)}
    assert memory.slowness(1.0 + 5 * HALF_LIFE_S) == {}


def test_a_peer_that_got_fast_again_is_soon_believed():
    memory = SpeedMemory()
    for now_s in (0.0, 1.0):
        memory.took("A", 1.02, 0.1, now_s=now_s)
    for now_s in (2.0, 3.0, 4.0):
        memory.took("A", 0.1, 0.1, now_s=now_s)
    assert memory.slowness(4.0) == {} and not memory.is_slow("A")
