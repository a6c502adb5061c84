"""Whom a peer dials because a relay says so, and what a relay's mirror believes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest
from pydantic import ValidationError

from swarm import punching, tunnel
from swarm.dialling import Anywhere, OutsideOnly
from swarm.errors import PeerUnavailable
from swarm.mirror import open_mirror
from swarm.peers import Connector
from swarm.punching import Introduction, Introductions, Meeting, Puncher
from swarm.reach import DIALS_PER_MINUTE

LOOPBACK, HOME, OUTSIDE = "127.0.0.1", "192.168.1.7", "8.8.8.8"


@pytest.mark.parametrize(
    ("relay", "allowed"), [(LOOPBACK, [LOOPBACK, HOME, OUTSIDE]), (HOME, [HOME, OUTSIDE]), (OUTSIDE, [OUTSIDE])]
)
async def test_a_relay_introduces_nobody_of_a_narrower_network_than_its_own(relay, allowed):
    introductions = Introductions(Anywhere())
    hosts = [LOOPBACK, HOME, OUTSIDE, "router.lan", ""]
    assert [host for host in hosts if await introductions.allow(Introduction(host=host, port=1), relay)] == allowed


async def test_a_server_that_the_internet_reaches_is_led_nowhere_else():
    introductions = Introductions(OutsideOnly())
    assert not await introductions.allow(Introduction(host=HOME, port=1), HOME)
    assert await introductions.allow(Introduction(host="2606:4700::1111", port=1), OUTSIDE)


async def test_no_address_is_dialled_often_because_a_relay_says_so():
    introductions = Introductions(Anywhere())
    allowed = [await introductions.allow(Introduction(host=OUTSIDE, port=port), OUTSIDE) for port in range(1, 100)]
    assert sum(allowed) == DIALS_PER_MINUTE


@pytest.mark.parametrize("line", ['{"port": 0, "token": "00"}', '{"port": 1, "token": "zz"}', '{"port": 70000}'])
def test_what_a_relay_says_is_checked(line):
    with pytest.raises(ValidationError):
        Meeting.model_validate_json(line)


class Told:
    """A writer that keeps the last line."""

    def __init__(self) -> None:
        self.line = b""
        self.is_closed = False

    def write(self, data: bytes) -> None:
        self.line = data

    async def drain(self) -> None:
        pass

    def close(self) -> None:
        self.is_closed = True


async def test_a_mirror_sees_who_shows_the_token_from_the_place_it_belongs_to():
    async with open_mirror(LOOPBACK, 0) as mirror:
        told = Told()

        async def called(place: str, show: Callable[[bytes], bytes]) -> Introduction | int | None:
            seeing = asyncio.create_task(mirror.see((asyncio.StreamReader(), told), "peer", place))
            await asyncio.sleep(0)
            meeting = Meeting.model_validate_json(told.line)
            reader, writer = await asyncio.open_connection(LOOPBACK, meeting.port)
            writer.write(show(bytes.fromhex(meeting.token)))
            closing = asyncio.create_task(reader.read(1))
            await asyncio.wait({seeing, closing}, return_when=asyncio.FIRST_COMPLETED)
            seeing.cancel()
            port = writer.get_extra_info("sockname")[1]
            writer.close()
            await asyncio.gather(seeing, closing, return_exceptions=True)
            return seeing.result().port == port if not seeing.cancelled() else None

        assert await called(LOOPBACK, lambda token: token) is True
        assert await called(OUTSIDE, lambda token: token) is None
        assert await called(LOOPBACK, lambda token: bytes(len(token))) is None


async def test_nobody_is_called_anew_who_is_not_called_at_all():
    renew: Callable[[str], Awaitable[bool]] = Connector(None).renew
    assert not await renew("12D3KooW")


@pytest.mark.parametrize(("error", "raised"), [(OSError(), PeerUnavailable), (asyncio.CancelledError(), None)])
async def test_a_connection_that_comes_to_nothing_is_closed(monkeypatch, error, raised):
    async def fail(**_options: object) -> None:
        raise error

    monkeypatch.setattr(asyncio, "open_connection", fail)
    with socket.socket() as connected:
        with pytest.raises(raised or type(error)):
            await punching._as_stream(connected, OUTSIDE)
        assert connected.fileno() == -1


async def test_a_punched_connection_is_closed_where_no_tunnel_can_be_opened_over_it(monkeypatch):
    told = Told()
    puncher = Puncher(None, Anywhere())
    puncher._connections["peer"] = None, told

    def full() -> None:
        raise OSError("no space left")

    monkeypatch.setattr(tunnel, "open_socket_directory", full)
    with pytest.raises(OSError, match="no space"):
        async with tunnel.open_tunnel(None, "peer", [], puncher=puncher):
            pass
    assert told.is_closed


@pytest.mark.parametrize(("succeeds", "num_tried"), [(False, 3), (True, 1)])
async def test_attempts_are_bounded_and_what_nobody_takes_is_closed(monkeypatch, succeeds, num_tried):
    """Whoever asks meanwhile."""
    opened: list[Told] = []

    async def met(_self: Puncher, _peer_id: str, _relay_id: str) -> object:
        opened.append(Told())
        return None, opened[-1]

    async def renew(_peer_id: str) -> bool:
        return succeeds

    monkeypatch.setattr(Puncher, "_meet", met)
    puncher = Puncher(None, Anywhere(), waits_s=(0.0, 0.0, 0.0))
    puncher.renew = renew
    puncher.begin("peer", "relay")
    puncher.begin("peer", "relay")
    await puncher.wait_tried()
    assert len(opened) == num_tried and all(each.is_closed for each in opened)
    puncher.begin("peer", "relay")  # only later
    await asyncio.sleep(0)
    assert len(opened) == num_tried and puncher.take("peer") is None
    await puncher.aclose()
