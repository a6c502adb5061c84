"""What the servers of a benchmark use: memory and processor time from outside, sessions and cache as they report it."""

from __future__ import annotations

import asyncio
import time
import urllib.request
from dataclasses import dataclass
from typing import Any

import psutil
from clients import tree_cpu_s
from prometheus_client.parser import text_string_to_metric_families

from swarm import PROTOCOL_VERSION
from swarm.announcement import Announcement
from swarm.client.config import ClientConfig
from swarm.client.connection import Connection
from swarm.client.network import Network
from swarm.client.routing import Hop
from swarm.link import JoinLink
from swarm.model.checkpoint import Checkpoint, CheckpointSource
from swarm.server import LocalSwarm
from swarm.v1 import blocks_pb2 as pb
from swarm.v1 import blocks_pb2_grpc as pb_grpc

ANSWER_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Load:
    """What one server says about itself."""

    blocks: str
    num_sessions: int
    cache_used_bytes: int
    cache_total_bytes: int


class Watch:
    """Looks at all servers of a local swarm. Use as a context manager."""

    def __init__(self, directory: str, servers: LocalSwarm) -> None:
        self._servers = servers
        self._fingerprint = Checkpoint.open(CheckpointSource(directory)).fingerprint
        self._connection = Connection(ClientConfig(initial_peers=JoinLink.parse(servers.link).initial_peers))

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._connection.close()

    @property
    def _processes(self) -> list[psutil.Process]:
        return [psutil.Process(server.process.pid) for server in self._servers.servers]  # type: ignore[union-attr]

    def rss_bytes(self) -> list[int]:
        """Resident memory of each server, its libp2p daemon included."""
        trees = [[process, *process.children(recursive=True)] for process in self._processes]
        return [sum(each.memory_info().rss for each in tree) for tree in trees]

    def cpu_s(self) -> float:
        """Processor time of all servers so far."""
        return sum(tree_cpu_s(process.pid) for process in self._processes)

    def decodes(self) -> list[tuple[float, float]]:
        """Of each server: the decode steps it has run so far, and the passes that carried them."""
        return [_decodes(server.metrics_port) for server in self._servers.servers]  # type: ignore[union-attr]

    def servers(self) -> list[Announcement]:
        """What they announce, in the order of their blocks."""
        return self._connection.loop.run(_servers(self._connection.network, self._fingerprint))

    def loads(self) -> list[Load]:
        """What the servers say, in the order of their blocks."""
        return self._connection.loop.run(_loads(self._connection.network, self._fingerprint))

    def wait_empty(self, timeout_s: float) -> list[Load]:
        """Wait until no server has a session or cache, or for a while; returns what they said last."""
        deadline_s = time.monotonic() + timeout_s
        loads = self.loads()
        while any(load.num_sessions or load.cache_used_bytes for load in loads) and time.monotonic() < deadline_s:
            time.sleep(0.2)
            loads = self.loads()
        return loads


async def _servers(network: Network, fingerprint: str) -> list[Announcement]:
    return sorted(await network.servers(fingerprint), key=lambda each: each.start)


async def _loads(network: Network, fingerprint: str) -> list[Load]:
    servers = await _servers(network, fingerprint)
    return list(await asyncio.gather(*(_load(network, Hop(server, server.blocks)) for server in servers)))


async def _load(network: Network, hop: Hop) -> Load:
    async with network.connector.lease(hop.address) as channel:
        request = pb.DescribeRequest(protocol_version=PROTOCOL_VERSION)
        answer: Any = await pb_grpc.BlocksStub(channel).Describe(request, timeout=ANSWER_TIMEOUT_S)
    load = answer.load
    return Load(str(hop.blocks), load.num_sessions, load.cache_used_bytes, load.cache_total_bytes)


def _decodes(port: int) -> tuple[float, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=ANSWER_TIMEOUT_S) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    samples = {sample.name: sample.value for family in families for sample in family.samples}
    return samples["swarm_decode_batch_size_sum"], samples["swarm_decode_batch_size_count"]
