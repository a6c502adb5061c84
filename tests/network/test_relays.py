"""Relays and dialling back, between real libp2p nodes on loopback."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass

import grpc
import grpc.aio
import pytest

from swarm import punching, relays
from swarm.dht import Dht
from swarm.dial_back import answer_dial_back, ask, ask_some
from swarm.dialling import Anywhere, UntilSeenOutside
from swarm.errors import PeerError, PeerUnavailable
from swarm.identity import Identity
from swarm.pipes import Stream
from swarm.punching import Introduction, Puncher, answer_punches
from swarm.reach import DIALS_PER_MINUTE, Question, Reach, judge
from swarm.relaying import RelayConfig, serve_relay
from swarm.relays import Registrations, Request, ask_relay, circuits, open_relayed_stream
from swarm.rpc import SERVER_OPTIONS
from swarm.throttle import BURST_S
from swarm.tunnel import Way, find_way


@dataclass
class Network:
    relay: Dht
    server: Dht
    client: Dht
    registrations: Registrations
    owned: AsyncExitStack


@pytest.fixture
async def network(open_node: Callable[..., Awaitable[Dht]]) -> AsyncIterator[Network]:
    """A server that does not listen, so that nobody can dial it, and whose tunnel sends back what it gets."""
    async with AsyncExitStack() as owned:
        relay = await open_node(0)
        peers = tuple(await relay.multiaddrs())
        server = await open_node(1, initial_peers=peers, client_mode=True)
        client = await open_node(2, initial_peers=peers, client_mode=True)

        async def echo(_info: object, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(1 << 16):
                writer.write(data)
            writer.close()

        await server.p2p.add_binary_stream_handler(relays.TUNNEL_PROTOCOL, echo)
        yield Network(relay, server, client, Registrations(server, server.known_peers, lambda: None), owned)


@asynccontextmanager
async def _registered(network: Network) -> AsyncIterator[None]:
    running = asyncio.create_task(network.registrations.run())
    await network.registrations.looked.wait()
    try:
        yield
    finally:
        running.cancel()
        await asyncio.wait({running})
        await network.registrations.aclose()


async def _echoes(stream: Stream) -> bool:
    stream[1].write(b"hello")
    async with asyncio.timeout(20):
        answer = await stream[0].readexactly(5)
    stream[1].close()
    return answer == b"hello"


async def test_a_relay_carries_streams_to_a_server_that_nobody_can_dial(network: Network) -> None:
    async with serve_relay(network.relay), _registered(network):
        multiaddrs = circuits(network.registrations.addresses, network.server.peer_id)
        assert await find_way(network.client, network.server.peer_id, multiaddrs) == Way(network.relay.peer_id)
        stream = await open_relayed_stream(network.client, network.relay.peer_id, network.server.peer_id, timeout_s=20)
        assert await _echoes(stream)


async def test_a_relay_tells_two_peers_where_the_other_one_comes_from(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller has a stream to the server: otherwise the relay introduces nobody. How they dial: test_nat.py."""
    relay_id, server_id = network.relay.peer_id, network.server.peer_id
    told: asyncio.Queue[tuple[int, int]] = asyncio.Queue()

    async def dial(found: Introduction, local_port: int) -> None:
        assert found.host == "127.0.0.1"
        told.put_nowait((local_port, found.port))
        raise PeerUnavailable("nothing is dialled here")

    monkeypatch.setattr(punching, "_dial_until_met", dial)
    async with (
        serve_relay(network.relay),
        _registered(network),
        answer_punches(network.server, Anywhere(), [relay_id], lambda stream, host: stream[1].close()),
    ):
        request = Request(punch=server_id)
        with pytest.raises(PeerUnavailable, match="carries nothing of yours to that peer"):
            await ask_relay(network.client, relay_id, request, 20)
        carried = await open_relayed_stream(network.client, relay_id, server_id, timeout_s=20)
        puncher = Puncher(network.client, Anywhere(), waits_s=(0.0,))
        puncher.begin(server_id, relay_id)
        await puncher.wait_tried()
        one, other = await told.get(), await told.get()
        assert one == other[::-1]
        carried[1].close()


async def test_only_our_own_relays_introduce(network: Network) -> None:
    async with (
        serve_relay(network.relay),
        _registered(network),
        answer_punches(network.server, Anywhere(), [], lambda stream, host: stream[1].close()),
    ):
        carried = await open_relayed_stream(network.client, network.relay.peer_id, network.server.peer_id, timeout_s=20)
        puncher = Puncher(network.client, Anywhere(), waits_s=(0.0,))
        puncher.begin(network.server.peer_id, network.relay.peer_id)
        await puncher.wait_tried()
        assert puncher.take(network.server.peer_id) is None
        carried[1].close()


async def test_a_relay_opens_streams_to_nobody_who_has_not_registered(network: Network) -> None:
    async with serve_relay(network.relay):
        with pytest.raises(PeerUnavailable, match="does not know that peer"):
            await open_relayed_stream(network.client, network.relay.peer_id, network.server.peer_id, timeout_s=20)
        async with _registered(network):
            pass
        async with asyncio.timeout(20):
            with pytest.raises(PeerUnavailable, match="does not know that peer"):
                while True:
                    stream = await open_relayed_stream(
                        network.client, network.relay.peer_id, network.server.peer_id, timeout_s=5
                    )
                    stream[1].close()


