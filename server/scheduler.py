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
    training_tokens: int = 2048
    training_tokens_while_decoding: int = 128
    hold_passes: float = 1.5
    hold_passes_later: float = 0.5
    companion: float = 1.0
    gather: float = 0.05


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
    free_since_s: float = 0.0
    """When the last iteration ended."""
    training_runs: bool = False
    """A slice of training is about to be interrupted: begin no other."""


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
    decodes = sorted((work for work in snapshot.waiting if work.kind is Kind.DECODE), key=lambda work: work.number)
    prefills = _prefills_in_order(snapshot, config)
    training = min((work for work in snapshot.waiting if work.kind is Kind.TRAINING), key=_number, default=None)
    until_s = _hold_until_s(decodes, snapshot, costs, config)
    if until_s is None and prefills and not decodes:
        until_s = _gap_until_s(prefills[0], snapshot, costs, config)
    slices = () if until_s is not None else _fill(decodes, prefills, snapshot, costs, config)
    if training is not None and not snapshot.training_runs:
        if not slices or snapshot.now_s - training.arrived_s >= config.max_training_wait_s:
            return Plan(training=training.number)
    return Plan(slices=slices, hold_until_s=until_s)


def _number(work: Waiting) -> int:
    return work.number


def _prefills_in_order(snapshot: Snapshot, config: SchedulerConfig) -> list[Waiting]:
    """Those that waited too long, oldest first; then the shortest first."""

    def rank(work: Waiting) -> tuple[int, int, int]:
        aged = snapshot.now_s - work.arrived_s >= config.max_prefill_wait_s
        return (not aged, 0 if aged else work.num_rows * work.length, work.number)

    return sorted((work for work in snapshot.waiting if work.kind is Kind.PREFILL), key=rank)


def _hold_until_s(
    decodes: list[Waiting], snapshot: Snapshot, costs: CostModel, config: SchedulerConfig
) -> float | None:
    if not decodes:
        return None
    now_s = snapshot.now_s
    num_rows = sum(work.num_rows for work in decodes)
    known = sorted(work.return_s for work in decodes if work.return_s is not None)
    usual_s = known[len(known) // 2] if known else None
    since_s = max(decodes[0].arrived_s, snapshot.free_since_s)
    passes = config.hold_passes if any(work.starts_round for work in decodes) else config.hold_passes_later
    until_s = None
    others = sum(step.num_rows for step in snapshot.expected)
    if others and config.gather:
        saving_s = costs.saving_s(num_rows, others)
        quiet_s = max(work.arrived_s for work in decodes) + config.gather * saving_s
        if now_s < quiet_s - 1e-6 and quiet_s < since_s + saving_s * 0.5:
            until_s = quiet_s
    for step in sorted(snapshot.expected, key=lambda step: step.until_s):
        if step.until_s <= now_s:
            continue
        saving_s = costs.saving_s(num_rows, step.num_rows)
        if step.until_s > since_s + passes * saving_s:
            break
        if usual_s is not None and abs(step.return_s - usual_s) > saving_s * config.companion:
            continue
        num_rows += step.num_rows
        until_s = max(step.until_s, until_s or 0)
    return until_s


def _gap_until_s(first: Waiting, snapshot: Snapshot, costs: CostModel, config: SchedulerConfig) -> float | None:
    coming = [step for step in snapshot.expected if step.until_s > snapshot.now_s]
    if not coming or _gap_tokens(snapshot, costs, config) >= first.num_rows:
        return None
    return min(coming, key=lambda step: step.at_s).until_s


def _gap_tokens(snapshot: Snapshot, costs: CostModel, config: SchedulerConfig) -> int:
    if not snapshot.expected:
        return config.max_tokens
    limit_s = config.prefill_slowdown * costs.iteration_s(sum(step.num_rows for step in snapshot.expected))
    coming = [step.at_s - snapshot.now_s for step in snapshot.expected if step.until_s > snapshot.now_s]
    return costs.tokens_within(max(0.0, min([limit_s, *coming])))


def _fill(
    decodes: list[Waiting], prefills: list[Waiting], snapshot: Snapshot, costs: CostModel, config: SchedulerConfig
) -> tuple[Slice, ...]:
    slices: list[Slice] = []
    num_rows = 0
    most = config.max_tokens - (prefills[0].num_rows if prefills else 0)
    for work in decodes:
        if not slices or num_rows + work.num_rows <= most:
            slices.append(Slice(work.number, 1))
            num_rows += work.num_rows
    if not prefills:
        return tuple(slices)
    if num_rows:
        budget = costs.tokens_within(config.prefill_slowdown * costs.iteration_s(num_rows)) - num_rows
    else:
        budget = _gap_tokens(snapshot, costs, config)
    budget = min(budget, config.max_tokens - num_rows)
    for at, work in enumerate(prefills):
        length = min(work.length, max(budget // work.num_rows, at == 0))
        if length > 0:
            slices.append(Slice(work.number, length))
            budget -= length * work.num_rows
    return tuple(slices)


def may_interrupt(training_s: float, other_s: float, config: SchedulerConfig) -> bool:
    """Return whether a running slice of training may stand back for other work, asked between two submodules.

    Args:
        training_s, other_s: time spent on the slice, and on iterations that interrupted it, since it began.
    """
    return training_s >= config.training_share * (training_s + other_s)


def training_rows(num_rows: int, length: int, decoding: bool, config: SchedulerConfig) -> int:
    """Return how many of a training batch's rows to run as the next slice.

    Args:
        decoding: whether sessions decode here at present (some step waits or is expected).
    """
    most = config.training_tokens_while_decoding if decoding else config.training_tokens
    return min(num_rows, max(1, most // length))
