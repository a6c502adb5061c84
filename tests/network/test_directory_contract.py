"""What every Directory does, the fake and the real one alike."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

import pytest

from swarm.announcement import MAX_ANNOUNCEMENT_BYTES, Announcement, ModelListing, Participant
from swarm.buckets import MODELS, servers_root
from swarm.dht import Dht, DhtConfig, open_dht
from swarm.directory import MAX_LIFETIME_S, BucketDirectory, SwarmClock
from swarm.errors import BadRequest
from swarm.identity import Identity
from swarm.memory_directory import MemoryDirectory, MemoryStore

MODEL = "f" * 64

Make = Callable[..., Announcement]


@dataclass
class Clock:
    ahead_s: float = 0.0

    def wall_s(self) -> float:
        return time.time() + self.ahead_s

    def steady_s(self) -> float:
        return time.monotonic() + self.ahead_s

    def for_swarm(self) -> SwarmClock:
        return SwarmClock(self.wall_s, self.steady_s)


@dataclass
class Peers:
    """Three peers of one swarm."""

    directories: list[BucketDirectory]
    peer_ids: list[str]
    clock: Clock

    async def plant(self, peer: int, data: bytes) -> None:
        """Make a peer publish any bytes in its own name."""
        for bucket in (servers_root(MODEL), MODELS):
            await self.directories[peer]._shelves.write(bucket, data, 60.0)

    async def states(self, reader: int = 2, fingerprint: str = MODEL) -> dict[int, str]:
        found = await self.directories[reader].servers(fingerprint)
        return {self.peer_ids.index(announcement.peer_id): announcement.state for announcement in found}


async def _open_memory(owned: AsyncExitStack, identities: list[Identity]) -> Peers:
    clock, store = Clock(), MemoryStore()
    peer_ids = [identity.peer_id for identity in identities[:3]]
    directories = [MemoryDirectory(store, peer_id=peer_id, clock=clock.for_swarm()) for peer_id in peer_ids]
    return Peers(directories, peer_ids, clock)


async def _open_hivemind(owned: AsyncExitStack, identities: list[Identity]) -> Peers:
    clock = Clock()
    nodes: list[Dht] = []
    for identity in identities[:3]:
        peers = tuple(await nodes[0].multiaddrs()) if nodes else ()
        nodes.append(
            await owned.enter_async_context(open_dht(DhtConfig(initial_peers=peers, identity_path=identity.path)))
        )
        nodes[-1]._clock.wall_s, nodes[-1]._clock.steady_s = clock.wall_s, clock.steady_s
    return Peers([node.directory for node in nodes], [node.peer_id for node in nodes], clock)


def approximately(announcements: list[Announcement]) -> list[Announcement]:
    """As readers see them: how long they count travels, in hundredths of a second."""
    return [
        each.model_copy(update={"expires_at_s": pytest.approx(each.expires_at_s, abs=0.5)}) for each in announcements
    ]


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
        assert await directory.servers(MODEL) == approximately(expected)
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


async def test_peers_that_know_a_name_find_one_another(peers: Peers) -> None:
    addresses = [f"/ip4/192.0.2.{number}/tcp/31337/p2p/{peers.peer_ids[number]}" for number in range(3)]
    for number, directory in enumerate(peers.directories):
        found = await directory.meet("a run", addresses[number : number + 1], 60.0)
        assert [(each.peer_id, each.multiaddrs) for each in found] == sorted(
            (peers.peer_ids[known], [addresses[known]]) for known in range(number + 1)
        )
    assert await peers.directories[0].meet("another run", (), 0.0) == []
    found = await peers.directories[0].meet("a run", (), 0.0)  # it leaves
    assert peers.peer_ids[0] not in {each.peer_id for each in found} and len(found) == 2
    peers.clock.ahead_s = 61
    assert await peers.directories[1].meet("a run", addresses[1:2], 60.0) == [
        Participant(peer_id=peers.peer_ids[1], multiaddrs=[addresses[1]])
    ]
    with pytest.raises(BadRequest, match="cannot be published"):
        await peers.directories[0].meet("a run", ["nowhere"], 60.0)


async def test_two_models_are_kept_apart(peers: Peers, make_announcement: Make) -> None:
    await peers.directories[0].announce(make_announcement(peers.peer_ids[0]))
    await peers.directories[1].announce(
        make_announcement(peers.peer_ids[1], model_name="other", model_fingerprint="0" * 64, hidden_size=16)
    )
    assert await peers.states() == {0: "online"}
    assert await peers.states(fingerprint="0" * 64) == {1: "online"}
    assert await peers.states(fingerprint="unknown") == {}
    assert await peers.directories[2].models() == [
        ModelListing(name="other", fingerprint="0" * 64, num_blocks=4, hidden_size=16),
        ModelListing(name="tiny", fingerprint=MODEL, num_blocks=4, hidden_size=8),
    ]


async def test_model_is_listed_once_however_many_serve_it(peers: Peers, make_announcement: Make) -> None:
    for peer in range(3):
        await peers.directories[peer].announce(make_announcement(peers.peer_ids[peer]))
    assert await peers.directories[2].models() == [
        ModelListing(name="tiny", fingerprint=MODEL, num_blocks=4, hidden_size=8)
    ]


async def test_peer_that_changes_its_model_leaves_the_old_one(peers: Peers, make_announcement: Make) -> None:
    await peers.directories[0].announce(make_announcement(peers.peer_ids[0]))
    await peers.directories[0].announce(make_announcement(peers.peer_ids[0], model_fingerprint="0" * 64))
    assert await peers.states() == {}
    assert await peers.states(fingerprint="0" * 64) == {0: "online"}
    assert [listing.fingerprint for listing in await peers.directories[2].models()] == ["0" * 64]


async def test_nobody_announces_for_another_peer(peers: Peers, make_announcement: Make) -> None:
    with pytest.raises(BadRequest, match="cannot announce for"):
        await peers.directories[1].announce(make_announcement(peers.peer_ids[0]))
    await peers.directories[0].announce(make_announcement(peers.peer_ids[0]))
    await peers.plant(1, make_announcement(peers.peer_ids[0], state="draining").to_bytes())
    assert await peers.states() == {0: "online", 1: "draining"}  # what a peer writes is about itself


async def test_malformed_records_are_dropped(peers: Peers, make_announcement: Make) -> None:
    await peers.directories[0].announce(make_announcement(peers.peer_ids[0]))
    for data in (b"\xff\xfe", b"{}", b"\x08\x00", b"x" * MAX_ANNOUNCEMENT_BYTES, b"\xc1"):
        await peers.plant(1, data)
        before = peers.directories[2].statistics().num_dropped
        assert await peers.states() == {0: "online"}
        assert [listing.name for listing in await peers.directories[2].models()] == ["tiny"]
        assert peers.directories[2].statistics().num_dropped > before


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
    assert await peers.directories[2].servers(MODEL) == approximately([announcement])


async def test_servers_without_room_in_a_bucket_are_found_below_it(
    peers: Peers, make_announcement: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("swarm.memory_directory", "swarm.dht_records"):
        monkeypatch.setattr(f"{module}.CAPACITY", 1)
    monkeypatch.setattr("swarm.listing.LIKELY_FULL", 1)
    for peer in range(3):
        await peers.directories[peer].announce(make_announcement(peers.peer_ids[peer], start=peer))
    for reader in range(3):
        assert await peers.states(reader) == dict.fromkeys(range(3), "online")
    await peers.directories[1].withdraw(make_announcement(peers.peer_ids[1]))
    assert await peers.states() == {0: "online", 2: "online"}
    moved = make_announcement(peers.peer_ids[2], start=0)
    await peers.directories[2].announce(moved)
    assert [each.start for each in await peers.directories[0].servers(MODEL)] == [0, 0]


async def test_a_reader_reads_no_more_than_it_may_and_goes_on_later(
    peers: Peers, make_announcement: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("swarm.memory_directory", "swarm.dht_records"):
        monkeypatch.setattr(f"{module}.CAPACITY", 1)
    monkeypatch.setattr("swarm.listing.LIKELY_FULL", 1)
    for peer in range(2):
        await peers.directories[peer].announce(make_announcement(peers.peer_ids[peer], start=3 * peer))
    reader = peers.directories[2]
    assert await reader.servers(MODEL, max_bytes=0) == []
    assert len(await reader.servers(MODEL, max_bytes=13_000)) == 1
    assert reader.statistics().num_reads == 1
    found = await reader.servers(MODEL, max_bytes=13_000, blocks=[3])
    assert sorted(each.start for each in found) == [0, 3]
    assert reader.statistics().num_reads <= 3


@pytest.mark.parametrize("offset_s", [-240.0, 240.0])
async def test_a_server_whose_clock_is_minutes_off_is_seen_and_not_immortal(
    peers: Peers, make_announcement: Make, offset_s: float
) -> None:
    server, reader = peers.directories[0], peers.directories[2]
    server._clock = wrong = SwarmClock(lambda: peers.clock.wall_s() + offset_s, peers.clock.steady_s)
    server._shelves._clock = wrong
    for _ in range(2):
        await server.announce(make_announcement(peers.peer_ids[0], expires_at_s=wrong.wall_s() + 60))
        await peers.states()
        peers.clock.ahead_s += 15
    [found] = await reader.servers(MODEL)
    assert found.expires_at_s == pytest.approx(peers.clock.wall_s() + 45, abs=1)  # by the reader's clock
    peers.clock.ahead_s += 46
    assert await peers.states() == {}
