"""What a stranger may make us dial, whom a peer may blame, and channels that outlive being forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from fakes import peer_id

from swarm.dialling import OutsideOnly
from swarm.errors import CacheFull, PeerUnavailable, ProtocolError, ResourceError
from swarm.identity import Identity
from swarm.peers import Connector, PeerAddress
from swarm.rpc import errors_from_wire, from_wire
from swarm.v1 import blocks_pb2 as pb


def wire(**changes: object) -> pb.PeerAddress:
    fields = {"peer_id": peer_id("A"), "direct": ["192.0.2.1:5"], "tls_certificate": b"x", "multiaddrs": []}
    return pb.PeerAddress(**(fields | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"direct": ["unix:/tmp/socket"]},
        {"direct": ["dns:///localhost:80"]},
        {"direct": ["192.0.2.1:5"] * 9},
        {"direct": ["no port"]},
        {"multiaddrs": ["/ip4/192.0.2.1/tcp/1"] * 17},
        {"multiaddrs": ["not a multiaddr"]},
        {"tls_certificate": b""},
        {"tls_certificate": b"x" * 5000},
        {"peer_id": "../etc"},
    ],
)
def test_a_next_hop_that_is_no_plain_address_is_refused(changes):
    assert PeerAddress.from_wire(wire()).direct == ("192.0.2.1:5",)
    with pytest.raises(ProtocolError, match="malformed"):
        PeerAddress.from_wire(wire(**changes))


@pytest.fixture(scope="module")
def certificate() -> bytes:
    with Identity.ephemeral() as identity:
        return identity.tls_certificate().certificate_der


async def test_what_may_not_be_dialled_is_not_and_the_peer_is_named(certificate):
    connector = Connector(None, rule=OutsideOnly())
    address = PeerAddress(peer_id("A"), ("127.0.0.1:1",), certificate, ())
    with pytest.raises(PeerUnavailable) as caught:
        async with connector.lease(address):
            pass
    assert caught.value.peer_id == peer_id("A") and not connector._links
    await connector.aclose()


async def test_the_tunnel_gets_no_address_that_may_not_be_dialled(certificate):
    asked: list[tuple[str, ...]] = []

    @asynccontextmanager
    async def open_tunnel(peer: str, multiaddrs: tuple[str, ...]) -> AsyncIterator[str]:
        asked.append(multiaddrs)
        raise PeerUnavailable("nobody there")
        yield

    async def resolve(host: str) -> list[str]:
        return ["10.0.0.1", "8.8.8.8"]

    connector = Connector(open_tunnel, rule=OutsideOnly(resolve))
    multiaddrs = ("/ip4/127.0.0.1/tcp/1", "/dns4/peer.example.org/tcp/2")
    with pytest.raises(PeerUnavailable, match="nobody there"):
        async with connector.lease(PeerAddress(peer_id("A"), ("10.0.0.1:1",), certificate, multiaddrs)):
            pass
    assert asked == [("/ip4/8.8.8.8/tcp/2",)]
    await connector.aclose()


async def test_a_certificate_that_cannot_be_read_leaves_nothing_behind():
    connector = Connector(None)
    for _ in range(3):
        with pytest.raises((ProtocolError, PeerUnavailable)):
            async with connector.lease(PeerAddress(peer_id("A"), ("127.0.0.1:1",), b"garbage", ())):
                pass
    assert not connector._links
    await connector.aclose()


def test_a_peer_may_blame_only_the_one_it_pushes_to():
    error = pb.Error(code=pb.ERROR_CODE_CACHE_FULL, message="full", peer_id="B").SerializeToString()
    assert isinstance(from_wire(error, "A"), CacheFull)
    assert from_wire(error, "A").peer_id == "A"
    assert from_wire(error, "A", {"B"}).peer_id == "B"
    assert from_wire(error, "A", {"C"}).peer_id == "A"
    assert from_wire(b"\xff\xff", "A").peer_id == "A"


async def test_every_error_of_a_call_names_the_peer():
    with pytest.raises(ProtocolError) as caught:
        async with errors_from_wire("A"):
            raise ProtocolError("lying bytes")
    assert caught.value.peer_id == "A"


class Opening:
    """Opens tunnels to nowhere when it is let, and counts those that are open."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.may_go_on = asyncio.Event()
        self.errors: list[Exception] = []
        self.num_asked = self.num_open = 0

    @asynccontextmanager
    async def __call__(self, peer: str, multiaddrs: tuple[str, ...]) -> AsyncIterator[str]:
        self.num_asked += 1
        self.asked.set()
        await self.may_go_on.wait()
        if self.errors:
            raise self.errors.pop(0)
        self.num_open += 1
        try:
            yield "unix:/nowhere"
        finally:
            self.num_open -= 1
            await asyncio.sleep(0)


@pytest.fixture
def connected(monkeypatch) -> None:
    """Every channel connects."""

    async def becomes_ready(channel: object, timeout_s: float) -> bool:
        return True

    monkeypatch.setattr("swarm.peers._becomes_ready", becomes_ready)


async def use(connector: Connector, address: PeerAddress) -> None:
    async with connector.lease(address):
        pass


async def test_a_failure_that_nobody_waited_for_is_not_what_the_next_caller_gets(certificate, connected):
    opening = Opening()
    connector = Connector(opening)
    address = PeerAddress(peer_id("A"), (), certificate, ("/ip4/192.0.2.1/tcp/1",))
    hurried = asyncio.create_task(use(connector, address))
    await opening.asked.wait()
    hurried.cancel()
    await asyncio.gather(hurried, return_exceptions=True)
    opening.errors = [PeerUnavailable("it was away at that time")]
    opening.may_go_on.set()
    await asyncio.wait(set(connector._links.values()))
    await use(connector, address)
    assert opening.num_asked == 2
    await connector.aclose()
    assert opening.num_open == 0


async def test_a_renewal_that_is_cancelled_at_any_moment_leaves_no_link_without_an_owner(certificate, connected):
    address = PeerAddress(peer_id("A"), (), certificate, ("/ip4/192.0.2.1/tcp/1",))
    for num_rounds in range(12):
        opening = Opening()
        opening.may_go_on.set()
        connector = Connector(opening)
        await use(connector, address)
        renewing = asyncio.create_task(connector.renew(peer_id("A")))
        for _ in range(num_rounds):
            await asyncio.sleep(0)
        renewing.cancel()
        await asyncio.gather(renewing, return_exceptions=True)
        await use(connector, address)
        await connector.aclose()
        assert opening.num_open == 0, num_rounds


async def test_a_tunnel_that_has_no_room_here_is_one_way_that_failed(certificate):
    opening = Opening()
    opening.may_go_on.set()
    opening.errors = [ResourceError("cannot open a local socket for a tunnel")]
    connector = Connector(opening)
    with pytest.raises(PeerUnavailable, match="local socket") as caught:
        await use(connector, PeerAddress(peer_id("A"), (), certificate, ("/ip4/192.0.2.1/tcp/1",)))
    assert caught.value.peer_id == peer_id("A") and not connector._links
    await connector.aclose()
