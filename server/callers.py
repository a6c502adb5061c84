"""Who calls: whom limits count a call for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import unquote

from swarm import reach
from swarm.dialling import address_of, is_ip

RELAY_SHARES = 8
"""A relay brings the calls of many, whom nobody can tell apart: it may have as much as so many callers."""


@dataclass(frozen=True, slots=True)
class Caller:
    """One whom limits count together."""

    key: str
    """A member of a private swarm, an IPv4 address, the /64 of an IPv6 one, or the libp2p peer of a tunnel's stream."""
    is_own: bool = False
    """Whether it is a program of this machine: only the limits for all together count."""
    shares: int = 1
    """How many times what one caller may have."""


OWN = Caller("this machine", is_own=True)
"""Who calls over a local socket."""


def split_peer(peer: str) -> tuple[str, int]:
    """The IP address and port that gRPC writes as `ipv4:192.0.2.1:5000` or `ipv6:%5B2001:db8::1%5D:5000`.

    Returns: ("", 0) for a local socket.
    """
    host, _, port = unquote(peer.partition(":")[2]).rpartition(":")
    host = host.strip("[]").partition("%")[0]
    return (host, int(port)) if is_ip(host) and port.isdecimal() else ("", 0)


class Callers:
    """Tells callers apart.

    Args:
        loopback_is_caller: whether loopback addresses are callers like others, each of its own; else they are the
            operator's own machine.
    """

    def __init__(self, *, loopback_is_caller: bool = False) -> None:
        self._loopback_is_caller = loopback_is_caller
        self._entered: dict[int, Caller] = {}
        """Local port of a connection that the tunnel has made to our gRPC port -> whose stream it carries."""

    def of_peer(self, peer: str, member: str = "") -> Caller:
        """Whom a call counts for.

        Args:
            peer: whom gRPC takes to be at the other end.
            member: of a private swarm, who the call has shown to come from: one caller, wherever it is.
        """
        caller = self.of_address(*split_peer(peer))
        return Caller(member) if member and not caller.is_own else caller

    def of_address(self, host: str, port: int) -> Caller:
        """Whom a connection from there counts for."""
        if not host:
            return OWN
        if address_of(host).is_loopback:
            if (entered := self._entered.get(port)) is not None:
                return entered
            if not self._loopback_is_caller:
                return Caller(f"this machine, port {port}", is_own=True)  # so that its programs share fairly
        return Caller(reach.place_of(host))

    @contextmanager
    def entering(self, port: int, origin: str, is_relay: bool) -> Iterator[None]:
        """Know whose stream the tunnel carries while the body runs.

        Args:
            port: local port from which the tunnel has connected to our gRPC port.
            origin: peer id, or IP address of a direct connection.
        """
        key = reach.place_of(origin) if is_ip(origin) else f"peer {origin}"
        self._entered[port] = Caller(key, shares=RELAY_SHARES if is_relay else 1)
        try:
            yield
        finally:
            del self._entered[port]
