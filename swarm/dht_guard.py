"""What strangers can do to a DHT node: ask so often, store so much, and be where their peer id puts them.

hivemind believes every peer about its place in the DHT, so one could move next to any key and answer for it. Here a
place follows from the peer id, as everybody's does who uses `open_dht`; other places are neither used nor passed on.

This module imports hivemind; only swarm/dht.py imports it, when a DHT is opened.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.p2p import P2P, P2PContext, P2PHandlerError, PeerID
from hivemind.proto import dht_pb2

from swarm.dht_records import BucketStorage
from swarm.origins import RequestLimiter, RequestRates, Source
from swarm.prefixes import prefix_of_multiaddr

logger = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 2**20
"""Of one request: hivemind hands a new neighbour all buckets that it should keep at once."""

LOOK_AGAIN_S = 1.0
"""libp2p is asked where peers are connected from no more often."""

ConnectedAddresses = Callable[[], Awaitable[dict[str, list[str]]]]
Handler = Callable[[Any, P2PContext], Awaitable[Any]]


class Guard:
    """Decides which requests one node answers.

    Args:
        connected_addresses: where the peers are that libp2p has connections to.
    """

    def __init__(self, storage: BucketStorage, rates: RequestRates, connected_addresses: ConnectedAddresses) -> None:
        self._storage = storage
        self._limiter = RequestLimiter(rates)
        self._connected_addresses = connected_addresses
        self._prefixes: dict[str, str] = {}
        """Peer id -> prefix, of those connected when that was looked up."""
        self._looked_at_s = -float("inf")
        self.num_refused = 0

    def guarding(self, handler: Handler) -> Handler:
        """The same for requests of bounded size that come no more often than they may."""

        async def guarded(request: Any, context: P2PContext) -> Any:
            source = await self.source_of(context.remote_id.to_base58())
            keys = getattr(request, "keys", ())
            too_large = request.ByteSize() > MAX_REQUEST_BYTES
            if too_large or not self._limiter.take(source, max(1, len(keys)), time.monotonic()):
                self.num_refused += 1
                logger.debug("peer %s asks too much", source.peer_id)
                if isinstance(request, dht_pb2.StoreRequest):
                    return dht_pb2.StoreResponse(store_ok=[False] * len(keys))
                raise P2PHandlerError("too many requests")
            with self._storage.storing_for(source):
                return await handler(request, context)

        return guarded

    async def source_of(self, peer_id: str) -> Source:
        """Who a connected peer is, and where."""
        if peer_id not in self._prefixes and time.monotonic() > self._looked_at_s + LOOK_AGAIN_S:
            self._looked_at_s = time.monotonic()
            connected = await self._connected_addresses()
            self._prefixes = {each: prefix_of_multiaddr(texts[0]) for each, texts in connected.items() if texts}
        return Source(peer_id, self._prefixes.get(peer_id, ""))


class GuardedP2P(P2P):
    """A connection to p2pd whose requests pass a guard, if there is one."""

    guard: Guard | None = None
    """Set before any handler is added."""

    async def add_protobuf_handler(
        self, name: str, handler: Handler, input_protobuf_type: type, **options: Any
    ) -> None:
        """Answer what the guard lets through; see P2P."""
        guarded = handler if self.guard is None else self.guard.guarding(handler)
        await super().add_protobuf_handler(name, guarded, input_protobuf_type, **options)


def place_of_peer(peer_id: PeerID) -> DHTID:
    """Where in the DHT a peer is."""
    return DHTID.generate(source=peer_id.to_base58())


def believe_no_places(protocol: DHTProtocol) -> None:
    """Let a node take no peer for one at another place than its peer id gives it."""
    update_routing_table, call_find = protocol.update_routing_table, protocol.call_find

    async def update_if_true(node_id: DHTID | None, peer_id: PeerID, responded: bool = True) -> None:
        if node_id is None or node_id == place_of_peer(peer_id):
            await update_routing_table(node_id, peer_id, responded=responded)

    async def find_true(peer: PeerID, keys: Collection[DHTID]) -> Any:
        answer = await call_find(peer, keys)
        if answer is None:
            return None
        return {
            key: (value, {node_id: each for node_id, each in near.items() if node_id == place_of_peer(each)})
            for key, (value, near) in answer.items()
        }

    protocol.update_routing_table, protocol.call_find = update_if_true, find_true
