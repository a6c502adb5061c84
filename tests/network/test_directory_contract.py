"""What every Directory does, the fake and the real one alike."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import pytest

from swarm.announcement import MAX_ANNOUNCEMENT_BYTES, Announcement, ModelListing
from swarm.dht import Dht, DhtConfig, open_dht
from swarm.directory import MAX_LIFETIME_S, Directory, MemoryDirectory, MemoryStore
from swarm.errors import BadRequest
from swarm.identity import Identity

MODEL = "f" * 64

Make = Callable[..., Announcement]


@dataclass
class Clock:
    ahead_s: float = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead_s


@dataclass
class Peers:
    """Three peers of one swarm; `plant(i, data)` makes peer i publish any bytes in its own name."""

    directories: list[Directory]
    peer_ids: list[str]
    plant: Callable[[int, bytes], Awaitable[None]]
    clock: Clock = field(default_factory=Clock)

    async def states(self, reader: int = 2, fingerprint: str = MODEL) -> dict[int, str]:
        found = await self.directories[reader].servers(fingerprint)
        return {self.peer_ids.index(announcement.peer_id): announcement.state for announcement in found}


async def _open_memory(owned: AsyncExitStack, identities: list[Identity]) -> Peers:
    clock, store = Clock(), MemoryStore()
    peer_ids = [identity.peer_id for identity in identities[:3]]

    async def plant(peer: int, data: bytes) -> None:
        store.records[peer_ids[peer]] = data

    return Peers([MemoryDirectory(store, clock=clock) for _ in peer_ids], peer_ids, plant, clock)


async def _open_hivemind(owned: AsyncExitStack, identities: list[Identity]) -> Peers:
    from swarm.dht_records import MODELS_KEY, RECORD_LIFETIME_S, model_key

    clock = Clock()
    nodes: list[Dht] = []
    for identity in identities[:3]:
        peers = tuple(await nodes[0].multiaddrs()) if nodes else ()
        nodes.append(
            await owned.enter_async_context(open_dht(DhtConfig(initial_peers=peers, identity_path=identity.path)))
        )
        nodes[-1].directory._clock._clock = clock

    async def plant(peer: int, data: bytes) -> None:
        directory = nodes[peer].directory
        keys = [model_key(MODEL), MODELS_KEY]
        await directory._node.store_many(
            keys, [data, data], clock() + RECORD_LIFETIME_S, [directory._validator.local_public_key] * 2
        )

    return Peers([node.directory for node in nodes], [node.peer_id for node in nodes], plant, clock)


@pytest.fixture(params=[_open_memory, _open_hivemind], ids=["memory", "hivemind"])
async def peers(request: pytest.FixtureRequest, identities: list[Identity]) -> AsyncIterator[Peers]:
    async with AsyncExitStack() as owned:
        yield await request.param(owned, identities)


async def test_everybody_finds_what_was_announced(peers: Peers, make_announcement: Make) -> None:
    first = make_announcement(peers.peer_ids[0], end=2)
    second = make_announcement(peers.peer_ids[1], start=2)
    await peers.directories[0].announce(first)
    await peers.directories[1].announce(second)
    expected = sorted([first, second], key=lambda announcement: announcement.peer_id)
    for directory in peers.directories:
        assert await directory.servers(MODEL) == expected
    assert peers.directories[0].statistics().num_announced == 1
    assert peers.directories[0].statistics().num_reads == 1


async def test_announcement_replaces_the_peers_earlier_one(peers: Peers, make_announcement: Make) -> None:
    expires_at_s = time.time() + 60
    for state in ("joining", "online", "draining"):
        await peers.directories[0].announce(
            make_announcement(peers.peer_ids[0], state=state, expires_at_s=expires_at_s)
        )
        assert await peers.states() == {0: state}
        expires_at_s -= 1  # the last word counts, not the one that holds longest


async def test_announcement_disappears_when_it_expires(peers: Peers, make_announcement: Make) -> None:
    await peers.directories[0].announce(make_announcement(peers.peer_ids[0]))
    await peers.directories[1].announce(make_announcement(peers.peer_ids[1], expires_at_s=time.time() + 300))
    peers.clock.ahead_s = 61
    assert await peers.states() == {1: "online"}
    peers.clock.ahead_s = 301
    assert await peers.states() == {}
    assert await peers.directories[2].models() == []


async def test_withdrawn_announcement_is_gone_at_once(peers: Peers, make_announcement: Make) -> None:
    announcement = make_announcement(peers.peer_ids[0])
    await peers.directories[0].announce(announcement)
    await peers.directories[1].announce(make_announcement(peers.peer_ids[1]))
    await peers.directories[0].withdraw(announcement)
    assert await peers.states() == {1: "online"}
    await peers.directories[0].withdraw(announcement)  # twice does no harm
    await peers.directories[0].announce(announcement)  # and it may come back
    assert await peers.states() == {0: "online", 1: "online"}


async def test_two_models_are_kept_apart(peers: Peers, make_announcement: Make) -> None:
    await peers.directories[0].announce(make_announcement(peers.peer_ids[0]))
    await peers.directories[1].announce(
        make_announcement(peers.peer_ids[1], model_name="other", model_fingerprint="0" * 64, hidden_size=16)
    )
    assert await peers.states() == {0: "online"}
    assert await peers.states(fingerprint="0" * 64) == {1: "online"}
    assert await peers.states(fingerprint="unknown") == {}
    assert await peers.directories[2].models() == [
        ModelListing("other", "0" * 64, 4, 16),
        ModelListing("tiny", MODEL, 4, 8),
    ]


async def test_model_is_listed_once_however_many_serve_it(peers: Peers, make_announcement: Make) -> None:
    for peer in range(3):
        await peers.directories[peer].announce(make_announcement(peers.peer_ids[peer]))
    assert await peers.directories[2].models() == [ModelListing("tiny", MODEL, 4, 8)]


async def test_peer_that_changes_its_model_leaves_the_old_one(peers: Peers, make_announcement: Make) -> None:
    await peers.directories[0].announce(make_announcement(peers.peer_ids[0]))
    await peers.directories[0].announce(make_announcement(peers.peer_ids[0], model_fingerprint="0" * 64))
    assert await peers.states() == {}
    assert await peers.states(fingerprint="0" * 64) == {0: "online"}
    assert [listing.fingerprint for listing in await peers.directories[2].models()] == ["0" * 64]


async def test_announcement_for_another_peer_is_dropped(peers: Peers, make_announcement: Make) -> None:
    await peers.directories[0].announce(make_announcement(peers.peer_ids[0]))
    await peers.plant(1, make_announcement(peers.peer_ids[0], state="draining").to_bytes())
    assert await peers.states() == {0: "online"}
    assert peers.directories[2].statistics().num_dropped == 1


async def test_malformed_records_are_dropped(peers: Peers, make_announcement: Make) -> None:
    await peers.directories[0].announce(make_announcement(peers.peer_ids[0]))
    for data in (b"\xff\xfe", b"{}", b"[]", b'{"expires_at_s": 1e999}', b"x" * MAX_ANNOUNCEMENT_BYTES, b"\xc1"):
        await peers.plant(1, data)
        before = peers.directories[2].statistics().num_dropped
        assert await peers.states() == {0: "online"}
        assert [listing.name for listing in await peers.directories[2].models()] == ["tiny"]
        assert peers.directories[2].statistics().num_dropped > before


async def test_oversized_record_is_dropped(peers: Peers, make_announcement: Make) -> None:
    await peers.directories[0].announce(make_announcement(peers.peer_ids[0]))
    await peers.plant(1, b'{"name": "' + b"x" * 200_000 + b'"}')
    for reader in range(3):
        assert await peers.states(reader) == {0: "online"}


async def test_announcement_must_expire_soon_but_not_yet(peers: Peers, make_announcement: Make) -> None:
    for lifetime_s in (-1.0, MAX_LIFETIME_S + 60):
        with pytest.raises(BadRequest, match="expires_at_s"):
            await peers.directories[0].announce(
                make_announcement(peers.peer_ids[0], expires_at_s=time.time() + lifetime_s)
            )
    assert await peers.states() == {}


async def test_text_that_looks_like_a_signature_is_harmless(peers: Peers, make_announcement: Make) -> None:
    announcement = make_announcement(peers.peer_ids[0], server_name="[signature:abc] [owner:x]")
    await peers.directories[0].announce(announcement)
    assert await peers.directories[2].servers(MODEL) == [announcement]
