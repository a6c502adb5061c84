"""Places in the network: a few measurements each, and any two peers know roughly how far apart they are."""

from __future__ import annotations

import asyncio
import random
import statistics
from contextlib import asynccontextmanager

import pytest
from fakes import announcement
from hypothesis import given
from hypothesis import strategies as st

from swarm.coordinates import MAX_S, Coordinates
from swarm.errors import BadRequest, PeerUnavailable
from swarm.survey import Survey

numbers = st.floats(-MAX_S, MAX_S)
places = st.builds(Coordinates, numbers, numbers, st.floats(0, MAX_S), st.floats(0, 1))


@given(places, places, st.floats(0, 1e9), st.integers())
def test_no_measurement_moves_a_peer_out_of_this_world(ours, theirs, rtt_s, seed):
    moved = ours.moved(theirs, rtt_s, random.Random(seed))
    assert abs(moved.x_s) <= MAX_S and abs(moved.y_s) <= MAX_S and 0 < moved.height_s <= MAX_S
    assert 0 <= moved.error <= 1
    assert moved.rtt_s(theirs) == pytest.approx(theirs.rtt_s(moved))


def test_peers_at_one_place_part():
    here = Coordinates()
    moved = here.moved(Coordinates(), 0.1, random.Random(0))
    assert 0 < moved.rtt_s(Coordinates()) <= 0.1


def errors_after_calls(liars: int) -> list[float]:
    """How far off, relatively, honest peers expect each other to be after a few calls."""
    rng = random.Random(1)
    true = [Coordinates(rng.gauss(0, 0.05), rng.gauss(0, 0.05), rng.uniform(0.001, 0.01)) for _ in range(60)]
    surveys = [Survey(None, random.Random(number)) for number in range(60)]
    lie = Coordinates(MAX_S, MAX_S, 0.0, 0.0)
    for _ in range(4):
        for number, survey in enumerate(surveys):
            for other in rng.sample([each for each in range(60) if each != number], 8):
                name = "ABCDEFGH"[other % 8] + "abcdefgh"[other // 8]
                place = lie if other < liars else surveys[other].here
                rtt_s = true[number].rtt_s(true[other]) * rng.uniform(1.0, 1.1)
                survey.met(announcement(name, 0, 12, coordinates=place), rtt_s)
            survey.settle()
    return [
        abs(surveys[a].here.rtt_s(surveys[b].here) / true[a].rtt_s(true[b]) - 1)
        for a in range(liars, 60)
        for b in range(liars, a)
    ]


@pytest.mark.parametrize("liars", [0, 1, 2])
def test_peers_that_have_called_a_few_know_how_far_all_are_whoever_lies(liars):
    errors = errors_after_calls(liars)
    assert statistics.median(errors) < 0.25
    assert liars or statistics.quantiles(errors, n=10)[-1] < 0.8


class Silent:
    """Nobody answers; some answer nonsense."""

    def __init__(self) -> None:
        self.called: list[str] = []

    @asynccontextmanager
    async def lease(self, address):
        self.called.append(address.peer_id)
        raise BadRequest("what a stranger may answer") if address.peer_id.endswith("A") else PeerUnavailable("gone")
        yield

    async def forget(self, peer_id):
        pass


def test_servers_that_do_not_answer_are_called_in_turns_like_all_others():
    connector = Silent()
    survey = Survey(connector, random.Random(0))
    servers = [announcement(name, 0, 12) for name in "ABCDEF"]

    async def visit() -> None:
        for _ in range(3):
            await survey.visit(servers, 2)

    asyncio.run(visit())
    assert sorted(connector.called) == sorted(server.peer_id for server in servers)
    assert survey.here is None and survey.rtts_s == {}
