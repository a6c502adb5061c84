"""How many blocks a server holds, and whether they fit."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import ResourceError
from swarm.server.placement import CACHE_TOKENS, LEAST_CACHE_TOKENS, MemoryNeeds, MemoryPlan, fits, plan_memory

MIB = 1 << 20
NEEDS = MemoryNeeds(bytes_per_block=100 * MIB, cache_bytes_per_token=1024)


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
    budgets = plan.cache_bytes + plan.adapter_bytes + plan.kept_bytes + plan.graph_bytes
    assert plan.num_blocks * NEEDS.bytes_per_block + budgets <= free_mib * MIB


def test_too_little_memory_for_one_block_is_said_with_numbers():
    with pytest.raises(ResourceError, match=r"1 block of this model needs at least 101 MiB, 85 MiB can be used"):
        plan_memory(NEEDS, free_bytes=100 * MIB, num_model_blocks=12)


@given(st.integers(0, 20 << 20), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_room_for_adapters_never_takes_that_of_the_smallest_cache(spare_bytes, num_blocks):
    smallest = num_blocks * (NEEDS.bytes_per_block + LEAST_CACHE_TOKENS * NEEDS.cache_bytes_per_token)
    free_bytes = int((smallest + spare_bytes) / 0.85) + 2
    plan = plan_memory(NEEDS, free_bytes=free_bytes, num_model_blocks=12, num_blocks=num_blocks)
    assert plan.cache_bytes >= num_blocks * LEAST_CACHE_TOKENS * NEEDS.cache_bytes_per_token
    assert plan.adapter_bytes >= 0 and (spare_bytes < 1 << 20 or plan.adapter_bytes > 0)


def test_the_room_for_kept_activations_is_the_wanted_one_or_a_part_of_what_blocks_leave():
    plans = [plan_memory(NEEDS, free_bytes=4 << 30, num_model_blocks=12, kept_bytes=n) for n in (None, 0, 300 * MIB)]
    assert [plan.kept_bytes for plan in plans] == [plans[0].kept_bytes, 0, 300 * MIB]
    assert 0 < plans[0].kept_bytes <= (4 << 30) - 12 * NEEDS.bytes_per_block
    assert all(plan.graph_bytes == int(0.05 * (4 << 30)) for plan in plans)


def test_too_little_memory_beside_the_wanted_room_for_adapters_says_so():
    with pytest.raises(ResourceError, match=r"55 MiB can be used here beside 30 MiB for adapters: .*--adapter-mib"):
        plan_memory(NEEDS, free_bytes=100 * MIB, num_model_blocks=12, adapter_bytes=30 * MIB)


def test_too_little_memory_for_the_wanted_blocks_advises_fewer():
    with pytest.raises(ResourceError, match=r"5 blocks of this model need at least .* ask for fewer blocks"):
        plan_memory(NEEDS, free_bytes=400 * MIB, num_model_blocks=12, num_blocks=5)


def test_further_blocks_fit_if_they_and_their_cache_do():
    memory = MemoryPlan(
        num_blocks=2, cache_bytes=30 * MIB, adapter_bytes=10 * MIB, kept_bytes=10 * MIB, graph_bytes=5 * MIB
    )
    assert fits(NEEDS, memory, free_bytes=300 * MIB)
    assert not fits(NEEDS, memory, free_bytes=290 * MIB)
