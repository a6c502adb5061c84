"""One line in the log for all that was too much in a while, and none while nothing is."""

from __future__ import annotations

import asyncio
import logging
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from test_engine import BLOCKS, Bench, open_bench
from test_metrics import in_service

from swarm.errors import CacheFull
from swarm.server.callers import Caller
from swarm.server.counters import EngineRecord
from swarm.server.limits import LimitsConfig, Quotas, What
from swarm.server.overload import LATE_S, describe, log_overload, overload
from swarm.server.scheduler import Kind
from swarm.server.server_statistics import ServerStatistics, StatisticsReader
from swarm.server.sessions import SessionKey

LINE = re.compile(r"overloaded:( [a-z0-9_]+=[0-9.inf]+)+")


def reader(bench: Bench, quotas: Quotas) -> StatisticsReader:
    connections: Any = SimpleNamespace(num_open=0)
    service = in_service(bench)
    return StatisticsReader(lambda: service, quotas, connections)


async def refuse_session(bench: Bench) -> None:
    key = SessionKey(session_id=b"x" * 16, blocks=BLOCKS, batch_size=4, max_tokens=4)
    with pytest.raises(CacheFull):
        async with bench.table.open(key, epoch=1, prompts_NBPD=None, timeout_s=0.0):
            pass


async def test_a_full_cache_and_limits_that_are_hit_are_one_line_of_keys_and_values(caplog):
    quotas = Quotas(LimitsConfig(max_sessions_per_caller=1))
    periods: asyncio.Queue[None] = asyncio.Queue()
    async with open_bench(num_pages=4) as bench, bench.session(max_tokens=16) as session:
        await bench.step(session, 4)
        read = reader(bench, quotas)
        with caplog.at_level(logging.WARNING, "swarm.server"):
            logged = asyncio.create_task(log_overload(read, wait=lambda _: periods.get()))
            await asyncio.sleep(0)
            for _ in range(20):
                await refuse_session(bench)
                quotas.begin(Caller("192.0.2.7"), What.SESSIONS, 0.0)
            for _ in range(3):  # in the second and the third nothing happens any more
                periods.put_nowait(None)
                await asyncio.sleep(0)
            assert periods.empty()
            logged.cancel()
    (line,) = caplog.messages
    assert LINE.fullmatch(line), line
    found = dict(part.split("=") for part in line.removeprefix("overloaded: ").split())
    assert found["sessions_waited"] == found["sessions_refused"] == "20" and found["refused_sessions"] == "19"
    assert (found["free_pages"], found["pages"], found["sessions"]) == ("3", "4", "1")
    assert "192.0.2.7" not in line


def with_engine(statistics: ServerStatistics, record: EngineRecord) -> ServerStatistics:
    assert statistics.tenure is not None
    engine = record.read(0.0, queue_length=3, oldest_wait_s=2.0)
    return replace(statistics, tenure=replace(statistics.tenure, engine=engine))


async def test_steps_that_wait_for_long_are_overload_and_training_that_does_is_not():
    async with open_bench() as bench:
        now = reader(bench, Quotas(LimitsConfig()))()
    record = EngineRecord(0.0)
    record.begun(Kind.DECODE, 5.0)
    before = with_engine(now, record)
    record.begun(Kind.DECODE, LATE_S[Kind.DECODE])
    record.begun(Kind.PREFILL, LATE_S[Kind.PREFILL])
    record.begun(Kind.TRAINING, 1000.0)
    assert overload(before, with_engine(now, record)) == {}
    record.begun(Kind.DECODE, 1.5)
    record.begun(Kind.PREFILL, 15.0)
    later = with_engine(now, record)
    found = overload(before, later)
    assert found == {"late_decode_steps": 1, "late_prefill_steps": 1}
    assert "queue_p95_s=30 oldest_wait_s=2.0 queue_length=3" in describe(found, before, later)


async def test_counts_that_begin_anew_with_other_blocks_are_no_overload_and_hide_none():
    async with open_bench() as bench:
        now = reader(bench, Quotas(LimitsConfig()))()
    old, new = EngineRecord(0.0), EngineRecord(7.0)
    for _ in range(5):
        old.out_of_pages()
    assert overload(with_engine(now, old), with_engine(now, new)) == {}
    new.out_of_pages()
    assert overload(with_engine(now, old), with_engine(now, new)) == {"steps_without_pages": 1}
    assert overload(with_engine(now, old), replace(now, tenure=None)) == {}
    assert overload(replace(now, tenure=None), with_engine(now, new)) == {"steps_without_pages": 1}
