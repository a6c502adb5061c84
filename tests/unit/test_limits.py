"""What one caller may have of a server: counted, made to wait, refused, shut out. No network, no clock."""

from __future__ import annotations

import random

import pytest

from swarm.errors import BadRequest
from swarm.server.callers import OWN, RELAY_SHARES, Caller, Callers, split_peer
from swarm.server.fairness import ACTIVE_S, WORK_BURST_S, Fairness
from swarm.server.limits import (
    MAX_CALLERS,
    MAX_DELAY_S,
    REFUSALS_BURST,
    SHUT_OUT_S,
    Connected,
    LimitsConfig,
    Quotas,
    Refusal,
    What,
    surplus,
)
from swarm.throttle import BURST_S, Throttle

A, B, RELAY = Caller("192.0.2.1"), Caller("192.0.2.2"), Caller("peer R", shares=RELAY_SHARES)
CONFIG = LimitsConfig(max_sessions=10, max_sessions_per_caller=4, messages_per_s=100, bytes_per_s=1000)


def test_bytes_wait_so_that_no_more_than_the_rate_passes():
    throttle = Throttle(1000.0)
    assert throttle.wait_s(int(1000 * BURST_S), 0.0) == 0.0  # a burst
    assert throttle.wait_s(500, 0.0) == pytest.approx(0.5)
    assert throttle.wait_s(500, 0.5) == pytest.approx(0.5)
    assert throttle.wait_s(100, 100.0) == 0.0  # after a pause, but what was not used then is lost
    assert throttle.wait_s(1000, 100.0) == pytest.approx(1.1 - BURST_S)
    assert throttle.owed_s(100.0) == pytest.approx(1.1 - BURST_S)
    throttle.forgive()
    assert throttle.owed_s(100.0) == 0.0


def test_a_caller_has_no_more_than_its_number_and_all_no_more_than_theirs():
    quotas = Quotas(CONFIG)
    taken = [quotas.begin(A, What.SESSIONS, 0.0) for _ in range(6)]
    assert [each is None for each in taken] == [True] * 4 + [False] * 2
    assert [quotas.begin(RELAY, What.SESSIONS, 0.0) is None for _ in range(7)] == [True] * 6 + [False]  # ten in all
    assert quotas.begin(OWN, What.SESSIONS, 0.0) is not None
    quotas.end(A, What.SESSIONS)
    assert quotas.begin(B, What.SESSIONS, 0.0) is None
    statistics = quotas.statistics()
    assert statistics.under_way[What.SESSIONS] == 10 and statistics.refused[What.SESSIONS] == 4
    assert statistics.num_callers == 3


def test_messages_and_bytes_wait_and_new_calls_of_who_owes_too_much_are_refused():
    quotas = Quotas(CONFIG)
    assert max(quotas.wait_s(A, 1, 0.0) for _ in range(200)) == pytest.approx(0)
    assert quotas.wait_s(A, 1, 0.0) == pytest.approx(0.01)
    assert quotas.call(A, 0.0) is None
    assert quotas.wait_s(A, 2000 + 1000 * int(MAX_DELAY_S), 0.0) > MAX_DELAY_S
    refusal = quotas.call(A, 0.0)
    assert refusal is not None and refusal.what is What.MESSAGES and refusal.retry_after_s > MAX_DELAY_S
    assert quotas.call(B, 0.0) is None and quotas.wait_s(B, 2000, 0.0) == 0.0
    assert quotas.call(A, 10.0) is None
    assert quotas.wait_s(OWN, 10**12, 0.0) == 0.0 and quotas.call(OWN, 0.0) is None
    assert quotas.wait_s(RELAY, 1000 * RELAY_SHARES, 0.0) == 0.0


def test_who_goes_on_asking_is_shut_out_for_a_while():
    quotas = Quotas(CONFIG)
    for _ in range(REFUSALS_BURST - 1):
        quotas.refused(A, Refusal(What.CALLS, "no"), 0.0)
    assert not quotas.is_shut_out(A, 0.0)
    for _ in range(2):
        quotas.refused(A, Refusal(What.CALLS, "no"), 0.0)
    assert quotas.is_shut_out(A, 0.0) and not quotas.is_shut_out(B, 0.0)
    refusal = quotas.call(A, 1.0)
    assert refusal is not None and refusal.what is What.SHUT_OUT and refusal.retry_after_s == SHUT_OUT_S - 1.0
    assert quotas.call(A, SHUT_OUT_S + 1.0) is None
    for _ in range(10 * REFUSALS_BURST):  # those behind a relay are told, and stay
        quotas.refused(RELAY, Refusal(What.CALLS, "no"), 0.0)
    assert not quotas.is_shut_out(RELAY, 0.0)


