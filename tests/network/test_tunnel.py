"""gRPC over TLS through libp2p, between two nodes that know each other only through a third."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from swarm import tunnel
from swarm.dht import Dht
from swarm.errors import PeerUnavailable
from swarm.identity import TLS_NAME, Identity, TlsCertificate
from swarm.tunnel import open_tunnel, serve_tunnel

MIB = 1024 * 1024


@dataclass
class EchoServer:
    certificate: TlsCertificate
    port: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    peers: list[str] = field(default_factory=list)

    async def echo(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        self.peers.append(context.peer())
        try:
            async for request in requests:
                yield request
        finally:
            self.ended.set()


@asynccontextmanager
async def _open_echo_server(certificate: TlsCertificate) -> AsyncIterator[EchoServer]:
    echo = EchoServer(certificate)
    handlers = {"Echo": grpc.stream_stream_rpc_method_handler(echo.echo)}
    server = grpc.aio.server(handlers=[grpc.method_handlers_generic_handler("test.Test", handlers)])
    credentials = grpc.ssl_server_credentials([(certificate.private_key_pem, certificate.certificate_pem)])
    echo.port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield echo
    finally:
        await server.stop(None)


def _open_channel(target: str, certificate: TlsCertificate) -> grpc.aio.Channel:
    options = [("grpc.ssl_target_name_override", TLS_NAME), ("grpc.max_receive_message_length", 2 * MIB)]
    return grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(certificate.certificate_pem), options)


@dataclass
class Network:
    server: Dht
    client: Dht
    echo: EchoServer
    entered: list[tuple[int, str, bool]]
    """What the server was told of the connections that it carries."""


@pytest.fixture
async def network(open_node: Callable[..., Awaitable[Dht]], identities: list[Identity]) -> AsyncIterator[Network]:
    async with AsyncExitStack() as owned:
        bootstrap = await open_node(0)
        peers = tuple(await bootstrap.multiaddrs())
        server = await open_node(1, initial_peers=peers)
        client = await open_node(2, initial_peers=peers, client_mode=True)
        echo = await owned.enter_async_context(_open_echo_server(identities[1].tls_certificate()))
        entered: list[tuple[int, str, bool]] = []

        def entering(*connection: Any) -> AbstractContextManager[None]:
            entered.append(connection)
            return nullcontext()

        await owned.enter_async_context(serve_tunnel(server, ("127.0.0.1", echo.port), entering=entering))
        yield Network(server, client, echo, entered)


def _blocks(number: int) -> Iterator[bytes]:
    for index in range(number):
        yield index.to_bytes(4, "big") * (MIB // 4)


async def test_calls_cross_the_tunnel(network: Network) -> None:
    async with (
        open_tunnel(network.client, network.server.peer_id, await network.server.multiaddrs()) as target,
        _open_channel(target, network.echo.certificate) as channel,
    ):
        call = channel.stream_stream("/test.Test/Echo")()
        for message in (b"one", b"two"):
            await call.write(message)
            assert await call.read() == message
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
    port = int(network.echo.peers[0].rpartition(":")[2])
    assert (port, network.client.peer_id, False) in network.entered  # so the server knows whose call it was


async def test_peer_is_found_without_an_address(network: Network) -> None:
    async with (
        open_tunnel(network.client, network.server.peer_id, ["/unparsable", "/ip4/127.0.0.1/tcp/1"]) as target,
        _open_channel(target, network.echo.certificate) as channel,
    ):
        call = channel.stream_stream("/test.Test/Echo")(iter([b"hello"]), timeout=10)
        assert [message async for message in call] == [b"hello"]


async def test_64_mib_arrive_whole_and_in_order(network: Network) -> None:
    async with (
        open_tunnel(network.client, network.server.peer_id, await network.server.multiaddrs()) as target,
        _open_channel(target, network.echo.certificate) as channel,
    ):
        started_s = time.monotonic()
        call = channel.stream_stream("/test.Test/Echo")(_blocks(64), timeout=60)
        expected = _blocks(64)
        async for message in call:
            assert message == next(expected)
        assert next(expected, None) is None
        print(f"{64 / (time.monotonic() - started_s):.0f} MiB/s each way")


async def test_certificate_of_another_peer_is_refused(network: Network, identities: list[Identity]) -> None:
    async with (
        open_tunnel(network.client, network.server.peer_id, []) as target,
        _open_channel(target, identities[3].tls_certificate()) as channel,
    ):
        call = channel.stream_stream("/test.Test/Echo")(iter([b"hello"]), timeout=10)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_cancelled_call_reaches_the_server(network: Network) -> None:
    async with (
        open_tunnel(network.client, network.server.peer_id, []) as target,
        _open_channel(target, network.echo.certificate) as channel,
    ):
        call = channel.stream_stream("/test.Test/Echo")()
        await call.write(b"hello")
        assert await call.read() == b"hello"
        call.cancel()
        async with asyncio.timeout(5):
            await network.echo.ended.wait()


async def test_closing_the_tunnel_ends_its_calls(network: Network) -> None:
    async with AsyncExitStack() as owned:
        opened = open_tunnel(network.client, network.server.peer_id, [])
        channel = await owned.enter_async_context(_open_channel(await opened.__aenter__(), network.echo.certificate))
        call = channel.stream_stream("/test.Test/Echo")()
        await call.write(b"hello")
        assert await call.read() == b"hello"
        await opened.__aexit__(None, None, None)
        await _expect_failure(call)
        async with asyncio.timeout(5):
            await network.echo.ended.wait()


@pytest.mark.parametrize("victim", ["server", "client"])
async def test_death_of_either_p2pd_fails_calls_promptly(network: Network, victim: str) -> None:
    async with (
        open_tunnel(network.client, network.server.peer_id, []) as target,
        _open_channel(target, network.echo.certificate) as channel,
    ):
        call = channel.stream_stream("/test.Test/Echo")()
        await call.write(b"hello")
        assert await call.read() == b"hello"
        os.kill(getattr(network, victim)._daemon.pid, signal.SIGKILL)
        await _expect_failure(call)


async def _expect_failure(call: grpc.aio.StreamStreamCall) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(5):
            assert await call.read() is not grpc.aio.EOF
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_unknown_or_silent_peer_is_unavailable(network: Network, identities: list[Identity]) -> None:
    with pytest.raises(PeerUnavailable, match=identities[3].peer_id):
        async with open_tunnel(network.client, identities[3].peer_id, [], timeout_s=3):
            pass
    with pytest.raises(PeerUnavailable, match=network.client.config.initial_peers[0].rpartition("/")[2]):
        bootstrap_id = network.client.config.initial_peers[0].rpartition("/")[2]  # it serves no tunnel
        async with open_tunnel(network.client, bootstrap_id, [], timeout_s=3):
            pass


async def test_streams_of_one_peer_are_bounded(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnel, "MAX_STREAMS_PER_PEER", 2)
    async with open_tunnel(network.client, network.server.peer_id, []) as target, AsyncExitStack() as owned:
        await asyncio.sleep(0.1)  # the tunnel's own probe stream is gone
        path = target.removeprefix("unix:")
        writers = []
        for _ in range(2):
            _, writer = await asyncio.open_unix_connection(path)
            owned.callback(writer.close)
            writers.append(writer)
        await asyncio.sleep(0.2)
        reader, writer = await asyncio.open_unix_connection(path)
        owned.callback(writer.close)
        async with asyncio.timeout(5):
            assert await reader.read() == b""


async def test_tunnel_leaves_nothing_behind(network: Network) -> None:
    paths: list[Path] = []

    async def send_through_a_new_tunnel() -> None:
        async with (
            open_tunnel(network.client, network.server.peer_id, []) as target,
            _open_channel(target, network.echo.certificate) as channel,
        ):
            call = channel.stream_stream("/test.Test/Echo")(iter([b"hello"]), timeout=10)
            assert [message async for message in call] == [b"hello"]
            paths.append(Path(target.removeprefix("unix:")))

    await send_through_a_new_tunnel()
    before = (asyncio.all_tasks(), psutil.Process().num_fds())
    tunnels = 20  # more than what anything else of this process may have opened meanwhile
    for _ in range(tunnels):
        await send_through_a_new_tunnel()

    def left_over() -> list[asyncio.Task[Any]]:
        return [task for task in asyncio.all_tasks() - before[0] if "grpc/_cython" not in repr(task)]

    async with asyncio.timeout(10):  # the server's ends of the last connections
        while left_over() or psutil.Process().num_fds() >= before[1] + tunnels:
            await asyncio.sleep(0.1)
    assert not any(map(os.path.exists, paths))
