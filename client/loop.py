"""The client's event loop: one background thread that the synchronous API hands its coroutines to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from swarm.errors import BadRequest

T = TypeVar("T")

CLEAN_UP_TIMEOUT_S = 5.0
"""How long an interrupted call waits until what it had begun is undone."""


class LoopThread:
    """An event loop in a thread of its own; `run` may be called from any other thread, also inside a notebook."""

    def __init__(self, name: str = "swarm-client") -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end and return its result; Ctrl-C cancels it and waits for its clean-up."""
        if self.is_current:
            coroutine.close()
            raise RuntimeError("the synchronous API of a swarm model cannot be called from its own event loop")
        finished = threading.Event()

        async def supervised() -> T:
            try:
                return await coroutine
            finally:
                finished.set()

        if self._loop.is_closed():
            coroutine.close()
            raise BadRequest("the model was closed: load it again")
        future = asyncio.run_coroutine_threadsafe(supervised(), self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            finished.wait(CLEAN_UP_TIMEOUT_S)
            raise

    @property
    def is_current(self) -> bool:
        """Whether the caller runs on this loop."""
        return threading.current_thread() is self._thread

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Start a coroutine without waiting for it; after `close` it is dropped."""
        if self._loop.is_closed():
            coroutine.close()
        else:
            asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    @property
    def closed(self) -> bool:
        return self._loop.is_closed()

    def close(self) -> None:
        """Cancel what still runs and end the thread."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()


async def _cancel_all() -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
