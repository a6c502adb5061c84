"""A swarm in a discrete-event simulation: real scheduler, pretended time.

Servers carry out the plans of `compose` as the engine does; iterations take the time that a cost function says,
longer where servers share a machine. Clients decode, prefill, train, come and go. Everything is seeded.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from swarm.server.scheduler import (
    Kind,
    Plan,
    SchedulerConfig,
    Slice,
    Snapshot,
    Waiting,
    compose,
    may_interrupt,
    training_rows,
)
from swarm.server.timing import CostModel, ReturnTimes

Cost = Callable[[int], float]


def memory_bound(num_tokens: int) -> float:
    """Reading the weights is what a pass costs."""
    return 0.010 + 0.0002 * num_tokens


def compute_bound(num_tokens: int) -> float:
    """Every token costs; a shared pass saves nothing to speak of."""
    return 0.0001 + 0.004 * num_tokens


class Clock:
    """Runs callbacks in the order of their times."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def at(self, time_s: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._events, (max(time_s, self.now_s), next(self._numbers), call))

    def after(self, delay_s: float, call: Callable[[], None]) -> None:
        self.at(self.now_s + delay_s, call)

    def run_until(self, end_s: float) -> None:
        while self._events and self._events[0][0] <= end_s:
            self.now_s, _, call = heapq.heappop(self._events)
            call()
        self.now_s = end_s


