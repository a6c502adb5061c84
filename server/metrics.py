"""What a server does, for Prometheus. Counts and sizes only: nothing of what people compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from swarm.errors import ResourceError

from .connections import Connections
from .engine import EngineStatistics
from .limits import Quotas, QuotaStatistics, What
from .sessions import SessionTableStatistics
from .tenure import Tenure

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Upper bounds of the histogram's buckets."""


class ServerCollector(Collector):
    """Reads the statistics of the blocks in service each time that Prometheus asks; counts begin anew with others.

    Args:
        tenure: gives what is in service; None while there is nothing.
        quotas: what callers have, and what they were refused.
        connections: to the gRPC port.
    """

    def __init__(self, tenure: Callable[[], Tenure | None], quotas: Quotas, connections: Connections) -> None:
        self._tenure = tenure
        self._quotas = quotas
        self._connections = connections

    def collect(self) -> Iterator[Metric]:
        yield from self._of_callers(self._quotas.statistics())
        yield _gauge("connections", "TCP connections to the gRPC port.", self._connections.num_open)
        if (tenure := self._tenure()) is None:
            return
        yield from self._of_engine(tenure.engine.statistics())
        yield from self._of_sessions(tenure.sessions.statistics())
        yield _gauge("kept_activation_bytes", "Activations that wait for their Backward.", tenure.kept.used_bytes)
        adapters = tenure.adapters.statistics()
        yield _gauge("adapters", "Adapters that clients have sent.", adapters.num_adapters)
        yield _gauge("adapters_in_use", "Those that sessions and batches use now.", adapters.num_used)
        yield _gauge("adapters_arriving", "Those on their way here.", adapters.num_arriving)
        yield _gauge("adapter_bytes", "What they take, and what has come of those on their way.", adapters.used_bytes)
        room = tenure.room.statistics()
        yield _gauge("message_bytes", "Room that steps and batches have, from before they are read.", room.used_bytes)
        yield _gauge("messages_waiting", "Steps and batches that wait for room.", room.num_waiting)
        yield _counter("kept_activation_hits", "Slices whose Backward used kept activations.", tenure.kept.num_hits)

    def _of_callers(self, statistics: QuotaStatistics) -> Iterator[Metric]:
        yield _gauge("callers", "Callers that have something under way.", statistics.num_callers)
        families: list[tuple[type[CounterMetricFamily | GaugeMetricFamily], str, str, Mapping[What, float]]] = [
            (
                GaugeMetricFamily,
                "under_way",
                "What callers have at a time, where that is limited.",
                statistics.under_way,
            ),
            (CounterMetricFamily, "refused", "How often a limit was reached.", statistics.refused),
            (CounterMetricFamily, "delayed_seconds", "Time that messages had to wait.", statistics.waited_s),
        ]
        for family, name, what, values in families:
            metric = family(f"swarm_{name}", what, labels=["kind"])
            for kind, value in values.items():
                metric.add_metric([kind.value], value)
            yield metric

    def _of_engine(self, statistics: EngineStatistics) -> Iterator[Metric]:
        counters = statistics.counters
        tokens = CounterMetricFamily("swarm_tokens", "Tokens that ran through the blocks.", labels=["kind"])
        for kind, value in (
            ("decode", counters.num_decode_tokens),
            ("prefill", counters.num_prefill_tokens),
            ("training", counters.num_training_tokens),
        ):
            tokens.add_metric([kind], value)
        yield tokens
        busy = CounterMetricFamily("swarm_busy_seconds", "Time of the compute thread.", labels=["kind"])
        busy.add_metric(["steps"], counters.iteration_s)
        busy.add_metric(["training"], counters.training_s)
        yield busy
        yield _counter("iterations", "Passes through the blocks.", counters.num_iterations)
        yield _counter("shared_iterations", "Passes that carried several sessions.", counters.num_shared_passes)
        yield _counter("held_iterations", "Passes that waited for further steps.", counters.num_held)
        yield _counter("steps", "Steps of sessions.", counters.num_steps)
        yield _counter("step_queue_seconds", "Time that steps waited for their first pass.", counters.queued_s)
        yield _counter("out_of_pages", "Steps that found the KV cache full.", counters.num_out_of_pages)
        yield _gauge("queue_length", "Steps and batches that wait.", statistics.queue_length)
        yield _batch_sizes(statistics.batch_sizes)

    def _of_sessions(self, statistics: SessionTableStatistics) -> Iterator[Metric]:
        yield _gauge("sessions", "Open sessions.", statistics.num_sessions)
        yield _counter("reclaimed_sessions", "Sessions ended so that others get cache.", statistics.num_reclaimed)
        yield _gauge("kept_sessions", "Caches kept for clients whose connection broke.", statistics.num_kept)
        yield _gauge("oldest_session_seconds", "Age of the oldest open session.", statistics.oldest_session_s)
        cache = GaugeMetricFamily("swarm_cache_bytes", "The KV cache.", labels=["state"])
        cache.add_metric(["used"], statistics.cache_used_bytes)
        cache.add_metric(["shared"], statistics.cache_shared_bytes)
        cache.add_metric(["total"], statistics.cache_total_bytes)
        yield cache


def _counter(name: str, what: str, value: float) -> Metric:
    return CounterMetricFamily(f"swarm_{name}", what, value=value)


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(f"swarm_{name}", what, value=value)


def _batch_sizes(counts: dict[int, int]) -> Metric:
    buckets = [(str(most), float(sum(n for size, n in counts.items() if size <= most))) for most in BATCH_SIZES]
    buckets.append(("+Inf", float(sum(counts.values()))))
    total = sum(size * count for size, count in counts.items())
    return HistogramMetricFamily("swarm_decode_batch_size", "Decode steps in a pass.", buckets=buckets, sum_value=total)


@contextmanager
def serve_metrics(address: tuple[str, int], collector: Collector) -> Iterator[int]:
    """Answer Prometheus over HTTP, under /metrics, while the body runs; yield the port.

    Raises: ResourceError: the port is taken.
    """
    host, port = address
    registry = CollectorRegistry()
    registry.register(collector)
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as exc:
        raise ResourceError(f"port {port} on {host} cannot be used for metrics: choose another --metrics-port") from exc
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
