"""The engine: one compute thread that runs everything that touches the model or a cache, iteration by iteration.

What runs next is decided by `scheduler.compose`, a pure function of what waits. The engine takes that snapshot, takes
the pages that the plan needs, runs one pass (`execution.py`) and hands the outputs to the event loop. Training work is
long: it calls `at_boundary` between submodules, where waiting steps run in its place, as iterations of their own.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from swarm.errors import CacheFull, SwarmError

from . import scheduler
from .compute import ComputeThread
from .cores import POLL_S, Cores
from .counters import EngineRecord, EngineStatistics
from .execution import Executor, Slice
from .kv_cache import StepInput
from .pages import OutOfPages
from .scheduler import Kind, SchedulerConfig, Snapshot, Waiting
from .sessions import ServerSession, SessionTable
from .timing import CostModel, ReturnTimes

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_PAGES_WAIT_S = 10.0
"""How long a running session's step waits for pages that others hold, before its client is sent elsewhere."""


class Turns(Protocol):
    """What long work is given, to let others go first."""

    def at_boundary(self) -> None:
        """Run waiting steps now, if it is their turn. Raises: Abandoned: nobody waits for this work any more."""

    def rows(self, num_rows: int, length: int) -> int:
        """How many rows of a batch to run as the next slice."""


class Abandoned(Exception):
    """Raised through long work whose caller has gone."""


@dataclass(slots=True, eq=False)
class _StepJob:
    """A step in the queue of its session."""

    session: ServerSession
    step: StepInput
    names: Sequence[Sequence[tuple[int, bytes]]]
    """(page number, name) of the pages that it fills, per sequence."""
    number: int
    arrived_s: float
    future: asyncio.Future[Tensor]
    begins_round: bool
    return_s: float | None
    done: int = 0
    """Tokens per sequence that have run."""
    begun: bool = False
    """Whether the cache is where the step begins, its beams in order: that is done once, however often it waits."""
    outputs: list[Tensor] = field(default_factory=list)
    blocked_since_s: float | None = None
    """When it first found no free pages."""
    blocked_at: int = -1
    """SessionTable.num_releases when it last found none."""

    @property
    def kind(self) -> Kind:
        return Kind.DECODE if self.step.length == 1 else Kind.PREFILL


@dataclass(slots=True, eq=False)
class _TrainingJob:
    work: Callable[[Turns], Any]
    num_rows: int
    length: int
    number: int
    arrived_s: float
    future: asyncio.Future[Any]


@dataclass(slots=True, eq=False)
class _Running:
    """The training job that runs now, and for how long it and those that went before it have."""

    job: _TrainingJob
    began_s: float
    other_s: float = 0.0
    interrupting: bool = False


