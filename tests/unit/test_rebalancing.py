"""Which blocks servers take, and when they move: holes are closed and never opened, moves end, everybody agrees."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from fakes import announcement
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.ranges import BlockRange
from swarm.server import rebalancing
from swarm.server.rebalancing import (
    FIXED,
    FREE,
    MAX_STAY_S,
    MIN_STAY_S,
    SETTLED,
    Population,
    choose_blocks,
    mobility,
    own_move,
    plan_moves,
    reconsider,
)

NUM_BLOCKS = 12


def population(*servers: tuple[int, int, float], mobility: int = FREE) -> Population:
    """Servers as (start, end, blocks per second)."""
    return Population(
        num_blocks=NUM_BLOCKS,
        start_S=np.array([start for start, _, _ in servers], dtype=np.int64),
        end_S=np.array([end for _, end, _ in servers], dtype=np.int64),
        rate_S=np.array([rate for _, _, rate in servers], dtype=np.float64),
        serving_S=np.ones(len(servers), dtype=bool),
        mobility_S=np.full(len(servers), mobility),
        tie_S=np.linspace(0.0, 1.0, len(servers), endpoint=False),
    )


def arrived(swarm: Population, server: int, start: int) -> Population:
    """The population once a server has moved."""
    starts, ends = swarm.start_S.copy(), swarm.end_S.copy()
    ends[server] += start - starts[server]
    starts[server] = start
    return replace(swarm, start_S=starts, end_S=ends)


@st.composite
def swarms(draw: st.DrawFn, mobility: int = FREE) -> Population:
    lengths = draw(st.lists(st.integers(1, NUM_BLOCKS), min_size=1, max_size=8))
    servers = []
    for length in lengths:
        start = draw(st.integers(0, NUM_BLOCKS - length))
        servers.append((start, start + length, draw(st.floats(1.0, 1000.0))))
    return population(*servers, mobility=mobility)


# Joining


def test_the_first_server_takes_the_front():
    assert choose_blocks([], NUM_BLOCKS, 4) == BlockRange(0, 4)


def test_a_gap_is_filled_first():
    servers = [announcement("A", 0, 4), announcement("B", 7, 12)]
    assert choose_blocks(servers, NUM_BLOCKS, 3) == BlockRange(4, 7)


def test_the_weakest_blocks_are_strengthened():
    servers = [
        announcement("A", 0, 6, decode_tokens_per_s=50.0),
        announcement("B", 6, 12, decode_tokens_per_s=5.0),
    ]
    assert choose_blocks(servers, NUM_BLOCKS, 4) == BlockRange(6, 10)


def test_a_draining_server_does_not_count():
    servers = [announcement("A", 0, 6), announcement("B", 6, 12, state="draining")]
    assert choose_blocks(servers, NUM_BLOCKS, 6) == BlockRange(6, 12)


def test_those_that_are_on_their_way_count_where_they_go():
    servers = [
        announcement("A", 0, 4),
        announcement("B", 4, 8, state="joining", decode_tokens_per_s=0.0),
        announcement("C", 0, 4, next_start=8, next_end=12),
    ]
    assert choose_blocks(servers[:2], NUM_BLOCKS, 4) == BlockRange(8, 12)
    assert Population.of(servers, NUM_BLOCKS).coverage_N.tolist() == [100.0] * 12
    assert Population.of(servers, NUM_BLOCKS).servers_N.tolist() == [1.0] * 4 + [0.0] * 8


def test_a_server_with_room_for_more_takes_the_whole_model():
    assert choose_blocks([announcement("A", 0, 4)], NUM_BLOCKS, 99) == BlockRange(0, 12)


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(1, 12)), max_size=4), st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_an_empty_block_is_always_among_the_chosen(kinds, num_blocks):
    servers = [announcement(name, start, end) for name, (start, end) in zip("ABCD", kinds, strict=False) if start < end]
    chosen = choose_blocks(servers, NUM_BLOCKS, num_blocks)
    assert len(chosen) == num_blocks and chosen.end <= NUM_BLOCKS
    uncovered = set(range(NUM_BLOCKS)) - {block for server in servers for block in server.blocks}
    assert not uncovered or uncovered & set(chosen)


# Moving


def test_a_gap_is_filled_by_one_server_however_many_could():
    swarm = population(*[(0, 6, 100.0)] * 5)
    moves = plan_moves(swarm)
    assert moves[0].start == 6
    after_first = plan_moves(replace(arrived(swarm, moves[0].server, 6), mobility_S=np.full(5, SETTLED)))
    assert after_first == []


def test_settled_servers_move_for_gaps_only_and_fixed_ones_never():
    with_gap = [(0, 6, 100.0), (0, 6, 100.0)]
    unbalanced = [(0, 6, 100.0), (0, 6, 100.0), (0, 6, 100.0), (6, 12, 10.0)]
    assert plan_moves(population(*with_gap, mobility=SETTLED))
    assert not plan_moves(population(*with_gap, mobility=FIXED))
    assert plan_moves(population(*unbalanced, mobility=FREE))
    assert not plan_moves(population(*unbalanced, mobility=SETTLED))


def test_rates_that_differ_a_little_move_nobody():
    balanced = [(0, 6, 100.0), (6, 12, 100.0), (0, 6, 80.0), (6, 12, 90.0)]
    assert plan_moves(population(*balanced)) == []


@given(swarms())
@settings(max_examples=200, deadline=None)
def test_no_plan_takes_a_block_from_its_last_server(swarm):
    """Not even while all that are named are on their way at once."""
    staying = swarm.servers_N
    for move in plan_moves(swarm):
        here = set(range(swarm.start_S[move.server], swarm.end_S[move.server]))
        there = set(range(move.start, move.start + len(here)))
        staying[list(here)] -= 1
        assert all(staying[block] > 0 for block in here - there)
        assert max(there) < NUM_BLOCKS


@given(swarms())
@settings(max_examples=60, deadline=None)
def test_moves_end_where_nobody_comes_or_leaves(swarm):
    before = swarm.coverage_N.min()
    for _ in range(60):
        moves = plan_moves(swarm, max_moves=1)
        if not moves:
            break
        swarm = arrived(swarm, moves[0].server, moves[0].start)
    assert not moves and swarm.coverage_N.min() >= before - 1e-9


@given(swarms(mobility=SETTLED))
@settings(max_examples=100, deadline=None)
def test_a_move_of_settled_servers_serves_blocks_that_had_no_server(swarm):
    gaps = np.flatnonzero(swarm.going_N == 0)
    moves = plan_moves(swarm)
    assert len(gaps) or not moves
    for move in moves:
        swarm = arrived(swarm, move.server, move.start)
    assert not moves or (swarm.going_N == 0).sum() < len(gaps)


@given(swarms())
@settings(max_examples=60, deadline=None)
def test_everybody_computes_the_same_plan_whoever_is_listed_first(swarm):
    order = np.random.default_rng(0).permutation(len(swarm.start_S))
    shuffled = Population(
        num_blocks=NUM_BLOCKS,
        **{name: getattr(swarm, name)[order] for name in Population.__slots__ if name != "num_blocks"},
    )
    plans = [[(order[move.server], move.start) for move in plan_moves(shuffled)]]
    plans.append([(move.server, move.start) for move in plan_moves(swarm)])
    assert plans[0] == plans[1]


def test_of_two_that_have_announced_the_same_one_at_most_goes():
    """Both saw the same gap, before they saw each other."""
    swarm = population(*[(0, 6, 100.0)] * 3)
    asking = arrived(arrived(swarm, 0, 6), 1, 6)
    asking = replace(asking, serving_S=np.array([False, False, True]), mobility_S=np.full(3, SETTLED))
    assert reconsider(asking, 0, 0) is None and reconsider(asking, 1, 0) is None
    alone = replace(arrived(swarm, 1, 6), serving_S=np.array([True, False, True]))
    assert reconsider(alone, 1, 0) == BlockRange(6, 12)


def test_only_those_that_a_plan_names_move():
    swarm = population((0, 6, 100.0), (0, 6, 100.0), (0, 6, 100.0))
    named = [server for server in range(3) if own_move(swarm, server) is not None]
    assert [move.server for move in plan_moves(swarm)] == named and 1 <= len(named) < 3


@pytest.mark.parametrize(
    "moves_by_itself, settled_s, num_moves, said",
    [
        (False, 1e6, 0, "fixed"),
        (True, 0.0, 0, "settled"),
        (True, MIN_STAY_S, 0, "free"),
        (True, MIN_STAY_S, 1, "settled"),
        (True, 2 * MIN_STAY_S, 1, "free"),
        (True, MAX_STAY_S, 1000, "free"),
    ],
)
def test_a_server_stays_longer_after_each_move(moves_by_itself, settled_s, num_moves, said):
    assert mobility(moves_by_itself, settled_s, num_moves) == said


def test_a_plan_for_a_thousand_servers_takes_milliseconds():
    rng = np.random.default_rng(0)
    length_S = rng.integers(2, 41, 1000)
    start_S = (rng.random(1000) * (81 - length_S)).astype(np.int64)
    swarm = Population(
        num_blocks=80,
        start_S=start_S,
        end_S=start_S + length_S,
        rate_S=rng.lognormal(5.0, 0.7, 1000),
        serving_S=np.ones(1000, dtype=bool),
        mobility_S=np.full(1000, FREE),
        tie_S=rng.random(1000),
    )
    began_s = time.perf_counter()
    assert len(plan_moves(swarm)) == rebalancing.MAX_MOVES
    assert time.perf_counter() - began_s < 1.0  # it takes 10 ms
