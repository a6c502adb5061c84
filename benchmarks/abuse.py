"""How much do honest clients keep while somebody takes all that a server gives?

    python benchmarks/abuse.py
    python benchmarks/abuse.py --kinds "sessions,connections" --clients 4 --seconds 20

Some clients generate text, all at the same time; while they do, abusers at other addresses open 10,000 sessions, send
at full rate, read nothing, send a byte a second, and keep 1,000 connections open: one kind at a time, then all at once.
Before and after each, the same clients are measured undisturbed. The servers run with --limit-loopback, which makes
127.0.0.1 a caller like 127.0.0.2, where the abusers begin.
"""

from __future__ import annotations

import statistics
import threading
import time
from typing import Any

from abusers import KINDS, abusing
from clients import Clients
from common import Setting, model_and_servers, new_parser, print_result, rounded, say, setting_of
from tasks import Generate, Request
from watch import Watch

ALL = "all together"
WARM_UP_TOKENS = 8
MIB = 1 << 20


def main() -> None:
    parser = new_parser(__doc__ or "", num_servers=1, num_samples=1)
    parser.add_argument("--clients", type=int, default=2, help="honest ones")
    parser.add_argument("--kinds", default=",".join([*KINDS, ALL]), help=f"of abuse: {', '.join([*KINDS, ALL])}")
    parser.add_argument("--seconds", type=float, default=30.0, help="about how long each measurement takes")
    parser.add_argument("--ahead-s", type=float, default=10.0, help="how long the abuse goes on before it is measured")
    arguments = parser.parse_args()
    plain = setting_of(arguments)
    setting = Setting(
        shape=plain.shape,
        num_servers=plain.num_servers,
        num_samples=plain.num_samples,
        dtype=plain.dtype,
        label=plain.label,
        serve_flags=("--limit-loopback", *plain.serve_flags),
    )
    with model_and_servers(setting) as (local, directory, servers), Watch(directory, servers) as watch:
        del local
        with Clients(directory, servers.link, arguments.clients) as clients:
            bench = Bench(clients, watch, arguments.seconds)
            rows = [
                bench.row(kind, sample, arguments.ahead_s)
                for kind in arguments.kinds.split(",")
                for sample in range(setting.num_samples)
            ]
    print_result("abuse", setting, clients=arguments.clients, ahead_s=arguments.ahead_s, rows=rows)


class Bench:
    """Honest clients, and what is measured of them."""

    def __init__(self, clients: Clients, watch: Watch, seconds: float) -> None:
        self._clients = clients
        self._watch = watch
        self._server = watch.servers()[0]
        rate = self._rate(self._generate(WARM_UP_TOKENS))
        self._num_tokens = max(WARM_UP_TOKENS, int(seconds * rate / clients.num_clients))
        self._quiet = self._measure()

    def row(self, kind: str, sample: int, ahead_s: float) -> dict[str, Any]:
        """The same generations before, during and after one kind of abuse."""
        before = self._quiet
        rss_before = max(self._watch.rss_bytes())
        memory = Memory(self._watch)
        with abusing([*KINDS] if kind == ALL else [kind], self._server) as stop, memory:
            time.sleep(ahead_s)
            during = self._measure()
            counts = stop()
        after = self._quiet = self._measure()
        quiet = statistics.mean([self._rate(before), self._rate(after)])
        say(f"{kind}, sample {sample + 1}: {self._rate(during):.1f} tokens/s, undisturbed {quiet:.1f}; {counts}")
        return {
            "abuse": kind,
            "undisturbed_tokens_per_s": [rounded(self._rate(before)), rounded(self._rate(after))],
            "tokens_per_s": rounded(self._rate(during)),
            "ratio": rounded(self._rate(during) / quiet),
            "errors": sorted({request.error for request in during if request.error}),
            "server_rss_mib": [rss_before // MIB, memory.most_bytes // MIB],
            "abusers": counts,
        }

    def _measure(self) -> list[Request]:
        return self._generate(self._num_tokens)

    def _generate(self, num_tokens: int) -> list[Request]:
        tasks = [
            Generate(prompt_tokens=16, new_tokens=num_tokens, seed=seed) for seed in range(self._clients.num_clients)
        ]
        return [request for requests in self._clients.run(tasks) for request in requests]

    @staticmethod
    def _rate(requests: list[Request]) -> float:
        seconds = max(each.ended_s for each in requests) - min(each.arrived_s for each in requests)
        return sum(each.num_tokens for each in requests) / seconds


class Memory:
    """The most that the servers take while the body runs."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.most_bytes = 0

    def _look(self) -> None:
        while not self._ended.wait(0.5):
            self.most_bytes = max(self.most_bytes, *self._watch.rss_bytes())

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        self._thread.join()


if __name__ == "__main__":
    main()
