"""hivemind's own DHT for peers that train together, which find one another through the swarm's.

`hivemind.Optimizer` and its averagers keep records in a DHT that nodes of the swarm refuse to store, as nobody of the
swarm has signed them (swarm/dht_records.py). So the peers of a run have a DHT of their own, and the swarm's says where
they are (`Directory.meet`). Every peer starts a node that knows nobody, is found, and greets those that it finds: of
two that begin at the same time, one sees the other.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from swarm.errors import ResourceError

if TYPE_CHECKING:
    from hivemind import DHT

logger = logging.getLogger(__name__)

GREET_TIMEOUT_S = 5.0
"""How long connecting to one peer may take."""

END_TIMEOUT_S = 10.0
"""How long a node may take to end."""


def start_training_dht(host_maddrs: Sequence[str], options: dict[str, Any]) -> DHT:
    """Start a hivemind DHT node that knows nobody; it forks.

    Args:
        host_maddrs: where it listens, such as /ip4/0.0.0.0/tcp/0.
        options: what else hivemind.DHT takes, such as announce_maddrs or use_auto_relay.
    Raises: ResourceError: it does not start, for instance as a port is in use.
    """
    from hivemind import DHT
    from hivemind.p2p import P2PDaemonError

    # When an averager ends, questions of its process are left in the DHT's, which reports each with a traceback.
    logging.getLogger("hivemind.dht.dht").setLevel(logging.CRITICAL)
    try:
        return DHT(start=True, host_maddrs=list(host_maddrs), **options)
    except (P2PDaemonError, OSError) as exc:
        raise ResourceError(f"hivemind's DHT does not start on {', '.join(host_maddrs)}: {exc}") from exc


def addresses_of(dht: DHT) -> list[str]:
    """Where other peers can dial a node, its id included."""
    return [str(address) for address in dht.get_visible_maddrs(latest=True)]


def end_training_dht(dht: DHT) -> None:
    """End a node, and its p2pd; hivemind's own way waits for messages of processes that are gone, and complains."""
    if dht.is_alive():
        dht.run_coroutine(_end, return_future=True)
        dht.join(END_TIMEOUT_S)
        if dht.is_alive():
            dht.kill()


def greet(dht: DHT, multiaddrs: Sequence[str]) -> bool:
    """Let a node and the one at these addresses know each other; False: that one does not answer."""
    return bool(dht.run_coroutine(partial(_greet, multiaddrs=tuple(multiaddrs))))


async def _greet(_dht: DHT, node: Any, *, multiaddrs: Sequence[str]) -> bool:
    """Runs in hivemind's process."""
    import asyncio

    from hivemind.p2p import P2PDaemonError, PeerID
    from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure
    from hivemind.utils.multiaddr import Multiaddr

    own, _, name = multiaddrs[0].rpartition("/p2p/")
    try:
        peer_id = PeerID.from_base58(name)
        addresses = [Multiaddr(each.removesuffix(f"/p2p/{name}")) for each in multiaddrs]
    except (ValueError, LookupError) as exc:
        logger.debug("not an address of a peer, %s: %s", own, exc)
        return False
    if peer_id == node.peer_id:
        return True
    try:
        async with asyncio.timeout(GREET_TIMEOUT_S):
            await node.p2p._client.connect(peer_id, addresses)
            node_id = await node.protocol.call_ping(peer_id)
    except (TimeoutError, ControlFailure, P2PDaemonError, OSError, EOFError) as exc:
        logger.debug("peer %s of a training run cannot be reached: %r", name, exc)
        return False
    if node_id is None:
        return False
    await node.protocol.update_routing_table(node_id, peer_id)
    return True


async def _end(_dht: DHT, node: Any) -> None:
    """Runs in hivemind's process, and ends it."""
    import os

    try:
        await node.shutdown()
    finally:
        os._exit(0)
