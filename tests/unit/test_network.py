"""The one retry helper: bounded in attempts and in time, and never for what is the caller's own mistake."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from fakes import FINGERPRINT, announcement, peer_id

from swarm.client.chain import ChainConfig
from swarm.client.config import ClientConfig
from swarm.client.hedging import PATIENCE_S
from swarm.client.known_servers import ReadBudget
from swarm.client.lane import Lane
from swarm.client.network import PROBE_TIMEOUT_S, Attempt, Network
from swarm.client.routing import Hop, Needs, plan_route
from swarm.errors import (
    BadLink,
    BadRequest,
    CacheFull,
    NoRoute,
    PeerBug,
    PeerError,
    PeerUnavailable,
    PromptTooLong,
    SessionLost,
    TooManyRequests,
)
from swarm.memory_directory import MemoryDirectory
from swarm.peers import PeerAddress
from swarm.ranges import BlockRange
from swarm.streams import Step
from swarm.throughput import Throughput

NEEDS = Needs(BlockRange(0, 12), FINGERPRINT)


class FakeConnector:
    def __init__(self) -> None:
        self.forgotten: list[str] = []
        self.throughput, self.ways = Throughput(), {}

    async def forget(self, peer: str) -> None:
        self.forgotten.append(peer)

    @asynccontextmanager
    async def lease(self, address: PeerAddress) -> AsyncIterator[object]:
        raise PeerUnavailable("it is still gone")
        yield


class FastLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer instead of waiting for it."""

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0
        select = self._selector.select

        def jump(timeout: float | None = None) -> object:
            events = select(0)
            if not events and timeout:
                self._now_s += timeout
            return events

        self._selector.select = jump

    def time(self) -> float:
        return self._now_s


def run(test: Callable[[], object]) -> object:
    with asyncio.Runner(loop_factory=FastLoop) as runner:
        return runner.run(test())


def make_network(directory: MemoryDirectory | None = None, **config: object) -> Network:
    options = {"initial_peers": ("/ip4/127.0.0.1/tcp/1",), "route_timeout_s": 5.0} | config
    return Network(ClientConfig(**options), directory or MemoryDirectory(), FakeConnector())


def at_peer(error: PeerError, name: str) -> PeerError:
    error.peer_id = peer_id(name)
    return error


class Attempts:
    """Fails with each of these errors in turn, then succeeds."""

    def __init__(self, *errors: BaseException, then: object = "done") -> None:
        self.errors = list(errors)
        self.then = then
        self.ages: list[float | None] = []

    async def __call__(self, attempt: Attempt) -> object:
        self.ages.append(attempt.max_age_s)
        self.refused_by = attempt.refused_by
        if self.errors:
            raise self.errors.pop(0)
        return self.then


def test_a_failed_peer_is_avoided_and_its_channel_forgotten():
    async def test() -> None:
        directory = MemoryDirectory()
        for name in "AB":
            await directory.announce(announcement(name, 0, 12))
        network = make_network(directory)
        first = (await network.route(NEEDS, Attempt()))[0].peer_id
        failure = PeerUnavailable("gone")
        failure.peer_id = first
        assert await network.retrying(Attempts(failure)) == "done"
        assert (await network.route(NEEDS, Attempt()))[0].peer_id != first
        assert first in network.connector.forgotten
        assert first in network._missing
        await network.aclose()
        network.succeeded(first)
        assert (await network.route(NEEDS, Attempt()))[0].peer_id == first

    run(test)


def test_a_peer_that_could_not_be_reached_is_tried_at_once_where_it_is_announced_anew():
    async def test() -> None:
        directory = MemoryDirectory()
        await directory.announce(announcement("A", 0, 12))
        network = make_network(directory)

        async def reach(attempt: Attempt) -> str:
            target = (await network.route(NEEDS, replace(attempt, max_age_s=0.0)))[0].server.direct[0]
            if target == "127.0.0.1:31337":
                await directory.announce(announcement("A", 0, 12, direct=["127.0.0.1:31338"]))
                raise at_peer(PeerUnavailable("gone"), "A")
            return target

        loop = asyncio.get_running_loop()
        started_s = loop.time()
        assert await network.retrying(reach) == "127.0.0.1:31338"
        assert loop.time() == started_s and network._missing == {}

    run(test)


