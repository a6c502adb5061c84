"""What a server says about itself in the directory, checked before anybody uses it.

An announcement comes from a stranger: every string and list is bounded, text is printable (it ends on people's
terminals), addresses are plain host:port (never a gRPC target such as "unix:…"), and numbers are finite.

In the directory it is a `ServerEntry` (proto/swarm/v1/directory.proto) of about 250 bytes. Whose it is, of which
model, and until when it counts is not in there: a reader knows who signed it, where it was found, and when.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self, TypeVar

from google.protobuf.message import DecodeError, Message
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from swarm.coordinates import Coordinates
from swarm.errors import BadRequest, ProtocolError
from swarm.identity import pack_certificate, unpack_certificate
from swarm.ranges import BlockRange
from swarm.v1 import blocks_pb2, directory_pb2

MAX_ANNOUNCEMENT_BYTES = 4 * 1024

M = TypeVar("M", bound=Message)
B = TypeVar("B", bound=BaseModel)

_TARGET_SCHEMES = {"dns", "google-c2p", "ipv4", "ipv6", "unix", "unix-abstract", "vsock", "xds"}
_HOST_PORT = re.compile(r"(?:\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9](?:[A-Za-z0-9._-]{0,252}[A-Za-z0-9])?):([0-9]{1,5})")
_MULTIADDR = re.compile(r"/[A-Za-z0-9/:._-]{1,255}")
_PEER_ID = re.compile(r"[1-9A-HJ-NP-Za-km-z]{32,64}")


def _check_printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must hold printable characters only")
    return text


def _check_host_port(text: str) -> str:
    match = _HOST_PORT.fullmatch(text)
    if match is None or not 0 < int(match[1]) < 65536 or text.rpartition(":")[0].lower() in _TARGET_SCHEMES:
        raise ValueError("must be host:port")
    return text


def _check_multiaddr(text: str) -> str:
    if not _MULTIADDR.fullmatch(text):
        raise ValueError("must be a multiaddr such as /ip4/192.0.2.1/tcp/31337/p2p/Qm…")
    return text


def is_peer_id(text: object) -> bool:
    """Whether this could be the id of a peer."""
    return isinstance(text, str) and _PEER_ID.fullmatch(text) is not None


def _check_peer_id(text: str) -> str:
    if not is_peer_id(text):
        raise ValueError("must be a base58 peer id")
    return text


Text = Annotated[str, Field(max_length=256), AfterValidator(_check_printable)]
ShortText = Annotated[str, Field(max_length=64), AfterValidator(_check_printable)]
RequiredText = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_check_printable)]
PeerId = Annotated[str, Field(max_length=64), AfterValidator(_check_peer_id)]
HostPort = Annotated[str, Field(max_length=300), AfterValidator(_check_host_port)]
MultiaddrText = Annotated[str, Field(max_length=256), AfterValidator(_check_multiaddr)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Positive = Annotated[int, Field(ge=1, le=2**53)]
Fingerprint = Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_check_printable)]
NumBlocks = Annotated[int, Field(ge=1, le=100_000)]
HiddenSize = Annotated[int, Field(ge=1, le=2**24)]
Rate = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]


MAX_HOSTED_ADAPTERS = 16
"""Of one server: their names and digests take a quarter of the largest announcement."""

ADAPTER_DIGEST_BYTES = 16

AdapterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
AdapterDigest = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * ADAPTER_DIGEST_BYTES}}}$")]

_PLAIN_FIELDS = (
    "protocol_version", "software_version", "server_name", "model_name", "num_model_blocks", "hidden_size", "start",
    "end", "decode_tokens_per_s", "forward_tokens_per_s", "max_session_tokens", "max_step_tokens", "max_batch_tokens",
    "max_batch_size", "cache_free_tokens", "blocks_per_s", "movable", "queue_s", "bytes_per_s",
)  # fmt: skip
"""What an announcement and its entry in the directory call alike."""


_checked_place = TypeAdapter(Coordinates).validate_python


class ModelListing(BaseModel):
    """A model that a swarm serves, in whole or in part."""

    model_config = ConfigDict(strict=True, frozen=True)

    name: RequiredText
    fingerprint: Fingerprint
    num_blocks: NumBlocks
    hidden_size: HiddenSize

    def to_bytes(self) -> bytes:
        """A `ModelEntry`."""
        return directory_pb2.ModelEntry(**self.model_dump()).SerializeToString()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read and check what a peer wrote. Raises: ProtocolError: anything about it is not allowed."""
        entry = _parse(directory_pb2.ModelEntry(), data, "model listing")
        names = ("name", "fingerprint", "num_blocks", "hidden_size")
        return _checked(cls, {name: getattr(entry, name) for name in names}, "model listing")


class AdapterListing(BaseModel):
    """An adapter that a server hosts. Two with the same digest change the same in the whole model."""

    model_config = ConfigDict(strict=True, frozen=True)

    name: AdapterName
    digest: AdapterDigest
    """Hexadecimal."""

    def __str__(self) -> str:
        return f"{self.name}@{self.digest[:8]}"

    @property
    def digest_bytes(self) -> bytes:
        """As it travels."""
        return bytes.fromhex(self.digest)


