"""Errors as OpenAI's API words them."""

from __future__ import annotations

import math
from typing import Any

from swarm.errors import BadRequest as SwarmBadRequest
from swarm.errors import CacheFull, Draining, NoRoute, PeerUnavailable, PromptTooLong, SwarmError, TooManyRequests

RETRY_AFTER_S = 5.0
"""When to come back where nobody knows better."""

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
"""The `type` of an error; further 4xx are invalid requests, further 5xx the server's own."""


class ApiError(Exception):
    """A request that is not answered as asked.

    Args:
        status: HTTP status code.
        param: the field of the body at fault.
        retry_after_s: when it makes sense to ask again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after_s is None else {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request itself is wrong."""
    return ApiError(400, message, param=param, code=code)


def shutting_down() -> ApiError:
    """The API is about to end."""
    return ApiError(503, "the server is shutting down", code="shutting_down", retry_after_s=RETRY_AFTER_S)


def translated(error: Exception) -> ApiError | None:
    """What a caller is told of an error; None: it is a bug of ours, of which callers learn nothing."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PromptTooLong):
        return bad(str(error), code="context_length_exceeded")
    if isinstance(error, SwarmBadRequest):
        return bad(str(error))
    if isinstance(error, TooManyRequests):
        return ApiError(429, str(error), code="swarm_busy", retry_after_s=error.retry_after_s)
    if isinstance(error, NoRoute | PeerUnavailable | CacheFull | Draining):
        code = {NoRoute: "no_servers", CacheFull: "cache_full"}.get(type(error), "servers_unavailable")
        return ApiError(503, str(error), code=code, retry_after_s=RETRY_AFTER_S)
    if isinstance(error, SwarmError):
        return ApiError(500, str(error), code="swarm_error")
    return None
