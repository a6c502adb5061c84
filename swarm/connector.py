"""Opening the channels to peers, with all the ways that lead to them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from swarm.dht import Dht
from swarm.dialling import Anywhere, DiallingRule
from swarm.p2pd import finish
from swarm.peers import Connector
from swarm.pipes import cancel_all
from swarm.punching import WAITS_S, Puncher
from swarm.rpc_members import call_signer
from swarm.tunnel import Way, open_tunnel


@asynccontextmanager
async def open_connector(
    dht: Dht,
    *,
    rule: DiallingRule | None = None,
    connect_timeout_s: float = 3.0,
    waits_s: Sequence[float] = WAITS_S,
    on_way: Callable[[Way], None] | None = None,
) -> AsyncIterator[tuple[Connector, Puncher]]:
    """Channels to peers, through the tunnel where need be, and what finds direct ways to these meanwhile.

    Args:
        rule, connect_timeout_s: see Connector.
        waits_s: see Puncher.
        on_way: see `open_tunnel`.
    """
    puncher = Puncher(dht, rule or Anywhere(), waits_s=waits_s)

    @asynccontextmanager
    async def open_noted(peer_id: str, multiaddrs: tuple[str, ...]) -> AsyncIterator[str]:
        ours = ""

        def note(way: Way) -> None:
            nonlocal ours
            connector.ways[peer_id] = ours = str(way)
            if on_way is not None:
                on_way(way)

        async with open_tunnel(dht, peer_id, multiaddrs, on_way=note, puncher=puncher) as target:
            try:
                yield target
            finally:
                if connector.ways.get(peer_id) == ours:  # else there is a newer one
                    del connector.ways[peer_id]

    connector = Connector(
        open_noted,
        rule=rule,
        connect_timeout_s=connect_timeout_s,
        sign=None if dht.gate is None else call_signer(dht.gate, dht.identity),
    )
    puncher.renew = connector.renew
    cutting: set[asyncio.Task[None]] = set()

    def cut_off_revoked() -> None:
        assert dht.gate is not None
        task = asyncio.create_task(connector.cut_off(dht.gate.was_revoked))
        cutting.add(task)
        task.add_done_callback(cutting.discard)

    if dht.gate is not None:
        dht.gate.on_revoked.append(cut_off_revoked)
    try:
        yield connector, puncher
    finally:
        if dht.gate is not None:
            dht.gate.on_revoked.remove(cut_off_revoked)
        await finish(cancel_all(cutting))
        await finish(puncher.aclose())
        await finish(connector.aclose())
