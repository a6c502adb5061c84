"""The directory in a hivemind DHT: which records there are, who may write them, and what readers believe.

Two kinds of DHT keys, each a dictionary with one entry per server:

    swarm/1/model/<fingerprint>    the Announcement of every server of that model
    swarm/1/models                 the ModelListing of every server (JSON: name, fingerprint, num_blocks, hidden_size)

- The subkey of an entry is hivemind's owner marker, `[owner:ssh-rsa …]`, so only the holder of that RSA key can
  write it (`RSASignatureValidator`), and a reader derives the peer id from it: nobody announces for another peer.
- The DHT keeps, of two entries, the one with the later DHT expiration. We set it to the time of writing plus
  RECORD_LIFETIME_S, so the last write wins; until when an announcement counts is what it says itself
  (`expires_at_s`). A withdrawal is an empty entry.
- Times in records are the swarm's: each node measures how far its clock is from its initial peers' (see SwarmClock).

Every node refuses to store or to return anything else (`AnnouncementValidator`), so nothing that hivemind would
choke on or that could stay for ever gets in. This module imports hivemind; only swarm/dht.py imports it, when a DHT
is opened.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from functools import partial
from typing import TypeVar

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from hivemind.dht import DHTNode
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.dht.validation import DHTRecord
from hivemind.utils.crypto import RSAPrivateKey, RSAPublicKey
from pydantic import TypeAdapter, ValidationError

from swarm.announcement import MAX_ANNOUNCEMENT_BYTES, Announcement, ModelListing
from swarm.dht_contacts import Contacts
from swarm.directory import MAX_LIFETIME_S, DirectoryStatistics, check_lifetime, distinct_models
from swarm.errors import BadRequest, PeerUnavailable, ProtocolError
from swarm.identity import Identity, peer_id_of

T = TypeVar("T")

MODELS_KEY = "swarm/1/models"
RECORD_LIFETIME_S = MAX_LIFETIME_S + 300.0
CLOCK_TOLERANCE_S = 300.0
"""How far apart the clocks of two DHT nodes may be before one refuses what the other writes."""

_MAX_VALUE_BYTES = MAX_ANNOUNCEMENT_BYTES + 1024  # the signature, and msgpack's header
_MAX_CACHED_CHECKS = 8192
_OWNER = re.compile(rb"\[owner:(ssh-rsa [A-Za-z0-9+/=]{200,800})\]")
_TOMBSTONE = b""

_listing_of_json = TypeAdapter(ModelListing).validate_json


def model_key(model_fingerprint: str) -> str:
    return f"swarm/1/model/{model_fingerprint}"


def signing_key(identity: Identity) -> RSAPrivateKey:
    """The identity's key as hivemind's own class, which knows no other way in than unpickling."""
    key = RSAPrivateKey.__new__(RSAPrivateKey)
    key.__setstate__({"_private_key": identity.private_key_der()})
    return key


class SwarmClock:
    """This machine's clock, corrected by its distance to the clocks of the initial peers."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self.offset_s = 0.0

    def now_s(self) -> float:
        """The swarm's time."""
        return self._clock() + self.offset_s

    def local_now_s(self) -> float:
        return self._clock()


class AnnouncementValidator(RSASignatureValidator):
    """What any node of the swarm stores or believes: signed entries of bounded size and lifetime, nothing else."""

    def __init__(self, key: RSAPrivateKey, clock: SwarmClock) -> None:
        super().__init__(key)
        self._clock = clock
        self._good: set[bytes] = set()
        self._peer_ids: dict[bytes, str | None] = {}

    def validate(self, record: DHTRecord) -> bool:
        """Called by hivemind for each record that a peer wants stored, or returns to us."""
        if record.expiration_time > self._clock.now_s() + RECORD_LIFETIME_S + CLOCK_TOLERANCE_S:
            return False
        subkey = _unpack_bytes(record.subkey)
        if subkey is None or len(record.value) > _MAX_VALUE_BYTES or self.owner(subkey) is None:
            return False
        if _unpack_bytes(self.strip_value(record)) is None:
            return False
        digest = hashlib.sha256(
            repr((record.key, record.subkey, record.value, record.expiration_time)).encode()
        ).digest()
        if digest in self._good:  # a read meets each record once per replica; checking a signature takes 50 µs
            return True
        if not super().validate(record):
            return False
        if len(self._good) >= _MAX_CACHED_CHECKS:
            self._good.clear()
        self._good.add(digest)
        return True

    def owner(self, subkey: bytes) -> str | None:
        """The peer id of the key that an owner marker names; None if it is not a marker that we accept."""
        if subkey not in self._peer_ids:
            if len(self._peer_ids) >= _MAX_CACHED_CHECKS:
                self._peer_ids.clear()
            self._peer_ids[subkey] = _owner_peer_id(subkey)
        return self._peer_ids[subkey]


