"""The relay's side of swarm/relays.py: whom it carries connections for, how many, and how many bytes.

A relay opens streams only to peers that have registered with it, over the connections that these have made: it dials
nobody. It reads nothing, as what it carries is TLS between the two ends. Anybody may make new identities, so the limits
count IP addresses (of IPv6, /64s) beside peers, and leave room for others whatever one of them does.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from swarm import punching
from swarm.dial_back import stop_handling
from swarm.errors import BadRequest, PeerError, PeerUnavailable
from swarm.mirror import Mirror, open_mirror
from swarm.p2pd import finish
from swarm.pipes import Stream, cancel_all, join_streams, read_line, write_line
from swarm.reach import Budget, host_of, place_of
from swarm.relays import ASK_TIMEOUT_S, PROTOCOL, TUNNEL_PROTOCOL, Reply, Request
from swarm.throttle import Throttle

if TYPE_CHECKING:
    from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo

    from swarm.dht import Dht

logger = logging.getLogger(__name__)

MAX_ASKING, MAX_ASKING_PER_PLACE = 64, 16
"""Streams that have not said what they want, in all and from one place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayConfig:
    """How much a node carries for others."""

    max_registered: int = 1024
    """Servers that it carries connections to; a quarter of them may have one IP address."""
    max_carried: int = 1024
    """Connections at once; a quarter of them may come from one IP address, half of them go to one server."""
    max_carried_per_peer: int = 64
    """Connections of one caller."""
    max_bytes_per_s: float = 50e6
    """Both ways together; half of it may be for callers with one IP address."""
    idle_timeout_s: float = 300.0
    """After so long without a byte, a connection is closed; callers make it again when they need it."""
    mirror_port: int = 0
    """TCP port at which it sees where peers come from, so that they can do without it; 0: any free one."""

    def __post_init__(self) -> None:
        if self.max_bytes_per_s <= 0 or self.idle_timeout_s <= 0:
            raise BadRequest("what a relay carries must be more than 0 bytes per second, and for more than 0 seconds")

    def within(self, num_files: int) -> RelayConfig:
        """The same with no more places than half of the files that this process may open allow."""
        room = num_files // 2
        max_registered = min(self.max_registered, room // 4)
        return replace(
            self, max_registered=max_registered, max_carried=min(self.max_carried, (room - max_registered) // 2)
        )


BESIDE_SERVING = RelayConfig(max_registered=128, max_carried=128, max_bytes_per_s=10e6)
"""What a server carries for others beside its own work."""


@dataclass(slots=True, eq=False)
class Guest:
    """A stream that somebody opened to the relay."""

    peer_id: str
    place: str
    """What limits count its IP address as."""
    is_registered: bool = False
    target: str = ""
    """Peer id of the server that it is carried to; empty: it is not."""


def may_register(guests: Iterable[Guest], new: Guest, config: RelayConfig) -> bool:
    """Whether there is room for one more server; an earlier stream of the same one gives its place up."""
    others = [each for each in guests if each.is_registered and each.peer_id != new.peer_id]
    near = sum(each.place == new.place for each in others)
    return len(others) < config.max_registered and near < max(1, config.max_registered // 4)


def may_carry(guests: Iterable[Guest], new: Guest, target: str, config: RelayConfig) -> bool:
    """Whether there is room for one more connection."""
    carried = [each for each in guests if each.target]
    return (
        len(carried) < config.max_carried
        and sum(each.peer_id == new.peer_id for each in carried) < config.max_carried_per_peer
        and sum(each.place == new.place for each in carried) < max(1, config.max_carried // 4)
        and sum(each.target == target for each in carried) < max(1, config.max_carried // 2)
    )


class Relay:
    """Answers the streams of one node; `serve_relay` makes one."""

    def __init__(self, dht: Dht, config: RelayConfig, mirror: Mirror) -> None:
        self._dht = dht
        self._config = config
        self._mirror = mirror
        self._meetings = Budget()
        self._guests: dict[asyncio.Task[None], Guest] = {}
        self._registered: dict[str, asyncio.Task[None]] = {}
        self._total = Throttle(config.max_bytes_per_s)
        self._of_place: dict[str, Throttle] = {}

    async def accept(self, info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take a stream, which a task of its own then serves."""
        peer_id = info.peer_id.to_base58()
        guest = Guest(peer_id, place_of(host_of(str(info.addr))) or peer_id)
        asking = [each.place for each in self._guests.values() if not each.is_registered and not each.target]
        if len(asking) >= MAX_ASKING or asking.count(guest.place) >= MAX_ASKING_PER_PLACE:
            writer.close()
            return
        task = asyncio.create_task(self._serve(guest, (reader, writer)))
        self._guests[task] = guest
        task.add_done_callback(self._guests.pop)

    async def aclose(self) -> None:
        """End all streams."""
        await cancel_all(self._guests)

    async def _serve(self, guest: Guest, stream: Stream) -> None:
        try:
            request = await read_line(stream[0], Request, guest.peer_id, timeout_s=ASK_TIMEOUT_S)
            if request.to is not None:
                error = await self._carry(guest, request.to, stream)
            elif request.punch is not None:
                error = await self._introduce(guest, request.punch, stream)
            else:
                error = await self._keep(guest, stream) if request.register_me else "this is no request"
            if error:
                logger.debug("relay: peer %s is refused: %s", guest.peer_id, error)
                await write_line(stream[1], Reply(error=error), guest.peer_id)
        except (PeerError, OSError) as exc:
            logger.debug("relay: %s", exc)
        finally:
            stream[1].close()

    async def _keep(self, guest: Guest, stream: Stream) -> str:
        """Know a server until its stream ends; it sends nothing more. Return why not."""
        if not may_register(self._guests.values(), guest, self._config):
            return "this relay has no room for more servers"
        task, earlier = asyncio.current_task(), self._registered.get(guest.peer_id)
        assert task is not None
        if earlier is not None:
            earlier.cancel()
        self._registered[guest.peer_id] = task
        guest.is_registered = True
        try:
            await write_line(stream[1], Reply(), guest.peer_id)
            await stream[0].read(1)
        finally:
            if self._registered.get(guest.peer_id) is task:
                del self._registered[guest.peer_id]
        return ""

    async def _carry(self, guest: Guest, target: str, stream: Stream) -> str:
        """Carry a stream to a server until either end closes it. Return why not."""
        if target not in self._registered:
            return "this relay does not know that peer"
        if not may_carry(self._guests.values(), guest, target, self._config):
            return "this relay has no room for more connections"
        guest.target = target
        try:
            onward = await self._dht.open_stream(target, TUNNEL_PROTOCOL, timeout_s=ASK_TIMEOUT_S)
        except PeerUnavailable:
            guest.target = ""
            return "the peer does not answer its relay"
        try:
            await write_line(stream[1], Reply(), guest.peer_id)
            async with asyncio.timeout(self._config.idle_timeout_s) as idle:
                await join_streams(stream, onward, self._pace(guest, idle))
        finally:
            onward[1].close()
            guest.target = ""
            if not any(each.target and each.place == guest.place for each in self._guests.values()):
                self._of_place.pop(guest.place, None)
        return ""

    async def _introduce(self, guest: Guest, target: str, stream: Stream) -> str:
        """Tell a caller and a server that it is carried to where the other one comes from. Return why not."""
        server = self._guests.get(self._registered[target]) if target in self._registered else None
        is_carried = any((each.peer_id, each.target) == (guest.peer_id, target) for each in self._guests.values())
        if server is None or not is_carried:
            return "this relay carries nothing of yours to that peer"
        if not self._meetings.take(guest.place, asyncio.get_running_loop().time()):
            return "you have asked too often"
        try:
            onward = await self._dht.open_stream(target, punching.PROTOCOL, timeout_s=ASK_TIMEOUT_S)
        except PeerUnavailable:
            return "the peer is not to be met"
        seeing: list[asyncio.Task[punching.Introduction]] = []
        try:
            await write_line(stream[1], Reply(), guest.peer_id)
            seeing.append(asyncio.create_task(self._mirror.see(stream, guest.peer_id, guest.place)))
            seeing.append(asyncio.create_task(self._mirror.see(onward, target, server.place)))
            caller_at, server_at = await asyncio.gather(*seeing)
            await write_line(stream[1], server_at, guest.peer_id)
            await write_line(onward[1], caller_at, target)
        except TimeoutError:
            logger.debug("relay: peers %s and %s do not both come to the mirror", guest.peer_id, target)
        finally:
            onward[1].close()
            await cancel_all(seeing)
        return ""

    def _pace(self, guest: Guest, idle: asyncio.Timeout) -> Callable[[int], float]:
        """Return what says how long bytes have to wait; it also notes that the connection is not idle."""
        loop = asyncio.get_running_loop()
        of_place = self._of_place.setdefault(guest.place, Throttle(self._config.max_bytes_per_s / 2))

        def pace(num_bytes: int) -> float:
            now_s = loop.time()
            if not idle.expired():
                idle.reschedule(now_s + self._config.idle_timeout_s)
            return max(throttle.wait_s(num_bytes, now_s) for throttle in (self._total, of_place))

        return pace


@asynccontextmanager
async def serve_relay(dht: Dht, config: RelayConfig | None = None) -> AsyncIterator[None]:
    """Carry connections to the peers that register here, until the context ends."""
    max_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    config = config or RelayConfig()
    config = config.within(max_files) if max_files != resource.RLIM_INFINITY else config
    async with open_mirror(dht.config.host, config.mirror_port) as mirror:
        relay = Relay(dht, config, mirror)
        await dht.p2p.add_binary_stream_handler(PROTOCOL, relay.accept)
        try:
            yield
        finally:
            await finish(stop_handling(dht.p2p, PROTOCOL))
            await finish(relay.aclose())
