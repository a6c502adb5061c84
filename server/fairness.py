"""Which share of the computing time one caller may take from the others: decisions without a model.

What a caller costs the others is how much longer passes take because of it than if it asked for as much as the largest
of them: prefill, training, and decode steps beyond that. Nobody waits who is alone, and no decode step of those that
ask for least.
"""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Callable, Hashable

from swarm.throttle import Throttle

from .callers import Caller

ACTIVE_S = 2.0
"""Who has asked for something within so long is active."""
WORK_BURST_S = 3.0
"""Computing time that a caller may take from others at once after a pause: a prompt comes at full speed."""
LOOK_AGAIN_S = 0.1
"""How often who waits looks whether the others are still active."""
MAX_REMEMBERED = 1024
"""Callers of whom it is known what they have taken."""


class Fairness:
    """What callers cost one another.

    Args:
        share: of the time, that one may take from all others.
        pass_s: how long a pass with so many tokens takes.
    """

    def __init__(self, share: float, pass_s: Callable[[int], float]) -> None:
        self._share = share
        self._pass_s = pass_s
        self._active: collections.OrderedDict[Hashable, tuple[Caller, int, float]] = collections.OrderedDict()
        """Session or caller -> whose it is, its rows in a pass, when it last asked; that of the latest is the last."""
        self._taken: dict[Caller, Throttle] = {}

    def step(self, caller: Caller, session: Hashable, num_rows: int, length: int, now_s: float) -> None:
        """Note a step."""
        self._note(caller, session, num_rows, now_s)
        if caller.is_own or not (others := self._others(caller, now_s)):
            return
        rows_of_others, most_rows = sum(others.values()), max(1, *others.values())
        own = num_rows * length
        if length == 1:  # all its decode steps may be in one pass
            own = sum(rows for whose, rows, _ in self._active.values() if whose == caller)
        extra_s = self._pass_s(rows_of_others + own) - self._pass_s(rows_of_others + min(own, most_rows))
        self._take(caller, extra_s * (num_rows / own if length == 1 else 1.0), now_s)

    def batch(self, caller: Caller, seconds: float, now_s: float) -> None:
        """Note a Forward or Backward that will take so long."""
        self._note(caller, caller, 0, now_s)
        if not caller.is_own and self._others(caller, now_s):
            self._take(caller, seconds, now_s)

    def wait_s(self, caller: Caller, now_s: float) -> float:
        """How long something of this caller has to wait before it is asked again; 0: it may run."""
        taken = self._taken.get(caller)
        if taken is None:
            return 0.0
        if not self._others(caller, now_s):
            del self._taken[caller]
            return 0.0
        return min(taken.owed_s(now_s), LOOK_AGAIN_S)

    async def wait(self, caller: Caller) -> None:
        """Wait as long as `wait_s` says."""
        while True:
            wait_s = self.wait_s(caller, time.monotonic())
            if not wait_s:
                return
            await asyncio.sleep(wait_s)

    def _note(self, caller: Caller, asking: Hashable, num_rows: int, now_s: float) -> None:
        self._active.pop(asking, None)
        self._active[asking] = caller, num_rows, now_s
        while next(iter(self._active.values()))[2] < now_s - ACTIVE_S:
            self._active.popitem(last=False)

    def _others(self, caller: Caller, now_s: float) -> dict[Caller, int]:
        """Rows of the others who are active."""
        rows: collections.Counter[Caller] = collections.Counter()
        for whose, num_rows, at_s in self._active.values():
            if whose != caller and at_s >= now_s - ACTIVE_S:
                rows[whose] += num_rows
        return rows

    def _take(self, caller: Caller, seconds: float, now_s: float) -> None:
        if caller not in self._taken:
            if len(self._taken) >= MAX_REMEMBERED:
                del self._taken[next(iter(self._taken))]
            self._taken[caller] = Throttle(self._share * caller.shares, WORK_BURST_S / self._share)
        self._taken[caller].wait_s(max(0.0, seconds), now_s)
