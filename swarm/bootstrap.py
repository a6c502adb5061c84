"""A bare DHT node: the fixed point through which others join a swarm, and a relay for those behind NAT."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack

from swarm.dht import DhtConfig, open_dht
from swarm.dial_back import answer_dial_back
from swarm.dialling import UntilSeenOutside, rule_for
from swarm.errors import ResourceError
from swarm.reach import libp2p_port
from swarm.relaying import RelayConfig, serve_relay

logger = logging.getLogger(__name__)


async def run_bootstrap(
    config: DhtConfig, stop: asyncio.Event, on_ready: Callable[[list[str]], None], *, relay: RelayConfig | None = None
) -> None:
    """Run a DHT node until `stop` is set.

    Args:
        relay: how much it carries to servers that nobody can dial; None: nothing.
        on_ready: called once with the multiaddrs that others join through.
    Raises:
        ResourceError: the node's libp2p daemon ended by itself.
        Others: see open_dht.
    """
    async with AsyncExitStack() as owned:
        dht = await owned.enter_async_context(open_dht(config))
        if dht.hidden:
            logger.warning(
                "others cannot dial this node, so they cannot join through it: open TCP port %d in this machine's "
                "firewall and forward it on its router",
                libp2p_port(await dht.multiaddrs()),
            )
        relays = relay is not None and not dht.hidden
        if relays:
            await owned.enter_async_context(serve_relay(dht, relay))
        rule = UntilSeenOutside(await rule_for(await dht.multiaddrs()))
        await owned.enter_async_context(answer_dial_back(dht.p2p, rule, relays=relays))
        on_ready(await dht.multiaddrs())
        stopping = asyncio.create_task(stop.wait())
        ended = asyncio.create_task(dht.wait_stopped())
        try:
            await asyncio.wait({stopping, ended}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            ended.cancel()
        if not stop.is_set():
            raise ResourceError("the libp2p daemon of this node ended by itself: start the node again")