async def test_a_server_registers_again_when_its_relay_has_come_back(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relays, "RETRY_S", 0.05)
    async with AsyncExitStack() as relaying:
        await relaying.enter_async_context(serve_relay(network.relay))
        await network.owned.enter_async_context(_registered(network))
        assert list(network.registrations.addresses) == [network.relay.peer_id]
    async with asyncio.timeout(20):
        while network.registrations.addresses:
            await asyncio.sleep(0.01)
    async with serve_relay(network.relay), asyncio.timeout(20):
        while not network.registrations.addresses:
            await asyncio.sleep(0.01)
        stream = await open_relayed_stream(network.client, network.relay.peer_id, network.server.peer_id, timeout_s=20)
        assert await _echoes(stream)


async def test_connections_of_one_caller_are_bounded(network: Network) -> None:
    to = (network.relay.peer_id, network.server.peer_id)
    async with serve_relay(network.relay, RelayConfig(max_carried_per_peer=2)), _registered(network):
        streams = [await open_relayed_stream(network.client, *to, timeout_s=20) for _ in range(2)]
        with pytest.raises(PeerUnavailable, match="no room"):
            await open_relayed_stream(network.client, *to, timeout_s=20)
        for stream in streams:
            assert await _echoes(stream)


async def test_a_relay_carries_no_more_bytes_than_it_may(network: Network) -> None:
    num_bytes, config = 100_000, RelayConfig(max_bytes_per_s=400_000)
    async with serve_relay(network.relay, config), _registered(network):
        stream = await open_relayed_stream(network.client, network.relay.peer_id, network.server.peer_id, timeout_s=20)
        started_s = time.monotonic()
        stream[1].write(bytes(num_bytes))
        assert await stream[0].readexactly(num_bytes) == bytes(num_bytes)
        # There and back, and half of the rate is for others.
        assert time.monotonic() - started_s > 2 * num_bytes / (config.max_bytes_per_s / 2) - BURST_S - 0.05
        stream[1].close()


async def test_connections_on_which_nothing_comes_are_closed(network: Network) -> None:
    async with serve_relay(network.relay, RelayConfig(idle_timeout_s=0.2)), _registered(network):
        stream = await open_relayed_stream(network.client, network.relay.peer_id, network.server.peer_id, timeout_s=20)
        async with asyncio.timeout(10):
            assert await stream[0].read() == b""
        stream[1].close()


async def test_a_server_that_registers_again_gives_its_earlier_place_up(network: Network) -> None:
    async with serve_relay(network.relay), _registered(network):
        reader, writer = await network.server.open_stream(network.relay.peer_id, relays.PROTOCOL, timeout_s=20)
        writer.write(b'{"register_me": true}\n')
        async with asyncio.timeout(20):
            assert await reader.readline() == b'{"error":""}\n'
            while network.registrations.addresses:
                await asyncio.sleep(0.01)
        writer.close()


async def test_what_is_no_request_is_not_answered(network: Network) -> None:
    async with serve_relay(network.relay):
        for line in (b"[]\n", b"\xff\n", b'{"to": "/unix/socket"}\n', b"x" * 2_000_000 + b"\n"):
            reader, writer = await network.client.open_stream(network.relay.peer_id, relays.PROTOCOL, timeout_s=20)
            with suppress(ConnectionError):
                writer.write(line)
                async with asyncio.timeout(20):
                    assert await reader.read(4096) == b""
            writer.close()


async def test_peer_ids_that_are_none_lead_nowhere(network: Network) -> None:
    circuit = f"/ip4/127.0.0.1/tcp/1/p2p/{'Q' * 46}/p2p-circuit/p2p/{network.server.peer_id}"
    with pytest.raises(PeerUnavailable, match="no way leads"):
        await find_way(network.client, network.server.peer_id, [circuit], timeout_s=1)


async def test_a_port_counts_as_reached_if_the_right_certificate_answers_there(
    network: Network, identities: list[Identity]
) -> None:
    certificate = identities[1].tls_certificate()
    server = grpc.aio.server(options=SERVER_OPTIONS)
    pair = (certificate.private_key_pem, certificate.certificate_pem)
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    await server.start()

    async def reach(certificate_der: bytes) -> Reach:
        asked = [network.relay.peer_id]
        return judge(await ask_some(network.server, asked, port, certificate_der), trusted=asked)

    async with answer_dial_back(network.relay.p2p, UntilSeenOutside(Anywhere()), relays=True):
        assert await reach(certificate.certificate_der) == Reach(reached=("127.0.0.1",))
        assert (await reach(identities[3].tls_certificate().certificate_der)).is_hidden
        await server.stop(None)
        assert (await reach(b"")).is_hidden
        found = await ask(network.server, network.relay.peer_id)
        assert found.answer.host == "127.0.0.1" and found.answer.relays and found.answer.reached is None
        assert abs(found.clock_offset_s) < 1
        for _ in range(DIALS_PER_MINUTE):
            last = await ask(network.server, network.relay.peer_id, Question(port=1))
        assert last.answer.reached is None
    with pytest.raises(PeerError):
        await ask(network.server, network.relay.peer_id)
    assert (
        await ask_some(network.server, [network.relay.peer_id, "no peer id" and network.client.peer_id], port)
        is not None
    )


async def test_a_peer_that_the_internet_reaches_dials_no_neighbour(network: Network) -> None:
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    question = Question(port=server.sockets[0].getsockname()[1])
    rule = UntilSeenOutside(Anywhere())
    async with server, answer_dial_back(network.relay.p2p, rule):
        assert (await ask(network.server, network.relay.peer_id, question)).answer.reached
        rule.note("8.8.8.8")
        assert (await ask(network.server, network.relay.peer_id, question)).answer.reached is None
