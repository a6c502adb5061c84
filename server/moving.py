"""Which tenure is in service, and how a server goes from one to the next while it stays in its swarm."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch

from swarm.errors import BadRequest, ResourceError, SwarmError
from swarm.ranges import BlockRange

from .announcer import Announcer
from .config import ServerConfig
from .front import Front
from .hardware import free_bytes
from .placement import fits
from .rebalancing import (
    ASK_S,
    CHECKS_PER_PERIOD,
    CONFIRM_BYTES,
    PATIENCE_PERIODS,
    READ_BYTES,
    Floats,
    Population,
    is_alarming,
    own_move,
    pipeline_rate,
    reconsider,
    steady_line,
)
from .tenure import Holding, Tenure

logger = logging.getLogger(__name__)

OpenTenure = Callable[[Holding], AbstractAsyncContextManager[Tenure]]


@dataclass(slots=True)
class _Order:
    blocks: BlockRange
    done: asyncio.Future[None]


class Mover:
    """Has one tenure in service, and replaces it. A context manager: at its end, whatever is in service is closed."""

    def __init__(self, open_tenure: OpenTenure, front: Front, config: ServerConfig) -> None:
        self._open_tenure = open_tenure
        self._front = front
        self._config = config
        self._announcer: Announcer
        self.present: Tenure | None = None
        """What is in service; None: nothing at the moment."""
        self._owned = AsyncExitStack()
        self._blocks_per_s = 0.0
        """What it computes, as measured in the first tenure; 0: not yet."""
        self._line_bytes_per_s = 0.0
        """What its line is taken to carry; 0: not known."""
        self._is_movable = config.moves and config.blocks is None
        """Whether it goes elsewhere without being told."""
        self._seen_N: Floats | None = None
        """How many servers each block had at the last look."""
        self._orders: asyncio.Queue[_Order] = asyncio.Queue(1)
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def tenure(self) -> Tenure:
        """What is in service. Raises: ResourceError: nothing at the moment."""
        if self.present is None:
            raise ResourceError("this server holds no blocks at the moment: it is on its way to others")
        return self.present

    async def settle(self, announcer: Announcer, holding: Holding) -> None:
        """Take the first blocks into service. Raises: what opening the tenure raises."""
        self._announcer = announcer
        announcer.measure = self._announced
        await self._take(holding)

    def _announced(self) -> dict[str, Any]:
        fields = {} if self.present is None else self.present.announced()
        current = self._announcer.current
        self._line_bytes_per_s = steady_line(self._line_bytes_per_s, fields.get("bytes_per_s", 0.0))
        num_blocks = len(current.blocks if self.present is None else self.present.blocks)
        rate = pipeline_rate(self._blocks_per_s, num_blocks, self._line_bytes_per_s, current.hidden_size)
        return fields | {"movable": self._is_movable, "blocks_per_s": rate}

    async def move(self, blocks: BlockRange) -> None:
        """Serve these blocks instead, and stay there; returns when they are in service and the old ones are gone.

        Raises: BadRequest: the model has no such blocks. ResourceError: they do not fit, the server stays as it is.
        """
        blocks.check_inside(self._announcer.current.num_model_blocks)
        order = _Order(blocks, asyncio.get_running_loop().create_future())
        try:
            self._orders.put_nowait(order)
        except asyncio.QueueFull:
            raise BadRequest("this server is about to move already: wait until it has") from None
        await order.done

    async def run(self) -> None:
        """Carry out moves one after the other, and look now and then whether to move, until cancelled."""
        period_s = self._config.announce_period_s
        wait_s = period_s / CHECKS_PER_PERIOD
        while True:
            try:
                async with asyncio.timeout(wait_s if self._is_movable else None):
                    order = await self._orders.get()
            except TimeoutError:
                is_hindered = not await self._move_by_itself()
                wait_s = period_s * (random.uniform(0, PATIENCE_PERIODS) if is_hindered else 1 / CHECKS_PER_PERIOD)
            else:
                await self._obey(order)

    async def _obey(self, order: _Order) -> None:
        self._is_movable = False
        try:
            await self._move(order.blocks)
        except SwarmError as exc:
            order.done.set_exception(exc)
            if self.present is None:
                raise
        else:
            order.done.set_result(None)
        finally:
            order.done.cancel()

    async def _move_by_itself(self) -> bool:
        """Go where the swarm lacks this server more, if it does; False: others have hindered it. See rebalancing.py."""
        here = self.tenure.blocks
        if (blocks := await self._decide(own_move, await self._look_around())) is None:
            return True
        await self._announcer.say(next_start=blocks.start, next_end=blocks.end)
        await asyncio.sleep(min(ASK_S, self._config.announce_period_s / 3))
        population = await self._read(CONFIRM_BYTES)
        blocks = await self._decide(lambda population, server: reconsider(population, server, here.start), population)
        if blocks is None:
            await self._announcer.say(next_start=None, next_end=None)
            return False
        try:
            await self._move(blocks)
        except SwarmError as exc:
            if self.present is None:
                raise
            self._is_movable = False  # the others wait for it no longer
            logger.warning("this server stays at blocks %s from now on, since a move failed: %s", here, exc)
            await self._announcer.say(next_start=None, next_end=None)
        return True

    async def _look_around(self) -> Population | None:
        """Read a part of what everybody announces; if that shows that many have gone, more of it."""
        population, seen_N = await self._read(READ_BYTES), self._seen_N
        if population is not None and seen_N is not None and is_alarming(seen_N, population.going_N):
            population = await self._read(CONFIRM_BYTES)
        if population is not None:
            self._seen_N = population.going_N
        return population

    async def _read(self, max_bytes: float) -> Population | None:
        """What everybody announces, this server first; None: the directory cannot be reached.

        Args:
            max_bytes: about how much of the directory to read; of the rest, what was read before counts.
        """
        own = self._announcer.current
        try:
            others = await self._announcer.others(max_bytes=max_bytes)
        except SwarmError as exc:
            logger.debug("no other servers can be looked up: %s", exc)
            return None
        return Population.of([own, *others], own.num_model_blocks)

    async def _decide(
        self, decide: Callable[[Population, int], BlockRange | None], population: Population | None
    ) -> BlockRange | None:
        """Where this server should go, by such a rule; a directory that cannot be reached gives no reason to go."""
        return None if population is None else await asyncio.to_thread(decide, population, 0)

    async def drain(self) -> None:
        """Take no new calls, and let running ones finish for a while."""
        if self.present is not None:
            await self.present.drain(self._config.drain_timeout_s)

    async def wait_failed(self) -> None:
        """Wait until the engine of the tenure in service has ended by itself. Raises: the error that ended it."""
        await self._failed

    async def _move(self, blocks: BlockRange) -> None:
        """Have these blocks in service, and say so."""
        if blocks != self.tenure.blocks:
            await self._go_to(blocks)
        if self._config.on_moved is not None:
            self._config.on_moved(blocks)

    async def _go_to(self, blocks: BlockRange) -> None:
        old = self.tenure.holding
        share = len(blocks) / len(old.blocks)
        memory = replace(old.memory, num_blocks=len(blocks), cache_bytes=int(old.memory.cache_bytes * share))
        new = replace(old, blocks=blocks, memory=memory)
        beside = fits(new.precision.needs, new.memory, free_bytes=free_bytes(new.device))
        logger.info(
            "moving from blocks %s to %s, %s", old.blocks, blocks, "loading first" if beside else "leaving first"
        )
        if beside:
            await self._make_before_break(new)
        else:
            await self._break_before_make(new)

    async def _make_before_break(self, holding: Holding) -> None:
        old, owned = self.tenure, self._owned
        await self._announcer.say(next_start=holding.blocks.start, next_end=holding.blocks.end)
        try:
            await self._take(holding)
        except SwarmError:
            await self._announcer.say(next_start=None, next_end=None)
            raise
        try:
            await old.drain(self._config.drain_timeout_s)
        finally:
            await owned.aclose()

    async def _break_before_make(self, holding: Holding) -> None:
        old = self.tenure
        await self._announcer.say(state="draining", next_start=holding.blocks.start, next_end=holding.blocks.end)
        await old.drain(self._config.drain_timeout_s)
        await self._leave()
        before = old.holding
        del old
        await asyncio.to_thread(_give_memory_back, before.device)
        where = {"start": holding.blocks.start, "end": holding.blocks.end, "next_start": None, "next_end": None}
        await self._announcer.say(state="joining", **where)
        try:
            await self._take(holding)
        except SwarmError as exc:
            logger.warning("going back to blocks %s: %s", before.blocks, exc)
            await self._take(before)
            raise

    async def _take(self, holding: Holding) -> None:
        """Put a tenure into service; nothing has changed if that fails."""
        async with AsyncExitStack() as owned:
            tenure = await owned.enter_async_context(self._open_tenure(holding))
            watch = asyncio.create_task(tenure.engine.wait_ended())
            watch.add_done_callback(self._note_end)
            owned.callback(watch.cancel)
            self.present, self._owned = tenure, owned.pop_all()
        if not self._blocks_per_s:
            self._blocks_per_s = tenure.speed.decode_tokens_per_s * len(tenure.blocks)
        await self._front.serve(tenure.service)
        await self._announcer.say(state="online", next_start=None, next_end=None)

    def _note_end(self, watch: asyncio.Task[None]) -> None:
        if not watch.cancelled() and (error := watch.exception()) is not None and not self._failed.done():
            self._failed.set_exception(error)

    async def _leave(self) -> None:
        await self._front.serve(None)
        owned, self._owned, self.present = self._owned, AsyncExitStack(), None
        await owned.aclose()

    async def __aenter__(self) -> Mover:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._failed.cancel()
        await self._owned.aclose()
        self.present = None


def _give_memory_back(device: torch.device) -> None:
    """Modules refer to one another in circles: what is no longer used is found, and given back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
