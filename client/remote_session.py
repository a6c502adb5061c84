"""What a person's generation needs to survive any server.

A session keeps a record of every hidden state it has fed to the first block. The servers' caches are only ever a
copy of what the record implies: after a failure, the next step finds a new route and replays the record there. Where
that can be done before it is needed, it is: when a step stalls, and when a server says that it is about to leave.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from swarm.errors import NoRoute, SwarmError
from swarm.streams import Step

from .chain import ChainConfig
from .hedging import Hedges
from .lane import Lane
from .network import Attempt, Network
from .racing import race
from .record import Record
from .routing import Hop, Needs
from .tasks import cancel_and_wait

logger = logging.getLogger(__name__)

# B batch, L length, D hidden

T = TypeVar("T")


class RemoteSession:
    """A session's state and its asynchronous steps; see InferenceSession for the API."""

    def __init__(self, network: Network, needs: Needs, config: ChainConfig) -> None:
        self._network = network
        self._needs = needs
        self._config = config
        self._record = Record()
        self._lane = self._new_lane()
        self._stepping = asyncio.Lock()
        """Held while the record grows, or the session changes its lane."""
        self._hedges = Hedges()
        self._successor: Lane | None = None
        """Where the session is moving to."""
        self._feeding: asyncio.Task[Any] | None = None
        """The step that is under way."""
        self._cancelled = False
        self._moving: asyncio.Task[None] | None = None
        self._num_slow, self._may_leave_at = 0, 0
        """How often slow hops were left, and the length before which none is left again: it doubles each time."""

    def _new_lane(self) -> Lane:
        return Lane(self._network, self._needs, self._config, self._leave_draining_hops)

    @property
    def route(self) -> Sequence[Hop]:
        """The hops in use; empty before the first step and after a failure."""
        return self._lane.hops

    @property
    def length(self) -> int:
        """Tokens in the record."""
        return self._record.length

    async def step(self, step: Step) -> Tensor:
        """Feed tokens and return the last `num_outputs` hidden states, on any route that works.

        Raises: NoRoute, PeerError: see Network.retrying. The session is then as it was before the step.
        """
        async with self._stepping:
            if self._cancelled:
                raise asyncio.CancelledError
            if self._moving is not None and self._moving.done() and not self._moving.cancelled():
                self._moving.result()  # an error would be our bug
            if self._successor is not None:
                self._successor.changed(step)
            self._leave_slow_hops()
            record = self._record.followed_by(step)
            self._hedges.fed(step.x_BLD.shape[1])

            async def attempt(attempt: Attempt) -> Tensor:
                return await self._attempt(step, record, attempt)

            self._feeding = asyncio.current_task()
            try:
                result = await self._network.retrying(attempt)
            finally:
                self._feeding = None
            self._record = record
        return result

    async def _attempt(self, step: Step, record: Record, attempt: Attempt) -> Tensor:
        """Feed the step; the servers of a new route are sent their adapters first."""
        hops = await self._lane.plan(attempt, record.length)
        return await self._prepared(self._lane, hops, lambda: self._race(step, record, attempt, hops))

    async def _prepared(self, lane: Lane, hops: Sequence[Hop], call: Callable[[], Awaitable[T]]) -> T:
        """Call when the hops of a lane that is not open yet have been sent their adapters."""
        if lane.is_open:
            return await call()
        return await self._network.uploads.calling(hops, self._config.adapters, self._config.fingerprint, call)

    async def _race(self, step: Step, record: Record, attempt: Attempt, hops: Sequence[Hop]) -> Tensor:
        """Feed the step on these hops; while that takes longer than it should, feed it on other routes as well."""
        lanes, draining = [self._lane], self._lane.draining
        bound_s, tried = self._lane.bound_s(step, hops), [hops]

        async def hedge(number: int) -> Tensor:
            lane = self._new_lane()
            lanes.append(lane)
            logger.info("a step takes long on %s", ", ".join(map(str, hops)))
            leaving = replace(attempt, refused_by=attempt.refused_by | draining)
            stalling = list(chain.from_iterable(tried))
            others = await lane.plan(
                await self._network.elsewhere(leaving, self._needs, stalling, number), record.length
            )
            if any([hop.place for hop in others] == [hop.place for hop in each] for each in tried):
                raise NoRoute("there is no way besides those on which the step takes long")
            tried.append(others)
            return await self._prepared(lane, others, lambda: lane.feed(step, record, others))

        outcome = await race(
            self._lane.feed(step, record, hops),
            hedge,
            lambda number: self._hedges.after_s(bound_s, record.length, number),
            self._network.note_failure,
        )
        for number, lane in enumerate(lanes):
            if number and lane.is_open:
                self._hedges.ended(record.length, won=number == outcome.winner)
        self._lane = lanes[outcome.winner]
        if outcome.winner:
            logger.info("going on at %s", ", ".join(map(str, self._lane.hops)))
        for number, task in outcome.left.items():
            lanes[number].retire(task)
        return outcome.result

    def _leave_slow_hops(self) -> None:
        """Give up the lane if another route is worth the replay; the step that follows takes it."""
        if not self._lane.hops or self.length < self._may_leave_at:
            return
        num_steps = self._config.max_tokens - self.length
        num_tokens, needs = self.length * self._config.batch_size, self._needs.fed(0, self._config.batch_size)
        if self._network.is_worth_leaving(self.route, needs, num_tokens=num_tokens, num_steps=num_steps):
            logger.info("leaving %s, where a hop is slower than it says", ", ".join(map(str, self.route)))
            self._num_slow += 1
            self._may_leave_at = self.length + 2 ** min(self._num_slow + 2, 20)
            # The hop that is slow would be slow to end its stream as well: nobody waits for that.
            self._lane.retire()
            self._lane = self._new_lane()

    def _leave_draining_hops(self, lane: Lane) -> None:
        """Move away from servers that are about to leave, between two steps; they run those that come until then."""
        if lane is self._lane and (self._moving is None or self._moving.done()):
            self._moving = self._network.try_in_background(self._move(lane))

    async def _move(self, lane: Lane) -> None:
        successor = self._new_lane()

        async def feed(hops: Sequence[Hop]) -> None:
            async with self._stepping:
                record, self._successor = self._record, successor
                if self._lane is not lane or not lane.draining:
                    return
            await successor.feed(record.part(0, record.length), record, hops)

        async def move(attempt: Attempt) -> None:
            # The directory says who leaves; a server that only changes its range may be part of the new route.
            hops = await successor.plan(replace(attempt, max_age_s=1.0), self._record.length)
            await self._prepared(successor, hops, lambda: feed(hops))

        try:
            await self._network.retrying(move)
            async with self._stepping:
                if self._lane is lane and lane.draining:
                    logger.info("moved from %s to %s", *(", ".join(map(str, each.hops)) for each in (lane, successor)))
                    self._lane, successor = successor, lane
        except SwarmError as exc:
            logger.info("staying with servers that are about to leave: %s", exc)
        finally:
            self._successor = None
            successor.retire()
        if self._lane is not lane and self._lane.draining:
            self._moving = None
            self._leave_draining_hops(self._lane)

    def preload(self, step: Step) -> None:
        """Take a first step into the record alone; the next one replays it."""
        self._record = self._record.followed_by(step)

    async def select(self, rows: Sequence[int]) -> None:
        """Let the sequences be those of these rows from now on; the next step replays them."""
        await self.aclose()
        self._record = self._record.rows(torch.tensor(rows))
        self._config = replace(self._config, batch_size=len(rows))
        self._lane = self._new_lane()

    async def cancel(self) -> None:
        """End the session in the middle of a step, which is cancelled; the servers free their caches at once."""
        self._cancelled = True
        if self._feeding is not None:
            await self._lane.interrupt(self._feeding)
        await self.aclose()

    async def aclose(self) -> None:
        """Close the streams; the servers free their caches."""
        if self._moving is not None:
            await cancel_and_wait([self._moving])
        await self._lane.aclose()