class HivemindDirectory:
    """The directory as one DHT node sees it."""

    def __init__(
        self,
        node: DHTNode,
        validator: AnnouncementValidator,
        identity: Identity,
        clock: SwarmClock,
        contacts: Contacts,
    ) -> None:
        self._node = node
        self._validator = validator
        self._peer_id = identity.peer_id
        self._clock = clock
        self._contacts = contacts
        self._last_write_s = 0.0
        self._announced_fingerprint: str | None = None
        self._num_announced = self._num_withdrawn = self._num_reads = self._num_dropped = 0

    async def announce(self, announcement: Announcement) -> None:
        """Publish; see swarm.directory.Directory.

        Raises:
            BadRequest: another peer's, too long-lived, or too large.
            PeerUnavailable: no DHT node took it.
        """
        self._check_own(announcement)
        check_lifetime(announcement, self._clock.local_now_s())
        expires_at_s = announcement.expires_at_s + self._clock.offset_s
        entries = {
            model_key(announcement.model_fingerprint): _encode(
                announcement.model_copy(update={"expires_at_s": expires_at_s}).to_bytes()
            ),
            MODELS_KEY: _encode(json.dumps(asdict(announcement.listing) | {"expires_at_s": expires_at_s}).encode()),
        }
        previous, self._announced_fingerprint = self._announced_fingerprint, announcement.model_fingerprint
        if previous not in (None, announcement.model_fingerprint):
            entries[model_key(str(previous))] = _TOMBSTONE
        try:
            await self._reaching_somebody(lambda: self._store(entries))
        except PeerUnavailable:
            await self._store(entries)  # here at least: who knows this node can ask it, be it the last of its swarm
            raise
        self._num_announced += 1

    async def withdraw(self, announcement: Announcement) -> None:
        """Write a tombstone over this peer's entries.

        Raises: PeerUnavailable: no DHT node took it.
        """
        self._check_own(announcement)
        self._announced_fingerprint = None
        await self._store({model_key(announcement.model_fingerprint): _TOMBSTONE, MODELS_KEY: _TOMBSTONE})
        self._num_withdrawn += 1

    async def servers(self, model_fingerprint: str) -> list[Announcement]:
        """Live announcements; see swarm.directory.Directory.

        Raises: PeerUnavailable: contact with the swarm is lost and none of the initial peers answers.
        """
        found: dict[str, Announcement] = {}
        for peer_id, written_at_s, data in await self._read(model_key(model_fingerprint)):
            try:
                announcement = Announcement.from_bytes(data)
            except ProtocolError:
                self._num_dropped += 1
                continue
            if announcement.peer_id != peer_id or announcement.model_fingerprint != model_fingerprint:
                self._num_dropped += 1
            elif self._is_live(written_at_s, announcement.expires_at_s):
                self._contacts.known.meet(peer_id, announcement.multiaddrs)
                local_expiry_s = announcement.expires_at_s - self._clock.offset_s
                found[peer_id] = announcement.model_copy(update={"expires_at_s": local_expiry_s})
        return [found[peer_id] for peer_id in sorted(found)]

    async def models(self) -> list[ModelListing]:
        """What live servers serve.

        Raises: PeerUnavailable: as for `servers`.
        """
        listings = []
        for _, written_at_s, data in await self._read(MODELS_KEY):
            try:
                expires_at_s = _expiry_of_json(data)
                listing = _listing_of_json(data)
                if not (listing.name.isprintable() and listing.fingerprint.isprintable()):
                    raise ValueError("unprintable")
            except (ValidationError, ValueError):
                self._num_dropped += 1
                continue
            if self._is_live(written_at_s, expires_at_s):
                listings.append(listing)
        return distinct_models(listings)

    def statistics(self) -> DirectoryStatistics:
        """Counts since this directory was opened."""
        return DirectoryStatistics(
            num_announced=self._num_announced,
            num_withdrawn=self._num_withdrawn,
            num_reads=self._num_reads,
            num_dropped=self._num_dropped,
        )

    def _check_own(self, announcement: Announcement) -> None:
        if announcement.peer_id != self._peer_id:
            raise BadRequest(f"peer {self._peer_id} cannot announce for {announcement.peer_id}")

    def _is_live(self, written_at_s: float, expires_at_s: float) -> bool:
        return self._clock.now_s() < expires_at_s <= written_at_s + MAX_LIFETIME_S + 1.0

    async def _reaching_somebody(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do it over newly made contacts if nobody answered: hivemind takes such silence for an empty swarm.

        Raises: PeerUnavailable: there is still nobody.
        """
        await self._contacts.ensure()
        result = await work()
        if self._contacts.lost:
            await self._contacts.ensure()
            result = await work()
        if self._contacts.lost:
            raise self._contacts.known.unreachable()
        return result

    async def _store(self, entries: dict[str, bytes]) -> None:
        self._last_write_s = max(self._clock.now_s(), self._last_write_s + 1e-3)
        stored = await self._node.store_many(
            keys=list(entries),
            values=list(entries.values()),
            expiration_time=self._last_write_s + RECORD_LIFETIME_S,
            subkeys=[self._validator.local_public_key] * len(entries),
        )
        if not all(stored.values()):
            raise PeerUnavailable(
                "no node of the DHT stored this announcement: contact with the swarm is lost, "
                f"or this machine's clock is off by more than {CLOCK_TOLERANCE_S / 60:.0f} minutes"
            )

    async def _read(self, key: str) -> list[tuple[str, float, bytes]]:
        """(owner's peer id, time of writing, value) of each entry that is not a tombstone."""
        self._num_reads += 1
        # Search for an expiration that no entry reaches: NaN. With infinity, one lying node could end the search.
        search = partial(self._node.get_many, [key], sufficient_expiration_time=math.nan)
        found = (await self._reaching_somebody(search))[key]
        entries = []
        for subkey, (value, expiration_s) in found.value.items() if found and isinstance(found.value, dict) else ():
            peer_id = self._validator.owner(subkey)
            if peer_id is None or not isinstance(value, bytes):
                self._num_dropped += 1
            elif value != _TOMBSTONE:
                entries.append((peer_id, expiration_s - RECORD_LIFETIME_S, value))
        return entries


def _encode(json_bytes: bytes) -> bytes:
    # hivemind finds the signature by searching the value for this marker; in JSON it can only be part of a string.
    return json_bytes.replace(b"[signature:", b"\\u005bsignature:")


def _expiry_of_json(data: bytes) -> float:
    if len(data) > MAX_ANNOUNCEMENT_BYTES:
        raise ValueError("too large")
    value = json.loads(data)
    expires_at_s = value.get("expires_at_s") if isinstance(value, dict) else None
    if not isinstance(expires_at_s, float):
        raise ValueError("no expiry")
    return expires_at_s


def _owner_peer_id(subkey: bytes) -> str | None:
    match = _OWNER.fullmatch(subkey)
    if match is None:
        return None
    try:
        key = load_ssh_public_key(match[1])
    except (ValueError, UnsupportedAlgorithm):
        return None
    if not isinstance(key, rsa.RSAPublicKey) or not 2048 <= key.key_size <= 4096:
        return None
    if RSAPublicKey(key).to_bytes() != match[1]:  # one owner, one spelling
        return None
    return peer_id_of(key)


def _unpack_bytes(data: bytes) -> bytes | None:
    """The bytes in a msgpack `bin 8` or `bin 16`; None for anything else.

    hivemind unpacks what it reads without catching errors, so nothing else may pass.
    """
    if data[:1] == b"\xc4" and len(data) >= 2 and len(data) == 2 + data[1]:
        return data[2:]
    if data[:1] == b"\xc5" and len(data) >= 3 and len(data) == 3 + int.from_bytes(data[1:3], "big"):
        return data[3:]
    return None
