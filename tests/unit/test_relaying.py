"""A relay bounds what it carries, for each caller, each address, each server and in all; relays' words are checked."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import peer_id

from swarm import relays, tunnel
from swarm.dial_back import MAX_ANSWERED_PER_PLACE, answer_dial_back
from swarm.dialling import Anywhere, UntilSeenOutside
from swarm.errors import BadRequest, PeerUnavailable
from swarm.pipes import Stream
from swarm.relaying import (
    MAX_ASKING_PER_PLACE,
    Guest,
    RelayConfig,
    may_carry,
    may_register,
    serve_relay,
)
from swarm.relays import Registrations, circuits, relays_of
from swarm.tunnel import Way, find_way

A, B, C = peer_id("A"), peer_id("B"), peer_id("C")
CONFIG = RelayConfig(max_registered=8, max_carried=8, max_carried_per_peer=3)


def registered(*places: str) -> list[Guest]:
    return [Guest(peer_id(f"S{number}"), place, is_registered=True) for number, place in enumerate(places, 1)]


def carried(*found: tuple[str, str, str]) -> list[Guest]:
    return [Guest(who, place, target=target) for who, place, target in found]


def test_servers_find_room_whatever_one_address_takes():
    guests = registered("1.1.1.1", "1.1.1.1")
    assert not may_register(guests, Guest(A, "1.1.1.1"), CONFIG)
    assert may_register(guests, Guest(A, "2.2.2.2"), CONFIG)
    assert may_register(guests, Guest(guests[0].peer_id, "1.1.1.1"), CONFIG)  # it gives up its other place
    assert not may_register(registered(*(f"{n}.1.1.1" for n in range(8))), Guest(A, "9.9.9.9"), CONFIG)


def test_connections_are_bounded_by_caller_address_server_and_in_all():
    assert may_carry(carried(*[(A, "1", C)] * 1), Guest(A, "2"), C, CONFIG)
    assert not may_carry(carried(*[(A, str(n), B) for n in range(3)]), Guest(A, "9"), C, CONFIG)
    assert not may_carry(carried((A, "1", C), (B, "1", C)), Guest(peer_id("D"), "1"), C, CONFIG)
    to_one = carried(*[(peer_id(f"P{n}"), str(n), C) for n in range(1, 5)])
    assert not may_carry(to_one, Guest(A, "9"), C, CONFIG) and may_carry(to_one, Guest(A, "9"), B, CONFIG)
    full = carried(*[(peer_id(f"P{n}"), str(n), peer_id(f"T{n}")) for n in range(1, 9)])
    assert not may_carry(full, Guest(A, "9"), C, CONFIG)


def test_a_relay_takes_no_more_places_than_the_process_has_files():
    assert RelayConfig().within(1 << 20) == RelayConfig()
    small = RelayConfig().within(1024)
    assert small.max_registered + 2 * small.max_carried <= 512 and small.max_registered > 0 and small.max_carried > 0


def test_a_relay_that_carries_nothing_is_no_relay():
    with pytest.raises(BadRequest):
        RelayConfig(max_bytes_per_s=0)


def test_addresses_through_relays_are_read_as_they_are_written():
    found = {A: ["/ip4/8.8.8.8/tcp/1", f"/ip4/8.8.8.8/tcp/1/p2p/{A}", "/ip4/127.0.0.1/tcp/1"]}
    written = circuits(found, B)
    assert written == [f"/ip4/8.8.8.8/tcp/1/p2p/{A}/p2p-circuit/p2p/{B}"]
    assert relays_of([*written, f"/ip4/1.1.1.1/tcp/1/p2p/{B}"]) == {A: [f"/ip4/8.8.8.8/tcp/1/p2p/{A}"]}


def test_relays_that_only_neighbours_reach_are_named_if_there_are_no_others():
    near, outside, here = (
        {A: ["/ip4/10.0.0.1/tcp/1"]},
        {B: ["/dns/relay.example.org/tcp/1"]},
        {A: ["/ip4/127.0.0.1/tcp/1"]},
    )
    assert circuits(near, C) == [f"/ip4/10.0.0.1/tcp/1/p2p/{A}/p2p-circuit/p2p/{C}"]
    assert circuits(near | outside, C) == [f"/dns/relay.example.org/tcp/1/p2p/{B}/p2p-circuit/p2p/{C}"]
    assert circuits(here, C) == [f"/ip4/127.0.0.1/tcp/1/p2p/{A}/p2p-circuit/p2p/{C}"]


@pytest.mark.parametrize("relay", ["", "/p2p/", "/p2p/0OIl", "/p2p/..", f"/p2p/{'Q' * 65}"])
def test_an_announced_relay_without_a_peer_id_is_none(relay):
    assert relays_of([f"/ip4/8.8.8.8/tcp/1{relay}/p2p-circuit/p2p/{B}"]) == {}


class Line:
    """The writing end of a stream to nobody."""

    def __init__(self) -> None:
        self.is_closed = False

    def write(self, data: bytes) -> None:
        pass

    async def drain(self) -> None:
        pass

    def close(self) -> None:
        self.is_closed = True


class FakeDht:
    """Peers that can be connected to at once, never, or not."""

    def __init__(self, hanging: tuple[str, ...] = (), failing: tuple[str, ...] = (), answer: str = '{"error": ""}'):
        self.hanging, self.failing, self.answer = hanging, failing, answer
        self.connected: list[str] = []
        self.lines: list[Line] = []

    async def connect(self, peer_id: str, multiaddrs: object, *, timeout_s: float) -> None:
        self.connected.append(peer_id)
        if peer_id in self.hanging:
            await asyncio.Event().wait()
        if peer_id in self.failing:
            raise PeerUnavailable(f"{peer_id} is gone")

    async def open_stream(self, peer_id: str, protocol: str, *, timeout_s: float) -> Stream:
        reader = asyncio.StreamReader()
        reader.feed_data(self.answer.encode() + b"\n")
        reader.feed_eof()
        self.lines.append(Line())
        return reader, self.lines[-1]


class FakeP2P:
    """Takes a handler of streams, and opens streams to it on which nothing ever comes."""

    async def add_binary_stream_handler(self, _protocol: str, handler: Any) -> None:
        self.handler = handler

    async def remove_binary_stream_handler(self, _protocol: str) -> None:
        pass

    async def is_accepted(self, host: str) -> bool:
        """Open one from an address; the identity is a new one."""
        name = peer_id(host.replace(".", "")[-1])
        info = SimpleNamespace(peer_id=SimpleNamespace(to_base58=lambda: name), addr=f"/ip4/{host}/tcp/1")
        line = Line()
        await self.handler(info, asyncio.StreamReader(), line)
        return not line.is_closed


def through(*relay_ids: str) -> list[str]:
    return [f"/ip4/8.8.8.8/tcp/1/p2p/{relay_id}/p2p-circuit/p2p/{C}" for relay_id in relay_ids]


async def test_a_relay_that_hangs_does_not_keep_a_caller_from_the_next(monkeypatch):
    monkeypatch.setattr(tunnel, "HEAD_START_S", 0.0)
    dht = FakeDht(hanging=(C, A))
    async with asyncio.timeout(10):
        assert await find_way(dht, C, through(A, B), timeout_s=3600) == Way(B)
    assert all(line.is_closed for line in dht.lines)


async def test_a_server_that_can_be_dialled_is_not_called_through_its_relays():
    dht = FakeDht()
    async with asyncio.timeout(10):
        assert await find_way(dht, C, [f"/ip4/8.8.4.4/tcp/1/p2p/{C}", *through(A)], timeout_s=3600) == Way()
    assert dht.connected == [C]


async def test_of_two_relays_the_one_that_the_server_names_first_is_taken():
    dht = FakeDht(failing=(C,))
    async with asyncio.timeout(10):
        assert await find_way(dht, C, through(B, A), timeout_s=3600) == Way(B)
    assert dht.connected == [C, B]


async def test_no_way_says_what_was_tried_and_an_announcement_cannot_make_us_try_many():
    names = [peer_id(letter) for letter in "DEFGHJKLMN"]
    dht = FakeDht(failing=(C, *names))
    with pytest.raises(PeerUnavailable, match="D is gone"):
        await find_way(dht, C, through(*names), timeout_s=3600)
    assert len(dht.connected) == 1 + tunnel.MAX_RELAYS_TRIED


async def test_a_relay_that_ends_each_registration_at_once_does_not_keep_a_server_busy(monkeypatch):
    monkeypatch.setattr(relays, "RETRY_S", 3600.0)
    dht = FakeDht()
    registrations = Registrations(dht, lambda: {A: ["/ip4/8.8.8.8/tcp/1"]}, lambda: None)
    running = asyncio.create_task(registrations.run())
    await registrations.looked.wait()
    for _ in range(100):
        await asyncio.sleep(0)
    assert dht.connected == [A] and not registrations.addresses
    running.cancel()
    await asyncio.wait({running})
    await registrations.aclose()


async def test_streams_on_which_nothing_comes_leave_room_for_other_addresses():
    p2p = FakeP2P()
    async with answer_dial_back(p2p, UntilSeenOutside(Anywhere())):
        taken = [await p2p.is_accepted("1.1.1.1") for _ in range(MAX_ANSWERED_PER_PLACE + 1)]
        assert all(taken[:-1]) and not taken[-1] and await p2p.is_accepted("2.2.2.2")
    async with serve_relay(SimpleNamespace(p2p=p2p, config=SimpleNamespace(host="127.0.0.1"))):
        taken = [await p2p.is_accepted("1.1.1.1") for _ in range(MAX_ASKING_PER_PLACE + 1)]
        assert all(taken[:-1]) and not taken[-1] and await p2p.is_accepted("2.2.2.2")


@pytest.mark.parametrize("answer", ["", "x", '{"error": "\x1b[2J"}', '{"error": "\\u001b[2J"}', '{"error": "no"}'])
async def test_what_a_relay_answers_is_checked(answer):
    registrations = Registrations(FakeDht(answer=answer), lambda: {A: ["/ip4/8.8.8.8/tcp/1"]}, lambda: None)
    await registrations._fill()
    assert registrations.addresses == {}
