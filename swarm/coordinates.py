"""Where peers are, so that the round-trip time between any two can be guessed without measuring it.

Network coordinates as in Vivaldi (Dabek, Cox, Kaashoek, Morris: "Vivaldi: A Decentralized Network Coordinate System",
SIGCOMM 2004), two dimensions and a height, which stands for a peer's own access link. Everything is in seconds.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

ADJUSTMENT = 0.25
"""How much of an error one measurement corrects at most (the paper's c_c and c_e)."""

MIN_HEIGHT_S = 1e-5
MAX_S = 0.5
"""No coordinate is further from 0: a round trip through half of the world takes less."""

LEAST_ERROR = 0.1
"""Nobody is believed to know its place better than this."""

Seconds = Annotated[float, Field(ge=-MAX_S, le=MAX_S, allow_inf_nan=False)]
Height = Annotated[float, Field(ge=0, le=MAX_S, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class Coordinates:
    """A peer's place, and how far off distances to it are expected to be."""

    x_s: Seconds = 0.0
    y_s: Seconds = 0.0
    height_s: Height = MIN_HEIGHT_S
    error: Share = 1.0
    """Relative; 1 for a peer that has measured nothing yet."""

    def rtt_s(self, other: Coordinates) -> float:
        """The round-trip time to expect between two peers."""
        return math.hypot(self.x_s - other.x_s, self.y_s - other.y_s) + self.height_s + other.height_s

    def moved(self, other: Coordinates, rtt_s: float, rng: random.Random) -> Coordinates:
        """Our place after one measurement of the round-trip time to another peer.

        Args:
            rng: chooses the direction in which two peers at one place part.
        """
        rtt_s = min(max(rtt_s, MIN_HEIGHT_S), MAX_S)
        expected_s = max(MIN_HEIGHT_S, self.rtt_s(other))
        error, other_error = max(LEAST_ERROR, self.error), max(LEAST_ERROR, other.error)
        weight = error / (error + other_error)
        sample_error = min(1.0, abs(expected_s - rtt_s) / rtt_s)
        error = sample_error * ADJUSTMENT * weight + error * (1 - ADJUSTMENT * weight)
        step = ADJUSTMENT * weight * (rtt_s - expected_s) / expected_s
        dx_s, dy_s = self.x_s - other.x_s, self.y_s - other.y_s
        if dx_s == dy_s == 0:
            angle = rng.uniform(0, 2 * math.pi)
            dx_s, dy_s = math.cos(angle) * MIN_HEIGHT_S, math.sin(angle) * MIN_HEIGHT_S
        height_s = self.height_s + step * (self.height_s + other.height_s)
        x_s, y_s = _inside(self.x_s + step * dx_s), _inside(self.y_s + step * dy_s)
        return Coordinates(x_s, y_s, max(MIN_HEIGHT_S, _inside(height_s)), error)


def _inside(value_s: float) -> float:
    return min(MAX_S, max(-MAX_S, value_s))
