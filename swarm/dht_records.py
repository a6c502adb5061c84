"""What lies in the DHT: one record for each entry of a bucket, signed by its peer.

A bucket is a hivemind dictionary under the bucket's key. Of each record in it:

    subkey       the peer's Ed25519 public key (32 bytes): a reader derives the peer id from it
    value        signature (64 bytes), lifetime in hundredths of a second (2 bytes), data
    expiration   the time of writing, by the swarm's clock, plus RECORD_LIFETIME_S

The signature covers key, subkey, expiration and all of the value but itself. Nobody can write for another peer, nor
copy a record into another bucket or another time. The DHT keeps of two records of a peer the one with the later
expiration, so the last write wins; how long it counts for readers is its own affair (swarm/listing.py). A lifetime of
0 takes an entry back.

Every node refuses to store or to return anything else (`RecordValidator`), and more records in one bucket than there
is room for (`BucketStorage`). This module imports hivemind; only swarm/dht.py imports it, when a DHT is opened.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable

from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.utils import MSGPackSerializer

from swarm.announcement import MAX_ANNOUNCEMENT_BYTES
from swarm.buckets import CAPACITY
from swarm.directory import MAX_LIFETIME_S
from swarm.identity import PUBLIC_KEY_BYTES, SIGNATURE_BYTES, Identity, is_signed_by, peer_id_of
from swarm.listing import Entry

RECORD_LIFETIME_S = MAX_LIFETIME_S + 300.0

CLOCK_TOLERANCE_S = 300.0
"""How far ahead a writer's clock may be of a node's before that one refuses what it writes; behind, it may be more."""

MAX_BUCKETS_HELD = 4096
"""Buckets that one node keeps for others."""

_MAX_DATA_BYTES = MAX_ANNOUNCEMENT_BYTES
_LIFETIME_UNIT_S = 0.01
_MAX_CACHED_CHECKS = 8192


def sign_record(identity: Identity, key: bytes, data: bytes, *, written_at_s: float, lifetime_s: float) -> bytes:
    """The value of a record, as the DHT keeps it."""
    hundredths = min(0xFFFF, max(1, round(lifetime_s / _LIFETIME_UNIT_S))) if lifetime_s else 0
    content = hundredths.to_bytes(2, "big") + data
    signed = _signed_part(key, identity.public_key, content, written_at_s + RECORD_LIFETIME_S)
    packed: bytes = MSGPackSerializer.dumps(identity.sign(signed) + content)
    return packed


def read_record(subkey: object, value: bytes, expiration_s: float) -> Entry | None:
    """The entry in a record that was found valid; None where a node of ours returned something else."""
    content = unpack_bytes(value)
    if not isinstance(subkey, bytes) or len(subkey) != PUBLIC_KEY_BYTES or content is None:
        return None
    content = content[SIGNATURE_BYTES:]
    lifetime_s = min(MAX_LIFETIME_S, int.from_bytes(content[:2], "big") * _LIFETIME_UNIT_S)
    return Entry(peer_id_of(subkey), expiration_s - RECORD_LIFETIME_S, lifetime_s, content[2:])


class RecordValidator(RecordValidatorBase):
    """What any node of the swarm stores or believes: signed records of bounded size, nothing else."""

    def __init__(self) -> None:
        self._good: set[bytes] = set()

    def validate(self, record: DHTRecord) -> bool:
        """Called by hivemind for each record that a peer wants stored, or returns to us."""
        public_key, content = unpack_bytes(record.subkey), None
        if len(record.value) <= SIGNATURE_BYTES + _MAX_DATA_BYTES + 8:
            content = unpack_bytes(record.value)
        if public_key is None or len(public_key) != PUBLIC_KEY_BYTES:
            return False
        if content is None or len(content) < SIGNATURE_BYTES + 2:
            return False
        signed = _signed_part(record.key, public_key, content[SIGNATURE_BYTES:], record.expiration_time)
        digest = hashlib.sha256(content[:SIGNATURE_BYTES] + signed).digest()
        if digest in self._good:  # a record is met again and again; checking a signature takes 60 µs
            return True
        if not is_signed_by(public_key, content[:SIGNATURE_BYTES], signed):
            return False
        if len(self._good) >= _MAX_CACHED_CHECKS:
            self._good.clear()
        self._good.add(digest)
        return True


class BucketStorage(DHTLocalStorage):
    """What a node keeps: so many buckets, so many records in each, none for longer than it should.

    Args:
        now_s: the swarm's time.
    """

    def __init__(self, now_s: Callable[[], float]) -> None:
        super().__init__()
        self._now_s = now_s

    def store_subkey(self, key: DHTID, subkey: object, value: bytes, expiration_time: float) -> bool:
        """Keep a record if there is room, or if there is after one was forgotten that has ended."""
        if expiration_time > self._now_s() + RECORD_LIFETIME_S + CLOCK_TOLERANCE_S:
            return False
        found = self.get(key)
        if found is None:
            return len(self) < MAX_BUCKETS_HELD and bool(super().store_subkey(key, subkey, value, expiration_time))
        bucket = found.value
        if not isinstance(bucket, DictionaryDHTValue):
            return False
        if subkey not in bucket and len(bucket) >= CAPACITY and not self._make_room(bucket):
            return False
        return bool(super().store_subkey(key, subkey, value, expiration_time))

    def _make_room(self, bucket: DictionaryDHTValue) -> bool:
        for subkey, (value, expiration_s) in list(bucket.items()):
            entry = read_record(subkey, value, expiration_s)
            if entry is None or entry.written_at_s + entry.lifetime_s < self._now_s():
                del bucket[subkey]
                return True
        return False


def _signed_part(key: bytes, public_key: bytes, content: bytes, expiration_s: float) -> bytes:
    """Fixed lengths before the content, so that no two records read the same."""
    return struct.pack(">20s32sd", key.rjust(20, b"\0"), public_key, expiration_s) + content


def unpack_bytes(data: bytes) -> bytes | None:
    """The bytes in a msgpack `bin 8` or `bin 16`; None for anything else.

    hivemind unpacks what it reads without catching errors, so nothing else may pass.
    """
    if data[:1] == b"\xc4" and len(data) >= 2 and len(data) == 2 + data[1]:
        return data[2:]
    if data[:1] == b"\xc5" and len(data) >= 3 and len(data) == 3 + int.from_bytes(data[1:3], "big"):
        return data[3:]
    return None
