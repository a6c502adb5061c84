"""What a server announces of its addresses follows from what others could reach, and a few liars change nothing."""

from __future__ import annotations

import asyncio

import pytest
from fakes import peer_id
from pydantic import ValidationError

from swarm import dial_back
from swarm.dialling import Anywhere, OutsideOnly, UntilSeenOutside
from swarm.errors import PeerUnavailable
from swarm.model.checkpoint import CheckpointSource
from swarm.pipes import Stream
from swarm.reach import (
    DIALS_PER_MINUTE,
    MAX_PLACES,
    Answer,
    Budget,
    Observation,
    Question,
    Reach,
    host_of,
    judge,
    libp2p_port,
    neighbours,
    outside_first,
    place_of,
    scope_of,
)
from swarm.relays import Reply
from swarm.server.config import ServerConfig
from swarm.server.reachability import Reachability, choose_direct, direct_hosts, needs_relays

HOME, ROUTER, VICTIM = "192.168.1.2", "8.8.8.8", "9.9.9.9"
LINK = {"link", "link2"}


def told(*found: tuple[str, str, bool | None]) -> Reach:
    """What is believed of these: who said so, of which address, and whether it was reached."""
    seen = [Observation(who, Answer(host=host, reached=reached)) for who, host, reached in found]
    return judge(seen, trusted=LINK, own=[HOME])


def test_one_peer_of_the_join_link_that_reaches_the_port_is_enough():
    assert told(("link", ROUTER, False), ("link2", ROUTER, True)) == Reach((ROUTER,), ())
    assert told(("link", ROUTER, False), ("link2", VICTIM, True)) == Reach((VICTIM,), (ROUTER,))


def test_it_is_hidden_only_if_somebody_tried():
    assert told(("link", ROUTER, False)).is_hidden
    assert not told(("link", ROUTER, None), ("link2", "", False)).is_known
    assert not told(("link", "no address", False)).is_known
    assert not told().is_known


def test_a_neighbour_in_the_same_home_says_nothing_about_the_internet():
    assert told(("link", ROUTER, False), ("link2", HOME, True)) == Reach((), (ROUTER,))
    assert told(("link", ROUTER, True), ("link2", "127.0.0.1", False)) == Reach((ROUTER,), ())
    assert told(("link", HOME, True), ("link2", "127.0.0.1", True)) == Reach((HOME,), ())
    assert told(("link", HOME, False)) == Reach((), (HOME,))


def test_strangers_cannot_make_a_server_announce_an_address_of_their_choice():
    assert told(("liar", VICTIM, True)) == Reach()
    assert told(("link", ROUTER, False), ("liar", VICTIM, True), ("liar2", VICTIM, True)) == Reach((), (ROUTER,))
    assert told(("a", ROUTER, False), ("b", ROUTER, False), ("liar", VICTIM, True)) == Reach((), (ROUTER,))


def test_most_strangers_are_believed_where_no_peer_of_the_link_has_tried():
    assert told(("link", HOME, True), ("a", ROUTER, False), ("b", ROUTER, False)) == Reach((), (ROUTER,))
    assert told(("a", ROUTER, True), ("b", ROUTER, True), ("liar", ROUTER, False)) == Reach((ROUTER,), ())
    assert told(("a", ROUTER, False), ("b", ROUTER, False), ("liar", ROUTER, True)) == Reach((), (ROUTER,))
    assert told(("link", ROUTER, None), ("a", HOME, True)) == Reach((HOME,), ())


@pytest.mark.parametrize(
    ("reach", "announced"),
    [
        (Reach(), [f"{HOME}:1", "2606:4700::1"]),  # nobody could say: as the machine itself thinks
        (Reach(missed=(ROUTER,)), []),
        (Reach(reached=(ROUTER,)), [f"{ROUTER}:1", f"{HOME}:1", "2606:4700::1"]),  # a forwarded port that nobody named
        (Reach(reached=(HOME,), missed=(ROUTER,)), [f"{HOME}:1", "2606:4700::1"]),
        (Reach(reached=(ROUTER,), missed=(HOME,)), [f"{ROUTER}:1", "2606:4700::1"]),
        (Reach(reached=("127.0.0.1",)), [f"{HOME}:1", "2606:4700::1"]),  # by somebody on the same machine
    ],
)
def test_what_nobody_reached_is_not_announced(reach, announced):
    wanted = [f"[{each}]:1" if each.count(":") > 1 else each for each in announced]
    assert choose_direct([HOME, "2606:4700::1"], reach, 1) == wanted


