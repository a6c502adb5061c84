"""What an engine counts, and what is handed out of it."""

from __future__ import annotations

import asyncio
import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_engine import open_bench

from swarm.server.counters import RATE_S, TIME_BOUNDS_S, EngineRecord, EngineStatistics
from swarm.server.scheduler import Kind


def read(record: EngineRecord, now_s: float = 0.0) -> EngineStatistics:
    return record.read(now_s, queue_length=0, oldest_wait_s=0.0)


@given(st.lists(st.floats(0, 100), max_size=50), st.floats(0.01, 1))
def test_a_quantile_is_the_bound_above_so_many_values(waits_s, share):
    record = EngineRecord(0.0)
    for wait_s in waits_s:
        record.begun(Kind.DECODE, wait_s)
    histogram = read(record).queue_s[Kind.DECODE]
    assert histogram.count == len(waits_s) and histogram.total == pytest.approx(sum(waits_s))
    bound = histogram.quantile(share)
    assert sum(wait_s <= bound for wait_s in waits_s) >= share * len(waits_s) - 1e-6
    below = [each for each in TIME_BOUNDS_S if each < bound]
    assert not below or not waits_s or sum(wait_s <= below[-1] for wait_s in waits_s) < share * len(waits_s)
    assert histogram.num_above(1.0) == sum(wait_s > 1.0 for wait_s in waits_s)


def test_what_has_come_since_is_told_from_what_was_there():
    record = EngineRecord(0.0)
    record.begun(Kind.PREFILL, 20.0)
    before = read(record).step_queue_s
    record.begun(Kind.DECODE, 0.004)
    new = read(record).step_queue_s.since(before)
    assert (new.count, new.total, new.quantile(0.95)) == (1, pytest.approx(0.004), 0.005)
    assert read(EngineRecord(0.0)).step_queue_s.quantile(0.95) == 0.0
    record.begun(Kind.DECODE, 99.0)
    assert read(record).step_queue_s.quantile(1.0) == math.inf


def test_tokens_per_second_are_those_of_lately():
    record = EngineRecord(0.0)
    for moment in range(100):
        record.ran([1] * 8, 100, 8, began_s=moment - 0.5, now_s=float(moment))
    rates = read(record, 99.5).tokens_per_s
    assert rates[Kind.DECODE] == pytest.approx(8, rel=0.1) and rates[Kind.PREFILL] == pytest.approx(100, rel=0.1)
    assert rates[Kind.TRAINING] == 0.0
    assert read(record, 99.5 + 10 * RATE_S).tokens_per_s[Kind.DECODE] < 0.01


async def test_what_was_read_does_not_change_any_more():
    async with open_bench() as bench, bench.session() as session:
        await bench.step(session, 3)
        before = bench.engine.statistics()
        copy = (before.counters.num_prefill_tokens, dict(before.batch_sizes), before.queue_s[Kind.DECODE].count)
        await bench.step(session, 1)
        assert (before.counters.num_prefill_tokens, before.batch_sizes, before.queue_s[Kind.DECODE].count) == copy
        assert bench.engine.statistics().queue_s[Kind.DECODE].count == 1


async def test_whoever_reads_while_the_engine_counts_finds_numbers_that_belong_together():
    async with open_bench() as bench, bench.session() as session, bench.session() as other:
        ended, found = threading.Event(), []

        def watch() -> None:
            while not ended.wait(0.0003):
                found.append(bench.engine.statistics())

        watching = asyncio.create_task(asyncio.to_thread(watch))
        for at in range(30):
            await asyncio.gather(bench.step(session, 1, position=at), bench.step(other, 1, position=at))
        ended.set()
        await watching
    assert found
    for each in found:
        assert each.pass_s[Kind.DECODE].count == each.counters.num_iterations == sum(each.batch_sizes.values())
        assert sum(size * count for size, count in each.batch_sizes.items()) == each.counters.num_decode_tokens
        assert each.queue_s[Kind.DECODE].count >= each.counters.num_decode_tokens
    assert found[-1].counters.num_decode_tokens <= 60
