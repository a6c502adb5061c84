"""Who a peer is: its libp2p key file, the peer id that follows from it, and the TLS certificate that clients pin.

The key file is a libp2p `PrivateKey` message with an Ed25519 key inside, the file that p2pd reads:

    08 01   field 1, key type Ed25519
    12 40   field 2, 64 bytes: the private key, then the public one

A peer id is the base58 text of the libp2p `PublicKey` message, laid out alike, as an "identity" multihash: it holds
the public key itself (https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md).

Certificates differ in nothing but a public key and a signature, so they travel as these two (`pack_certificate`).
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from swarm.errors import BadRequest, ResourceError
from swarm.files import create_atomically

TLS_NAME = "peer.swarm"
"""The name in every peer's certificate; clients pass it as `grpc.ssl_target_name_override` and pin the certificate."""

PUBLIC_KEY_BYTES, SIGNATURE_BYTES = 32, 64

_KEY_FILE_HEADER = b"\x08\x01\x12\x40"
_PEER_ID_HEADER = b"\x00\x24\x08\x01\x12\x20"  # identity multihash of 36 bytes; key type Ed25519; 32 bytes
_RSA_HEADER = b"\x08\x00\x12"
_MAX_KEY_FILE_BYTES = 16 * 1024
_PACKED_BYTES = 33 + 64  # a compressed point of P-256; r and s of an ECDSA signature
_CERTIFICATE_DATES = datetime(2020, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class TlsCertificate:
    """A self-signed certificate and its key; whoever knows the certificate can recognise its holder."""

    certificate_der: bytes
    certificate_pem: bytes
    private_key_pem: bytes = field(repr=False)


class Identity:
    """One peer's Ed25519 key, in memory and in its file."""

    def __init__(self, path: Path, key: ed25519.Ed25519PrivateKey) -> None:
        self.path = path
        self.public_key: bytes = key.public_key().public_bytes_raw()
        self.peer_id: str = peer_id_of(self.public_key)
        self._key = key
        self._certificate: TlsCertificate | None = None

    @classmethod
    def load_or_create(cls, path: Path) -> Self:
        """Read the key file, or write a new one (atomically, mode 0600).

        Raises:
            BadRequest: the file is no Ed25519 identity.
            ResourceError: it cannot be read or written.
        """
        path = Path(path)
        try:
            data = _read_bounded(path)
        except FileNotFoundError:
            key = ed25519.Ed25519PrivateKey.generate()
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
            self._certificate = _make_certificate()
        return self._certificate

    def sign(self, data: bytes) -> bytes:
        """A signature of SIGNATURE_BYTES; see `is_signed_by`."""
        return self._key.sign(data)

    def __repr__(self) -> str:
        return f"Identity({self.peer_id})"


@functools.lru_cache(maxsize=8192)
def peer_id_of(public_key: bytes) -> str:
    """The libp2p peer id of an Ed25519 public key of PUBLIC_KEY_BYTES."""
    return _base58(_PEER_ID_HEADER + public_key)


@functools.lru_cache(maxsize=8192)
def public_key_of(peer_id: str) -> bytes | None:
    """The Ed25519 public key of which this is the peer id; None: it is none."""
    number = 0
    for character in peer_id[:64]:
        digit = _BASE58.find(character)
        if digit < 0:
            return None
        number = number * len(_BASE58) + digit
    key = (number & (1 << 8 * PUBLIC_KEY_BYTES) - 1).to_bytes(PUBLIC_KEY_BYTES, "big")
    return key if peer_id_of(key) == peer_id else None


def is_signed_by(public_key: bytes, signature: bytes, data: bytes) -> bool:
    """Whether the holder of an Ed25519 key signed this; False for what is no key, too."""
    try:
        ed25519.Ed25519PublicKey.from_public_bytes(public_key).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def certificate_pem(certificate_der: bytes) -> bytes:
    """An announced certificate in the form that gRPC takes as its only root.

    Raises: ValueError: these bytes are no certificate.
    """
    return x509.load_der_x509_certificate(certificate_der).public_bytes(serialization.Encoding.PEM)


def pack_certificate(certificate_der: bytes) -> bytes:
    """The few bytes in which a certificate of ours differs from all others; any other certificate as it is."""
    try:
        certificate = x509.load_der_x509_certificate(certificate_der)
        key, (r, s) = certificate.public_key(), decode_dss_signature(certificate.signature)
    except ValueError:
        return certificate_der
    if not isinstance(key, ec.EllipticCurvePublicKey):
        return certificate_der
    point = key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint)
    packed = point + r.to_bytes(32, "big") + s.to_bytes(32, "big")
    return packed if unpack_certificate(packed) == certificate_der else certificate_der


