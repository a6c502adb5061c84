"""Who may come in, decided before a body is read: keys, rates, origins, sizes."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from swarm.errors import BadRequest
from swarm.throttle import Throttle

from .errors import ApiError

MIN_KEY_LENGTH = 16
MINUTE_S = 60.0
OPEN_PATHS = ("/health",)
"""What anybody may ask for."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key that opens the door; itself it is not kept."""

    name: str
    digest: bytes = field(repr=False)


def read_keys(path: Path) -> tuple[Key, ...]:
    """Read a key file: `KEY` or `NAME KEY` on each line; lines that begin with # are remarks.

    Raises: BadRequest: it cannot be read, or a line is no key. No message holds one.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise BadRequest(f"the key file {path} cannot be read: {exc}") from exc
    keys: dict[str, Key] = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) > 2 or len(words[-1]) < MIN_KEY_LENGTH:
            raise BadRequest(
                f"line {number} of {path} is no key: write KEY or NAME KEY, with at least {MIN_KEY_LENGTH} characters "
                "in a key"
            )
        name = words[0] if len(words) == 2 else f"line {number}"
        if name in keys:
            raise BadRequest(f"line {number} of {path} has the name of an earlier one, {name!r}")
        keys[name] = Key(name, _digest(words[-1]))
    if not keys:
        raise BadRequest(f"the key file {path} holds no key: write one on a line of its own")
    return tuple(keys.values())


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


class Keys:
    """The keys that open the door; none: it is open."""

    def __init__(self, keys: Sequence[Key]) -> None:
        self._keys = keys

    def caller(self, headers: Headers, address: str) -> str:
        """Who calls: the name of the key, or the address where no keys are needed. Raises: ApiError: no such key."""
        if not self._keys:
            return address
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            raise ApiError(401, "an API key is needed: send it as Authorization: Bearer KEY", code="missing_api_key")
        digest, found = _digest(given.strip()), None
        for key in self._keys:  # all of them, so that how long it takes tells nothing
            if hmac.compare_digest(key.digest, digest):
                found = key.name
        if found is None:
            raise ApiError(401, "this API key is not known", code="invalid_api_key")
        return found


class Rates:
    """Requests and tokens of each caller per minute. A minute's worth may come at once.

    Args:
        requests_per_min, tokens_per_min: 0: as many as they like.
    """

    def __init__(self, requests_per_min: int, tokens_per_min: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = {"requests": requests_per_min, "tokens": tokens_per_min}
        self._clock = clock
        self._throttles: dict[tuple[str, str], Throttle] = {}

    def request(self, caller: str) -> None:
        """Count a request. Raises: ApiError: it is one too many, and is not counted."""
        for what in self._limits:
            throttle = self._of(caller, what)
            if throttle is not None and (wait_s := throttle.owed_s(self._clock())) > 0:
                raise ApiError(
                    429,
                    f"rate limit reached: {self._limits[what]} {what} per minute",
                    code="rate_limit_exceeded",
                    retry_after_s=wait_s,
                )
        self._note(caller, "requests", 1)

    def tokens(self, caller: str, num_tokens: int) -> None:
        """Count tokens of a prompt or an answer; they are not held up, but the next request may be."""
        self._note(caller, "tokens", num_tokens)

    def _note(self, caller: str, what: str, amount: int) -> None:
        if (throttle := self._of(caller, what)) is not None:
            throttle.wait_s(amount, self._clock())

    def _of(self, caller: str, what: str) -> Throttle | None:
        limit = self._limits[what]
        if not limit:
            return None
        if (caller, what) not in self._throttles:
            self._forget_idle()
            per_s = limit / MINUTE_S
            self._throttles[caller, what] = Throttle(per_s, MINUTE_S - (1 / per_s if what == "requests" else 0.0))
        return self._throttles[caller, what]

    def _forget_idle(self) -> None:
        """Callers without keys are addresses, of which there may be many: whoever owes nothing is like a new one."""
        now_s = self._clock()
        if len(self._throttles) >= 10_000:
            self._throttles = {who: each for who, each in self._throttles.items() if each.owed_s(now_s - MINUTE_S) > 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorConfig:
    """What the door lets in."""

    keys: Sequence[Key] = ()
    """None: anybody."""
    cors_origins: Sequence[str] = ()
    """Web pages of other places that may use the API, as scheme://host[:port]."""
    hosts: Iterable[str] = ("127.0.0.1", "localhost", "::1")
    """Under which names the API's own pages are read."""
    max_body_bytes: int = 4 << 20


class Door:
    """ASGI middleware. It puts who calls into `scope["state"]["caller"]`.

    A page of another site can make a browser send requests to this machine, although it cannot read the answers; so
    whoever says it comes from a page (Origin) must come from one of ours, or from one that was allowed.
    """

    def __init__(
        self,
        app: ASGIApp,
        config: DoorConfig,
        rates: Rates,
        is_draining: Callable[[], bool],
        on_response: Callable[[str, int], None],
    ) -> None:
        self._app = app
        self._config = config
        self._keys = Keys(config.keys)
        self._rates = rates
        self._is_draining = is_draining
        self._on_response = on_response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._on_response(scope["path"], message["status"])
            await send(message)

        try:
            self._enter(scope, Headers(scope=scope))
        except ApiError as exc:
            await JSONResponse(exc.body, exc.status, exc.headers)(scope, receive, counted)
            return
        await self._app(scope, _bounded(receive, self._config.max_body_bytes), counted)

    def _enter(self, scope: Scope, headers: Headers) -> None:
        self._check_origin(headers.get("origin"))
        path = scope["path"]
        if path in OPEN_PATHS:
            return
        caller = self._keys.caller(headers, (scope.get("client") or ("",))[0])
        scope.setdefault("state", {})["caller"] = caller
        if scope["method"] != "POST":
            return
        if self._is_draining():
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after_s=5.0)
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(400, "the body must be JSON, with Content-Type: application/json")
        if int(headers.get("content-length") or 0) > self._config.max_body_bytes:
            raise _too_large(self._config.max_body_bytes)
        self._rates.request(caller)

    def _check_origin(self, origin: str | None) -> None:
        if origin is None or origin in self._config.cors_origins or "*" in self._config.cors_origins:
            return
        try:
            host = urlsplit(origin).hostname
        except ValueError:
            host = None
        if host is None or host not in self._config.hosts:
            raise ApiError(
                403, "web pages of other places may not use this API: allow them with --cors-origin", code="origin"
            )


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"the body is larger than {max_bytes >> 20} MiB", code="body_too_large")


def _bounded(receive: Receive, max_bytes: int) -> Receive:
    """Receive no more than so much of a body that does not say how long it is."""
    num_bytes = 0

    async def bounded() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > max_bytes:
            raise HTTPException(413, str(_too_large(max_bytes)))
        return message

    return bounded
