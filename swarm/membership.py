"""Who belongs to a private swarm: tokens, invitations, credentials and revocations, all checked without asking anybody.

    owner key ── signs ──> token: this member key, this role, until then       (swarm's name: the owner's public key)
    member key ─ signs ──> credential: this peer may show this token           (made by each node, for itself)

An invitation is a token with its member key, a secret; it travels in a join link. A node turns it into a credential
for its own libp2p identity. Whoever copies a credential gains nothing: it names a peer, whose key the copier lacks. The
owner takes a token back by listing its member key in a newer list of revocations.

    token         version 1 | role 1 | expires_at_s 4 | member key 32 | owner's signature 64
    credential    token | member's signature 64
    invitation    owner key 32 | member seed 32 | token
    revocations   version 1 | sequence 8 | (first bytes of a member key 8 | expires_at_s 4) … | owner's signature 64

Numbers are big-endian. Signatures cover a text that says what is signed, and all that comes before them. There is no
network and no clock in this module: bytes and the time are arguments.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Self

from cryptography.hazmat.primitives.asymmetric import ed25519

from swarm.errors import BadRequest, NotAMember
from swarm.identity import PUBLIC_KEY_BYTES, SIGNATURE_BYTES, Identity, is_signed_by

_VERSION = 1
_TOKEN = struct.Struct(">BBI32s")
_TOKEN_TEXT, _CREDENTIAL_TEXT, _REVOCATIONS_TEXT = b"swarm token\0", b"swarm credential\0", b"swarm revocations\0"
_LIST_HEAD, _LISTED = struct.Struct(">BQ"), struct.Struct(">8sI")

SEED_BYTES = 32
TOKEN_BYTES = _TOKEN.size + SIGNATURE_BYTES
CREDENTIAL_BYTES = TOKEN_BYTES + SIGNATURE_BYTES
INVITATION_BYTES = PUBLIC_KEY_BYTES + SEED_BYTES + TOKEN_BYTES

MAX_EXPIRES_AT_S = 0xFFFFFFFF
MAX_REVOKED = 330
"""Tokens in one list, which has to fit into a record of the directory; those that have expired need no place."""


class Role(enum.IntEnum):
    """What a member may do."""

    USE = 1
    """Read the directory and call servers."""
    SERVE = 2
    """That, and announce itself as a server."""


@dataclass(frozen=True, slots=True)
class Member:
    """What a token says, once it was found to be the owner's."""

    public_key: bytes
    role: Role
    expires_at_s: int

    @property
    def handle(self) -> bytes:
        """By which lists of revocations name it."""
        return self.public_key[: _LISTED.size - 4]

    def __str__(self) -> str:
        return f"member {self.handle.hex()}"


@dataclass(frozen=True, slots=True)
class Invitation:
    """All that it takes to be a member; whoever has it is one."""

    owner_key: bytes
    """Public key of the owner: the swarm that this is about."""
    token: bytes
    seed: bytes = field(repr=False)
    """Private key of the member."""

    @classmethod
    def make(cls, owner: Identity, role: Role, expires_at_s: float) -> Self:
        """A new member. Raises: BadRequest: no token can say that time."""
        if not 0 < expires_at_s <= MAX_EXPIRES_AT_S:
            raise BadRequest("an invitation must end between now and the year 2106")
        key = ed25519.Ed25519PrivateKey.generate()
        content = _TOKEN.pack(_VERSION, role, int(expires_at_s), key.public_key().public_bytes_raw())
        return cls(owner.public_key, content + owner.sign(_TOKEN_TEXT + content), key.private_bytes_raw())

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read an invitation. Raises: NotAMember: it is damaged, or its token is not this owner's for this key."""
        if len(data) != INVITATION_BYTES:
            raise NotAMember("the invitation has a wrong length")
        owner_key, seed = data[:PUBLIC_KEY_BYTES], data[PUBLIC_KEY_BYTES : PUBLIC_KEY_BYTES + SEED_BYTES]
        invitation = cls(owner_key, data[PUBLIC_KEY_BYTES + SEED_BYTES :], seed)
        if invitation.member.public_key != invitation._key.public_key().public_bytes_raw():
            raise NotAMember("the invitation's token is for another key than it has")
        return invitation

    def to_bytes(self) -> bytes:
        """As it travels in a link."""
        return self.owner_key + self.seed + self.token

    @property
    def member(self) -> Member:
        """Who one is with it. Raises: NotAMember: the owner has not signed its token."""
        return read_token(self.token, self.owner_key)

    def credential(self, peer_public_key: bytes) -> bytes:
        """What a peer shows to others: CREDENTIAL_BYTES."""
        return self.token + self._key.sign(_CREDENTIAL_TEXT + self.token + peer_public_key)

    @property
    def _key(self) -> ed25519.Ed25519PrivateKey:
        return ed25519.Ed25519PrivateKey.from_private_bytes(self.seed)


