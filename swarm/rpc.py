"""gRPC's door: channel and server options, pinned TLS, and errors on the wire.

A SwarmError raised in a handler travels as a gRPC status with an `Error` message in the trailing metadata, and is
raised again as the same class on the caller's side. Anything else that escapes a handler is our own bug: it is
logged here with its traceback, and the caller learns no more than that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from swarm import errors
from swarm.codec import CHUNK_BYTES
from swarm.errors import (
    BadRequest,
    PeerBug,
    PeerError,
    PeerUnavailable,
    ProtocolError,
    SwarmError,
    TooManyRequests,
    UserError,
)
from swarm.v1 import blocks_pb2 as pb

logger = logging.getLogger(__name__)

ERROR_METADATA_KEY = "swarm-error-bin"

_MAX_MESSAGE_BYTES = 4 * CHUNK_BYTES

_PING_TIMEOUT_MS = 5_000
"""A connection on which a ping stays unanswered for so long is dead. gRPC's default is a minute, which also counts for
the pings by which it measures a line's bandwidth, and those of the keepalive wait for them."""

CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", _PING_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", _PING_TIMEOUT_MS),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.http2.lookahead_bytes", 16 * CHUNK_BYTES),
]

SERVER_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 2 * _PING_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", 2 * _PING_TIMEOUT_MS),
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 20),
    ("grpc.so_reuseport", 0),
    # What a stream may have sent before it is read waits in gRPC, in no budget of ours: `Limits` bounds the streams.
    ("grpc.http2.lookahead_bytes", 4 * CHUNK_BYTES),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 900_000),
]


def server_options(*, max_connections: int, max_streams: int) -> list[tuple[str, Any]]:
    """Options of a server.

    Args:
        max_connections: in all.
        max_streams: calls at a time on one connection; others wait at the caller's end.
    """
    limits = [("grpc.max_allowed_incoming_connections", max_connections), ("grpc.max_concurrent_streams", max_streams)]
    return [*SERVER_OPTIONS, *limits]


_STATUS = {
    pb.ERROR_CODE_INTERNAL: grpc.StatusCode.INTERNAL,
    pb.ERROR_CODE_BAD_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
    pb.ERROR_CODE_PROMPT_TOO_LONG: grpc.StatusCode.OUT_OF_RANGE,
    pb.ERROR_CODE_UNSUPPORTED: grpc.StatusCode.UNIMPLEMENTED,
    pb.ERROR_CODE_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    pb.ERROR_CODE_SESSION_LOST: grpc.StatusCode.NOT_FOUND,
    pb.ERROR_CODE_CACHE_FULL: grpc.StatusCode.RESOURCE_EXHAUSTED,
    pb.ERROR_CODE_DRAINING: grpc.StatusCode.UNAVAILABLE,
    pb.ERROR_CODE_PROTOCOL: grpc.StatusCode.FAILED_PRECONDITION,
    pb.ERROR_CODE_ADAPTER_MISSING: grpc.StatusCode.NOT_FOUND,
    pb.ERROR_CODE_NOT_A_MEMBER: grpc.StatusCode.PERMISSION_DENIED,
    pb.ERROR_CODE_TOO_MANY_REQUESTS: grpc.StatusCode.RESOURCE_EXHAUSTED,
}

_CLASSES: dict[int, type[SwarmError]] = {
    pb.ERROR_CODE_INTERNAL: PeerBug,
    pb.ERROR_CODE_BAD_REQUEST: BadRequest,
    pb.ERROR_CODE_PROMPT_TOO_LONG: errors.PromptTooLong,
    pb.ERROR_CODE_UNSUPPORTED: errors.UnsupportedModel,
    pb.ERROR_CODE_UNAVAILABLE: PeerUnavailable,
    pb.ERROR_CODE_SESSION_LOST: errors.SessionLost,
    pb.ERROR_CODE_CACHE_FULL: errors.CacheFull,
    pb.ERROR_CODE_DRAINING: errors.Draining,
    pb.ERROR_CODE_PROTOCOL: ProtocolError,
    pb.ERROR_CODE_ADAPTER_MISSING: errors.AdapterMissing,
    pb.ERROR_CODE_NOT_A_MEMBER: errors.NotAMember,
    pb.ERROR_CODE_TOO_MANY_REQUESTS: TooManyRequests,
}

_MAX_ERROR_TEXT = 1000

_MAX_RETRY_AFTER_S = 60.0
"""No peer is left alone for longer because it says so."""


async def abort(context: grpc.aio.ServicerContext, error: SwarmError) -> NoReturn:
    """End a call with an error that the caller will raise again."""
    text = str(error)[:_MAX_ERROR_TEXT]
    wire = pb.Error(code=error.code, retry=error.retry, message=text, peer_id=error.peer_id)
    if isinstance(error, TooManyRequests):
        wire.retry_after_ms = round(1000 * min(error.retry_after_s, _MAX_RETRY_AFTER_S))
    details = text.encode("ascii", "replace").decode()
    await context.abort(_STATUS[error.code], details, ((ERROR_METADATA_KEY, wire.SerializeToString()),))
    raise AssertionError("abort raises")


