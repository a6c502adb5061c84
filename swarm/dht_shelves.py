"""Reading and writing buckets in the hivemind DHT with few messages.

hivemind's own `get` fetches a value from everybody who has it, and `store` does so on its way. With buckets of 25 kB
and five replicas that is most of the traffic, so here a read asks one holder, another one each time (all of them
only when a small bucket is read first), and a write looks for the holders under a key next to the bucket's, where
nothing lies.

Whoever has many identities may be all of the nodes nearest to a key. So a bucket is also kept by some of the peers that
this node joined through, and read from one of them at first and then now and again: they are those that a person chose.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from hivemind.dht import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import PeerID
from hivemind.utils.timed_storage import ValueWithExpiration

from swarm.admission import Gate
from swarm.buckets import Bucket
from swarm.dht_contacts import Contacts
from swarm.dht_records import RECORD_LIFETIME_S, read_record, sign_record
from swarm.directory import SwarmClock
from swarm.errors import PeerUnavailable
from swarm.identity import Identity
from swarm.listing import Entry, Page

logger = logging.getLogger(__name__)

T = TypeVar("T")

REPLICAS = 5
"""Nodes that keep a bucket: those nearest to its key."""

NEAR = 8
"""So many of the nearest nodes are remembered for a bucket."""

MAX_CALLS, MAX_EMPTY = 12, 3
"""Of one read: how many nodes are asked at most, and how many of the nearest have to know nothing of the bucket."""

FEW_BYTES = 10_000
"""A bucket that is no larger is read from all its holders the first time: in a swarm that has just begun, those who
wrote early did not know the holders that came later, and each may have another part of it."""

INTRODUCERS, ASK_INTRODUCER_EVERY = 2, 4
"""So many initial peers are written to as well, and at every so manieth reading of a bucket one of them is asked."""

RELOCATE_S = 300.0
"""After so long a writer asks the swarm again who is nearest; nodes that it meets meanwhile count at once."""

MAX_REMEMBERED = 512
"""Buckets whose holders are remembered."""

RECORD_BYTES, NEIGHBOUR_BYTES = 51, 62
"""What a record has beside its value, and a neighbour in an answer, as they travel."""


@dataclass(slots=True)
class _Near:
    """The nodes nearest to a bucket's key that we know."""

    nodes: dict[DHTID, PeerID] = field(default_factory=dict)
    located_at_s: float = -float("inf")
    num_reads: int = 0