def test_who_does_as_it_is_told_is_never_shut_out():
    quotas = Quotas(CONFIG)
    for second in range(1000):
        quotas.refused(A, Refusal(What.CALLS, "no"), float(second))
        assert not quotas.is_shut_out(A, float(second))


def test_one_line_for_each_caller_and_minute():
    quotas = Quotas(CONFIG)
    assert [quotas.should_log(A, now_s) for now_s in (0.0, 1.0, 59.0, 61.0, 62.0)] == [True, False, False, True, False]
    assert quotas.should_log(B, 1.0)


def test_any_number_of_callers_is_forgotten_but_not_what_they_have():
    quotas = Quotas(CONFIG)
    assert quotas.begin(A, What.SESSIONS, 0.0) is None
    for number in range(2 * MAX_CALLERS):
        quotas.wait_s(Caller(f"stranger {number}"), 1, 0.0)
    assert len(quotas._usages) <= MAX_CALLERS
    quotas.end(A, What.SESSIONS)
    assert quotas.statistics().under_way[What.SESSIONS] == 0


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_lost_or_counted_twice_in_any_order(seed: int):
    draw, quotas = random.Random(seed), Quotas(CONFIG)
    under_way: list[tuple[Caller, What]] = []
    for step in range(2000):
        if draw.random() < 0.6:
            caller, what = draw.choice([A, B, RELAY, OWN]), draw.choice([What.SESSIONS, What.BATCHES])
            if quotas.begin(caller, what, step / 10) is None:
                under_way.append((caller, what))
        elif under_way:
            quotas.end(*under_way.pop(draw.randrange(len(under_way))))
        counted = quotas.statistics().under_way
        assert sum(counted.values()) == len(under_way)
        assert counted.get(What.SESSIONS, 0) <= 10 and under_way.count((A, What.SESSIONS)) <= 4


@pytest.mark.parametrize("changes", [{"max_calls": 0}, {"room_share": 1.5}, {"work_share": 0.0}, {"message_bytes": -1}])
def test_limits_that_make_no_sense(changes: dict[str, float]):
    with pytest.raises(BadRequest, match=next(iter(changes))):
        LimitsConfig(**changes)  # type: ignore[arg-type]


# Connections.


def connected(*callers: Caller) -> list[Connected]:
    return [Connected(caller, number) for number, caller in enumerate(callers)]


def test_of_too_many_connections_the_newest_are_closed():
    config = LimitsConfig(max_connections=100, max_connections_per_caller=3)
    closing = surplus(connected(A, A, B, A, A, B, A), config)
    assert [each.number for each in closing] == [4, 6]
    assert not surplus(connected(*[RELAY] * 24), config) and len(surplus(connected(*[RELAY] * 25), config)) == 1


def test_when_all_places_are_nearly_taken_whoever_has_most_gives_some_up():
    config = LimitsConfig(max_connections=100, max_connections_per_caller=60)
    closing = surplus(connected(*[A] * 60, *[B] * 35), config)
    assert {each.caller for each in closing} == {A} and len(closing) == 5
    assert not surplus(connected(*[OWN] * 50, *[B] * 35), config)


# Callers.