def test_loopback_is_announced_only_if_there_is_nothing_else():
    assert direct_hosts([f"/ip4/{HOME}/tcp/1/p2p/Qm", "/ip4/127.0.0.1/tcp/1/p2p/Qm"]) == [HOME]
    assert direct_hosts(["/ip4/127.0.0.1/tcp/1/p2p/Qm"]) == ["127.0.0.1"]
    assert choose_direct(["127.0.0.1"], Reach(reached=("127.0.0.1",)), 1) == ["127.0.0.1:1"]


def test_relays_are_needed_where_neither_port_can_be_dialled():
    missed, reached = Reach(missed=(ROUTER,)), Reach(reached=(ROUTER,))
    assert needs_relays(missed, missed) and needs_relays(Reach(), missed) and needs_relays(missed, Reach())
    assert (
        not needs_relays(reached, missed) and not needs_relays(missed, reached) and not needs_relays(Reach(), Reach())
    )
    only_ipv6 = Reach(reached=("2606:4700::1",), missed=(ROUTER,))
    assert needs_relays(only_ipv6, only_ipv6)


def test_an_address_is_dialled_a_few_times_a_minute():
    budget = Budget()
    assert [budget.take(ROUTER, float(second)) for second in range(DIALS_PER_MINUTE + 1)] == [
        *[True] * DIALS_PER_MINUTE,
        False,
    ]
    assert budget.take(HOME, 40.0)
    assert budget.take(ROUTER, 60.0) and not budget.take(ROUTER, 60.5)
    for number in range(MAX_PLACES + 10):
        budget.take(str(number), 61.0)
    assert len(budget._dials) == MAX_PLACES


def test_the_addresses_of_one_customer_count_as_one():
    assert place_of("2606:4700::1") == place_of("2606:4700:0:0:ffff::2") != place_of("2606:4700:0:1::1")
    assert place_of(ROUTER) == ROUTER == place_of(f"::ffff:{ROUTER}") and place_of("") == ""
    assert [scope_of(host) for host in ("0.0.0.0", "::ffff:127.0.0.1", HOME, ROUTER)] == [0, 0, 1, 2]
    budget = Budget()
    assert [budget.take(f"2606:4700::{number}", 0.0) for number in range(DIALS_PER_MINUTE + 1)][-1] is False


async def test_a_server_that_the_internet_reaches_dials_no_private_addresses_for_strangers():
    rule = UntilSeenOutside(Anywhere())
    for host in (HOME, "", "127.0.0.1", "peer.example.org"):
        rule.note(host)
    assert await rule.targets([f"{HOME}:1"]) == [f"{HOME}:1"]
    rule.note(ROUTER)
    assert await rule.targets([f"{HOME}:1", f"{VICTIM}:1"]) == [f"{VICTIM}:1"]
    assert await rule.multiaddrs([f"/ip4/{HOME}/tcp/1", f"/ip4/{VICTIM}/tcp/1"]) == [f"/ip4/{VICTIM}/tcp/1"]
    assert await UntilSeenOutside(OutsideOnly()).targets([f"{HOME}:1"]) == []


@pytest.mark.parametrize(
    "text", ['{"port": 70000}', '{"port": -1}', '{"certificate": "x"}', '{"port": "a"}', "[]", "{"]
)
def test_malformed_questions_are_refused(text):
    with pytest.raises(ValidationError):
        Question.model_validate_json(text)


def test_nobody_is_dialled_behind_a_relay():
    assert host_of(f"/ip4/{ROUTER}/tcp/4001") == ROUTER
    assert host_of("/ip6/2606:4700::1/tcp/4001") == "2606:4700::1"
    for text in (f"/ip4/{ROUTER}/tcp/1/p2p/Qm/p2p-circuit", "/dns4/example.org/tcp/1", "/unix/tmp", ""):
        assert host_of(text) == ""


def test_the_port_of_libp2p_is_not_a_relays():
    assert libp2p_port(["/ip4/8.8.8.8/tcp/1/p2p/Qa/p2p-circuit/p2p/Qb", f"/ip4/{HOME}/tcp/2/p2p/Qb"]) == 2
    assert libp2p_port([]) == 0


