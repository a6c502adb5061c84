"""How long does it take to find a route through a large swarm? No servers run: they are made up.

The reference is a plain shortest-path search over the same graph: every (block, server) a node, Dijkstra's algorithm.

python benchmarks/routing.py
"""

from __future__ import annotations

import argparse
import heapq
import random
import statistics
import time
from typing import Any

import numpy as np
from common import print_plain, rounded

from swarm import PROTOCOL_VERSION
from swarm.announcement import Announcement
from swarm.buckets import CAPACITY
from swarm.client.routing import Graph, Needs, Roster, View, plan_route, route_costs
from swarm.coordinates import Coordinates
from swarm.ranges import BlockRange

FINGERPRINT = "f" * 32
LETTERS = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
LENGTHS = (2, 4, 8, 16, 40)


def make_servers(rng: random.Random, number: int, num_blocks: int) -> list[Announcement]:
    """Servers of ranges and speeds that differ tenfold and more, spread over a few hundred milliseconds."""
    servers = []
    for _ in range(number):
        length = min(num_blocks, rng.choice(LENGTHS))
        start = rng.randint(0, num_blocks - length)
        rate = rng.lognormvariate(3.0, 1.0)
        servers.append(
            Announcement(
                protocol_version=PROTOCOL_VERSION,
                software_version="0.1.0",
                peer_id="".join(rng.choices(LETTERS, k=46)),
                server_name="made up",
                model_name="model",
                model_fingerprint=FINGERPRINT,
                num_model_blocks=num_blocks,
                hidden_size=8192,
                start=start,
                end=start + length,
                dtype="bfloat16",
                state="online",
                direct=["192.0.2.1:31337"],
                tls_certificate=b"certificate",
                decode_tokens_per_s=rate * 8 / length,
                forward_tokens_per_s=100 * rate * 8 / length,
                max_session_tokens=8192,
                max_step_tokens=512,
                max_batch_tokens=4096,
                max_batch_size=16,
                cache_free_tokens=8192,
                coordinates=Coordinates(rng.gauss(0, 0.05), rng.gauss(0, 0.05), rng.uniform(0.001, 0.02), 0.2),
                expires_at_s=time.time() + 3600,
            )
        )
    return servers


def dijkstra_s(roster: Roster, needs: Needs, view: View) -> float:
    """The cost of the shortest path, found node by node."""
    graph = Graph(roster, roster.reach(needs), needs, view)
    everyone = np.arange(len(roster.servers))
    queue = [
        (float(graph.upload_s[index] + graph.enter_s[index] + graph.block_s[index]), 1, index)
        for index, server in enumerate(roster.servers)
        if server.start == 0
    ]
    heapq.heapify(queue)
    done: set[tuple[int, int]] = set()
    best_s = float("inf")
    while queue and queue[0][0] < best_s:
        cost_s, block, index = heapq.heappop(queue)
        if (block, index) in done:
            continue
        done.add((block, index))
        if block == needs.blocks.end:
            best_s = min(best_s, cost_s + float(graph.client_s[index]))
            continue
        if block < roster.servers[index].end:
            heapq.heappush(queue, (cost_s + float(graph.block_s[index]), block + 1, index))
        ways_s = (
            cost_s
            + graph.leave_s[index]
            + graph.between_s(np.array([index]), everyone)[0]
            + graph.enter_s
            + graph.block_s
        )
        for other in np.flatnonzero((roster.start_S <= block) & (block < roster.end_S) & (everyone != index)):
            if (block + 1, int(other)) not in done:
                heapq.heappush(queue, (float(ways_s[other]), block + 1, int(other)))
    return best_s


def measure(number: int, num_blocks: int, num_samples: int, *, with_reference: bool) -> dict[str, Any]:
    rng = random.Random(number)
    servers = make_servers(rng, number, num_blocks)
    needs = Needs(BlockRange(0, num_blocks), FINGERPRINT, session_tokens=2048)
    started = time.perf_counter()
    roster = Roster(servers)
    roster_s = time.perf_counter() - started
    times_s, refreshes_s, row = [], [], {}
    for sample in range(num_samples + 1):
        # A refresh brings a bucket: up to 64 servers have announced themselves anew.
        for index in rng.sample(range(number), min(number, CAPACITY)):
            servers[index] = servers[index].model_copy()
        started = time.perf_counter()
        roster = Roster(servers, before=roster)
        refreshed_s = time.perf_counter() - started
        view = View(here=Coordinates(rng.gauss(0, 0.05), rng.gauss(0, 0.05), 0.01, 0.2))
        started = time.perf_counter()
        hops = plan_route(roster, needs, view)
        if sample:  # the first one looks at all fingerprints
            times_s.append(time.perf_counter() - started)
            refreshes_s.append(refreshed_s + times_s[-1])
    if with_reference:
        started = time.perf_counter()
        reference_s = dijkstra_s(roster, needs, view)
        row = {
            "reference_ms": rounded(1e3 * (time.perf_counter() - started)),
            "cost_ratio": rounded(sum(cost.total_s for cost in route_costs(hops, needs, view)) / reference_s),
        }
    return {
        "servers": number,
        "blocks": num_blocks,
        "median_ms": rounded(1e3 * statistics.median(times_s)),
        "first_roster_ms": rounded(1e3 * roster_s),
        "refresh_and_route_ms": rounded(1e3 * statistics.median(refreshes_s)),
        **row,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", default="100,1000,5000", help="numbers of servers")
    parser.add_argument("--blocks", type=int, default=80)
    parser.add_argument("--samples", type=int, default=21)
    parser.add_argument("--reference-up-to", type=int, default=1000, help="servers; beyond, it takes minutes")
    arguments = parser.parse_args()
    numbers = [int(each) for each in arguments.servers.split(",")]
    rows = [
        measure(number, arguments.blocks, arguments.samples, with_reference=number <= arguments.reference_up_to)
        for number in numbers
    ]
    print_plain("routing", rows=rows)


if __name__ == "__main__":
    main()
