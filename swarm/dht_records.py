"""What lies in the DHT: one record for each entry of a bucket, signed by its peer.

A bucket is a hivemind dictionary under the bucket's key. Of each record in it:

    subkey       the peer's Ed25519 public key (32 bytes): a reader derives the peer id from it
    value        signature (64 bytes), lifetime in hundredths of a second (2 bytes), data; in a private swarm, the
                 writer's credential stands before the data (swarm/membership.py)
    expiration   the time of writing, by the swarm's clock, plus RECORD_LIFETIME_S

The signature covers key, subkey, expiration and all of the value but itself. Nobody can write for another peer, nor
copy a record into another bucket or another time. The DHT keeps of two records of a peer the one with the later
expiration, so the last write wins; how long it counts for readers is its own affair (swarm/listing.py). A lifetime of
0 takes an entry back.

In a private swarm, records of those who never were members are treated like unsigned ones. Those of members that no
longer are, are left out one by one (`read_record`): hivemind takes a bucket as a whole, or not at all.

Every node refuses to store or to return anything else (`RecordValidator`). Of more records than there is room for it
keeps those of many address prefixes rather than of one (`BucketStorage`). This module imports hivemind; only
swarm/dht.py imports it, when a DHT is opened.
"""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.utils import MSGPackSerializer

from swarm.admission import Gate
from swarm.announcement import MAX_ANNOUNCEMENT_BYTES
from swarm.buckets import CAPACITY, REVOCATIONS
from swarm.directory import MAX_LIFETIME_S
from swarm.errors import NotAMember
from swarm.identity import PUBLIC_KEY_BYTES, SIGNATURE_BYTES, Identity, is_signed_by, peer_id_of
from swarm.listing import Entry
from swarm.membership import CREDENTIAL_BYTES, Role, read_credential
from swarm.origins import Source, largest_share, who_gives_way

logger = logging.getLogger(__name__)

RECORD_LIFETIME_S = MAX_LIFETIME_S + 300.0

CLOCK_TOLERANCE_S = 300.0
"""How far ahead a writer's clock may be of a node's before that one refuses what it writes; behind, it may be more."""

MAX_BUCKETS_HELD = 4096
"""Buckets that one node keeps for others."""

MAX_BYTES_HELD = 64 * 2**20
"""What all records that it keeps may take: room for 40,000 servers."""

RECORD_COST_BYTES = 1024
"""What a record takes in memory beside its value."""

REFUSED_S = 10.0
"""How long the prefix that has most is refused, once there is no room, before shares are counted again."""

_MAX_DATA_BYTES = MAX_ANNOUNCEMENT_BYTES
_LIFETIME_UNIT_S = 0.01
_MAX_CACHED_CHECKS = 8192


def sign_record(
    identity: Identity, key: bytes, data: bytes, *, written_at_s: float, lifetime_s: float, credential: bytes = b""
) -> bytes:
    """The value of a record, as the DHT keeps it; with the writer's credential in a private swarm."""
    hundredths = min(0xFFFF, max(1, round(lifetime_s / _LIFETIME_UNIT_S))) if lifetime_s else 0
    content = hundredths.to_bytes(2, "big") + credential + data
    signed = _signed_part(key, identity.public_key, content, written_at_s + RECORD_LIFETIME_S)
    packed: bytes = MSGPackSerializer.dumps(identity.sign(signed) + content)
    return packed


def read_record(subkey: object, value: bytes, expiration_s: float, gate: Gate | None = None) -> Entry | None:
    """The entry in a record that was found valid; None where its writer is not a member of a private swarm any more.

    Also None where a node of ours returned something else.
    """
    content = unpack_bytes(value)
    if not isinstance(subkey, bytes) or len(subkey) != PUBLIC_KEY_BYTES or content is None:
        return None
    content = content[SIGNATURE_BYTES:]
    lifetime_s = min(MAX_LIFETIME_S, int.from_bytes(content[:2], "big") * _LIFETIME_UNIT_S)
    entry = Entry(peer_id_of(subkey), expiration_s - RECORD_LIFETIME_S, lifetime_s, content[2:])
    return entry if gate is None else _member_entry(gate, subkey, entry)


def _member_entry(gate: Gate, public_key: bytes, entry: Entry) -> Entry | None:
    """The entry without its writer's credential, as long as that lets it count."""
    try:
        member = gate.read(entry.data[:CREDENTIAL_BYTES], public_key)
    except NotAMember as exc:
        logger.debug("what peer %s has written is left out: %s", entry.peer_id, exc)
        return None
    return replace(
        entry,
        data=entry.data[CREDENTIAL_BYTES:],
        may_serve=member.role is Role.SERVE,
        lifetime_s=max(0.0, min(entry.lifetime_s, member.expires_at_s - entry.written_at_s)),
    )


