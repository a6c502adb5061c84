"""Does a flood of identities drown honest servers? How much does a client read and try meanwhile?

Some machines announce thousands of servers, each with all blocks and faster than anybody, and never serve. They fill
every bucket that they can, before and after honest servers announce themselves.

simulated   the storages of a few DHT nodes, and a client's Network with directory, routing and memory, in this
            process. Of every connection it is known from where it comes, as libp2p knows it. Time is simulated.
            Requests are made one after another; what a server of the flood is asked fails. One flood answers calls and
            does no work, one does not exist, one is another one each minute. For comparison, one meets nodes that count
            all peers as of one prefix, and a client that takes all servers at their word.
real        DHT nodes with p2pd on loopback, which are sent the records of the flood, and a client. As all of them have
            one address, the nodes are told the attacker's.

python benchmarks/sybil.py
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import print_plain, rounded, say
from directory import NoContacts

from swarm import PROTOCOL_VERSION
from swarm.announcement import Announcement
from swarm.buckets import MAX_DEPTH, MODELS, Bucket, path_of_model, path_of_server, servers_root
from swarm.client.config import ClientConfig
from swarm.client.known_servers import KnownServers
from swarm.client.network import Attempt, Network
from swarm.client.routing import Needs
from swarm.dht import DhtConfig, _import_hivemind, open_dht
from swarm.directory import BucketDirectory, SwarmClock
from swarm.errors import PeerBug, PeerUnavailable, SwarmError
from swarm.identity import Identity
from swarm.listing import Page
from swarm.origins import RequestLimiter, RequestRates, Source
from swarm.ranges import BlockRange
from swarm.survey import Survey

FINGERPRINT = "f" * 64
NUM_BLOCKS = 36
PERIOD_S = 15.0
LIFETIME_S = 60.0
NODES = 5
RANGES = ((0, 12), (12, 24), (24, 36))
MAX_REQUESTS_PER_PERIOD = 2


@dataclass
class Peer:
    """One made-up server."""

    identity: Identity
    announcement: Announcement
    prefix: str
    """Where it really is."""
    data: bytes = b""
    path: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.data = self.announcement.to_bytes()
        self.path = path_of_server(self.peer_id, self.announcement.start, NUM_BLOCKS)

    @property
    def peer_id(self) -> str:
        return self.identity.peer_id


class Makes:
    """Makes peers; a key takes a while, a certificate longer, so there is one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._certificate = Identity.load_or_create(folder / "certificate.key").tls_certificate().certificate_der

    def peer(self, host: str, blocks: tuple[int, int], tokens_per_s: float) -> Peer:
        path = self._folder / "peer.key"
        identity = Identity.load_or_create(path)
        path.unlink()
        announcement = Announcement(
            protocol_version=PROTOCOL_VERSION, software_version="0.1.0", peer_id=identity.peer_id, server_name="server",
            model_name="some/model", model_fingerprint=FINGERPRINT, num_model_blocks=NUM_BLOCKS, hidden_size=8,
            start=blocks[0], end=blocks[1], dtype="bfloat16", state="online", direct=[f"{host}:31330"],
            tls_certificate=self._certificate, decode_tokens_per_s=tokens_per_s,
            forward_tokens_per_s=100 * tokens_per_s, max_session_tokens=8192, max_step_tokens=1024,
            max_batch_tokens=16384, max_batch_size=128, cache_free_tokens=10**6, expires_at_s=time.time() + LIFETIME_S,
        )  # fmt: skip
        return Peer(identity, announcement, host.rpartition(".")[0])

    def honest(self, number: int) -> list[Peer]:
        return [self.peer(f"198.51.{index}.7", RANGES[index % len(RANGES)], 20.0) for index in range(number)]

    def flood(self, number: int, num_prefixes: int) -> list[Peer]:
        hosts = [f"203.0.{index % num_prefixes}.{index // num_prefixes % 250 + 1}" for index in range(number)]
        return [self.peer(host, (0, NUM_BLOCKS), 1e9) for host in hosts]


