"""gRPC in a private swarm: each call shows who makes it, and nobody else's call reaches a service.

    swarm-credential-bin    the caller's credential and its peer's public key (swarm/membership.py)
    swarm-proof-bin         the peer's signature over the certificate of the server that is called

A server cannot show the proof to another one, which has another certificate; nobody between the two sees it, as it
travels inside TLS to that certificate. So there is no clock in it, and one signature serves all calls of a channel.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from typing import Any

import grpc
import grpc.aio

from swarm.admission import NOT_A_MEMBER, Gate
from swarm.errors import NotAMember
from swarm.identity import PUBLIC_KEY_BYTES, Identity, is_signed_by, peer_id_of
from swarm.membership import CREDENTIAL_BYTES, Member
from swarm.rpc import abort

logger = logging.getLogger(__name__)

CREDENTIAL_METADATA_KEY, PROOF_METADATA_KEY = "swarm-credential-bin", "swarm-proof-bin"

current_member: ContextVar[Member | None] = ContextVar("current_member", default=None)
"""Who makes the call that is being served; None: the swarm is public."""

_PROOF_TEXT = b"swarm call\0"
_MAX_PROVEN = 4096

CallSigner = Callable[[bytes], grpc.CallCredentials]
"""A server's certificate (DER) -> what calls to it carry."""


class _Constant(grpc.AuthMetadataPlugin):
    """Adds the same metadata to each call."""

    def __init__(self, metadata: Sequence[tuple[str, bytes]]) -> None:
        self._metadata = tuple(metadata)

    def __call__(self, context: grpc.AuthMetadataContext, callback: grpc.AuthMetadataPluginCallback) -> None:
        callback(self._metadata, None)


def call_signer(gate: Gate, identity: Identity) -> CallSigner:
    """What shows servers that this node's calls are a member's."""

    def sign(certificate_der: bytes) -> grpc.CallCredentials:
        shown = ((CREDENTIAL_METADATA_KEY, gate.credential + identity.public_key),)
        proof = ((PROOF_METADATA_KEY, identity.sign(_proven(certificate_der))),)
        return grpc.metadata_call_credentials(_Constant(shown + proof), name="swarm member")

    return sign


def _proven(certificate_der: bytes) -> bytes:
    return _PROOF_TEXT + hashlib.sha256(certificate_der).digest()


class MembersOnly(grpc.aio.ServerInterceptor):
    """Lets members' calls through to any service of a gRPC port, and ends them with their membership.

    Args:
        certificate_der: of this port.
    """

    def __init__(self, gate: Gate, certificate_der: bytes) -> None:
        self._gate = gate
        self._signed = _proven(certificate_der)
        self._proven: set[tuple[bytes, bytes]] = set()
        """Public keys and signatures that were found good: checking one takes 60 µs."""
        self._refusal = grpc.stream_stream_rpc_method_handler(_refuse)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """Called for each call, also of methods that do not exist."""
        try:
            member = self._member(handler_call_details)
        except NotAMember:
            return self._refusal
        handler = await continuation(handler_call_details)
        return None if handler is None else self._while_member(handler, member)

    def _member(self, details: grpc.HandlerCallDetails) -> Member:
        """Raises: NotAMember."""
        metadata = {key: value for key, value in details.invocation_metadata or () if isinstance(value, bytes)}
        shown, proof = metadata.get(CREDENTIAL_METADATA_KEY, b""), metadata.get(PROOF_METADATA_KEY, b"")
        credential, public_key = shown[:CREDENTIAL_BYTES], shown[CREDENTIAL_BYTES:]
        if len(public_key) != PUBLIC_KEY_BYTES or not self._is_proven(public_key, proof):
            logger.info("a call of %s is refused: it does not show whose it is, for this server", details.method)
            raise NotAMember(NOT_A_MEMBER)
        return self._gate.admit(credential, peer_id_of(public_key), f"a call of {details.method}")

    def _is_proven(self, public_key: bytes, proof: bytes) -> bool:
        if (public_key, proof) in self._proven:
            return True
        if not is_signed_by(public_key, proof, self._signed):
            return False
        if len(self._proven) >= _MAX_PROVEN:
            self._proven.clear()
        self._proven.add((public_key, proof))
        return True

    def _while_member(self, handler: grpc.RpcMethodHandler, member: Member) -> grpc.RpcMethodHandler:
        """The same handler, ended with an error when its caller is no longer a member."""
        run: Callable[..., Any] = (
            handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        )
        if inspect.isasyncgenfunction(run):
            run = _writing(run)

        async def guarded(request: Any, context: grpc.aio.ServicerContext) -> Any:
            current_member.set(member)
            try:
                async with self._gate.while_member(member):
                    return await run(request, context)
            except NotAMember as exc:
                await abort(context, exc)

        make = _HANDLERS[handler.request_streaming, handler.response_streaming]
        return make(guarded, handler.request_deserializer, handler.response_serializer)


_HANDLERS = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def _writing(generate: Callable[..., Any]) -> Callable[..., Any]:
    """A handler that writes its answers, of one that yields them, which must not do so inside a timeout."""

    async def write(request: Any, context: grpc.aio.ServicerContext) -> None:
        async for response in generate(request, context):
            await context.write(response)

    return write


async def _refuse(_requests: object, context: grpc.aio.ServicerContext) -> None:
    await abort(context, NotAMember(NOT_A_MEMBER))