def test_peers_on_the_internet_are_asked_first():
    peers = {"a": [f"/ip4/{HOME}/tcp/1"], "b": [], "c": ["/ip4/127.0.0.1/tcp/1", f"/ip4/{ROUTER}/tcp/1"]}
    assert list(outside_first(peers)) == ["c", "a", "b"]


class FakeDht:
    """A node whose peers of the join link answer from a script: per question, who is reached under which address."""

    peer_id = peer_id("S")
    initial_peer_ids = ("link",)

    def __init__(self, answers: list[Answer], peers: dict[str, list[str]]) -> None:
        self.answers = answers
        self.peers = {"link": ["/ip4/7.7.7.1/tcp/31337"]} | peers
        self.dialled: list[tuple[str, list[str]]] = []

    def known_peers(self) -> dict[str, list[str]]:
        return self.peers

    async def multiaddrs(self) -> list[str]:
        return [f"/ip4/{HOME}/tcp/31331/p2p/{self.peer_id}"]

    async def connect(self, peer_id: str, multiaddrs: list[str], *, timeout_s: float) -> None:
        self.dialled.append((peer_id, multiaddrs))
        if peer_id == "gone":
            raise PeerUnavailable("nobody there")

    async def open_stream(self, peer_id: str, protocol: str, *, timeout_s: float) -> Stream:
        reader = asyncio.StreamReader()
        answer = self.answers.pop(0) if protocol == dial_back.PROTOCOL else Reply()
        reader.feed_data(answer.model_dump_json().encode() + b"\n")
        return reader, Unread()


class Unread:
    """The writing end of a stream to nobody."""

    def write(self, data: bytes) -> None:
        pass

    async def drain(self) -> None:
        pass

    def close(self) -> None:
        pass


def reachability(answers: list[Answer], forgotten: list[str] | None = None, **peers: list[str]) -> Reachability:
    config = ServerConfig(source=CheckpointSource("tiny"), host="0.0.0.0", tunnel_only=True)

    async def forget(peer_id: str) -> None:
        assert forgotten is not None
        forgotten.append(peer_id)

    return Reachability(FakeDht(answers, peers), config, 31330, b"", UntilSeenOutside(Anywhere()), forget)


MISSED, REACHED, NOT_TRIED = (Answer(host=ROUTER, reached=found) for found in (False, True, None))


async def test_one_that_could_be_dialled_is_not_called_hidden_at_the_first_failure():
    found = reachability([REACHED, MISSED, REACHED])
    for _ in range(2):
        await found.check()
        assert not found.relays
    assert found._dht.answers == []


async def test_relays_come_and_go_with_the_need_for_them():
    found = reachability([MISSED, NOT_TRIED, REACHED])
    relayed = f"/ip4/7.7.7.1/tcp/31337/p2p/link/p2p-circuit/p2p/{FakeDht.peer_id}"
    for expected in ([relayed], [relayed], []):
        await found.check()
        assert [text for text in found.multiaddrs if "p2p-circuit" in text] == expected
    await found.aclose()


async def test_hidden_servers_of_one_home_find_each_other():
    circuit = "/ip4/7.7.7.1/tcp/1/p2p/Qr/p2p-circuit/p2p/Qn"
    forgotten: list[str] = []
    found = reachability(
        [NOT_TRIED] * 8, forgotten, near=[circuit, "/ip4/192.168.1.7/tcp/1"], gone=["/ip4/192.168.1.8/tcp/1"],
        far=["/ip4/192.168.2.7/tcp/1", "/ip4/8.8.8.8/tcp/1", "/ip4/127.0.0.1/tcp/1"],
    )  # fmt: skip
    for _ in range(2):
        await found.check()
        found._dht.dialled.clear()
        for _ in range(2):  # what led nowhere leads nowhere until the next check, what is connected is
            await found._meet_neighbours()
        assert found._dht.dialled == [("near", ["/ip4/192.168.1.7/tcp/1"]), ("gone", ["/ip4/192.168.1.8/tcp/1"])]
    assert forgotten == ["near"]


def test_a_public_server_has_no_neighbours():
    peers = {"a": ["/ip4/8.8.8.9/tcp/1", "/ip4/127.0.0.1/tcp/1"]}
    assert neighbours(peers, [ROUTER, "127.0.0.1", ""]) == {}
    assert neighbours({"a": ["/ip6/fd00::2/tcp/1"]}, ["fd00::1"]) == {"a": ["/ip6/fd00::2/tcp/1"]}