def read_token(token: bytes, owner_key: bytes) -> Member:
    """Raises: NotAMember: the owner has not signed it, or it has another form."""
    if len(token) != TOKEN_BYTES or token[0] != _VERSION or token[1] not in set(Role):
        raise NotAMember("the token has a form that this version does not know")
    content, signature = token[: _TOKEN.size], token[_TOKEN.size :]
    if not is_signed_by(owner_key, signature, _TOKEN_TEXT + content):
        raise NotAMember("the token is not signed by the owner of this swarm")
    _, role, expires_at_s, public_key = _TOKEN.unpack(content)
    return Member(public_key, Role(role), expires_at_s)


def read_credential(credential: bytes, owner_key: bytes, peer_public_key: bytes) -> Member:
    """Whom a peer shows itself to be; whether that counts now is another question (`Membership.check`).

    Raises: NotAMember: the owner has not signed the token, or the member key has not signed for this peer.
    """
    if len(credential) != CREDENTIAL_BYTES:
        raise NotAMember("there is no credential" if not credential else "the credential has a wrong length")
    token, signature = credential[:TOKEN_BYTES], credential[TOKEN_BYTES:]
    member = read_token(token, owner_key)
    if not is_signed_by(member.public_key, signature, _CREDENTIAL_TEXT + token + peer_public_key):
        raise NotAMember("the credential was made for another peer")
    return member


@dataclass(frozen=True, slots=True)
class Revocations:
    """The tokens that no longer count, as the owner has last said."""

    sequence: int = 0
    """Of two lists, the one with the larger number counts; 0: the owner has never made one."""
    expires_at_s: Mapping[bytes, int] = field(default_factory=dict)
    """Handle of each member -> when its token would have ended."""
    data: bytes = b""
    """The list as it travels."""

    @classmethod
    def make(cls, owner: Identity, sequence: int, members: Iterable[Member], *, now_s: float) -> Self:
        """Sign a new list, without those whose tokens have ended anyway. Raises: BadRequest: it gets too long."""
        revoked = {each.handle: each.expires_at_s for each in members if each.expires_at_s > now_s}
        if len(revoked) > MAX_REVOKED:
            raise BadRequest(
                f"at most {MAX_REVOKED} members can be revoked before their invitations end: begin a new swarm"
            )
        content = _LIST_HEAD.pack(_VERSION, sequence)
        content += b"".join(_LISTED.pack(handle, until_s) for handle, until_s in sorted(revoked.items()))
        return cls(sequence, revoked, content + owner.sign(_REVOCATIONS_TEXT + content))

    @classmethod
    def from_bytes(cls, data: bytes, owner_key: bytes) -> Self:
        """Read a list. Raises: NotAMember: the owner has not signed it, or it has another form."""
        content, signature = data[:-SIGNATURE_BYTES], data[-SIGNATURE_BYTES:]
        listed = content[_LIST_HEAD.size :]
        if len(content) < _LIST_HEAD.size or content[0] != _VERSION or len(listed) % _LISTED.size:
            raise NotAMember("the list of revocations has a form that this version does not know")
        if len(listed) > MAX_REVOKED * _LISTED.size:
            raise NotAMember("the list of revocations is too long")
        if not is_signed_by(owner_key, signature, _REVOCATIONS_TEXT + content):
            raise NotAMember("the list of revocations is not signed by the owner of this swarm")
        _, sequence = _LIST_HEAD.unpack(content[: _LIST_HEAD.size])
        return cls(sequence, dict(_LISTED.iter_unpack(listed)), data)

    def __contains__(self, member: Member) -> bool:
        return member.handle in self.expires_at_s


class Membership:
    """One peer's place in a private swarm, and what it knows of the others'.

    Args:
        invitation: who this peer is.
        peer_public_key: of its libp2p identity.
    Raises: NotAMember: the owner has not signed the invitation.
    """

    def __init__(self, invitation: Invitation, peer_public_key: bytes) -> None:
        self.owner_key = invitation.owner_key
        self.member = invitation.member
        self.credential: bytes = invitation.credential(peer_public_key)
        """What this peer shows."""
        self.revocations = Revocations()

    def admit(self, credential: bytes, peer_public_key: bytes, now_s: float, *, role: Role = Role.USE) -> Member:
        """Return whom a peer shows itself to be.

        Raises: NotAMember: nobody, nobody any more, or nobody who may do this. The reason is for our log only.
        """
        member = read_credential(credential, self.owner_key, peer_public_key)
        self.check(member, now_s, role=role)
        return member

    def check(self, member: Member, now_s: float, *, role: Role = Role.USE) -> None:
        """Raises: NotAMember: its token has ended or was taken back, or it may not do this."""
        if now_s >= member.expires_at_s:
            raise NotAMember(f"the token of {member} expired {now_s - member.expires_at_s:.0f} s ago")
        if member in self.revocations:
            raise NotAMember(f"the token of {member} was revoked")
        if member.role < role:
            raise NotAMember(f"{member} may use this swarm, but not serve in it")

    def adopt(self, revocations: Revocations) -> bool:
        """Go by this list from now on, if it is newer than ours; return whether it is."""
        if revocations.sequence <= self.revocations.sequence:
            return False
        self.revocations = revocations
        return True

    def __repr__(self) -> str:
        return f"Membership({self.member})"
