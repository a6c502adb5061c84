"""Decoding sessions: who may open one, what it holds, and how long its cache outlives a broken connection.

A session lives as long as the stream that opened it. It takes cache pages as it grows. Opening one waits while those
that run leave no room; what they hold is never taken from them. When a stream breaks, the cache is kept for a grace,
so that the same caller can open the session again and go on; kept caches give way to whoever needs their pages, or the
room of their adapters.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from torch import Tensor

from swarm.errors import (
    BadRequest,
    CacheFull,
    PeerError,
    PeerUnavailable,
    PromptTooLong,
    SessionLost,
    SwarmError,
    TooManyRequests,
)
from swarm.model.edits import Adapters
from swarm.model.narrow import SpanViews
from swarm.model.span import Span
from swarm.ranges import BlockRange

from .adapters import Lease
from .admission import Applicant, choose
from .callers import OWN, Caller
from .kv_cache import PageNames, SessionCache, StepInput
from .pages import PagePool
from .room import Held
from .session_statistics import SessionStatistics, SessionTableStatistics

logger = logging.getLogger(__name__)

# B batch, L length, D hidden, N blocks, P virtual tokens

Deliver = Callable[[Tensor, StepInput], Awaitable[None]]

MAX_STEPS_UNDER_WAY = 4
"""Steps of one session that may have been read and not yet passed on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionKey:
    """What a session is opened with; to open it again, all of it must be the same."""

    session_id: bytes
    blocks: BlockRange
    batch_size: int
    max_tokens: int
    prompts_digest: bytes = b""
    adapters: tuple[bytes, ...] = ()
    """The digest of each block's adapter."""


@dataclass(slots=True, eq=False)
class ServerSession:
    """One session over a range of blocks, from one opening to the end of the stream that opened it."""

    key: SessionKey
    epoch: int
    span: Span
    cache: SessionCache
    prompts_NBPD: Tensor | None
    adapters: Adapters | None
    """What is changed in each block."""
    names: PageNames | None
    """None where pages cannot be shared."""
    caller: Caller = OWN
    """Who has opened it; what other servers push into it counts for the same."""
    num_pushes: int = 0
    """Streams of other servers that feed it now."""
    last_step_id: int = 0
    failure: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Set to the error that ends the session, from whichever stream it came."""
    deliver: Deliver | None = None
    """Passes a step's output on, to the next hop or to the client; None until the way there is open."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a step is put into the engine's queue, so that steps of two streams keep their order."""
    answering: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a message to the client is written, which may have several parts."""
    under_way: asyncio.Queue[tuple[StepInput, asyncio.Future[Tensor], Held]] = field(
        default_factory=lambda: asyncio.Queue(MAX_STEPS_UNDER_WAY)
    )
    """Steps in the engine, their outputs to come, and the room that they have, in order."""
    opened_at_s: float = field(default_factory=time.monotonic)
    used_at_s: float = field(default_factory=time.monotonic)
    """When the last step came, or the session was opened."""
    shares_machine: bool = False
    """Whether the server before or after this one in its route is on the same machine."""
    replaced: bool = False
    """Whether the caller has opened it again: the cache belongs to the newer one."""

    @property
    def batch_size(self) -> int:
        return self.key.batch_size

    @property
    def max_tokens(self) -> int:
        return self.key.max_tokens

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens that stand in front of the client's: positions here count them, its own do not."""
        return self.cache.num_prefix_tokens

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
        num_tokens = step.position - self.num_prefix_tokens + length
        if num_tokens > self.max_tokens:
            raise PromptTooLong(
                f"the session was opened for {self.max_tokens} tokens, this step would make it "
                f"{num_tokens}: open it with a larger max_length"
            )


@dataclass(slots=True, eq=False)
class _Waiting(Applicant):
    """A session that waits for its first pages."""

    admitted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass(slots=True, eq=False)
class _Kept:
    """The cache of a session whose stream broke, until its grace is over."""

    session: ServerSession
    timer: asyncio.TimerHandle


