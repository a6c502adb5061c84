"""What Prometheus reads of a server."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from test_engine import Bench, open_bench

from swarm.errors import ResourceError
from swarm.server.activations import KeptActivations
from swarm.server.adapters import AdapterStore
from swarm.server.callers import Caller
from swarm.server.limits import LimitsConfig, Quotas, What
from swarm.server.metrics import ServerCollector, serve_metrics
from swarm.server.room import MessageRoom


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def read_metrics(port: int) -> dict[tuple[str, str], float]:
    """(name, first label's value) -> value."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def in_service(bench: Bench) -> Any:
    """What a collector reads of a tenure."""
    adapters = AdapterStore(0, {}, torch.device("cpu"))
    kept, room = KeptActivations(1 << 20, 1 << 20), MessageRoom(1 << 20)
    return SimpleNamespace(engine=bench.engine, sessions=bench.table, kept=kept, adapters=adapters, room=room)


def collector_of(tenure: Callable[[], Any], quotas: Quotas | None = None) -> ServerCollector:
    connections: Any = SimpleNamespace(num_open=3)
    return ServerCollector(tenure, quotas or Quotas(LimitsConfig()), connections)


async def test_metrics_follow_what_the_engine_does():
    async with open_bench() as bench:
        collector = collector_of(lambda: in_service(bench))
        with serve_metrics(("127.0.0.1", free_port()), collector) as port:
            async with bench.session() as session, bench.session(batch_size=2) as other:
                await bench.step(session, 6)
                await bench.step(session, 1)
                await bench.step(other, 1)
                await bench.engine.train(lambda turns: None, num_rows=3, length=5)
                metrics = read_metrics(port)
            assert metrics["swarm_tokens_total", "prefill"] == 6 and metrics["swarm_tokens_total", "decode"] == 3
            assert metrics["swarm_tokens_total", "training"] == 15
            assert metrics["swarm_iterations_total", ""] == metrics["swarm_steps_total", ""] == 3
            assert metrics["swarm_decode_batch_size_bucket", "1"] == metrics["swarm_decode_batch_size_count", ""] == 2
            assert metrics["swarm_sessions", ""] == 2 and metrics["swarm_queue_length", ""] == 0
            assert metrics["swarm_cache_bytes", "used"] == 4 * 1024
            assert metrics["swarm_cache_bytes", "total"] == 64 * 1024
            assert read_metrics(port)["swarm_cache_bytes", "used"] == 0


async def test_a_server_on_its_way_to_other_blocks_has_nothing_to_report():
    with serve_metrics(("127.0.0.1", free_port()), collector_of(lambda: None)) as port:
        assert read_metrics(port) == {("swarm_callers", ""): 0, ("swarm_connections", ""): 3}


async def test_limits_are_counted_by_kind_and_name_nobody():
    quotas = Quotas(LimitsConfig(max_sessions_per_caller=1, messages_per_s=10))
    caller = Caller("192.0.2.7")
    assert quotas.begin(caller, What.SESSIONS, 0.0) is None and quotas.begin(caller, What.SESSIONS, 0.0) is not None
    assert [quotas.wait_s(caller, 10, 0.0) for _ in range(21)][-1] > 0
    with serve_metrics(("127.0.0.1", free_port()), collector_of(lambda: None, quotas)) as port:
        metrics = read_metrics(port)
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
