"""What strangers' bytes reach: each target takes any bytes and raises nothing but what its callers expect."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import torch
from google.protobuf.message import DecodeError
from pydantic import ValidationError

from swarm import PROTOCOL_VERSION
from swarm.announcement import Announcement, ModelListing, Participant
from swarm.codec import Unpacker, optional, pack
from swarm.coordinates import Coordinates
from swarm.errors import SwarmError
from swarm.identity import Identity, unpack_certificate
from swarm.link import JoinLink
from swarm.model.adapters import BlockAdapter, Lora
from swarm.model.checkpoint import Checkpoint, CheckpointSource
from swarm.model.shards import read_header
from swarm.peers import PeerAddress
from swarm.punching import Introduction, Meeting
from swarm.reach import Answer, Question
from swarm.relays import Reply, Request
from swarm.rpc import from_wire
from swarm.streams import read_tensors
from swarm.v1 import blocks_pb2 as pb

CORPUS = Path(__file__).parent / "corpus"
MAX_TENSOR_BYTES = 65_536
PEER_ID = "Q" * 46


@dataclass(frozen=True, slots=True)
class Target:
    """One way in."""

    name: str
    run: Callable[[bytes], object]
    expected: tuple[type[Exception], ...]
    """What bytes may raise; anything else is a bug."""

    def corpus(self) -> list[bytes]:
        """The inputs that others are made of, and those that once were trouble."""
        return [path.read_bytes() for path in sorted((CORPUS / self.name).iterdir())]


def codec(data: bytes) -> None:
    """A message with tensors in one part."""
    message = pb.ComputeOpen.FromString(data)
    specs = [*optional(message, "hidden_states", "attention_mask", "position_ids", "prompts", "grad_outputs")]
    unpacker = Unpacker(specs, max_bytes=MAX_TENSOR_BYTES)
    unpacker.feed(message.data)
    for tensor in unpacker.tensors():
        assert tensor is None or tensor.nbytes <= MAX_TENSOR_BYTES


def stream(data: bytes) -> None:
    """A step and the messages that follow it, each behind its length in two bytes."""
    messages: list[Any] = []
    while data:
        size = int.from_bytes(data[:2], "big")
        messages.append(pb.SessionRequest.FromString(data[2 : 2 + size]))
        data = data[2 + size :]
    if not messages or messages[0].WhichOneof("kind") != "step":
        return
    step = messages.pop(0).step

    async def read() -> Any:
        return messages.pop(0) if messages else grpc.aio.EOF

    specs = optional(step, "hidden_states", "attention_mask", "position_ids")
    with asyncio.Runner() as runner:
        runner.run(read_tensors(read, specs, step.data, max_bytes=MAX_TENSOR_BYTES))


def announcement(data: bytes) -> None:
    """A server's entry in the directory."""
    found = Announcement.from_bytes(data, peer_id=PEER_ID, model_fingerprint="f", expires_at_s=time.time() + 60)
    found.to_bytes()
    PeerAddress.of(found).to_wire()


def listing(data: bytes) -> None:
    """A model's entry."""
    ModelListing.from_bytes(data).to_bytes()


def participant(data: bytes) -> None:
    """An entry at a meeting."""
    Participant.from_bytes(PEER_ID, data).to_bytes()


def certificate(data: bytes) -> None:
    """A packed certificate."""
    unpack_certificate(data)


def link(data: bytes) -> None:
    """A join link."""
    JoinLink.parse(data.decode("utf-8", "replace"), now_s=0.0).encode()


def address(data: bytes) -> None:
    """Where the next server is, as a client says."""
    PeerAddress.from_wire(pb.PeerAddress.FromString(data))


def error(data: bytes) -> None:
    """What a peer says when it refuses."""
    found = from_wire(data, PEER_ID, [PEER_ID])
    assert len(str(found)) < 10_000


