"""What the engine runs next: a pure function of what waits, without clock, model or network.

An iteration is one packed pass through the blocks. It carries every waiting decode step and as many prefill tokens
as the decoding sessions can bear; training runs in what is left of the time, and yields between submodules.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from .timing import CostModel, Expected


class Kind(enum.IntEnum):
    """What a piece of work is; smaller goes first."""

    DECODE = 0
    """One token per row; runs whole."""
    PREFILL = 1
    """More tokens per row; may be cut into chunks."""
    TRAINING = 2
    """Forward or Backward; may be cut into slices of rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """How decode, prefill and training share the time."""

    max_tokens: int = 512
    """Most tokens in one iteration, unless a single step has more rows."""
    prefill_slowdown: float = 1.8
    """How many times as long an iteration with prefill may take as its decode steps alone."""
    max_prefill_wait_s: float = 2.0
    """Prefills run shortest first; one that has waited so long goes before the others."""
    max_training_wait_s: float = 1.0
    """Training runs when nothing else does; having waited so long, it gets `training_share` of the time."""
    training_share: float = 0.2
    """Share of the time that a running slice of training keeps while other work waits."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A piece of work in the queue. What is cancelled is simply not in the next snapshot."""

    number: int
    """Unique, in the order of arrival."""
    kind: Kind
    num_rows: int
    length: int
    """Tokens per row that are still to run."""
    arrived_s: float
    return_s: float | None = None
    """Of a decode step: the session's usual return time, if known (ReturnTimes.returned)."""
    starts_round: bool = True
    """Of a decode step: it came from the client, not from another server."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that `compose` looks at."""

    now_s: float
    waiting: Sequence[Waiting]
    expected: Sequence[Expected] = ()


@dataclass(frozen=True, slots=True)
class Slice:
    """`length` further tokens of each row of a piece of work."""

    number: int
    length: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Run `slices` as one iteration; or else begin a slice of `training`; or else wait for new work.

    At most one of the three is set; none: wait for new work without a time limit.
    """

    slices: tuple[Slice, ...] = ()
    training: int | None = None
    """Number of the training work to begin or continue with; it yields where `may_interrupt` allows it."""
    hold_until_s: float | None = None
    """Compose again when work arrives, at this time at the latest."""


def compose(snapshot: Snapshot, costs: CostModel, config: SchedulerConfig) -> Plan:
    """Return what to run now."""
    raise NotImplementedError


def may_interrupt(training_s: float, other_s: float, config: SchedulerConfig) -> bool:
    """Return whether a running slice of training may stand back for other work, asked between two submodules.

    Args:
        training_s, other_s: time spent on the slice, and on iterations that interrupted it, since it began.
    """
    raise NotImplementedError


def training_rows(num_rows: int, length: int, decoding: bool, config: SchedulerConfig) -> int:
    """Return how many of a training batch's rows to run as the next slice.

    Args:
        decoding: whether sessions decode here at present (some step waits or is expected).
    """
    raise NotImplementedError
