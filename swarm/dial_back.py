"""Finding out from other peers whether a port of ours can be dialled: they try it.

    asker -> peer: {"port": 31330, "certificate": "<sha-256>"}
    peer -> asker: {"host": "203.0.113.7", "reached": true, "relays": true, "clock_s": …}

A peer dials nothing but the address that the question comes from, which cannot be forged: libp2p has a connection to
it. With a certificate, the port counts as reached only if TLS there shows that one. Each address is dialled a few
times a minute at most, for a second or two, and what is sent there is less than what asking took.
"""

from __future__ import annotations

import asyncio
import collections
import hashlib
import logging
import ssl
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Annotated, Protocol

from pydantic import BaseModel, Field

from swarm.errors import PeerError
from swarm.p2pd import finish
from swarm.pipes import FLUSH_TIMEOUT_S, Stream, cancel_all, read_line, write_line

if TYPE_CHECKING:
    from hivemind.p2p import P2P
    from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo

logger = logging.getLogger(__name__)

PROTOCOL = "/swarm/reachability/1"

DIAL_TIMEOUT_S = 2.0
"""How long a peer tries to reach the port: a packet lost once is sent again after one second."""
ASK_TIMEOUT_S = DIAL_TIMEOUT_S + 2.0
MAX_ASKED = 4
"""How many peers are asked at once."""
DIALS_PER_MINUTE = 8
"""How often one address is dialled."""
MAX_DIALS = 16
"""How many dials may be under way, for all that ask together."""
MAX_HOSTS = 4096
"""Addresses whose latest dials are remembered."""


class Question(BaseModel):
    """Whether a port can be reached; port 0: only whatever else the answer says."""

    port: Annotated[int, Field(ge=0, le=65535)] = 0
    certificate: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""
    """SHA-256 of the certificate that TLS shows there; empty: a TCP connection is enough."""


class Answer(BaseModel):
    """What the peer that was asked found."""

    host: Annotated[str, Field(max_length=64)] = ""
    """IP address that the question came from; empty: it came through a relay."""
    reached: bool | None = None
    """Whether the port there could be reached; None: not tried."""
    relays: bool = False
    """Whether the peer carries connections to servers that nobody can dial."""
    clock_s: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """Unix time there."""


@dataclass(frozen=True, slots=True)
class Observation:
    """An answer, and what asking showed."""

    peer_id: str
    answer: Answer
    rtt_s: float
    """How long the answer took: one round trip, if nothing was dialled."""
    clock_offset_s: float
    """By how much the clock there is ahead of ours."""


@dataclass(frozen=True, slots=True)
class Reach:
    """What several peers say about one port."""

    reached: tuple[str, ...] = ()
    """The IP addresses of ours under which some peer could reach it."""
    missed: tuple[str, ...] = ()
    """Those under which nobody could, though somebody tried."""

    @property
    def is_hidden(self) -> bool:
        """Whether somebody tried, and nobody could."""
        return bool(self.missed) and not self.reached


def judge(answers: Sequence[Answer]) -> Reach:
    """Take one peer's word for it that a port can be reached; that it cannot be holds if nobody else could either."""
    reached = dict.fromkeys(answer.host for answer in answers if answer.reached and _is_ip(answer.host))
    tried = dict.fromkeys(answer.host for answer in answers if answer.reached is False and _is_ip(answer.host))
    return Reach(tuple(reached), tuple(host for host in tried if host not in reached))


class Budget:
    """How often each address may still be dialled."""

    def __init__(self) -> None:
        self._dials: dict[str, collections.deque[float]] = {}

    def take(self, host: str, now_s: float) -> bool:
        """Whether one more dial is allowed; it counts then."""
        dials = self._dials.pop(host, None) or collections.deque(maxlen=DIALS_PER_MINUTE)
        self._dials[host] = dials
        if len(self._dials) > MAX_HOSTS:
            del self._dials[next(iter(self._dials))]
        if len(dials) == DIALS_PER_MINUTE and now_s - dials[0] < 60:
            return False
        dials.append(now_s)
        return True


class Node(Protocol):
    """What asking needs of a DHT node."""

    async def connect(self, peer_id: str, multiaddrs: Sequence[str], *, timeout_s: float) -> None:
        """Make sure that there is a connection. Raises: PeerUnavailable."""

    async def open_stream(self, peer_id: str, protocol: str, *, timeout_s: float) -> Stream:
        """Open a stream to a peer. Raises: PeerUnavailable."""


async def ask(
    node: Node, peer_id: str, question: Question | None = None, *, timeout_s: float = ASK_TIMEOUT_S
) -> Observation:
    """Ask one peer. Raises: PeerUnavailable, ProtocolError: it does not answer, or not as it should."""
    reader, writer = await node.open_stream(peer_id, PROTOCOL, timeout_s=timeout_s)
    try:
        started_s, asked_s = time.monotonic(), time.time()
        await write_line(writer, question or Question(), peer_id)
        answer = await read_line(reader, Answer, peer_id, timeout_s=timeout_s)
        rtt_s = time.monotonic() - started_s
        return Observation(peer_id, answer, rtt_s, answer.clock_s - (asked_s + rtt_s / 2))
    finally:
        writer.close()


