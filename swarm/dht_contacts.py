"""Staying in a swarm: whom a DHT node has met, and how it finds back when nobody answers it any more.

hivemind's routing table holds those who answered last time; one call that fails takes a peer out of it. A slow moment
can empty it, and while the peers of a join link leave, others take their places. So every peer that a node meets
is remembered here with its addresses, and the node joins again through any of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from swarm.errors import PeerUnavailable

if TYPE_CHECKING:
    from hivemind.dht import DHTNode
    from hivemind.p2p import PeerID

logger = logging.getLogger(__name__)

MAX_MET = 256
"""How many peers are remembered beside the initial ones."""
MAX_DIALS = 16
"""How many of those are dialled at once."""
MAX_ADDRESSES = 8
"""Addresses that are remembered of one peer."""

ENOUGH = 8
"""A node that is in contact with fewer gets to know those that it hears of: it would be lost with them."""

_CONNECT_TIMEOUT_S = 5.0
_STRAGGLER_TIMEOUT_S = 0.5
_LOOK_INTERVAL_S = 10.0


class KnownPeers:
    """Peers to join through: the initial ones for ever, and of those met since, the ones met last."""

    def __init__(self, initial: Mapping[str, Sequence[str]], own_peer_id: str) -> None:
        self.initial = {peer_id: tuple(addresses) for peer_id, addresses in initial.items()}
        self._own_peer_id = own_peer_id
        self.is_refused: Callable[[], bool] = lambda: False
        """Whether the peer asked last has said that we are no member of its swarm."""
        self._met: dict[str, tuple[str, ...]] = {}

    def meet(self, peer_id: str, multiaddrs: Sequence[str] = ()) -> None:
        """Note that a peer is in the swarm, and where."""
        if peer_id == self._own_peer_id:
            return
        known = self._met.pop(peer_id, ())
        self._met[peer_id] = tuple(dict.fromkeys([*multiaddrs, *known]))[:MAX_ADDRESSES]
        if len(self._met) > MAX_MET:
            del self._met[next(iter(self._met))]

    def try_last(self, peer_id: str) -> None:
        """Note that a peer did not answer: others come first from now on."""
        if peer_id in self._met:
            self._met = {peer_id: self._met.pop(peer_id), **self._met}

    def candidates(self) -> dict[str, list[str]]:
        """Whom to dial and where: all initial peers, and up to MAX_DIALS of those met last."""
        met = [peer_id for peer_id in reversed(self._met) if peer_id not in self.initial][:MAX_DIALS]
        return {
            peer_id: list(dict.fromkeys([*self._met.get(peer_id, ()), *self.initial.get(peer_id, ())]))
            for peer_id in [*self.initial, *met]
        }

    def unreachable(self) -> PeerUnavailable:
        """The error of a node that none of them answers."""
        if self.is_refused():
            return PeerUnavailable(
                "the peers of this private swarm refuse this node: its invitation has expired or was revoked; "
                "ask the owner for another one"
            )
        initial = ", ".join(address for addresses in self.initial.values() for address in addresses)
        others = len(self._met.keys() - self.initial.keys())
        return PeerUnavailable(
            f"none of the initial peers answers ({initial}){f', nor any of {others} others met since' * bool(others)}: "
            "check that one of them is running and that this machine can reach its address"
        )


class Dialer(Protocol):
    """What Contacts needs of libp2p."""

    async def connect(self, peer_id: str, multiaddrs: Sequence[str], *, timeout_s: float) -> None:
        """Make sure that there is a connection. Raises: PeerUnavailable."""

    async def connected_addresses(self) -> dict[str, list[str]]:
        """The peers that there are connections to, and where they end."""


class Contacts:
    """One node's contact with its swarm."""

    def __init__(self, node: DHTNode, dialer: Dialer, known: KnownPeers) -> None:
        self.known = known
        self._node = node
        self._dialer = dialer
        self._next_look_s = 0.0
        self._looking: asyncio.Task[list[str]] | None = None

    @property
    def lost(self) -> bool:
        """Whether nobody answered who was asked last, although this node has joined others."""
        return bool(self.known.initial) and not self._table

    @property
    def _table(self) -> Mapping[object, object]:
        return self._node.protocol.routing_table.peer_id_to_uid

    async def ensure(self) -> None:
        """Join again if contact was lost; look for missing initial peers in the background if not.

        A bootstrap node that was restarted would otherwise never learn of the others again.

        Raises: PeerUnavailable: this node has joined a swarm and can reach nobody in it.
        """
        await self._note_met()
        candidates = self.known.candidates()
        if not self._table:
            if candidates and not await self.join(candidates, timeout_s=_CONNECT_TIMEOUT_S) and self.known.initial:
                raise self.known.unreachable()
            return
        now_s = asyncio.get_running_loop().time()
        missing = self.known.initial.keys() - self._peer_ids()
        if missing and now_s >= self._next_look_s and (self._looking is None or self._looking.done()):
            self._next_look_s = now_s + _LOOK_INTERVAL_S
            peers = {peer_id: candidates[peer_id] for peer_id in missing}
            self._looking = asyncio.create_task(self.join(peers, timeout_s=_CONNECT_TIMEOUT_S))

    async def join(self, peers: Mapping[str, Sequence[str]], *, timeout_s: float) -> list[str]:
        """Dial all of these peers; return those that say, within a moment of the first, that they are DHT nodes."""
        connected = await self._dial(peers, timeout_s)
        answers = await asyncio.gather(*(self._greet(peer_id) for peer_id in connected))
        joined = [peer_id for peer_id, answered in zip(connected, answers, strict=True) if answered]
        logger.debug("%d of %d dialled peers answer", len(joined), len(peers))
        return joined

    async def get_to_know(self, peers: Iterable[PeerID]) -> None:
        """Call peers that others have named, while there are too few."""
        strangers = [peer for peer in peers if peer not in self._table and peer not in self._node.blacklist]
        if self.known.initial and strangers and len(self._table) < ENOUGH:
            await asyncio.gather(*(self._greet(peer.to_base58()) for peer in strangers[: ENOUGH - len(self._table)]))

    async def aclose(self) -> None:
        """Stop looking."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait({self._looking})

    def _peer_ids(self) -> set[str]:
        return {peer_id.to_base58() for peer_id in self._node.protocol.routing_table.peer_id_to_uid}

    async def _note_met(self) -> None:
        """Remember those who answered lately; libp2p knows where."""
        peer_ids = self._peer_ids()
        addresses = await self._dialer.connected_addresses() if peer_ids else {}
        for peer_id in peer_ids:
            self.known.meet(peer_id, addresses.get(peer_id, ()))

    async def _dial(self, peers: Mapping[str, Sequence[str]], timeout_s: float) -> list[str]:
        tasks = {
            asyncio.create_task(self._dialer.connect(peer_id, addresses, timeout_s=timeout_s)): peer_id
            for peer_id, addresses in peers.items()
        }
        connected: list[str] = []
        pending = set(tasks)
        try:
            while pending:
                done, pending = await asyncio.wait(
                    pending,
                    timeout=_STRAGGLER_TIMEOUT_S if connected else None,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if not done:
                    break
                for task in done:
                    with contextlib.suppress(PeerUnavailable):
                        task.result()
                        connected.append(tasks[task])
        finally:
            for task in pending:
                task.cancel()
            if pending:
                await asyncio.wait(pending)
        for peer_id in peers.keys() - set(connected):
            self.known.try_last(peer_id)
        return connected

    async def _greet(self, peer_id: str) -> bool:
        """Whether a peer answers as a DHT node; it is then in the routing table."""
        from hivemind.p2p import PeerID

        peer = PeerID.from_base58(peer_id)
        node_id = await self._node.protocol.call_ping(peer)
        if node_id is None:
            self.known.try_last(peer_id)
            self._node.blacklist.register_failure(peer)
            return False
        self._node.blacklist.register_success(peer)  # or hivemind would not ask it anything for a while
        await self._node.protocol.update_routing_table(node_id, peer)  # hivemind does it too, a moment later
        return True