def test_a_peer_that_is_merely_full_keeps_its_channel():
    async def test() -> None:
        network = make_network()
        await network.retrying(Attempts(at_peer(CacheFull("full"), "A"), at_peer(PeerBug("bug"), "B")))
        assert network.connector.forgotten == []

    run(test)


def test_a_lost_session_does_not_speak_against_its_peer():
    async def test() -> None:
        directory = MemoryDirectory()
        await directory.announce(announcement("A", 0, 12))
        network = make_network(directory)
        await network.retrying(Attempts(at_peer(SessionLost("lost"), "A")))
        assert len(await network.route(NEEDS, Attempt())) == 1

    run(test)


def test_attempts_are_bounded():
    async def test() -> None:
        network = make_network(max_attempts=4)
        attempts = Attempts(*(at_peer(PeerUnavailable(f"failure {number}"), "A") for number in range(9)))
        with pytest.raises(PeerUnavailable, match="failure 3"):
            await network.retrying(attempts)
        assert len(attempts.ages) == 4

    run(test)


def test_a_peers_refusal_counts_for_that_peer_alone():
    async def test() -> None:
        attempts = Attempts(at_peer(PromptTooLong("no room in all"), "A"))
        assert await make_network().retrying(attempts) == "done"
        assert attempts.refused_by == {peer_id("A")}

    run(test)


def test_a_refusal_is_raised_when_everybody_has_refused():
    async def test() -> None:
        directory = MemoryDirectory()
        for name in "AB":
            await directory.announce(announcement(name, 0, 12))
        network, asked = make_network(directory), []

        async def ask(attempt: Attempt) -> None:
            asked.append((await network.route(NEEDS, attempt))[0].peer_id)
            error = PromptTooLong("no room in all")
            error.peer_id = asked[-1]
            raise error

        with pytest.raises(PromptTooLong, match="no room"):
            await network.retrying(ask)
        assert sorted(asked) == sorted(map(peer_id, "AB"))

    run(test)


def test_a_route_that_breaks_gets_a_new_deadline():
    async def test() -> None:
        gaps = [NoRoute("none")] * 8
        attempts = Attempts(*gaps, at_peer(PeerUnavailable("gone"), "A"), *gaps)
        assert await make_network(route_timeout_s=5.0).retrying(attempts) == "done"

    run(test)


def test_a_missing_route_is_waited_for_until_the_deadline():
    async def test() -> None:
        network = make_network(route_timeout_s=5.0)
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        with pytest.raises(NoRoute, match="no server is available for blocks 0-11"):
            await network.retrying(lambda attempt: network.route(NEEDS, attempt))
        assert 5.0 <= loop.time() - started_s < 5.6

    run(test)


def test_a_route_that_appears_in_time_is_taken():
    async def test() -> None:
        attempts = Attempts(NoRoute("none"), NoRoute("none"), NoRoute("none"))
        assert await make_network().retrying(attempts) == "done"
        assert attempts.ages == [None, 1.0, 1.0, 1.0]

    run(test)


def test_no_route_tells_the_last_failure_too():
    async def test() -> None:
        failing = Attempts(at_peer(PeerUnavailable("it hung up"), "A"), *(NoRoute("none") for _ in range(99)))
        with pytest.raises(NoRoute, match="none; the last failure was: it hung up"):
            await make_network(route_timeout_s=2.0).retrying(failing)

    run(test)


@pytest.mark.parametrize("error", [BadRequest("wrong"), PromptTooLong("long"), KeyError("bug")])
def test_what_is_no_peers_fault_is_raised_at_once(error):
    async def test() -> None:
        attempts = Attempts(error)
        with pytest.raises(type(error)):
            await make_network().retrying(attempts)
        assert len(attempts.ages) == 1

    run(test)


def test_cancellation_is_not_retried():
    async def test() -> None:
        started = asyncio.Event()

        async def attempt(_: float | None) -> None:
            started.set()
            await asyncio.Event().wait()

        task = asyncio.create_task(make_network().retrying(attempt))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(test)


def test_a_swarm_of_another_model_is_told_apart_at_once():
    async def test() -> None:
        directory = MemoryDirectory()
        await directory.announce(announcement("A", 0, 12, model_name="other", model_fingerprint="e" * 32))
        with pytest.raises(BadLink, match=r"serves other \(fingerprint eeeeeeeeeeee\), not mine .*ffffffffffff"):
            await make_network(directory).check_model(NEEDS, "mine")

    run(test)