class Engine:
    """Runs the steps of all sessions, and training work, in a compute thread. A context manager of the event loop."""

    def __init__(
        self,
        thread: ComputeThread,
        cores: Cores,
        sessions: SessionTable,
        executor: Executor,
        costs: CostModel,
        config: SchedulerConfig,
    ) -> None:
        self._thread = thread
        self._cores = cores
        self.sessions = sessions
        self._executor = executor
        self.costs = costs
        """What passes cost, as measured at start and since."""
        self._config = config
        self._guard = sessions.guard
        self._returns = ReturnTimes()
        self._queues: dict[ServerSession, collections.deque[_StepJob]] = {}
        self._training: dict[int, _TrainingJob] = {}
        self._running: _Running | None = None
        self._free_since_s = 0.0
        self._last_number = 0
        self._closed = False
        self._record = EngineRecord(time.monotonic())

    def __enter__(self) -> Engine:
        self._loop = asyncio.get_running_loop()
        self._served = self._thread.submit(self._serve)
        return self

    def __exit__(self, *exc_info: object) -> None:
        with self._guard:
            self._closed = True
            abandoned = [job.future for queue in self._queues.values() for job in queue]
            abandoned += [job.future for job in self._training.values()]
            self._queues.clear()
            self._training.clear()
            if self._running is not None:
                abandoned.append(self._running.job.future)
            self._guard.notify_all()
        for future in abandoned:
            future.cancel()

    async def wait_ended(self) -> None:
        """Wait until the engine has ended. Raises: the error of its own that ended it."""
        await asyncio.wrap_future(self._served)

    # What the event loop calls.

    def step(self, session: ServerSession, step: StepInput, *, begins_round: bool) -> asyncio.Future[Tensor]:
        """Queue a step behind the earlier ones of its session; the future gives [B, L, D], on the CPU.

        Args:
            begins_round: whether it came from the client, not from another server.
        Raises (the future): SessionLost: it does not follow what is cached. CacheFull: no pages came free in time.
        """
        future: asyncio.Future[Tensor] = self._loop.create_future()
        future.add_done_callback(_retrieve)
        names = session.names.of_step(step) if session.names is not None else []
        now_s = time.monotonic()
        with self._guard:
            self._check_open()
            return_s = self._returns.returned(session, now_s)
            number = self._next_number()
            job = _StepJob(session, step, names, number, now_s, future, begins_round, return_s)
            self._queues.setdefault(session, collections.deque()).append(job)
            self._guard.notify_all()
        return future

    async def train(self, work: Callable[[Turns], T], *, num_rows: int, length: int) -> T:
        """Run long work when its turn comes. Cancelled, it is abandoned at its next boundary."""
        future: asyncio.Future[T] = self._loop.create_future()
        with self._guard:
            self._check_open()
            job = _TrainingJob(work, num_rows, length, self._next_number(), time.monotonic(), future)
            self._training[job.number] = job
            self._guard.notify_all()
        return await future

    def forget(self, session: ServerSession) -> None:
        """Drop what a session still has in the queue."""
        with self._guard:
            self._returns.forget(session)
            for job in self._queues.pop(session, ()):
                job.future.cancel()

    @property
    def queue_length(self) -> int:
        """Steps and batches that wait."""
        with self._guard:
            return sum(len(queue) for queue in self._queues.values()) + len(self._training)

    def statistics(self) -> EngineStatistics:
        """Count everything; called in any thread."""
        with self._guard:
            now_s = time.monotonic()
            heads = [queue[0] for queue in self._queues.values() if queue]
            return self._record.read(
                now_s,
                queue_length=self.queue_length,
                oldest_wait_s=max((now_s - job.arrived_s for job in heads if not job.done), default=0.0),
            )

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the engine is closed")

    def _next_number(self) -> int:
        self._last_number += 1
        return self._last_number

    # The compute thread.

    def _serve(self) -> None:
        while (turn := self._next_turn()) is not None:
            try:
                if isinstance(turn, _TrainingJob):
                    self._run_training(turn)
                else:
                    self._run_iteration(turn)
            finally:
                self._cores.give_back()

    def _next_turn(self) -> list[tuple[_StepJob, Slice]] | _TrainingJob | None:
        """Wait for something to do; None when the engine is closed."""
        held = False
        with self._guard:
            while not self._closed:
                now_s = time.monotonic()
                plan = scheduler.compose(self._snapshot(now_s), self.costs, self._config)
                if (plan.slices or plan.training is not None) and not self._cores.take_nowait():
                    self._guard.wait(POLL_S)
                    continue  # more may have come meanwhile
                if plan.training is not None:
                    return self._training.pop(plan.training)
                if plan.slices:
                    if slices := self._take_pages(plan.slices, now_s):
                        if held:
                            self._record.held()
                        return slices
                    continue  # they are marked as blocked now
                self._cores.give_back()
                held = held or plan.hold_until_s is not None
                self._guard.wait(self._wait_s(plan.hold_until_s, now_s))
            return None

    def _snapshot(self, now_s: float, *, training: bool = True) -> Snapshot:
        waiting = []
        for session in list(self._queues):
            job = self._head(session, now_s)
            if job is None or job.blocked_at == self.sessions.num_releases:
                continue
            rest = job.step.length - job.done
            waiting.append(
                Waiting(job.number, job.kind, session.batch_size, rest, job.arrived_s, job.return_s, job.begins_round)
            )
        if training:
            for number in [number for number, each in self._training.items() if each.future.cancelled()]:
                del self._training[number]
            waiting += [
                Waiting(each.number, Kind.TRAINING, each.num_rows, each.length, each.arrived_s)
                for each in self._training.values()
            ]
        shares_machine = any(session.shares_machine for session in self._queues)
        return Snapshot(now_s, waiting, self._returns.expected(now_s), self._free_since_s, shares_machine)

    def _head(self, session: ServerSession, now_s: float) -> _StepJob | None:
        """The next step of a session; cancelled ones, and those that waited too long for pages, are dropped."""
        queue = self._queues[session]
        while queue:
            job = queue[0]
            late = job.blocked_since_s is not None and now_s - job.blocked_since_s > MAX_PAGES_WAIT_S
            if late:
                self._record.gave_up()
                self._settle([(job.future, CacheFull(f"no cache came free within {MAX_PAGES_WAIT_S:.0f} s"))])
            if not (late or job.future.cancelled()):
                return job
            queue.popleft()
        del self._queues[session]
        return None

    def _wait_s(self, hold_until_s: float | None, now_s: float) -> float | None:
        """How long to wait for news: until the hold ends, or a blocked step has waited too long."""
        times = [] if hold_until_s is None else [hold_until_s]
        times += [
            queue[0].blocked_since_s + MAX_PAGES_WAIT_S
            for queue in self._queues.values()
            if queue and queue[0].blocked_since_s is not None
        ]
        return max(0.0, min(times) - now_s) + 1e-4 if times else None

    def _take_pages(self, planned: Sequence[scheduler.Slice], now_s: float) -> list[tuple[_StepJob, Slice]]:
        """Take the pages of the planned slices, for the sessions that have been here longest first.

        Those for which there are none stay in the queue, marked.
        """
        heads = {queue[0].number: queue[0] for queue in self._queues.values() if queue}
        taken = []
        for each in sorted(planned, key=lambda each: heads[each.number].session.opened_at_s):
            job = heads[each.number]
            if job.session not in self._queues:
                continue  # one before it has needed its pages
            try:
                taken.append((job, self._begin_slice(job, each.length)))
            except OutOfPages:
                self._wait_for_pages(job, now_s)
            except SwarmError as exc:
                self._queues[job.session].popleft()
                self._settle([(job.future, exc)])
        return taken

    def _begin_slice(self, job: _StepJob, length: int) -> Slice:
        session, cache = job.session, job.session.cache
        if not job.begun:
            cache.begin(job.step)
            job.begun = True
        goes_on = job.step.length <= self.sessions.pool.page_tokens  # a token, or a few that were guessed
        spare_pages = 0 if goes_on else self.sessions.spare_pages(session)
        while True:
            try:
                copies = cache.append(length, spare_pages=spare_pages)
                break
            except OutOfPages:
                if not self.sessions.give_way() and not (goes_on and self._send_away_after(session)):
                    raise
        self.sessions.begun(session)
        job.blocked_since_s = None
        if job.done == 0:
            self._record.begun(job.kind, time.monotonic() - job.arrived_s)
        return Slice(session, job.step, job.done, length, copies)

    def _send_away_after(self, session: ServerSession) -> bool:
        """Free the pages of the youngest session, if it came after this one; called under the guard."""
        youngest = self.sessions.younger_than(session)
        if youngest is None:
            return False
        self._record.sent_away()
        logger.debug("the KV cache is full: the session that came last is sent elsewhere")
        error = CacheFull("the cache is full, and those that were here before need what is left of it")
        self._settle([(job.future, error) for job in self._queues.pop(youngest, ())])
        self._loop.call_soon_threadsafe(youngest.fail, error)
        self._returns.forget(youngest)
        self.sessions.take_from(youngest)
        return True

    def _wait_for_pages(self, job: _StepJob, now_s: float) -> None:
        if job.blocked_since_s is None:
            self._record.out_of_pages()
            logger.debug("the KV cache is full: a step waits for pages")
            job.blocked_since_s = now_s
        self._call_soon(partial(self.sessions.reclaim, job.session.caller))
        job.blocked_at = self.sessions.num_releases

    def _run_iteration(self, turn: Sequence[tuple[_StepJob, Slice]]) -> None:
        began_s = time.monotonic()
        jobs = {each: job for job, each in turn}
        results: list[tuple[_StepJob, Slice, Tensor | BaseException]] = []
        for group in self._executor.groups(list(jobs)):
            started_s = time.perf_counter()
            outputs = self._run_group(group)
            self.costs.observe(sum(each.num_tokens for each in group), time.perf_counter() - started_s)
            results += [(jobs[each], each, output) for each, output in zip(group, outputs, strict=True)]
        self._free_since_s = time.monotonic()
        decodes = [each.num_tokens for job, each in turn if job.kind is Kind.DECODE]
        num_prefill_tokens = sum(each.num_tokens for _, each in turn) - sum(decodes)
        with self._guard:
            self._record.ran(decodes, num_prefill_tokens, len(turn), began_s=began_s, now_s=self._free_since_s)
        self._finish(results)

    def _run_group(self, group: Sequence[Slice]) -> Sequence[Tensor | BaseException]:
        """Run slices together; if that fails, each alone, so that an error reaches only whoever causes it."""
        try:
            return self._executor.run(group)
        except Exception as exc:  # handed to the tasks that wait
            has_left = any(each.session.cache.closed for each in group)  # while the pass was made: that is no failure
            if len(group) == 1:
                if not has_left and not isinstance(exc, SwarmError):
                    logger.exception("a step of a session failed")
                return [exc]
            if not has_left:
                logger.exception("a pass of %d sessions failed; each is run alone", len(group))
        return [self._run_group([each])[0] for each in group]

    def _finish(self, results: Sequence[tuple[_StepJob, Slice, Tensor | BaseException]]) -> None:
        """Note what has run; give the outputs of steps that are complete to the event loop."""
        settled: list[tuple[asyncio.Future[Any], Any]] = []
        with self._guard:
            now_s = time.monotonic()
            for job, each, output in results:
                cache = job.session.cache
                if isinstance(output, BaseException):
                    cache.broken = True
                    settled.append((job.future, output))
                else:
                    job.done += each.length
                    job.outputs.append(output)
                    cache.publish(job.names, each.position, each.position + each.length)
                    if job.done < job.step.length:
                        continue
                    whole = job.outputs[0] if len(job.outputs) == 1 else torch.cat(job.outputs, dim=1)
                    settled.append((job.future, whole))
                queue = self._queues.get(job.session)
                if not queue or queue[0] is not job:
                    continue  # forgotten meanwhile: nothing is expected of this session any more
                queue.popleft()
                if queue:
                    continue
                del self._queues[job.session]
                # Parts of a prefill that return nothing, or are followed by another, bring no decode step: one that was
                # expected all the same would make the next part wait for it, or go in shreds before it.
                if job.done == job.step.length and job.step.num_outputs:
                    self._returns.left(job.session, job.session.batch_size, now_s)
        self._settle(settled)

    def _settle(self, results: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
        self._call_soon(partial(self._set_results, results))

    def _call_soon(self, work: Callable[[], None]) -> None:
        """Have something done in the event loop."""
        try:
            self._loop.call_soon_threadsafe(work)
        except RuntimeError:  # the loop was closed while we computed: nobody waits for it any more
            logger.debug("something came after its event loop was closed")

    def _set_results(self, results: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
        for future, result in results:
            if future.done():
                continue
            if isinstance(result, BaseException):
                future.set_exception(result)
            else:
                future.set_result(result)
        self.sessions.admit_waiting()

    # Training: long work in the compute thread, which lets others go first.

    def _run_training(self, job: _TrainingJob) -> None:
        began_s = time.monotonic()
        self._running = _Running(job, began_s)
        with self._guard:
            self._record.begun(Kind.TRAINING, began_s - job.arrived_s)
        try:
            result: Any = job.work(self)
        except Abandoned:
            logger.debug("a batch was abandoned: its caller is gone")
            return
        except Exception as exc:  # handed to the task that waits
            result = exc
        finally:
            running, self._running = self._running, None
        now_s = time.monotonic()
        with self._guard:
            self._record.trained(job.num_rows * job.length, now_s - began_s - running.other_s, now_s)
        self._settle([(job.future, result)])

    def at_boundary(self) -> None:
        """See Turns."""
        running = self._running
        if running is None or running.interrupting:
            return
        if self._closed or running.job.future.cancelled():
            raise Abandoned
        self._cores.pause()
        running.interrupting = True
        try:
            while self._queues and (turn := self._interruption(running)):
                started_s = time.monotonic()
                self._run_iteration(turn)
                running.other_s += time.monotonic() - started_s
        finally:
            running.interrupting = False

    def _interruption(self, running: _Running) -> list[tuple[_StepJob, Slice]]:
        with self._guard:
            now_s = time.monotonic()
            training_s = now_s - running.began_s - running.other_s
            if not scheduler.may_interrupt(training_s, running.other_s, self._config):
                return []
            plan = scheduler.compose(self._snapshot(now_s, training=False), self.costs, self._config)
            return self._take_pages(plan.slices, now_s)

    def rows(self, num_rows: int, length: int) -> int:
        """See Turns."""
        with self._guard:
            now_s = time.monotonic()
            decoding = bool(self._queues) or bool(self._returns.expected(now_s))
        return scheduler.training_rows(num_rows, length, decoding, self._config)


def _retrieve(future: asyncio.Future[Any]) -> None:
    """Take note of an error that nobody may be waiting for: a session ends with its first one."""
    if not future.cancelled():
        future.exception()
