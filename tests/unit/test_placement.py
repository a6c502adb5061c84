"""Which blocks a new server takes, and whether they fit."""

from __future__ import annotations

import pytest
from fakes import announcement
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import ResourceError
from swarm.ranges import BlockRange
from swarm.server.placement import CACHE_TOKENS, MemoryNeeds, choose_blocks, plan_memory

MIB = 1 << 20
NEEDS = MemoryNeeds(bytes_per_block=100 * MIB, cache_bytes_per_token=1024)


def test_the_first_server_takes_the_front():
    assert choose_blocks([], 12, 4) == BlockRange(0, 4)


def test_a_gap_is_filled_first():
    servers = [announcement("A", 0, 4), announcement("B", 7, 12)]
    chosen = choose_blocks(servers, 12, 3)
    assert chosen == BlockRange(4, 7)


def test_the_weakest_blocks_are_strengthened():
    servers = [
        announcement("A", 0, 6, decode_tokens_per_s=50.0),
        announcement("B", 6, 12, decode_tokens_per_s=5.0),
    ]
    assert choose_blocks(servers, 12, 4) == BlockRange(6, 10)


def test_a_draining_server_does_not_count():
    servers = [announcement("A", 0, 6), announcement("B", 6, 12, state="draining")]
    assert choose_blocks(servers, 12, 6) == BlockRange(6, 12)


def test_a_server_with_room_for_more_takes_the_whole_model():
    assert choose_blocks([announcement("A", 0, 4)], 12, 99) == BlockRange(0, 12)


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(1, 12)), max_size=4), st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_an_empty_block_is_always_among_the_chosen(kinds, num_blocks):
    servers = [announcement(name, start, end) for name, (start, end) in zip("ABCD", kinds, strict=False) if start < end]
    chosen = choose_blocks(servers, 12, num_blocks)
    assert len(chosen) == num_blocks and chosen.end <= 12
    uncovered = set(range(12)) - {block for server in servers for block in server.blocks}
    assert not uncovered or uncovered & set(chosen)


def test_memory_holds_as_many_blocks_as_fit_with_their_cache():
    per_block = NEEDS.bytes_per_block + CACHE_TOKENS * NEEDS.cache_bytes_per_token
    plan = plan_memory(NEEDS, free_bytes=int(5.5 * per_block / 0.85), num_model_blocks=12)
    assert plan.num_blocks == 5
    assert plan.cache_bytes >= 5 * CACHE_TOKENS * NEEDS.cache_bytes_per_token


def test_no_more_blocks_than_the_model_has():
    assert plan_memory(NEEDS, free_bytes=10**12, num_model_blocks=12).num_blocks == 12


@given(st.integers(1, 20_000), st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_a_plan_never_takes_more_than_there_is(free_mib, num_blocks):
    try:
        plan = plan_memory(NEEDS, free_bytes=free_mib * MIB, num_model_blocks=12, num_blocks=num_blocks)
    except ResourceError:
        return
    assert plan.num_blocks == num_blocks and plan.cache_bytes > 0
    assert plan.num_blocks * NEEDS.bytes_per_block + plan.cache_bytes <= free_mib * MIB


def test_too_little_memory_for_one_block_is_said_with_numbers():
    with pytest.raises(ResourceError, match=r"1 block of this model needs at least 101 MiB, 85 MiB can be used"):
        plan_memory(NEEDS, free_bytes=100 * MIB, num_model_blocks=12)


def test_too_little_memory_for_the_wanted_blocks_advises_fewer():
    with pytest.raises(ResourceError, match=r"5 blocks of this model need at least .* ask for fewer blocks"):
        plan_memory(NEEDS, free_bytes=400 * MIB, num_model_blocks=12, num_blocks=5)