class RecordValidator(RecordValidatorBase):
    """What any node of the swarm stores or believes: signed records of bounded size, nothing else.

    Args:
        owner_key: of a private swarm, by whose owner the writers of records were invited.
    """

    def __init__(self, owner_key: bytes | None = None) -> None:
        self._owner_key = owner_key
        self._num_credential_bytes = 0 if owner_key is None else CREDENTIAL_BYTES
        self._good: set[bytes] = set()

    def validate(self, record: DHTRecord) -> bool:
        """Called by hivemind for each record that a peer wants stored, or returns to us."""
        public_key, content = unpack_bytes(record.subkey), None
        if len(record.value) <= SIGNATURE_BYTES + self._num_credential_bytes + _MAX_DATA_BYTES + 8:
            content = unpack_bytes(record.value)
        if public_key is None or len(public_key) != PUBLIC_KEY_BYTES:
            return False
        if content is None or len(content) < SIGNATURE_BYTES + 2 + self._num_credential_bytes:
            return False
        signed = _signed_part(record.key, public_key, content[SIGNATURE_BYTES:], record.expiration_time)
        digest = hashlib.sha256(content[:SIGNATURE_BYTES] + signed).digest()
        if digest in self._good:  # a record is met again and again; checking a signature takes 60 µs
            return True
        if not is_signed_by(public_key, content[:SIGNATURE_BYTES], signed):
            return False
        if self._owner_key is not None and not self._was_invited(public_key, content[SIGNATURE_BYTES + 2 :]):
            return False
        if len(self._good) >= _MAX_CACHED_CHECKS:
            self._good.clear()
        self._good.add(digest)
        return True

    def _was_invited(self, public_key: bytes, shown: bytes) -> bool:
        assert self._owner_key is not None
        try:
            read_credential(shown[:CREDENTIAL_BYTES], self._owner_key, public_key)
        except NotAMember as exc:
            logger.info("a record of peer %s is refused: %s", peer_id_of(public_key), exc)
            return False
        return True


