"""Names for join links, the owner's book of members, and what the commands for both say to bad input. No network."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from swarm.errors import BadLink, BadRequest, NotAMember, ResourceError
from swarm.identity import Identity
from swarm.link import JoinLink
from swarm.membership import Invitation, Membership, Revocations, Role
from swarm.ownership import GUESTS, OWNER, OwnedSwarm, open_owned, owned_names, the_owned
from swarm.profiles import resolve_join, save_link, saved_links

PEER = "/ip4/127.0.0.1/tcp/31337/p2p/12D3KooWHXf2Mi5W8hQPg9F2vjvSTpKHdpWy1yWPnFdUCqW8DJVB"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """$XDG_CONFIG_HOME."""
    return tmp_path


@pytest.fixture
def config_dir(home: Path) -> Path:
    return home / "swarm"


@pytest.fixture
def owned(config_dir: Path) -> OwnedSwarm:
    return open_owned(config_dir, "home", create=True)


def _link(owned: OwnedSwarm, lifetime_s: float = 600.0) -> JoinLink:
    return JoinLink((PEER,), invitation=Invitation.make(owned.owner, Role.USE, time.time() + lifetime_s))


def _swarm(home: Path, *arguments: str, said: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "swarm.cli.app", *arguments]
    environment = {"XDG_CONFIG_HOME": str(home), "PATH": "/usr/bin:/bin", "COLUMNS": "200"}
    return subprocess.run(command, env=environment, input=said, capture_output=True, text=True, timeout=60)


# Links


def test_a_link_into_a_private_swarm_survives_its_text_and_hides_its_secret(owned: OwnedSwarm) -> None:
    link = _link(owned)
    text = link.encode()
    assert text.startswith("swarm://v2.") and JoinLink.parse(f" '{text}'\n") == link
    assert link.invitation is not None
    assert link.invitation.seed.hex() not in repr(link) and repr(link.invitation.seed) not in repr(link)
    assert link.without_invitation().encode().startswith("swarm://v1.")


def test_an_expired_invitation_is_refused_with_one_sentence(owned: OwnedSwarm) -> None:
    with pytest.raises(BadLink, match="expired 1 hour ago: ask whoever sent it for a new one"):
        JoinLink.parse(_link(owned, lifetime_s=-3700).encode())


def test_a_link_whose_token_the_owner_has_not_signed_is_refused(owned: OwnedSwarm, tmp_path: Path) -> None:
    good = _link(owned)
    other = Identity.load_or_create(tmp_path / "other.key")
    assert good.invitation is not None
    forged = Invitation(other.public_key, good.invitation.token, good.invitation.seed)
    with pytest.raises(NotAMember):
        _ = forged.member
    text = _encode_unchecked(forged)
    with pytest.raises(BadLink, match="not signed by the owner"):
        JoinLink.parse(text)


def _encode_unchecked(invitation: Invitation) -> str:
    import base64
    import hashlib

    payload = invitation.to_bytes() + json.dumps({"p": [PEER]}).encode()
    data = payload + hashlib.sha256(payload).digest()[:4]
    return "swarm://v2." + base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def test_every_changed_character_of_an_invitation_is_noticed(owned: OwnedSwarm) -> None:
    link = _link(owned)
    text = link.encode()
    for place in range(len("swarm://v2."), len(text), 7):
        damaged = text[:place] + ("A" if text[place] != "A" else "B") + text[place + 1 :]
        with pytest.raises(BadLink) as caught:
            JoinLink.parse(damaged)
        assert text[20:] not in str(caught.value)


def test_a_private_link_names_no_model(owned: OwnedSwarm) -> None:
    with pytest.raises(BadLink, match="names no model"):
        JoinLink((PEER,), "secret/model", invitation=_link(owned).invitation)


# Names


def test_a_saved_name_stands_for_its_link_in_a_file_of_its_owner_only(owned: OwnedSwarm, tmp_path: Path) -> None:
    link = _link(owned)
    home = tmp_path / "another computer"
    save_link(home, "friends", link)
    assert resolve_join(" friends ", home) == link
    assert resolve_join(link.encode(), home) == link
    path = home / "config.toml"
    assert path.stat().st_mode & 0o777 == 0o600
    assert tomllib.loads(path.read_text()) == {"swarms": {"friends": {"link": link.encode()}}}
    assert list(home.iterdir()) == [path]


def test_what_a_person_wrote_into_the_file_stays(owned: OwnedSwarm, tmp_path: Path) -> None:
    home = tmp_path / "another computer"
    home.mkdir()
    (home / "config.toml").write_text("# mine\n[swarms.work]\nlink = 'swarm://v1.x'  # from Bo\n")
    save_link(home, "friends", _link(owned))
    text = (home / "config.toml").read_text()
    assert "# mine" in text and "# from Bo" in text and set(saved_links(home)) == {"work", "friends"}


def test_a_newer_invitation_takes_the_place_of_an_older_one_and_nothing_else_does(
    owned: OwnedSwarm, tmp_path: Path
) -> None:
    home = tmp_path / "another computer"
    save_link(home, "friends", _link(owned, lifetime_s=-10))
    newer = _link(owned)
    save_link(home, "friends", newer)
    assert resolve_join("friends", home) == newer
    stranger = open_owned(tmp_path / "x", "home", create=True)
    for other in (_link(stranger), JoinLink((PEER,))):
        with pytest.raises(BadRequest, match="already the name of another swarm"):
            save_link(home, "friends", other)


def test_an_unknown_name_and_a_broken_file_get_one_sentence(owned: OwnedSwarm, tmp_path: Path) -> None:
    home = tmp_path / "another computer"
    save_link(home, "friends", _link(owned))
    with pytest.raises(BadLink, match="'freinds' is not a join link .*known names are friends"):
        resolve_join("freinds", home)
    save_link(home, "late", _link(owned, lifetime_s=-60))
    with pytest.raises(BadLink, match=r"late, in .*config.toml: this join link expired"):
        resolve_join("late", home)
    (home / "config.toml").write_text("[swarms")
    with pytest.raises(BadRequest, match="not valid TOML"):
        resolve_join("friends", home)


# The owner's book


def test_the_owners_invitations_stay_the_same_until_they_are_void(owned: OwnedSwarm, config_dir: Path) -> None:
    own, guests = owned.own_invitation(), owned.guest_invitation()
    again = open_owned(config_dir, "home")
    assert (again.own_invitation(), again.guest_invitation()) == (own, guests)
    assert again.owner.public_key == own.owner_key and own.member.role is Role.SERVE
    assert 29.9 < (guests.member.expires_at_s - time.time()) / 86400 <= 30
    again.revoke(GUESTS)
    assert again.guest_invitation() != guests
    states = {each.member: each.is_revoked for each in again.members()}
    assert states[guests.member] and not states[again.guest_invitation().member]


def test_a_revoked_member_is_in_the_list_and_the_book_and_the_numbers_grow(owned: OwnedSwarm) -> None:
    anna, bo = (owned.invite(name, Role.USE, time.time() + 600) for name in ("anna", "bo"))
    owned.revoke("anna")
    owned.revoke("bo")
    newest = Revocations.from_bytes(owned.revocations_path.read_bytes(), owned.owner.public_key)
    assert newest.sequence == 2 and anna.member in newest and bo.member in newest
    membership = Membership(owned.own_invitation(), owned.owner.public_key)
    membership.adopt(newest)
    with pytest.raises(NotAMember, match="revoked"):
        membership.check(anna.member, time.time())
    assert [(each.name, each.is_revoked) for each in owned.members()] == [
        ("anna", True), ("bo", True), (OWNER, False),
    ]  # fmt: skip
    for path in (owned.owner.path, owned.revocations_path, owned.owner.path.with_name("swarm.toml")):
        assert path.stat().st_mode & 0o777 == 0o600


def test_names_that_are_taken_unknown_or_not_possible(owned: OwnedSwarm, config_dir: Path) -> None:
    owned.invite("anna", Role.USE, time.time() + 600)
    for name, sentence in (("anna", "already the name of a member"), ("a b", "cannot be a name"), ("", "cannot be")):
        with pytest.raises(BadRequest, match=sentence):
            owned.invite(name, Role.USE, time.time() + 600)
    for name, sentence in (("bo", "no member called bo: there are anna"), (OWNER, "cannot be revoked")):
        with pytest.raises(BadRequest, match=sentence):
            owned.revoke(name)
    with pytest.raises(BadRequest, match="owns no private swarm called work; it owns home"):
        open_owned(config_dir, "work")
    open_owned(config_dir, "work", create=True)
    assert owned_names(config_dir) == ["home", "work"]
    with pytest.raises(BadRequest, match="say which one with --swarm"):
        the_owned(config_dir, "")
    with pytest.raises(BadRequest, match="has not run yet"):
        owned.own_link()


def test_a_damaged_book_is_not_overwritten(owned: OwnedSwarm) -> None:
    path = owned.owner.path.with_name("swarm.toml")
    path.write_text("sequence = [")
    with pytest.raises(ResourceError, match="cannot be read"):
        owned.invite("anna", Role.USE, time.time() + 600)
    assert path.read_text() == "sequence = ["


# The commands


def test_bad_input_to_the_commands_ends_with_one_sentence_and_code_2(home: Path, owned: OwnedSwarm) -> None:
    owned.remember_addresses([PEER])
    owned.invite("anna", Role.USE, time.time() + 600)
    expired = _link(owned, lifetime_s=-100).encode()
    cases = [
        (("join", "swarm://nonsense", "--as", "x"), "not a join link"),
        (("join", expired, "--as", "x"), "expired 1 minute ago"),
        (("join", _link(owned).encode(), "--as", "home"), "already the name of another swarm"),
        (("join", _link(owned).encode(), "--as", "a b"), "cannot be a name"),
        (("status", "--join", "nobody"), "is not a join link"),
        (("invite", "bo", "--expires", "a month"), "is no duration"),
        (("invite", "bo", "--role", "king"), "is no role"),
        (("invite", "bo", "--swarm", "work"), "owns no private swarm called work"),
        (("revoke", "nobody"), "no member called nobody"),
        (("members", "--swarm", "work"), "owns no private swarm called work"),
        (("dht", "--as", "home"), "add --private"),
        (("dht", "--private", "--join", "home"), "leave out"),
    ]
    for arguments, sentence in cases:
        result = _swarm(home, *arguments)
        said = " ".join(result.stderr.split())
        assert (result.returncode, sentence in said, "Traceback" in said) == (2, True, False), (arguments, result)


def test_an_invitation_on_standard_input_and_the_book_as_json(home: Path, owned: OwnedSwarm) -> None:
    link = _link(owned)
    elsewhere = home / "elsewhere"
    assert _swarm(elsewhere, "join", "-", "--as", "friends", said=link.encode() + "\n").returncode == 0
    assert resolve_join("friends", elsewhere / "swarm") == link
    owned.invite("anna", Role.USE, time.time() + 600)
    [anna] = json.loads(_swarm(home, "members", "--json").stdout)
    assert (anna["name"], anna["role"], anna["state"]) == ("anna", "use", "member")
    assert "anna" in _swarm(home, "members").stdout
