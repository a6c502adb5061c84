"""How long steps wait for their pass: what a new one is expected to wait, for clients to choose their servers by."""

from __future__ import annotations

from collections.abc import Callable

from .counters import EngineStatistics

WINDOW_S = 10.0
"""An average is over the steps of so long: one moment's queue says little of the next."""


class StepWaits:
    """What steps have waited lately, read from what the engine has counted.

    Args:
        clock: seconds.
    """

    def __init__(self, statistics: Callable[[], EngineStatistics], clock: Callable[[], float]) -> None:
        self._statistics = statistics
        self._clock = clock
        self._since_s = clock()
        self._num_steps, self._queued_s = self._counted()
        self._mean_s = 0.0

    def expected_s(self) -> float:
        """The average over the steps of this window, or of the last one as long as none has come."""
        num_steps, queued_s = self._counted()
        new = num_steps - self._num_steps
        now_s = (queued_s - self._queued_s) / new if new else self._mean_s
        age_s = self._clock() - self._since_s
        if age_s >= WINDOW_S:
            self._mean_s = now_s if new else 0.0
            self._since_s, self._num_steps, self._queued_s = self._clock(), num_steps, queued_s
            return self._mean_s
        return now_s

    def _counted(self) -> tuple[int, float]:
        steps = self._statistics().step_queue_s
        return steps.count, steps.total
