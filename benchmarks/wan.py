"""How close does a swarm over slow links come to what the links allow? Real servers; their links are shaped.

For each kind of link: the time of one token, and the time to the first token of a long prompt. The floors are
computed from the link and from what the same swarm takes without delay and limit, in the same run:

    a token         compute and overhead at no delay + half a round trip to each server and back from the last one
    a first token   the same at no delay + the same way + the time that the line takes for the prompt's hidden states

python benchmarks/wan.py --shape 124M
"""

from __future__ import annotations

import itertools
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from common import SHAPES, VOCAB_SIZE, Setting, make_model, new_parser, print_result, rounded, say, setting_of
from shaper import Link, Quality, Shaper
from tasks import TokenTimes

from swarm import AutoDistributedModelForCausalLM
from swarm.server import LocalSwarm

OUTSIDE = "127.0.0.2"
"""Under this address servers are found; what comes there is passed on to where they listen."""


@dataclass(frozen=True, slots=True)
class Line:
    """A kind of link."""

    mbit_per_s: float
    rtt_ms: float

    @property
    def quality(self) -> Quality:
        return Quality(delay_s=self.rtt_ms / 2e3, bytes_per_s=self.mbit_per_s * 1e6 / 8)

    def __str__(self) -> str:
        return f"{self.mbit_per_s:.0f} Mbit/s, {self.rtt_ms:.0f} ms"


LINES = (Line(1000, 5), Line(100, 20), Line(100, 100), Line(20, 100))


def free_ports(number: int) -> list[int]:
    """Ports that are free on both addresses now."""
    sockets = [socket.create_server(("0.0.0.0", 0)) for _ in range(number)]
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def shaped_swarm(
    model: str, ranges: Sequence[tuple[int, int]], dtype: str, flags: Sequence[str] = ()
) -> Iterator[tuple[LocalSwarm, Shaper]]:
    """Servers whose data links are shaped; link i is that of server i. Their directory is not."""
    ports = free_ports(2 * len(ranges))
    data, directory = ports[::2], ports[1::2]
    links = [Link(OUTSIDE, port, "127.0.0.1", port) for port in [*data, *directory]]
    with Shaper(links) as shaper:
        swarm = LocalSwarm(model, ranges[:1], dtype=dtype, arguments=flags)
        try:
            for blocks, port, dht_port in zip(ranges, data, directory, strict=True):
                swarm.add(
                    blocks, arguments=("--port", str(port), "--dht-port", str(dht_port), "--announce-host", OUTSIDE)
                )
            yield swarm, shaper
        finally:
            swarm.close()


def measure(remote: Any, ids: torch.Tensor, num_tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and of each further one."""
    times = TokenTimes()
    started_s = time.monotonic()
    remote.generate(
        ids, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, pad_token_id=0, streamer=times
    )
    gaps_s = [later - before for before, later in itertools.pairwise(times.times_s)]
    return times.times_s[0] - started_s, statistics.median(gaps_s)


def medians(remote: Any, ids: torch.Tensor, num_tokens: int, num_samples: int) -> tuple[float, float]:
    measure(remote, ids, 2)  # connections, buffers
    samples = [measure(remote, ids, num_tokens) for _ in range(num_samples)]
    first_s, each_s = zip(*samples, strict=True)
    return statistics.median(first_s), statistics.median(each_s)


def run(setting: Setting, lines: Sequence[Line], prompt_tokens: int, num_tokens: int) -> list[dict[str, Any]]:
    shape = SHAPES[setting.shape]
    num_blocks, hidden_size = shape["num_hidden_layers"], shape["hidden_size"]
    cuts = [round(index * num_blocks / setting.num_servers) for index in range(setting.num_servers + 1)]
    prompt_bytes = prompt_tokens * hidden_size * (2 if setting.dtype == "bfloat16" else 4)
    short, long = torch.randint(0, VOCAB_SIZE, (1, 16)), torch.randint(0, VOCAB_SIZE, (1, prompt_tokens))
    rows = []
    with ExitStack() as owned:
        directory = owned.enter_context(tempfile.TemporaryDirectory())
        make_model(setting.shape, setting.dtype, directory)
        pairs = list(itertools.pairwise(cuts))
        swarm, shaper = owned.enter_context(shaped_swarm(directory, pairs, setting.dtype, setting.serve_flags))
        remote = AutoDistributedModelForCausalLM.from_pretrained(directory, join=swarm.link)
        owned.callback(remote.close)
        servers = range(setting.num_servers)
        for line in lines:
            # The reference beside each measurement: this machine's speed changes in the course of minutes.
            shaper.set(Quality(), servers)
            _, token_s = medians(remote, short, num_tokens, setting.num_samples)
            first_s, _ = medians(remote, long, 2, setting.num_samples)
            shaper.set(line.quality, servers)
            way_s = (setting.num_servers + 1) * line.rtt_ms / 2e3
            floor_s, first_floor_s = token_s + way_s, first_s + way_s + prompt_bytes / line.quality.bytes_per_s
            _, shaped_token_s = medians(remote, short, num_tokens, setting.num_samples)
            shaped_first_s, _ = medians(remote, long, 2, setting.num_samples)
            rows.append(
                {
                    "mbit_per_s": line.mbit_per_s,
                    "rtt_ms": line.rtt_ms,
                    "token_s": rounded(shaped_token_s),
                    "token_floor_s": rounded(floor_s),
                    "token_ratio": rounded(shaped_token_s / floor_s),
                    "first_token_s": rounded(shaped_first_s),
                    "first_token_floor_s": rounded(first_floor_s),
                    "first_token_ratio": rounded(shaped_first_s / first_floor_s),
                    "no_delay": {"token_s": rounded(token_s), "first_token_s": rounded(first_s)},
                }
            )
            say(
                f"{line}: a token {rows[-1]['token_ratio']}, a first token {rows[-1]['first_token_ratio']} of the floor"
            )
    return rows


def main() -> None:
    parser = new_parser(__doc__ or "", num_servers=3, num_samples=3)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--length", type=int, default=16, help="tokens of each sample")
    parser.add_argument("--lines", default="0,1,2,3", help="which of " + "; ".join(map(str, LINES)))
    arguments = parser.parse_args()
    setting = setting_of(arguments)
    lines = [LINES[int(number)] for number in arguments.lines.split(",")]
    rows = run(setting, lines, arguments.prompt_tokens, arguments.length)
    print_result("wan", setting, prompt_tokens=arguments.prompt_tokens, rows=rows)


if __name__ == "__main__":
    main()