def translate(failure: grpc.aio.AioRpcError, peer_id: str, may_blame: Collection[str] = ()) -> SwarmError:
    """Return the error that a failed call to a peer stands for, its `peer_id` set to the peer at fault.

    Args:
        may_blame: other peers that this one may name as being at fault; whom else it names is ignored.
    """
    for key, value in failure.trailing_metadata() or ():
        if key == ERROR_METADATA_KEY and isinstance(value, bytes):
            return from_wire(value, peer_id, may_blame)
    code = failure.code()
    text = (failure.details() or "no details")[:_MAX_ERROR_TEXT]
    error: SwarmError
    if code in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.RESOURCE_EXHAUSTED):
        error = ProtocolError(f"peer {peer_id} does not speak this protocol: {text}")
    elif code in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL):
        error = PeerUnavailable(f"the call to peer {peer_id} broke: {text}")
    else:
        error = PeerUnavailable(f"peer {peer_id} does not answer ({code.name.lower()}): {text}")
    error.peer_id = peer_id
    return error


def from_wire(data: bytes, peer_id: str, may_blame: Collection[str] = ()) -> SwarmError:
    """Rebuild an error from an `Error` message that a peer sent; see `translate`."""
    wire = pb.Error()
    try:
        wire.ParseFromString(data)
    except DecodeError as exc:
        error: SwarmError = ProtocolError(f"peer {peer_id} sent an error that cannot be read: {exc}")
    else:
        error = _CLASSES.get(wire.code, PeerUnavailable)(wire.message[:_MAX_ERROR_TEXT])
        if isinstance(error, TooManyRequests):
            error.retry_after_s = min(wire.retry_after_ms / 1000, _MAX_RETRY_AFTER_S)
    error.peer_id = wire.peer_id if wire.peer_id in may_blame else peer_id
    return error


@asynccontextmanager
async def errors_to_wire(context: grpc.aio.ServicerContext, call: str) -> AsyncIterator[None]:
    """The RPC boundary: our errors travel, our bugs are logged here and reported without details."""
    try:
        yield
    except UserError as exc:
        logger.info("%s refused: %s", call, exc)
        await abort(context, exc)
    except TooManyRequests as exc:
        await abort(context, exc)  # who refuses it has logged it, not each time
    except SwarmError as exc:
        logger.info("%s failed: %s", call, exc)
        await abort(context, exc)
    except DecodeError as exc:  # gRPC raises it where a message is read; nothing else is parsed in a handler
        logger.info("%s refused: no message of this call: %s", call, exc)
        await abort(context, BadRequest(f"what was sent is no message of {call}"))
    except grpc.aio.AbortError:
        raise
    except grpc.aio.UsageError as exc:
        # The stream was closed under us (the caller went away while we answered): nobody is left to tell.
        logger.debug("%s: the caller went away: %s", call, exc)
    except Exception:
        logger.exception("%s: internal error", call)
        await abort(context, PeerBug("internal error; the server's log has the details"))


@asynccontextmanager
async def errors_from_wire(peer_id: str, may_blame: Collection[str] = ()) -> AsyncIterator[None]:
    """Raise whatever goes wrong in a call to a peer as a SwarmError that names the peer at fault; see `translate`."""
    try:
        yield
    except grpc.aio.AioRpcError as exc:
        raise translate(exc, peer_id, may_blame) from exc
    except PeerError as exc:
        exc.peer_id = exc.peer_id or peer_id
        raise
    except asyncio.InvalidStateError as exc:
        raise _closed(peer_id) from exc
    except asyncio.CancelledError as exc:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise _closed(peer_id) from exc  # gRPC's way to say that the channel was closed under the call


def _closed(peer_id: str) -> PeerUnavailable:
    error = PeerUnavailable(f"the call to peer {peer_id} was ended")
    error.peer_id = peer_id
    return error


def pinned_credentials(certificate_pem: bytes) -> grpc.ChannelCredentials:
    """Return credentials that accept exactly one certificate."""
    return grpc.ssl_channel_credentials(root_certificates=certificate_pem)


def open_channel(
    target: str, certificate_pem: bytes, tls_name: str, signed: grpc.CallCredentials | None = None
) -> grpc.aio.Channel:
    """Return a channel to `target` that talks only to the holder of the certificate's key.

    Args:
        signed: what each call carries in a private swarm, see swarm/rpc_members.py.
    """
    options = [*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", tls_name)]
    credentials = pinned_credentials(certificate_pem)
    if signed is not None:
        credentials = grpc.composite_channel_credentials(credentials, signed)
    return grpc.aio.secure_channel(target, credentials, options=options)
