"""The KV cache of a simulated server: the real pool of pages and the real rule of admission, in pretended time.

Guests open a session, feed it a prompt, decode as many tokens as they want and close it. As in the engine, a session
takes pages as it grows, the oldest go first, and a step without pages waits; as in the session table, a new session
waits for room until its deadline.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass, field

from simulation import Clock, Server, Work

from swarm.server.admission import Applicant, choose
from swarm.server.callers import Caller
from swarm.server.pages import PagePool, PageTable
from swarm.server.scheduler import Kind

PAGE_TOKENS = 16
PAGES_WAIT_S = 10.0
"""How long a step waits for pages."""
PART_TOKENS = 128


@dataclass(eq=False)
class Guest:
    """One session over one server."""

    caller: Caller
    arrives_s: float
    prompt: int
    num_tokens: int
    """To decode."""
    num_rows: int = 1
    timeout_s: float = 20.0
    """How long it waits for room."""
    think_s: float = 0.02
    """From one token to the next step."""
    patience_s: float = float("inf")
    """After so long it leaves, whatever it is doing."""
    tables: list[PageTable] = field(default_factory=list)
    admitted_s: float | None = None
    ended_s: float | None = None
    end: str = ""
    """What became of it: "done", "refused" (no room in time), "stuck" (no pages in time), "sent away", "left"."""
    num_done: int = 0
    blocked_at: int = -1
    blocked_since_s: float | None = None


class _Applicant(Applicant):
    guest: Guest


class Cache:
    """Pages, those who have some, and those who wait for some."""

    def __init__(self, clock: Clock, server: Server, num_pages: int) -> None:
        self.clock, self.server = clock, server
        self.pool = PagePool(num_pages, PAGE_TOKENS)
        self.waiting: list[_Applicant] = []
        self.running: dict[Guest, None] = {}
        self.promised: dict[Guest, int] = {}
        server.cache = self

    # -- admission
    def visit(self, guest: Guest) -> None:
        self.clock.at(guest.arrives_s, lambda: self._apply(guest))
        if guest.patience_s < float("inf"):
            self.clock.at(guest.arrives_s + guest.patience_s, lambda: self.close(guest, "left"))

    def _apply(self, guest: Guest) -> None:
        applicant = _Applicant(guest.caller, guest.num_rows)
        applicant.guest = guest
        self.waiting.append(applicant)
        self.clock.after(guest.timeout_s, lambda: self._give_up(guest))
        self.admit()

    def _give_up(self, guest: Guest) -> None:
        if guest.admitted_s is None:
            self.close(guest, "refused")

    def held(self) -> collections.Counter[Caller]:
        held: collections.Counter[Caller] = collections.Counter()
        for guest in self.running:
            held[guest.caller] += sum(len(table.pages) for table in guest.tables)
        return held

    def room(self) -> int:
        rows = sum(guest.num_rows for guest in self.running)
        return self.pool.num_free - sum(self.promised.values()) - min(rows, self.pool.num_pages // 16)

    def admit(self) -> None:
        while self.waiting:
            now = choose(self.waiting, self.held(), self.room())
            if now.chosen is None:
                return
            if now.passed is not None:
                now.passed.passed_pages += now.chosen.num_pages
            self.waiting.remove(now.chosen)
            guest = now.chosen.guest
            guest.admitted_s = self.clock.now_s
            guest.tables = [self.pool.open(guest.prompt + guest.num_tokens) for _ in range(guest.num_rows)]
            self.running[guest] = None
            self.promised[guest] = guest.num_rows
            self._begin(guest)

    # -- the session
    def _begin(self, guest: Guest) -> None:
        self.clock.after(0.0, lambda: self._feed(guest, guest.prompt))

    def _feed(self, guest: Guest, left: int) -> None:
        if guest.end:
            return
        if not left:
            self._decode(guest)
            return
        part = min(PART_TOKENS, left)
        work = Work(Kind.PREFILL, guest.num_rows, part, guest, lambda: self._feed(guest, left - part))
        work.ends_prefill = part == left
        self.server.arrive(work)

    def _decode(self, guest: Guest) -> None:
        if guest.end:
            return
        if guest.num_done == guest.num_tokens:
            self.close(guest, "done")
            return
        guest.num_done += 1

        def step() -> None:
            if not guest.end:
                self.server.arrive(Work(Kind.DECODE, guest.num_rows, 1, guest, lambda: self._decode(guest), True))

        self.clock.after(guest.think_s, step)

    def close(self, guest: Guest, end: str) -> None:
        if guest.end:
            return
        guest.end, guest.ended_s = end, self.clock.now_s
        self.waiting = [each for each in self.waiting if each.guest is not guest]
        self.running.pop(guest, None)
        self.promised.pop(guest, None)
        self.server.returns.forget(guest)
        for work in [work for work in self.server.waiting.values() if work.session is guest]:
            self.server.cancel(work)
        for table in guest.tables:
            self.pool.close(table)
        self.admit()
        self.clock.after(0.0, self.server.pages_came_free)

    # -- pages, as simulation.Pages
    def take(self, pieces: list[tuple[Work, int]]) -> set[Work]:
        taken = set()
        for work, length in sorted(pieces, key=lambda piece: self._guest(piece[0]).arrives_s):
            if not self._guest(work).end and self._take(self._guest(work), length):
                taken.add(work)
        return {work for work in taken if not self._guest(work).end}

    def is_blocked(self, work: Work) -> bool:
        return work.session is not None and self._guest(work).blocked_at == self.pool.num_releases

    def _guest(self, work: Work) -> Guest:
        assert isinstance(work.session, Guest)
        return work.session

    def _take(self, guest: Guest, length: int) -> bool:
        goes_on = length <= PAGE_TOKENS
        older = [each for each in self.running if each.arrives_s < guest.arrives_s]
        spare = 0 if goes_on else min(sum(each.num_rows for each in older), self.pool.num_pages // 16)
        while sum(self.pool.pages_needed(table, length) for table in guest.tables) + spare > self.pool.num_free:
            if not (goes_on and self._send_away_after(guest)):
                self._block(guest)
                return False
        for table in guest.tables:
            self.pool.append(table, length)
        self.promised.pop(guest, None)
        guest.blocked_at, guest.blocked_since_s = -1, None
        return True

    def _send_away_after(self, guest: Guest) -> bool:
        holding = [each for each in self.running if any(table.pages for table in each.tables)]
        youngest = max(holding, key=lambda each: each.arrives_s, default=guest)
        if youngest.arrives_s <= guest.arrives_s:
            return False
        self.close(youngest, "sent away")
        return True

    def _block(self, guest: Guest) -> None:
        guest.blocked_at = self.pool.num_releases
        if guest.blocked_since_s is None:
            guest.blocked_since_s = since_s = self.clock.now_s
            self.clock.after(PAGES_WAIT_S, lambda: self._give_up_pages(guest, since_s))

    def _give_up_pages(self, guest: Guest, since_s: float) -> None:
        if guest.blocked_since_s == since_s:
            self.close(guest, "stuck")
