"""Requests under way: whose turn it is, threads that generate, clients that leave, and the end of it all."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import Receive

from .errors import RETRY_AFTER_S, ApiError, shutting_down, translated
from .generation import Engine, Generation, Order, Piece

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Turns:
    """So many at a time; of those that wait, each caller's first in turns.

    Args:
        num_slots: how many may run.
        max_waiting: how many may wait beside them.
    """

    def __init__(self, num_slots: int, max_waiting: int) -> None:
        self._num_free = num_slots
        self._max_waiting = max_waiting
        self._waiting: collections.OrderedDict[str, collections.deque[asyncio.Future[None]]] = collections.OrderedDict()
        """Callers in the order in which they are served."""

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    def check_room(self, num_more: int) -> None:
        """Raise ApiError if so many more would be too many to wait."""
        if self.num_waiting + num_more > self._num_free + self._max_waiting:
            raise ApiError(
                503, "too many requests are waiting already: try again later", code="overloaded",
                retry_after_s=RETRY_AFTER_S,
            )  # fmt: skip

    @asynccontextmanager
    async def turn(self, caller: str) -> AsyncIterator[None]:
        """Wait for a slot and hold it inside."""
        await self._take(caller)
        try:
            yield
        finally:
            self._give()

    async def _take(self, caller: str) -> None:
        if self._num_free:
            self._num_free -= 1
            return
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, collections.deque()).append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():
                self._give()  # it came together with the cancellation
            else:
                self._forget(caller, mine)
            raise

    def _forget(self, caller: str, waiting: asyncio.Future[None]) -> None:
        queue = self._waiting[caller]
        queue.remove(waiting)
        if not queue:
            del self._waiting[caller]

    def _give(self) -> None:
        if not self._waiting:
            self._num_free += 1
            return
        caller, queue = self._waiting.popitem(last=False)
        queue.popleft().set_result(None)
        if queue:
            self._waiting[caller] = queue  # behind all others


class Metrics:
    """What the API does, for Prometheus. Counts and times only: nothing of what people ask."""

    def __init__(self, turns: Turns, num_running: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.responses = Counter(
            "swarm_api_responses", "Answers, by route and status.", ["route", "status"], registry=self.registry
        )
        self.tokens = Counter("swarm_api_tokens", "Tokens of prompts and answers.", ["kind"], registry=self.registry)
        self.cancelled = Counter("swarm_api_cancelled_requests", "Requests whose client left.", registry=self.registry)
        self.first_token = Histogram(
            "swarm_api_time_to_first_token_seconds", "From the request to its first token.", registry=self.registry
        )
        Gauge("swarm_api_running", "Requests under way.", registry=self.registry).set_function(num_running)
        Gauge("swarm_api_waiting", "Choices that wait for their turn.", registry=self.registry).set_function(
            lambda: turns.num_waiting
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """How much is done at a time."""

    max_running: int = 32
    """Choices that are generated at the same time, each in a session and a thread of its own."""
    max_waiting: int = 256
    """Choices that may wait for their turn."""

    def __post_init__(self) -> None:
        if self.max_running < 1 or self.max_waiting < 0:
            raise ValueError("max_running must be at least 1, max_waiting at least 0")


class Run:
    """The choices of one request, under way; made and used in the event loop."""

    def __init__(self, service: Service, caller: str, orders: Sequence[Order]) -> None:
        self.began_s = time.monotonic()
        self._service = service
        self._caller = caller
        self._num_left = len(orders)
        self._is_cancelled = False
        # Bounded by what the orders may generate: the threads are never held up by a slow reader.
        self._events: asyncio.Queue[tuple[int, Piece] | Exception | None] = asyncio.Queue()
        self._tasks = [asyncio.create_task(self._choice(number, order)) for number, order in enumerate(orders)]

    async def next(self) -> tuple[int, Piece] | None:
        """The next piece and the choice that it is of; None: all have ended, or the request was cancelled.

        Raises: ApiError: what became of the request instead; it has ended then.
        """
        if not self._num_left:
            return None
        event = await self._events.get()
        if isinstance(event, Exception):
            self.cancel()
            error = translated(event)
            if error is None:
                logger.error("a generation failed", exc_info=event)
                error = ApiError(500, "the server failed", code="internal_error")
            raise error
        if event is None:
            self._num_left = 0
        elif event[1].finish_reason is not None:
            self._num_left -= 1
        return event

    def cancel(self, why: ApiError | None = None) -> None:
        """End all choices without waiting; `next` gives None, or raises what is said here."""
        if self._is_cancelled:
            return  # a second time, it would hurry those that wait for their threads
        self._is_cancelled = True
        self._events.put_nowait(why)
        for task in self._tasks:
            task.cancel()

    @property
    def tasks(self) -> Sequence[asyncio.Task[None]]:
        return self._tasks

    async def _choice(self, number: int, order: Order) -> None:
        service, loop = self._service, asyncio.get_running_loop()
        num_tokens = 0

        def take(piece: Piece) -> None:
            nonlocal num_tokens
            if not num_tokens:
                service.metrics.first_token.observe(time.monotonic() - self.began_s)
            num_tokens = piece.num_tokens
            self._events.put_nowait((number, piece))

        def emit(piece: Piece) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(take, piece)

        try:
            async with service.turns.turn(self._caller):
                await service.generate(service.engine.generation(order), emit)
        except Exception as exc:
            self._events.put_nowait(exc)
        finally:
            service.count(self._caller, "answer", num_tokens)


class Service:
    """All requests of one model; used in one event loop.

    Args:
        on_tokens: told how many tokens whose request has taken.
    """

    def __init__(
        self, engine: Engine, config: ServiceConfig, on_tokens: Callable[[str, int], None] = lambda caller, count: None
    ) -> None:
        self.engine = engine
        self.turns = Turns(config.max_running, config.max_waiting)
        self.metrics = Metrics(self.turns, lambda: len(self._runs))
        self.draining = False
        self._on_tokens = on_tokens
        self._pool = ThreadPoolExecutor(config.max_running, thread_name_prefix="swarm-api")
        self._runs: set[Run] = set()
        self._ending: set[asyncio.Task[None]] = set()
        """Choices whose request is over; nobody else holds them."""
        self._idle = asyncio.Event()
        """Set when nothing is under way any more, while draining."""

    def count(self, caller: str, kind: str, num_tokens: int) -> None:
        """Note tokens of a caller's prompt or answer."""
        self.metrics.tokens.labels(kind).inc(num_tokens)
        self._on_tokens(caller, num_tokens)

    @asynccontextmanager
    async def run(
        self, caller: str, orders: Sequence[Order], num_prompt_tokens: int, receive: Receive
    ) -> AsyncIterator[Run]:
        """Begin a request; it ends with the body, or when the client leaves.

        Args:
            receive: tells, after the body, when the client has left.
        Raises: ApiError: there are too many.
        """
        if self.draining:
            raise shutting_down()
        self.turns.check_room(len(orders))
        self.count(caller, "prompt", num_prompt_tokens)
        run = Run(self, caller, orders)
        self._runs.add(run)
        watch = asyncio.create_task(self._watch(run, receive))
        try:
            yield run
        finally:
            watch.cancel()
            run.cancel()
            self._runs.discard(run)
            self._check_idle()
            for task in run.tasks:
                if not task.done():
                    self._ending.add(task)
                    task.add_done_callback(self._ending.discard)

    async def _watch(self, run: Run, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.metrics.cancelled.inc()
        run.cancel()

    async def generate(self, generation: Generation, emit: Callable[[Piece], None]) -> None:
        """Run a generation in a thread. Cancelled, it waits until the thread is free again."""
        work = asyncio.get_running_loop().run_in_executor(self._pool, generation.run, emit)
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            generation.cancel()
            await asyncio.wait([work])
            if not work.cancelled() and (error := work.exception()) is not None:
                logger.debug("a generation that was cancelled ended with %r", error)
            raise

    async def call(self, caller: str, function: Callable[[], T]) -> T:
        """Run a call of the model without a session in a thread, in the caller's turn.

        Raises: ApiError: there are too many; what became of it.
        """
        self.turns.check_room(1)
        try:
            async with self.turns.turn(caller):
                return await asyncio.get_running_loop().run_in_executor(self._pool, function)
        except Exception as exc:
            if (error := translated(exc)) is None:
                raise
            raise error from exc

    async def drain(self, timeout_s: float) -> None:
        """Take no more requests, let those under way finish for so long, then end them with an error."""
        self.draining = True
        self._check_idle()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        for run in self._runs:
            run.cancel(shutting_down())
        tasks = [*self._ending, *(task for run in self._runs for task in run.tasks)]
        if tasks:
            await asyncio.wait(tasks, timeout=5.0)

    def _check_idle(self) -> None:
        if self.draining and not self._runs:
            self._idle.set()

    def close(self) -> None:
        """Free the threads, which have nothing to do any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
