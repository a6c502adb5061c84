"""Who a peer is: its libp2p key file, the peer id that follows from it, and the TLS certificate that clients pin.

The key file is a libp2p `PrivateKey` message with an RSA key inside, the file that p2pd and hivemind read:

    08 00           field 1, key type RSA
    12 <varint> …   field 2, the key as DER (PKCS #1)

A peer id is the base58 text of the multihash (sha-256) of the libp2p `PublicKey` message, laid out alike
(https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from swarm.errors import BadRequest, ResourceError

TLS_NAME = "peer.swarm"
"""The name in every peer's certificate; clients pass it as `grpc.ssl_target_name_override` and pin the certificate."""

_RSA_KEY_BITS = 2048
_MAX_KEY_FILE_BYTES = 16 * 1024
_CERTIFICATE_LIFETIME = timedelta(days=3650)
_CLOCK_TOLERANCE = timedelta(days=2)
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class TlsCertificate:
    """A self-signed certificate and its key; whoever knows the certificate can recognise its holder."""

    certificate_der: bytes
    certificate_pem: bytes
    private_key_pem: bytes = field(repr=False)


class Identity:
    """One peer's RSA key, in memory and in its file."""

    def __init__(self, path: Path, key: rsa.RSAPrivateKey) -> None:
        self.path = path
        self.peer_id: str = peer_id_of(key.public_key())
        self._key = key
        self._certificate: TlsCertificate | None = None

    @classmethod
    def load_or_create(cls, path: Path) -> Self:
        """Read the key file, or write a new one (atomically, mode 0600).

        Raises:
            BadRequest: the file is no RSA identity.
            ResourceError: it cannot be read or written.
        """
        path = Path(path)
        try:
            data = _read_bounded(path)
        except FileNotFoundError:
            key = rsa.generate_private_key(public_exponent=65537, key_size=_RSA_KEY_BITS)
            try:
                data = _publish(path, _encode_key_file(key))
            except OSError as exc:
                raise ResourceError(f"cannot write the identity file {path}: {exc.strerror or exc}") from exc
        except OSError as exc:
            raise ResourceError(f"cannot read the identity file {path}: {exc.strerror or exc}") from exc
        return cls(path, _decode_key_file(data, path))

    @classmethod
    @contextmanager
    def ephemeral(cls) -> Iterator[Self]:
        """A fresh identity whose file goes away when the context ends."""
        with tempfile.TemporaryDirectory(prefix="swarm-identity-") as directory:
            yield cls.load_or_create(Path(directory) / "identity.key")

    def tls_certificate(self) -> TlsCertificate:
        """The certificate for this peer's gRPC port: made on first use, the same one for the life of this object."""
        if self._certificate is None:
            self._certificate = _make_certificate(self.peer_id)
        return self._certificate

    def private_key_der(self) -> bytes:
        """The RSA key as DER (PKCS #1), for the library that signs DHT records; keep it out of logs."""
        return _pkcs1(self._key)

    def __repr__(self) -> str:
        return f"Identity({self.peer_id})"


def peer_id_of(public_key: rsa.RSAPublicKey) -> str:
    """The libp2p peer id of an RSA public key."""
    der = public_key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    digest = hashlib.sha256(b"\x08\x00\x12" + _varint(len(der)) + der).digest()
    return _base58(b"\x12\x20" + digest)  # multihash: sha2-256, 32 bytes


def certificate_pem(certificate_der: bytes) -> bytes:
    """An announced certificate in the form that gRPC takes as its only root.

    Raises: ValueError: these bytes are no certificate.
    """
    return x509.load_der_x509_certificate(certificate_der).public_bytes(serialization.Encoding.PEM)


def _read_bounded(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_MAX_KEY_FILE_BYTES + 1)


def _publish(path: Path, data: bytes) -> bytes:
    """Write the file at once or not at all; if another process was first, return what that one wrote."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp: mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # unlike rename, never replaces an identity that is already there
        except FileExistsError:
            return _read_bounded(path)
        except OSError:  # a file system without hard links
            os.replace(temporary, path)
        return data
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _encode_key_file(key: rsa.RSAPrivateKey) -> bytes:
    der = _pkcs1(key)
    return b"\x08\x00\x12" + _varint(len(der)) + der


def _decode_key_file(data: bytes, path: Path) -> rsa.RSAPrivateKey:
    hint = "restore it from a copy, or delete it to get a new identity"
    der = data[5:]  # the length of every RSA key is a varint of two bytes
    if data[:5] != b"\x08\x00\x12" + _varint(len(der)) or len(data) > _MAX_KEY_FILE_BYTES:
        raise BadRequest(f"{path} is not an identity file (a libp2p RSA key): {hint}")
    try:
        key = serialization.load_der_private_key(der, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise BadRequest(f"the key in the identity file {path} is damaged: {hint}") from exc
    if not isinstance(key, rsa.RSAPrivateKey):
        raise BadRequest(f"the identity file {path} does not hold an RSA key: {hint}")
    return key


def _pkcs1(key: rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )


def _make_certificate(peer_id: str) -> TlsCertificate:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, peer_id)])
    now = datetime.now(UTC)
    usage = x509.KeyUsage(
        digital_signature=True, key_cert_sign=True, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, crl_sign=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_TOLERANCE)
        .not_valid_after(now + _CERTIFICATE_LIFETIME)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(TLS_NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)  # it is its own root
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return TlsCertificate(
        certificate_der=certificate.public_bytes(serialization.Encoding.DER),
        certificate_pem=certificate.public_bytes(serialization.Encoding.PEM),
        private_key_pem=key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    )


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out + bytes([value]))


def _base58(data: bytes) -> str:
    number, text = int.from_bytes(data, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        text = _BASE58[digit] + text
    return "1" * (len(data) - len(data.lstrip(b"\0"))) + text
