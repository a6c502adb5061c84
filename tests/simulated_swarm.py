"""Servers and clients in pretended time: a discrete-event simulation around the real scheduler.

Servers carry out the plans of `compose` as the engine does. A pass takes as long as a cost function says, longer
where servers share a machine, and a little longer at random. Everything is seeded: the same run gives the same numbers.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from swarm.server import scheduler
from swarm.server.scheduler import Kind, Plan, SchedulerConfig, Slice, Snapshot, Waiting
from swarm.server.timing import CostModel, ReturnTimes

Cost = Callable[[int], float]
"""Seconds that a pass over so many tokens takes on an idle machine."""

MESSAGE_S = 0.0003
"""The outputs of one pass go out so long after one another."""
NOISE = 0.02
"""Standard deviation of a pass's duration; it only ever takes longer."""
PART_TOKENS = 512
"""Longer prompts are sent in parts."""
TRAINING_COST = 3.0
"""A token of training takes so many times as long as one of a pass."""
BOUNDARIES = 66
"""Submodules of the whole model, between which training may be interrupted."""


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
    """Where servers compute. Either they take turns, or they run side by side and divide its speed evenly."""

    def __init__(self, clock: Clock, random: random.Random, *, turns: bool = True) -> None:
        self.num_servers = 0
        self._clock, self._random, self._turns = clock, random, turns
        self._left_s: dict[int, float] = {}
        self._done: dict[int, Callable[[], None]] = {}
        self._asking: list[Callable[[], None]] = []
        self._seen_s = 0.0
        self._epoch = 0
        self._numbers = itertools.count()

    def take_nowait(self, ask_again: Callable[[], None]) -> bool:
        """Whether a server may compute now; if not, it is called when the others have done, in any order."""
        if self._turns and self._left_s:
            self._asking.append(ask_again)
            return False
        return True

    def run(self, work_s: float, done: Callable[[], None]) -> None:
        self._advance()
        number = next(self._numbers)
        self._left_s[number], self._done[number] = work_s, done
        self._await_next()

    def _advance(self) -> None:
        passed_s, self._seen_s = self._clock.now_s - self._seen_s, self._clock.now_s
        for number in self._left_s:
            self._left_s[number] -= passed_s / len(self._left_s)

    def _await_next(self) -> None:
        self._epoch += 1
        if self._left_s:
            epoch, number = self._epoch, min(self._left_s, key=lambda number: self._left_s[number])
            self._clock.after(self._left_s[number] * len(self._left_s), lambda: self._finish(epoch, number))

    def _finish(self, epoch: int, number: int) -> None:
        if epoch != self._epoch:  # somebody has begun or ended since
            return
        self._advance()
        del self._left_s[number]
        done = self._done.pop(number)
        self._await_next()
        done()  # may go on at once, before those that ask again
        asking, self._asking = self._asking, []
        self._random.shuffle(asking)
        for ask_again in asking:
            self._clock.after(0.0, ask_again)


@dataclass(eq=False)
class Work:
    """A step, or a batch of training, on its way through one server."""

    kind: Kind
    num_rows: int
    length: int
    output: Callable[[], None]
    """Called when all of it has run."""
    session: object = None
    begins_round: bool = False
    decodes_next: bool = True
    """A decode step of the session follows, after the client has the output."""
    number: int = 0
    arrived_s: float = 0.0
    began_s: float | None = None
    return_s: float | None = None


@dataclass
class Iteration:
    ended_s: float
    num_decodes: int
    num_prefill_tokens: int
    num_waiting: int
    """Decode steps in the queue when it began."""