class DhtShelves:
    """Buckets in the DHT, as one node reaches them.

    Args:
        keep_time: done before each write, whose time others will judge.
        gate: of a private swarm.
    """

    def __init__(
        self,
        node: DHTNode,
        identity: Identity,
        clock: SwarmClock,
        contacts: Contacts,
        keep_time: Callable[[], Awaitable[None]],
        gate: Gate | None = None,
    ) -> None:
        self._node = node
        self._protocol = node.protocol
        self._identity = identity
        self._clock = clock
        self._contacts = contacts
        self._keep_time = keep_time
        self._gate = gate
        self._last_write_s = 0.0
        self._near_by_key: dict[DHTID, _Near] = {}

    async def write(self, bucket: Bucket, data: bytes, lifetime_s: float) -> bool:
        """See swarm.directory.Shelves."""
        await self._keep_time()
        key = DHTID.generate(bucket.key)
        self._last_write_s = max(self._clock.now_s(), self._last_write_s + 1e-3)
        value = sign_record(
            self._identity,
            key.to_bytes(),
            data,
            written_at_s=self._last_write_s,
            lifetime_s=lifetime_s,
            credential=b"" if self._gate is None else self._gate.credential,
        )
        expiration_s = self._last_write_s + RECORD_LIFETIME_S
        try:
            answers = await self._reaching_somebody(lambda: self._write_to_holders(key, value, expiration_s))
        except PeerUnavailable:
            self._write_here(key, value, expiration_s)  # who knows this node can ask it, be it the last of its swarm
            raise
        if not answers:
            raise PeerUnavailable("no node of the DHT answers: contact with the swarm is lost")
        return 2 * sum(answers) > len(answers)

    async def read(self, bucket: Bucket) -> Page:
        """See swarm.directory.Shelves."""
        key = DHTID.generate(bucket.key)
        found = await self._reaching_somebody(lambda: self._read_from_holder(key))
        await self._contacts.get_to_know(self._remembered(key).nodes.values())
        own = self._page(self._protocol.storage.get(key))
        return Page(_latest(found.entries + own.entries), found.num_bytes)

    async def _write_to_holders(self, key: DHTID, value: bytes, expiration_s: float) -> list[bool]:
        """Whether each of the nearest nodes that answer has taken a record."""
        near = await self._locate(key)
        holders = sorted(
            [*near.nodes, *([] if self._protocol.client_mode else [self._node.node_id])], key=key.xor_distance
        )[:REPLICAS]
        beside = [peer_id for node_id, peer_id in self._introducers().items() if node_id not in holders][:INTRODUCERS]
        answers, introducers = await asyncio.gather(
            asyncio.gather(*(self._write_to(near, node_id, key, value, expiration_s) for node_id in holders)),
            asyncio.gather(*(self._store(peer_id, key, value, expiration_s) for peer_id in beside)),
        )
        if any(answer is None for answer in answers):
            near.located_at_s = -float("inf")
        if any(introducers):
            return [True]  # whatever strangers say
        return [answer for answer in answers if answer is not None]

    def _introducers(self) -> dict[DHTID, PeerID]:
        """The initial peers that this node is in contact with."""
        met = self._protocol.routing_table.peer_id_to_uid
        initial = self._contacts.known.initial
        return {node_id: peer_id for peer_id, node_id in met.items() if peer_id.to_base58() in initial}

    async def _write_to(
        self, near: _Near, node_id: DHTID, key: DHTID, value: bytes, expiration_s: float
    ) -> bool | None:
        if node_id == self._node.node_id:
            return self._write_here(key, value, expiration_s)
        stored = await self._store(near.nodes[node_id], key, value, expiration_s)
        if stored is None:
            near.nodes.pop(node_id, None)
        return stored

    async def _store(self, peer_id: PeerID, key: DHTID, value: bytes, expiration_s: float) -> bool | None:
        """Whether a node has taken a record; None: it does not answer."""
        stored = await self._protocol.call_store(
            peer_id, [key], [value], expiration_s, subkeys=[self._identity.public_key]
        )
        return None if stored is None else bool(stored and stored[0])

    def _write_here(self, key: DHTID, value: bytes, expiration_s: float) -> bool:
        return self._protocol.storage.store_subkey(key, self._identity.public_key, value, expiration_s)

    async def _locate(self, key: DHTID) -> _Near:
        """The nodes nearest to a key, looked up again from time to time and after one of them has failed."""
        near = self._remembered(key)
        now_s = self._clock.steady_s()
        if now_s - near.located_at_s > RELOCATE_S or not near.nodes:
            beside = DHTID(int(key) ^ 1)
            found = await self._node.find_nearest_nodes([beside], k_nearest=NEAR, beam_size=NEAR, exclude_self=True)
            near.nodes = dict(found[beside])
            near.located_at_s = now_s
        known = near.nodes | dict(self._neighbours(key))
        near.nodes = {each: known[each] for each in sorted(known, key=key.xor_distance)[:NEAR]}
        return near

    def _neighbours(self, key: DHTID) -> list[tuple[DHTID, PeerID]]:
        """The nearest of the nodes that this one has met."""
        return list(self._protocol.routing_table.get_nearest_neighbors(key, NEAR, exclude=self._node.node_id))

    async def _read_from_holder(self, key: DHTID) -> Page:
        """Ask nodes nearer and nearer to the key until one has the bucket; start with one that should, in turns."""
        near = self._remembered(key)
        known = near.nodes | dict(self._neighbours(key))
        near.num_reads += 1
        is_first = near.num_reads == 1
        first = sorted(near.nodes, key=key.xor_distance)[:REPLICAS]
        turn = first[near.num_reads % len(first)] if first else None
        introducers = list(self._introducers().items()) if near.num_reads % ASK_INTRODUCER_EVERY == 1 else []
        if introducers:
            turn, introducer = introducers[near.num_reads // ASK_INTRODUCER_EVERY % len(introducers)]
            known[turn] = introducer
        asked: set[DHTID] = set()
        num_bytes, num_empty, num_held = 0, 0, 0
        entries: tuple[Entry, ...] = ()
        while len(asked) < MAX_CALLS and num_empty < MAX_EMPTY:
            ahead = sorted(known.keys() - asked, key=key.xor_distance)
            if not ahead:
                break
            node_id = turn if turn is not None and turn in ahead and not asked else ahead[0]
            asked.add(node_id)
            answer = await self._node._call_find_with_blacklist(known[node_id], [key])
            if answer is None:
                known.pop(node_id)
                continue
            found, neighbours = answer[key]
            known |= {each: peer_id for each, peer_id in neighbours.items() if each != self._node.node_id}
            page = self._page(found)
            num_bytes += page.num_bytes + NEIGHBOUR_BYTES * len(neighbours)
            entries = _latest(entries + page.entries)
            if node_id in sorted(known, key=key.xor_distance)[:REPLICAS]:
                num_held, num_empty = num_held + bool(page.entries), num_empty + (not page.entries)
                if num_held == REPLICAS or (num_held and not (is_first and num_bytes <= FEW_BYTES)):
                    break
        near.nodes = {each: known[each] for each in sorted(known, key=key.xor_distance)[:NEAR]}
        return Page(entries, num_bytes)

    def _remembered(self, key: DHTID) -> _Near:
        near = self._near_by_key.pop(key, None) or _Near()
        self._near_by_key[key] = near
        if len(self._near_by_key) > MAX_REMEMBERED:
            del self._near_by_key[next(iter(self._near_by_key))]
        return near

    def _page(self, found: ValueWithExpiration | None) -> Page:
        """The entries of a bucket that hivemind returned or keeps."""
        if found is None or not isinstance(found.value, DictionaryDHTValue):
            return Page()
        records = [(subkey, value, expiration_s) for subkey, (value, expiration_s) in found.value.items()]
        entries = (read_record(*record, self._gate) for record in records)
        num_bytes = sum(RECORD_BYTES + len(value) for _, value, _ in records)
        return Page(tuple(entry for entry in entries if entry is not None), num_bytes)

    async def _reaching_somebody(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do it over newly made contacts if nobody answered: hivemind takes such silence for an empty swarm.

        Raises: PeerUnavailable: there is still nobody.
        """
        await self._contacts.ensure()
        result = await work()
        if self._contacts.lost:
            await self._contacts.ensure()
            result = await work()
        if self._contacts.lost:
            raise self._contacts.known.unreachable()
        return result


def _latest(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """The latest entry of each peer."""
    latest: dict[str, Entry] = {}
    for entry in entries:
        if entry.peer_id not in latest or entry.written_at_s > latest[entry.peer_id].written_at_s:
            latest[entry.peer_id] = entry
    return tuple(latest.values())
