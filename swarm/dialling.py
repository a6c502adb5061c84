"""What may be dialled because somebody else says so.

Who opens a session names the next hop, which the server then connects to. Unchecked, a stranger could make a server on
the internet knock at whatever its own network hides. Names are resolved before the check, and what was resolved is
what is dialled: a name cannot mean something else a moment later.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Protocol

RESOLVE_TIMEOUT_S = 3.0
MAX_NAMES = 4
"""How many names are looked up for one peer; the others are left out."""
MAX_ADDRESSES = 4
"""How many addresses of one name are dialled."""

Resolve = Callable[[str], Awaitable[list[str]]]
"""A host name -> its IP addresses; none if it has none."""

_MULTIADDR_HOST = re.compile(r"/(?:ip4|ip6|dns|dns4|dns6)/([^/]+)(/.*)")
_ANOTHER_HOST = re.compile(r"/(?:ip|dns)")


async def resolve(host: str) -> list[str]:
    """Ask the system; it also reads what only looks like a name, such as 127.1."""
    try:
        async with asyncio.timeout(RESOLVE_TIMEOUT_S):
            found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, TimeoutError):
        return []
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def is_ip(host: str) -> bool:
    """Whether this is an IP address, rather than a name."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def address_of(host: str) -> IPv4Address | IPv6Address:
    """What is dialled: an IPv4 address in IPv6 notation stands for itself. Raises: ValueError: this is no address."""
    address = ip_address(host)
    return getattr(address, "ipv4_mapped", None) or address


def is_outside(host: str) -> bool:
    """Whether a host is an IP address of the internet: not loopback, link-local, private, or for many."""
    return is_ip(host) and (address := address_of(host)).is_global and not address.is_multicast


class DiallingRule(Protocol):
    """Which of a peer's addresses may be dialled, and in which form."""

    async def targets(self, direct: Sequence[str]) -> list[str]:
        """Return those of these "host:port" that may."""

    async def multiaddrs(self, multiaddrs: Sequence[str]) -> list[str]:
        """Return those of these libp2p addresses that may."""


class Anywhere:
    """All: for clients, and for servers that nobody reaches from outside."""

    async def targets(self, direct: Sequence[str]) -> list[str]:
        return list(direct)

    async def multiaddrs(self, multiaddrs: Sequence[str]) -> list[str]:
        return list(multiaddrs)


@dataclass(frozen=True, slots=True)
class OutsideOnly:
    """Those on the internet; names come back as the addresses that they stand for."""

    resolve: Resolve = resolve

    async def targets(self, direct: Sequence[str]) -> list[str]:
        split = [target.rpartition(":") for target in direct]
        addresses = await self._addresses([host.strip("[]") for host, _, _ in split])
        return [
            f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
            for host, _, port in split
            for address in addresses.get(host.strip("[]"), ())
        ]

    async def multiaddrs(self, multiaddrs: Sequence[str]) -> list[str]:
        split = [found.groups() for text in multiaddrs if (found := _MULTIADDR_HOST.fullmatch(text))]
        addresses = await self._addresses([host for host, _ in split])
        return [
            f"/ip{ip_address(address).version}/{address}{rest}"
            for host, rest in split
            if not _ANOTHER_HOST.search(rest.partition("/p2p-circuit")[0])  # beyond it, the relay does the dialling
            for address in addresses.get(host, ())
        ]

    async def _addresses(self, hosts: Sequence[str]) -> dict[str, list[str]]:
        """The outside addresses of each host."""
        names = list(dict.fromkeys(host for host in hosts if not is_ip(host)))[:MAX_NAMES]
        resolved = await asyncio.gather(*(self.resolve(name) for name in names))
        known = dict(zip(names, resolved, strict=True)) | {host: [host] for host in hosts if is_ip(host)}
        return {host: [each for each in found if is_outside(each)][:MAX_ADDRESSES] for host, found in known.items()}


class UntilSeenOutside:
    """A rule that holds until somebody on the internet calls us or sees us there; from then on, OutsideOnly.

    A server behind a router that relays or a forwarded port make known to everybody is as public as any other.
    """

    def __init__(self, rule: DiallingRule) -> None:
        self._rule = rule

    def note(self, host: str) -> None:
        """Note an IP address that somebody calls from, or that we are seen under."""
        if is_outside(host) and not isinstance(self._rule, OutsideOnly):
            self._rule = OutsideOnly()

    async def targets(self, direct: Sequence[str]) -> list[str]:
        return await self._rule.targets(direct)

    async def multiaddrs(self, multiaddrs: Sequence[str]) -> list[str]:
        return await self._rule.multiaddrs(multiaddrs)


async def rule_for(own_multiaddrs: Sequence[str], resolve: Resolve = resolve) -> DiallingRule:
    """Return what a server with these addresses may dial for strangers: nothing of its own network if it is public.

    A name of its own that cannot be resolved here counts as public.
    """
    hosts = [found[1] for text in own_multiaddrs if (found := _MULTIADDR_HOST.fullmatch(text))]
    for host in dict.fromkeys(hosts):
        addresses = [host] if is_ip(host) else await resolve(host)
        if not addresses or any(map(is_outside, addresses)):
            return OutsideOnly(resolve)
    return Anywhere()
