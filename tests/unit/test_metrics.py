"""What Prometheus reads of a server."""

from __future__ import annotations

import asyncio
import re
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from test_engine import BLOCKS, Bench, open_bench

from swarm.errors import ResourceError
from swarm.server.adapters import AdapterStore
from swarm.server.batches import KeptActivations
from swarm.server.callers import Caller
from swarm.server.limits import LimitsConfig, Quotas, What
from swarm.server.local import free_port
from swarm.server.metrics import ServerCollector, serve_metrics
from swarm.server.room import MessageRoom
from swarm.server.server_statistics import StatisticsReader


async def read_text(port: int) -> str:
    """In another thread: this one has the event loop, which counts."""

    def read() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            return str(answer.read().decode())

    return await asyncio.to_thread(read)


async def read_metrics(port: int) -> dict[tuple[str, str], float]:
    """(name, first label's value) -> value; of the buckets of times, the last one."""
    text = await read_text(port)
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def in_service(bench: Bench) -> Any:
    """What a collector reads of a tenure."""
    adapters = AdapterStore(0, {}, torch.device("cpu"))
    kept, room = KeptActivations(1 << 20), MessageRoom(1 << 20)
    return SimpleNamespace(
        blocks=BLOCKS, engine=bench.engine, sessions=bench.table, kept=kept, adapters=adapters, room=room
    )


def collector_of(tenure: Callable[[], Any], quotas: Quotas | None = None) -> ServerCollector:
    connections: Any = SimpleNamespace(num_open=3)
    return ServerCollector(StatisticsReader(tenure, quotas or Quotas(LimitsConfig()), connections))


async def test_metrics_follow_what_the_engine_does():
    async with open_bench() as bench:
        collector = collector_of(lambda: in_service(bench))
        with serve_metrics(("127.0.0.1", free_port()), collector) as port:
            async with bench.session() as session, bench.session(batch_size=2) as other:
                await bench.step(session, 6)
                await bench.step(session, 1)
                await bench.step(other, 1)
                await bench.engine.train(lambda turns: None, num_rows=3, length=5)
                metrics = await read_metrics(port)
            assert metrics["swarm_tokens_total", "prefill"] == 6 and metrics["swarm_tokens_total", "decode"] == 3
            assert metrics["swarm_tokens_total", "training"] == 15
            assert metrics["swarm_iterations_total", ""] == 3
            assert metrics["swarm_queue_seconds_count", "decode"] == 2
            assert (
                metrics["swarm_queue_seconds_count", "prefill"] == metrics["swarm_queue_seconds_count", "training"] == 1
            )
            assert (
                metrics["swarm_pass_seconds_count", "decode"] == 2 and metrics["swarm_pass_seconds_sum", "prefill"] > 0
            )
            assert metrics["swarm_decode_batch_size_bucket", "1"] == metrics["swarm_decode_batch_size_count", ""] == 2
            assert metrics["swarm_sessions", ""] == 2 and metrics["swarm_queue_length", ""] == 0
            assert metrics["swarm_cache_bytes", "used"] == 4 * 1024
            assert metrics["swarm_cache_bytes", "total"] == 64 * 1024
            pages = {state: metrics["swarm_cache_pages", state] for state in ("used", "free", "shared")}
            assert pages == {"used": 4, "free": 60, "shared": 0}
            assert 0 < metrics["swarm_median_session_seconds", ""] <= metrics["swarm_oldest_session_seconds", ""]
            assert (await read_metrics(port))["swarm_cache_bytes", "used"] == 0


async def test_prometheus_can_read_a_percentile_of_queue_times_off_growing_buckets():
    async with open_bench() as bench, bench.session() as first, bench.session() as second:
        with serve_metrics(("127.0.0.1", free_port()), collector_of(lambda: in_service(bench))) as port:
            busy = await bench.busy(first)
            waiting = bench.step(second, 1)
            await asyncio.sleep(0.03)
            bench.executor.let_go.set()
            await asyncio.gather(busy, waiting)
            families = {family.name: family for family in text_string_to_metric_families(await read_text(port))}
    samples = [each for each in families["swarm_queue_seconds"].samples if each.labels["kind"] == "decode"]
    buckets = {each.labels["le"]: each.value for each in samples if each.name.endswith("_bucket")}
    assert list(buckets.values()) == sorted(buckets.values()) and buckets["+Inf"] == 2
    assert buckets["0.02"] <= 1, "one of them has waited for the other"


async def test_statistics_can_be_read_in_any_thread_and_end_with_the_server():
    read = collector_of(lambda: None)._read
    assert read() == await asyncio.to_thread(read)

    async def reader() -> Callable[[], Any]:
        return collector_of(lambda: None)._read

    late = await asyncio.to_thread(asyncio.run, reader())
    with pytest.raises(ResourceError, match="has ended"):
        late()


async def test_a_server_on_its_way_to_other_blocks_has_nothing_to_report():
    with serve_metrics(("127.0.0.1", free_port()), collector_of(lambda: None)) as port:
        assert await read_metrics(port) == {("swarm_callers", ""): 0, ("swarm_connections", ""): 3}


async def test_limits_are_counted_by_kind_and_name_nobody():
    quotas = Quotas(LimitsConfig(max_sessions_per_caller=1, messages_per_s=10))
    caller = Caller("192.0.2.7")
    assert quotas.begin(caller, What.SESSIONS, 0.0) is None and quotas.begin(caller, What.SESSIONS, 0.0) is not None
    assert [quotas.wait_s(caller, 10, 0.0) for _ in range(21)][-1] > 0
    with serve_metrics(("127.0.0.1", free_port()), collector_of(lambda: None, quotas)) as port:
        metrics = await read_metrics(port)
        assert metrics["swarm_callers", ""] == metrics["swarm_under_way", "sessions"] == 1
        assert (
            metrics["swarm_refused_total", "sessions"] == 1 and metrics["swarm_delayed_seconds_total", "messages"] > 0
        )
        assert "192.0.2.7" not in str(metrics)


async def test_a_port_in_use_is_a_clear_error():
    async with open_bench() as bench:
        collector = collector_of(lambda: in_service(bench))
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            serving = serve_metrics(taken.getsockname(), collector)
            with pytest.raises(ResourceError, match="choose another --metrics-port"), serving:
                pass


async def test_the_documents_name_all_metrics_and_no_others():
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    table = text[text.index("| metric |") : text.index("The 95th percentile")]
    documented = {name.removesuffix("_total") for name in re.findall(r"`(swarm_[a-z_]+)`", table)}
    async with open_bench() as bench:
        collected = {metric.name for metric in collector_of(lambda: in_service(bench)).collect()}
    assert documented == collected
