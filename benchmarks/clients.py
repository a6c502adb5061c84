"""Clients in processes of their own: each joins the swarm as a user's program does, then does what it is told.

The processes are forked from one that has the libraries loaded and nothing else (multiprocessing's fork server), so
that 32 of them start in seconds; each has its own interpreter, event loop, libp2p daemon and connections. All of them
wait for a common start, and note when each token came on the machine's monotonic clock, which they share.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import psutil
import torch
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

PRELOADED = ["torch", "transformers.models.llama.modeling_llama", "transformers.generation.utils", "swarm.client.auto"]
START_DELAY_S = 0.3
"""Between the order and the common start, so that all clients have heard of it."""
ANSWER_TIMEOUT_S = 1800.0
"""After so long without a word from any client the benchmark gives up."""


class TokenTimes(BaseStreamer):
    """Notes when each token of a generation came."""

    def __init__(self, on_first: Callable[[], None] = lambda: None) -> None:
        self.times_s: list[float] = []
        self._on_first = on_first
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        self.times_s.append(time.monotonic())
        if len(self.times_s) == 1:
            self._on_first()

    def end(self) -> None:
        """Nothing to flush."""


@dataclass(slots=True)
class Request:
    """What became of one request of one client."""

    arrived_s: float
    """When the user asked, on the monotonic clock."""
    token_times_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    """Tokens generated, or trained on."""
    ended_s: float = 0.0
    error: str = ""

    @property
    def first_token_s(self) -> float:
        """Time to the first token."""
        return self.token_times_s[0] - self.arrived_s

    @property
    def gaps(self) -> list[tuple[float, float]]:
        """When each token but the last came, and when the next one did."""
        return list(zip(self.token_times_s, self.token_times_s[1:], strict=False))


@dataclass(slots=True)
class Told:
    """How a running task hears from and speaks to the benchmark."""

    stopped: threading.Event
    first_token: Callable[[], None]


class Task(Protocol):
    """What one client does from a common moment on; it travels to the client's process."""

    start_s: float

    def run(self, model: Any, told: Told) -> list[Request]:
        """Do it, in the client."""


@dataclass(slots=True, kw_only=True)
class Generate:
    """Generate texts of one length, back to back or each when it arrives."""

    start_s: float = 0.0
    prompt_tokens: int
    new_tokens: int
    num_requests: int = 1
    arrivals_s: tuple[float, ...] = ()
    """Seconds after the start at which requests come whether or not earlier ones are done; empty: back to back."""
    seed: int = 0

    def run(self, model: Any, told: Told) -> list[Request]:
        prompts = random_prompts(len(self.arrivals_s) or self.num_requests, self.prompt_tokens, self.seed)
        if not self.arrivals_s:
            return [generate(model, prompt, self.new_tokens, told) for prompt in prompts]
        requests: list[Request] = []
        threads = []
        for offset_s, prompt in zip(self.arrivals_s, prompts, strict=True):
            arrived_s = self.start_s + offset_s
            sleep_until(arrived_s)

            def work(arrived_s: float = arrived_s, prompt: torch.Tensor = prompt) -> None:
                requests.append(generate(model, prompt, self.new_tokens, told, arrived_s=arrived_s))

            threads.append(threading.Thread(target=work))
            threads[-1].start()
        for thread in threads:
            thread.join()
        return requests


@dataclass(slots=True, kw_only=True)
class Train:
    """Forward and backward steps for a while, at least one; each is a request."""

    start_s: float = 0.0
    batch_size: int
    length: int
    seconds: float
    seed: int = 0

    def run(self, model: Any, told: Told) -> list[Request]:
        ids = random_prompts(self.batch_size, self.length, self.seed).squeeze(1)
        requests = []
        while not requests or time.monotonic() < self.start_s + self.seconds:
            request = Request(time.monotonic(), num_tokens=ids.numel())
            model.zero_grad()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            request.ended_s = time.monotonic()
            requests.append(request)
        return requests


@dataclass(slots=True, kw_only=True)
class Wander:
    """Generate texts of random lengths until a moment; some of them are abandoned half-way."""

    start_s: float = 0.0
    until_s: float
    prompt_tokens: tuple[int, int]
    new_tokens: tuple[int, int]
    abandoned_share: float
    seed: int

    def run(self, model: Any, told: Told) -> list[Request]:
        draw = random.Random(self.seed)
        requests = []
        while time.monotonic() < self.until_s and not told.stopped.is_set():
            prompt = random_prompts(1, draw.randint(*self.prompt_tokens), draw.randrange(1 << 30))[0]
            length = draw.randint(*self.new_tokens)
            if draw.random() < self.abandoned_share:
                requests.append(generate(model, prompt, length, told, abandoned_after=length // 2))
            else:
                requests.append(generate(model, prompt, length, told))
        return requests


class Abandoned(Exception):
    """Raised out of a generation by the user who no longer wants it."""


class _Until(StoppingCriteria):
    """Ends a generation when the benchmark says so, or breaks it off as an abandoning user would."""

    def __init__(self, stopped: threading.Event, prompt_tokens: int, abandoned_after: int | None) -> None:
        self._stopped = stopped
        self._last = None if abandoned_after is None else prompt_tokens + max(1, abandoned_after)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self._last is not None and input_ids.shape[1] >= self._last:
            raise Abandoned
        return torch.full((input_ids.shape[0],), self._stopped.is_set(), dtype=torch.bool)


def generate(
    model: Any,
    ids: torch.Tensor,
    new_tokens: int,
    told: Told,
    *,
    arrived_s: float | None = None,
    abandoned_after: int | None = None,
) -> Request:
    """One greedy generation; what fails is noted in the request. A batch counts the tokens of all its rows."""
    times = TokenTimes(told.first_token)
    request = Request(time.monotonic() if arrived_s is None else arrived_s, times.times_s)
    try:
        model.generate(
            ids,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=times,
            stopping_criteria=StoppingCriteriaList([_Until(told.stopped, ids.shape[1], abandoned_after)]),
        )
    except Abandoned:
        pass
    except Exception as exc:  # one request of many: the benchmark counts it and goes on
        request.error = f"{type(exc).__name__}: {exc}"
    request.ended_s = time.monotonic()
    request.num_tokens = ids.shape[0] * len(times.times_s)
    return request


def generate_here(model: Any, ids: torch.Tensor, new_tokens: int) -> Request:
    """The same generation in this process: what the clients are compared with."""
    request = generate(model, ids, new_tokens, Told(threading.Event(), lambda: None))
    if request.error:
        raise RuntimeError(request.error)
    return request


def random_prompts(num_prompts: int, length: int, seed: int) -> torch.Tensor:
    """Token ids, [num_prompts, 1, length]."""
    return torch.randint(0, 32000, (num_prompts, 1, length), generator=torch.Generator().manual_seed(seed))


def sleep_until(moment_s: float) -> None:
    """Sleep until a moment on the monotonic clock."""
    time.sleep(max(0.0, moment_s - time.monotonic()))


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
        self._waiting: set[int] = set()

    def __enter__(self) -> Clients:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        try:
            for _ in range(-(-self.num_clients // self.per_process)):
                ours, theirs = context.Pipe()
                process = context.Process(target=_client_process, args=(theirs, *self._arguments), daemon=True)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(ours)
            ready: set[Connection] = set()
            while len(ready) < len(self._pipes):
                ready |= {pipe for pipe, *_ in self._messages(set(self._pipes) - ready, ANSWER_TIMEOUT_S)}
        except BaseException:
            self.__exit__()
            raise
        return self

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
