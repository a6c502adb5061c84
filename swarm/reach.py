"""What to believe of what peers say about a port of ours, and how often they may be asked: decisions, no network.

A peer that lies about where we can be reached would send all our clients to an address of its choice, or keep us from
registering with relays. So the peers of the join link are believed, which all that we know of the swarm comes
from; others only where several of them agree.
"""

from __future__ import annotations

import collections
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Annotated

from pydantic import BaseModel, Field

from swarm.dialling import address_of, is_ip, is_outside

DIALS_PER_MINUTE = 32
"""How often one address is dialled: a home may have several servers."""
MAX_PLACES = 4096
"""Addresses whose latest dials are remembered."""


class Question(BaseModel):
    """Whether a port can be reached; port 0: only whatever else the answer says."""

    port: Annotated[int, Field(ge=0, le=65535)] = 0
    certificate: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""
    """SHA-256 of the certificate that TLS shows there; empty: a TCP connection is enough."""


class Answer(BaseModel):
    """What the peer that was asked found."""

    host: Annotated[str, Field(max_length=64)] = ""
    """IP address that the question came from; empty: it came through a relay."""
    reached: bool | None = None
    """Whether the port there could be reached; None: not tried."""
    relays: bool = False
    """Whether the peer carries connections to servers that nobody can dial."""
    clock_s: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """Unix time there."""


@dataclass(frozen=True, slots=True)
class Observation:
    """An answer, and what asking showed."""

    peer_id: str
    answer: Answer
    rtt_s: float = 0.0
    """How long the answer took: one round trip, if nothing was dialled."""
    clock_offset_s: float = 0.0
    """By how much the clock there is ahead of ours."""


@dataclass(frozen=True, slots=True)
class Reach:
    """Under which IP addresses of ours a port can be reached, in the widest network from which anybody tried."""

    reached: tuple[str, ...] = ()
    missed: tuple[str, ...] = ()

    @property
    def is_known(self) -> bool:
        """Whether anybody tried."""
        return bool(self.reached or self.missed)

    @property
    def is_hidden(self) -> bool:
        """Whether somebody tried, and nobody could."""
        return bool(self.missed) and not self.reached


def judge(seen: Sequence[Observation], *, trusted: Container[str], own: Container[str] = ()) -> Reach:
    """Decide where a port can be reached.

    Of the peers of the join link, one that reached it is enough. Others count only if none of these tried, only about
    addresses that are our own or that most of them name, and if not more of them failed than succeeded. Who tried
    from our own machine or network says nothing about the internet, and is left out if somebody tried from there.

    Args:
        trusted: peer ids of the join link.
        own: our IP addresses, as far as this machine knows them.
    """
    tried = [each for each in seen if each.answer.reached is not None and is_ip(each.answer.host)]
    others = collections.Counter(each.answer.host for each in tried if each.peer_id not in trusted)

    def is_credible(found: Observation) -> bool:
        votes = others[found.answer.host]
        agreed = votes > 1 and 2 * votes > others.total()
        return found.peer_id in trusted or found.answer.host in own or agreed

    credible = [each for each in tried if is_credible(each)]
    widest = max((scope_of(each.answer.host) for each in credible), default=0)
    credible = [each for each in credible if scope_of(each.answer.host) == widest]
    from_link = [each for each in credible if each.peer_id in trusted]
    reached: list[str] = []
    missed: list[str] = []
    for host in dict.fromkeys(each.answer.host for each in from_link or credible):
        says = [bool(each.answer.reached) for each in from_link or credible if each.answer.host == host]
        is_reached = any(says) if from_link else 2 * sum(says) >= len(says)
        (reached if is_reached else missed).append(host)
    return Reach(tuple(reached), tuple(missed))


def outside_first(peers: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Peers and their libp2p addresses, those first that are on the internet: they see us as others do."""

    def is_near(item: tuple[str, Sequence[str]]) -> bool:
        return not any(is_outside(host_of(text)) for text in item[1])

    return {peer_id: list(addresses) for peer_id, addresses in sorted(peers.items(), key=is_near)}


def neighbours(peers: Mapping[str, Sequence[str]], own: Sequence[str]) -> dict[str, list[str]]:
    """Those peers, and those of their libp2p addresses, that lie in our own private networks.

    Args:
        own: our IP addresses; a network is what shares the first 24 bits with one (64 bits of IPv6).
    """
    networks = {_network(host) for host in own if is_ip(host) and scope_of(host) == 1}
    near = {
        peer_id: [text for text in addresses if (host := host_of(text)) and _network(host) in networks]
        for peer_id, addresses in peers.items()
    }
    return {peer_id: addresses for peer_id, addresses in near.items() if addresses}


class Budget:
    """How often each address may still be dialled."""

    def __init__(self) -> None:
        self._dials: dict[str, collections.deque[float]] = {}

    def take(self, host: str, now_s: float) -> bool:
        """Whether one more dial is allowed; it counts then."""
        place = place_of(host)
        dials = self._dials.pop(place, None) or collections.deque(maxlen=DIALS_PER_MINUTE)
        self._dials[place] = dials
        if len(self._dials) > MAX_PLACES:
            del self._dials[next(iter(self._dials))]
        if len(dials) == DIALS_PER_MINUTE and now_s - dials[0] < 60:
            return False
        dials.append(now_s)
        return True


def place_of(host: str) -> str:
    """Whom limits count an IP address for: itself, or its /64 in IPv6, of which one customer has all addresses."""
    if not is_ip(host):
        return host
    address = address_of(host)
    return _network(host) if isinstance(address, IPv6Address) else str(address)


def host_of(multiaddr: str) -> str:
    """The IP address that a connection ends at; empty if that is a relay's, or none."""
    parts = multiaddr.split("/")
    if "p2p-circuit" in parts or len(parts) < 3 or parts[1] not in ("ip4", "ip6") or not is_ip(parts[2]):
        return ""
    return parts[2]


def libp2p_port(multiaddrs: Sequence[str]) -> int:
    """The TCP port in our own libp2p addresses, those of relays aside; 0: we do not listen."""
    for parts in (text.split("/") for text in multiaddrs if "/p2p-circuit" not in text):
        if len(parts) > 4 and parts[3] == "tcp" and parts[4].isdecimal():
            return int(parts[4])
    return 0


def _network(host: str) -> str:
    address = address_of(host)
    return address.exploded[:19] if isinstance(address, IPv6Address) else str(address).rpartition(".")[0]


def scope_of(host: str) -> int:
    """From how far an address can be reached: 0 this machine, 1 this network, 2 the internet."""
    if is_outside(host):
        return 2
    address = address_of(host)
    return 0 if address.is_loopback or address.is_unspecified else 1
