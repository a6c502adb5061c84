"""How much one caller may have of a server, and all together: decisions, without network or clock.

What there can be many of at a time is counted (`Quotas.begin`); what passes by is made to wait (`Quotas.wait_s`). Who
goes on asking although it was refused is shut out for a while.
"""

from __future__ import annotations

import collections
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from swarm.errors import BadRequest
from swarm.throttle import Throttle

if TYPE_CHECKING:  # the command line reads the defaults, and nothing more
    from .callers import Caller

RATE_BURST_S = 2.0
"""As many messages and bytes as take so long pass at once after a pause."""
MAX_DELAY_S = 2.0
"""A new call that had to wait longer is refused."""
RETRY_AFTER_S = 1.0
"""When to ask again where nothing says when there will be room."""
REFUSALS_PER_S, REFUSALS_BURST = 5.0, 200
"""Who was refused more often than this does not do what it is told."""
SHUT_OUT_S = 30.0
"""How long such a caller's connections are closed."""
LOG_EVERY_S = 60.0
"""One line about a caller in so long."""
MAX_CALLERS = 4096
"""Callers that are remembered; those with something under way always are."""


class What(enum.StrEnum):
    """What is limited; the names are those of the metrics."""

    CALLS = "calls"
    """Of any kind, under way."""
    PUSHES = "pushes"
    """Streams of other servers that have not said yet which session they feed."""
    SESSIONS = "sessions"
    BATCHES = "batches"
    """Forward and Backward, while they wait, are read, computed or sent."""
    MESSAGES = "messages"
    BYTES = "bytes"
    CONNECTIONS = "connections"
    SHUT_OUT = "shut_out"
    """Calls of those who were refused too often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsConfig:
    """How much one caller may have at a time, and all together. This machine itself is in the latter only."""

    max_calls: int = 2048
    """Calls under way."""
    max_calls_per_caller: int = 256
    max_sessions: int = 512
    """Open sessions, and those that wait to be opened."""
    max_sessions_per_caller: int = 64
    max_batches: int = 128
    """Forward and Backward calls under way."""
    max_batches_per_caller: int = 16
    max_connections: int = 1024
    """TCP connections to the gRPC port."""
    max_connections_per_caller: int = 64
    messages_per_s: float = 1000.0
    """Messages of one caller: calls, steps, and parts of tensors."""
    bytes_per_s: float = 50e6
    """Bytes of these."""
    message_bytes: int | None = None
    """Room for what arrives, waits, or is sent: tensors of steps and batches; None: see `room_bytes`."""
    room_share: float = 0.5
    """Share of that room that one caller may take."""
    cache_share: float = 0.5
    """Share of the cache that one caller may keep while others wait for theirs."""
    work_share: float = 0.15
    """Share of the computing time that one caller may take from others who are active at the same time."""
    loopback_is_caller: bool = False
    """Whether loopback addresses are callers like others; else they are this machine itself."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, bool) or value is None:
                continue
            if value <= 0:
                raise BadRequest(f"{name} must be positive, got {value}")
            if name.endswith("_share") and value > 1:
                raise BadRequest(f"{name} must be at most 1, got {value}")

    def of_all(self, what: What) -> int:
        """How many there may be at a time."""
        return {
            What.CALLS: self.max_calls,
            What.PUSHES: self.max_calls,
            What.SESSIONS: self.max_sessions,
            What.BATCHES: self.max_batches,
        }[what]

    def of_caller(self, what: What, caller: Caller) -> int:
        """How many one caller may have at a time."""
        if caller.is_own:
            return self.of_all(what)
        one = {
            What.CALLS: self.max_calls_per_caller,
            What.PUSHES: self.max_calls_per_caller,
            What.SESSIONS: self.max_sessions_per_caller,
            What.BATCHES: self.max_batches_per_caller,
        }[what]
        return min(one * caller.shares, self.of_all(what))


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why something is not let in."""

    what: What
    reason: str
    retry_after_s: float = RETRY_AFTER_S


@dataclass(frozen=True, slots=True)
class QuotaStatistics:
    num_callers: int
    """Those who have something under way."""
    under_way: Mapping[What, int]
    refused: Mapping[What, int]
    """How often, since the start."""
    waited_s: Mapping[What, float]
    """For how long messages had to wait, all together."""


@dataclass(slots=True, eq=False)
class _Usage:
    """What one caller has, and has had lately."""

    messages: Throttle
    bytes: Throttle
    refusals: Throttle
    under_way: collections.Counter[What] = field(default_factory=collections.Counter)
    shut_until_s: float = float("-inf")
    logged_at_s: float = float("-inf")


class Quotas:
    """Counts what callers have, and decides what else they may."""

    def __init__(self, config: LimitsConfig) -> None:
        self.config = config
        self._usages: collections.OrderedDict[str, _Usage] = collections.OrderedDict()
        self._under_way: collections.Counter[What] = collections.Counter()
        self._refused: collections.Counter[What] = collections.Counter()
        self._waited_s: collections.defaultdict[What, float] = collections.defaultdict(float)

    def statistics(self) -> QuotaStatistics:
        """Count everything."""
        num_callers = sum(bool(usage.under_way.total()) for usage in self._usages.values())
        return QuotaStatistics(num_callers, dict(self._under_way), dict(self._refused), dict(self._waited_s))

    def begin(self, caller: Caller, what: What, now_s: float) -> Refusal | None:
        """Let a caller have one more of something, until `end`; or say why not."""
        usage = self._usage(caller)
        most, most_of_all = self.config.of_caller(what, caller), self.config.of_all(what)
        if usage.under_way[what] >= most:
            return self.refused(caller, Refusal(what, f"you have {most} {what} here already"), now_s)
        if self._under_way[what] >= most_of_all:
            return self.refused(caller, Refusal(what, f"this server has {most_of_all} {what} already"), now_s)
        usage.under_way[what] += 1
        self._under_way[what] += 1
        return None

    def end(self, caller: Caller, what: What) -> None:
        """Take back what `begin` has let in."""
        self._usages[caller.key].under_way[what] -= 1
        self._under_way[what] -= 1

    def wait_s(self, caller: Caller, num_bytes: int, now_s: float) -> float:
        """Note a message of a caller; return how long it has to wait."""
        if caller.is_own:
            return 0.0
        usage = self._usage(caller)
        waits_s = {
            What.MESSAGES: usage.messages.wait_s(1 / caller.shares, now_s),
            What.BYTES: usage.bytes.wait_s(num_bytes / caller.shares, now_s),
        }
        what = max(waits_s, key=waits_s.__getitem__)
        self._waited_s[what] += waits_s[what]
        return waits_s[what]

    def call(self, caller: Caller, now_s: float) -> Refusal | None:
        """Whether a new call is looked at, or why not: its caller was shut out, or sends more than it may."""
        if caller.is_own:
            return None
        usage = self._usage(caller)
        if now_s < usage.shut_until_s:
            self._refused[What.SHUT_OUT] += 1
            return Refusal(What.SHUT_OUT, "you have asked too often", usage.shut_until_s - now_s)
        owed_s = max(usage.messages.owed_s(now_s), usage.bytes.owed_s(now_s))
        if owed_s > MAX_DELAY_S:
            return self.refused(caller, Refusal(What.MESSAGES, "you send more than this server takes", owed_s), now_s)
        return None

    def refused(self, caller: Caller, refusal: Refusal, now_s: float) -> Refusal:
        """Count a refusal; who is refused again and again is shut out."""
        self._refused[refusal.what] += 1
        usage = self._usage(caller)
        # Those behind a relay do not suffer for one another more than they must.
        if usage.refusals.wait_s(1, now_s) > 0 and not caller.is_own and caller.shares == 1:
            usage.shut_until_s = now_s + SHUT_OUT_S
            usage.refusals.forgive()
        return refusal

    def is_shut_out(self, caller: Caller, now_s: float) -> bool:
        """Whether a caller's connections are to be closed."""
        usage = self._usages.get(caller.key)
        return usage is not None and now_s < usage.shut_until_s

    def should_log(self, caller: Caller, now_s: float) -> bool:
        """Whether it is time for a line about a caller; it counts as written then."""
        usage = self._usage(caller)
        if now_s - usage.logged_at_s < LOG_EVERY_S:
            return False
        usage.logged_at_s = now_s
        return True

    def _usage(self, caller: Caller) -> _Usage:
        if caller.key in self._usages:
            self._usages.move_to_end(caller.key)
            return self._usages[caller.key]
        usage = self._usages[caller.key] = _Usage(
            Throttle(self.config.messages_per_s, RATE_BURST_S),
            Throttle(self.config.bytes_per_s, RATE_BURST_S),
            Throttle(REFUSALS_PER_S, REFUSALS_BURST / REFUSALS_PER_S),
        )
        if len(self._usages) > MAX_CALLERS:
            idle = next((key for key, each in self._usages.items() if not each.under_way.total()), caller.key)
            if idle != caller.key:
                del self._usages[idle]
        return usage


@dataclass(frozen=True, slots=True)
class Connected:
    """A TCP connection to the gRPC port."""

    caller: Caller
    number: int
    """Grows with the time at which it was first seen."""


def surplus(connections: Sequence[Connected], config: LimitsConfig) -> list[Connected]:
    """Which connections to close: of a caller with too many the newest ones, and if all are nearly too many, the newest
    of whoever has most, so that there is always room for others.
    """
    kept: collections.defaultdict[Caller, list[Connected]] = collections.defaultdict(list)
    closed: list[Connected] = []
    for each in sorted(connections, key=lambda each: each.number):
        most = config.max_connections if each.caller.is_own else config.max_connections_per_caller * each.caller.shares
        (closed if len(kept[each.caller]) >= most else kept[each.caller]).append(each)
    for _ in range(sum(map(len, kept.values())) - config.max_connections * 9 // 10):
        closed.append(max(kept.values(), key=len).pop())
    return closed
