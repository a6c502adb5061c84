"""Clients in processes of their own: each joins the swarm as a user's program does, then does what it is told.

The processes are forked from one that has the libraries loaded and nothing else (multiprocessing's fork server), so
that 32 of them start in seconds; each has its own interpreter, event loop, libp2p daemon and connections. All of them
wait for a common start, and note when each token came on the machine's monotonic clock, which they share.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import psutil
import torch
from tasks import Request, Task, Told, sleep_until

PRELOADED = ["torch", "transformers.models.llama.modeling_llama", "transformers.generation.utils", "swarm.client.auto"]
START_DELAY_S = 0.3
"""Between the order and the common start, so that all clients have heard of it."""
STARTING = 4
"""Processes that start at a time."""

ANSWER_TIMEOUT_S = 1800.0
"""After so long without a word from any client the benchmark gives up."""


def _client_process(pipe: Connection, model_path: str, link: str) -> None:
    """A client's whole life. Messages in: (number, task, torch threads) to begin, "stop", or None to leave."""
    torch.set_num_threads(1)
    from swarm import AutoDistributedModelForCausalLM

    model = AutoDistributedModelForCausalLM.from_pretrained(model_path, join=link)
    sending, stopped = threading.Lock(), threading.Event()

    def send(*message: Any) -> None:
        with sending:
            pipe.send(message)

    def work(number: int, task: Task, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        sleep_until(task.start_s)
        try:
            send("done", number, task.run(model, Told(stopped, lambda: send("first", number, None))))
        except Exception as exc:
            send("failed", number, f"{type(exc).__name__}: {exc}")
            raise

    send("ready", 0, None)
    try:
        while (message := pipe.recv()) is not None:
            if message == "stop":
                stopped.set()
            else:
                stopped.clear()
                threading.Thread(target=work, args=message, daemon=True).start()
    except EOFError:
        pass  # the benchmark is gone
    finally:
        model.close()


class Clients:
    """Some clients of a swarm, each in a process of its own. Use as a context manager.

    Args:
        model_path, link: what the clients load and join.
        num_clients: how many.
        per_process: clients that share a process, as threads; 1 keeps them apart.

    The cores are divided among the clients that have something to do: each gets so many torch threads, at least one.
    """

    def __init__(self, model_path: str, link: str, num_clients: int, *, per_process: int = 1) -> None:
        self.num_clients = num_clients
        self.per_process = per_process
        self._arguments = (model_path, link)
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._ready: set[Connection] = set()
        self._waiting: set[int] = set()

    def __enter__(self) -> Clients:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        try:
            for started in range(-(-self.num_clients // self.per_process)):
                if started % STARTING == 0:
                    self._wait_ready()
                ours, theirs = context.Pipe()
                process = context.Process(target=_client_process, args=(theirs, *self._arguments), daemon=True)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(ours)
            self._wait_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait_ready(self) -> None:
        """Wait for the processes started so far: if all started at once, some would not join the swarm in time."""
        while len(self._ready) < len(self._pipes):
            self._ready |= {pipe for pipe, *_ in self._messages(set(self._pipes) - self._ready, ANSWER_TIMEOUT_S)}

    def __exit__(self, *exc_info: object) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # it has ended already
                pipe.send(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()

    def run(self, tasks: Sequence[Any]) -> list[list[Request]]:
        """Let the first clients do one task each, all from the same moment on; returns what became of each one's."""
        self.start(tasks)
        return self.results()

    def start(self, tasks: Sequence[Any]) -> None:
        """Hand out the tasks without waiting for them."""
        if len(tasks) > self.num_clients:
            raise ValueError(f"{len(tasks)} tasks for {self.num_clients} clients")
        start_s = time.monotonic() + START_DELAY_S
        self._waiting = set(range(len(tasks)))
        self._first: set[int] = set()
        self._results: dict[int, list[Request]] = {}
        num_threads = max(1, (os.cpu_count() or 1) // len(tasks))
        for number, task in enumerate(tasks):
            task.start_s = start_s
            self._pipes[number // self.per_process].send((number, task, num_threads))

    def wait_first_tokens(self, patience_s: float = ANSWER_TIMEOUT_S) -> int:
        """Wait until each of the tasks under way has its first token; returns how many still have none."""
        deadline_s = time.monotonic() + patience_s
        while self._waiting - self._first and time.monotonic() < deadline_s:
            self._collect(deadline_s - time.monotonic())
        return len(self._waiting - self._first)

    def wait_done(self, patience_s: float) -> bool:
        """Wait until the tasks under way are done, but not for ever; returns whether they are."""
        deadline_s = time.monotonic() + patience_s
        while self._waiting and time.monotonic() < deadline_s:
            self._collect(deadline_s - time.monotonic())
        return not self._waiting

    def stop(self) -> None:
        """Let the generations under way end with their next token."""
        for pipe in self._pipes:
            pipe.send("stop")

    def results(self) -> list[list[Request]]:
        """Wait for the tasks under way."""
        while self._waiting:
            if not self._collect(ANSWER_TIMEOUT_S):
                raise RuntimeError(f"no client said anything for {ANSWER_TIMEOUT_S:.0f} s")
        return [self._results[number] for number in sorted(self._results)]

    def cpu_s(self) -> float:
        """Processor time of all clients so far, with their libp2p daemons."""
        return sum(tree_cpu_s(process.pid) for process in self._processes)

    def _collect(self, timeout_s: float) -> bool:
        """Note what the clients say; returns whether one said anything."""
        messages = list(self._messages(set(self._pipes), timeout_s))
        for _, kind, number, value in messages:
            if kind == "first":
                self._first.add(number)
            elif kind == "done":
                self._waiting.discard(number)
                self._results[number] = value
            else:
                raise RuntimeError(f"client {number} failed: {value}")
        return bool(messages)

    def _messages(self, pipes: set[Connection], timeout_s: float) -> Iterator[tuple[Connection, str, int, Any]]:
        """What the clients say, as soon as one says something; nothing if none does."""
        for pipe in wait(list(pipes), timeout=max(0.0, timeout_s)):
            assert isinstance(pipe, Connection)
            try:
                message = pipe.recv()
            except EOFError as exc:
                raise RuntimeError("a client process ended by itself: see what it printed above") from exc
            yield pipe, *message


def tree_cpu_s(pid: int) -> float:
    """Processor time of a process and its children."""
    process = psutil.Process(pid)
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(each.user + each.system for each in times)
