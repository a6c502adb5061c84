"""The swarms that this computer owns: the key that signs invitations, whom it has invited, and where the swarm is.

<configuration>/swarms/<name>/owner.key     Ed25519, mode 0600: whoever has it decides who is a member
                              node.key      the identity of the owner's node, so that links stay the same
                              swarm.toml    members and addresses, mode 0600
<configuration>/revocations/<owner key>     the newest list that any program of this user's knows of a swarm
"""

from __future__ import annotations

import contextlib
import fcntl
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit

from swarm.errors import BadRequest, NotAMember, ResourceError
from swarm.files import check_name, write_atomically
from swarm.identity import Identity
from swarm.link import JoinLink
from swarm.membership import Invitation, Member, Revocations, Role

OWNER, GUESTS = "owner", "guests"
"""The members that a private swarm begins with: the owner's own nodes, and whoever has the link that is printed."""

OWN_LIFETIME_S, GUEST_LIFETIME_S = 3650 * 86400.0, 30 * 86400.0

MAX_ADDRESSES = 4
"""In an invitation's link."""


@dataclass(frozen=True, slots=True)
class InvitedMember:
    """One line of the owner's book."""

    name: str
    member: Member
    is_revoked: bool


def revocations_path(config_dir: Path, owner_key: bytes) -> Path:
    """Where the programs of one user keep the newest list of a swarm."""
    return config_dir / "revocations" / owner_key.hex()


