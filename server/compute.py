"""The compute thread: everything that touches the model or a cache runs here, one piece after the other.

One thread needs no locks around the model, and torch uses all cores inside each operation anyway.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable
from typing import TypeVar

import torch

from .cores import keep_apart

T = TypeVar("T")


class ComputeThread:
    """One thread for everything that uses the model, so that nothing around it needs a lock. A context manager.

    Args:
        num_threads: that torch computes with; None: as it likes.
        uses_cores: whether it computes on this machine's cores, each of torch's threads on one of its own.
    """

    def __init__(self, *, num_threads: int | None = None, uses_cores: bool = False) -> None:
        self.closed = False
        """Set when the thread is asked to end; long work looks at it to give up early."""

        def prepare() -> None:
            if num_threads is not None:
                torch.set_num_threads(num_threads)
            if uses_cores:
                keep_apart()

        self._threads = concurrent.futures.ThreadPoolExecutor(1, "compute", prepare)

    def __enter__(self) -> ComputeThread:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.closed = True
        self._threads.shutdown(wait=True, cancel_futures=True)

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work` in the thread and return its result; cancelled before its turn, it never runs."""
        return await asyncio.wrap_future(self.submit(work))

    def submit(self, work: Callable[[], T]) -> concurrent.futures.Future[T]:
        """Run `work` in the thread, after what was submitted before."""
        return self._threads.submit(work)
