"""How much does a client of a large swarm read to know its servers? And what does one announcement cost?

Two measurements, each of a client that refreshes its view of the directory every 15 s as `swarm.client` does:

simulated   as many DHT nodes as servers, hivemind's own code in this process, messages handed over as objects. Counted
            are the bytes of all messages that the client's node sends and receives, serialized. Time is simulated.
real        a few DHT nodes in another process, each with its own p2pd, on loopback, and the client with a p2pd of its
            own. Counted are the same messages, and all bytes that the client's p2pd reads: from the network, encrypted,
            and the client's requests (`rchar` of Linux, which counts both).

The announcements are put into the storages of the nodes that would be asked to keep them, and renewed there.

python benchmarks/directory.py
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from common import print_plain, rounded, say

from swarm import PROTOCOL_VERSION
from swarm.announcement import Announcement
from swarm.buckets import MAX_DEPTH, Bucket, path_of_server, servers_root
from swarm.client.known_servers import KnownServers
from swarm.coordinates import Coordinates
from swarm.dht import DhtConfig, _import_hivemind, open_dht
from swarm.dht_contacts import KnownPeers
from swarm.directory import BucketDirectory, SwarmClock
from swarm.identity import Identity

FINGERPRINT = "f" * 64
PERIOD_S = 15.0
LIFETIME_S = 4 * PERIOD_S
LENGTHS = (2, 4, 8, 16, 40)


@dataclass
class Server:
    """One made-up server: who it is, what it announces, and in which bucket there was room for it."""

    identity: Identity
    data: bytes
    path: tuple[int, ...]
    depth: int = 0


def make_servers(number: int, num_blocks: int, directory: Path) -> list[Server]:
    rng = random.Random(number)
    certificate = Identity.load_or_create(directory / "certificate.key").tls_certificate().certificate_der
    servers = []
    for index in range(number):
        path = directory / "server.key"
        identity = Identity.load_or_create(path)
        path.unlink()
        length = min(num_blocks, rng.choice(LENGTHS))
        start = rng.randint(0, num_blocks - length)
        host = f"203.0.{index // 250}.{index % 250 + 1}"
        announcement = Announcement(
            protocol_version=PROTOCOL_VERSION, software_version="0.1.0", peer_id=identity.peer_id,
            server_name=f"server-{index}", model_name="some-organization/Some-Model-70B", model_fingerprint=FINGERPRINT,
            model_commit="a" * 40, num_model_blocks=num_blocks, hidden_size=8192, start=start, end=start + length,
            dtype="bfloat16", quantization="nf4", state="online", direct=[f"{host}:31330"],
            tls_certificate=certificate, multiaddrs=[f"/ip4/{host}/tcp/31331/p2p/{identity.peer_id}"],
            decode_tokens_per_s=rng.uniform(1, 100), forward_tokens_per_s=rng.uniform(100, 9999),
            max_session_tokens=8192, max_step_tokens=1024, max_batch_tokens=16384, max_batch_size=128,
            cache_free_tokens=rng.randrange(10**6), expires_at_s=time.time() + LIFETIME_S,
            coordinates=Coordinates(rng.gauss(0, 0.05), rng.gauss(0, 0.05), 0.01, 0.2),
        )  # fmt: skip
        servers.append(Server(identity, announcement.to_bytes(), path_of_server(identity.peer_id, start, num_blocks)))
    return servers


class Shelf:
    """Puts announcements where they would be after everybody has announced."""

    def __init__(self, holders_of: Callable[[Any], Sequence[Any]]) -> None:
        self._holders_of = holders_of
        self._holders: dict[Bucket, tuple[Any, Sequence[Any]]] = {}

    def put(self, servers: Iterable[Server], now_s: float) -> None:
        for server in servers:
            while not self._put(server, now_s) and server.depth < MAX_DEPTH:
                server.depth += 1

    def _put(self, server: Server, now_s: float) -> bool:
        from hivemind.dht.routing import DHTID

        from swarm.dht_records import RECORD_LIFETIME_S, sign_record

        bucket = Bucket(servers_root(FINGERPRINT).tree, server.path[: server.depth])
        if bucket not in self._holders:
            key = DHTID.generate(bucket.key)
            self._holders[bucket] = key, self._holders_of(key)
        key, storages = self._holders[bucket]
        value = sign_record(server.identity, key.to_bytes(), server.data, written_at_s=now_s, lifetime_s=LIFETIME_S)
        owner = server.identity.public_key
        return all([each.store_subkey(key, owner, value, now_s + RECORD_LIFETIME_S) for each in storages])


@dataclass
class Traffic:
    """Serialized messages of one node."""

    received_bytes: int = 0
    sent_bytes: int = 0
    calls: Counter[str] = field(default_factory=Counter)

    def watch(self, p2p: Any) -> None:
        """Count what is called through hivemind's P2P object from now on."""
        call = p2p.call_protobuf_handler

        async def counted(peer: Any, name: str, message: Any, response_type: Any) -> Any:
            self.sent_bytes += message.ByteSize()
            response = await call(peer, name, message, response_type)
            self.received_bytes += response.ByteSize()
            self.calls[name.rpartition(".")[2]] += 1
            return response

        p2p.call_protobuf_handler = counted

    @property
    def num_bytes(self) -> int:
        return self.received_bytes + self.sent_bytes


