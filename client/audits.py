"""What to audit and what to make of it: pure decisions, see docs/security.md for where the numbers come from.

An audit feeds a session's record to other servers and compares what both have committed to at the ends of every hop.
The states that enter the first hop are the client's own; so the first hop that was entered by the right states and left
by wrong ones is where somebody lies.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from torch import Tensor

from swarm.announcement import Announcement
from swarm.commitments import relative_error

from .routing import Hop

# H hops, S sides: what entered, what left; X tokens of all sequences, K sums of a sketch, D hidden

LEAST_TOKENS = 8
"""An audit is about so many tokens at least: of fewer, the mean error says little."""

FLOAT_TOLERANCE = {"float32": 0.01, "float16": 0.03, "bfloat16": 0.03}
"""Mean relative error that honest servers of one precision stay below, whatever the batch, the kernel and the parts."""

MIXED_TOLERANCE = 0.10
"""The same for servers of several: float32, float16, bfloat16, and weights in 8 bits."""

COARSE_TOLERANCE = 0.75
"""The same where one of them has weights in fewer bits, and the other one not the same: only gross lies are seen."""

FINE_QUANTIZATIONS = (None, "int8")

BLOCKS_AT_THAT = 8
"""Errors of longer spans add up: as the root of their length."""

GROWTH = 2.0
"""So many times what has entered a hop with an error leaves it, at most."""

SINGLE_FACTOR = 5.0
"""What the error of a single token may be, of the tolerated mean."""


CLEARLY = 3.0
"""One of three is false where it is so many times farther from both others than they are from each other."""


Precision = tuple[str, str | None]
"""dtype, and how the weights are quantized."""


class Finding(Enum):
    """What a comparison says of one hop."""

    RIGHT = auto()
    WRONG = auto()
    """Entered by the right states, left by others."""
    UNCLEAR = auto()
    """What left the hop before it was right, what entered it was not: one of the two does not tell the truth."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Where two accounts of the same tokens part."""

    finding: Finding
    hop: int = 0
    """Index of the hop that this is about."""
    error: float = 0.0
    """Relative error of what left it; of what entered it, where that is unclear."""


def tolerance(audited: Announcement, auditor: Announcement, num_blocks: int, *, exact_wire: bool = True) -> float:
    """The mean relative error that two honest servers stay below over a span.

    Args:
        exact_wire: whether hidden states travel as they are.
    """
    return tolerance_of(precision_of(audited), precision_of(auditor), num_blocks, exact_wire=exact_wire)


def tolerance_of(audited: Precision, auditor: Precision, num_blocks: int, *, exact_wire: bool = True) -> float:
    """The same, by their precisions."""
    lengthened = max(1.0, math.sqrt(num_blocks / BLOCKS_AT_THAT))
    (dtype, quantization), (_, other) = audited, auditor
    if audited == auditor and exact_wire:
        return FLOAT_TOLERANCE[dtype] * lengthened
    coarse = {quantization, other}.difference(FINE_QUANTIZATIONS)
    return (COARSE_TOLERANCE if coarse and quantization != other else MIXED_TOLERANCE) * lengthened


def precision_of(server: Announcement) -> Precision:
    """What two servers must have in common for their results to be the same but for the order of sums."""
    return server.dtype, server.quantization


def compare(committed_HSXK: Tensor, recomputed_HSXK: Tensor, tolerances: Sequence[float | None]) -> Verdict:
    """Find the first hop where somebody lies.

    Args:
        tolerances: of each hop; None: nobody else has recomputed it, so nothing is said about it.
    """
    errors_HSX = relative_error(committed_HSXK, recomputed_HSXK)
    left_before, limit_before = 0.0, 0.0
    for index, (errors_SX, tolerated) in enumerate(zip(errors_HSX, tolerances, strict=True)):
        entered, left = map(size_of, errors_SX)
        entered = entered if index else 0.0
        is_between = index > 0 and tolerated is not None and tolerances[index - 1] is not None
        if is_between and entered > max(GROWTH * left_before, limit_before):
            return Verdict(Finding.UNCLEAR, index, entered)
        limit = (tolerated or 0.0) + GROWTH * entered
        if tolerated is not None and left > limit:
            return Verdict(Finding.WRONG, index, left)
        left_before, limit_before = left, limit
    return Verdict(Finding.RIGHT)


def size_of(errors_X: Tensor) -> float:
    """How large errors are: their mean, or what the largest one alone counts for."""
    return max(float(errors_X.mean()), float(errors_X.max()) / SINGLE_FACTOR)


def settle(errors: tuple[float, float, float]) -> int | None:
    """Of three accounts of the same tokens that do not agree, return which one is false; None: that is not clear.

    Args:
        errors: between the second and the third, the first and the third, the first and the second.
    """
    closest = min(range(3), key=errors.__getitem__)
    others = [error for index, error in enumerate(errors) if index != closest]
    return closest if min(others) > CLEARLY * errors[closest] else None


def choose_auditor(servers: Collection[Announcement], hop: Hop, rng: random.Random) -> Announcement | None:
    """Choose by chance who recomputes a hop: elsewhere if possible, then of the same precision; None: there is nobody.

    Args:
        servers: those that may be used for some of the hop's blocks.
    """
    able = [each for each in servers if each.blocks.covers(hop.blocks)]
    if not able:
        return None
    here = networks_of(hop.server)

    def suits(server: Announcement) -> tuple[bool, bool]:
        return not (here & networks_of(server)), precision_of(server) == precision_of(hop.server)

    best = max(map(suits, able))
    return rng.choice(sorted((each for each in able if suits(each) == best), key=lambda each: each.peer_id))


def networks_of(server: Announcement) -> set[str]:
    """Where a server can be dialled, without the last part of the address: who shares that may have one operator."""
    hosts = [target.rpartition(":")[0].strip("[]") for target in server.direct]
    return {host.rpartition("." if "." in host else ":")[0] for host in hosts}


class Pace:
    """When to audit: by chance, and as often as a share of the time that steps take allows.

    Args:
        fraction: that share, and the chance that a step is one after which an audit is due.
    """

    def __init__(self, fraction: float, rng: random.Random) -> None:
        self._fraction = fraction
        self._rng = rng
        self._credit_s = 0.0
        self.num_audits = 0
        """Of sessions and of single calls, so far."""
        self._wait_tokens = self._drawn()

    def stepped(self, seconds: float) -> None:
        """Note how long a step has taken."""
        self._credit_s += self._fraction * seconds

    def is_due(self, num_tokens: int) -> bool:
        """Whether to audit a session of which so many tokens were not audited yet."""
        if num_tokens < max(LEAST_TOKENS, self._wait_tokens):
            return False
        return self._credit_s >= 0

    def took(self, seconds: float) -> None:
        """Note how long an audit has taken; until steps have paid for it there is no other one."""
        self._credit_s -= seconds
        self.num_audits += 1
        self._wait_tokens = self._drawn()

    def is_drawn(self) -> bool:
        """Whether a call that can be audited alone is to be."""
        drawn = self._rng.random() < self._fraction
        self.num_audits += drawn
        return drawn

    def _drawn(self) -> float:
        return self._rng.expovariate(self._fraction) if self._fraction else math.inf