@pytest.mark.parametrize(
    ("peer", "key"),
    [
        ("ipv4:192.0.2.1:5000", "192.0.2.1"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:5000", "2001:0db8:0001:0002"),
        ("ipv6:%5B2001:db8:1:2::9%5D:5001", "2001:0db8:0001:0002"),
        ("ipv6:%5B::ffff:192.0.2.1%5D:5000", "192.0.2.1"),
    ],
)
def test_callers_are_addresses_or_networks(peer: str, key: str):
    assert Callers().of_peer(peer) == Caller(key)


@pytest.mark.parametrize("peer", ["ipv4:127.0.0.1:5000", "ipv6:%5B::1%5D:5000", "ipv4:127.3.2.1:5000", "unix:", "what"])
def test_this_machine_is_no_caller_like_others(peer: str):
    assert Callers().of_peer(peer).is_own


def test_programs_of_this_machine_are_told_apart():
    assert Callers().of_peer("ipv4:127.0.0.1:5") != Callers().of_peer("ipv4:127.0.0.1:6")
    assert Callers().of_peer("ipv6:%5B::1%5D:5") != Callers().of_peer("ipv6:%5B::1%5D:6")


def test_loopback_addresses_can_be_callers():
    callers = Callers(loopback_is_caller=True)
    assert callers.of_peer("ipv4:127.0.0.2:5000") == callers.of_peer("ipv4:127.0.0.2:5001") == Caller("127.0.0.2")
    assert callers.of_peer("ipv4:127.0.0.3:5000") == Caller("127.0.0.3")


def test_who_comes_through_the_tunnel_is_known_while_its_stream_is_carried():
    callers = Callers()
    with callers.entering(5000, "peer id", False), callers.entering(5001, "192.0.2.7", False):
        assert callers.of_peer("ipv4:127.0.0.1:5000") == Caller("peer peer id")
        assert callers.of_peer("ipv4:127.0.0.1:5001") == Caller("192.0.2.7")
        with callers.entering(5002, "relay", True):
            assert callers.of_peer("ipv4:127.0.0.1:5002") == Caller("peer relay", shares=RELAY_SHARES)
    assert callers.of_peer("ipv4:127.0.0.1:5000").is_own
    assert split_peer("unix:/tmp/x") == ("", 0)


def test_a_member_is_one_caller_wherever_it_is():
    callers = Callers()
    with callers.entering(5000, "relay", True):
        at_home, by_relay = (callers.of_peer(each, "member M") for each in ("ipv4:192.0.2.1:1", "ipv4:127.0.0.1:5000"))
    assert at_home == by_relay == Caller("member M") != callers.of_peer("ipv4:192.0.2.1:1", "member N")


# The computing time.


def pass_s(num_tokens: int) -> float:
    return 0.01 * num_tokens


def test_who_is_alone_never_waits():
    fairness = Fairness(0.1, pass_s)
    for second in range(100):
        fairness.step(A, "session", 1, 512, float(second))
        fairness.batch(A, 60.0, float(second))
        assert fairness.wait_s(A, float(second)) == 0.0


def test_what_one_takes_from_others_is_bounded_by_its_share():
    fairness, now_s, taken_s = Fairness(0.1, pass_s), 0.0, 0.0
    while now_s < 600:
        fairness.step(B, "honest", 1, 1, now_s)
        assert fairness.wait_s(B, now_s) == 0.0
        if fairness.wait_s(A, now_s) == 0.0:
            fairness.step(A, "greedy", 1, 51, now_s)
            taken_s += 0.5
        now_s += 0.5
    assert 0.09 * 600 < taken_s < 0.1 * 600 + WORK_BURST_S + 1.0


def test_many_decoding_sessions_of_one_caller_wait_and_as_many_as_the_others_have_do_not():
    fairness = Fairness(0.1, pass_s)
    for tick in range(200):
        now_s = tick / 10
        for number in range(4):
            fairness.step(B, f"honest {number}", 1, 1, now_s)
        for number in range(4):
            fairness.step(A, f"like them {number}", 1, 1, now_s)
        for number in range(64):
            fairness.step(RELAY, f"greedy {number}", 1, 1, now_s)
    assert fairness.wait_s(A, 20.0) == fairness.wait_s(B, 20.0) == 0.0
    assert fairness.wait_s(RELAY, 20.0) > 0.0
    assert fairness.wait_s(RELAY, 20.0 + 2 * ACTIVE_S) == 0.0  # the others have gone


def test_this_machine_itself_waits_for_nobody_and_others_for_it():
    fairness = Fairness(0.1, pass_s)
    for tick in range(100):
        fairness.step(OWN, "own", 1, 512, tick / 10)
        fairness.step(A, "other", 1, 512, tick / 10)
    assert fairness.wait_s(OWN, 10.0) == 0.0 and fairness.wait_s(A, 10.0) > 0.0
