"""The compute thread: everything that touches the model or a cache runs here, one piece at a time.

A piece of work that a person waits for token by token goes before a prefill, a prefill before training work;
among equals, first come first served. One thread needs no locks around the model, and torch uses all cores
inside each operation anyway.
"""

from __future__ import annotations

import asyncio
import enum
import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Priority(enum.IntEnum):
    """Smaller goes first."""

    DECODE = 0
    PREFILL = 1
    TRAINING = 2


@dataclass(order=True, slots=True)
class _Job:
    priority: Priority
    number: int
    work: Callable[[], Any] = field(compare=False)
    future: asyncio.Future[Any] = field(compare=False)
    loop: asyncio.AbstractEventLoop = field(compare=False)


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    queue_length: int
    num_jobs: int
    busy_s: float


class ComputeThread:
    """Runs callables in one thread, in the order of their priority. Use as a context manager."""

    def __init__(self, *, num_threads: int | None = None) -> None:
        self._num_threads = num_threads
        self._jobs: list[_Job] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._closed = False
        self._num_jobs = 0
        self._busy_s = 0.0
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)

    def __enter__(self) -> ComputeThread:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
            abandoned, self._jobs = self._jobs, []
        for job in abandoned:
            job.loop.call_soon_threadsafe(job.future.cancel)
        self._thread.join()

    async def run(self, priority: Priority, work: Callable[[], T]) -> T:
        """Run `work` in the compute thread and return its result; cancelled before its turn, it never runs."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        with self._changed:
            if self._closed:
                raise RuntimeError("the compute thread is closed")
            heapq.heappush(self._jobs, _Job(priority, next(self._numbers), work, future, loop))
            self._changed.notify()
        return await future

    @property
    def closed(self) -> bool:
        """Whether the thread is asked to end; long work looks at it to give up early."""
        return self._closed

    def statistics(self) -> EngineStatistics:
        return EngineStatistics(len(self._jobs), self._num_jobs, self._busy_s)

    def _run(self) -> None:
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        while (job := self._next()) is not None:
            if job.future.cancelled():
                continue
            started = time.perf_counter()
            try:
                result, error = job.work(), None
            except BaseException as exc:  # handed to the waiting task, whichever it is
                result, error = None, exc
            self._busy_s += time.perf_counter() - started
            self._num_jobs += 1
            try:
                job.loop.call_soon_threadsafe(_settle, job.future, result, error)
            except RuntimeError:  # the loop was closed while we computed: nobody waits for the result any more
                logger.debug("a result came after its event loop was closed")
            del job, result, error

    def _next(self) -> _Job | None:
        with self._changed:
            while not self._jobs and not self._closed:
                self._changed.wait()
            return heapq.heappop(self._jobs) if self._jobs and not self._closed else None


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.cancelled():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
