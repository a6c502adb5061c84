from __future__ import annotations

import os
from pathlib import Path

import grpc
import pytest

from swarm.dht import DhtConfig, open_dht
from swarm.errors import BadRequest, ResourceError
from swarm.identity import (
    TLS_NAME,
    Identity,
    TlsCertificate,
    certificate_pem,
    is_signed_by,
    pack_certificate,
    unpack_certificate,
)


def test_identity_is_the_same_after_loading_its_file_again(tmp_path: Path) -> None:
    first = Identity.load_or_create(tmp_path / "new" / "identity.key")
    assert Identity.load_or_create(first.path).peer_id == first.peer_id
    assert first.path.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in first.path.parent.iterdir()] == ["identity.key"]


async def test_peer_id_is_what_libp2p_derives_from_the_file(identities: list[Identity]) -> None:
    async with open_dht(DhtConfig(identity_path=identities[0].path)) as dht:
        assert str(dht.p2p.peer_id) == identities[0].peer_id


def test_rsa_identity_of_an_earlier_release_is_refused_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(b"\x08\x00\x12\xa8\x09" + b"\x30" * 1192)
    with pytest.raises(BadRequest, match="RSA key"):
        Identity.load_or_create(path)


def test_only_the_holder_of_the_key_can_sign(identities: list[Identity]) -> None:
    signature = identities[0].sign(b"words")
    assert is_signed_by(identities[0].public_key, signature, b"words")
    assert not is_signed_by(identities[0].public_key, signature, b"other words")
    assert not is_signed_by(identities[1].public_key, signature, b"words")
    assert not is_signed_by(b"no key", signature, b"words")


def test_representation_shows_no_key(identities: list[Identity]) -> None:
    certificate = identities[0].tls_certificate()
    assert repr(identities[0]) == f"Identity({identities[0].peer_id})"
    assert "PRIVATE" not in repr(certificate)


@pytest.mark.parametrize("damage", [lambda d: b"", lambda d: b"hello", lambda d: d[:-1], lambda d: d[:9] + d[8:-1]])
def test_damaged_identity_file_is_refused_and_kept(tmp_path: Path, identities: list[Identity], damage: object) -> None:
    path = tmp_path / "identity.key"
    data = damage(identities[0].path.read_bytes())  # type: ignore[operator]
    path.write_bytes(data)
    with pytest.raises(BadRequest, match="identity file"):
        Identity.load_or_create(path)
    assert path.read_bytes() == data


def test_unreadable_identity_file_is_a_resource_error(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="cannot read the identity file"):
        Identity.load_or_create(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ResourceError):
        Identity.load_or_create(tmp_path / "file" / "identity.key")


def test_ephemeral_identity_leaves_no_file() -> None:
    with Identity.ephemeral() as identity:
        assert identity.path.exists()
    assert not os.path.exists(identity.path.parent)


def test_certificate_stays_the_same_and_differs_between_peers(identities: list[Identity]) -> None:
    first = identities[0].tls_certificate()
    assert first == identities[0].tls_certificate()
    assert first.certificate_der != identities[1].tls_certificate().certificate_der
    assert certificate_pem(first.certificate_der) == first.certificate_pem
    packed = pack_certificate(first.certificate_der)
    assert len(packed) < 100
    assert unpack_certificate(packed) == first.certificate_der


def test_other_certificates_are_not_packed_and_garbage_is_a_value_error() -> None:
    assert pack_certificate(b"whatever") == unpack_certificate(b"whatever") == b"whatever"
    with pytest.raises(ValueError):
        unpack_certificate(b"\x09" * 97)


async def _call(server: TlsCertificate, pinned_pem: bytes) -> bytes:
    async def echo(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return request

    handlers = {"Echo": grpc.unary_unary_rpc_method_handler(echo)}
    grpc_server = grpc.aio.server(handlers=[grpc.method_handlers_generic_handler("test.Test", handlers)])
    credentials = grpc.ssl_server_credentials([(server.private_key_pem, server.certificate_pem)])
    port = grpc_server.add_secure_port("127.0.0.1:0", credentials)
    await grpc_server.start()
    try:
        options = [("grpc.ssl_target_name_override", TLS_NAME)]
        pinned = grpc.ssl_channel_credentials(root_certificates=pinned_pem)
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", pinned, options) as channel:
            return await channel.unary_unary("/test.Test/Echo")(b"hello", timeout=10)
    finally:
        await grpc_server.stop(None)


async def test_grpc_accepts_the_pinned_certificate(identities: list[Identity]) -> None:
    certificate = identities[0].tls_certificate()
    assert await _call(certificate, certificate_pem(certificate.certificate_der)) == b"hello"


async def test_grpc_refuses_any_other_certificate(identities: list[Identity]) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _call(identities[0].tls_certificate(), identities[1].tls_certificate().certificate_pem)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