class Node:
    """What one DHT node keeps, and whom it answers."""

    def __init__(self, clock: SwarmClock) -> None:
        from swarm.dht_records import BucketStorage

        self.storage = BucketStorage(clock.now_s)
        self._limiter = RequestLimiter(RequestRates())
        self.num_refused = 0

    def store(self, peer: Peer, bucket: Bucket, data: bytes, clock: SwarmClock, prefix: str) -> bool:
        from hivemind.dht.routing import DHTID

        from swarm.dht_records import RECORD_LIFETIME_S, sign_record

        source = Source(peer.peer_id, prefix)
        if not self._limiter.take(source, 1, clock.steady_s()):
            self.num_refused += 1
            return False
        key, now_s = DHTID.generate(bucket.key), clock.now_s()
        value = sign_record(peer.identity, key.to_bytes(), data, written_at_s=now_s, lifetime_s=LIFETIME_S)
        with self.storage.storing_for(source):
            return self.storage.store_subkey(key, peer.identity.public_key, value, now_s + RECORD_LIFETIME_S)


class Nodes:
    """The shelves of a client: one of the nodes is read, another one each time."""

    def __init__(self, clock: SwarmClock, *, defended: bool) -> None:
        self.clock = clock
        self.nodes = [Node(clock) for _ in range(NODES)]
        self._defended = defended
        self._num_reads = 0

    def put(self, peer: Peer, root: Bucket, path: tuple[int, ...], data: bytes) -> int:
        """Write into the first bucket with room, as a server does; return how deep that is."""
        prefix = peer.prefix if self._defended else ""
        for depth in range(MAX_DEPTH + 1):
            bucket = Bucket(root.tree, path[:depth])
            stored = [node.store(peer, bucket, data, self.clock, prefix) for node in self.nodes]
            if 2 * sum(stored) > len(stored):
                return depth
        return -1

    def fill(self, peer: Peer) -> None:
        """Write into all buckets on the way, as one does who wants to leave no room."""
        for depth in range(MAX_DEPTH + 1):
            bucket = Bucket(servers_root(FINGERPRINT).tree, peer.path[:depth])
            for node in self.nodes:
                node.store(peer, bucket, peer.data, self.clock, peer.prefix if self._defended else "")

    async def read(self, bucket: Bucket) -> Page:
        """See swarm.directory.Shelves."""
        from hivemind.dht.routing import DHTID

        from swarm.dht_shelves import _page

        self._num_reads += 1
        return _page(self.nodes[self._num_reads % NODES].storage.get(DHTID.generate(bucket.key)))

    async def write(self, bucket: Bucket, data: bytes, lifetime_s: float) -> bool:
        """See swarm.directory.Shelves; a client writes nothing."""
        return False


class AskedSurvey(Survey):
    """Calls nobody, and knows who would answer."""

    def __init__(self, answering: set[str]) -> None:
        super().__init__(connector=None)  # type: ignore[arg-type]
        self._answering = answering

    async def _call(self, server: Announcement) -> None:
        if server.peer_id in self._answering:
            self.met(server, 0.02)


class NoConnector:
    """Reaches nobody."""

    async def forget(self, peer_id: str) -> None:
        """There is nothing to forget."""

    def lease(self, address: Any) -> Any:
        raise PeerUnavailable("it cannot be reached")


@dataclass
class Seen:
    """What became of the requests."""

    tried: list[int] = field(default_factory=list)
    """Of each request, how many servers of the flood it tried."""
    num_failed: int = 0
    honest_known: list[int] = field(default_factory=list)
    known: list[int] = field(default_factory=list)
    read_bytes: list[int] = field(default_factory=list)
    refresh_cpu_s: list[float] = field(default_factory=list)

    def result(self) -> dict[str, Any]:
        per_min = round(60 / PERIOD_S)
        totals = [0, *self.read_bytes]
        minutes = [b - a for a, b in zip(totals, totals[per_min:], strict=False)] or totals[-1:]
        return {
            "requests": len(self.tried) + self.num_failed,
            "failed": self.num_failed,
            "flood_servers_tried_at_first": self.tried[0] if self.tried else None,
            "flood_servers_tried_in_all": sum(self.tried),
            "requests_that_tried_none": sum(not each for each in self.tried),
            "honest_known_at_the_end": self.honest_known[-1],
            "known_at_the_end": self.known[-1],
            "max_bytes_in_a_minute": max(minutes),
            "max_cpu_ms_per_refresh": rounded(1e3 * max(self.refresh_cpu_s)),
        }