class Machine:
    """Divides its speed among the servers that compute on it at the same time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._left_s: dict[int, float] = {}
        self._done: dict[int, Callable[[], None]] = {}
        self._seen_s = 0.0
        self._epoch = 0
        self._numbers = itertools.count()
        self.busy_s = 0.0
        self.shared = False

    def run(self, work_s: float, done: Callable[[], None]) -> None:
        self._advance()
        number = next(self._numbers)
        self._left_s[number], self._done[number] = work_s, done
        self._plan()

    def _advance(self) -> None:
        passed_s = self._clock.now_s - self._seen_s
        self._seen_s = self._clock.now_s
        for number in self._left_s:
            self._left_s[number] -= passed_s / len(self._left_s)
        self.busy_s += passed_s * bool(self._left_s)

    def _plan(self) -> None:
        self._epoch += 1
        if self._left_s:
            epoch = self._epoch
            number = min(self._left_s, key=lambda number: self._left_s[number])
            self._clock.after(self._left_s[number] * len(self._left_s), lambda: self._finish(epoch, number))

    def _finish(self, epoch: int, number: int) -> None:
        if epoch != self._epoch:
            return
        self._advance()
        done = self._done.pop(number)
        del self._left_s[number]
        self._plan()
        done()


@dataclass(eq=False)
class Work:
    """A step or a training request on its way."""

    kind: Kind
    num_rows: int
    length: int
    session: object = None
    output: Callable[[], None] = lambda: None
    """Called when the whole of it has run here."""
    begins_round: bool = False
    ends_prefill: bool = True
    number: int = 0
    arrived_s: float = 0.0
    return_s: float | None = None
    started_s: float | None = None


class Pages(Protocol):
    """What a server may have of a cache, see simulated_cache.py."""

    def take(self, pieces: list[tuple[Work, int]]) -> set[Work]:
        """Take the pages of so many tokens of each; return those that got theirs."""

    def is_blocked(self, work: Work) -> bool:
        """Whether it found none, and none have come free since."""


@dataclass
class Iteration:
    ended_s: float
    num_decodes: int
    num_prefill_tokens: int


class Server:
    """Carries out the scheduler's plans, one at a time."""

    def __init__(
        self, clock: Clock, machine: Machine, cost: Cost, *, config: SchedulerConfig, seed: int = 0,
        noise: float = 0.02, message_s: float = 0.0003, training_share_of_cost: float = 3.0, boundaries: int = 66,
        seeded: bool = True,
    ) -> None:  # fmt: skip
        self.clock, self.machine, self.cost, self.config = clock, machine, cost, config
        self.costs, self.returns = CostModel(), ReturnTimes()
        if seeded:
            for tokens in (1, 8, 32, 128, 512):
                for _ in range(3):
                    self.costs.observe(tokens, cost(tokens))
        self.random = random.Random(seed)
        self.noise, self.message_s = noise, message_s
        self.training_factor, self.boundaries = training_share_of_cost, boundaries
        self.waiting: dict[int, Work] = {}
        self.iterations: list[Iteration] = []
        self.training_tokens = 0
        self._numbers = itertools.count(1)
        self._busy = False
        self._training: _TrainingSlice | None = None
        self._free_since_s = 0.0
        self._look = 0
        self.cache: Pages | None = None
        """None: there is always room."""

    # -- the queue
    def arrive(self, work: Work) -> None:
        work.number, work.arrived_s = next(self._numbers), self.clock.now_s
        if work.session is not None:
            work.return_s = self.returns.returned(work.session, self.clock.now_s)
        self.waiting[work.number] = work
        if not self._busy:
            self._next()

    def cancel(self, work: Work) -> None:
        self.waiting.pop(work.number, None)

    def snapshot(self) -> Snapshot:
        running = self._training is not None
        waiting = [
            Waiting(w.number, w.kind, w.num_rows, w.length, w.arrived_s, w.return_s, w.begins_round)
            for w in self.waiting.values()
            if not (running and w.kind is Kind.TRAINING) and not (self.cache and self.cache.is_blocked(w))
        ]
        expected = self.returns.expected(self.clock.now_s)
        return Snapshot(self.clock.now_s, waiting, expected, self._free_since_s, self.machine.shared)

    # -- the loop
    def _next(self) -> None:
        self._look += 1
        if self._training is not None:
            self._training.go_on()
            return
        plan = compose(self.snapshot(), self.costs, self.config)
        if plan.training is not None:
            self._begin_training(self.waiting[plan.training])
        elif plan.slices:
            if pieces := self._take(plan):
                self._iterate(pieces)
            else:
                self._next()  # they are blocked now
        elif plan.hold_until_s is not None:
            look = self._look
            self.clock.at(plan.hold_until_s, lambda: self._wake(look))

    def pages_came_free(self) -> None:
        if not self._busy:
            self._next()

    def _take(self, plan: Plan) -> list[tuple[Work, Slice]]:
        """The pieces of a plan for which there are pages."""
        pieces = [(self.waiting[each.number], each) for each in plan.slices]
        if self.cache is None:
            return pieces
        taken = self.cache.take([(work, each.length) for work, each in pieces])
        return [(work, each) for work, each in pieces if work in taken]

    def _wake(self, look: int) -> None:
        if not self._busy and look == self._look:
            self._next()

    def _noisy(self, seconds: float) -> float:
        return seconds * (1 + self.noise * abs(self.random.gauss(0, 1)))

    def _iterate(self, pieces: list[tuple[Work, Slice]], then: Callable[[float], None] | None = None) -> None:
        for work, _ in pieces:
            if work.started_s is None:
                work.started_s = self.clock.now_s
        num_tokens = sum(work.num_rows * s.length for work, s in pieces)
        began_s = self.clock.now_s
        self._busy = True

        def done() -> None:
            self._busy = False
            seconds = self.clock.now_s - began_s
            self.costs.observe(num_tokens, seconds)
            self._free_since_s = self.clock.now_s
            self._outputs(pieces)
            if then is not None:
                then(seconds)
            else:
                self._next()

        self.machine.run(self._noisy(self.cost(num_tokens)), done)

    def _outputs(self, pieces: list[tuple[Work, Slice]]) -> None:
        decodes = [w for w, _ in pieces if w.kind is Kind.DECODE]
        prefill = sum(w.num_rows * s.length for w, s in pieces if w.kind is Kind.PREFILL)
        self.iterations.append(Iteration(self.clock.now_s, len(decodes), prefill))
        sent_s = 0.0
        for work, piece in pieces:
            work.length -= piece.length
            if work.length == 0 and self.waiting.pop(work.number, None) is not None:
                sent_s += self.message_s
                if work.session is not None and (work.kind is Kind.DECODE or work.ends_prefill):
                    self.returns.left(work.session, work.num_rows, self.clock.now_s)
                self.clock.after(sent_s, work.output)

    # -- training
    def _begin_training(self, work: Work) -> None:
        decoding = bool(self.returns.expected(self.clock.now_s)) or any(
            w.kind is Kind.DECODE for w in self.waiting.values()
        )
        if work.started_s is None:
            work.started_s = self.clock.now_s
        rows = training_rows(work.num_rows, work.length, decoding, self.config)
        self._training = _TrainingSlice(self, work, rows)
        self._training.go_on()

    def end_training(self, work: Work, rows: int) -> None:
        self._training = None
        self.training_tokens += rows * work.length
        work.num_rows -= rows
        if work.num_rows == 0 and self.waiting.pop(work.number, None) is not None:
            self.clock.after(self.message_s, work.output)
        self._next()


