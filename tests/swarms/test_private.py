"""A private swarm of real server processes: its members use it as any swarm, and a stranger gets nothing of it."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2_grpc
from swarms_help import wait_until
from tiny import load_local, random_ids

from swarm import AutoDistributedModelForCausalLM
from swarm.admission import NOT_A_MEMBER, Gate
from swarm.announcement import Announcement
from swarm.client import ClientConfig
from swarm.dht import DhtConfig, open_dht
from swarm.errors import BadRequest, NoRoute, NotAMember, PeerError
from swarm.identity import TLS_NAME, Identity, certificate_pem
from swarm.link import JoinLink
from swarm.membership import Invitation, Role
from swarm.rpc import open_channel, translate
from swarm.rpc_members import call_signer
from swarm.server import LocalSwarm
from swarm.v1 import blocks_pb2 as pb
from swarm.v1 import blocks_pb2_grpc as pb_grpc

TIMEOUT_S = 60.0
RESERVED_NAMES = ("tiny", "llama")


@dataclass
class Private:
    swarm: LocalSwarm
    path: Path
    remote: Any
    local: Any
    servers: list[Announcement]

    @property
    def owner(self) -> Identity:
        assert self.swarm._owned is not None
        return self.swarm._owned.owner


@pytest.fixture(scope="module")
def private(tiny_model: Callable[..., Path]) -> Iterator[Private]:
    path = tiny_model("llama")
    flags = ["--announce-period", "1", "--threads", "1"]
    with LocalSwarm(str(path), [(0, 3), (3, 6)], dtype="float32", arguments=flags, private=True) as swarm:
        remote = AutoDistributedModelForCausalLM.from_pretrained(str(path), join=swarm.link).eval()
        servers = [hop.server for hop in remote.explain_route()]
        yield Private(swarm, path, remote, load_local(path), servers)
        remote.close()


def _config(link: str, **options: Any) -> ClientConfig:
    parsed = JoinLink.parse(link)
    return ClientConfig(initial_peers=parsed.initial_peers, invitation=parsed.invitation, **options)


def test_members_generate_and_train_as_with_the_local_model(private: Private) -> None:
    ids = random_ids(2, 5)
    ours = private.remote.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(ours, private.local.generate(ids, max_new_tokens=6, do_sample=False))
    losses = [each(input_ids=ids, labels=ids, use_cache=False).loss for each in (private.remote, private.local)]
    torch.testing.assert_close(*losses)
    losses[0].backward()
    private.remote.zero_grad()


def test_an_invited_user_uses_it_through_the_tunnel(private: Private) -> None:
    config = _config(private.swarm.invite("through the tunnel".replace(" ", "-"), role="use"), use_direct=False)
    model = AutoDistributedModelForCausalLM.from_pretrained(str(private.path), client_config=config)
    ids = random_ids(1, 4)
    try:
        ours = model.generate(ids, max_new_tokens=4, do_sample=False)
    finally:
        model.close()
    assert torch.equal(ours, private.local.generate(ids, max_new_tokens=4, do_sample=False))


def _credentials(private: Private, kind: str, server: Announcement) -> grpc.CallCredentials | None:
    """What a call of somebody carries who is no member, or none any more."""
    if kind == "no token":
        return None
    lifetime_s = -60.0 if kind == "an expired token" else 600.0
    if kind == "a revoked token":
        name = f"gone-{time.monotonic_ns()}"
        invitation = JoinLink.parse(private.swarm.invite(name)).invitation
        private.swarm.revoke(name)
    else:
        invitation = Invitation.make(private.owner, Role.SERVE, time.time() + lifetime_s)
    assert invitation is not None
    with Identity.ephemeral() as identity:
        return call_signer(Gate(invitation, identity, time.time, None), identity)(server.tls_certificate)


async def _every_call(channel: grpc.aio.Channel) -> AsyncIterator[tuple[str, Any]]:
    """One call of each RPC that a server has, health and reflection included, and one that it lacks."""
    blocks = pb_grpc.BlocksStub(channel)
    yield "Describe", blocks.Describe(pb.DescribeRequest())
    for name in ("Session", "Forward", "Backward"):
        yield name, getattr(blocks, name)().read()
    for name in ("Push", "PutAdapters"):
        yield name, getattr(blocks, name)()
    health = health_pb2_grpc.HealthStub(channel)
    yield "Check", health.Check(health_pb2.HealthCheckRequest())
    yield "Watch", health.Watch(health_pb2.HealthCheckRequest()).read()
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    yield "ServerReflectionInfo", reflection.ServerReflectionInfo().read()
    yield "NoSuchMethod", channel.unary_unary("/swarm.v1.Blocks/NoSuchMethod")(b"")


@pytest.mark.parametrize("kind", ["no token", "an expired token", "a revoked token"])
async def test_nobody_else_can_call_anything_and_none_hears_of_the_model(private: Private, kind: str) -> None:
    server = private.servers[1]
    signed = _credentials(private, kind, server)
    pem = certificate_pem(server.tls_certificate)
    if kind == "a revoked token":
        await _until_refused(server, pem, signed)
    seen = b""
    names = set()
    async with open_channel(server.direct[0], pem, TLS_NAME, signed) as channel, asyncio.timeout(TIMEOUT_S):
        async for name, call in _every_call(channel):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            error = translate(caught.value, server.peer_id)
            assert type(error) is NotAMember and str(error) == NOT_A_MEMBER, name
            seen += repr((caught.value.details(), caught.value.trailing_metadata())).encode()
            seen += repr(caught.value.initial_metadata()).encode()
            names.add(name)
    services = pb.DESCRIPTOR.services_by_name["Blocks"].methods_by_name.keys()
    assert names >= {*services, "Check", "Watch", "ServerReflectionInfo"}  # none was left out
    _assert_says_nothing(private, seen)


def _assert_says_nothing(private: Private, seen: bytes) -> None:
    for told in (private.path.name, private.servers[0].model_fingerprint, *RESERVED_NAMES, "expired", "revoked"):
        assert told.encode() not in seen


async def _until_refused(server: Announcement, pem: bytes, signed: grpc.CallCredentials | None) -> None:
    """Wait until a server has heard of a revocation, as it does within one announce period."""
    async with open_channel(server.direct[0], pem, TLS_NAME, signed) as channel, asyncio.timeout(TIMEOUT_S):
        while True:
            try:
                await pb_grpc.BlocksStub(channel).Describe(pb.DescribeRequest())
            except grpc.aio.AioRpcError:
                return
            await asyncio.sleep(0.05)


async def test_a_stranger_with_the_addresses_sees_no_byte_of_the_model(private: Private) -> None:
    """It takes what every port and protocol of a server says to somebody without a token."""
    from hivemind.dht.routing import DHTID
    from hivemind.p2p import P2PHandlerError, PeerID
    from hivemind.proto import dht_pb2

    from swarm.buckets import MODELS

    server, seen = private.servers[0], b""
    addresses = [each for each in server.multiaddrs if "/p2p-circuit" not in each]
    async with open_dht(DhtConfig()) as stranger:
        await stranger.connect(server.peer_id, addresses, timeout_s=TIMEOUT_S)
        stub = stranger._node.protocol.get_stub(PeerID.from_base58(server.peer_id))
        keys = [DHTID.generate(MODELS.key).to_bytes()]
        for name, message in (
            ("rpc_ping", dht_pb2.PingRequest()),
            ("rpc_find", dht_pb2.FindRequest(keys=keys)),
            ("rpc_store", dht_pb2.StoreRequest()),
        ):
            with pytest.raises(P2PHandlerError, match=NOT_A_MEMBER) as caught:
                await getattr(stub, name)(message, timeout=TIMEOUT_S)
            seen += str(caught.value).encode()
        for protocol in ("/swarm/relay/1", "/swarm/reachability/1", "/swarm/grpc/1", "/swarm/punch/1"):
            try:
                reader, writer = await stranger.open_stream(server.peer_id, protocol, timeout_s=TIMEOUT_S)
            except PeerError as exc:
                seen += str(exc).encode()
                continue
            writer.write(b'{"register_me": true, "port": 1}\n' + bytes(1000))
            async with asyncio.timeout(TIMEOUT_S):
                seen += await reader.read()
            writer.close()
    seen += server.tls_certificate  # it is shown to everybody who connects
    _assert_says_nothing(private, seen)


@pytest.mark.parametrize("kind", ["no token", "an expired token"])
def test_a_stranger_cannot_join_by_the_addresses(private: Private, kind: str) -> None:
    peers = JoinLink.parse(private.swarm.link).initial_peers
    invitation = None if kind == "no token" else Invitation.make(private.owner, Role.SERVE, time.time() - 60)
    with pytest.raises(NotAMember, match="takes a valid invitation"):
        AutoDistributedModelForCausalLM.from_pretrained(
            str(private.path), client_config=ClientConfig(initial_peers=peers, invitation=invitation)
        )


async def test_a_user_that_announces_blocks_is_on_nobodys_route(private: Private) -> None:
    link = JoinLink.parse(private.swarm.invite("intruder", role="use"))
    async with open_dht(DhtConfig(initial_peers=link.initial_peers, invitation=link.invitation)) as intruder:
        fields = {"peer_id": intruder.peer_id, "blocks_per_s": 1e9, "expires_at_s": time.time() + 60}
        await intruder.directory.announce(private.servers[0].model_copy(update=fields))
        async with open_dht(
            DhtConfig(initial_peers=link.initial_peers, invitation=link.invitation, client_mode=True)
        ) as reader:
            found = await reader.directory.servers(private.servers[0].model_fingerprint)
            assert {each.peer_id for each in found} == {each.peer_id for each in private.servers}
            assert reader.directory.statistics().num_dropped


def test_a_revoked_member_loses_its_running_session_within_a_moment(private: Private) -> None:
    config = _config(private.swarm.invite("leaving"), route_timeout_s=1.0, refresh_period_s=0.5)
    model = AutoDistributedModelForCausalLM.from_pretrained(str(private.path), client_config=config)
    try:
        with model.inference_session(max_length=400):
            model.generate(random_ids(1, 4), max_new_tokens=2, do_sample=False)
            private.swarm.revoke("leaving")

            def is_refused() -> bool:
                try:
                    model.generate(random_ids(1, 1), max_new_tokens=1, do_sample=False)
                except (NotAMember, NoRoute):
                    return True
                return False

            wait_until(is_refused, "the revoked member is refused")
        with pytest.raises((NotAMember, NoRoute)):
            model(input_ids=random_ids(1, 4), use_cache=False)
    finally:
        model.close()
    ids = random_ids(1, 4)
    ours = private.remote.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(ours, private.local.generate(ids, max_new_tokens=3, do_sample=False))


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_server_speaks_tls_1_3_and_nothing_older(private: Private, version: ssl.TLSVersion) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    host, _, port = private.servers[0].direct[0].rpartition(":")
    with socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as plain:
        if version is ssl.TLSVersion.TLSv1_2:
            with pytest.raises(OSError):
                context.wrap_socket(plain)
        else:
            with context.wrap_socket(plain) as secured:
                assert secured.version() == "TLSv1.3"
                assert secured.getpeercert(binary_form=True) == private.servers[0].tls_certificate


def test_training_together_is_refused(private: Private) -> None:
    from swarm.client import open_training_dht

    with pytest.raises(BadRequest, match="private swarm"), open_training_dht(private.remote, "a run"):
        pass


def _swarm(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XDG_CONFIG_HOME": str(home), "SWARM_JOIN": ""}
    command = [sys.executable, "-m", "swarm.cli.app", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)


def test_a_name_for_an_invitation_works_where_a_link_does(private: Private, tmp_path: Path) -> None:
    link = private.swarm.invite("with-a-name", role="use")
    assert _swarm(tmp_path, "join", link, "--as", "home").returncode == 0
    shown = _swarm(tmp_path, "status", "--json", "--join", "home")
    assert private.path.name in shown.stdout, shown.stderr
    refused = _swarm(tmp_path, "serve", str(private.path), "--blocks", "0:1", "--join", "home")
    assert (refused.returncode, "not for serving" in refused.stderr) == (2, True)
    stranger = JoinLink.parse(link).without_invitation().encode()
    refused = _swarm(tmp_path, "status", "--join", stranger)
    assert refused.returncode == 2 and NOT_A_MEMBER in refused.stderr and private.path.name not in refused.stderr


def test_nothing_that_servers_say_shows_a_secret(private: Private) -> None:
    assert private.swarm._owned is not None
    secrets = [each.link for each in private.swarm.servers if JoinLink.parse(each.link).invitation is not None]
    seeds = [private.swarm._owned.own_invitation().seed, private.swarm._owned.guest_invitation().seed]
    owner_secret = (private.swarm._owned.owner.path).read_bytes()[4:36]
    for server in private.swarm.servers:
        said = server.log.replace(secrets[0], "")  # `Join link: …` is what the owner asked for
        for secret in (*seeds, owner_secret):
            assert secret.hex() not in said and repr(secret) not in said
    for each in (private.remote._swarm.connection.network.config, private.swarm._owned.guest_invitation()):
        assert not any(seed.hex() in repr(each) or repr(seed) in repr(each) for seed in seeds)
