"""Direct connections between two peers behind NAT, arranged by the relay that carries their streams meanwhile.

    caller ── "punch": server ──> relay ── PROTOCOL ──> server     each is told a token, and a port of the relay's
    caller, server ── token, from a port of their own ──> relay    which sees where each comes from: swarm/mirror.py
    caller <── where the other one comes from ── relay ──> server  at the same moment
    caller <════════════ TCP, TLS ════════════> server             each dials the other from that same port

A router lets in what comes from where its own side has just dialled, if it uses one outer port for all that a port
behind it dials. Where it does not, nothing answers, and the relay goes on carrying. What is dialled is bounded: see
`Introductions`. Why TCP, and why not libp2p's own way: docs/decisions/0021.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, Field

from swarm.dht import STREAM_BUFFER_BYTES, Dht
from swarm.dial_back import stop_handling
from swarm.dialling import DiallingRule, is_ip
from swarm.errors import PeerError, PeerUnavailable
from swarm.p2pd import finish
from swarm.pipes import Stream, cancel_all, read_line
from swarm.reach import Budget, host_of, scope_of
from swarm.relays import ASK_TIMEOUT_S, Request, ask_relay

if TYPE_CHECKING:
    from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo

logger = logging.getLogger(__name__)

PROTOCOL = "/swarm/punch/1"

TOKEN_BYTES = 16
"""Length of what a peer shows at the mirror."""
DIAL_TIMEOUT_S = 4.0
"""How long both dial: a first packet that came too early is sent again after one second, and after three."""
DIAL_AGAIN_S = 0.25
"""How long a port that was refused waits before it dials again."""
KEEP_ALIVE_S = 60
"""After so long without a byte, the system sends an empty packet."""
WAITS_S = (0.0, 5.0, 60.0)
"""Before each attempt to reach one peer."""
PAUSE_S, PAUSE_AFTER_SUCCESS_S = 600.0, 10.0
"""How long nothing is tried with a peer after so many attempts, and after one that succeeded."""
MAX_TRIED, MAX_WAITING = 64, 1024
"""Peers that are tried at a time, and those besides with whom it is not time yet: strangers may name any number."""
MAX_MEETINGS = 8
"""How many a server takes part in at once."""


class Meeting(BaseModel):
    """What a relay tells each of two peers first."""

    port: Annotated[int, Field(ge=1, le=65535)]
    """Of its mirror."""
    token: Annotated[str, Field(pattern=f"^[0-9a-f]{{{2 * TOKEN_BYTES}}}$")]
    """What to show there, as hexadecimal digits."""


class Introduction(BaseModel):
    """What it tells each when both have shown their tokens: where the other one comes from."""

    host: Annotated[str, Field(max_length=64)]
    port: Annotated[int, Field(ge=1, le=65535)]


class Introductions:
    """Which addresses may be dialled because a relay says so.

    None of a narrower network than that in which the relay itself is, none that the rule for strangers forbids, and
    each only as often as for dialling back.
    """

    def __init__(self, rule: DiallingRule) -> None:
        self._rule = rule
        self._budget = Budget()

    async def allow(self, found: Introduction, relay_host: str) -> bool:
        """Whether this one may be dialled now; it counts then."""
        if not is_ip(found.host) or scope_of(found.host) < scope_of(relay_host):
            return False
        target = f"[{found.host}]:{found.port}" if ":" in found.host else f"{found.host}:{found.port}"
        return bool(await self._rule.targets([target])) and self._budget.take(found.host, time.monotonic())


async def meet(dht: Dht, relay_id: str, stream: Stream, introductions: Introductions) -> tuple[Stream, str]:
    """Dial a peer while it dials us; both have a stream to a relay that arranges it.

    Returns: the connection, and the IP address at its other end.
    Raises: PeerUnavailable, ProtocolError: it did not work.
    """
    meeting = await read_line(stream[0], Meeting, relay_id, timeout_s=ASK_TIMEOUT_S)
    addresses = (await dht.connected_addresses()).get(relay_id, [])
    relay_host = next(filter(None, map(host_of, addresses)), "")
    if not relay_host:
        raise PeerUnavailable(f"there is no connection to relay {relay_id} any more")
    with _open_socket(relay_host) as mirror:
        await _dial(mirror, relay_host, meeting.port, ASK_TIMEOUT_S)
        try:
            await asyncio.get_running_loop().sock_sendall(mirror, bytes.fromhex(meeting.token))
        except OSError as exc:
            raise PeerUnavailable(f"the mirror of relay {relay_id} has closed the connection") from exc
        found = await read_line(stream[0], Introduction, relay_id, timeout_s=2 * ASK_TIMEOUT_S)
        if not await introductions.allow(found, relay_host):
            raise PeerUnavailable(f"relay {relay_id} names {found.host}, which is not dialled because others say so")
        connected = await _dial_until_met(found, mirror.getsockname()[1])
    return await _as_stream(connected, found.host), found.host


def _open_socket(host: str, port: int = 0) -> socket.socket:
    """A socket for dialling a host from a port of ours that several connections may have."""
    opened = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        opened.setblocking(False)
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            opened.setsockopt(socket.SOL_SOCKET, option, 1)
        opened.bind(("", port))
    except OSError as exc:
        opened.close()
        raise PeerUnavailable(f"no local port to dial {host} from: {exc}") from exc
    return opened


async def _dial(opened: socket.socket, host: str, port: int, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.get_running_loop().sock_connect(opened, (host, port))
    except (OSError, TimeoutError) as exc:
        raise PeerUnavailable(f"nothing answers at {host}, port {port}: {exc!r}") from exc


async def _dial_until_met(found: Introduction, local_port: int) -> socket.socket:
    """Dial from this port until the other end has dialled as well."""
    now_s = asyncio.get_running_loop().time
    until_s = now_s() + DIAL_TIMEOUT_S
    while True:
        opened = _open_socket(found.host, local_port)
        try:
            await _dial(opened, found.host, found.port, max(0.0, until_s - now_s()))
        except BaseException as exc:
            opened.close()
            if not isinstance(exc, PeerUnavailable) or now_s() + DIAL_AGAIN_S > until_s:
                raise
            await asyncio.sleep(DIAL_AGAIN_S)
        else:
            return opened


async def _as_stream(connected: socket.socket, host: str) -> Stream:
    """Raises: PeerUnavailable: the connection has ended already."""
    try:
        _keep_alive(connected)
        return await asyncio.open_connection(sock=connected, limit=STREAM_BUFFER_BYTES)
    except BaseException as exc:
        connected.close()
        if isinstance(exc, OSError):
            raise PeerUnavailable(f"the connection to {host} has ended already") from exc
        raise


def _keep_alive(connected: socket.socket) -> None:
    """Have the system send something now and then, so that routers do not forget the connection while it is idle."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):  # macOS calls it otherwise, and its two hours are often enough
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEP_ALIVE_S)


