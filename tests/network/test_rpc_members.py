"""gRPC in a private swarm, on real ports: who gets through, what ends with a membership, what nobody can replay."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from swarm.admission import NOT_A_MEMBER, Gate
from swarm.dht import Dht
from swarm.errors import NotAMember, PeerUnavailable, SwarmError
from swarm.identity import TLS_NAME, Identity, TlsCertificate
from swarm.membership import Invitation, Member, Revocations, Role
from swarm.peers import Connector, PeerAddress
from swarm.rpc import open_channel, translate
from swarm.rpc_members import CREDENTIAL_METADATA_KEY, PROOF_METADATA_KEY, MembersOnly, call_signer, current_member
from swarm.tunnel import open_tunnel, serve_tunnel

TIMEOUT_S = 20.0


@dataclass
class Service(grpc.GenericRpcHandler):
    """One method of each kind, and who has called them."""

    callers: list[Member | None] = field(default_factory=list)

    def service(self, details: Any) -> grpc.RpcMethodHandler | None:
        handlers = {
            "/swarm.Test/Say": grpc.unary_unary_rpc_method_handler(self._say),
            "/swarm.Test/Echo": grpc.stream_stream_rpc_method_handler(self._echo),
            "/swarm.Test/Yield": grpc.unary_stream_rpc_method_handler(self._yield),
            "/swarm.Test/Add": grpc.stream_unary_rpc_method_handler(self._add),
        }
        return handlers.get(details.method)

    async def _say(self, request: bytes, _context: object) -> bytes:
        self.callers.append(current_member.get())
        return request

    async def _echo(self, _requests: object, context: grpc.aio.ServicerContext) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            await context.write(message)

    async def _yield(self, request: bytes, _context: object) -> AsyncIterator[bytes]:
        yield request
        await asyncio.Event().wait()

    async def _add(self, requests: Any, _context: object) -> bytes:
        return b"".join([request async for request in requests])


@dataclass
class Port:
    """A gRPC port of a private swarm's, and its owner."""

    owner: Identity
    server: Identity
    peer: Identity
    gate: Gate
    service: Service
    port: int
    now_s: list[float]

    def signed(self, invitation: Invitation, certificate: TlsCertificate | None = None) -> grpc.CallCredentials:
        """What calls of a member to this server carry, or to one with another certificate."""
        gate = Gate(invitation, self.peer, time.time, None)
        return call_signer(gate, self.peer)((certificate or self.server.tls_certificate()).certificate_der)

    def open(self, signed: grpc.CallCredentials | None) -> grpc.aio.Channel:
        pem = self.server.tls_certificate().certificate_pem
        return open_channel(f"127.0.0.1:{self.port}", pem, TLS_NAME, signed)

    def invite(self, role: Role = Role.USE, lifetime_s: float = 600.0) -> Invitation:
        return Invitation.make(self.owner, role, time.time() + lifetime_s)

    def revoke(self, invitation: Invitation) -> None:
        self.gate.adopt(Revocations.make(self.owner, 1, [invitation.member], now_s=time.time()).data)


@pytest.fixture
async def port(identities: list[Identity], tmp_path: Path) -> AsyncIterator[Port]:
    owner, server, peer = identities[:3]
    now_s = [0.0]
    invitation = Invitation.make(owner, Role.SERVE, time.time() + 3600)
    gate = Gate(invitation, server, lambda: time.time() + now_s[0], tmp_path / "revoked")
    certificate = server.tls_certificate()
    service = Service()
    async with _serve(service, certificate, [MembersOnly(gate, certificate.certificate_der)]) as number:
        yield Port(owner, server, peer, gate, service, number, now_s)


@asynccontextmanager
async def _serve(
    service: Service, certificate: TlsCertificate, interceptors: list[grpc.aio.ServerInterceptor]
) -> AsyncIterator[int]:
    server = grpc.aio.server(interceptors=interceptors)
    server.add_generic_rpc_handlers((service,))
    credentials = grpc.ssl_server_credentials([(certificate.private_key_pem, certificate.certificate_pem)])
    number = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield number
    finally:
        await server.stop(grace=0)


async def _refusal(channel: grpc.aio.Channel, method: str = "/swarm.Test/Say") -> SwarmError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(method)(b"hello", timeout=TIMEOUT_S)
    return translate(caught.value, "server")


