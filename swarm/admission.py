"""The gate of a node in a private swarm: whom it lets in, for how long, and what it has heard of revocations.

The decisions are in swarm/membership.py. Here are the clock, the file that keeps revocations over restarts, and the
work that ends when its caller is no longer a member. Why somebody is refused is logged here, and said to nobody.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from swarm.errors import NotAMember
from swarm.files import write_atomically
from swarm.identity import Identity, public_key_of
from swarm.membership import Invitation, Member, Membership, Revocations, Role

logger = logging.getLogger(__name__)

NOT_A_MEMBER = "this swarm is private: it takes a valid invitation"
"""All that a peer is told that is refused."""

_MAX_FILE_BYTES = 16 * 1024
_MAX_MET = 4096


class Gate:
    """What one node of a private swarm lets in.

    Args:
        invitation: whom this node shows itself to be.
        identity: its libp2p identity.
        now_s: the swarm's time.
        revocations_path: the newest list is kept there, and lists that others put there are found; None: nowhere.
    """

    def __init__(
        self, invitation: Invitation, identity: Identity, now_s: Callable[[], float], revocations_path: Path | None
    ) -> None:
        self._membership = Membership(invitation, identity.public_key)
        self._now_s = now_s
        self._path = revocations_path
        self._running: dict[asyncio.Timeout, Member] = {}
        self._met: dict[bytes, Member] = {}
        """Public keys of peers -> whom they have shown themselves to be, the latest at the end."""
        self.on_revoked: list[Callable[[], None]] = []
        """Called when a newer list counts."""

    @property
    def credential(self) -> bytes:
        """What this node shows to others."""
        return self._membership.credential

    @property
    def owner_key(self) -> bytes:
        """The swarm's name: the owner's public key."""
        return self._membership.owner_key

    @property
    def revocations(self) -> Revocations:
        """The newest list that this node knows."""
        return self._membership.revocations

    def admit(self, credential: bytes, peer_id: str, what: str, *, role: Role = Role.USE) -> Member:
        """Return whom a peer shows itself to be, for something that it wants or says.

        Raises: NotAMember: it may not; the message is for that peer, the reason is in our log.
        """
        try:
            return self.read(credential, public_key_of(peer_id) or b"", role=role)
        except NotAMember as exc:
            logger.info("%s of peer %s is refused: %s", what, peer_id, exc)
            raise NotAMember(NOT_A_MEMBER) from None

    def read(self, credential: bytes, peer_public_key: bytes, *, role: Role = Role.USE) -> Member:
        """The same for what others have stored. Raises: NotAMember, with the reason."""
        member = self._membership.admit(credential, peer_public_key, self._now_s(), role=role)
        self._met.pop(peer_public_key, None)
        self._met[peer_public_key] = member
        if len(self._met) > _MAX_MET:
            del self._met[next(iter(self._met))]
        return member

    def was_revoked(self, peer_id: str) -> bool:
        """Whether a peer that was a member when it was met last is none any more."""
        member = self._met.get(public_key_of(peer_id) or b"")
        return member is not None and member in self.revocations

    @asynccontextmanager
    async def while_member(self, member: Member) -> AsyncIterator[None]:
        """Let a member's work run while it is one; cancel it when its token ends or is taken back.

        Raises: NotAMember: that has happened.
        """
        until_s = asyncio.get_running_loop().time() + member.expires_at_s - self._now_s()
        scope = asyncio.timeout_at(until_s)
        try:
            async with scope:
                self._running[scope] = member
                try:
                    yield
                finally:
                    del self._running[scope]
        except TimeoutError:
            if not scope.expired():
                raise
            logger.info("what %s has running is ended: its token was taken back, or has expired", member)
            raise NotAMember(NOT_A_MEMBER) from None

    def adopt(self, data: bytes) -> bool:
        """Go by a list of revocations from now on, if it is the owner's and newer than ours; return whether it is.

        Raises: NotAMember: it is not the owner's.
        """
        revocations = Revocations.from_bytes(data, self.owner_key)
        if not self._membership.adopt(revocations):
            return False
        logger.info("list %d of revocations counts now: %d tokens", revocations.sequence, len(revocations.expires_at_s))
        self._keep()
        now_s = asyncio.get_running_loop().time()
        for scope, member in self._running.items():
            if member in revocations and not scope.expired():
                scope.reschedule(now_s)
        for tell in self.on_revoked:
            tell()
        return True

    def look_at_file(self) -> None:
        """Adopt what this node has kept, or another program of this user's has put there."""
        try:
            data = self._path.read_bytes()[: _MAX_FILE_BYTES + 1] if self._path is not None else b""
        except FileNotFoundError:
            return
        except OSError as exc:
            logger.warning("cannot read the revocations in %s: %s", self._path, exc.strerror or exc)
            return
        if data and data != self.revocations.data:
            try:
                self.adopt(data)
            except NotAMember as exc:
                logger.warning("the revocations in %s do not count: %s", self._path, exc)

    def _keep(self) -> None:
        if self._path is None:
            return
        try:
            write_atomically(self._path, self.revocations.data)
        except OSError as exc:
            logger.warning("cannot keep the revocations in %s: %s", self._path, exc.strerror or exc)
