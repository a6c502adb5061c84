"""Join links: `swarm://v1.<text>`, all that somebody needs to join a swarm, safe to paste into a terminal.

`<text>` is URL-safe base64 without padding of a JSON object followed by the first four bytes of its sha-256, so a
link that was cut short or mistyped is told apart from a link of another version. Readers ignore names they do not
know; a change that an older reader must not ignore gets another version.

`swarm://v2.<text>` leads into a private swarm: an invitation (swarm/membership.py) stands before the JSON object, which
names no model. Whoever has such a link is a member: it is shown where it was asked for, and never in a log or an error.

    p  addresses of bootstrap peers (multiaddrs)        x  unix time after which the link is void, optional
    m  name of the model, optional                      n  name of the swarm, left out when it is the default
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import time
from dataclasses import dataclass, field, replace
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from swarm.announcement import MultiaddrText, RequiredText
from swarm.errors import BadLink, NotAMember
from swarm.membership import INVITATION_BYTES, Invitation

DEFAULT_NETWORK = "swarm"
MAX_LINK_CHARS = 8192

_LINK = re.compile(r"swarm://v([0-9]{1,6})\.([A-Za-z0-9_-]*)")
_VERSION, _PRIVATE_VERSION = "1", "2"
_CHECKSUM_BYTES = 4
_COPY_AGAIN = "copy the whole link again, from swarm:// to its end"


class _Payload(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    p: Annotated[tuple[MultiaddrText, ...], Field(min_length=1, max_length=32)]
    m: RequiredText | None = None
    x: Annotated[float, Field(gt=0, le=1e11, allow_inf_nan=False)] | None = None
    n: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = DEFAULT_NETWORK


@dataclass(frozen=True, slots=True)
class JoinLink:
    """The bootstrap peers of a swarm and, if the link says so, what it serves and until when the link holds."""

    initial_peers: tuple[str, ...]
    model_name: str | None = None
    expires_at_s: float | None = None
    network: str = DEFAULT_NETWORK
    invitation: Invitation | None = field(default=None, repr=False)
    """Into a private swarm; a secret. The link then names no model, and holds as long as the invitation."""

    def __post_init__(self) -> None:
        try:
            self._payload()
        except ValidationError as exc:
            raise BadLink(f"a join link cannot carry this: {_first(exc)}") from exc
        if self.invitation is not None and (self.model_name is not None or self.expires_at_s is not None):
            raise BadLink(
                "a join link into a private swarm names no model, and its invitation says until when it holds"
            )

    @property
    def ends_at_s(self) -> float | None:
        """Unix time from which on it is refused; None: never."""
        return self.expires_at_s if self.invitation is None else self.invitation.member.expires_at_s

    def without_invitation(self) -> JoinLink:
        """The addresses alone, which are no secret."""
        return replace(self, invitation=None)

    def encode(self) -> str:
        """The link as text; only letters, digits and `_ : / . -`."""
        version, payload = _VERSION, self._payload().model_dump_json(exclude_defaults=True).encode()
        if self.invitation is not None:
            version, payload = _PRIVATE_VERSION, self.invitation.to_bytes() + payload
        checksum = hashlib.sha256(payload).digest()[:_CHECKSUM_BYTES]
        text = base64.urlsafe_b64encode(payload + checksum).rstrip(b"=").decode()
        if len(text) > MAX_LINK_CHARS - 32:
            raise BadLink(f"{len(self.initial_peers)} addresses make the join link too long: name fewer")
        return f"swarm://v{version}.{text}"

    @classmethod
    def parse(cls, text: str, *, now_s: float | None = None) -> JoinLink:
        """Read a link; white space and quotes around it do not matter.

        Raises: BadLink: it is malformed, cut short, of another version, or expired at `now_s` (default: now).
        """
        stripped = text.strip(" \t\r\n\f\v\"'`<>\u201c\u201d\u2018\u2019")
        match = _LINK.fullmatch(stripped) if len(stripped) <= MAX_LINK_CHARS else None
        if match is None:
            raise BadLink(f"{_shorten(stripped)} is not a join link (swarm://v1.…): {_COPY_AGAIN}")
        if match[1] not in (_VERSION, _PRIVATE_VERSION):
            raise BadLink(
                f"this join link has version {match[1]}, this program reads versions {_VERSION} and "
                f"{_PRIVATE_VERSION}: use the same release of swarm on both sides"
            )
        data = _checked_data(match[2])
        invitation = None
        if match[1] == _PRIVATE_VERSION:
            invitation, data = _read_invitation(data[:INVITATION_BYTES]), data[INVITATION_BYTES:]
        payload = _read_payload(data)
        link = cls(payload.p, payload.m, payload.x, payload.n, invitation)
        link.check_holds(time.time() if now_s is None else now_s)
        return link

    def check_holds(self, now_s: float) -> None:
        """Raises: BadLink: it has expired."""
        ends_at_s = self.ends_at_s
        if ends_at_s is not None and ends_at_s <= now_s:
            raise BadLink(f"this join link expired {_ago(now_s - ends_at_s)} ago: ask whoever sent it for a new one")

    def _payload(self) -> _Payload:
        return _Payload(p=self.initial_peers, m=self.model_name, x=self.expires_at_s, n=self.network)


def _checked_data(text: str) -> bytes:
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (binascii.Error, ValueError) as exc:
        raise BadLink(f"this join link is cut short or mistyped: {_COPY_AGAIN}") from exc
    payload, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    if hashlib.sha256(payload).digest()[:_CHECKSUM_BYTES] != checksum:
        raise BadLink(f"this join link is cut short or mistyped: {_COPY_AGAIN}")
    return payload


def _read_invitation(data: bytes) -> Invitation:
    try:
        return Invitation.from_bytes(data)
    except NotAMember as exc:
        raise BadLink(f"this join link is not a valid invitation: {exc}") from exc


def _read_payload(payload: bytes) -> _Payload:
    try:
        return _Payload.model_validate_json(payload)
    except ValidationError as exc:
        raise BadLink(f"this join link says something that is not allowed: {_first(exc)}") from exc


def _first(exc: ValidationError) -> str:
    error = exc.errors(include_url=False, include_input=False, include_context=False)[0]
    names = {"p": "initial_peers", "m": "model_name", "x": "expires_at_s", "n": "network"}
    where = ".".join(names.get(str(part), str(part)) for part in error["loc"])
    return f"{where}: {error['msg']}" if where else str(error["msg"])


def _shorten(text: str) -> str:
    shown = text if len(text) <= 40 else text[:37] + "…"
    return repr(shown)


def _ago(seconds: float) -> str:
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'s' if count > 1 else ''}"
    return "less than a minute"