def test_an_empty_swarm_may_yet_get_servers():
    run(lambda: make_network().check_model(NEEDS, "mine"))


def test_servers_are_read_again_when_they_are_too_old():
    async def test() -> None:
        directory = MemoryDirectory()
        network = make_network(directory)
        assert await network.servers(FINGERPRINT) == []
        await directory.announce(announcement("A", 0, 12))
        assert await network.servers(FINGERPRINT) == []
        assert len(await network.servers(FINGERPRINT, max_age_s=0.0)) == 1

    run(test)


def test_without_direct_dialling_routes_name_no_address():
    async def test() -> None:
        directory = MemoryDirectory()
        await directory.announce(announcement("A", 0, 12))
        assert (await make_network(directory).route(NEEDS, Attempt()))[0].address.direct
        assert not (await make_network(directory, use_direct=False).route(NEEDS, Attempt()))[0].address.direct

    run(test)


def test_a_client_needs_somebody_to_join_through():
    with pytest.raises(BadLink, match="join"):
        ClientConfig(initial_peers=())
    with pytest.raises(BadRequest, match="silence_s must be positive"):
        ClientConfig(initial_peers=("/ip4/127.0.0.1/tcp/1",), silence_s=0)


def test_only_permitted_servers_are_on_routes_and_no_route_counts_the_others():
    async def test() -> None:
        directory = MemoryDirectory()
        for name in "ABC":
            await directory.announce(announcement(name, 0, 12))
        allowed = make_network(directory, allowed_servers=[peer_id("B")])
        assert [hop.peer_id for hop in await allowed.route(NEEDS, Attempt())] == [peer_id("B")]
        assert str(await allowed.explain_route(NEEDS)).count("is not named in allowed_servers") == 2
        blocked = make_network(directory, blocked_servers=[peer_id("A"), peer_id("B")])
        assert [hop.peer_id for hop in await blocked.route(NEEDS, Attempt())] == [peer_id("C")]
        nobody = make_network(directory, allowed_servers=[peer_id("A")], blocked_servers=[peer_id("A")])
        with pytest.raises(NoRoute, match=r"1 known server is named in blocked_servers; 2 known .* allowed_servers"):
            await nobody.route(NEEDS, Attempt())

    run(test)


@pytest.mark.parametrize("given", ["my-server", ["A" * 20], [7], [""], ["O" * 46]])
def test_servers_are_permitted_by_peer_id_only(given):
    for name in ("allowed_servers", "blocked_servers"):
        with pytest.raises(BadRequest, match=f"in {name} is not a peer id"):
            make_network(**{name: given})


def test_a_client_reads_no_more_of_a_large_directory_than_it_may_in_any_minute():
    budget, now_s, read = ReadBudget(200_000, 0.0), 0.0, []
    while now_s < 300:
        if (budget_bytes := budget.bytes_at(now_s)) >= 26_000:
            budget.spend(26_000)
            read.append((now_s, 26_000))
            assert budget_bytes <= 40_000
        now_s += 0.5
    for begun_s in range(240):
        assert sum(size for at_s, size in read if begun_s <= at_s < begun_s + 60) <= 200_000
    assert sum(size for _, size in read) > 300 * 150_000 / 60


def test_while_a_peer_is_looked_for_those_that_come_instead_are_met():
    async def test() -> None:
        directory = MemoryDirectory()
        await directory.announce(announcement("A", 0, 12))
        network = make_network(directory)
        network._known._clock, network._known._budget = asyncio.get_running_loop().time, ReadBudget(200_000, 0.0)
        await network.servers(FINGERPRINT)

        async def answers(_: Hop) -> bool:
            return False

        network._answers = answers  # type: ignore[method-assign]
        await network.note_failure(at_peer(PeerUnavailable("gone"), "A"))
        await directory.announce(announcement("B", 0, 12))
        await asyncio.sleep(5.0)
        route = plan_route(network._known.roster, NEEDS, network.view())  # without asking the directory
        assert [hop.peer_id for hop in route] == [peer_id("B")]
        await network.aclose()

    run(test)