@functools.lru_cache(maxsize=4096)
def unpack_certificate(packed: bytes) -> bytes:
    """The certificate as DER, of what `pack_certificate` returned.

    Raises: ValueError: they name no point of the curve.
    """
    if len(packed) != _PACKED_BYTES:
        return packed
    key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), packed[:33])
    signature = encode_dss_signature(int.from_bytes(packed[33:65], "big"), int.from_bytes(packed[65:], "big"))
    return _certificate_der(key, signature)


def _read_bounded(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_MAX_KEY_FILE_BYTES + 1)


def _publish(path: Path, data: bytes) -> bytes:
    """Write the file at once or not at all; if another process was first, return what that one wrote."""
    return data if create_atomically(path, data) else _read_bounded(path)


def _encode_key_file(key: ed25519.Ed25519PrivateKey) -> bytes:
    return _KEY_FILE_HEADER + key.private_bytes_raw() + key.public_key().public_bytes_raw()


def _decode_key_file(data: bytes, path: Path) -> ed25519.Ed25519PrivateKey:
    hint = "restore it from a copy, or delete it to get a new identity"
    if data.startswith(_RSA_HEADER):
        raise BadRequest(f"the identity file {path} holds an RSA key, identities are Ed25519 keys now: {hint}")
    if not data.startswith(_KEY_FILE_HEADER) or len(data) != len(_KEY_FILE_HEADER) + 2 * PUBLIC_KEY_BYTES:
        raise BadRequest(f"{path} is not an identity file (a libp2p Ed25519 key): {hint}")
    private, public = data[-2 * PUBLIC_KEY_BYTES : -PUBLIC_KEY_BYTES], data[-PUBLIC_KEY_BYTES:]
    key = ed25519.Ed25519PrivateKey.from_private_bytes(private)
    if key.public_key().public_bytes_raw() != public:
        raise BadRequest(f"the key in the identity file {path} is damaged: {hint}")
    return key


def _make_certificate() -> TlsCertificate:
    key = ec.generate_private_key(ec.SECP256R1())
    der = _certificate_der(key.public_key(), key.sign(_unsigned(key.public_key()), ec.ECDSA(hashes.SHA256())))
    return TlsCertificate(
        certificate_der=der,
        certificate_pem=certificate_pem(der),
        private_key_pem=key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    )


def _unsigned(key: ec.EllipticCurvePublicKey) -> bytes:
    """The part of the certificate of a key that is signed, as DER: the same for everybody, the key aside."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, TLS_NAME)])
    usage = x509.KeyUsage(
        digital_signature=True, key_cert_sign=True, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, crl_sign=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key)
        .serial_number(1)
        .not_valid_before(_CERTIFICATE_DATES[0])
        .not_valid_after(_CERTIFICATE_DATES[1])
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(TLS_NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)  # it is its own root
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    )
    # The library encodes what it signs only, so this is signed by a key that nobody has.
    return builder.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256()).tbs_certificate_bytes


def _certificate_der(key: ec.EllipticCurvePublicKey, signature: bytes) -> bytes:
    """RFC 5280, section 4.1: a sequence of what is signed, the algorithm (ecdsa-with-SHA256) and the signature."""
    algorithm = bytes.fromhex("300a06082a8648ce3d040302")
    return _der(0x30, _unsigned(key) + algorithm + _der(0x03, b"\0" + signature))


def _der(tag: int, content: bytes) -> bytes:
    """A DER element of less than 64 KiB."""
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    length = size.to_bytes(1 if size < 0x100 else 2, "big")
    return bytes([tag, 0x80 | len(length)]) + length + content


def _base58(data: bytes) -> str:
    number, text = int.from_bytes(data, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        text = _BASE58[digit] + text
    return "1" * (len(data) - len(data.lstrip(b"\0"))) + text
