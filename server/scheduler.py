"""What the engine runs next: a pure function of what waits, without clock, model or network.

An iteration is one packed pass through the blocks. It carries every waiting decode step and as many prefill tokens
as the decoding sessions can bear; training runs in what is left of the time, and yields between submodules.

A pass costs about the same whether it carries one decode step or eight. So steps are *held* for others that are
expected soon, where the time is less than what a shared pass saves; otherwise sessions that a chance has set apart
would follow one another for ever, each in a pass of its own.
"""

from __future__ import annotations

import enum
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .timing import CostModel, Expected

RING_SAVING = 0.1
"""Where servers share a machine, the first one gathers its sessions if a shared pass saves this share of a pass."""

RING_PASSES = 4
"""Steps that come back within so many passes are taken to be with other servers on this machine meanwhile."""


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
    """Most tokens in an iteration. The oldest decode step, and a token per row of the first prefill, go in any case."""
    prefill_slowdown: float = 1.6
    """How many times as long an iteration with prefill may take as its decode steps alone."""
    max_prefill_wait_s: float = 2.0
    """Prefills run shortest first; those that have waited so long go before the others, oldest first."""
    max_training_wait_s: float = 1.0
    """Training runs when nothing else does; having waited so long, it gets `training_share` of the time."""
    training_share: float = 0.2
    """Share of the time that running training keeps while other work waits."""
    training_tokens: int = 2048
    """Tokens in one slice of training while nobody decodes."""
    training_tokens_while_decoding: int = 128
    """Tokens in one slice of training while sessions decode: they wait for one submodule's pass over them."""
    hold_share: float = 1.0
    """Decode steps are held for others for at most this share of what it saves to run them together: waiting costs once
    what is saved in every round from then on."""
    ring_share: float = 0.75
    """The same for steps that begin a round through servers on one machine, as a share of the round: more than half, so
    that of two groups that go round, one will wait for the other."""
    gather_share: float = 0.05
    """While steps arrive, the next one is waited for at least so long, as a share of what running together saves:
    the outputs of one pass reach the next server one message after the other."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.training_tokens < 1 or self.training_tokens_while_decoding < 1:
            raise ValueError("an iteration and a slice of training have at least one token")
        if self.prefill_slowdown < 1:
            raise ValueError(f"prefill_slowdown must be at least 1, got {self.prefill_slowdown}")
        if not 0 < self.training_share < 1:
            raise ValueError(f"training_share must lie between 0 and 1, got {self.training_share}")


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
    begins_round: bool = False
    """Of a decode step: it came from the client, not from another server."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that `compose` looks at."""

    now_s: float
    waiting: Sequence[Waiting]
    """At most one step per session; no training while a slice of training is being interrupted."""
    expected: Sequence[Expected] = ()
    """Steps of sessions that have none waiting or running (ReturnTimes.expected)."""
    free_since_s: float = 0.0
    """When the last iteration ended: holding begins then."""
    shares_machine: bool = False
    """Other servers of these sessions compute on the same machine. There, sessions in different passes slow one another
    down wherever they are: it pays to wait longer for one another, and a gap between two steps is not free time."""


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
    """Later than now: compose again when work arrives, at this time at the latest."""


def compose(snapshot: Snapshot, costs: CostModel, config: SchedulerConfig) -> Plan:
    """Return what to run now."""
    decodes = sorted(_of_kind(Kind.DECODE, snapshot), key=lambda work: work.number)
    prefills = sorted(_of_kind(Kind.PREFILL, snapshot), key=lambda work: _prefill_rank(work, snapshot.now_s, config))
    training = sorted(_of_kind(Kind.TRAINING, snapshot), key=lambda work: work.number)
    until_s = None
    if decodes:
        until_s = _hold_until_s(decodes, snapshot, costs, config)
    elif prefills:
        until_s = _gap_until_s(prefills[0], snapshot, costs, config)
    slices = _fill(decodes, prefills, snapshot, costs, config) if until_s is None else ()
    if training and (not slices or snapshot.now_s - training[0].arrived_s >= config.max_training_wait_s):
        return Plan(training=training[0].number)
    return Plan(slices=slices, hold_until_s=until_s)


def may_interrupt(training_s: float, other_s: float, config: SchedulerConfig) -> bool:
    """Return whether running training may stand back for other work; asked before each of its submodules.

    Args:
        training_s, other_s: time spent on it, and on iterations that interrupted it, since it began.
    """
    return training_s >= config.training_share * (training_s + other_s)