class Server:
    """One engine: carries out the scheduler's plans, one after the other."""

    def __init__(self, clock: Clock, machine: Machine, cost: Cost, config: SchedulerConfig, seed: int) -> None:
        self.clock, self.machine, self.cost, self.config = clock, machine, cost, config
        machine.num_servers += 1
        self.costs, self.returns = CostModel(), ReturnTimes()
        self.costs.observe(1, cost(1))  # as measured at the start of a server
        self.costs.observe(1024, cost(1024))
        self.waiting: dict[int, Work] = {}
        self.iterations: list[Iteration] = []
        self.num_training_tokens = 0
        self._random = random.Random(seed)
        self._numbers = itertools.count(1)
        self._busy = False
        self._training: _Training | None = None
        self._free_since_s = 0.0
        self._looks = 0

    def arrive(self, work: Work) -> None:
        work.number, work.arrived_s = next(self._numbers), self.clock.now_s
        if work.session is not None:
            work.return_s = self.returns.returned(work.session, self.clock.now_s)
        self.waiting[work.number] = work
        if not self._busy:
            self.go_on()

    def cancel(self, session: object) -> None:
        """Forget a session and what it has in the queue."""
        self.returns.forget(session)
        self.waiting = {number: work for number, work in self.waiting.items() if work.session is not session}

    def go_on(self) -> None:
        """Look what is to be done next, unless something runs."""
        self._looks += 1
        if self._training is not None:
            self._training.go_on()
            return
        looks = self._looks
        plan = self.compose(training=True)
        runs = bool(plan.slices) or plan.training is not None
        if runs and not self.machine.take_nowait(lambda: self._wake(looks)):
            return
        if plan.training is not None:
            self._train(self.waiting[plan.training])
        elif plan.slices:
            self.iterate(plan, lambda seconds: self.go_on())
        elif plan.hold_until_s is not None:
            self.clock.at(plan.hold_until_s, lambda: self._wake(looks))

    def compose(self, *, training: bool) -> Plan:
        waiting = [
            Waiting(
                each.number, each.kind, each.num_rows, each.length, each.arrived_s, each.return_s, each.begins_round
            )
            for each in self.waiting.values()
            if training or each.kind is not Kind.TRAINING
        ]
        expected, shares = self.returns.expected(self.clock.now_s), self.machine.num_servers > 1
        snapshot = Snapshot(self.clock.now_s, waiting, expected, self._free_since_s, shares)
        plan = scheduler.compose(snapshot, self.costs, self.config)
        assert plan.hold_until_s is None or plan.hold_until_s > self.clock.now_s
        return plan

    def run(self, work_s: float, done: Callable[[float], None]) -> None:
        """Compute for about `work_s`; then call `done` with how long it took."""
        began_s, self._busy = self.clock.now_s, True

        def ended() -> None:
            self._busy = False
            done(self.clock.now_s - began_s)

        self.machine.run(work_s * (1 + NOISE * abs(self._random.gauss(0, 1))), ended)

    def iterate(self, plan: Plan, then: Callable[[float], None]) -> None:
        pieces = [(self.waiting[each.number], each) for each in plan.slices]
        num_tokens = sum(work.num_rows * each.length for work, each in pieces)
        num_waiting = sum(work.kind is Kind.DECODE for work in self.waiting.values())
        for work, _ in pieces:
            work.began_s = self.clock.now_s if work.began_s is None else work.began_s

        def done(seconds: float) -> None:
            self._free_since_s = self.clock.now_s
            self.costs.observe(num_tokens, seconds)
            self._finish(pieces, num_waiting)
            then(seconds)

        self.run(self.cost(num_tokens), done)

    def _finish(self, pieces: Sequence[tuple[Work, Slice]], num_waiting: int) -> None:
        decodes = [work for work, _ in pieces if work.kind is Kind.DECODE]
        prefill = sum(work.num_rows * each.length for work, each in pieces if work.kind is Kind.PREFILL)
        self.iterations.append(Iteration(self.clock.now_s, len(decodes), prefill, num_waiting))
        sent_s = 0.0
        for work, each in pieces:
            work.length -= each.length
            if work.length == 0 and self.waiting.pop(work.number, None) is not None:
                if work.decodes_next:
                    self.returns.left(work.session, work.num_rows, self.clock.now_s)
                sent_s += MESSAGE_S
                self.clock.after(sent_s, work.output)

    def _wake(self, looks: int) -> None:
        if not self._busy and looks == self._looks:
            self.go_on()

    def _train(self, work: Work) -> None:
        work.began_s = self.clock.now_s
        self._training = _Training(self, work)
        self._training.go_on()

    def pause(self, go_on: Callable[[], None]) -> None:
        """Let the other servers of the machine that ask for a turn go first."""

        def ask() -> None:
            if self.machine.take_nowait(ask):
                self._busy = False
                go_on()

        self._busy = True
        self.clock.after(1e-6, ask)

    def finish_training(self, work: Work) -> None:
        self._training = None
        if self.waiting.pop(work.number, None) is not None:
            self.clock.after(MESSAGE_S, work.output)
        self.go_on()