class _TrainingSlice:
    """Submodule by submodule; other work may come between."""

    def __init__(self, server: Server, work: Work, rows: int) -> None:
        self.server, self.work, self.rows = server, work, rows
        self.left = server.boundaries
        self.part_s = server.training_factor * server.cost(rows * work.length) / server.boundaries
        self.training_s = self.other_s = 0.0

    def go_on(self) -> None:
        server = self.server
        if self.left == 0:
            server.end_training(self.work, self.rows)
            return
        if may_interrupt(self.training_s, self.other_s, server.config):
            plan = compose(server.snapshot(), server.costs, server.config)
            if plan.slices and (pieces := server._take(plan)):
                server._iterate(pieces, self._interrupted)
                return
        began_s = server.clock.now_s
        server._busy = True

        def done() -> None:
            server._busy = False
            self.training_s += server.clock.now_s - began_s
            self.left -= 1
            self.go_on()

        server.machine.run(server._noisy(self.part_s), done)

    def _interrupted(self, seconds: float) -> None:
        self.other_s += seconds
        self.go_on()


@dataclass(eq=False)
class Client:
    """Decodes in a closed loop over a chain of servers; thinks in between."""

    clock: Clock
    servers: list[Server]
    think: Callable[[], float]
    num_rows: int = 1
    prompt: int = 0
    stopped: bool = False
    token_times_s: list[float] = field(default_factory=list)
    first_token_s: float | None = None
    waiting_in: tuple[Server, Work] | None = None
    computes_on: Machine | None = None

    def start(self, at_s: float) -> None:
        self.clock.at(at_s, self._begin)

    def _begin(self) -> None:
        self.began_s = self.clock.now_s
        if self.prompt:
            parts = [512] * (self.prompt // 512) + ([self.prompt % 512] if self.prompt % 512 else [])
            self._parts(parts, 0)
        else:
            self._step(0, Kind.DECODE, 1)

    def _parts(self, parts: list[int], hop: int) -> None:
        # the parts of one step follow one another at each server: the next is read when the last one has run there
        def ran(index: int, hop: int) -> None:
            last = index == len(parts) - 1
            if hop + 1 < len(self.servers):
                queue[hop + 1].append(index)
                if len(queue[hop + 1]) == 1:
                    send(index, hop + 1)
            elif last:
                self._arrived()
            queue[hop].pop(0)
            if queue[hop]:
                send(queue[hop][0], hop)

        def send(index: int, hop: int) -> None:
            work = Work(
                Kind.PREFILL, self.num_rows, parts[index], self, lambda: ran(index, hop),
                ends_prefill=index == len(parts) - 1,
            )  # fmt: skip
            self.servers[hop].arrive(work)

        queue: list[list[int]] = [[] for _ in self.servers]
        queue[0] = list(range(len(parts)))
        send(0, 0)

    def _step(self, hop: int, kind: Kind, length: int) -> None:
        if self.stopped:
            return
        if hop == len(self.servers):
            self._arrived()
            return
        work = Work(kind, self.num_rows, length, self, lambda: self._step(hop + 1, kind, length), hop == 0)
        self.waiting_in = (self.servers[hop], work)
        self.servers[hop].arrive(work)

    def _arrived(self) -> None:
        if self.stopped:
            return
        if self.first_token_s is None:
            self.first_token_s = self.clock.now_s
        self.token_times_s.append(self.clock.now_s)

        def step() -> None:
            self._step(0, Kind.DECODE, 1)

        if self.computes_on is not None:
            self.computes_on.run(self.think(), step)
        else:
            self.clock.after(self.think(), step)

    def stop(self) -> None:
        self.stopped = True
        for server in self.servers:
            server.returns.forget(self)
        if self.waiting_in is not None:
            self.waiting_in[0].cancel(self.waiting_in[1])

    def gaps_s(self, start_s: float = 0.0, end_s: float = float("inf")) -> list[float]:
        times = [t for t in self.token_times_s if start_s <= t <= end_s]
        return [b - a for a, b in itertools.pairwise(times)]


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
