"""Finding out from other peers whether a port of ours can be dialled: they try it.

    asker -> peer: {"port": 31330, "certificate": "<sha-256>"}
    peer -> asker: {"host": "203.0.113.7", "reached": true, "relays": true, "clock_s": …}

A peer dials nothing but the address that the question comes from, which cannot be forged: libp2p has a connection to
it. With a certificate, the port counts as reached only if TLS there shows that one. How often each address is dialled
is bounded, how long that takes, and how many questions are answered at once; what is sent there is less than what
asking took. A peer that the internet reaches dials the internet only: behind a proxy, strangers' questions seem to come
from its own network.
"""

from __future__ import annotations

import asyncio
import collections
import hashlib
import logging
import ssl
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol

from swarm.dialling import UntilSeenOutside
from swarm.errors import PeerError
from swarm.p2pd import finish
from swarm.pipes import FLUSH_TIMEOUT_S, Stream, cancel_all, read_line, write_line
from swarm.reach import Answer, Budget, Observation, Question, Reach, host_of, judge, libp2p_port, place_of

if TYPE_CHECKING:
    from hivemind.p2p import P2P
    from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo

logger = logging.getLogger(__name__)

PROTOCOL = "/swarm/reachability/1"

DIAL_TIMEOUT_S = 2.0
"""How long a peer tries to reach the port: a packet lost once is sent again after one second."""
ASK_TIMEOUT_S = DIAL_TIMEOUT_S + 3.0
MAX_ASKED = 4
"""How many peers are asked at once."""
MAX_ANSWERED, MAX_ANSWERED_PER_PLACE = 64, 8
"""How many questions are answered at the same time, in all and from one place."""


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


async def ask_some(node: Node, peer_ids: Iterable[str], port: int, certificate_der: bytes = b"") -> list[Observation]:
    """Ask the first few of these peers whether a port of ours can be reached; who does not answer is left out."""
    digest = hashlib.sha256(certificate_der).hexdigest() if certificate_der else ""
    question = Question(port=port, certificate=digest)
    asked = (ask(node, peer_id, question) for peer_id in list(peer_ids)[:MAX_ASKED])
    seen = []
    for found in await asyncio.gather(*asked, return_exceptions=True):
        if isinstance(found, Observation):
            seen.append(found)
        elif isinstance(found, PeerError):
            logger.debug("reachability: %s", found)
        else:
            raise found
    return seen


async def ask_initial(node: Node, peers: Mapping[str, Sequence[str]], multiaddrs: Sequence[str]) -> Reach:
    """Ask the peers of the join link whether the libp2p port that we listen on can be reached.

    Args:
        peers: whom to ask, and where each may be.
        multiaddrs: our own addresses, which name the port.
    """
    port = libp2p_port(multiaddrs)
    if not port or not peers:
        return Reach()
    dials = (node.connect(peer_id, addresses, timeout_s=ASK_TIMEOUT_S) for peer_id, addresses in peers.items())
    results = zip(peers, await asyncio.gather(*dials, return_exceptions=True), strict=True)
    seen = await ask_some(node, [peer_id for peer_id, failure in results if failure is None], port)
    return judge(seen, trusted=peers)


@asynccontextmanager
async def answer_dial_back(p2p: P2P, rule: UntilSeenOutside, *, relays: bool = False) -> AsyncIterator[None]:
    """Answer the questions of other peers until the context ends.

    Args:
        rule: which addresses may be dialled; it is told where questions come from.
        relays: whether this peer relays, see swarm/relaying.py.
    """
    budget = Budget()
    answering: dict[asyncio.Task[None], str] = {}

    async def answer(peer_id: str, host: str, stream: Stream) -> None:
        reader, writer = stream
        try:
            question = await read_line(reader, Question, peer_id, timeout_s=ASK_TIMEOUT_S)
            reached = None
            if question.port and host:
                target = f"[{host}]:{question.port}" if ":" in host else f"{host}:{question.port}"
                if await rule.targets([target]) and budget.take(host, time.monotonic()):
                    reached = await _dial(host, question)
            found = Answer(host=host, reached=reached, relays=relays, clock_s=time.time())
            await write_line(writer, found, peer_id)
        except PeerError as exc:
            logger.debug("reachability: %s", exc)
        finally:
            writer.close()

    async def accept(info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer_id, host = info.peer_id.to_base58(), host_of(str(info.addr))
        rule.note(host)
        place = place_of(host) or peer_id
        of_place = collections.Counter(answering.values())[place]
        if len(answering) >= MAX_ANSWERED or of_place >= MAX_ANSWERED_PER_PLACE:
            writer.close()
            return
        task = asyncio.create_task(answer(peer_id, host, (reader, writer)))
        answering[task] = place
        task.add_done_callback(answering.pop)

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


async def _dial(host: str, question: Question) -> bool:
    """Whether the port answers, with the certificate in question if there is one."""
    context: ssl.SSLContext | None = None
    if question.certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
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
