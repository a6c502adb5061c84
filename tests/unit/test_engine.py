"""The compute thread: order, cancellation, errors, and its end."""

from __future__ import annotations

import asyncio
import threading

import pytest

from swarm.server.engine import ComputeThread, Priority


class Gate:
    """Work that occupies the thread until it is let go."""

    def __init__(self) -> None:
        self.entered, self.released = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.entered.set()
        assert self.released.wait(30)


async def blocked(engine: ComputeThread) -> tuple[Gate, asyncio.Task[None]]:
    gate = Gate()
    task = asyncio.create_task(engine.run(Priority.DECODE, gate))
    assert await asyncio.to_thread(gate.entered.wait, 30)
    return gate, task


async def queued(engine: ComputeThread, count: int) -> None:
    async with asyncio.timeout(30):
        while engine.statistics().queue_length != count:
            await asyncio.sleep(0)


async def test_waiting_work_runs_by_priority_and_then_in_order():
    ran: list[str] = []
    with ComputeThread() as engine:
        gate, first = await blocked(engine)
        tasks = []
        for name, priority in [
            ("train 1", Priority.TRAINING), ("prefill 1", Priority.PREFILL), ("decode 1", Priority.DECODE),
            ("train 2", Priority.TRAINING), ("decode 2", Priority.DECODE), ("prefill 2", Priority.PREFILL),
        ]:  # fmt: skip
            tasks.append(asyncio.create_task(engine.run(priority, lambda name=name: ran.append(name))))
            await queued(engine, len(tasks))
        gate.released.set()
        await asyncio.gather(first, *tasks)
    assert ran == ["decode 1", "decode 2", "prefill 1", "prefill 2", "train 1", "train 2"]


async def test_all_work_runs_in_one_thread_which_is_not_the_loops():
    with ComputeThread() as engine:
        threads = {await engine.run(Priority.DECODE, threading.get_ident) for _ in range(3)}
    assert len(threads) == 1 and threading.get_ident() not in threads


async def test_work_cancelled_before_its_turn_never_runs():
    ran: list[str] = []
    with ComputeThread() as engine:
        gate, first = await blocked(engine)
        task = asyncio.create_task(engine.run(Priority.DECODE, lambda: ran.append("cancelled")))
        await queued(engine, 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.released.set()
        await first
        await engine.run(Priority.TRAINING, lambda: ran.append("after"))
    assert ran == ["after"]


async def test_work_cancelled_while_it_runs_is_finished_and_forgotten():
    with ComputeThread() as engine:
        gate, task = await blocked(engine)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.released.set()
        assert await engine.run(Priority.DECODE, lambda: 5) == 5


async def test_errors_reach_whoever_waits_and_nobody_else():
    def fail() -> None:
        raise KeyError("mine")

    with ComputeThread() as engine:
        with pytest.raises(KeyError, match="mine"):
            await engine.run(Priority.DECODE, fail)
        assert await engine.run(Priority.DECODE, lambda: "fine") == "fine"


async def test_closing_cancels_what_waits_and_finishes_what_runs():
    with ComputeThread() as engine:
        gate, running = await blocked(engine)
        waiting = asyncio.create_task(engine.run(Priority.DECODE, lambda: None))
        await queued(engine, 1)
        leave = threading.Timer(0, gate.released.set)
        leave.start()
    assert engine.closed
    await running
    with pytest.raises(asyncio.CancelledError):
        await waiting
    leave.join()


async def test_a_closed_thread_takes_no_work():
    with ComputeThread() as engine:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        await engine.run(Priority.DECODE, lambda: None)
