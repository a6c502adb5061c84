"""Two ways to one result, of which the second is only tried when the first takes long."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from swarm.errors import SwarmError

from .network import cancel_and_wait

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """How a race ended."""

    result: T
    is_second: bool
    """Whether the second one gave it."""
    left: Sequence[asyncio.Task[T]]
    """Who still runs; for the caller to end."""


async def race(
    first: Coroutine[Any, Any, T],
    second: Callable[[], Coroutine[Any, Any, T]],
    after_s: float | None,
    on_failure: Callable[[SwarmError], Awaitable[None]],
) -> Outcome[T]:
    """Wait for `first`, and from `after_s` on (None: never) for `second` as well; the first result counts.

    Args:
        on_failure: told why one failed where the other gives the result, or fails later.
    Raises: the error of the one that failed first, where both do; whatever is no SwarmError, at once.
    """
    one = asyncio.create_task(first)
    running = {one}
    failures: list[SwarmError] = []
    try:
        if not (await asyncio.wait(running, timeout=after_s))[0]:
            running.add(asyncio.create_task(second()))
        while running:
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            results = []
            for task in done:
                if (error := task.exception()) is None:
                    results.append(task)
                elif isinstance(error, SwarmError):
                    failures.append(error)
                else:
                    raise error
            if results:
                left, running = [*running, *results[1:]], set()
                for failure in failures:
                    await on_failure(failure)
                return Outcome(results[0].result(), results[0] is not one, left)
        for failure in failures[1:]:
            await on_failure(failure)
        raise failures[0]
    finally:
        await cancel_and_wait(list(running))
