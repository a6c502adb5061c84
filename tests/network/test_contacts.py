"""A node stays in its swarm while everybody else is replaced, and finds back after moments without anybody."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from contextlib import AsyncExitStack

import psutil
import pytest

from swarm.announcement import Announcement
from swarm.dht import Dht, DhtConfig, open_dht
from swarm.dht_contacts import MAX_DIALS, MAX_MET, KnownPeers
from swarm.errors import PeerUnavailable
from swarm.identity import Identity

MODEL = "f" * 64

Make = Callable[..., Announcement]


def test_initial_peers_are_never_forgotten_and_of_others_the_last_met_are_tried_first() -> None:
    known = KnownPeers({"initial": ["a"]}, "self")
    for number in range(MAX_MET + 5):
        known.meet(f"peer {number}", [f"address {number}"])
    known.meet("self", ["ours"])
    newest = [f"peer {MAX_MET + 4 - number}" for number in range(MAX_DIALS)]
    assert list(known.candidates()) == ["initial", *newest]
    for peer_id in newest:
        known.try_last(peer_id)
    assert list(known.candidates())[1] == f"peer {MAX_MET + 4 - MAX_DIALS}"
    known.meet(newest[3])
    assert list(known.candidates().items())[1] == (newest[3], [f"address {MAX_MET + 4 - 3}"])


def test_every_known_address_of_a_peer_is_tried() -> None:
    known = KnownPeers({"moved": ["old"]}, "self")
    known.meet("moved", ["new"])
    known.meet("moved")
    assert known.candidates() == {"moved": ["new", "old"]}
    known.meet("moved", ["newest", "new"])
    assert known.candidates() == {"moved": ["newest", "new", "old"]}


async def _join(owned: AsyncExitStack, through: Dht | None = None, **config: object) -> Dht:
    peers = tuple(await through.multiaddrs()) if through else ()
    return await owned.enter_async_context(open_dht(DhtConfig(initial_peers=peers, **config)))


async def _announcement(node: Dht, make_announcement: Make, **changes: object) -> Announcement:
    return make_announcement(node.peer_id, multiaddrs=await node.multiaddrs(), **changes)


def _forget_all(node: Dht) -> None:
    """What hivemind does, peer by peer, when a call is not answered in time."""
    table = node._node.protocol.routing_table
    for node_id in list(table.peer_id_to_uid.values()):
        del table[node_id]


async def _freeze(node: Dht) -> None:
    """Let a node's connections stay open and nothing answer."""
    os.kill(node._daemon.pid, signal.SIGSTOP)
    async with asyncio.timeout(5):
        while psutil.Process(node._daemon.pid).status() != psutil.STATUS_STOPPED:
            await asyncio.sleep(0.001)


async def _found_by(client: Dht) -> list[str]:
    return [announcement.peer_id for announcement in await client.directory.servers(MODEL)]


async def test_client_stays_while_everybody_is_replaced_over_and_over(make_announcement: Make) -> None:
    async with AsyncExitStack() as owned, AsyncExitStack() as leaving:
        server = await _join(leaving)
        client = await _join(owned, server, client_mode=True)
        for _ in range(4):
            successor_owned = await owned.enter_async_context(AsyncExitStack())
            successor = await _join(successor_owned, server)
            await successor.directory.announce(await _announcement(successor, make_announcement))
            assert successor.peer_id in await _found_by(client)
            await leaving.aclose()
            leaving, server = successor_owned, successor
            _forget_all(client)
            assert server.peer_id in await _found_by(client)  # beside those that left and have not expired yet


async def test_moment_in_which_nobody_answers_is_survived(make_announcement: Make) -> None:
    async with AsyncExitStack() as owned, AsyncExitStack() as leaving:
        initial = await _join(leaving)
        client = await _join(owned, initial, client_mode=True)
        server = await _join(owned, initial)
        await server.directory.announce(await _announcement(server, make_announcement))
        assert await _found_by(client) == [server.peer_id]
        await leaving.aclose()
        await _freeze(server)
        try:
            with pytest.raises(PeerUnavailable, match="nor any of 1 others"):  # not: "there are no servers"
                await _found_by(client)
        finally:
            os.kill(server._daemon.pid, signal.SIGCONT)
        assert await _found_by(client) == [server.peer_id]


async def test_servers_whose_initial_peers_are_gone_find_each_other(make_announcement: Make) -> None:
    async with AsyncExitStack() as owned, AsyncExitStack() as leaving:
        initial = await _join(leaving)
        servers = [await _join(owned, initial) for _ in range(2)]
        for server in servers:
            await server.directory.announce(await _announcement(server, make_announcement))
        await leaving.aclose()
        for server in servers:
            _forget_all(server)
        for server in servers:
            await server.directory.announce(await _announcement(server, make_announcement))
        for server in servers:
            assert await _found_by(server) == sorted(each.peer_id for each in servers)


async def test_last_one_of_a_swarm_is_still_found(make_announcement: Make, identities: list[Identity]) -> None:
    async with AsyncExitStack() as owned, AsyncExitStack() as leaving:
        initial = await _join(leaving)
        client = await _join(owned, initial, client_mode=True)
        server = await _join(owned, initial)
        await server.directory.announce(await _announcement(server, make_announcement))
        assert await _found_by(client) == [server.peer_id]
        await leaving.aclose()
        renewed = await _announcement(server, make_announcement, expires_at_s=time.time() + 300)
        with pytest.raises(PeerUnavailable, match="none of the initial peers answers"):
            await server.directory.announce(renewed)  # its owner should know that nobody can join through it
        [found] = await client.directory.servers(MODEL)
        assert found.expires_at_s == pytest.approx(renewed.expires_at_s, abs=1)


async def test_missing_initial_peers_are_looked_for_without_delaying_reads(make_announcement: Make) -> None:
    async with AsyncExitStack() as owned, AsyncExitStack() as leaving:
        initial = await _join(leaving)
        other = await _join(owned, initial)
        await other.directory.announce(await _announcement(other, make_announcement))
        peers = (*await initial.multiaddrs(), *await other.multiaddrs())
        client = await owned.enter_async_context(open_dht(DhtConfig(initial_peers=peers, client_mode=True)))
        await leaving.aclose()
        async with await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0) as hanging:
            address = f"/ip4/127.0.0.1/tcp/{hanging.sockets[0].getsockname()[1]}"
            client._known.initial[initial.peer_id] = (address,)
            table = client._node.protocol.routing_table
            del table[table.get(peer_id=next(each for each in table.peer_id_to_uid if str(each) == initial.peer_id))]
            assert await _found_by(client) == [other.peer_id]
            looking = client._contacts._looking
            assert looking is not None and not looking.done()
