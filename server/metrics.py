"""What a server does, for Prometheus. Counts and sizes only: nothing of what people compute."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from swarm.errors import ResourceError

from .counters import EngineStatistics, Histogram
from .limits import QuotaStatistics, What
from .scheduler import Kind
from .server_statistics import ServerStatistics, TenureStatistics
from .session_statistics import SessionTableStatistics

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Upper bounds of the histogram's buckets."""


class ServerCollector(Collector):
    """Reads the statistics of a server each time that Prometheus asks, in a thread of its own."""

    def __init__(self, read: Callable[[], ServerStatistics]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        statistics = self._read()
        yield from self._of_callers(statistics.quotas)
        yield _gauge("connections", "TCP connections to the gRPC port.", statistics.num_connections)
        if statistics.tenure is not None:
            yield from self._of_tenure(statistics.tenure)

    def _of_tenure(self, statistics: TenureStatistics) -> Iterator[Metric]:
        yield from self._of_engine(statistics.engine)
        yield from self._of_sessions(statistics.sessions)
        yield _gauge("kept_activation_bytes", "Activations that wait for Backward.", statistics.kept_activation_bytes)
        yield _counter(
            "kept_activation_hits", "Slices whose Backward used kept activations.", statistics.num_kept_activation_hits
        )
        adapters, room = statistics.adapters, statistics.room
        yield _gauge("adapters", "Adapters that clients have sent.", adapters.num_adapters)
        yield _gauge("adapters_in_use", "Those that sessions and batches use now.", adapters.num_used)
        yield _gauge("adapters_arriving", "Those on their way here.", adapters.num_arriving)
        yield _gauge("adapter_bytes", "What they take, and what has come of those on their way.", adapters.used_bytes)
        yield _gauge("message_bytes", "Room that steps and batches have, from before they are read.", room.used_bytes)
        yield _gauge("messages_waiting", "Steps and batches that wait for room.", room.num_waiting)
        yield _counter("messages_without_room", "Those that others have kept waiting for room.", room.num_waited)

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
        yield _times("queue_seconds", "From the arrival of work to its first pass.", statistics.queue_s)
        yield _times("pass_seconds", "Passes with decode steps alone, and with some prefill.", statistics.pass_s)
        yield _gauge(
            "oldest_wait_seconds", "For how long the oldest waiting step has waited.", statistics.oldest_wait_s
        )
        yield _counter("out_of_pages", "Steps that found the KV cache full.", counters.num_out_of_pages)
        yield _counter("out_of_pages_for_long", "Those that found no pages in time.", counters.num_given_up)
        yield _counter("sent_away_sessions", "Sessions that left pages to older ones.", counters.num_sent_away)
        yield _gauge("queue_length", "Steps and batches that wait.", statistics.queue_length)
        yield _batch_sizes(statistics.batch_sizes)

    def _of_sessions(self, statistics: SessionTableStatistics) -> Iterator[Metric]:
        yield _gauge("sessions", "Open sessions.", statistics.num_sessions)
        yield _gauge("waiting_sessions", "Sessions that wait for room in the KV cache.", statistics.num_waiting)
        yield _counter("waited_sessions", "Sessions that had to wait for room.", statistics.num_waited)
        yield _counter("refused_sessions", "Sessions for which there was no room in time.", statistics.num_refused)
        yield _counter("reclaimed_sessions", "Sessions ended so that others get cache.", statistics.num_reclaimed)
        yield _gauge("kept_sessions", "Caches kept for clients whose connection broke.", statistics.num_kept)
        yield _gauge("oldest_session_seconds", "Age of the oldest open session.", statistics.oldest_session_s)
        yield _gauge("median_session_seconds", "Median age of the open sessions.", statistics.median_session_s)
        pages = GaugeMetricFamily("swarm_cache_pages", "Pages of the KV cache; shared ones are used.", labels=["state"])
        pages.add_metric(["used"], statistics.num_used_pages)
        pages.add_metric(["free"], statistics.num_free_pages)
        pages.add_metric(["shared"], statistics.num_shared_pages)
        yield pages
        cache = GaugeMetricFamily("swarm_cache_bytes", "The KV cache.", labels=["state"])
        cache.add_metric(["used"], statistics.cache_used_bytes)
        cache.add_metric(["shared"], statistics.cache_shared_bytes)
        cache.add_metric(["total"], statistics.cache_total_bytes)
        yield cache


def _counter(name: str, what: str, value: float) -> Metric:
    return CounterMetricFamily(f"swarm_{name}", what, value=value)


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(f"swarm_{name}", what, value=value)


def _times(name: str, what: str, times_s: Mapping[Kind, Histogram]) -> Metric:
    metric = HistogramMetricFamily(f"swarm_{name}", what, labels=["kind"])
    for kind, histogram in times_s.items():
        bounds = [*map(str, histogram.bounds), "+Inf"]
        buckets = list(zip(bounds, map(float, itertools.accumulate(histogram.counts)), strict=True))
        metric.add_metric([kind.name.lower()], buckets, histogram.total)
    return metric


def _batch_sizes(counts: Mapping[int, int]) -> Metric:
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
