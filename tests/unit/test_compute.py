"""What the client makes of the results of micro-batches: sums that depend on nobody's speed, and few at a time."""

from __future__ import annotations

import asyncio
import random
import weakref

import pytest
import torch

from swarm.client.compute import (
    LEAST_PARALLEL,
    MAX_EARLY,
    MAX_PARALLEL,
    Gradients,
    _fold,
    _Sums,
    num_parallel,
    shared_tokens,
)
from swarm.client.parts import LEAST_TOKENS

NUM_PARTS = 40


@pytest.mark.parametrize("seed", range(3))
async def test_gradients_are_added_in_one_order_as_they_come(seed: int) -> None:
    draw, alive, most = random.Random(seed), weakref.WeakSet(), 0  # type: ignore[var-annotated]

    def part(number: int) -> Gradients:
        torch.manual_seed(number)
        prompts, adapter = torch.randn(2, 1, 3, 4), [torch.randn(8, 4) * 1e3, torch.randn(4) * 1e-3]
        return Gradients(torch.randn(2, 3, 4), prompts, {5: adapter})

    async def job(number: int) -> Gradients:
        nonlocal most
        for _ in range(draw.randrange(1, 30)):
            await asyncio.sleep(0)
        result = part(number)
        alive.add(result.dprompts_NBPD)
        most = max(most, len(alive))
        return result

    sums = _Sums(prompts_of_rows=False)
    await _fold([lambda number=number: job(number) for number in range(NUM_PARTS)], sums.add, LEAST_PARALLEL)
    assert most <= LEAST_PARALLEL + MAX_EARLY + 2  # the first is the sum
    ours, parts = sums.gradients(), [part(number) for number in range(NUM_PARTS)]
    assert torch.equal(ours.dx_BLD, torch.cat([each.dx_BLD for each in parts]))
    for place in range(2):
        wanted = parts[0].dadapters[5][place].clone()
        for each in parts[1:]:
            wanted += each.dadapters[5][place]
        assert torch.equal(ours.dadapters[5][place], wanted)
    assert ours.dprompts_NBPD is not None and ours.dprompts_NBPD.shape == (2, 1, 3, 4)


async def test_a_micro_batch_that_fails_ends_the_others() -> None:
    ended: list[int] = []

    async def job(number: int) -> Gradients:
        try:
            if number == 2:
                raise ValueError("it failed")
            await asyncio.sleep(60)
        finally:
            ended.append(number)
        raise AssertionError

    with pytest.raises(ValueError, match="it failed"):
        await asyncio.wait_for(
            _fold([lambda number=number: job(number) for number in range(9)], print, LEAST_PARALLEL), 5
        )
    assert {0, 1, 2, 3} <= set(ended) and len(ended) < 9


def test_prompts_of_their_own_rows_stay_apart() -> None:
    sums = _Sums(prompts_of_rows=True)
    for value in (1.0, 2.0):
        sums.add(Gradients(torch.zeros(2, 3, 4), torch.full((2, 2, 3, 4), value), {}))
    dprompts = sums.gradients().dprompts_NBPD
    assert dprompts is not None and dprompts.shape == (2, 4, 3, 4) and dprompts[0, :, 0, 0].tolist() == [1, 1, 2, 2]


def test_a_batch_is_cut_into_enough_parts_for_all_routes_and_none_too_small() -> None:
    assert shared_tokens(1024, 0) == shared_tokens(1024, 1) == 1024
    assert shared_tokens(4096, 2) == 1024 and shared_tokens(4096, 4) == 512
    assert shared_tokens(1024, 8) == LEAST_TOKENS
    assert [num_parallel(count) for count in (0, 1, 3, 100)] == [LEAST_PARALLEL, LEAST_PARALLEL, 6, MAX_PARALLEL]
