"""hivemind's messages in a private swarm: each shows who sends it, both ways; nobody else's are answered or believed.

The credential travels in the fields that hivemind's messages have for access tokens. libp2p has authenticated the peer
at the other end, and a credential counts for one peer alone: a request needs no signature, nonce or clock of its own.

This module imports hivemind; only swarm/dht.py imports it, when a DHT is opened.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from hivemind.p2p import P2P, P2PContext, P2PHandlerError, PeerID

from swarm.admission import NOT_A_MEMBER, Gate
from swarm.errors import NotAMember


class MemberP2P(P2P):
    """A connection to p2pd whose messages are shown at a gate, if there is one."""

    gate: Gate | None = None
    """Set before any handler is added."""
    was_refused = False
    """Whether a peer has said that its swarm is private, and we are no member."""

    async def add_protobuf_handler(
        self, name: str, handler: Callable[[Any, P2PContext], Awaitable[Any]], input_protobuf_type: type, **options: Any
    ) -> None:
        """Answer members' requests; see P2P."""
        gate = self.gate

        async def for_members(request: Any, context: P2PContext) -> Any:
            assert gate is not None
            gate.admit(request.auth.client_access_token.signature, context.remote_id.to_base58(), name)
            response = await handler(request, context)
            response.auth.service_access_token.signature = gate.credential
            return response

        await super().add_protobuf_handler(
            name, handler if gate is None else for_members, input_protobuf_type, **options
        )

    async def call_protobuf_handler(self, peer_id: PeerID, name: str, input: Any, output_protobuf_type: type) -> Any:
        """Ask a member; see P2P. Raises: P2PHandlerError: it is none, or says that we are none."""
        if self.gate is not None:
            input.auth.client_access_token.signature = self.gate.credential
        try:
            response = await super().call_protobuf_handler(peer_id, name, input, output_protobuf_type)
            if self.gate is not None:
                shown = response.auth.service_access_token.signature
                self.gate.admit(shown, peer_id.to_base58(), f"an answer to {name}")
        except P2PHandlerError as exc:
            self.was_refused = self.was_refused or NOT_A_MEMBER in str(exc)
            raise
        except NotAMember as exc:
            raise P2PHandlerError(str(exc)) from exc
        return response