def training_rows(num_rows: int, length: int, decoding: bool, config: SchedulerConfig) -> int:
    """Return how many of a training batch's rows to run as the next slice.

    Args:
        decoding: whether sessions decode here at present (some step waits or is expected).
    """
    num_tokens = config.training_tokens_while_decoding if decoding else config.training_tokens
    return min(num_rows, max(1, num_tokens // length))


def _of_kind(kind: Kind, snapshot: Snapshot) -> list[Waiting]:
    return [work for work in snapshot.waiting if work.kind is kind]


def _prefill_rank(work: Waiting, now_s: float, config: SchedulerConfig) -> tuple[bool, int, int]:
    late = now_s - work.arrived_s >= config.max_prefill_wait_s
    return (not late, 0 if late else work.num_rows * work.length, work.number)


def _num_rows(work: Sequence[Waiting | Expected]) -> int:
    return sum(each.num_rows for each in work)


def _coming(snapshot: Snapshot) -> list[Expected]:
    """The expected steps that are not overdue, by the time when they will be."""
    coming = [step for step in snapshot.expected if step.until_s > snapshot.now_s]
    return sorted(coming, key=lambda step: step.until_s)


def _hold_until_s(
    decodes: Sequence[Waiting], snapshot: Snapshot, costs: CostModel, config: SchedulerConfig
) -> float | None:
    """Return until when to hold the waiting decode steps for others; None: run them.

    Two groups of steps that run together from now on save one pass in each round. They pay for it once with the time
    that the one waits for the other; and in each round, if their return times differ. Both must be less than the
    saving. Where the time of a pass grows with every token there is no saving, and nothing is held.
    """
    num_rows = _num_rows(decodes)
    begun_s = max(decodes[0].arrived_s, snapshot.free_since_s)
    known_s = [work.return_s for work in decodes if work.return_s is not None]
    usual_s = statistics.median_low(known_s) if known_s else None
    pass_s = costs.iteration_s(num_rows)
    begins_ring = snapshot.shares_machine and any(work.begins_round for work in decodes)
    saving_s = costs.saving_s(num_rows, _num_rows(snapshot.expected))
    latest_s = max(work.arrived_s for work in decodes)
    until_s = min(latest_s + config.gather_share * saving_s, begun_s + config.hold_share * saving_s)
    others = 0
    for step in _coming(snapshot):
        alone_s = costs.saving_s(num_rows, step.num_rows)
        if usual_s is not None and abs(step.return_s - usual_s) > alone_s and not begins_ring:
            continue
        others += step.num_rows
        saving_s = costs.saving_s(num_rows, others)
        if num_rows + others > config.max_tokens:
            break
        if begins_ring and usual_s is not None and saving_s > RING_SAVING * pass_s:
            latest_s = begun_s + config.ring_share * (usual_s + pass_s)
            if step.at_s <= latest_s:
                until_s = max(until_s, min(step.until_s, latest_s))
        elif step.until_s <= begun_s + config.hold_share * saving_s:
            until_s = max(until_s, step.until_s)
    return until_s if until_s > snapshot.now_s else None


def _gap_until_s(prefill: Waiting, snapshot: Snapshot, costs: CostModel, config: SchedulerConfig) -> float | None:
    """Return until when to hold prefills for a decode step that would come while they run; None: run them."""
    coming = _coming(snapshot)
    if not coming or _gap_tokens(snapshot, costs, config) >= prefill.num_rows:
        return None
    return min(coming, key=lambda step: step.at_s).until_s


def _gap_tokens(snapshot: Snapshot, costs: CostModel, config: SchedulerConfig) -> int:
    """Return how many prefill tokens an iteration without decode steps may have, so that it ends before any come."""
    if not snapshot.expected:
        return config.max_tokens
    pass_s = costs.iteration_s(_num_rows(snapshot.expected))
    gap_s = min((step.at_s - snapshot.now_s for step in _coming(snapshot)), default=math.inf)
    if snapshot.shares_machine and gap_s < RING_PASSES * pass_s:
        return 0
    return costs.tokens_within(max(0.0, min(config.prefill_slowdown * pass_s, gap_s)))


def _fill(
    decodes: Sequence[Waiting],
    prefills: Sequence[Waiting],
    snapshot: Snapshot,
    costs: CostModel,
    config: SchedulerConfig,
) -> tuple[Slice, ...]:
    """Return the slices of one iteration: decode steps, oldest first, then prefill tokens."""
    slices: list[Slice] = []
    num_rows = 0
    most = config.max_tokens - (prefills[0].num_rows if prefills else 0)
    for work in decodes:
        if not slices or num_rows + work.num_rows <= most:
            slices.append(Slice(work.number, 1))
            num_rows += work.num_rows
    if num_rows:
        tokens = costs.tokens_within(config.prefill_slowdown * costs.iteration_s(num_rows)) - num_rows
    else:
        tokens = _gap_tokens(snapshot, costs, config)
    tokens = min(tokens, config.max_tokens - num_rows)
    for work in prefills:
        length = min(work.length, max(tokens // work.num_rows, int(work is prefills[0])))
        if length > 0:
            slices.append(Slice(work.number, length))
            tokens -= length * work.num_rows
    return tuple(slices)