@dataclass
class View:
    """What a client knew and had read after each refresh."""

    known: list[int] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    """Since the start."""
    cpu_s: list[float] = field(default_factory=list)

    def result(self, num_servers: int, num_blocks: int) -> dict[str, Any]:
        per_min = round(60 / PERIOD_S)
        minutes = [
            after - before for before, after in zip([0, *self.num_bytes], self.num_bytes[per_min - 1 :], strict=False)
        ]
        return {
            "servers": num_servers,
            "blocks": num_blocks,
            "refreshes": len(self.known),
            "max_bytes_in_a_minute": max(minutes),
            "median_bytes_in_a_minute": rounded(statistics.median(minutes)),
            "cpu_ms_per_refresh": rounded(1e3 * statistics.median(self.cpu_s)),
            "known_after_1_min": self.known[per_min - 1],
            "known_at_the_end": self.known[-1],
        }


async def refresh(known: KnownServers, view: View, count: Callable[[], int]) -> None:
    cpu_s = time.process_time()
    await known.read(FINGERPRINT, max_age_s=0.0)
    view.cpu_s.append(time.process_time() - cpu_s)
    view.known.append(len(known.servers))
    view.num_bytes.append(count())


class NoContacts:
    """A simulated node needs no help to stay in touch."""

    lost = False
    known = KnownPeers({}, "")

    async def ensure(self) -> None:
        """It is."""

    async def get_to_know(self, peers: Iterable[Any]) -> None:
        """It knows enough."""


class Wire:
    """Hands messages of simulated nodes over; stands in for hivemind's P2P."""

    def __init__(self, peers: dict[Any, Wire], peer_id: Any) -> None:
        self.peer_id = peer_id
        self._peers = peers
        self._handlers: dict[str, Callable[..., Any]] = {}
        peers[peer_id] = self

    async def add_protobuf_handler(self, name: str, handler: Callable[..., Any], *_: Any, **__: Any) -> None:
        self._handlers[name] = handler

    async def call_protobuf_handler(self, peer: Any, name: str, message: Any, response_type: Any) -> Any:
        return await self._peers[peer]._handlers[name](message, SimpleNamespace(remote_id=self.peer_id))


async def simulate(number: int, num_blocks: int, minutes: int, directory: Path) -> dict[str, Any]:
    from hivemind.dht import DHTNode
    from hivemind.dht.routing import DHTID
    from hivemind.p2p import PeerID

    from swarm.dht_records import BucketStorage, RecordValidator
    from swarm.dht_shelves import REPLICAS, DhtShelves

    ahead_s = [0.0]
    clock = SwarmClock(lambda: time.time() + ahead_s[0], lambda: ahead_s[0])
    servers = make_servers(number, num_blocks, directory)
    peers: dict[Any, Wire] = {}
    nodes: list[Any] = []

    async def join(peer_id: str, **options: Any) -> Any:
        wire = Wire(peers, PeerID.from_base58(peer_id))
        settings = {"cache_locally": False, "cache_nearest": 0, "cache_on_store": False, "reuse_get_requests": False}
        node = await DHTNode.create(
            p2p=wire, node_id=DHTID.generate(source=peer_id), record_validator=RecordValidator(), **settings, **options
        )
        node.protocol.storage = node.protocol.cache = BucketStorage(clock.now_s)
        for other in random.Random(len(nodes)).sample(nodes, min(3, len(nodes))):
            await node.protocol.call_ping(other.p2p.peer_id)
        await node.find_nearest_nodes([node.node_id])
        return node

    for server in servers:
        nodes.append(await join(server.identity.peer_id))
    say(f"{number} nodes have joined")
    ids = {int(node.node_id): node for node in nodes}

    def holders_of(key: Any) -> list[Any]:
        return [ids[each].protocol.storage for each in sorted(ids, key=lambda each: each ^ int(key))[:REPLICAS]]

    shelf = Shelf(holders_of)
    shelf.put(servers, clock.now_s())
    reader = Identity.load_or_create(directory / f"reader-{number}.key")

    async def nothing() -> None:
        pass

    client = await join(reader.peer_id, client_mode=True)
    traffic, view = Traffic(), View()
    traffic.watch(client.p2p)
    shelves = DhtShelves(client, reader, clock, NoContacts(), nothing)  # type: ignore[arg-type]
    known = KnownServers(
        BucketDirectory(shelves, reader.peer_id, clock), bytes_per_min=200_000, use_direct=True, clock=clock.steady_s
    )
    for _ in range(round(60 * minutes / PERIOD_S)):
        await refresh(known, view, lambda: traffic.num_bytes)
        ahead_s[0] += PERIOD_S
        shelf.put(servers, clock.now_s())
    writer = await announcing(nodes[0], servers[0], clock, nothing)
    depths = Counter(server.depth for server in servers)
    return view.result(number, num_blocks) | {"depths": dict(sorted(depths.items())), "announcing": writer}


