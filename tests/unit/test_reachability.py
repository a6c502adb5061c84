"""What a server announces of its addresses follows from what other peers could reach."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from swarm.dial_back import (
    DIALS_PER_MINUTE,
    MAX_HOSTS,
    Answer,
    Budget,
    Question,
    Reach,
    judge,
    libp2p_port,
    observed_host,
)
from swarm.relays import circuits, relays_of
from swarm.server.reachability import choose_direct, direct_hosts

HOME, ROUTER = "192.168.1.2", "8.8.8.8"


def answers(*found: tuple[str, bool | None]) -> list[Answer]:
    return [Answer(host=host, reached=reached) for host, reached in found]


def test_one_peer_that_reaches_the_port_is_enough():
    assert judge(answers((ROUTER, False), (ROUTER, True), (ROUTER, False))) == Reach((ROUTER,), ())
    assert judge(answers((ROUTER, False), (HOME, True))) == Reach((HOME,), (ROUTER,))


def test_it_is_hidden_only_if_somebody_tried():
    assert judge(answers((ROUTER, False))).is_hidden
    assert not judge(answers((ROUTER, None), ("", False), ("not an address", False))).is_hidden
    assert not judge([]).is_hidden


@pytest.mark.parametrize(
    ("reach", "announced"),
    [
        (Reach(), [f"{HOME}:1", "2606:4700::1"]),  # nobody could say: as the machine itself thinks
        (Reach(missed=(ROUTER,)), []),
        (Reach(reached=(ROUTER,)), [f"{ROUTER}:1", f"{HOME}:1", "2606:4700::1"]),  # a forwarded port that nobody named
        (Reach(reached=(HOME,), missed=(ROUTER,)), [f"{HOME}:1", "2606:4700::1"]),
        (Reach(reached=(ROUTER,), missed=(HOME,)), [f"{ROUTER}:1", "2606:4700::1"]),
    ],
)
def test_what_nobody_reached_is_not_announced(reach, announced):
    wanted = [f"[{each}]:1" if each.count(":") > 1 else each for each in announced]
    assert choose_direct([HOME, "2606:4700::1"], reach, 1) == wanted


def test_loopback_is_announced_only_if_there_is_nothing_else():
    assert direct_hosts([f"/ip4/{HOME}/tcp/1/p2p/Qm", "/ip4/127.0.0.1/tcp/1/p2p/Qm"]) == [HOME]
    assert direct_hosts(["/ip4/127.0.0.1/tcp/1/p2p/Qm"]) == ["127.0.0.1"]


def test_an_address_is_dialled_a_few_times_a_minute():
    budget = Budget()
    assert [budget.take(ROUTER, float(second)) for second in range(DIALS_PER_MINUTE + 1)] == [
        *[True] * DIALS_PER_MINUTE,
        False,
    ]
    assert budget.take(HOME, 10.0)
    assert budget.take(ROUTER, 60.0) and not budget.take(ROUTER, 60.5)
    for number in range(MAX_HOSTS + 10):
        budget.take(str(number), 61.0)
    assert len(budget._dials) == MAX_HOSTS


@pytest.mark.parametrize(
    "text", ['{"port": 70000}', '{"port": -1}', '{"certificate": "x"}', '{"port": "a"}', "[]", "{"]
)
def test_malformed_questions_are_refused(text):
    with pytest.raises(ValidationError):
        Question.model_validate_json(text)


def test_nobody_is_dialled_behind_a_relay():
    assert observed_host(f"/ip4/{ROUTER}/tcp/4001") == ROUTER
    assert observed_host("/ip6/2606:4700::1/tcp/4001") == "2606:4700::1"
    for text in (f"/ip4/{ROUTER}/tcp/1/p2p/Qm/p2p-circuit", "/dns4/example.org/tcp/1", "/unix/tmp", ""):
        assert observed_host(text) == ""


def test_the_port_of_libp2p_is_not_a_relays():
    assert libp2p_port(["/ip4/8.8.8.8/tcp/1/p2p/Qa/p2p-circuit/p2p/Qb", f"/ip4/{HOME}/tcp/2/p2p/Qb"]) == 2
    assert libp2p_port([]) == 0


def test_addresses_through_relays_are_read_as_they_are_written():
    relays = {
        "Qa": ["/ip4/8.8.8.8/tcp/1", "/ip4/8.8.8.8/tcp/1/p2p/Qa", "/ip4/127.0.0.1/tcp/1"],
        "Qc": ["/ip4/127.0.0.1/tcp/3"],
    }
    written = circuits(relays, "Qb")
    assert written == ["/ip4/8.8.8.8/tcp/1/p2p/Qa/p2p-circuit/p2p/Qb", "/ip4/127.0.0.1/tcp/3/p2p/Qc/p2p-circuit/p2p/Qb"]
    assert relays_of([*written, "/ip4/1.1.1.1/tcp/1/p2p/Qb"]) == {
        "Qa": ["/ip4/8.8.8.8/tcp/1/p2p/Qa"],
        "Qc": ["/ip4/127.0.0.1/tcp/3/p2p/Qc"],
    }
