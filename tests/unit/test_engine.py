"""The engine over a fake executor: what runs together, who waits, who is told what, and its end."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from swarm.errors import CacheFull, SessionLost
from swarm.ranges import BlockRange
from swarm.server import engine as engine_module
from swarm.server.compute import ComputeThread
from swarm.server.cores import Cores
from swarm.server.engine import Engine, Turns
from swarm.server.execution import Slice
from swarm.server.kv_cache import StepInput
from swarm.server.pages import PagePool
from swarm.server.scheduler import SchedulerConfig
from swarm.server.sessions import ServerSession, SessionKey, SessionTable
from swarm.server.timing import CostModel

BLOCKS = BlockRange(0, 2)
PAGE = 4


class FakeViews:
    """Stands for SpanViews: the span is never run."""

    class span:
        blocks = BLOCKS
        device = torch.device("cpu")
        dtype = torch.float32

    def view(self, blocks: BlockRange) -> type[FakeViews.span]:
        return self.span


class FakeExecutor:
    """Doubles what it is given; can be stopped before a pass, and fails for poisoned sessions."""

    def __init__(self) -> None:
        self.passes: list[list[tuple[int, int]]] = []
        """(position, length) of each slice of each pass."""
        self.entered, self.let_go = threading.Event(), threading.Event()
        self.let_go.set()
        self.poisoned: set[int] = set()

    def groups(self, slices: Sequence[Slice]) -> list[list[Slice]]:
        return [list(slices)]

    def run(self, group: Sequence[Slice]) -> list[Tensor]:
        self.entered.set()
        assert self.let_go.wait(30)
        if self.poisoned & {id(each.session) for each in group}:
            raise ArithmeticError("poison")
        self.passes.append([(each.position, each.length) for each in group])
        return [each.x_BLD * 2 for each in group]


class Bench:
    """An engine, its sessions, and what a test does with them."""

    def __init__(self, num_pages: int, **config: Any) -> None:
        self.executor = FakeExecutor()
        pool = PagePool(num_pages, PAGE)
        self.table = SessionTable(FakeViews(), pool, 1024, packed=True, grace_s=5.0)  # type: ignore[arg-type]
        self.thread = ComputeThread()
        scheduling = SchedulerConfig(**config)
        self.engine = Engine(self.thread, Cores(None), self.table, self.executor, CostModel(), scheduling)
        self._step_ids: dict[ServerSession, int] = {}

    @asynccontextmanager
    async def session(self, *, batch_size: int = 1, max_tokens: int = 64) -> AsyncIterator[ServerSession]:
        key = SessionKey(
            session_id=secrets.token_bytes(16), blocks=BLOCKS, batch_size=batch_size, max_tokens=max_tokens
        )
        async with self.table.open(key, epoch=1, prompts_NBPD=None, timeout_s=0.0) as session:
            try:
                yield session
            finally:
                self.engine.forget(session)

    def step(
        self,
        session: ServerSession,
        length: int,
        *,
        position: int | None = None,
        num_outputs: int | None = None,
        apart: float = 0.0,
    ) -> asyncio.Future[Tensor]:
        """Args: apart: how far the hidden states of a sequence are from those of the next one, and of others' steps."""
        self._step_ids[session] = self._step_ids.get(session, 0) + 1
        x_BLD = torch.full((session.batch_size, length, 2), float(length))
        x_BLD += apart * torch.arange(1, session.batch_size + 1)[:, None, None]
        at = session.cache.length if position is None else position
        step = StepInput(
            self._step_ids[session], at, length if num_outputs is None else num_outputs, [], x_BLD, None, None
        )
        return self.engine.step(session, step, begins_round=True)

    async def busy(self, session: ServerSession) -> asyncio.Future[Tensor]:
        """Let a session's step enter the executor and stay there until `let_go` is set."""
        self.executor.let_go.clear()
        self.executor.entered.clear()
        future = self.step(session, 1)
        assert await asyncio.to_thread(self.executor.entered.wait, 30)
        return future

    @property
    def used_pages(self) -> int:
        return self.table.pool.num_used