class _Training:
    """A batch of training: slice by slice, submodule by submodule, with other work in between."""

    def __init__(self, server: Server, work: Work) -> None:
        self._server, self._work = server, work
        self._began_s, self._other_s = server.clock.now_s, 0.0
        self._rows_left = work.num_rows
        self._rows = self._boundaries_left = 0

    def go_on(self) -> None:
        """At a boundary: run what waits, if it may; otherwise the next submodule."""
        server = self._server
        if self._work.number not in server.waiting or self._rows_left == self._boundaries_left == 0:
            server.finish_training(self._work)
            return
        training_s = server.clock.now_s - self._began_s - self._other_s
        if scheduler.may_interrupt(training_s, self._other_s, server.config):
            plan = server.compose(training=False)
            if plan.slices:
                server.iterate(plan, self._interrupted)
                return
        self._run_submodule()

    def _run_submodule(self) -> None:
        server, length = self._server, self._work.length
        if self._boundaries_left == 0:
            decoding = bool(server.returns.expected(server.clock.now_s)) or len(server.waiting) > 1
            self._rows = scheduler.training_rows(self._rows_left, length, decoding, server.config)
            self._rows_left -= self._rows
            self._boundaries_left = BOUNDARIES
        self._boundaries_left -= 1
        server.run(TRAINING_COST * server.cost(self._rows * length) / BOUNDARIES, self._ran)

    def _ran(self, seconds: float) -> None:
        if self._boundaries_left == 0:
            self._server.num_training_tokens += self._rows * self._work.length
        self._server.pause(self.go_on)

    def _interrupted(self, seconds: float) -> None:
        self._other_s += seconds
        self._server.pause(self.go_on)


@dataclass(eq=False)
class Client:
    """One session in a closed loop: a prompt perhaps, then token by token through a chain of servers."""

    clock: Clock
    servers: Sequence[Server]
    think: Callable[[], float]
    """How long it takes from an output to the next step."""
    num_rows: int = 1
    prompt_tokens: int = 0
    token_times_s: list[float] = field(default_factory=list)
    stopped: bool = False

    def start(self, at_s: float) -> Client:
        self.clock.at(at_s, self._begin)
        return self

    def stop(self) -> None:
        """Go away; the servers are told."""
        self.stopped = True
        for server in self.servers:
            server.cancel(self)

    @property
    def first_token_s(self) -> float:
        return self.token_times_s[0] if self.token_times_s else float("inf")

    def gaps_s(self, start_s: float, end_s: float = float("inf")) -> list[float]:
        """Times between tokens, both within [start, end]."""
        times = [time_s for time_s in self.token_times_s if start_s <= time_s <= end_s]
        return [later - earlier for earlier, later in itertools.pairwise(times)]

    def _begin(self) -> None:
        if self.prompt_tokens > 0:
            parts = [min(PART_TOKENS, self.prompt_tokens - at) for at in range(0, self.prompt_tokens, PART_TOKENS)]
            self._queues = [list(parts), *([] for _ in self.servers[1:])]
            self._send_part(0)
        else:
            self._step(0)

    def _send_part(self, hop: int) -> None:
        """Each server runs a session's parts one after the other; the next server begins when it has the first one."""
        queue = self._queues[hop]
        last = len(queue) == 1 and not any(self._queues[:hop])
        work = Work(Kind.PREFILL, self.num_rows, queue[0], lambda: self._part_ran(hop), self, decodes_next=last)
        self.servers[hop].arrive(work)

    def _part_ran(self, hop: int) -> None:
        if self.stopped:
            return
        part = self._queues[hop].pop(0)
        if hop + 1 < len(self.servers):
            self._queues[hop + 1].append(part)
            if len(self._queues[hop + 1]) == 1:
                self._send_part(hop + 1)
        elif not any(self._queues):
            self._arrived()
        if self._queues[hop]:
            self._send_part(hop)

    def _step(self, hop: int) -> None:
        if self.stopped:
            return
        if hop == len(self.servers):
            self._arrived()
            return
        work = Work(Kind.DECODE, self.num_rows, 1, lambda: self._step(hop + 1), self, begins_round=hop == 0)
        self.servers[hop].arrive(work)

    def _arrived(self) -> None:
        self.token_times_s.append(self.clock.now_s)
        self.clock.after(self.think(), lambda: self._step(0))