async def test_members_calls_of_every_kind_reach_the_service_which_is_told_whose_they_are(port: Port) -> None:
    invitation = port.invite()
    async with port.open(port.signed(invitation)) as channel:
        assert await channel.unary_unary("/swarm.Test/Say")(b"hello", timeout=TIMEOUT_S) == b"hello"
        assert await channel.stream_unary("/swarm.Test/Add")(iter([b"a", b"b"]), timeout=TIMEOUT_S) == b"ab"
        assert await channel.unary_stream("/swarm.Test/Yield")(b"first", timeout=TIMEOUT_S).read() == b"first"
        echo = channel.stream_stream("/swarm.Test/Echo")(iter([b"x"]), timeout=TIMEOUT_S)
        assert [each async for each in echo] == [b"x"]
    assert port.service.callers == [invitation.member]


@pytest.mark.parametrize(
    ("why", "logged"),
    [
        ("no credential", "does not show whose it is"),
        ("expired", "expired"),
        ("revoked", "was revoked"),
        ("another owner's", "not signed by the owner"),
        ("replayed at another server", "does not show whose it is"),
        ("a stolen credential", "does not show whose it is"),
        ("a stolen credential, with a key of the thief's", "another peer"),
    ],
)
async def test_a_call_that_shows_no_membership_is_refused_and_not_told_why(
    port: Port, identities: list[Identity], caplog: pytest.LogCaptureFixture, why: str, logged: str
) -> None:
    signed: grpc.CallCredentials | None = None
    if why == "expired":
        signed = port.signed(port.invite(lifetime_s=-10))
    elif why == "revoked":
        invitation = port.invite()
        port.revoke(invitation)
        signed = port.signed(invitation)
    elif why == "another owner's":
        signed = port.signed(Invitation.make(identities[3], Role.SERVE, time.time() + 600))
    elif why.startswith("replayed"):  # a member's proof for another server, which that one passes on
        signed = port.signed(port.invite(), identities[3].tls_certificate())
    elif why.startswith("a stolen"):  # what a server sees of its callers
        credential = port.invite().credential(port.peer.public_key)
        thief = identities[3]
        shown = port.peer.public_key if why == "a stolen credential" else thief.public_key
        signed = _call_credentials(credential + shown, thief, port.server.tls_certificate())
    with caplog.at_level("INFO"):
        async with port.open(signed) as channel:
            for method in ("/swarm.Test/Say", "/swarm.Test/Echo", "/swarm.Test/NoSuchMethod"):
                error = await _refusal(channel, method)
                assert type(error) is NotAMember and str(error) == NOT_A_MEMBER
    assert caplog.text.count(logged) >= 3
    assert not port.service.callers


def _call_credentials(shown: bytes, signer: Identity, certificate: TlsCertificate) -> grpc.CallCredentials:
    from swarm.rpc_members import _Constant, _proven

    proof = signer.sign(_proven(certificate.certificate_der))
    return grpc.metadata_call_credentials(_Constant([(CREDENTIAL_METADATA_KEY, shown), (PROOF_METADATA_KEY, proof)]))


async def test_running_calls_end_when_their_caller_is_revoked_and_others_go_on(port: Port) -> None:
    revoked, kept = port.invite(), port.invite()
    async with (
        port.open(port.signed(revoked)) as channel,
        port.open(port.signed(kept)) as other,
        asyncio.timeout(TIMEOUT_S),
    ):
        calls = [each.stream_stream("/swarm.Test/Echo")() for each in (channel, other)]
        for call in calls:
            await call.write(b"hello")
            assert await call.read() == b"hello"
        yielding = channel.unary_stream("/swarm.Test/Yield")(b"hello")
        assert await yielding.read() == b"hello"
        port.revoke(revoked)
        for ended in (calls[0], yielding):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ended.read()
            assert type(translate(caught.value, "server")) is NotAMember
        await calls[1].write(b"again")
        assert await calls[1].read() == b"again"
        assert type(await _refusal(channel)) is NotAMember
        calls[1].cancel()
    assert not any(member == revoked.member for member in port.gate._running.values())


