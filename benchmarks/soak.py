"""Does a server stay as it is under load? Many clients for a long time: errors, memory that grows, sessions left over.

    python benchmarks/soak.py --clients 32 --minutes 10

Clients generate texts of random lengths one after another and abandon one in ten half-way. The reference for the
memory of each server is its own, in the first minute after the warm-up, which is over when every page of the cache has
been used once: on a CPU it takes memory only then.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from typing import Any

from clients import Clients
from common import model_and_servers, new_parser, p50_p95, print_result, rounded, say, setting_of
from tasks import Request, Wander
from watch import Watch

PERIOD_S = 2.0
"""Between two looks at the servers."""
CLOSING_TIMEOUT_S = 60.0
"""How long sessions may take to be gone after the last client has stopped; longer than the grace of lost ones."""
ABANDONED_SHARE = 0.1


def main() -> None:
    parser = new_parser(__doc__ or "", num_servers=1)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--clients-per-process", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=10.0, help="after the warm-up")
    parser.add_argument("--warm-up-minutes", type=float, default=3.0)
    parser.add_argument("--prompt-tokens", default="4:96", help="shortest:longest")
    parser.add_argument("--tokens", default="4:32", help="shortest:longest")
    arguments = parser.parse_args()
    setting = setting_of(arguments)
    warm_up_s, long_s = 60 * arguments.warm_up_minutes, 60 * arguments.minutes
    with model_and_servers(setting) as (local, directory, servers), Watch(directory, servers) as watch:
        del local
        with Clients(directory, servers.link, arguments.clients, per_process=arguments.clients_per_process) as clients:
            begun_s = time.monotonic()
            tasks = [
                Wander(
                    until_s=begun_s + warm_up_s + long_s,
                    prompt_tokens=_span(arguments.prompt_tokens),
                    new_tokens=_span(arguments.tokens),
                    abandoned_share=ABANDONED_SHARE,
                    seed=number,
                )
                for number in range(arguments.clients)
            ]
            clients.start(tasks)
            looks = _look_until(watch, begun_s, begun_s + warm_up_s + long_s)
            requests = [request for each in clients.results() for request in each]
            left = watch.wait_empty(CLOSING_TIMEOUT_S)
    print_result(
        "soak",
        setting,
        clients=arguments.clients,
        clients_per_process=arguments.clients_per_process,
        minutes=arguments.minutes,
        warm_up_minutes=arguments.warm_up_minutes,
        abandoned_share=ABANDONED_SHARE,
        **_counts(requests),
        leaked_sessions=sum(load.num_sessions for load in left),
        leaked_cache_bytes=sum(load.cache_used_bytes for load in left),
        rss=_growth(looks, warm_up_s, long_s),
        rss_mib_over_time=_thinned([(rounded(at_s), [rss >> 20 for rss in each]) for at_s, each in looks]),
    )


def _look_until(watch: Watch, begun_s: float, end_s: float) -> list[tuple[float, list[int]]]:
    """Note the memory of each server again and again: (seconds since the beginning, bytes)."""
    looks = []
    while time.monotonic() < end_s:
        looks.append((time.monotonic() - begun_s, watch.rss_bytes()))
        if len(looks) % 30 == 1:
            loads = ", ".join(f"{load.num_sessions} sessions" for load in watch.loads())
            say(f"{looks[-1][0]:.0f} s: {[rss >> 20 for rss in looks[-1][1]]} MiB, {loads}")
        time.sleep(PERIOD_S)
    return looks


def _growth(looks: list[tuple[float, list[int]]], warm_up_s: float, long_s: float) -> list[dict[str, Any]]:
    """How each server's memory at the end compares with that after the warm-up, medians of a minute."""
    window_s = min(60.0, long_s / 4)
    early = [rss for at_s, rss in looks if warm_up_s <= at_s < warm_up_s + window_s] or [looks[0][1]]
    late = [rss for at_s, rss in looks if at_s >= warm_up_s + long_s - window_s] or [looks[-1][1]]
    medians = [[statistics.median(values) for values in zip(*part, strict=True)] for part in (early, late)]
    return [
        {
            "after_warm_up_mib": rounded(before / 2**20),
            "at_the_end_mib": rounded(after / 2**20),
            "growth_percent": rounded(100 * (after / before - 1)),
        }
        for before, after in zip(*medians, strict=True)
    ]


def _counts(requests: list[Request]) -> dict[str, Any]:
    done = [request for request in requests if request.token_times_s]
    errors = Counter(request.error for request in requests if request.error)
    seconds = max(request.ended_s for request in requests) - min(request.arrived_s for request in requests)
    return {
        "num_requests": len(requests),
        "num_errors": sum(errors.values()),
        "errors": dict(errors.most_common(10)),
        "tokens_per_s": rounded(sum(request.num_tokens for request in requests) / seconds),
        "first_token_s": p50_p95([request.first_token_s for request in done]),
        "between_tokens_s": p50_p95([end - start for request in done for start, end in request.gaps]),
    }


def _span(text: str) -> tuple[int, int]:
    shortest, _, longest = text.partition(":")
    return int(shortest), int(longest or shortest)


def _thinned(values: list[Any], most: int = 60) -> list[Any]:
    return values[:: max(1, len(values) // most)]


if __name__ == "__main__":
    main()
