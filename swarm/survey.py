"""Measuring how far away other peers are: what routes are planned with. Servers and clients do it alike."""

from __future__ import annotations

import asyncio
import logging
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence

from swarm import PROTOCOL_VERSION
from swarm.announcement import Announcement
from swarm.coordinates import Coordinates
from swarm.errors import PeerUnavailable, SwarmError
from swarm.peers import Connector, PeerAddress
from swarm.prefixes import prefix_of_server
from swarm.rpc import errors_from_wire
from swarm.v1 import blocks_pb2 as pb
from swarm.v1 import blocks_pb2_grpc as pb_grpc

logger = logging.getLogger(__name__)

CALLS_PER_VISIT = 3
"""The first call may have to connect; the shortest of the others counts."""

VISIT_TIMEOUT_S = 5.0

LINE_BYTES, LINE_CALLS, LINE_TIMEOUT_S = 512 << 10, 2, 10.0
"""What is sent to see what a line carries, how often (the first one may find it asleep), and how long each may take."""

MEMORY = 0.5
"""How much of an earlier measurement stays in the next."""

NEIGHBOURS, ROUNDS = 32, 10
"""With so many of the latest measurements, and so often, a place is found."""

OUTLIER, OUTLIER_S = 4.0, 0.01
"""A measurement is left out that fits worse than so many times the median, and so many seconds."""

MAX_QUEUE_S = 3600.0
"""Who says that steps wait for longer says nothing."""

MAX_REMEMBERED = 1024
"""Peers whose round-trip times are kept."""


class Survey:
    """Our own place in the network, and the round-trip times to the peers that we have called."""

    def __init__(self, connector: Connector, rng: random.Random | None = None) -> None:
        self._connector = connector
        self._rng = rng or random.Random()
        self.here: Coordinates | None = None
        """None: we have met nobody yet."""
        self.rtts_s: dict[str, float] = {}
        """Peer id -> seconds, those met last at the end."""
        self.queues_s: dict[str, float] = {}
        """Peer id -> what a step waits there, as it said when we met it."""
        self._places: dict[str, Coordinates] = {}
        self._called: dict[str, int] = {}
        """Peer id -> number of the visit at which it was called last, whether it answered or not."""
        self._num_visits = 0

    async def visit(self, servers: Sequence[Announcement], limit: int) -> None:
        """Call some servers, those first that were called longest ago, and of these, of as many address prefixes as
        there are; who does not answer is left out."""
        servers = self._rng.sample(servers, len(servers))
        turns: Counter[str] = Counter()
        order: dict[str, tuple[int, int]] = {}
        for server in servers:
            turns[prefix := prefix_of_server(server)] += 1
            order[server.peer_id] = self._called.get(server.peer_id, 0), turns[prefix]
        servers.sort(key=lambda server: order[server.peer_id])
        known = {server.peer_id for server in servers}
        self._called = {peer_id: number for peer_id, number in self._called.items() if peer_id in known}
        self._num_visits += 1
        self._called.update((server.peer_id, self._num_visits) for server in servers[:limit])
        await asyncio.gather(*(self._call(server) for server in servers[:limit]))
        self.settle()

    async def measure_line(self, servers: Sequence[Announcement], limit: int) -> None:
        """See what our own line carries, where nothing was sent yet that would tell: send something large to a few of
        the servers that have answered, one after the other. Later it is learned from what is sent anyway.
        """
        if self._connector.throughput.to_peers:
            return
        for server in [each for each in servers if each.peer_id in self.rtts_s][:limit]:
            await self._fill_line(server)

    async def _fill_line(self, server: Announcement) -> None:
        request = pb.DescribeRequest(protocol_version=PROTOCOL_VERSION, padding=bytes(LINE_BYTES))
        seconds = LINE_TIMEOUT_S  # what does not arrive in that time says that the line is at most so fast
        try:
            async with (
                self._connector.lease(PeerAddress.of(server)) as channel,
                errors_from_wire(server.peer_id),
            ):
                for _ in range(LINE_CALLS):
                    started_s = time.monotonic()
                    async with asyncio.timeout(LINE_TIMEOUT_S):
                        await pb_grpc.BlocksStub(channel).Describe(request)
                    seconds = min(seconds, time.monotonic() - started_s)
        except SwarmError as exc:
            logger.debug("the line to server %s cannot be measured: %s", server.peer_id, exc)
            return
        except TimeoutError:
            logger.debug("the line to server %s is slow", server.peer_id)
        self._connector.throughput.sent(server.peer_id, LINE_BYTES, max(seconds - self.rtts_s[server.peer_id], 1e-6))

    def met(self, server: Announcement, rtt_s: float, queue_s: float = 0.0) -> None:
        """Note a measurement; `settle` makes use of it."""
        self.queues_s[server.peer_id] = queue_s
        before_s = self.rtts_s.pop(server.peer_id, rtt_s)
        self.rtts_s[server.peer_id] = MEMORY * before_s + (1 - MEMORY) * rtt_s
        self._places[server.peer_id] = server.coordinates or Coordinates()
        if len(self.rtts_s) > MAX_REMEMBERED:
            oldest = next(iter(self.rtts_s))
            self._forget(oldest)

    def _forget(self, peer_id: str) -> None:
        self.rtts_s.pop(peer_id, None)
        self.queues_s.pop(peer_id, None)
        self._places.pop(peer_id, None)

    def settle(self) -> None:
        """Find the place that suits what was measured last: a few measurements are gone through several times.

        Those that fit the place much worse than most, as of a peer that lies about its own place, are left out then.
        """
        latest = list(self.rtts_s)[-NEIGHBOURS:]
        if not latest:
            return
        self._go_through(latest)
        assert self.here is not None
        misfits_s = {each: abs(self.here.rtt_s(self._places[each]) - self.rtts_s[each]) for each in latest}
        most_s = OUTLIER * statistics.median(misfits_s.values()) + OUTLIER_S
        fitting = [each for each in latest if misfits_s[each] <= most_s]
        if len(fitting) < len(latest):
            self.here = None
            self._go_through(fitting)

    def _go_through(self, peer_ids: Sequence[str]) -> None:
        for _ in range(ROUNDS):
            for peer_id in self._rng.sample(peer_ids, len(peer_ids)):
                here = self.here or Coordinates()
                self.here = here.moved(self._places[peer_id], self.rtts_s[peer_id], self._rng)

    async def _call(self, server: Announcement) -> None:
        request = pb.DescribeRequest(protocol_version=PROTOCOL_VERSION)
        times_s = []
        try:
            async with (
                asyncio.timeout(VISIT_TIMEOUT_S),
                self._connector.lease(PeerAddress.of(server)) as channel,
                errors_from_wire(server.peer_id),
            ):
                for _ in range(CALLS_PER_VISIT):
                    started_s = time.monotonic()
                    answer = await pb_grpc.BlocksStub(channel).Describe(request)
                    times_s.append(time.monotonic() - started_s)
        except (SwarmError, TimeoutError) as exc:  # whatever a stranger answers, it is no measurement
            logger.debug("server %s does not answer: %s", server.peer_id, exc)
            self._forget(server.peer_id)
            if isinstance(exc, PeerUnavailable):  # not a busy line: by the link that there is, it may yet answer
                await self._connector.forget(server.peer_id)
            return
        queue_s = answer.load.queue_s if 0 <= answer.load.queue_s <= MAX_QUEUE_S else 0.0
        self.met(server, min(times_s[1:]), queue_s)
