"""libp2p in a private swarm: messages and streams show whose they are, both ways, or are neither answered nor believed.

    messages    the credential (swarm/membership.py) travels in the fields that hivemind's have for access tokens
    streams     each end sends its credential before anything else

libp2p has authenticated the peer at the other end, and a credential counts for one peer alone, so nothing needs a
signature, nonce or clock of its own. Who shows no credential learns nothing but that.

This module imports hivemind; only swarm/dht.py imports it, when a DHT is opened.
"""

from __future__ import annotations

import asyncio
import collections
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from hivemind.p2p import P2P, P2PContext, P2PHandlerError, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo

from swarm.admission import NOT_A_MEMBER, Gate
from swarm.errors import NotAMember, PeerUnavailable
from swarm.membership import CREDENTIAL_BYTES, Member
from swarm.pipes import Stream
from swarm.reach import host_of, place_of

logger = logging.getLogger(__name__)

SHOW_TIMEOUT_S = 5.0
"""How long a peer that opens a stream may take to show who it is."""
MAX_ASKED, MAX_ASKED_PER_PLACE = 256, 64
"""Streams that have not shown it yet, in all and from one place."""

StreamHandler = Callable[[StreamInfo, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class MemberP2P(P2P):
    """A connection to p2pd whose messages and streams are shown at a gate, if there is one."""

    gate: Gate | None = None
    """Set before any handler is added."""
    was_refused = False
    """Whether the peer asked last has said that its swarm is private, and we are no member."""

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
            self.was_refused = False
            if self.gate is not None:
                shown = response.auth.service_access_token.signature
                self.gate.admit(shown, peer_id.to_base58(), f"an answer to {name}")
        except P2PHandlerError as exc:
            self.was_refused = NOT_A_MEMBER in str(exc)
            raise
        except NotAMember as exc:
            raise P2PHandlerError(str(exc)) from exc
        return response

    async def add_binary_stream_handler(self, name: str, handler: StreamHandler, balanced: bool = False) -> None:
        """Take members' streams; see P2P."""
        taken = handler if self.gate is None else Reception(self.gate, name, handler).take
        await super().add_binary_stream_handler(name, taken, balanced=balanced)


class Reception:
    """Lets members' streams of one protocol through to its handler, and ends them with their membership."""

    def __init__(self, gate: Gate, protocol: str, handler: StreamHandler) -> None:
        self._gate = gate
        self._protocol = protocol
        self._handler = handler
        self._asked: collections.Counter[str] = collections.Counter()
        """From where the streams come that have not shown whose they are."""
        self._watching: set[asyncio.Task[None]] = set()

    async def take(self, info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Called by hivemind for each stream."""
        peer_id = info.peer_id.to_base58()
        place = place_of(host_of(str(info.addr))) or peer_id
        if self._asked.total() >= MAX_ASKED or self._asked[place] >= MAX_ASKED_PER_PLACE:
            writer.close()
            return
        self._asked[place] += 1
        try:
            async with asyncio.timeout(SHOW_TIMEOUT_S):
                shown = await reader.readexactly(CREDENTIAL_BYTES)
            member = self._gate.admit(shown, peer_id, f"a stream of {self._protocol}")
        except (TimeoutError, OSError, asyncio.IncompleteReadError, NotAMember) as exc:
            logger.info("a stream of %s by peer %s is closed: %r", self._protocol, peer_id, exc)
            writer.close()
            return
        finally:
            self._asked -= collections.Counter({place: 1})
        writer.write(self._gate.credential)
        watch = asyncio.create_task(self._watch(member, writer))
        self._watching.add(watch)
        watch.add_done_callback(self._watching.discard)
        await self._handler(info, reader, writer)

    async def _watch(self, member: Member, writer: asyncio.StreamWriter) -> None:
        try:
            async with self._gate.while_member(member):
                await asyncio.shield(writer.wait_closed())
        except NotAMember:
            writer.transport.abort()
        except OSError as exc:
            logger.debug("a stream of %s broke: %s", self._protocol, exc)


async def introduce(gate: Gate, stream: Stream, peer_id: str, protocol: str, *, timeout_s: float) -> None:
    """Show a member at the other end of a new stream who we are, and see who it is.

    Raises: PeerUnavailable: it does not say, or is no member.
    """
    reader, writer = stream
    try:
        async with asyncio.timeout(timeout_s):
            writer.write(gate.credential)
            shown = await reader.readexactly(CREDENTIAL_BYTES)
        gate.admit(shown, peer_id, f"a stream of {protocol}")
    except TimeoutError as exc:
        raise PeerUnavailable(f"peer {peer_id} did not answer within {timeout_s:.1f} s") from exc
    except (OSError, asyncio.IncompleteReadError) as exc:
        raise PeerUnavailable(f"peer {peer_id} closed the stream without an answer") from exc
    except NotAMember as exc:
        raise PeerUnavailable(f"peer {peer_id} is no member of this private swarm") from exc