class Participant(BaseModel):
    """A peer at a meeting (`Directory.meet`), and where the others can dial it."""

    model_config = ConfigDict(strict=True, frozen=True)

    peer_id: PeerId
    multiaddrs: Annotated[list[MultiaddrText], Field(min_length=1, max_length=16)]
    """Whole ones, with the id of whatever listens there, which need not be this peer's."""

    @classmethod
    def of(cls, peer_id: str, multiaddrs: Iterable[str]) -> Self:
        """Raises: BadRequest: others would not take this."""
        try:
            return _checked(cls, {"peer_id": peer_id, "multiaddrs": list(multiaddrs)}, "participant")
        except ProtocolError as exc:
            raise BadRequest(f"these addresses cannot be published: {exc}") from exc

    def to_bytes(self) -> bytes:
        """A `MeetingEntry`."""
        return directory_pb2.MeetingEntry(multiaddrs=self.multiaddrs).SerializeToString()

    @classmethod
    def from_bytes(cls, peer_id: str, data: bytes) -> Self:
        """Read and check what a peer wrote. Raises: ProtocolError: anything about it is not allowed."""
        entry = _parse(directory_pb2.MeetingEntry(), data, "participant")
        return _checked(cls, {"peer_id": peer_id, "multiaddrs": list(entry.multiaddrs)}, "participant")


class AddressFields(BaseModel):
    """Where and how a peer can be called, as a stranger says."""

    model_config = ConfigDict(strict=True, frozen=True)

    peer_id: PeerId
    direct: Annotated[list[HostPort], Field(max_length=8)]
    tls_certificate: Annotated[bytes, Field(min_length=1, max_length=4096)]
    multiaddrs: Annotated[list[MultiaddrText], Field(max_length=16)]

    @classmethod
    def check(cls, peer_id: str, direct: list[str], tls_certificate: bytes, multiaddrs: list[str]) -> Self:
        """Raises: ProtocolError: a field is malformed or too long."""
        try:
            return cls(peer_id=peer_id, direct=direct, tls_certificate=tls_certificate, multiaddrs=multiaddrs)
        except ValidationError as exc:
            fields = ", ".join(str(error["loc"][0]) for error in exc.errors()[:4])
            raise ProtocolError(f"a peer address is malformed: {fields}") from exc


