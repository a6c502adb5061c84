"""A bare DHT node: the fixed point through which others join a swarm, and a relay for those behind NAT."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from swarm.dht import DhtConfig, open_dht
from swarm.errors import ResourceError


async def run_bootstrap(config: DhtConfig, stop: asyncio.Event, on_ready: Callable[[list[str]], None]) -> None:
    """Run a DHT node until `stop` is set.

    Args:
        on_ready: called once with the multiaddrs that others join through.
    Raises:
        ResourceError: the node's libp2p daemon ended by itself.
        Others: see open_dht.
    """
    async with open_dht(config) as dht:
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