@asynccontextmanager
async def open_bench(num_pages: int = 64, **config: Any) -> AsyncIterator[Bench]:
    bench = Bench(num_pages, **config)
    with bench.thread, bench.engine:
        try:
            yield bench
        finally:
            bench.executor.let_go.set()
    assert bench.used_pages == 0


async def test_steps_that_wait_run_together_in_one_pass():
    async with open_bench() as bench, bench.session() as first, bench.session() as second, bench.session() as third:
        busy = await bench.busy(first)
        waiting = [bench.step(second, 1), bench.step(third, 1)]
        bench.executor.let_go.set()
        assert torch.equal(await busy, torch.full((1, 1, 2), 2.0))
        await asyncio.gather(*waiting)
        assert bench.executor.passes == [[(0, 1)], [(0, 1), (0, 1)]]
        statistics = bench.engine.statistics()
        assert statistics.counters.num_shared_passes == 1 and statistics.batch_sizes == {1: 1, 2: 1}


async def test_a_long_prefill_is_cut_into_chunks_and_comes_back_whole():
    async with open_bench(max_tokens=8) as bench, bench.session() as session:
        output = await bench.step(session, 20)
        assert torch.equal(output, torch.full((1, 20, 2), 40.0))
        assert bench.executor.passes == [[(0, 8)], [(8, 8)], [(16, 4)]]


@pytest.mark.parametrize("num_outputs", [0, 1])
async def test_parts_of_a_prefill_that_arrive_one_by_one_run_whole(num_outputs):
    async with open_bench() as bench, bench.session() as session:
        await bench.step(session, 8, num_outputs=num_outputs)
        bench.executor.let_go.clear()
        bench.executor.entered.clear()
        parts = [bench.step(session, 8, num_outputs=num_outputs)]
        assert await asyncio.to_thread(bench.executor.entered.wait, 30)
        parts.append(bench.step(session, 8, position=16, num_outputs=num_outputs))
        bench.executor.let_go.set()
        await asyncio.gather(*parts)
        assert bench.executor.passes == [[(0, 8)], [(8, 8)], [(16, 8)]]


async def test_steps_of_one_session_run_in_their_order():
    async with open_bench() as bench, bench.session() as first, bench.session() as session:
        busy = await bench.busy(first)
        steps = [bench.step(session, 1, position=at) for at in range(3)]
        bench.executor.let_go.set()
        await asyncio.gather(busy, *steps)
        assert [each for each_pass in bench.executor.passes for each in each_pass][1:] == [(0, 1), (1, 1), (2, 1)]


async def test_a_step_ahead_of_the_cache_is_refused_and_others_are_not_disturbed():
    async with open_bench() as bench, bench.session() as first, bench.session() as second:
        with pytest.raises(SessionLost, match="cache ends at 0, a step at 3 came"):
            await bench.step(first, 1, position=3)
        await bench.step(second, 1)


async def test_rolling_back_frees_pages():
    async with open_bench() as bench, bench.session() as session:
        await bench.step(session, 20)
        assert bench.used_pages == 5
        await bench.step(session, 1, position=3)
        assert bench.used_pages == 1 and session.cache.length == 4


async def test_an_error_reaches_only_the_session_that_causes_it():
    async with open_bench() as bench, bench.session() as first, bench.session() as good, bench.session() as bad:
        busy = await bench.busy(first)
        bench.executor.poisoned.add(id(bad))
        good_step, bad_step = bench.step(good, 1), bench.step(bad, 1)
        bench.executor.let_go.set()
        await asyncio.gather(busy, good_step)
        with pytest.raises(ArithmeticError, match="poison"):
            await bad_step
        bench.executor.poisoned.clear()
        await bench.step(good, 1)
        with pytest.raises(SessionLost):
            await bench.step(bad, 1)