@dataclass(eq=False)
class Trainer:
    """Trains in a closed loop: forward through all servers, then backward."""

    clock: Clock
    servers: Sequence[Server]
    num_rows: int
    length: int
    num_batches: int = 0
    """Batches that have gone all the way."""
    stopped: bool = False

    def start(self, at_s: float) -> Trainer:
        self.clock.at(at_s, lambda: self._send(0))
        return self

    def _send(self, hop: int) -> None:
        way = [*self.servers, *reversed(self.servers)]
        if hop == len(way):
            self.num_batches += 1
            hop = 0
        if not self.stopped:
            way[hop].arrive(
                Work(Kind.TRAINING, self.num_rows, self.length, lambda: self._send(hop + 1), decodes_next=False)
            )


@dataclass
class Swarm:
    """Servers in a chain, on one machine or on one each; the model's cost is divided evenly among them."""

    clock: Clock
    servers: list[Server]
    random: random.Random

    @classmethod
    def of(
        cls,
        num_servers: int,
        cost: Cost,
        *,
        one_machine: bool = False,
        turns: bool = True,
        config: SchedulerConfig | None = None,
        seed: int = 0,
    ) -> Swarm:
        clock, chance = Clock(), random.Random(seed)
        machine = Machine(clock, chance, turns=turns)
        servers = [
            Server(
                clock,
                machine if one_machine else Machine(clock, chance),
                lambda num_tokens: cost(num_tokens) / num_servers,
                config or SchedulerConfig(),
                seed * 100 + number,
            )
            for number in range(num_servers)
        ]
        return cls(clock, servers, chance)

    def client(self, think_s: float, *, jitter: float = 0.2, **changes: int) -> Client:
        """Make a client that thinks for `think_s`, give or take."""
        think = lambda: max(0.0, think_s * (1 + jitter * self.random.gauss(0, 1)))  # noqa: E731
        return Client(self.clock, self.servers, think, **changes)

    def decoding(self, num_clients: int, think_s: float, *, jitter: float = 0.2, within_s: float = 0.2) -> list[Client]:
        """Start clients at random times."""
        return [self.client(think_s, jitter=jitter).start(self.random.random() * within_s) for _ in range(num_clients)]


def tokens_per_s(clients: Sequence[Client], start_s: float, end_s: float) -> float:
    return sum(start_s <= time_s < end_s for each in clients for time_s in each.token_times_s) / (end_s - start_s)


def p95_gap_s(clients: Sequence[Client], start_s: float, end_s: float) -> float:
    """The 95th percentile of the times between tokens of all clients."""
    gaps_s = sorted(gap_s for each in clients for gap_s in each.gaps_s(start_s, end_s))
    return gaps_s[int(0.95 * len(gaps_s))]
