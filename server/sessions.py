"""Decoding sessions: who holds how much of the cache, and one step of one session.

A session lives as long as the stream that opened it. Its place in the cache is reserved when it opens, so that
a running session never runs out of memory; when the budget is used up, opening waits for its deadline.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from swarm.errors import BadRequest, CacheFull, PromptTooLong, SessionLost, UnsupportedModel
from swarm.model.narrow import SpanViews
from swarm.model.span import Span
from swarm.model.span_cache import SpanCache
from swarm.ranges import BlockRange
from swarm.v1 import blocks_pb2 as pb

logger = logging.getLogger(__name__)

# B batch, L length, T cached + L, D hidden, N blocks, P virtual tokens


class CacheBudget:
    """Bytes of KV cache, handed out to those who wait in the order of their coming."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.used_bytes = 0
        self._waiting: collections.deque[tuple[int, asyncio.Future[None]]] = collections.deque()

    @property
    def free_bytes(self) -> int:
        return self.total_bytes - self.used_bytes

    @asynccontextmanager
    async def reserve(self, num_bytes: int, timeout_s: float) -> AsyncIterator[None]:
        """Hold `num_bytes` for the body.

        A small request may overtake a large one that still waits for room.

        Raises: PromptTooLong: more than there is in all. CacheFull: no room came free in time.
        """
        if num_bytes > self.total_bytes:
            raise PromptTooLong(
                f"the session needs {num_bytes >> 20} MiB of cache, this server has {self.total_bytes >> 20} MiB in "
                "all: use a shorter max_length or a smaller batch"
            )
        await self._acquire(num_bytes, timeout_s)
        try:
            yield
        finally:
            self.used_bytes -= num_bytes
            self._admit()

    async def _acquire(self, num_bytes: int, timeout_s: float) -> None:
        if num_bytes <= self.free_bytes:
            self.used_bytes += num_bytes
            return
        admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (num_bytes, admitted)
        self._waiting.append(entry)
        try:
            async with asyncio.timeout(timeout_s):
                await admitted
        except BaseException as exc:
            if admitted.done() and not admitted.cancelled():
                self.used_bytes -= num_bytes
            elif entry in self._waiting:
                self._waiting.remove(entry)
            self._admit()
            if isinstance(exc, TimeoutError):
                raise CacheFull(f"no room for {num_bytes >> 20} MiB of cache within {timeout_s:.1f} s") from exc
            raise

    def _admit(self) -> None:
        while self._waiting and (self._waiting[0][1].done() or self._waiting[0][0] <= self.free_bytes):
            num_bytes, admitted = self._waiting.popleft()
            if admitted.done():  # cancelled, its task has not run since
                continue
            self.used_bytes += num_bytes
            admitted.set_result(None)


@dataclass(frozen=True, slots=True)
class StepInput:
    """One step as it arrived: see Step in the wire contract."""

    step_id: int
    position: int
    num_outputs: int
    beam_idx: list[int]
    x_BLD: Tensor
    mask_BL: Tensor | None
    position_ids_BL: Tensor | None
    codec: pb.Codec = pb.CODEC_RAW
    """How the hidden states came, and how the output goes on."""


Deliver = Callable[[Tensor, StepInput], Awaitable[None]]


