"""Whether others can dial this server, and how they reach it if they cannot: asked of peers, not assumed.

At start and now and then some peers of the swarm try this server's two ports (swarm/dial_back.py). Addresses under
which nobody reaches the gRPC port are not announced, as every client would lose time on them; where libp2p's port
cannot be dialled either, the server registers with relays (swarm/relays.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from ipaddress import ip_address
from typing import Any, Protocol

from swarm.dht import Dht
from swarm.dial_back import Reach, answer_dial_back, ask_some, libp2p_port
from swarm.pipes import cancel_all
from swarm.relays import Registrations, circuits, serve_relay

from .config import ServerConfig

logger = logging.getLogger(__name__)

MAX_CARRIED = 128
"""Connections that a server carries for hidden ones."""
UNKNOWN_PERIOD_S = 30.0
"""How often a server looks for somebody to ask, as long as nobody has tried its port."""
MAX_RELAY_ADDRESSES, MAX_ADDRESSES = 6, 16
"""Of all libp2p addresses that are announced, and of those through relays."""


class Say(Protocol):
    """Changes fields of the announcement."""

    async def __call__(self, **changes: Any) -> None: ...


class Reachability:
    """Where others can call this server; get one from `open_reachability`."""

    def __init__(self, dht: Dht, config: ServerConfig, port: int, certificate_der: bytes) -> None:
        self.direct: list[str] = []
        """"host:port" of the gRPC port, as announced."""
        self.multiaddrs: list[str] = []
        """libp2p addresses, those through relays first."""
        self._dht = dht
        self._config = config
        self._port = port
        self._certificate_der = certificate_der
        self._registrations = Registrations(dht, dht.known_peers, self._relays_changed)
        self._registering: asyncio.Task[None] | None = None
        self._own: list[str] = []
        self._reach: Reach | None = None
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
        """Ask some peers; register with relays if need be."""
        self._own = await self._dht.multiaddrs()
        reach, libp2p = Reach(), Reach()
        if not ip_address(self._config.host).is_loopback:
            peers = list(self._dht.known_peers())
            libp2p = await ask_some(self._dht, peers, libp2p_port(self._own))
            if not self._config.tunnel_only:
                reach = await ask_some(self._dht, peers, self._port, self._certificate_der)
        if libp2p.is_hidden and not reach.reached and self._registering is None:
            await self._registrations.fill()
            self._registering = asyncio.create_task(self._registrations.run())
        if self._reach is None or reach.is_hidden != self._reach.is_hidden:
            self._log(reach)
        self._reach = reach
        direct = [] if self._config.tunnel_only else choose_direct(direct_hosts(self._own), reach, self._port)
        if direct != self.direct:
            self.direct = direct
            self._changed.set()
        self._relays_changed()

    async def keep_checking(self) -> None:
        """Check now and then, until cancelled."""
        while True:
            known = self._reach is not None and (self._reach.reached or self._reach.missed)
            period_s = self._config.reachability_period_s
            await asyncio.sleep(period_s if known else min(period_s, UNKNOWN_PERIOD_S))
            await self.check()

    async def aclose(self) -> None:
        """Leave the relays."""
        if self._registering is not None:
            await cancel_all({self._registering})
        await self._registrations.aclose()

    def _relays_changed(self) -> None:
        through = circuits(self._registrations.addresses, self._dht.peer_id)[:MAX_RELAY_ADDRESSES]
        multiaddrs = [*through, *self._own][:MAX_ADDRESSES]
        if multiaddrs != self.multiaddrs:
            self.multiaddrs = multiaddrs
            self._changed.set()

    def _log(self, reach: Reach) -> None:
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
        own: hosts that this server takes to be its own, names included.
    """
    hosts = [] if reach.is_hidden else [*reach.reached, *(host for host in own if host not in reach.missed)]
    return [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in dict.fromkeys(hosts)][:8]


@asynccontextmanager
async def open_reachability(
    dht: Dht, config: ServerConfig, port: int, certificate_der: bytes
) -> AsyncIterator[Reachability]:
    """Find out where others can call this server, before it announces itself; see to it until the context ends.

    It also answers the same question for others, and relays for them where it can be dialled itself.
    """
    async with AsyncExitStack() as owned:
        relays = config.relay and not dht.hidden
        if relays:
            await owned.enter_async_context(serve_relay(dht, max_carried=MAX_CARRIED))
        await owned.enter_async_context(answer_dial_back(dht.p2p, relays=relays))
        reachability = Reachability(dht, config, port, certificate_der)
        owned.push_async_callback(reachability.aclose)
        await reachability.check()
        reachability._changed.clear()  # what was found is in the first announcement
        checking = asyncio.create_task(reachability.keep_checking())
        owned.push_async_callback(cancel_all, {checking})
        yield reachability
