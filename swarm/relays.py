"""Relays: peers that carry connections to servers that nobody can dial.

    client ── "to": server ──> relay <── "register" ── server     a hidden server keeps a stream open to each relay
    client ════ gRPC, TLS ════ relay ════ gRPC, TLS ══ server     the relay opens a stream back to it, and joins both

Here is what callers and hidden servers do; the relay itself is swarm/relaying.py. Addresses are written as libp2p does,
/ip4/…/tcp/…/p2p/<relay>/p2p-circuit/p2p/<server>. Why libp2p's own relays are not used: docs/decisions/0016.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

from pydantic import BaseModel

from swarm.announcement import PeerId, Text, is_peer_id
from swarm.dial_back import Node
from swarm.dialling import is_outside
from swarm.errors import PeerError, PeerUnavailable
from swarm.pipes import Stream, cancel_all, read_line, write_line
from swarm.reach import host_of, outside_first

logger = logging.getLogger(__name__)

PROTOCOL = "/swarm/relay/1"
TUNNEL_PROTOCOL = "/swarm/grpc/1"
"""What a relay opens to the server; see swarm/tunnel.py."""

NUM_RELAYS = 2
"""With how many relays a hidden server registers."""
ASK_TIMEOUT_S = 5.0
RETRY_S, MAX_RETRY_S, MAX_RETRY_WITHOUT_S = 5.0, 300.0, 30.0
"""How long a hidden server waits before it looks for relays again: twice as long each time, less if it has none."""

_CIRCUIT = "/p2p-circuit"


class Request(BaseModel):
    """First line of a stream: one of the three."""

    register_me: bool = False
    """Carry connections to me for as long as this stream is open."""
    to: PeerId | None = None
    """Carry this stream to a peer that is registered."""
    punch: PeerId | None = None
    """Let me and a peer that you carry streams of mine to dial each other: see swarm/punching.py."""


class Reply(BaseModel):
    """The relay's answer; after a good one to `to`, the stream is the peer's."""

    error: Text = ""


def split_circuit(multiaddr: str) -> tuple[str, str] | None:
    """The peer id and the address of the relay that an address leads through; None: it leads through none."""
    relay, circuit, _ = multiaddr.partition(_CIRCUIT)
    peer_id = relay.rpartition("/p2p/")[2]
    return (peer_id, relay) if circuit and is_peer_id(peer_id) else None


def relays_of(multiaddrs: Sequence[str]) -> dict[str, list[str]]:
    """The relays that addresses lead through: where each may be, by peer id."""
    relays: dict[str, list[str]] = {}
    for peer_id, address in filter(None, map(split_circuit, multiaddrs)):
        relays.setdefault(peer_id, []).append(address)
    return relays


def circuits(relays: Mapping[str, Sequence[str]], peer_id: str) -> list[str]:
    """The addresses of a peer through its relays, which are given as in `relays_of`: those on the internet, if any."""
    through: dict[str, str] = {}
    for relay_id, addresses in relays.items():
        for text in (each.removesuffix(f"/p2p/{relay_id}") for each in addresses if _CIRCUIT not in each):
            through[f"{text}/p2p/{relay_id}{_CIRCUIT}/p2p/{peer_id}"] = text
    outside = [circuit for circuit, text in through.items() if is_outside(host_of(text)) or "/dns" in text]
    near = [circuit for circuit, text in through.items() if not text.startswith(("/ip4/127.", "/ip6/::1/"))]
    return outside or near or list(through)


async def open_relayed_stream(node: Node, relay_id: str, peer_id: str, *, timeout_s: float) -> Stream:
    """Open a stream to a peer's tunnel through a relay. Raises: PeerUnavailable, ProtocolError."""
    return await ask_relay(node, relay_id, Request(to=peer_id), timeout_s)


async def ask_relay(node: Node, relay_id: str, request: Request, timeout_s: float) -> Stream:
    """Open a stream to a relay that grants this request. Raises: PeerUnavailable, ProtocolError."""
    stream = await node.open_stream(relay_id, PROTOCOL, timeout_s=timeout_s)
    try:
        await write_line(stream[1], request, relay_id)
        reply = await read_line(stream[0], Reply, relay_id, timeout_s=timeout_s)
        if reply.error:
            raise PeerUnavailable(f"relay {relay_id} refuses: {reply.error}")
    except BaseException:
        stream[1].close()
        raise
    return stream


class Registrations:
    """The relays that carry connections to this node: `run` in a task keeps them, `aclose` ends it all.

    Args:
        candidates: says whom to ask, those first that are preferred: peer id -> where it may be.
        on_change: called when relays were found or lost.
    """

    def __init__(
        self, node: Node, candidates: Callable[[], Mapping[str, Sequence[str]]], on_change: Callable[[], None]
    ) -> None:
        self._node = node
        self._candidates = candidates
        self._on_change = on_change
        self._kept: dict[str, asyncio.Task[None]] = {}
        self.addresses: dict[str, list[str]] = {}
        """Peer id of each relay -> where it is."""
        self.looked = asyncio.Event()
        """Set when all candidates have been asked, or as many as it takes."""

    async def run(self) -> None:
        """Stay registered with NUM_RELAYS of the candidates, until cancelled."""
        loop, retry_s = asyncio.get_running_loop(), RETRY_S
        while True:
            await self._fill()
            self.looked.set()
            kept, since_s = set(self._kept.values()), loop.time()
            if not kept:
                retry_s = min(retry_s, MAX_RETRY_WITHOUT_S)
                await asyncio.sleep(retry_s)
            else:
                waiting_s = None if len(kept) >= NUM_RELAYS else retry_s
                lost, _ = await asyncio.wait(kept, timeout=waiting_s, return_when=asyncio.FIRST_COMPLETED)
                too_soon_s = since_s + retry_s - loop.time()
                if lost and too_soon_s <= 0:
                    retry_s = RETRY_S
                    continue
                await asyncio.sleep(max(0.0, too_soon_s))  # or one that ends each registration would keep us busy
            retry_s = min(2 * retry_s, MAX_RETRY_S)

    async def aclose(self) -> None:
        """Give the places at all relays back."""
        await cancel_all(self._kept.values())

    async def _fill(self) -> None:
        """Ask candidates in turn, until there are enough relays or nobody is left."""
        for peer_id, multiaddrs in outside_first(self._candidates()).items():
            if len(self._kept) >= NUM_RELAYS:
                return
            if peer_id in self._kept:
                continue
            try:
                await self._node.connect(peer_id, multiaddrs, timeout_s=ASK_TIMEOUT_S)
                stream = await ask_relay(self._node, peer_id, Request(register_me=True), ASK_TIMEOUT_S)
            except PeerError as exc:
                logger.debug("no relay: %s", exc)
                continue
            self.addresses[peer_id] = list(multiaddrs)
            self._kept[peer_id] = asyncio.create_task(self._keep(peer_id, stream))
            logger.info("peer %s relays for this one", peer_id)
            self._on_change()

    async def _keep(self, peer_id: str, stream: Stream) -> None:
        try:
            await stream[0].read(1)
        except OSError as exc:
            logger.debug("relay %s: %s", peer_id, exc)
        finally:
            stream[1].close()
            del self._kept[peer_id], self.addresses[peer_id]
            logger.info("peer %s no longer relays for this one", peer_id)
            self._on_change()