@dataclass(slots=True)
class ServerSession:
    """The state of one session over a range of blocks; `step` runs in the compute thread."""

    session_id: bytes
    span: Span
    cache: SpanCache
    batch_size: int
    max_tokens: int
    prompts_NBPD: Tensor | None
    mask_BT: Tensor | None = None
    last_step_id: int = 0
    broken: bool = False
    failure: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Set to the error that ends the session, from whichever stream it came."""
    deliver: Deliver | None = None
    """Passes a step's output on, to the next hop or to the client; None until the way there is open."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    used_at_s: float = field(default_factory=time.monotonic)
    """When the last step came, or the session was opened."""

    def fail(self, error: BaseException) -> None:
        """End the session with an error; the first one counts."""
        if not self.failure.done():
            self.failure.set_exception(error)
            self.failure.exception()  # whoever waits for it raises it; nobody may be waiting

    def check(self, step: StepInput) -> None:
        """Raise BadRequest or PromptTooLong unless the step fits the session."""
        batch_size, length, _ = step.x_BLD.shape
        if batch_size != self.batch_size:
            raise BadRequest(f"the session was opened for {self.batch_size} sequences, the step has {batch_size}")
        if step.position + length > self.max_tokens:
            raise PromptTooLong(
                f"the session was opened for {self.max_tokens} tokens, this step would make it "
                f"{step.position + length}: open it with a larger max_length"
            )

    def step(self, step: StepInput) -> Tensor:
        """Append the step's tokens and return the hidden states that leave the span, [B, L, D], on the CPU.

        Raises: SessionLost: the step does not follow what is cached, or an earlier step failed half-way.
        """
        if self.broken or step.position > self.cache.length:
            raise SessionLost(f"the session's cache ends at {self.cache.length}, a step at {step.position} came")
        self.broken = True
        with torch.inference_mode():
            result = self._step(step).cpu()
        self.broken = False
        return result

    def _step(self, step: StepInput) -> Tensor:
        cached = self.cache.length
        if step.beam_idx:
            beam_idx = torch.tensor(step.beam_idx, device=self.span.device)
            self.cache.reorder(beam_idx)
            if self.mask_BT is not None:
                self.mask_BT = self.mask_BT[beam_idx]
        if step.position < cached:
            try:
                self.cache.rewind(step.position)
            except UnsupportedModel as exc:
                raise SessionLost(f"{exc}: replay the session") from exc
        self._extend_mask(step)
        x_BLD = step.x_BLD.to(self.span.device, self.span.dtype)
        ids_BL = None if step.position_ids_BL is None else step.position_ids_BL.to(self.span.device)
        return self.span(
            x_BLD,
            cache=self.cache,
            attention_mask_BT=self.mask_BT,
            position_ids_BL=ids_BL,
            prompts_NBPD=self.prompts_NBPD,
        )

    def _extend_mask(self, step: StepInput) -> None:
        if self.mask_BT is None and step.mask_BL is None:
            return
        device, length = self.span.device, step.x_BLD.shape[1]
        past, new = self.mask_BT, step.mask_BL
        if past is None:
            past = torch.ones(self.batch_size, step.position, dtype=torch.int64, device=device)
        if new is None:
            new = torch.ones(self.batch_size, length, dtype=torch.int64)
        self.mask_BT = torch.cat([past[:, : step.position], new.to(device)], dim=1)


@dataclass(frozen=True, slots=True)
class SessionTableStatistics:
    num_sessions: int
    cache_used_bytes: int
    cache_total_bytes: int


class SessionTable:
    """All sessions of a server."""

    def __init__(self, views: SpanViews, cache_bytes: int, bytes_per_token: int) -> None:
        self.views = views
        self._bytes_per_token = max(1, bytes_per_token)
        self._budget = CacheBudget(cache_bytes)
        self._sessions: dict[bytes, ServerSession] = {}

    @asynccontextmanager
    async def open(
        self,
        session_id: bytes,
        blocks: BlockRange,
        *,
        batch_size: int,
        max_tokens: int,
        prompts_NBPD: Tensor | None,
        timeout_s: float,
    ) -> AsyncIterator[ServerSession]:
        """Reserve room and keep the session while the body runs.

        Raises: BadRequest: the id is taken. PromptTooLong, CacheFull: see CacheBudget.reserve.
        """
        span = self.views.view(blocks)
        prompt_bytes = 0 if prompts_NBPD is None else prompts_NBPD.numel() * span.dtype.itemsize
        tokens_bytes = max_tokens * batch_size * self._bytes_per_token * len(blocks) // len(self.views.span.blocks)
        async with self._budget.reserve(prompt_bytes + tokens_bytes, timeout_s):
            if session_id in self._sessions:
                raise BadRequest("a session with this id is open already")
            if prompts_NBPD is not None:
                prompts_NBPD = prompts_NBPD.to(span.device, span.dtype)
            session = ServerSession(
                session_id=session_id,
                span=span,
                cache=span.new_cache(batch_size),
                batch_size=batch_size,
                max_tokens=max_tokens,
                prompts_NBPD=prompts_NBPD,
            )
            self._sessions[session_id] = session
            try:
                yield session
            finally:
                del self._sessions[session_id]
                session.fail(SessionLost("the session was closed"))

    def get(self, session_id: bytes) -> ServerSession:
        """Return an open session. Raises: SessionLost: there is none of this id."""
        session = self._sessions.get(session_id)
        if session is None:
            raise SessionLost("this server holds no such session")
        return session

    def statistics(self) -> SessionTableStatistics:
        return SessionTableStatistics(len(self._sessions), self._budget.used_bytes, self._budget.total_bytes)

    @property
    def cache_free_tokens(self) -> int:
        """Tokens, over all blocks served here, that still fit."""
        return self._budget.free_bytes // self._bytes_per_token