async def test_running_calls_end_when_the_token_of_their_caller_expires(port: Port) -> None:
    invitation = port.invite(lifetime_s=600)
    port.now_s[0] = 598.5  # the server's time: the token ends in a moment
    async with port.open(port.signed(invitation)) as channel, asyncio.timeout(TIMEOUT_S):
        call = channel.stream_stream("/swarm.Test/Echo")()
        await call.write(b"hello")
        assert await call.read() == b"hello"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert type(translate(caught.value, "server")) is NotAMember


class Interceptor:
    """Somebody between client and server who ends TLS with a certificate of its own, and notes what it is shown."""

    def __init__(self, certificate: TlsCertificate, directory: Path) -> None:
        (directory / "middle.pem").write_bytes(certificate.certificate_pem + certificate.private_key_pem)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(directory / "middle.pem")
        self._context.set_alpn_protocols(["h2"])
        self.seen = b""
        self.num_connections = 0

    @asynccontextmanager
    async def open(self) -> AsyncIterator[int]:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.num_connections += 1
            try:
                await writer.start_tls(self._context)
                self.seen += await reader.read(1 << 16)
            except OSError:
                pass  # the client does not go on with this certificate
            finally:
                writer.close()

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()


async def test_somebody_between_client_and_server_sees_neither_the_call_nor_the_credential(
    port: Port, identities: list[Identity], tmp_path: Path
) -> None:
    middle = Interceptor(identities[3].tls_certificate(), tmp_path)
    connector = Connector(None, sign=call_signer(Gate(port.invite(), port.peer, time.time, None), port.peer))
    async with middle.open() as number:
        certificate = port.server.tls_certificate().certificate_der  # as the signed record says
        address = PeerAddress("server", (f"127.0.0.1:{number}",), certificate, ())
        with pytest.raises(PeerUnavailable):
            async with connector.lease(address):
                pass
    await connector.aclose()
    assert middle.num_connections and not middle.seen


async def test_somebody_inside_the_tunnel_sees_neither_as_well(
    open_node: Callable[..., Any], port: Port, identities: list[Identity], tmp_path: Path
) -> None:
    """The relay or the peer's libp2p leads to another TLS server than the record names."""
    middle = Interceptor(identities[3].tls_certificate(), tmp_path)
    far: Dht = await open_node(0)
    near: Dht = await open_node(1, initial_peers=tuple(await far.multiaddrs()), client_mode=True)
    certificate = port.server.tls_certificate().certificate_der
    address = PeerAddress(far.peer_id, (), certificate, tuple(await far.multiaddrs()))
    for target, reaches in ((None, False), (port.port, True)):
        async with middle.open() as number, serve_tunnel(far, ("127.0.0.1", target or number)):
            connector = Connector(
                lambda peer_id, multiaddrs: open_tunnel(near, peer_id, multiaddrs),
                sign=call_signer(Gate(port.invite(), port.peer, time.time, None), port.peer),
            )
            if reaches:
                async with connector.lease(address) as channel:
                    assert await channel.unary_unary("/swarm.Test/Say")(b"hello", timeout=TIMEOUT_S) == b"hello"
            else:
                with pytest.raises(PeerUnavailable):
                    async with connector.lease(address):
                        pass
            await connector.aclose()
    assert middle.num_connections and not middle.seen


async def test_a_caller_without_tls_reaches_nothing(port: Port) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port.port}") as channel:
        error = await _refusal(channel)
        assert type(error) is PeerUnavailable
    assert not port.service.callers


async def test_a_channel_to_a_revoked_server_is_cut_off_and_others_are_left(port: Port) -> None:
    connector = Connector(None, sign=call_signer(Gate(port.invite(), port.peer, time.time, None), port.peer))
    certificate = port.server.tls_certificate().certificate_der
    addresses = [PeerAddress(name, (f"127.0.0.1:{port.port}",), certificate, ()) for name in ("revoked", "kept")]
    async with asyncio.timeout(TIMEOUT_S), connector.lease(addresses[0]) as cut, connector.lease(addresses[1]) as kept:
        calls = [each.stream_stream("/swarm.Test/Echo")() for each in (cut, kept)]
        for call in calls:
            await call.write(b"hello")
            assert await call.read() == b"hello"
        await connector.cut_off(lambda peer_id: peer_id == "revoked")
        with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
            await calls[0].read()
        await calls[1].write(b"again")
        assert await calls[1].read() == b"again"
        calls[1].cancel()
    await connector.aclose()