async def test_a_step_waits_for_pages_that_another_session_frees():
    async with open_bench(num_pages=4) as bench, bench.session(max_tokens=8) as second:
        async with bench.session(max_tokens=12) as first:
            await bench.step(first, 12)
            waiting = bench.step(second, 8)
            async with asyncio.timeout(30):
                while not bench.engine.statistics().counters.num_out_of_pages:
                    await asyncio.sleep(0)
            assert not waiting.done()
        await waiting
        assert bench.used_pages == 2


async def test_pages_that_never_come_free_are_cache_full_and_the_holder_goes_on(monkeypatch):
    monkeypatch.setattr(engine_module, "MAX_PAGES_WAIT_S", 0.0)
    async with open_bench(4) as bench, bench.session(max_tokens=16) as first, bench.session(max_tokens=8) as second:
        await bench.step(first, 11)
        with pytest.raises(CacheFull, match="no cache came free"):
            await bench.step(second, 8)
        await bench.step(first, 1)


async def test_a_full_cache_sends_away_who_came_last_and_those_before_go_on():
    async with open_bench(4) as bench, bench.session(max_tokens=16) as first:
        async with bench.session(max_tokens=8) as second:
            await bench.step(first, 8)
            await bench.step(second, 8, apart=1.0)
            await asyncio.gather(*(bench.step(first, 1, position=at) for at in range(8, 13)))
            assert isinstance(second.failure.exception(), CacheFull) and second.cache.closed
            with pytest.raises(SessionLost):
                await bench.step(second, 1, position=8)
        await bench.step(first, 1)
        assert bench.used_pages == 4 and not first.failure.done()


async def test_who_came_last_is_not_helped_at_the_cost_of_those_before(monkeypatch):
    monkeypatch.setattr(engine_module, "MAX_PAGES_WAIT_S", 0.0)
    async with open_bench(4) as bench, bench.session(max_tokens=12) as first, bench.session(max_tokens=8) as second:
        await bench.step(first, 12)
        await bench.step(second, 4, apart=1.0)
        with pytest.raises(CacheFull, match="no cache came free"):
            await bench.step(second, 1)
        await bench.step(first, 1, position=11)


async def test_a_long_prompt_leaves_pages_for_those_who_were_here_before():
    async with open_bench(32, max_tokens=8) as bench, bench.session() as first:
        await bench.step(first, 4)
        async with bench.session(max_tokens=128) as second:
            prompt = bench.step(second, 128, apart=1.0)
            async with asyncio.timeout(30):
                while not bench.engine.statistics().counters.num_out_of_pages:
                    await asyncio.sleep(0)
            await bench.step(first, 1)
            assert not prompt.done() and not second.failure.done()
        with pytest.raises(asyncio.CancelledError):
            await prompt


async def test_a_step_that_waits_for_pages_has_its_beams_in_order_once():
    async with (
        open_bench(4) as bench,
        bench.session(max_tokens=8) as first,
        bench.session(batch_size=2, max_tokens=8) as beams,
    ):
        await bench.step(first, 4)
        await bench.step(beams, 4, apart=1.0)
        before = [list(beams.cache.runs(row, 4)) for row in range(2)]
        step = StepInput(2, 4, 1, [1, 0], torch.ones(2, 1, 2), None, None)
        waiting = bench.engine.step(beams, step, begins_round=True)
        for look in range(1, 4):
            async with asyncio.timeout(30):
                while bench.engine.statistics().counters.num_out_of_pages < 1:
                    await asyncio.sleep(0)
            await bench.step(first, 4, position=0, apart=-look)  # something came free: it looks again
        assert [list(beams.cache.runs(row, 4)) for row in range(2)] == before[::-1] != before
        bench.engine.forget(beams)
        with pytest.raises(asyncio.CancelledError):
            await waiting