class Client:
    """A client that makes requests now and then.

    Args:
        answering: peer ids of those that answer when they are only called.
    """

    def __init__(self, directory: BucketDirectory, clock: SwarmClock, *, defended: bool, answering: set[str]) -> None:
        config = ClientConfig(initial_peers=("/ip4/127.0.0.1/tcp/1",), route_timeout_s=0.05)
        self.network = network = Network(config, directory, NoConnector())  # type: ignore[arg-type]
        network._known = KnownServers(
            directory, bytes_per_min=config.directory_bytes_per_min, use_direct=True, clock=clock.steady_s
        )
        network._survey = AskedSurvey(answering)
        if not defended:
            network._standing.doubts_s = lambda *_: {}  # type: ignore[method-assign]
        self._directory = directory
        self.seen = Seen()

    async def refresh(self, honest: Sequence[Peer]) -> None:
        cpu_s = time.process_time()
        servers = await self.network.servers(FINGERPRINT, max_age_s=0.0)
        self.seen.refresh_cpu_s.append(time.process_time() - cpu_s)
        ids = {peer.peer_id for peer in honest}
        self.seen.known.append(len(servers))
        self.seen.honest_known.append(sum(server.peer_id in ids for server in servers))
        self.seen.read_bytes.append(self._directory.statistics().num_read_bytes)

    async def request(self, honest: Sequence[Peer]) -> None:
        """Ask for a route until all of its servers serve."""
        ids = {peer.peer_id for peer in honest}
        tried = 0

        async def work(attempt: Attempt) -> None:
            nonlocal tried
            for hop in await self.network.route(Needs(BlockRange(0, NUM_BLOCKS), FINGERPRINT), attempt):
                if hop.peer_id not in ids:
                    tried += 1
                    error = PeerBug("it does not serve")
                    error.peer_id = hop.peer_id
                    raise error
                self.network.succeeded(hop.peer_id)

        try:
            await self.network.retrying(work)
            self.seen.tried.append(tried)
        except SwarmError as exc:
            say(f"a request failed: {exc}")
            self.seen.num_failed += 1


def simulate(
    number: int,
    *,
    honest: int = 12,
    prefixes: int = 8,
    minutes: int = 5,
    fresh: bool = False,
    answering: bool = True,
    defended: bool = True,
) -> dict[str, Any]:
    """Let a flood and some honest servers announce themselves and a client look for routes; return what it met."""
    with tempfile.TemporaryDirectory() as folder:
        makes = Makes(Path(folder))
        return asyncio.run(_simulate(makes, number, honest, prefixes, minutes, fresh, answering, defended))


async def _simulate(
    makes: Makes,
    number: int,
    num_honest: int,
    prefixes: int,
    minutes: int,
    fresh: bool,
    answering: bool,
    defended: bool,
) -> dict[str, Any]:
    _import_hivemind()
    ahead_s = [0.0]
    clock = SwarmClock(lambda: time.time() + ahead_s[0], lambda: ahead_s[0])
    nodes = Nodes(clock, defended=defended)
    honest, flood = makes.honest(num_honest), makes.flood(number, prefixes)
    answer = {peer.peer_id for peer in honest}
    directory = BucketDirectory(nodes, "", clock)
    client = Client(directory, clock, defended=defended, answering=answer)
    depths: list[int] = []
    for period in range(round(60 * minutes / PERIOD_S)):
        if fresh and period and period % 4 == 0:
            flood = makes.flood(number, prefixes)
        answer |= {peer.peer_id for peer in flood} if answering else set()
        for peer in flood[:number]:
            nodes.fill(peer)
            if period == 0:
                nodes.put(peer, MODELS, path_of_model(peer.peer_id), peer.announcement.listing.to_bytes())
        depths = [nodes.put(peer, servers_root(FINGERPRINT), peer.path, peer.data) for peer in honest]
        await client.refresh(honest)
        for _ in range(MAX_REQUESTS_PER_PERIOD):
            await client.request(honest)
        ahead_s[0] += PERIOD_S
    await client.network.aclose()
    say(f"{number} identities from {prefixes} prefixes: done")
    return {
        "identities": number, "prefixes": prefixes, "fresh_each_minute": fresh, "answering": answering,
        "defended": defended, "honest": num_honest, **client.seen.result(),
        "honest_refused_at_the_end": sum(depth < 0 for depth in depths),
        "records_refused_by_a_node": nodes.nodes[0].num_refused,
        "kept_mb_by_a_node": rounded(nodes.nodes[0].storage._num_bytes / 1e6),
    }  # fmt: skip