class SessionTable:
    """All sessions of a server and the pages they share.

    Args:
        pool: touched under `guard` only; whoever waits for pages in another thread waits on `guard`.
        bytes_per_page: of keys and values in all blocks.
        packed: whether the engine keeps keys and values in the store; if not, each session has a cache of its own.
        grace_s: how long the cache of a broken stream is kept.
        share: of the pages, that one caller may keep while others wait for some.
    """

    def __init__(
        self,
        views: SpanViews,
        pool: PagePool,
        bytes_per_page: int,
        *,
        packed: bool,
        grace_s: float,
        share: float = 1.0,
    ) -> None:
        self.views = views
        self.pool = pool
        self.guard = threading.Condition()
        self._num_kept_so_far = 0
        self._bytes_per_page = max(1, bytes_per_page)
        self._packed = packed
        self._grace_s = grace_s
        self._sessions: dict[bytes, ServerSession] = {}
        self._kept: collections.OrderedDict[bytes, _Kept] = collections.OrderedDict()
        self._share = share
        self._ending: ServerSession | None = None
        """One that had to end because others wait, and has not freed its pages yet."""
        self.num_reclaimed = 0
        """Sessions that had to end because their callers held more than their share."""
        self._waiting: list[_Waiting] = []
        self._num_waited = self._num_refused = 0
        self._promised: dict[object, int] = {}
        """Pages for sessions that were admitted and have not begun yet."""

    @asynccontextmanager
    async def open(
        self,
        key: SessionKey,
        *,
        epoch: int,
        prompts_NBPD: Tensor | None,
        adapters: Lease | None = None,
        timeout_s: float,
        caller: Caller = OWN,
    ) -> AsyncIterator[ServerSession]:
        """Keep a session while the body runs: a new one, or one of this key that is still here.

        Args:
            adapters: what the key names; shared, for as long as something is cached.

        Raises: BadRequest: the id belongs to another session. PromptTooLong: it could not fit even alone.
            CacheFull: those that run left no room within the timeout.
        """
        session = self._open_again(key, epoch, prompts_NBPD)
        if session is None:
            session = await self._open_new(key, epoch, prompts_NBPD, adapters, timeout_s, caller)
        session.caller = caller
        with self.guard:
            self._sessions[key.session_id] = session
        error: BaseException | None = None
        try:
            yield session
        except BaseException as exc:
            error = exc
            raise
        finally:
            # Without pages there is nothing to come back to: what it has is what the others wait for.
            lost = isinstance(error, SessionLost | CacheFull | TooManyRequests)
            broke = isinstance(error, asyncio.CancelledError | PeerError) and not lost
            self._end(session, keep=broke)

    def get(self, session_id: bytes, epoch: int) -> ServerSession:
        """Return an open session. Raises: SessionLost: there is none of this id and epoch."""
        session = self._sessions.get(session_id)
        if session is None or session.epoch != epoch:
            raise SessionLost("this server holds no such session")
        return session

    def begun(self, session: ServerSession) -> None:
        """Note that a session takes its first pages now; called under the guard."""
        self._promised.pop(session, None)

    @property
    def num_releases(self) -> int:
        """Grows whenever pages have come free, or could be had by `give_way`."""
        return self.pool.num_releases + self._num_kept_so_far

    def spare_pages(self, session: ServerSession) -> int:
        """Pages that a session's prefill leaves for those that were here before it; called under the guard."""
        older = [each for each in self._sessions.values() if each.opened_at_s < session.opened_at_s]
        return min(sum(each.batch_size for each in older), self._most_headroom)

    def younger_than(self, session: ServerSession) -> ServerSession | None:
        """The youngest session that has pages, if it came after this one; called under the guard.

        None for a caller that holds more than its share: nobody goes for it.
        """
        if self._holds_too_much(session.caller, self._pages_of_callers()):
            return None
        holding = [each for each in self._sessions.values() if each.cache.length and not each.cache.closed]
        youngest = max(holding, key=lambda each: each.opened_at_s, default=session)
        return youngest if youngest.opened_at_s > session.opened_at_s else None

    def take_from(self, session: ServerSession) -> None:
        """Free what a session has, which cannot go on; called under the guard."""
        self._promised.pop(session, None)
        self._close(session.cache)

    def give_way(self) -> bool:
        """Free the cache that has been kept longest; called under the guard. Returns whether there was one."""
        if not self._kept:
            return False
        _, kept = self._kept.popitem(last=False)
        self._close(kept.session.cache)
        logger.info("a kept session gave way")
        return True

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    @property
    def cache_used_bytes(self) -> int:
        return self.pool.num_used * self._bytes_per_page

    @property
    def cache_total_bytes(self) -> int:
        return self.pool.num_pages * self._bytes_per_page

    def statistics(self) -> SessionTableStatistics:
        """Count everything; called in any thread."""
        now_s = time.monotonic()
        with self.guard:
            sessions = [
                SessionStatistics(
                    age_s=now_s - each.opened_at_s,
                    idle_s=now_s - each.used_at_s,
                    batch_size=each.batch_size,
                    num_tokens=each.cache.length,
                    num_pages=each.cache.num_pages,
                )
                for each in sorted(self._sessions.values(), key=lambda each: each.opened_at_s)
            ]
            return SessionTableStatistics(
                sessions=tuple(sessions),
                num_kept=len(self._kept),
                num_waiting=len(self._waiting),
                num_reclaimed=self.num_reclaimed,
                num_waited=self._num_waited,
                num_refused=self._num_refused,
                page_bytes=self._bytes_per_page,
                num_pages=self.pool.num_pages,
                num_free_pages=self.pool.num_free,
                num_shared_pages=self.pool.num_shared,
            )

    @property
    def cache_free_tokens(self) -> int:
        """Tokens, over all blocks served here, that still fit."""
        return self.pool.num_free * self.pool.page_tokens

    def drop_kept(self) -> None:
        """Free what is kept for sessions whose stream broke; called in the event loop."""
        with self.guard:
            for kept in self._kept.values():
                kept.timer.cancel()
            while self.give_way():
                pass

    def fail_all(self, error: SwarmError) -> None:
        """End all open sessions with an error, which their clients are told."""
        for session in self._sessions.values():
            session.fail(error)

    # Opening.

    def _open_again(self, key: SessionKey, epoch: int, prompts_NBPD: Tensor | None) -> ServerSession | None:
        with self.guard:
            old = self._sessions.get(key.session_id)
            if old is None and (kept := self._kept.get(key.session_id)) is not None:
                old = kept.session
            if old is None:
                return None
            if old.key != key or epoch <= old.epoch:
                raise BadRequest("a session with this id is open already")
            kept = self._kept.pop(key.session_id, None)
            if kept is not None:
                kept.timer.cancel()
            old.replaced = True
            # As when its stream breaks: the server before this one, which may hear of it first, shall keep its cache.
            old.fail(PeerUnavailable("the session was opened again"))
            if old.cache.broken:
                self._promised.pop(old, None)
                self._close(old.cache)
                return None
            promised = self._promised.pop(old, 0)
            if old.cache.adapters is not None:
                old.cache.adapters.resume()
            session = ServerSession(key, epoch, old.span, old.cache, old.prompts_NBPD, old.adapters, old.names)
            session.opened_at_s = old.opened_at_s
            if promised:
                self._promised[session] = promised
            return session

    async def _open_new(
        self,
        key: SessionKey,
        epoch: int,
        prompts_NBPD: Tensor | None,
        adapters: Lease | None,
        timeout_s: float,
        caller: Caller,
    ) -> ServerSession:
        span, pool = self.views.view(key.blocks), self.pool
        prompt_bytes = 0 if prompts_NBPD is None else prompts_NBPD.numel() * span.dtype.itemsize
        num_prefix_tokens = 0 if adapters is None else adapters.num_prefix_tokens
        prompt_pages = -(-prompt_bytes // self._bytes_per_page)
        own_pages = prompt_pages - (-num_prefix_tokens // pool.page_tokens)
        most = prompt_pages + key.batch_size * -(-(num_prefix_tokens + key.max_tokens) // pool.page_tokens)
        if most > pool.num_pages:
            raise PromptTooLong(
                f"the session needs {most * self._bytes_per_page >> 20} MiB of cache, this server has "
                f"{pool.num_pages * self._bytes_per_page >> 20} MiB in all: use a shorter max_length or a smaller batch"
            )
        promise = await self._admit(own_pages + key.batch_size, timeout_s, caller)
        with self.guard:
            del self._promised[promise]
            if key.session_id in self._sessions or key.session_id in self._kept:  # opened while this one waited
                raise BadRequest("a session with this id is open already")
            if prompts_NBPD is not None:
                prompts_NBPD = prompts_NBPD.to(span.device, span.dtype)
            cache = SessionCache(
                pool,
                key.batch_size,
                expected_tokens=num_prefix_tokens + key.max_tokens,
                own=None if self._packed else span.new_cache(key.batch_size),
                num_prefix_tokens=num_prefix_tokens,
                ballast_pages=prompt_pages,
                adapters=None if adapters is None else adapters.share(),
            )
            context = repr((key.blocks, key.prompts_digest, key.adapters)).encode()
            names = None
            if self._packed:
                names = PageNames(key.batch_size, pool.page_tokens, context, num_prefix_tokens)
            changed = None if adapters is None else adapters.adapters
            session = ServerSession(key, epoch, span, cache, prompts_NBPD, changed, names)
            self._promised[session] = key.batch_size
        return session

    def _room(self) -> int:
        """Pages for a session that comes now: what is free less what others are about to take."""
        running = sum(session.batch_size for session in self._sessions.values())
        return self.pool.num_free - sum(self._promised.values()) - min(running, self._most_headroom)

    @property
    def _most_headroom(self) -> int:
        return self.pool.num_pages // 16

    def _most_room(self) -> int:
        """Pages for a session that comes now, with those that `give_way` could free."""
        with self.guard:
            return self._room() + sum(kept.session.cache.num_pages for kept in self._kept.values())

    def _make_room(self, num_pages: int) -> bool:
        """Let kept caches give way until so many pages are free for a session; False: they had not enough."""
        with self.guard:
            while self._room() < num_pages:
                if not self.give_way():
                    return False
        return True

    async def _admit(self, num_pages: int, timeout_s: float, caller: Caller) -> object:
        """Wait for room, see admission.py; return what stands for it in `_promised`.

        Raises: CacheFull: none came free in time.
        """
        waiting = _Waiting(caller, num_pages)
        self._waiting.append(waiting)
        self.admit_waiting()
        self._num_waited += waiting in self._waiting
        try:
            async with asyncio.timeout(timeout_s):
                await waiting.admitted
        except BaseException as exc:
            self._promised.pop(waiting, None)
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            self.admit_waiting()
            if isinstance(exc, TimeoutError):
                self._num_refused += 1
                raise CacheFull(f"no room for {num_pages} pages of cache within {timeout_s:.1f} s") from exc
            raise
        return waiting

    def admit_waiting(self) -> None:
        """Let in those for whom there is room by now; called in the event loop."""
        while self._waiting:
            now = choose(self._waiting, self._pages_of_callers(), self._most_room())
            if now.passed is not None:
                self.reclaim(now.passed.caller)
            if now.chosen is None:
                return
            if not self._make_room(now.chosen.num_pages):  # what is kept shares pages with what is in use
                self.reclaim(now.chosen.caller)
                return
            if now.passed is not None:
                now.passed.passed_pages += now.chosen.num_pages
            self._waiting.remove(now.chosen)
            if not now.chosen.admitted.done():  # else cancelled, and its task has not run since
                self._promised[now.chosen] = now.chosen.num_pages
                now.chosen.admitted.set_result(None)

    def _pages_of_callers(self) -> collections.Counter[Caller]:
        held: collections.Counter[Caller] = collections.Counter()
        with self.guard:
            for session in self._sessions.values():
                held[session.caller] += session.cache.num_pages
        return held

    def _holds_too_much(self, caller: Caller, held: Mapping[Caller, int]) -> bool:
        """Whether a caller has more than its share of the pages; this machine itself never has."""
        return not caller.is_own and held.get(caller, 0) > self._share * self.pool.num_pages

    def reclaim(self, caller: Caller) -> None:
        """End a session of whoever holds more than its share of the pages, because this caller has to wait for some.

        It is the one that was unused for longest, of the caller who holds most. Its client is told to come back later.
        Nothing is taken from this machine itself. Called in the event loop.
        """
        if self._ending is not None and not self._ending.cache.closed:
            return
        held = self._pages_of_callers()
        most = {
            each: num_pages for each, num_pages in held.items() if each != caller and self._holds_too_much(each, held)
        }
        if not most:
            return
        hog = max(most, key=most.__getitem__)
        theirs = [session for session in self._sessions.values() if session.caller == hog and session.cache.num_pages]
        self._ending = min(theirs, key=lambda session: session.used_at_s)
        self.num_reclaimed += 1
        self._ending.fail(TooManyRequests("your sessions hold most of the cache, and others wait: come back later"))

    # Ending.

    def _end(self, session: ServerSession, *, keep: bool) -> None:
        with self.guard:
            if self._sessions.get(session.key.session_id) is session:
                del self._sessions[session.key.session_id]
        keep = keep and not session.cache.broken and session.cache.length > 0 and self._grace_s > 0
        # The server before this one hears of it through its Push; it keeps its cache if we do.
        session.fail(PeerUnavailable("its connection broke") if keep else SessionLost("the session was closed"))
        if session.replaced:
            return
        with self.guard:
            if keep:
                timer = asyncio.get_running_loop().call_later(self._grace_s, self._end_kept, session)
                self._kept[session.key.session_id] = _Kept(session, timer)
                self._num_kept_so_far += 1
                self.guard.notify_all()
                if session.cache.adapters is not None:
                    session.cache.adapters.rest(lambda: self._end_kept(session))
            else:
                self._promised.pop(session, None)
                self._close(session.cache)
        self.admit_waiting()

    def _end_kept(self, session: ServerSession) -> None:
        """Free what is kept of a session, if it still is."""
        with self.guard:
            kept = self._kept.get(session.key.session_id)
            if kept is not None and kept.session is session:
                kept.timer.cancel()
                del self._kept[session.key.session_id]
                self._close(session.cache)
        self.admit_waiting()

    def _close(self, cache: SessionCache) -> None:
        cache.close()
        self.guard.notify_all()