async def test_nothing_is_expected_of_a_session_that_was_forgotten_during_its_pass():
    async with open_bench() as bench, bench.session() as first, bench.session() as second:
        await bench.step(first, 1)
        busy = await bench.busy(first)
        bench.engine.forget(first)
        bench.executor.let_go.set()
        with pytest.raises(asyncio.CancelledError):
            await busy
        await bench.step(second, 1)
        assert list(bench.engine._returns._sessions) == [second]


async def test_what_a_forgotten_session_had_queued_never_runs():
    async with open_bench() as bench, bench.session() as first, bench.session() as second:
        busy = await bench.busy(first)
        dropped = bench.step(second, 1)
        bench.engine.forget(second)
        bench.executor.let_go.set()
        await busy
        with pytest.raises(asyncio.CancelledError):
            await dropped
        await bench.step(first, 1)
        assert bench.executor.passes == [[(0, 1)], [(1, 1)]]


def long_work(boundaries: int, at_each: Callable[[int], None]) -> Callable[[Turns], str]:
    def work(turns: Turns) -> str:
        for number in range(boundaries):
            at_each(number)
            turns.at_boundary()
        return "trained"

    return work


async def test_training_lets_steps_go_first_at_its_boundaries():
    order: list[str] = []
    started, arrived = threading.Event(), threading.Event()

    def at_each(number: int) -> None:
        if number == 1:
            started.set()
            assert arrived.wait(30)
        order.append(f"layer {number}")

    async with open_bench(training_share=1e-9) as bench, bench.session() as session:
        training = asyncio.create_task(bench.engine.train(long_work(3, at_each), num_rows=1, length=8))
        assert await asyncio.to_thread(started.wait, 30)
        step = bench.step(session, 1)
        step.add_done_callback(lambda _: order.append("step"))
        arrived.set()
        await step
        assert await training == "trained"
    assert bench.executor.passes == [[(0, 1)]] and order.index("layer 1") < order.index("step")


async def test_training_whose_caller_is_gone_ends_at_its_next_boundary():
    started, gone = threading.Event(), threading.Event()
    ran: list[int] = []

    def at_each(number: int) -> None:
        ran.append(number)
        if number == 0:
            started.set()
            assert gone.wait(30)

    async with open_bench() as bench:
        training = asyncio.create_task(bench.engine.train(long_work(5, at_each), num_rows=1, length=8))
        assert await asyncio.to_thread(started.wait, 30)
        training.cancel()
        with pytest.raises(asyncio.CancelledError):
            await training
        gone.set()
        assert await bench.engine.train(lambda _: "next", num_rows=1, length=8) == "next"
    assert ran == [0]


async def test_an_error_of_training_reaches_its_caller_and_nobody_else():
    def fail(_: Turns) -> None:
        raise KeyError("mine")

    async with open_bench() as bench:
        with pytest.raises(KeyError, match="mine"):
            await bench.engine.train(fail, num_rows=1, length=1)
        assert await bench.engine.train(lambda _: 5, num_rows=1, length=1) == 5


async def test_closing_cancels_what_runs_and_what_waits():
    bench = Bench(64)
    with bench.thread:
        async with bench.session() as first, bench.session() as second:
            with bench.engine:
                busy = await bench.busy(first)
                waiting = bench.step(second, 1)
            bench.executor.let_go.set()
            for each in (busy, waiting):
                with pytest.raises(asyncio.CancelledError):
                    await each
            with pytest.raises(RuntimeError, match="closed"):
                bench.step(first, 1)


async def test_an_engine_that_fails_says_so():
    bench = Bench(64)
    bench.executor.groups = lambda slices: 1 / 0  # type: ignore[assignment,return-value]
    with bench.thread, bench.engine:
        async with bench.session() as session:
            bench.step(session, 1)
            with pytest.raises(ZeroDivisionError):
                await bench.engine.wait_ended()
