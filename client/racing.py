"""Several ways to one result, of which each is only tried when those before it take long."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from swarm.errors import SwarmError

from .tasks import cancel_and_wait

T = TypeVar("T")

MOST_AT_ONCE = 3
"""Ways that are tried at the same time."""


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """How a race ended."""

    result: T
    winner: int
    """Which way gave it: 0 is the first."""
    left: Mapping[int, asyncio.Task[T]]
    """Which still run; for the caller to end."""


async def race(
    first: Coroutine[Any, Any, T],
    another: Callable[[int], Coroutine[Any, Any, T]],
    after_s: Callable[[int], float | None],
    on_failure: Callable[[SwarmError], Awaitable[None]],
) -> Outcome[T]:
    """Wait for `first`; while nothing comes, start `another(1)`, `another(2)` and so on. The first result counts.

    Args:
        another: starts the way with this number.
        after_s: how long to wait for the ways so far before the one with this number is started; None: for ever.
        on_failure: told at once why one failed while others still run.
    Raises: the error of the one that fails last, where all that were started do; whatever is no SwarmError, at once.
    """
    running = {asyncio.create_task(first): 0}
    num_started = 1
    try:
        while True:
            wait_s = after_s(num_started) if len(running) < MOST_AT_ONCE else None
            done, _ = await asyncio.wait(running, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                running[asyncio.create_task(another(num_started))] = num_started
                num_started += 1
            errors: dict[asyncio.Task[T], SwarmError] = {}
            for task in done:
                if isinstance(error := task.exception(), SwarmError):
                    errors[task] = error
                elif error is not None:
                    raise error
            if results := done - errors.keys():
                winner = min(results, key=running.__getitem__)
                number = running.pop(winner)
                left = {which: task for task, which in running.items() if task not in errors}
                running = {}
                for failure in errors.values():
                    await on_failure(failure)
                return Outcome(winner.result(), number, left)
            for task, failure in errors.items():
                del running[task]
                if not running:
                    raise failure
                await on_failure(failure)
    finally:
        await cancel_and_wait(list(running))
