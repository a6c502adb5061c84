"""Address prefixes: what counts as one party where many identities may be one, because they cost nothing.

A network of 256 IPv4 addresses, or an IPv6 /48, usually is one customer's. Whoever is reached through a relay counts
with those that share it. These are only ever compared under contention: a lab behind one address has the whole room as
long as nobody else wants it.
"""

from __future__ import annotations

from ipaddress import IPv6Address

from swarm.announcement import Announcement
from swarm.dialling import address_of, is_ip


def prefix_of(host: str) -> str:
    """The /24 of an IPv4 address, the /48 of an IPv6 one; a name, or nothing, is its own."""
    if not is_ip(host):
        return host
    address = address_of(host)
    return address.exploded[:14] if isinstance(address, IPv6Address) else str(address).rpartition(".")[0]


def prefix_of_multiaddr(text: str) -> str:
    """That of the first host of a multiaddr: of a way through a relay, the relay's; "" if there is none."""
    parts = text.split("/")
    return prefix_of(parts[2]) if len(parts) > 2 and parts[1] in ("ip4", "ip6", "dns", "dns4", "dns6") else ""


def prefix_of_server(server: Announcement) -> str:
    """Where a server says that it is; "" if it says nothing."""
    if server.direct:
        return prefix_of(server.direct[0].rpartition(":")[0].strip("[]"))
    return next(filter(None, map(prefix_of_multiaddr, server.multiaddrs)), "")
