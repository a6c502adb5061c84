"""A tenure: one range of blocks in service, with everything that goes when the server leaves that range.

The process, its identity, its ports and its announcement outlast it; see app.py and moving.py.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass
from typing import Any

import torch

from swarm.errors import Draining, ResourceError
from swarm.model import paged
from swarm.model.checkpoint import Checkpoint
from swarm.model.kv_store import KVStore, kv_layout
from swarm.model.narrow import SpanViews
from swarm.model.ragged import is_packable
from swarm.model.span import Span, load_span
from swarm.model.targets import find_targets
from swarm.peers import Connector
from swarm.ranges import BlockRange

from .activations import EXPIRY_PERIOD_S, KeptActivations
from .adapters import AdapterStore
from .checks import room_bytes
from .compute import ComputeThread
from .config import ServerConfig
from .cores import Cores, cores_path
from .engine import Engine
from .execution import Executor, PackedExecutor, SessionExecutor
from .fairness import Fairness
from .gate import Gate
from .hardware import lack_of_memory
from .pages import PagePool
from .placement import MemoryPlan
from .precision import Precision
from .room import LEAST_ROOM_BYTES, MessageRoom
from .service import BlocksService, ServedModel
from .sessions import SessionTable
from .speed import Speed, SpeedFile, describe, measure_speed

logger = logging.getLogger(__name__)

BATCH_TOKENS = 256
"""In so many tokens at once the speed of batches is announced."""

PAGE_TOKENS = 16
"""Tokens in one page of the KV cache: the most that a sequence wastes; sequences are kept in one run anyway. On CUDA
attention reads page by page, and pages have the size that it wants."""

FAREWELL_S = 2.0
"""How long the calls of sessions that were ended may take to tell their clients."""


@dataclass(frozen=True, slots=True)
class Holding:
    """Which blocks are held, where, and in which form."""

    device: torch.device
    precision: Precision
    blocks: BlockRange
    memory: MemoryPlan


@dataclass(frozen=True, slots=True)
class Tenure:
    """A range of blocks in service."""

    holding: Holding
    service: BlocksService
    sessions: SessionTable
    engine: Engine
    kept: KeptActivations
    adapters: AdapterStore
    room: MessageRoom
    speed: Speed
    """As measured before anybody used it."""

    @property
    def blocks(self) -> BlockRange:
        return self.holding.blocks

    def announced(self) -> dict[str, Any]:
        """The fields of an announcement that change with the tenure, or while it lasts."""
        return {
            "start": self.blocks.start,
            "end": self.blocks.end,
            "cache_free_tokens": self.sessions.cache_free_tokens,
            "decode_tokens_per_s": 1 / self.engine.costs.iteration_s(1),
            "forward_tokens_per_s": BATCH_TOKENS / self.engine.costs.iteration_s(BATCH_TOKENS),
            **self.service.announced(),
        }

    async def drain(self, timeout_s: float) -> None:
        """Take no new calls, let running ones finish, and end what still runs then; its clients go elsewhere."""
        self.service.drain()
        try:
            async with asyncio.timeout(timeout_s):
                await self.service.wait_idle()
        except TimeoutError:
            logger.info("sessions still run after %.0f s; their clients continue elsewhere", timeout_s)
        else:
            return
        self.sessions.fail_all(Draining(f"this server leaves blocks {self.blocks}: use another one"))
        try:
            async with asyncio.timeout(FAREWELL_S):
                await self.service.wait_idle()
        except TimeoutError:
            logger.info("calls that do not end are broken off")


@asynccontextmanager
async def open_tenure(
    config: ServerConfig,
    checkpoint: Checkpoint,
    holding: Holding,
    model: ServedModel,
    connector: Connector,
    gate: Gate,
) -> AsyncIterator[Tenure]:
    """Load blocks and have all that serves them, while the body runs.

    Raises: BadCheckpoint, UnsupportedModel, ResourceError: they cannot be loaded, or leave no room for a cache.
        BadRequest: an adapter that is to be hosted does not fit them.
    """
    num_threads = config.num_threads or torch.get_num_threads()
    async with AsyncExitStack() as owned:
        cores = owned.enter_context(closing(Cores(cores_path(holding.device, num_threads))))
        uses_cores = holding.device.type == "cpu"
        thread = owned.enter_context(ComputeThread(num_threads=config.num_threads, uses_cores=uses_cores))
        logger.info("loading blocks %s of %s", holding.blocks, checkpoint.name)
        with lack_of_memory(f"blocks {holding.blocks} and their cache"):
            span = await thread.run(lambda: _load(config, checkpoint, holding, thread))
            targets = await thread.run(lambda: find_targets(span))
            sessions, executor = await thread.run(lambda: _open_cache(config, span, holding.memory.cache_bytes))
            what = describe(span, model.fingerprint, holding.precision, num_threads)
            speeds = SpeedFile(config.speeds_path)
            speed = await asyncio.to_thread(speeds.find, what)
            if speed is None:
                speed = await thread.run(lambda: measure_speed(executor, span, cores))
                await asyncio.to_thread(speeds.note, what, speed)
        owned.callback(sessions.drop_kept)
        engine = owned.enter_context(Engine(thread, cores, sessions, executor, speed.costs(), config.scheduler))
        kept = KeptActivations(holding.memory.kept_bytes, holding.memory.graph_bytes)
        owned.callback(_expire_regularly(kept))
        adapters = AdapterStore(holding.memory.adapter_bytes, targets, span.device)
        for hosted in model.hosted:
            adapters.host(hosted, holding.blocks)
        room = MessageRoom(_room_bytes(config, span), config.quotas.room_share)
        service = BlocksService(
            model=model,
            views=sessions.views,
            engine=engine,
            sessions=sessions,
            connector=connector,
            limits=config.limits,
            kept=kept,
            adapters=adapters,
            gate=gate,
            room=room,
            fairness=Fairness(config.quotas.work_share, engine.costs.iteration_s),
        )
        yield Tenure(holding, service, sessions, engine, kept, adapters, room, speed)


def _load(config: ServerConfig, checkpoint: Checkpoint, holding: Holding, thread: ComputeThread) -> Span:
    def progress(done_bytes: int, total_bytes: int) -> None:
        if thread.closed:
            raise asyncio.CancelledError("loading was interrupted")
        if config.on_progress is not None:
            config.on_progress(done_bytes, total_bytes)

    precision = holding.precision
    return load_span(
        checkpoint,
        holding.blocks,
        dtype=precision.dtype,
        device=holding.device,
        scheme=precision.scheme,
        progress=progress,
    )


def _open_cache(config: ServerConfig, span: Span, cache_bytes: int) -> tuple[SessionTable, Executor]:
    """Divide the cache budget into pages; choose how sessions run.

    Raises: ResourceError: it has not room for one page.
    """
    on_cuda = span.device.type == "cuda"
    page_tokens = paged.PAGE_TOKENS if on_cuda else PAGE_TOKENS
    packed = is_packable(span)
    layout = kv_layout(span) if packed else None
    bytes_per_page = page_tokens * (span.cache_bytes_per_token() if layout is None else layout.bytes_per_slot)
    # On CUDA one page is nobody's: tokens that only fill up a pass write there.
    num_scrap = 1 if on_cuda and packed else 0
    num_pages = cache_bytes // max(1, bytes_per_page) - num_scrap
    if num_pages < 1:
        raise ResourceError(
            f"a KV cache of {cache_bytes} bytes has not room for one page of {bytes_per_page}: give it more"
        )
    pool = PagePool(num_pages, page_tokens)
    sessions = SessionTable(
        SpanViews(span),
        pool,
        bytes_per_page,
        packed=packed,
        grace_s=config.session_grace_s,
        share=config.quotas.cache_share,
    )
    if layout is None:
        return sessions, SessionExecutor()
    executor = PackedExecutor(KVStore(layout, num_pages * page_tokens, scrap_slots=num_scrap * page_tokens))
    executor.prepare(span)
    return sessions, executor


def _expire_regularly(kept: KeptActivations) -> Callable[[], None]:
    """Drop what is too old now and then, without traffic; returns what ends that."""
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle

    def expire() -> None:
        nonlocal timer
        kept.expire(time.monotonic())
        timer = loop.call_later(EXPIRY_PERIOD_S, expire)

    timer = loop.call_later(EXPIRY_PERIOD_S, expire)
    return lambda: timer.cancel()


def _room_bytes(config: ServerConfig, span: Span) -> int:
    """Room for messages; where nothing is said, one caller's share of it holds the largest Backward without prompts."""
    if config.quotas.message_bytes is not None:
        return config.quotas.message_bytes
    hidden_bytes = config.limits.max_batch_tokens * span.hidden_size * torch.float32.itemsize
    return max(LEAST_ROOM_BYTES, int(room_bytes(2 * hidden_bytes, hidden_bytes) / config.quotas.room_share))