def test_when_something_stalls_those_that_are_slow_to_answer_are_suspected_and_avoided_until_they_do():
    async def test() -> None:
        directory = MemoryDirectory()
        for name in "ABC":
            await directory.announce(announcement(name, 0, 12))
        network = make_network(directory)
        servers = await network.servers(FINGERPRINT)
        hops = {server.peer_id: Hop(server, server.blocks) for server in servers}
        a, b, c = (hops[peer_id(name)] for name in "ABC")
        answers_after_s = {a.peer_id: 1.0, b.peer_id: 0.0, c.peer_id: PROBE_TIMEOUT_S}

        async def answers(hop: Hop) -> bool:
            await asyncio.sleep(answers_after_s[hop.peer_id])
            return hop is not c

        network._answers = answers  # type: ignore[method-assign]

        async def avoided(*asked: Hop, number: int = 1) -> frozenset[str]:
            return (await network.elsewhere(Attempt(), NEEDS, asked, number)).refused_by

        assert await avoided(b) == {b.peer_id}, "all, where none is slow to answer"
        assert await avoided() == set()
        assert await avoided(a, b, number=2) == {a.peer_id, b.peer_id}
        assert await avoided(a, b, c) == {a.peer_id, c.peer_id}
        assert {hop.peer_id for hop in await network.route(NEEDS, Attempt())} == {b.peer_id}
        await asyncio.sleep(1.5)
        assert network._avoided() == {c.peer_id}
        await asyncio.sleep(PROBE_TIMEOUT_S)
        assert c.peer_id in network._missing and a.peer_id not in network._avoided()
        await network.aclose()

    run(test)


def test_a_peer_with_too_many_requests_is_left_alone_as_long_as_it_says_and_not_blamed():
    async def test() -> None:
        directory = MemoryDirectory()
        for name in "AB":
            await directory.announce(announcement(name, 0, 12))
        network = make_network(directory)
        first = (await network.route(NEEDS, Attempt()))[0].peer_id
        busy = TooManyRequests("come back later", 30.0)
        busy.peer_id = first
        assert await network.retrying(Attempts(*[busy] * 50)) == "done"  # however often: it is no failure
        assert (await network.route(NEEDS, Attempt()))[0].peer_id != first
        assert not network._missing
        await network.aclose()

    run(test)


def test_a_lone_server_with_too_many_requests_is_waited_for():
    async def test() -> None:
        directory = MemoryDirectory()
        await directory.announce(announcement("A", 0, 12))
        network = make_network(directory, route_timeout_s=30.0)
        loop = asyncio.get_running_loop()
        answers = [at_peer(TooManyRequests("come back later", 0.2), "A") for _ in range(3)]

        async def ask(attempt: Attempt) -> float:
            await network.route(NEEDS, attempt)
            if answers:
                raise answers.pop(0)
            return loop.time()

        began_s = loop.time()
        assert await network.retrying(ask) - began_s > 0.5
        assert not answers
        await network.aclose()

    asyncio.run(test())


def test_a_lone_server_that_stays_busy_is_given_up_after_route_timeout_s():
    async def test() -> None:
        network = make_network(route_timeout_s=5.0)

        async def ask(attempt: Attempt) -> None:
            await asyncio.sleep(1.0)
            raise at_peer(TooManyRequests("come back later", 1.0), "A")

        with pytest.raises(TooManyRequests):
            await network.retrying(ask)
        assert 5.0 <= asyncio.get_running_loop().time() < 7.0
        await network.aclose()

    run(test)


def test_the_way_that_goes_elsewhere_leaves_out_whoever_there_is_a_way_without():
    """Any of those that answer may be the one that stalls; without the only server of some blocks there is no way."""

    async def test() -> None:
        directory = MemoryDirectory()
        for name, start, end in (("A", 0, 6), ("B", 6, 12), ("C", 6, 12), ("D", 6, 12)):
            await directory.announce(announcement(name, start, end))
        network = make_network(directory)
        hops = {server.peer_id: Hop(server, server.blocks) for server in await network.servers(FINGERPRINT)}
        a, b, c, d = (hops[peer_id(name)] for name in "ABCD")

        async def answers(_: Hop) -> bool:
            return True

        network._answers = answers  # type: ignore[method-assign]
        first = await network.elsewhere(Attempt(), NEEDS, [a, b], 1)
        assert first.refused_by == {b.peer_id}
        second = await network.elsewhere(Attempt(), NEEDS, [a, b, a, c], 2)
        assert second.refused_by == {b.peer_id, c.peer_id}
        assert await network.route(NEEDS, second) == [a, d]

    run(test)


