"""Whether others can dial this server, and how they reach it if they cannot: asked of peers, not assumed.

At start and now and then, some peers of the swarm try this server's two ports (swarm/dial_back.py). Addresses under
which nobody reaches the gRPC port are not announced, as every client would lose time on them; where libp2p's port
cannot be dialled either, the server registers with relays (swarm/relays.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from ipaddress import ip_address
from typing import Any, Protocol

from swarm.dht import Dht
from swarm.dial_back import DIAL_TIMEOUT_S, answer_dial_back, ask_some
from swarm.dialling import UntilSeenOutside
from swarm.errors import PeerError
from swarm.pipes import cancel_all
from swarm.reach import Reach, host_of, judge, libp2p_port, neighbours, outside_first
from swarm.relaying import serve_relay
from swarm.relays import Registrations, circuits

from .config import ServerConfig

logger = logging.getLogger(__name__)

NEIGHBOURS_PERIOD_S = 10.0
"""How often it is looked whether servers of our own network have become known."""

UNKNOWN_PERIOD_S = 30.0
"""How often a server looks for somebody to ask, as long as nobody has tried its port."""
FIRST_RELAY_TIMEOUT_S = 10.0
"""How long a server waits for relays before it announces itself; it goes on looking."""
MAX_RELAY_ADDRESSES, MAX_ADDRESSES = 6, 16
"""Of the libp2p addresses that are announced: through relays, and in all."""


class Say(Protocol):
    """Changes fields of the announcement."""

    async def __call__(self, **changes: Any) -> object: ...


Forget = Callable[[str], Awaitable[None]]
"""Lets the next call to a peer connect anew."""


class Reachability:
    """Where others can call this server; get one from `open_reachability`."""

    def __init__(
        self,
        dht: Dht,
        config: ServerConfig,
        port: int,
        certificate_der: bytes,
        rule: UntilSeenOutside,
        forget: Forget,
    ) -> None:
        self.direct: list[str] = []
        """"host:port" of the gRPC port, as announced."""
        self.multiaddrs: list[str] = []
        """libp2p addresses, those through relays first."""
        self._dht = dht
        self._config = config
        self._port = port
        self._certificate_der = certificate_der
        self._rule = rule
        self._forget = forget
        self._neighbours: set[str] = set()
        self._tried: dict[str, list[str]] = {}
        """Where peers that may be neighbours were dialled since the last check."""
        self._registrations = Registrations(dht, dht.known_peers, self._relays_changed)
        self._registering: asyncio.Task[None] | None = None
        self._own: list[str] = []
        self._reach, self._libp2p = Reach(), Reach()
        self._logged: Reach | None = None
        self._changed = asyncio.Event()

    @property
    def relays(self) -> Collection[str]:
        """Peer ids of the relays that carry connections to this server, at any time."""
        return self._registrations.addresses.keys()

    @asynccontextmanager
    async def telling(self, say: Say) -> AsyncIterator[None]:
        """Announce the addresses whenever they have changed, while the body runs."""

        async def tell() -> None:
            while True:
                await self._changed.wait()
                self._changed.clear()
                await say(direct=self.direct, multiaddrs=self.multiaddrs)

        task = asyncio.create_task(tell())
        try:
            yield
        finally:
            await cancel_all({task})

    async def check(self) -> None:
        """Ask some peers; register with relays if need be. What nobody could say this time stays as it was."""
        self._own = await self._dht.multiaddrs()
        self._tried.clear()
        if not ip_address(self._config.host).is_loopback:
            port = 0 if self._config.tunnel_only else self._port
            self._libp2p, self._reach = await asyncio.gather(
                self._ask(self._libp2p, libp2p_port(self._own)), self._ask(self._reach, port, self._certificate_der)
            )
        await self._register(needs_relays(self._reach, self._libp2p))
        self._log(self._reach)
        direct = [] if self._config.tunnel_only else choose_direct(direct_hosts(self._own), self._reach, self._port)
        if direct != self.direct:
            self.direct = direct
            self._changed.set()
        self._relays_changed()

    async def keep_checking(self) -> None:
        """Check now and then, until cancelled."""
        period_s = self._config.reachability_period_s
        soon_s = min(period_s, UNKNOWN_PERIOD_S)
        await asyncio.sleep(soon_s)
        while True:
            await self.check()
            rest_s = period_s if self._libp2p.is_known else soon_s
            while rest_s > 0:
                await self._meet_neighbours()
                await asyncio.sleep(min(rest_s, NEIGHBOURS_PERIOD_S))
                rest_s -= NEIGHBOURS_PERIOD_S

    async def _meet_neighbours(self) -> None:
        """Connect to servers in our own network: what strangers say leads nowhere there, existing connections do.

        Two hidden servers of one home would otherwise call each other through a relay.
        """
        near = neighbours(self._dht.known_peers(), list(map(host_of, self._own)))
        new = {peer_id: addresses for peer_id, addresses in near.items() if self._tried.get(peer_id) != addresses}
        self._tried.update(new)
        dials = (self._dht.connect(each, new[each], timeout_s=DIAL_TIMEOUT_S) for each in new)
        results = dict(zip(new, await asyncio.gather(*dials, return_exceptions=True), strict=True))
        for peer_id, failure in results.items():
            if isinstance(failure, PeerError):
                self._neighbours.discard(peer_id)
            elif failure is not None:
                raise failure
            elif peer_id not in self._neighbours:
                self._neighbours.add(peer_id)
                logger.info("peer %s is in the same network", peer_id)
                await self._forget(peer_id)

    async def aclose(self) -> None:
        """Leave the relays."""
        await self._register(False)

    async def _ask(self, before: Reach, port: int, certificate_der: bytes = b"") -> Reach:
        """Ask some peers about a port; once more if it could be reached before and cannot be now.

        Returns: `before` if nobody could say.
        """
        peers = outside_first(self._dht.known_peers()) if port else {}
        own = list(map(host_of, self._own))
        for _ in range(2):
            seen = await ask_some(self._dht, peers, port, certificate_der)
            reach = judge(seen, trusted=self._dht.initial_peer_ids, own=own)
            if not (reach.is_hidden and before.reached):
                break
        for host in (*reach.reached, *reach.missed):
            self._rule.note(host)
        return reach if reach.is_known else before

    async def _register(self, wanted: bool) -> None:
        """Begin to register with relays, or leave them."""
        if wanted and self._registering is None:
            self._registering = asyncio.create_task(self._registrations.run())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FIRST_RELAY_TIMEOUT_S):
                    await self._registrations.looked.wait()
        elif not wanted and self._registering is not None:
            await cancel_all({self._registering})
            self._registering = None
            await self._registrations.aclose()

    def _relays_changed(self) -> None:
        through = circuits(self._registrations.addresses, self._dht.peer_id)[:MAX_RELAY_ADDRESSES]
        multiaddrs = [*through, *self._own][:MAX_ADDRESSES]
        if multiaddrs != self.multiaddrs:
            self.multiaddrs = multiaddrs
            self._changed.set()

    def _log(self, reach: Reach) -> None:
        if reach == self._logged:
            return
        self._logged = reach
        if reach.is_hidden:
            logger.warning(
                "TCP port %d is not reachable from outside (tried: %s): open it in this machine's firewall and forward "
                "it on your router, or leave it: clients come through %s",
                self._port, ", ".join(reach.missed),
                "a relay" if self.relays else "the tunnel" if self._registering is None else
                "a relay as soon as one is found; nobody relays in this swarm yet, `swarm dht` does",
            )  # fmt: skip
        elif reach.reached:
            logger.info("TCP port %d is reachable from outside: %s", self._port, ", ".join(reach.reached))


def needs_relays(reach: Reach, libp2p: Reach) -> bool:
    """Whether somebody who can dial neither the gRPC port nor libp2p's would be left without a way.

    An address that was missed counts although another one was reached: not everybody speaks both IPv4 and IPv6.
    """
    if not libp2p.is_known:
        return reach.is_hidden
    return bool(libp2p.missed) and (bool(reach.missed) or not reach.reached)


def direct_hosts(multiaddrs: Sequence[str]) -> list[str]:
    """The hosts that the DHT node is visible at; loopback only if there is nothing else."""
    hosts = []
    for parts in (text.split("/") for text in multiaddrs):
        if len(parts) > 2 and parts[1] in ("ip4", "ip6", "dns", "dns4", "dns6") and parts[2] not in hosts:
            hosts.append(parts[2])
    return [host for host in hosts if not (host.startswith("127.") or host == "::1")] or hosts


def choose_direct(own: Sequence[str], reach: Reach, port: int) -> list[str]:
    """host:port of those hosts that are worth dialling: reached ones first; none if nobody reached any.

    Args:
        own: hosts that this server takes to be its own, names included, as in `direct_hosts`.
    """
    reached = [host for host in reach.reached if host in own or not ip_address(host).is_loopback]
    hosts = [] if reach.is_hidden else [*reached, *(host for host in own if host not in reach.missed)]
    return [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in dict.fromkeys(hosts)][:8]


@asynccontextmanager
async def open_reachability(
    dht: Dht, config: ServerConfig, port: int, certificate_der: bytes, rule: UntilSeenOutside, forget: Forget
) -> AsyncIterator[Reachability]:
    """Find out where others can call this server, before it announces itself; see to it until the context ends.

    It also answers the same question for others, and relays for them where it can be dialled itself.

    Args:
        rule: what this server dials for strangers; it is told whether the internet reaches this server.
        forget: called with the peers that turn out to be in the same network.
    """
    async with AsyncExitStack() as owned:
        relays = config.relay is not None and not dht.hidden
        if relays:
            await owned.enter_async_context(serve_relay(dht, config.relay))
        await owned.enter_async_context(answer_dial_back(dht.p2p, rule, relays=relays))
        reachability = Reachability(dht, config, port, certificate_der, rule, forget)
        owned.push_async_callback(reachability.aclose)
        await reachability.check()
        reachability._changed.clear()  # what was found is in the first announcement
        checking = asyncio.create_task(reachability.keep_checking())
        owned.push_async_callback(cancel_all, {checking})
        yield reachability