async def announcing(node: Any, server: Server, clock: SwarmClock, keep_time: Any) -> dict[str, Any]:
    """What a server's first announcement and each later one costs it."""
    from swarm.dht_shelves import DhtShelves

    traffic = Traffic()
    traffic.watch(node.p2p)
    shelves = DhtShelves(node, server.identity, clock, NoContacts(), keep_time)  # type: ignore[arg-type]
    bucket = Bucket(servers_root(FINGERPRINT).tree, server.path[: server.depth])
    costs = []
    for _ in range(2):
        before = traffic.num_bytes
        await shelves.write(bucket, server.data, LIFETIME_S)
        costs.append(traffic.num_bytes - before)
    return {"first_bytes": costs[0], "later_bytes": costs[1]}


async def hold(number: int, num_blocks: int, num_nodes: int) -> None:
    """Run real nodes that hold everything, until standard input closes."""
    with tempfile.TemporaryDirectory() as directory:
        servers = make_servers(number, num_blocks, Path(directory))
        nodes: list[Any] = []
        async with AsyncExitStack() as owned, asyncio.TaskGroup() as group:
            for _ in range(num_nodes):
                peers = tuple(await nodes[0].multiaddrs()) if nodes else ()
                nodes.append(await owned.enter_async_context(open_dht(DhtConfig(initial_peers=peers))))
            shelf = Shelf(lambda key: [node._node.protocol.storage for node in nodes])

            async def renew() -> None:
                while True:
                    shelf.put(servers, time.time())
                    await asyncio.sleep(PERIOD_S)

            renewing = group.create_task(renew())
            await asyncio.sleep(0)
            print(json.dumps(await nodes[0].multiaddrs()), flush=True)
            await asyncio.to_thread(sys.stdin.read)
            renewing.cancel()


def measure_real(number: int, num_blocks: int, num_nodes: int, minutes: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--hold", str(number), "--blocks", str(num_blocks), "--nodes", str(num_nodes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        peers = tuple(json.loads(holder.stdout.readline()))
        say(f"{num_nodes} nodes hold {number} announcements")
        return asyncio.run(read_for_real(peers, number, num_blocks, minutes)) | {"nodes": num_nodes}


async def read_for_real(peers: tuple[str, ...], number: int, num_blocks: int, minutes: int) -> dict[str, Any]:
    traffic, messages, p2pd = Traffic(), View(), View()
    async with open_dht(DhtConfig(initial_peers=peers, client_mode=True)) as dht:
        traffic.watch(dht.p2p)
        io = Path(f"/proc/{dht._daemon.pid}/io")

        def read_by_p2pd() -> int:
            return int(io.read_text().split()[1])

        begun = read_by_p2pd()
        known = KnownServers(dht.directory, bytes_per_min=200_000, use_direct=True)
        for _ in range(round(60 * minutes / PERIOD_S)):
            await refresh(known, messages, lambda: traffic.num_bytes)
            p2pd.num_bytes.append(read_by_p2pd() - begun)
            await asyncio.sleep(PERIOD_S)
    p2pd.known, p2pd.cpu_s = messages.known, messages.cpu_s
    whole = p2pd.result(number, num_blocks)["max_bytes_in_a_minute"]
    return messages.result(number, num_blocks) | {"max_bytes_in_a_minute_read_by_p2pd": whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", default="100,1000", help="numbers of servers to simulate")
    parser.add_argument("--real", default="1000", help="numbers of servers with real nodes; empty: none")
    parser.add_argument("--blocks", type=int, default=200)
    parser.add_argument("--nodes", type=int, default=5, help="real nodes")
    parser.add_argument("--minutes", type=int, default=10, help="simulated")
    parser.add_argument("--real-minutes", type=int, default=2)
    parser.add_argument("--hold", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    _import_hivemind()
    if arguments.hold:
        asyncio.run(hold(arguments.hold, arguments.blocks, arguments.nodes))
        return
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        entry = make_servers(1, arguments.blocks, directory)[0].data
        simulated = [
            asyncio.run(simulate(int(number), arguments.blocks, arguments.minutes, directory))
            for number in arguments.servers.split(",")
            if number
        ]
        real = [
            measure_real(int(number), arguments.blocks, arguments.nodes, arguments.real_minutes)
            for number in arguments.real.split(",")
            if number
        ]
    print_plain("directory", entry_bytes=len(entry), simulated=simulated, real=real)


if __name__ == "__main__":
    main()