def test_of_several_servers_that_give_no_result_the_one_that_is_slowest_to_answer_is_blamed():
    async def test() -> None:
        network = make_network()
        hops = [
            Hop(announcement(name, at, at + 4), BlockRange(at, at + 4)) for name, at in (("A", 0), ("B", 4), ("C", 8))
        ]

        async def answers(hop: Hop) -> bool:
            await asyncio.sleep(2.0 if hop is hops[1] else 0.0)
            return True

        network._answers = answers  # type: ignore[method-assign]
        with pytest.raises(PeerUnavailable, match=r"4:8 .* gave no result in 60 s") as caught:
            await network.while_alive(asyncio.Event().wait(), hops, 60.0)
        assert caught.value.peer_id == hops[1].peer_id

    run(test)


def test_a_link_by_which_a_peer_answers_is_kept_though_others_cannot_reach_it():
    async def test() -> None:
        directory = MemoryDirectory()
        await directory.announce(announcement("A", 0, 12))
        network = make_network(directory)
        await network.servers(FINGERPRINT)
        alive = True

        async def answers(_: Hop) -> bool:
            return alive

        network._answers = answers  # type: ignore[method-assign]
        await network.note_failure(at_peer(PeerUnavailable("a hop before it cannot reach it"), "A"))
        assert network._avoided() == {peer_id("A")}
        await asyncio.gather(*network._missing.values())
        assert network.connector.forgotten == [] and network._missing == {}
        assert network._avoided() == {peer_id("A")}, "for a while it is left out all the same"
        alive = False
        await network.note_failure(at_peer(PeerUnavailable("it hung up"), "A"))
        await asyncio.sleep(0.5)
        assert network.connector.forgotten == [peer_id("A")] and peer_id("A") in network._missing
        await network.aclose()

    run(test)


def test_a_missing_route_that_the_directory_knows_by_now_is_not_slept_for():
    async def test() -> None:
        loop = asyncio.get_running_loop()
        assert await make_network().retrying(Attempts(NoRoute("none"))) == "done"
        assert loop.time() == 0.0
        assert await make_network().retrying(Attempts(NoRoute("none"), NoRoute("none"))) == "done"
        assert loop.time() == 0.5

    run(test)


def test_a_peer_that_is_back_is_not_preferred_before_it_has_done_what_it_was_asked():
    async def test() -> None:
        directory = MemoryDirectory()
        for name, rate in (("A", 100.0), ("B", 90.0)):
            await directory.announce(announcement(name, 0, 12, decode_tokens_per_s=rate))
        network = make_network(directory)

        async def taken() -> str:
            return (await network.route(NEEDS, Attempt()))[0].peer_id

        assert await taken() == peer_id("A")
        network._failures.failed(peer_id("A"), -1e6)
        network._failures.failed(peer_id("A"), time.monotonic())
        network._failures.reached(peer_id("A"))
        assert network._avoided() == set() and await taken() == peer_id("B")
        assert "failed some time ago" in str(await network.explain_route(NEEDS))
        network.succeeded(peer_id("A"))
        assert await taken() == peer_id("A")

    run(test)


@pytest.mark.parametrize("num_prompt_tokens", [0, 40])
def test_every_step_has_a_bound_also_the_first_one_and_the_first_one_after_a_prompt(num_prompt_tokens):
    """A server that answers and does not compute holds nobody until the timeout of the step."""
    server = announcement("A", 0, 12)
    hops, network = [Hop(server, server.blocks)], make_network()
    config = ChainConfig(fingerprint=FINGERPRINT, batch_size=1, max_tokens=64, hidden_size=8, open_timeout_s=5.0)
    lane = Lane(network, NEEDS, config, lambda _: None)
    step = Step(0, 1, torch.zeros(1, 40, 8))
    if num_prompt_tokens:
        lane._chain, lane._lengths = cast(Any, object()), [40]
        for times in (lane.times, network.feedings):
            times.took(40, 2.0)
        step = Step(40, 1, torch.zeros(1, 1, 8))
    assert PATIENCE_S <= lane.bound_s(step, hops) < 3 * PATIENCE_S