async def measure_real(number: int, num_nodes: int, prefixes: int) -> dict[str, Any]:
    """The same with DHT nodes that run p2pd."""
    with tempfile.TemporaryDirectory() as folder:
        makes = Makes(Path(folder))
        honest, flood = makes.honest(6), makes.flood(number, prefixes)
        async with AsyncExitStack() as owned:
            nodes: list[Any] = []
            for _ in range(num_nodes):
                peers = tuple(await nodes[0].multiaddrs()) if nodes else ()
                nodes.append(await owned.enter_async_context(open_dht(DhtConfig(initial_peers=peers))))
            peers = tuple(await nodes[0].multiaddrs())
            attacker = await owned.enter_async_context(open_dht(DhtConfig(initial_peers=peers, client_mode=True)))
            for node in nodes:
                await node.p2p.guard.source_of(attacker.peer_id)
                node.p2p.guard._prefixes[attacker.peer_id] = "203.0.0"
            stored = await _flood_for_real(nodes, attacker, flood)
            say(f"{stored} records of the flood were stored")
            for peer in honest:
                await _announce_for_real(nodes[0], peer)
            reader = await owned.enter_async_context(open_dht(DhtConfig(initial_peers=peers, client_mode=True)))
            clock = SwarmClock()
            answering = {peer.peer_id for peer in (*honest, *flood)}
            client = Client(reader.directory, clock, defended=True, answering=answering)
            await client.refresh(honest)
            for _ in range(10):
                await client.request(honest)
            refused = nodes[0].p2p.guard.num_refused
            await client.network.aclose()
        return {"identities": number, "nodes": num_nodes, **client.seen.result(), "requests_refused_by_a_node": refused}


async def _flood_for_real(nodes: Sequence[Any], attacker: Any, flood: Sequence[Peer]) -> int:
    from hivemind.dht.routing import DHTID

    from swarm.dht_records import RECORD_LIFETIME_S, sign_record

    num_stored = 0
    for peer in flood:
        for depth in range(2):
            key, now_s = DHTID.generate(Bucket(servers_root(FINGERPRINT).tree, peer.path[:depth]).key), time.time()
            value = sign_record(peer.identity, key.to_bytes(), peer.data, written_at_s=now_s, lifetime_s=LIFETIME_S)
            answers = await asyncio.gather(
                *(
                    attacker._node.protocol.call_store(
                        node.p2p.peer_id, [key], [value], now_s + RECORD_LIFETIME_S, subkeys=[peer.identity.public_key]
                    )
                    for node in nodes
                )
            )
            num_stored += sum(bool(answer and answer[0]) for answer in answers)
    return num_stored


async def _announce_for_real(node: Any, peer: Peer) -> None:
    """Write for a server through a node's own connections."""
    from swarm.dht_shelves import DhtShelves

    async def nothing() -> None:
        pass

    shelves = DhtShelves(node._node, peer.identity, SwarmClock(), NoContacts(), nothing)  # type: ignore[arg-type]
    for depth in range(MAX_DEPTH + 1):
        if await shelves.write(Bucket(servers_root(FINGERPRINT).tree, peer.path[:depth]), peer.data, LIFETIME_S):
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--identities", type=int, default=2000)
    parser.add_argument("--prefixes", type=int, default=8, help="from which the flood comes")
    parser.add_argument("--minutes", type=int, default=5, help="simulated")
    parser.add_argument("--real", type=int, default=300, help="identities with real nodes; 0: none")
    parser.add_argument("--nodes", type=int, default=4, help="real ones")
    arguments = parser.parse_args()
    options = {"prefixes": arguments.prefixes, "minutes": arguments.minutes}
    simulated = [
        simulate(arguments.identities, **options),
        simulate(arguments.identities, answering=False, **options),
        simulate(arguments.identities, fresh=True, **options),
        simulate(arguments.identities, defended=False, **options),
    ]
    real = asyncio.run(measure_real(arguments.real, arguments.nodes, 1)) if arguments.real else None
    print_plain("sybil", simulated=simulated, real=real)


if __name__ == "__main__":
    main()