class Announcement(BaseModel):
    """One server's blocks, addresses, speed and limits, valid until `expires_at_s`."""

    model_config = ConfigDict(
        strict=True,
        frozen=True,
        ser_json_bytes="base64",
        protected_namespaces=(),
    )

    protocol_version: Positive
    software_version: ShortText
    peer_id: PeerId
    server_name: ShortText
    model_name: RequiredText
    model_fingerprint: Fingerprint
    model_commit: ShortText | None = None
    num_model_blocks: NumBlocks
    hidden_size: HiddenSize
    start: Annotated[int, Field(ge=0, le=100_000)]
    end: Annotated[int, Field(ge=1, le=100_000)]
    dtype: Literal["float32", "float16", "bfloat16"]
    quantization: ShortText | None = None
    state: Literal["joining", "online", "draining"]
    next_start: Annotated[int, Field(ge=0, le=100_000)] | None = None
    """First of the blocks that it is about to serve instead; None: it stays."""
    next_end: Annotated[int, Field(ge=1, le=100_000)] | None = None
    movable: bool = False
    """Whether it goes by itself where the swarm needs it more."""
    direct: Annotated[list[HostPort], Field(max_length=8)] = []
    """Addresses of the gRPC port, best first; empty for a peer that only the tunnel reaches."""
    tls_certificate: Annotated[bytes, Field(max_length=4096)]
    """DER; the one certificate that clients accept from this peer."""
    multiaddrs: Annotated[list[MultiaddrText], Field(max_length=16)] = []
    decode_tokens_per_s: Rate
    forward_tokens_per_s: Rate
    blocks_per_s: Rate = 0.0
    """Blocks run for single tokens, measured once, when nobody used it yet, or as many as its line lets it pass on, if
    that is less; 0: not known. Placement goes by it."""
    max_session_tokens: Count
    max_step_tokens: Count
    max_batch_tokens: Count
    max_batch_size: Count
    cache_free_tokens: Count
    queue_s: Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)] = 0.0
    """What a step has waited for its pass lately, on average."""
    bytes_per_s: Rate = 0.0
    """What it sends to other servers in a second, as it has seen; 0: not known."""
    coordinates: Coordinates | None = None
    """Where the server is in the network; None: it has met nobody yet."""
    adapters: Annotated[tuple[AdapterListing, ...], Field(max_length=MAX_HOSTED_ADAPTERS)] = ()
    """Those that it hosts."""
    expires_at_s: Annotated[float, Field(gt=0, le=1e11, allow_inf_nan=False)]
    """Unix time by the clock of this machine; a server announces itself again well before."""

    @model_validator(mode="after")
    def _check_blocks(self) -> Self:
        try:
            self.blocks.check_inside(self.num_model_blocks)
            if self.next_blocks is not None:
                self.next_blocks.check_inside(self.num_model_blocks)
        except BadRequest as exc:
            raise ValueError(str(exc)) from exc
        return self

    @property
    def blocks(self) -> BlockRange:
        return BlockRange(self.start, self.end)

    @property
    def next_blocks(self) -> BlockRange | None:
        """What it is about to serve instead of `blocks`; None: it stays."""
        if self.next_start is None or self.next_end is None:
            return None
        return BlockRange(self.next_start, self.next_end)

    @property
    def listing(self) -> ModelListing:
        return ModelListing(
            name=self.model_name,
            fingerprint=self.model_fingerprint,
            num_blocks=self.num_model_blocks,
            hidden_size=self.hidden_size,
        )

    def to_bytes(self) -> bytes:
        """A `ServerEntry`.

        Raises: BadRequest: it would be larger than readers accept.
        """
        own_suffix = f"/p2p/{self.peer_id}"
        place, following = self.coordinates, self.next_blocks
        data = directory_pb2.ServerEntry(
            **{name: getattr(self, name) for name in _PLAIN_FIELDS},
            model_commit=self.model_commit or "",
            dtype=f"DTYPE_{self.dtype.upper()}",
            quantization=self.quantization or "",
            state=f"SERVER_STATE_{self.state.upper()}",
            direct=self.direct,
            tls_certificate=pack_certificate(self.tls_certificate),
            multiaddrs=[address.removesuffix(own_suffix) for address in self.multiaddrs],
            coordinates=[] if place is None else [place.x_s, place.y_s, place.height_s, place.error],
            next_blocks=None if following is None else blocks_pb2.BlockRange(start=following.start, end=following.end),
            adapters=[directory_pb2.HostedAdapter(name=each.name, digest=each.digest_bytes) for each in self.adapters],
        ).SerializeToString()
        if len(data) > MAX_ANNOUNCEMENT_BYTES:
            raise BadRequest(
                f"an announcement of {len(data)} bytes exceeds the {MAX_ANNOUNCEMENT_BYTES} that readers accept: "
                "announce fewer or shorter addresses"
            )
        return data

    @classmethod
    def from_bytes(cls, data: bytes, *, peer_id: str, model_fingerprint: str, expires_at_s: float) -> Self:
        """Read and check what a peer wrote.

        Args:
            peer_id: who signed it.
            model_fingerprint: where it was found.
            expires_at_s: until when it counts for the reader.
        Raises: ProtocolError: anything about it is not allowed.
        """
        entry = _parse(directory_pb2.ServerEntry(), data, "announcement")
        moves = entry.HasField("next_blocks")
        try:
            fields = {name: getattr(entry, name) for name in _PLAIN_FIELDS} | {
                "peer_id": peer_id,
                "model_fingerprint": model_fingerprint,
                "expires_at_s": expires_at_s,
                "model_commit": entry.model_commit or None,
                "dtype": blocks_pb2.DType.Name(entry.dtype).removeprefix("DTYPE_").lower(),
                "quantization": entry.quantization or None,
                "state": directory_pb2.ServerState.Name(entry.state).removeprefix("SERVER_STATE_").lower(),
                "direct": list(entry.direct),
                "tls_certificate": unpack_certificate(entry.tls_certificate),
                "multiaddrs": [f"{address}/p2p/{peer_id}" for address in entry.multiaddrs],
                "coordinates": _place(entry.coordinates) if entry.coordinates else None,
                "next_start": entry.next_blocks.start if moves else None,
                "next_end": entry.next_blocks.end if moves else None,
                "adapters": tuple({"name": each.name, "digest": each.digest.hex()} for each in entry.adapters),
            }
        except (ValueError, TypeError) as exc:  # a number without a name, a certificate without a point
            raise ProtocolError(f"a malformed announcement: {exc}") from exc
        return _checked(cls, fields, "announcement")


def _place(numbers: Iterable[float]) -> Coordinates:
    names = ("x_s", "y_s", "height_s", "error")
    return _checked_place(dict(zip(names, numbers, strict=True)))


def _parse(message: M, data: bytes, what: str) -> M:
    if len(data) > MAX_ANNOUNCEMENT_BYTES:
        raise ProtocolError(f"a {what} has {len(data)} bytes, more than {MAX_ANNOUNCEMENT_BYTES}")
    try:
        message.ParseFromString(data)
    except DecodeError as exc:
        raise ProtocolError(f"a malformed {what}: {exc}") from exc
    return message


def _checked(cls: type[B], fields: dict[str, Any], what: str) -> B:
    try:
        return cls.model_validate(fields)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or what
        raise ProtocolError(f"a malformed {what}: {where}: {first['msg']}") from exc