def adapter(data: bytes) -> None:
    """The file of an adapter."""
    BlockAdapter.from_bytes(data, max_bytes=MAX_TENSOR_BYTES)


def lines(data: bytes) -> None:
    """A line of a relay's stream, of dial-back or of punching."""
    for model in (Request, Reply, Meeting, Introduction, Question, Answer):
        with contextlib.suppress(ValidationError):
            model.model_validate_json(data)


class Files:
    """Files of checkpoints, in a folder that is used again and again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def shard(self, data: bytes) -> None:
        """The header of a safetensors file."""
        path = self._folder / "shard.safetensors"
        path.write_bytes(data)
        read_header(path)

    def config(self, data: bytes) -> None:
        """A checkpoint's config."""
        (self._folder / "config.json").write_bytes(data)
        Checkpoint.open(CheckpointSource(str(self._folder)))


class Records:
    """What peers want stored in the DHT, and what they return."""

    def __init__(self) -> None:
        from swarm.dht import _import_hivemind

        _import_hivemind()
        from hivemind.utils import MSGPackSerializer

        from swarm.dht_records import BucketStorage, RecordValidator

        self._loads = MSGPackSerializer.loads
        self._validator = RecordValidator()
        self._storage = BucketStorage(time.time)

    def record(self, data: bytes) -> None:
        """One record: 20 bytes of key, 34 of subkey, 8 of expiration, the value."""
        from hivemind.dht.routing import DHTID
        from hivemind.dht.validation import DHTRecord

        key, subkey, value = data[:20].ljust(20, b"\0"), data[20:54], data[62:]
        expiration_s = int.from_bytes(data[54:62], "big") / 1000
        if self._validator.validate(DHTRecord(key, subkey, value, expiration_s)):
            self._storage.store_subkey(DHTID.from_bytes(key), self._loads(subkey), value, expiration_s)

    def bucket(self, data: bytes) -> None:
        """A whole bucket, as a node returns it: hivemind catches whatever is wrong with it, and believes nothing."""
        from hivemind.dht.storage import DictionaryDHTValue

        from swarm.dht_records import read_record

        value = self._loads(data)
        if isinstance(value, DictionaryDHTValue):
            for subkey, (content, expiration_s) in value.items():
                if isinstance(content, bytes):
                    read_record(subkey, content, expiration_s)


def all_targets(folder: Path) -> list[Target]:
    """Every way in. Args: folder: for files that are read."""
    files, records, ours = Files(folder), Records(), (SwarmError,)
    parsed = (DecodeError, SwarmError)
    return [
        Target("codec", codec, parsed),
        Target("stream", stream, parsed),
        Target("announcement", announcement, ours),
        Target("listing", listing, ours),
        Target("participant", participant, ours),
        Target("certificate", certificate, (ValueError,)),
        Target("link", link, ours),
        Target("address", address, parsed),
        Target("error", error, ()),
        Target("adapter", adapter, ours),
        Target("lines", lines, ()),
        Target("shard", files.shard, ours),
        Target("config", files.config, ours),
        Target("record", records.record, ()),
        Target("bucket", records.bucket, (Exception,)),
    ]


