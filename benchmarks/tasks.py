"""What a client does: generate, train, or wander from text to text; and what became of each request.

Times are those of the machine's monotonic clock, which all processes share.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer


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