async def ask_some(node: Node, peer_ids: Sequence[str], port: int, certificate_der: bytes = b"") -> Reach:
    """Ask the first few of these peers whether a port of ours can be reached; who does not answer is left out."""
    digest = hashlib.sha256(certificate_der).hexdigest() if certificate_der else ""
    question = Question(port=port, certificate=digest)
    asked = (ask(node, peer_id, question) for peer_id in peer_ids[:MAX_ASKED])
    answers = []
    for found in await asyncio.gather(*asked, return_exceptions=True):
        if isinstance(found, Observation):
            answers.append(found.answer)
        elif isinstance(found, PeerError):
            logger.debug("reachability: %s", found)
        else:
            raise found
    return judge(answers)


@asynccontextmanager
async def answer_dial_back(p2p: P2P, *, relays: bool = False) -> AsyncIterator[None]:
    """Answer the questions of other peers until the context ends.

    Args:
        relays: whether this peer relays, see swarm/relays.py.
    """
    budget = Budget()
    answering: set[asyncio.Task[None]] = set()

    async def answer(peer_id: str, host: str, stream: Stream) -> None:
        reader, writer = stream
        try:
            question = await read_line(reader, Question, peer_id, timeout_s=ASK_TIMEOUT_S)
            reached = None
            if question.port and host and budget.take(host, time.monotonic()):
                reached = await _dial(host, question)
            found = Answer(host=host, reached=reached, relays=relays, clock_s=time.time())
            await write_line(writer, found, peer_id)
        except PeerError as exc:
            logger.debug("reachability: %s", exc)
        finally:
            writer.close()

    async def accept(info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(answering) >= MAX_DIALS:
            writer.close()
            return
        task = asyncio.create_task(answer(info.peer_id.to_base58(), observed_host(str(info.addr)), (reader, writer)))
        answering.add(task)
        task.add_done_callback(answering.discard)

    await p2p.add_binary_stream_handler(PROTOCOL, accept)
    try:
        yield
    finally:
        await finish(stop_handling(p2p, PROTOCOL))
        await finish(cancel_all(answering))


async def stop_handling(p2p: P2P, protocol: str) -> None:
    """Take no further streams of a protocol; a p2pd that has ended takes none anyway."""
    from hivemind.p2p import P2PDaemonError

    try:
        async with asyncio.timeout(FLUSH_TIMEOUT_S):
            await p2p.remove_binary_stream_handler(protocol)
    except (P2PDaemonError, OSError, asyncio.IncompleteReadError, TimeoutError) as exc:
        logger.debug("p2pd does not let go of %s: %r", protocol, exc)


def observed_host(multiaddr: str) -> str:
    """The IP address at the other end of a connection; empty if that is a relay's, or none."""
    parts = multiaddr.split("/")
    if "p2p-circuit" in parts or len(parts) < 3 or parts[1] not in ("ip4", "ip6") or not _is_ip(parts[2]):
        return ""
    return parts[2]


async def _dial(host: str, question: Question) -> bool:
    """Whether the port answers, with the certificate in question if there is one."""
    context: ssl.SSLContext | None = None
    if question.certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # it is compared below
        context.set_alpn_protocols(["h2"])
    try:
        async with asyncio.timeout(DIAL_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, question.port, ssl=context)
    except (OSError, TimeoutError):
        return False
    try:
        if context is None:
            return True
        shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return hashlib.sha256(shown or b"").hexdigest() == question.certificate
    finally:
        writer.transport.abort()


def _is_ip(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


async def is_hidden(node: Node, peers: Mapping[str, Sequence[str]], multiaddrs: Sequence[str]) -> bool:
    """Whether nobody of those who try can dial the libp2p port that we listen on, as our own addresses name it.

    Args:
        peers: whom to ask, and where each may be.
    """
    port = libp2p_port(multiaddrs)
    if not port or not peers:
        return False
    dials = (node.connect(peer_id, addresses, timeout_s=ASK_TIMEOUT_S) for peer_id, addresses in peers.items())
    results = zip(peers, await asyncio.gather(*dials, return_exceptions=True), strict=True)
    return (await ask_some(node, [peer_id for peer_id, failure in results if failure is None], port)).is_hidden


def libp2p_port(multiaddrs: Sequence[str]) -> int:
    """The TCP port in our own libp2p addresses, those of relays aside; 0: we do not listen."""
    for parts in (text.split("/") for text in multiaddrs if "/p2p-circuit" not in text):
        if len(parts) > 4 and parts[3] == "tcp" and parts[4].isdecimal():
            return int(parts[4])
    return 0