class OwnedSwarm:
    """One swarm that this computer owns; see `open_owned`."""

    def __init__(self, name: str, folder: Path, config_dir: Path) -> None:
        self.name = name
        self.owner = Identity.load_or_create(folder / "owner.key")
        self.node_identity_path = folder / "node.key"
        self.revocations_path = revocations_path(config_dir, self.owner.public_key)
        self._folder = folder
        self._book_path = folder / "swarm.toml"

    def own_invitation(self) -> Invitation:
        """What makes the owner's nodes members; always the same one."""
        return self._kept(OWNER, OWN_LIFETIME_S)

    def guest_invitation(self) -> Invitation:
        """What `swarm serve --private` prints: the same one while it is valid, then another one."""
        return self._kept(GUESTS, GUEST_LIFETIME_S)

    def own_link(self) -> JoinLink:
        """By which the owner's programs join. Raises: BadRequest: its node has never run."""
        return JoinLink(self.addresses(), invitation=self.own_invitation())

    def invite(self, name: str, role: Role, expires_at_s: float) -> Invitation:
        """A new member. Raises: BadRequest: somebody has this name, or it cannot be one."""
        check_name(name)
        with self._changing() as book:
            if name in book["members"] and book["members"][name]["expires_at_s"] > time.time():
                raise BadRequest(f"{name} is already the name of a member of {self.name}: choose another one")
            invitation = Invitation.make(self.owner, role, expires_at_s)
            book["members"][name] = _line(invitation.member)
            return invitation

    def members(self) -> list[InvitedMember]:
        """Everybody who was invited, in that order."""
        return [_read_line(name, line) for name, line in self._read()["members"].items()]

    def revoke(self, name: str) -> Revocations:
        """Take an invitation back, and put the new list where this user's nodes find it.

        Raises: BadRequest: there is no such member, or it is the owner.
        """
        if name == OWNER:
            raise BadRequest("the owner's own invitation cannot be revoked: the swarm would be nobody's")
        with self._changing() as book:
            if name not in book["members"]:
                known = ", ".join(each for each in book["members"] if each != OWNER)
                raise BadRequest(f"{self.name} has no member called {name}: there are {known}")
            book["members"][name]["revoked"] = True
            book["members"][name].pop("invitation", None)
            book["sequence"] += 1
            gone = [
                each.member for each in map(_read_line, *zip(*book["members"].items(), strict=True)) if each.is_revoked
            ]
            revocations = Revocations.make(self.owner, book["sequence"], gone, now_s=time.time())
            write_atomically(self.revocations_path, revocations.data)
            return revocations

    def addresses(self) -> tuple[str, ...]:
        """Where the swarm was last. Raises: BadRequest: nowhere yet."""
        found = tuple(self._read()["addresses"])
        if not found:
            raise BadRequest(
                f"{self.name} has not run yet: start it with `swarm serve MODEL --private --as {self.name}`"
            )
        return found

    def remember_addresses(self, multiaddrs: Sequence[str]) -> None:
        """Note where the swarm is now."""
        with self._changing() as book:
            book["addresses"] = list(multiaddrs[:MAX_ADDRESSES])

    def usual_port(self) -> int:
        """The libp2p port of the owner's node last time; 0: none."""
        addresses = self._read()["addresses"]
        port = addresses[0].partition("/tcp/")[2].partition("/")[0] if addresses else ""
        return int(port) if port.isdigit() else 0

    def _kept(self, name: str, lifetime_s: float) -> Invitation:
        with self._changing() as book:
            line = book["members"].get(name)
            if line is not None and "invitation" in line and line["expires_at_s"] > time.time():
                with contextlib.suppress(NotAMember, ValueError):
                    return Invitation.from_bytes(bytes.fromhex(line["invitation"]))
            if line is not None and line["expires_at_s"] > time.time():  # it was revoked, which stays in the book
                book["members"][f"{name}-{line['key'][:8]}"] = line
            invitation = Invitation.make(self.owner, Role.SERVE, time.time() + lifetime_s)
            book["members"][name] = _line(invitation.member) | {"invitation": invitation.to_bytes().hex()}
            return invitation

    def _read(self) -> dict[str, Any]:
        try:
            book = tomllib.loads(self._book_path.read_text())
        except FileNotFoundError:
            book = {}
        except (OSError, ValueError) as exc:
            raise ResourceError(f"{self._book_path} cannot be read: restore it from a copy ({exc})") from exc
        return {"sequence": 0, "addresses": [], "members": {}} | book

    @contextlib.contextmanager
    def _changing(self) -> Iterator[dict[str, Any]]:
        """What the book says, which is written when the body has changed it; one program at a time."""
        with (self._folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            book = self._read()
            yield book
            try:
                write_atomically(self._book_path, tomlkit.dumps(book).encode())
            except OSError as exc:
                raise ResourceError(f"cannot write {self._book_path}: {exc.strerror or exc}") from exc


def open_owned(config_dir: Path, name: str, *, create: bool = False) -> OwnedSwarm:
    """The swarm of this name that this computer owns.

    Raises: BadRequest: it owns none of this name. ResourceError: its files cannot be read or written.
    """
    check_name(name)
    folder = config_dir / "swarms" / name
    if create:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    elif not (folder / "owner.key").exists():
        owned = owned_names(config_dir)
        has = f"it owns {', '.join(owned)}" if owned else "it owns none: `swarm serve MODEL --private` makes one"
        raise BadRequest(f"this computer owns no private swarm called {name}; {has}")
    return OwnedSwarm(name, folder, config_dir)


def owned_names(config_dir: Path) -> list[str]:
    """The swarms that this computer owns."""
    return sorted(path.parent.name for path in (config_dir / "swarms").glob("*/owner.key"))


def the_owned(config_dir: Path, name: str) -> OwnedSwarm:
    """The swarm of this name, or the only one if the name is empty. Raises: BadRequest: there is none, or several."""
    names = owned_names(config_dir)
    if not name and len(names) > 1:
        raise BadRequest(f"this computer owns {', '.join(names)}: say which one with --swarm NAME")
    return open_owned(config_dir, name or (names[0] if names else "private"))


def _line(member: Member) -> dict[str, Any]:
    return {
        "key": member.public_key.hex(),
        "role": member.role.name.lower(),
        "expires_at_s": member.expires_at_s,
        "revoked": False,
    }


def _read_line(name: str, line: dict[str, Any]) -> InvitedMember:
    member = Member(bytes.fromhex(line["key"]), Role[line["role"].upper()], line["expires_at_s"])
    return InvitedMember(name, member, line["revoked"])