class BucketStorage(DHTLocalStorage):
    """What a node keeps: so many buckets, so many records in each, so many bytes, none for longer than it should.

    Where there is no room, records of the address prefix that has most give way (swarm/origins.py).

    Args:
        now_s: the swarm's time.
        gate: of a private swarm, where it keeps members' records only.
    """

    def __init__(self, now_s: Callable[[], float], gate: Gate | None = None) -> None:
        super().__init__()
        self._now_s = now_s
        self._gate = gate
        self._revocations_key = DHTID.generate(REVOCATIONS.key)
        self._source: ContextVar[Source | None] = ContextVar("source", default=None)
        self._origins: dict[DHTID, dict[bytes, str]] = {}
        """Bucket -> public key -> prefix that its record came from, the newest one at the end."""
        self._num_bytes = 0
        """What is kept at most: what has ended meanwhile still counts."""
        self._refused, self._refused_until_s = "", 0.0
        """The prefix that had most when there was no room, and until when it is not looked again."""

    @contextmanager
    def storing_for(self, source: Source) -> Iterator[None]:
        """Note from whom what is stored in this task comes."""
        token = self._source.set(source)
        try:
            yield
        finally:
            self._source.reset(token)

    def store_subkey(self, key: DHTID, subkey: object, value: bytes, expiration_time: float) -> bool:
        """Keep a record if there is room, or if there is after others were forgotten."""
        if expiration_time > self._now_s() + RECORD_LIFETIME_S + CLOCK_TOLERANCE_S:
            return False
        if self._gate is not None and not self._counts(self._gate, key, subkey, value, expiration_time):
            return True  # it is dropped; hivemind stores the rest of a bucket that it is part of
        assert isinstance(subkey, bytes)
        source = self._source.get()
        prefix = "" if source is None else source.prefix
        by_owner = source is not None and source.peer_id == peer_id_of(subkey)
        found = self.get(key)
        if found is not None and not isinstance(found.value, DictionaryDHTValue):
            return False
        bucket = DictionaryDHTValue() if found is None else found.value
        known = bucket.get(subkey)
        if known is not None and known.expiration_time >= expiration_time:
            # Not hivemind's affair: it would let an older record, which anybody can repeat, end a newer one early.
            is_same = bool(known.value == value)
            self._note_origin(key, subkey, prefix, by_owner and is_same)
            return is_same
        if known is None and not (self._has_room(prefix, not bucket) and self._fits(key, bucket, prefix)):
            return False
        if not super().store_subkey(key, subkey, value, expiration_time):
            return False
        self._num_bytes += 0 if known is not None else len(value) + RECORD_COST_BYTES
        self._note_origin(key, subkey, prefix, by_owner)
        return True

    def _counts(self, gate: Gate, key: DHTID, subkey: object, value: bytes, expiration_s: float) -> bool:
        """Whether a record in a private swarm is a member's and, of a list of revocations, as new as any we know."""
        entry = read_record(subkey, value, expiration_s, gate)
        if entry is None or key != self._revocations_key or not entry.lifetime_s:
            return entry is not None
        try:
            if gate.adopt(entry.data):
                self._forget(key)  # older ones, which must not take the room
        except NotAMember as exc:
            logger.info("peer %s wants a list of revocations stored: %s", entry.peer_id, exc)
            return False
        return entry.data == gate.revocations.data

    def _forget(self, key: DHTID) -> None:
        found = self.get(key)
        bucket = None if found is None else found.value
        for subkey, _ in list(bucket.items()) if isinstance(bucket, DictionaryDHTValue) else ():
            self._remove(key, bucket, subkey)

    def _note_origin(self, key: DHTID, subkey: bytes, prefix: str, by_owner: bool) -> None:
        origins = self._origins.setdefault(key, {})
        if by_owner or subkey not in origins:
            origins[subkey] = prefix

    def _fits(self, key: DHTID, bucket: DictionaryDHTValue, prefix: str) -> bool:
        """Whether one more record may go into a bucket; if it is full, one that has ended, or gives way, makes room."""
        if len(bucket) < CAPACITY:
            return True
        for subkey, (value, expiration_s) in list(bucket.items()):
            entry = read_record(subkey, value, expiration_s, self._gate)
            if entry is None or entry.written_at_s + entry.lifetime_s < self._now_s():
                self._remove(key, bucket, subkey)
                return True
        self._prune(key, bucket)
        leaving = who_gives_way(self._origins[key], prefix)
        if leaving is not None:
            self._remove(key, bucket, leaving)
        return leaving is not None

    def _has_room(self, prefix: str, is_first: bool) -> bool:
        """Whether the node may keep one more record, the first of its bucket or not; if it is full, the prefix that has
        most gives up half of it."""
        max_buckets = MAX_BUCKETS_HELD if is_first else MAX_BUCKETS_HELD + 1
        if len(self) < max_buckets and self._num_bytes < MAX_BYTES_HELD:
            return True
        if prefix == self._refused and self._now_s() < self._refused_until_s:
            return False
        for key in self._origins.keys() - self.data.keys():
            del self._origins[key]
        records = [
            (self._prune(key, bucket)[subkey], len(value) + RECORD_COST_BYTES, key, bucket, subkey)
            for key, (bucket, _) in list(self.items())
            for subkey, (value, _) in list(bucket.items())
        ]
        self._num_bytes = sum(size for _, size, *_ in records)
        if len(self) < max_buckets and self._num_bytes < MAX_BYTES_HELD:
            return True
        largest, num_bytes = largest_share((origin, size) for origin, size, *_ in records)
        if largest == prefix:
            self._refused, self._refused_until_s = prefix, self._now_s() + REFUSED_S
            return False
        wanted_bytes = self._num_bytes - num_bytes // 2
        for origin, _, key, bucket, subkey in reversed(records):
            if origin == largest and self._num_bytes > wanted_bytes:
                self._remove(key, bucket, subkey)
        return True

    def _remove(self, key: DHTID, bucket: DictionaryDHTValue, subkey: bytes) -> None:
        self._num_bytes -= len(bucket.get(subkey).value) + RECORD_COST_BYTES
        self._origins.get(key, {}).pop(subkey, None)
        del bucket[subkey]
        if not bucket:
            del self[key]

    def _prune(self, key: DHTID, bucket: DictionaryDHTValue) -> dict[bytes, str]:
        """The origins of what is in a bucket, those forgotten that are not any more."""
        origins = self._origins.get(key, {})
        self._origins[key] = {subkey: origin for subkey, origin in origins.items() if subkey in bucket.data}
        for subkey in bucket.data.keys() - self._origins[key].keys():
            self._origins[key][subkey] = ""
        return self._origins[key]


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
