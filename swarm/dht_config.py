"""How a DHT node is to be run, and what that means for p2pd's command line and for multiaddrs."""

from __future__ import annotations

import contextlib
import fcntl
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Literal

from swarm.errors import BadRequest, ResourceError
from swarm.membership import Invitation
from swarm.origins import RequestRates

_P2P_CODE = b"\xa5\x03"  # 421 as a varint, https://github.com/multiformats/multiaddr/blob/master/protocols.csv


@dataclass(frozen=True, slots=True, kw_only=True)
class DhtConfig:
    initial_peers: tuple[str, ...] = ()
    """Multiaddrs ending in /p2p/<peer id>; empty starts a new swarm."""
    identity_path: Path | None = None
    """Key file, made if it does not exist; None: a fresh identity for this run only."""
    host: str = "127.0.0.1"
    """IP address to listen on; 0.0.0.0 for all interfaces."""
    port: int = 0
    """TCP port to listen on; 0: any free one."""
    announce_host: str | None = None
    """IP address or DNS name that others shall dial instead of `host`; needs a fixed port."""
    client_mode: bool = False
    """Only ask: store nothing for others; on a loopback `host` do not listen at all."""
    reachability: Literal["auto", "public", "private"] = "auto"
    """Whether others can dial this node; "auto" asks them. A private one stores nothing for others."""
    startup_timeout_s: float = 15.0
    """How long joining may take."""
    invitation: Invitation | None = field(default=None, repr=False)
    """What makes this node a member of a private swarm; None: the swarm is public."""
    revocations_path: Path | None = None
    """Where the newest list of a private swarm's revocations is kept; None: in memory."""
    revocation_period_s: float = 15.0
    """How often a member of a private swarm looks for a newer one."""
    request_rates: RequestRates = field(default_factory=RequestRates)
    """How much this node does for others."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise BadRequest(f"port {self.port} is not between 0 and 65535")
        if self.announce_host is not None and self.port == 0:
            raise BadRequest("announcing another host needs a fixed port: set port as well")
        try:
            ip_address(self.host)
        except ValueError as exc:
            raise BadRequest(f"host {self.host!r} is not an IP address: use 0.0.0.0 to listen everywhere") from exc

    @property
    def may_be_hidden(self) -> bool:
        """Whether it takes others to say if they can dial this node."""
        return self.reachability == "auto" and not self.client_mode and not ip_address(self.host).is_loopback


def daemon_options(config: DhtConfig, identity_path: Path) -> list[str]:
    """p2pd's command line, its control socket aside."""
    address = ip_address(config.host)
    listens = not (config.client_mode and address.is_loopback)
    options = [
        f"-id={identity_path}",
        f"-dht{'Client' if config.client_mode else 'Server'}=1",
        "-idleTimeout=30s",
        "-connManager=1",
        "-tls=1",
        f"-natPortMap={int(not address.is_loopback and listens)}",
        "-relay=0",  # ours are in swarm/relays.py
        "-connLo=1024",  # a bootstrap node holds a connection to every hidden server
        "-connHi=2048",
    ]
    if listens:
        options.append(f"-hostAddrs=/ip{address.version}/{address}/tcp/{config.port}")
    else:
        options.append("-noListenAddrs=1")
    if config.announce_host is not None:
        options.append(f"-announceAddrs=/{_multiaddr_host(config.announce_host)}/tcp/{config.port}")
    return options


def _multiaddr_host(host: str) -> str:
    try:
        return f"ip{ip_address(host).version}/{host}"
    except ValueError:
        return f"dns/{host}"


def parse_initial_peers(initial_peers: Sequence[str], own_peer_id: str) -> dict[str, list[str]]:
    """Addresses by peer id, without our own (a bootstrap node that was started with its own link)."""
    from hivemind.p2p import PeerID
    from hivemind.utils.multiaddr import Multiaddr

    peers: dict[str, list[str]] = {}
    for text in initial_peers:
        peer_id = text.rpartition("/p2p/")[2]
        try:
            Multiaddr(text)
            PeerID.from_base58(peer_id)
        except (ValueError, LookupError) as exc:
            raise BadRequest(
                f"initial peer {text!r} is not an address such as /ip4/192.0.2.1/tcp/31337/p2p/Qm…: "
                "copy it from the output of the peer that you want to join"
            ) from exc
        if peer_id != own_peer_id:
            peers.setdefault(peer_id, []).append(text)
    return peers


def usable_addresses(multiaddrs: Sequence[str], peer_id: str) -> list[bytes]:
    """Those that can be parsed, as bytes, without the peer's own id, which p2pd gets beside them."""
    addresses = []
    for text in multiaddrs:
        with contextlib.suppress(ValueError, LookupError):
            addresses.append(_encode_multiaddr(text.removesuffix(f"/p2p/{peer_id}")))
    return addresses


def _encode_multiaddr(text: str) -> bytes:
    """A multiaddr as p2pd reads it; hivemind's own encoding of the peer id within one (of a relay) is another."""
    from hivemind.p2p import PeerID
    from hivemind.utils.multiaddr import Multiaddr

    encoded = b""
    for position, part in enumerate(re.split(r"/p2p/([^/]+)", text)):
        if position % 2:
            multihash = PeerID.from_base58(part).to_bytes()
            encoded += _P2P_CODE + bytes([len(multihash)]) + multihash
        elif part:
            encoded += Multiaddr(part).to_bytes()
    return encoded


@contextmanager
def sole_use(path: Path) -> Iterator[None]:
    """Hold a lock on the identity file: two live nodes with one identity steal each other's messages."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise ResourceError(
                f"the identity {path} is in use by another running node: give each node its own identity file"
            ) from exc
        yield
