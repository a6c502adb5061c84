"""Every error that Swarm raises on purpose.

    SwarmError
    ├── UserError                  the caller asked for something that cannot be; never retried
    │   ├── BadRequest             a tensor, range or argument that does not fit the model or the call
    │   │   └── PromptTooLong      more tokens than the session or the server allows
    │   ├── BadLink                a join link that is malformed, expired or not of this swarm
    │   ├── BadCheckpoint          a model path or checkpoint that cannot be read
    │   ├── UnsupportedModel       an architecture that cannot be cut into blocks
    │   ├── NotAMember             a private swarm, of which the caller is no member (any more)
    │   └── ResourceError          a port in use, no memory for one block, ...
    ├── PeerError                  one peer failed; another may do better
    │   ├── PeerUnavailable        it cannot be reached, hangs, or broke the connection
    │   ├── SessionLost            it no longer holds the session's cache
    │   ├── CacheFull              it has no room for this session, or its adapters, now
    │   ├── TooManyRequests        its limits are reached, for this caller or in all; it did not fail
    │   ├── AdapterMissing         it does not hold an adapter that was named; send it and ask again
    │   ├── Draining               it is about to leave, or has left these blocks for others
    │   └── ProtocolError          it sent something that the wire contract does not allow
    ├── NoRoute                    no set of live peers covers all blocks
    └── PeerBug                    a peer reported a failure of its own code; another peer may do better

A class exists only where some caller reacts differently. `code` is what travels on the wire and `retry` says
who may try again; both belong to the class, so a raised error needs nothing but its sentence.
"""

from __future__ import annotations

from typing import ClassVar

from swarm.v1 import blocks_pb2 as pb


class SwarmError(Exception):
    """Base of all; the message says what was wanted, what was found, and what to do."""

    code: ClassVar[pb.ErrorCode] = pb.ERROR_CODE_INTERNAL
    retry: ClassVar[pb.Retry] = pb.RETRY_NEVER

    peer_id: str = ""
    """The peer at fault, where there is one."""


class UserError(SwarmError):
    """The request cannot be fulfilled as asked; asking again, anywhere, gives the same answer."""

    code = pb.ERROR_CODE_BAD_REQUEST


class BadRequest(UserError, ValueError):
    """A tensor, block range or argument does not fit the model or the call."""


class PromptTooLong(BadRequest):
    """More tokens than the session, the server or the model can hold."""

    code = pb.ERROR_CODE_PROMPT_TOO_LONG


class BadLink(UserError, ValueError):
    """A join link is malformed, expired, or leads to another swarm."""


class BadCheckpoint(UserError):
    """A checkpoint is missing, truncated, pickled, or is not the model that was asked for."""


class UnsupportedModel(UserError):
    """An architecture that cannot be cut into blocks; the message names what is missing."""

    code = pb.ERROR_CODE_UNSUPPORTED


class NotAMember(UserError):
    """The swarm is private, and whoever asks is no member, no longer one, or not for this.

    What a peer is told is one neutral sentence (`NOT_A_MEMBER`): the reason is in the log of the one that refuses.
    """

    code = pb.ERROR_CODE_NOT_A_MEMBER


class ResourceError(UserError):
    """This machine lacks what the call needs: a free port, memory for one block, a device."""


class PeerError(SwarmError):
    """One peer failed; the same request may succeed elsewhere."""

    code = pb.ERROR_CODE_UNAVAILABLE
    retry = pb.RETRY_OTHER_PEER


class PeerUnavailable(PeerError):
    """The peer cannot be reached, does not answer in time, or broke the connection."""


class SessionLost(PeerError):
    """The peer does not hold this session's cache (any more); replay the session."""

    code = pb.ERROR_CODE_SESSION_LOST


class CacheFull(PeerError):
    """The peer has no room for this session, or its adapters, at present."""

    code = pb.ERROR_CODE_CACHE_FULL


class TooManyRequests(PeerError):
    """A limit of the peer is reached, for this caller or for all together: go elsewhere, or come back later.

    The peer works as it should: it is not asked again for a while, and not blamed.
    """

    code = pb.ERROR_CODE_TOO_MANY_REQUESTS
    retry_after_s: float = 1.0
    """After how long it makes sense to ask this peer again."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class AdapterMissing(PeerError):
    """The peer does not hold an adapter that the request names (any more); send it and ask again."""

    code = pb.ERROR_CODE_ADAPTER_MISSING
    retry = pb.RETRY_SAME_PEER


class Draining(PeerError):
    """The peer is about to leave and takes no new work, or it serves other blocks by now."""

    code = pb.ERROR_CODE_DRAINING


class ProtocolError(PeerError):
    """A peer sent what the wire contract does not allow, or speaks another version of it."""

    code = pb.ERROR_CODE_PROTOCOL


class PeerBug(PeerError):
    """The peer's own code failed; its operator finds the details in its log."""

    code = pb.ERROR_CODE_INTERNAL


class NoRoute(SwarmError):
    """No set of live peers covers the blocks that are needed; the message names the missing ones."""

    code = pb.ERROR_CODE_UNAVAILABLE
