"""Tokens, credentials and revocations: what is believed of them, and that nobody else's key makes one."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import BadRequest, NotAMember
from swarm.identity import Identity, public_key_of
from swarm.membership import (
    CREDENTIAL_BYTES,
    INVITATION_BYTES,
    MAX_REVOKED,
    TOKEN_BYTES,
    Invitation,
    Member,
    Membership,
    Revocations,
    Role,
    read_credential,
)

NOW_S = 1_800_000_000.0


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Identity]]:
    directory = tmp_path_factory.mktemp("keys")
    yield [Identity.load_or_create(directory / f"{number}.key") for number in range(4)]


@pytest.fixture(scope="module")
def owner(keys: list[Identity]) -> Identity:
    return keys[0]


@pytest.fixture(scope="module")
def peer(keys: list[Identity]) -> Identity:
    return keys[1]


def _invite(owner: Identity, role: Role = Role.SERVE, lifetime_s: float = 60.0) -> Invitation:
    return Invitation.make(owner, role, NOW_S + lifetime_s)


def test_a_member_is_admitted_with_the_role_that_it_was_given(owner: Identity, peer: Identity) -> None:
    invitation = _invite(owner, Role.USE)
    membership = Membership(_invite(owner), owner.public_key)
    credential = invitation.credential(peer.public_key)
    assert (len(invitation.token), len(credential)) == (TOKEN_BYTES, CREDENTIAL_BYTES) == (102, 166)
    member = membership.admit(credential, peer.public_key, NOW_S)
    assert (member.role, member.expires_at_s) == (Role.USE, NOW_S + 60)
    with pytest.raises(NotAMember, match="not serve"):
        membership.admit(credential, peer.public_key, NOW_S, role=Role.SERVE)


def test_a_copied_credential_is_worth_nothing_to_another_peer(owner: Identity, keys: list[Identity]) -> None:
    credential = _invite(owner).credential(keys[1].public_key)
    with pytest.raises(NotAMember, match="another peer"):
        read_credential(credential, owner.public_key, keys[2].public_key)


def test_another_owners_member_is_refused(owner: Identity, keys: list[Identity], peer: Identity) -> None:
    membership = Membership(_invite(owner), owner.public_key)
    with pytest.raises(NotAMember, match="not signed by the owner"):
        membership.admit(_invite(keys[2]).credential(peer.public_key), peer.public_key, NOW_S)


def test_an_expired_token_is_refused(owner: Identity, peer: Identity) -> None:
    membership = Membership(_invite(owner), owner.public_key)
    credential = _invite(owner, lifetime_s=10).credential(peer.public_key)
    membership.admit(credential, peer.public_key, NOW_S + 9)
    with pytest.raises(NotAMember, match="expired 5 s ago"):
        membership.admit(credential, peer.public_key, NOW_S + 15)


def test_every_changed_byte_of_a_credential_is_noticed(owner: Identity, peer: Identity) -> None:
    credential = _invite(owner).credential(peer.public_key)
    for place in range(len(credential)):
        damaged = bytearray(credential)
        damaged[place] ^= 1
        with pytest.raises(NotAMember):
            read_credential(bytes(damaged), owner.public_key, peer.public_key)


@given(st.binary(max_size=2 * CREDENTIAL_BYTES))
def test_no_bytes_make_a_member(data: bytes) -> None:
    with pytest.raises(NotAMember):
        read_credential(data, bytes(32), bytes(32))
    with pytest.raises(NotAMember):
        Revocations.from_bytes(data, bytes(32))
    with pytest.raises(NotAMember):
        Invitation.from_bytes(data)


def test_an_invitation_survives_its_bytes_and_shows_no_secret(owner: Identity) -> None:
    invitation = _invite(owner)
    data = invitation.to_bytes()
    assert len(data) == INVITATION_BYTES == 166
    assert Invitation.from_bytes(data) == invitation
    assert repr(invitation.seed) not in repr(invitation) and invitation.seed.hex() not in repr(invitation)
    other = Invitation(invitation.owner_key, invitation.token, bytes(32))
    with pytest.raises(NotAMember, match="another key"):
        Invitation.from_bytes(other.to_bytes())


def test_a_list_of_revocations_counts_if_it_is_the_owners_and_newer(owner: Identity, keys: list[Identity]) -> None:
    peer = keys[1]
    kept, gone = _invite(owner), _invite(owner)
    membership = Membership(_invite(owner), owner.public_key)
    second = Revocations.from_bytes(Revocations.make(owner, 2, [gone.member], now_s=NOW_S).data, owner.public_key)
    assert membership.adopt(second)
    assert not membership.adopt(Revocations.make(owner, 1, [], now_s=NOW_S))
    assert not membership.adopt(second)
    membership.admit(kept.credential(peer.public_key), peer.public_key, NOW_S)
    with pytest.raises(NotAMember, match="revoked"):
        membership.admit(gone.credential(peer.public_key), peer.public_key, NOW_S)
    with pytest.raises(NotAMember, match="not signed by the owner"):
        Revocations.from_bytes(Revocations.make(keys[2], 3, [], now_s=NOW_S).data, owner.public_key)


def test_a_list_drops_expired_tokens_and_fits_into_a_record(owner: Identity) -> None:
    members = [Member(number.to_bytes(32, "little"), Role.USE, int(NOW_S) + 60) for number in range(MAX_REVOKED)]
    ended = Member(b"\xff" * 32, Role.USE, int(NOW_S) - 1)
    revocations = Revocations.make(owner, 1, [*members, ended], now_s=NOW_S)
    assert len(revocations.expires_at_s) == MAX_REVOKED and ended not in revocations
    assert len(revocations.data) <= 4096
    with pytest.raises(BadRequest, match="begin a new swarm"):
        Revocations.make(owner, 2, [*members, Member(b"\xfe" * 32, Role.USE, int(NOW_S) + 60)], now_s=NOW_S)


def test_a_token_cannot_say_a_time_that_it_has_no_room_for(owner: Identity) -> None:
    for expires_at_s in (0.0, 2.0**32):
        with pytest.raises(BadRequest, match="2106"):
            Invitation.make(owner, Role.USE, expires_at_s)


def test_a_peer_id_names_its_public_key(keys: list[Identity]) -> None:
    for identity in keys:
        assert public_key_of(identity.peer_id) == identity.public_key
    assert public_key_of("QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N") is None  # an RSA key's
    assert public_key_of("not a peer") is None


def test_keys_are_files_of_their_owner_only_and_are_never_shown(tmp_path: Path) -> None:
    identity = Identity.load_or_create(tmp_path / "owner.key")
    secret = identity.path.read_bytes()[4:36]
    assert identity.path.stat().st_mode & 0o777 == 0o600
    assert secret.hex() not in repr(identity) and str(secret) not in repr(vars(identity)["path"])
    assert list(tmp_path.iterdir()) == [identity.path]  # nothing half-written stays
    with pytest.raises(TypeError):
        pickle.dumps(identity)