def good_inputs(identity: Identity, tiny_config: bytes) -> dict[str, list[bytes]]:
    """One or two well-formed inputs for each target: tests/fuzz/make_corpus.py writes them."""
    import safetensors.torch

    hidden = torch.arange(24, dtype=torch.float32).reshape(1, 3, 8)
    packed = pack(hidden, torch.ones(1, 3, dtype=torch.int64), codec=pb.CODEC_INT8_PER_ROW)
    raw = pack(hidden)
    opening = pb.ComputeOpen(
        protocol_version=PROTOCOL_VERSION, model_fingerprint="f", blocks=pb.BlockRange(start=0, end=2),
        hidden_states=packed.specs[0], attention_mask=packed.specs[1], data=packed.data,
    )  # fmt: skip
    bare = pb.ComputeOpen(hidden_states=raw.specs[0], data=raw.data)
    step = pb.SessionRequest(
        step=pb.Step(step_id=1, num_outputs=1, hidden_states=raw.specs[0], data=raw.data[:50])
    ).SerializeToString()
    more = pb.SessionRequest(more=raw.data[50:]).SerializeToString()
    certificate_der = identity.tls_certificate().certificate_der
    server = Announcement(
        protocol_version=PROTOCOL_VERSION, software_version="0.1.0", peer_id=PEER_ID, server_name="a server",
        model_name="some/model", model_fingerprint="f", num_model_blocks=12, hidden_size=8, start=0, end=6,
        next_start=6, next_end=12, dtype="bfloat16", state="online", direct=["203.0.113.7:31330"],
        tls_certificate=certificate_der, multiaddrs=[f"/ip4/203.0.113.7/tcp/31331/p2p/{PEER_ID}"],
        decode_tokens_per_s=10.0, forward_tokens_per_s=100.0, max_session_tokens=2048, max_step_tokens=512,
        max_batch_tokens=4096, max_batch_size=16, cache_free_tokens=10_000, expires_at_s=time.time() + 60,
        coordinates=Coordinates(0.01, 0.02, 0.001, 0.2), adapters=({"name": "poet", "digest": "a" * 32},),
    )  # fmt: skip
    lora = Lora("mlp", torch.ones(2, 8), torch.ones(8, 2), scaling=0.5)
    meeting = {"port": 31338, "token": "0" * 32}
    dial = {"port": 31330, "certificate": "0" * 64}
    said = {"host": "203.0.113.7", "reached": True, "relays": True, "clock_s": 1.5}
    return {
        "codec": [each.SerializeToString() for each in (opening, bare)],
        "stream": [b"".join(len(each).to_bytes(2, "big") + each for each in (step, more))],
        "announcement": [server.to_bytes()],
        "listing": [server.listing.to_bytes()],
        "participant": [Participant.of(PEER_ID, server.multiaddrs).to_bytes()],
        "certificate": [_packed(certificate_der), certificate_der],
        "link": [JoinLink(initial_peers=(server.multiaddrs[0],), model_name="some/model").encode().encode()],
        "address": [PeerAddress.of(server).to_wire().SerializeToString()],
        "error": [pb.Error(code=pb.ERROR_CODE_CACHE_FULL, message="no room", peer_id=PEER_ID).SerializeToString()],
        "adapter": [BlockAdapter((lora,)).to_bytes()],
        "lines": [json.dumps(each).encode() for each in ({"to": PEER_ID}, {"register_me": True}, meeting, dial, said)],
        "shard": [safetensors.torch.save({"weight": torch.ones(2, 3)})],
        "config": [tiny_config],
        **_records(identity),
    }  # fmt: skip


def _packed(certificate_der: bytes) -> bytes:
    from swarm.identity import pack_certificate

    return pack_certificate(certificate_der)


def _records(identity: Identity) -> dict[str, list[bytes]]:
    Records()
    from hivemind.dht.storage import DictionaryDHTValue
    from hivemind.utils import MSGPackSerializer

    from swarm.dht_records import RECORD_LIFETIME_S, sign_record

    # One that ends in a century, so that it is as good when it is read.
    written_at_s = round(time.time() + 3e9)
    key, expiration_s = b"k" * 20, written_at_s + RECORD_LIFETIME_S
    value = sign_record(identity, key, b"data", written_at_s=written_at_s, lifetime_s=60.0)
    subkey = MSGPackSerializer.dumps(identity.public_key)
    bucket = DictionaryDHTValue()
    bucket.store(identity.public_key, value, expiration_s)
    record = key + subkey + round(expiration_s * 1000).to_bytes(8, "big") + value
    return {"record": [record], "bucket": [MSGPackSerializer.dumps(bucket)]}