Renew = Callable[[str], Awaitable[bool]]
"""Connects to a peer once more, for new calls; whether that succeeded."""


class Puncher:
    """The caller's side: finds direct ways to peers that are reached through a relay, in the background.

    Args:
        rule: which addresses may be dialled at all.
        waits_s: before each attempt with one peer.
    """

    def __init__(self, dht: Dht, rule: DiallingRule, *, waits_s: Sequence[float] = WAITS_S) -> None:
        self._dht = dht
        self._waits_s = waits_s
        self._introductions = Introductions(rule)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._trying = asyncio.Semaphore(MAX_TRIED)
        self._connections: dict[str, Stream] = {}
        self._not_before_s: dict[str, float] = {}
        self.renew: Renew | None = None
        """Called when there is a direct connection to a peer, which `take` then gives away."""

    def begin(self, peer_id: str, relay_id: str) -> None:
        """Try to reach a peer that this relay carries us to; later, if it was tried lately."""
        if peer_id not in self._tasks and len(self._tasks) < MAX_WAITING:
            self._tasks[peer_id] = asyncio.create_task(self._reach(peer_id, relay_id))

    def take(self, peer_id: str) -> Stream | None:
        """The direct connection to a peer, once."""
        return self._connections.pop(peer_id, None)

    async def wait_tried(self) -> None:
        """Wait until nothing is being tried any more."""
        await asyncio.gather(*self._tasks.values())

    async def aclose(self) -> None:
        """Stop trying."""
        await cancel_all(self._tasks.values())

    async def _reach(self, peer_id: str, relay_id: str) -> None:
        now_s, pause_s = asyncio.get_running_loop().time, PAUSE_S
        try:
            await asyncio.sleep(self._not_before_s.get(peer_id, 0.0) - now_s())
            for wait_s in self._waits_s:
                await asyncio.sleep(wait_s)
                try:
                    async with self._trying:
                        self._connections[peer_id] = await self._meet(peer_id, relay_id)
                except PeerError as exc:
                    logger.debug("no direct connection to peer %s: %s", peer_id, exc)
                    continue
                if self.renew is not None and await self.renew(peer_id):
                    pause_s = PAUSE_AFTER_SUCCESS_S
                    return
                self._drop(peer_id)
        finally:
            self._drop(peer_id)
            self._not_before_s = {each: until_s for each, until_s in self._not_before_s.items() if until_s > now_s()}
            self._not_before_s[peer_id] = now_s() + pause_s
            del self._tasks[peer_id]

    def _drop(self, peer_id: str) -> None:
        """Close a connection that nobody has taken."""
        if (unused := self.take(peer_id)) is not None:
            unused[1].close()

    async def _meet(self, peer_id: str, relay_id: str) -> Stream:
        stream = await ask_relay(self._dht, relay_id, Request(punch=peer_id), ASK_TIMEOUT_S)
        try:
            connection, _ = await meet(self._dht, relay_id, stream, self._introductions)
            return connection
        finally:
            stream[1].close()


@asynccontextmanager
async def answer_punches(
    dht: Dht, rule: DiallingRule, relays: Collection[str], carry: Callable[[Stream, str], None]
) -> AsyncIterator[None]:
    """The server's side: dial those that our relays introduce, until the context ends.

    Args:
        carry: takes each connection, and where it leads.
    """
    introductions = Introductions(rule)
    meeting: set[asyncio.Task[None]] = set()

    async def answer(relay_id: str, stream: Stream) -> None:
        try:
            connection, host = await meet(dht, relay_id, stream, introductions)
        except PeerError as exc:
            logger.debug("no direct connection to a caller: %s", exc)
        else:
            logger.info("a caller at %s is reached directly", host)
            carry(connection, host)
        finally:
            stream[1].close()

    async def accept(info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        relay_id = info.peer_id.to_base58()
        if relay_id not in relays or len(meeting) >= MAX_MEETINGS:
            writer.close()
            return
        task = asyncio.create_task(answer(relay_id, (reader, writer)))
        meeting.add(task)
        task.add_done_callback(meeting.discard)

    await dht.p2p.add_binary_stream_handler(PROTOCOL, accept)
    try:
        yield
    finally:
        await finish(stop_handling(dht.p2p, PROTOCOL))
        await finish(cancel_all(meeting))
