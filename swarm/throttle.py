"""A rate that must not be passed for long: a pure function of time, used wherever something is made to wait."""

from __future__ import annotations

BURST_S = 0.25
"""As much as takes so long passes at once after a pause, where nothing else is said."""


class Throttle:
    """Makes what comes wait so that no more than a rate passes.

    Args:
        per_s: bytes, messages or whatever is counted, per second.
        burst_s: as much as takes so long passes at once after a pause.
    """

    def __init__(self, per_s: float, burst_s: float = BURST_S) -> None:
        self._per_s = per_s
        self._burst_s = burst_s
        self._passed_at_s = float("-inf")

    def wait_s(self, amount: float, now_s: float) -> float:
        """Note what comes now; return how long it has to wait."""
        self._passed_at_s = max(self._passed_at_s, now_s - self._burst_s) + amount / self._per_s
        return self.owed_s(now_s)

    def owed_s(self, now_s: float) -> float:
        """How long what has come so far has to wait from now on; 0: the rate was kept."""
        return max(0.0, self._passed_at_s - now_s)

    def forgive(self) -> None:
        """Forget what was owed."""
        self._passed_at_s = float("-inf")
