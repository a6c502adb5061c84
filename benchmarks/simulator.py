"""A swarm of made-up servers in a discrete-event simulation: they join, load, serve, move, leave and crash.

Where they go is up to a rule. Everything random comes from the seed of the world, so every rule meets the same one.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from swarm.ranges import BlockRange
from swarm.server.rebalancing import (
    CHECKS_PER_PERIOD,
    CONFIRM_BYTES,
    PATIENCE_PERIODS,
    READ_BYTES,
    Population,
    is_alarming,
)

Floats = npt.NDArray[np.float64]

ANNOUNCE_PERIOD_S = 15.0
CHECK_PERIOD_S = ANNOUNCE_PERIOD_S / CHECKS_PER_PERIOD
PERIODS_ALIVE = 4
LAG_S = (0.5, 2.0)
"""How long it takes until others can read an announcement; each reader has its own."""

ENTRY_BYTES = 400
"""Of one announcement. Who looks whether to move reads READ_BYTES at a time: of a large swarm, it has an older view."""

HOUR_S, DAY_S = 3600.0, 86400.0

OPTIMA = 5
"""At so many moments the optimum is computed."""

SIGMA = 1.5
"""Of the logarithms of lives."""

ROW = [
    ("number", "i8"), ("start", "i8"), ("end", "i8"), ("rate", "f8"), ("is_serving", "?"), ("is_asking", "?"),
    ("tie", "f8"), ("is_listed", "?"),
]  # fmt: skip
"""What the directory has of a server, as the columns of a Population."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What happens to a swarm. All random numbers come from the seed, so that every rule meets the same world."""

    num_servers: int
    num_blocks: int = 80
    hours: float = 24.0
    seed: int = 0
    night: float = 0.0
    """By which share fewer come at night, and more by day, over 24 hours."""
    median_life_h: float | None = 1.5
    """Lives are log-normal with sigma 1.5, so their mean is three times the median; None: nobody leaves."""
    crash_share: float = 0.5
    """Of those that leave, how many say nothing, so that the directory keeps them until their announcement expires."""
    crowd: bool = False
    """Half as many again come within five minutes a third into the time, and leave within two after two thirds."""
    num_outages: int = 0
    """So often a group of neighbours goes within a minute: four fifths of those whose first block is one of ten."""
    load_s_per_block: float = 4.0
    """Median; log-normal with sigma 0.5."""
    min_blocks: int = 2
    max_blocks: int = 40
    random_start: bool = False
    """The first servers are anywhere, not where they would choose to be."""
    gap_at_h: float | None = None
    """All servers of the middle block leave then."""


@dataclass(slots=True)
class Server:
    number: int
    rate: float
    length: int
    load_s: float
    lag_s: float
    """How old what it reads of the directory is when it joins."""
    check_lag_s: float
    """The same when it looks whether to move."""
    confirm_lag_s: float
    """The same before it goes, or once it is alarmed."""
    part: int
    """Which part of the directory it reads first."""
    phase_s: float
    crashes: bool
    start: int = 0
    target: int = 0
    state: str = "away"
    """away, joining, online, asking (online, has announced a move), moving."""
    tie: float = 0.0
    looks_from_s: float = 0.0
    """It does not look whether to move before."""
    left: set[int] = field(default_factory=set)
    """Where it has been, as the first block."""


@dataclass(frozen=True, slots=True)
class View:
    """What the directory says from some moment on."""

    since_s: float
    population: Population
    numbers: npt.NDArray[np.int64]
    """Of the servers, in the order of the population."""


class Rule(Protocol):
    """Where servers go. It calls `ask`, `withdraw` and `go` of the simulation."""

    def join(self, population: Population, length: int) -> BlockRange:
        """Which blocks a server of so many blocks takes at first."""

    def begin(self, simulation: Simulation, server: Server) -> None:
        """A server has joined."""

    def published(self, simulation: Simulation, view: View) -> None:
        """The directory has changed."""


@dataclass(slots=True)
class Record:
    """What came of it."""

    times_s: list[float] = field(default_factory=list)
    throughput: list[float] = field(default_factory=list)
    """Of the weakest block."""
    bound: list[float] = field(default_factory=list)
    """The rates of all servers that have loaded, over the number of blocks: no placement does better."""
    num_servers: list[int] = field(default_factory=list)
    moves_s: list[float] = field(default_factory=list)
    num_withdrawn: int = 0
    num_returns: int = 0
    """Moves of servers to where they have been before."""
    gaps: list[tuple[float, float, float]] = field(default_factory=list)
    """Each time that a block had no server: from when, how long, and for how long of that its new server loaded."""
    optima: list[tuple[float, float]] = field(default_factory=list)
    """(bound, linear program) at some moments; see `Simulation.optimum`."""


class Simulation:
    """A swarm of made-up servers under one rule."""

    def __init__(self, world: World, rule: Rule, optimum: Callable[..., float] | None = None) -> None:
        self.world, self.rule, self.optimum = world, rule, optimum
        self.now_s = 0.0
        self.record = Record()
        self.servers: list[Server] = []
        self.num_bytes = world.num_servers * ENTRY_BYTES
        """Of the directory."""
        self.num_parts = int(np.ceil(self.num_bytes / READ_BYTES))
        """Of the directory, by where ranges begin; who looks whether to move reads one at a time, in turns."""
        self.rotation_s = (self.num_parts - 1) * CHECK_PERIOD_S
        """How long it takes to read the whole directory."""
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._rng, self._patience_rng = np.random.default_rng(world.seed), np.random.default_rng(world.seed)
        self._coverage = np.zeros(world.num_blocks)
        self._online = np.zeros(world.num_blocks, dtype=int)
        self._total = 0.0
        self._num_loaded = 0
        self._gap_since_s: float | None = None
        self._last_load_s = 0.0
        self._listed = np.zeros(0, dtype=ROW)
        self.views: list[View] = []
        self._dirty = False
        self.is_populated = False

    # Servers.

    def new_server(self) -> Server:
        world, rng = self.world, self._rng
        length = int(rng.integers(world.min_blocks, world.max_blocks + 1))
        rate = float(rng.lognormal(5.0, 0.7))
        lag_s, rotation = float(rng.uniform(*LAG_S)), float(rng.random())
        server = Server(
            number=len(self.servers),
            rate=rate,
            length=min(length, world.num_blocks),
            load_s=length * world.load_s_per_block * float(rng.lognormal(0.0, 0.5)),
            lag_s=lag_s,
            check_lag_s=lag_s + rotation * self.rotation_s,
            confirm_lag_s=lag_s + rotation * self.rotation_s * max(0.0, 1 - CONFIRM_BYTES / self.num_bytes),
            part=int(rotation * self.num_parts),
            phase_s=float(rng.uniform(0, ANNOUNCE_PERIOD_S)),
            crashes=bool(rng.random() < world.crash_share),
            tie=float(rng.random()),
        )
        self.servers.append(server)
        if len(self.servers) > len(self._listed):
            self._listed = np.concatenate([self._listed, np.zeros(1024, dtype=ROW)])
        return server

    def life_s(self) -> float:
        """How long a server that comes now stays."""
        median_h = self.world.median_life_h
        life_s = float(self._rng.lognormal(0.0, SIGMA)) * HOUR_S
        return np.inf if median_h is None else life_s * median_h

    def rest_of_life_s(self) -> float:
        """How much longer one stays that is met at some moment: long lives are met more often."""
        return self.life_s() * float(np.exp(SIGMA**2) * self._rng.random())

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        if time_s < self.world.hours * HOUR_S:
            heapq.heappush(self._events, (time_s, next(self._numbers), action))

    def run(self) -> Record:
        self._populate()
        self._note()
        end_s = self.world.hours * HOUR_S
        for moment_s in np.linspace(0.1, 0.9, OPTIMA) * end_s if self.optimum is not None else ():
            self.at(float(moment_s), self._note_optimum)
        while self._events:
            self.now_s, _, action = heapq.heappop(self._events)
            action()
            if self._dirty and (not self._events or self._events[0][0] > self.now_s):
                self._publish()
            self._note()
        self.now_s = end_s
        self._note()
        if self._gap_since_s is not None:
            self.record.gaps.append((self._gap_since_s, end_s - self._gap_since_s, 0.0))
        return self.record

    def _populate(self) -> None:
        world = self.world
        for _ in range(world.num_servers):
            server = self.new_server()
            room = world.num_blocks - server.length + 1
            anywhere = int(self._rng.integers(room))
            self._publish()
            blocks = self.rule.join(self.views[-1].population, server.length)
            server.target, server.length = (
                (anywhere, server.length) if world.random_start else (blocks.start, len(blocks))
            )
            self._arrive(server)
            self.at(self.rest_of_life_s(), lambda server=server: self.leave(server))
            self.rule.begin(self, server)
        self.is_populated = True
        self._publish()
        if world.median_life_h is not None:
            mean_life_s = world.median_life_h * HOUR_S * np.exp(SIGMA**2 / 2)
            moment_s = 0.0
            while moment_s < world.hours * HOUR_S:
                moment_s += float(self._rng.exponential(mean_life_s / world.num_servers / (1 + world.night)))
                by_day = 1 + world.night * np.sin(2 * np.pi * moment_s / DAY_S)
                if self._rng.random() * (1 + world.night) < by_day:
                    self._will_join(moment_s, moment_s + self.life_s())
        if world.crowd:
            third_s = world.hours * HOUR_S / 3
            for _ in range(world.num_servers // 2):
                self._will_join(
                    third_s + float(self._rng.uniform(0, 300)), 2 * third_s + float(self._rng.uniform(0, 120))
                )
        for number in range(world.num_outages):
            moment_s = (number + 0.5) / world.num_outages * world.hours * HOUR_S
            first = int(self._rng.integers(world.num_blocks - 20))
            self.at(moment_s, lambda first=first: self._outage(first))
        if world.gap_at_h is not None:
            self.at(world.gap_at_h * HOUR_S, self._make_gap)

    def _will_join(self, join_s: float, leave_s: float) -> None:
        server = self.new_server()
        self.at(join_s, lambda: self.join(server))
        self.at(leave_s, lambda: self.leave(server))

    def _outage(self, first: int) -> None:
        for server in self.servers:
            if server.state != "away" and first <= server.start < first + 10 and self._rng.random() < 0.8:
                wait_s = float(self._rng.uniform(0, 60))
                self.at(self.now_s + wait_s, lambda server=server: self.leave(server))

    def _make_gap(self) -> None:
        block = self.world.num_blocks // 2
        for server in self.servers:
            if server.state != "away" and server.start <= block < server.start + server.length:
                server.crashes = False
                self.leave(server)

    def join(self, server: Server) -> None:
        blocks = self.rule.join(self.view(server.lag_s).population, server.length)
        server.target, server.length = blocks.start, len(blocks)
        server.state = "joining"
        self._list(server)
        self.at(self.now_s + server.load_s, lambda: self.loaded(server))
        self.rule.begin(self, server)

    def loaded(self, server: Server) -> None:
        if server.state in ("joining", "moving"):
            self._arrive(server)

    def _arrive(self, server: Server) -> None:
        if server.state != "moving":
            self._total += server.rate
            self._num_loaded += 1
        server.state, server.start = "online", server.target
        self._last_load_s = server.load_s
        self._serve(server, 1)
        self._list(server)

    def ask(self, server: Server, start: int) -> None:
        """Announce that it goes elsewhere."""
        server.state, server.target = "asking", start
        self._list(server)

    def withdraw(self, server: Server) -> None:
        """It stays after all."""
        server.state, server.target = "online", server.start
        server.looks_from_s = self.now_s + float(self._patience_rng.uniform(0, PATIENCE_PERIODS)) * ANNOUNCE_PERIOD_S
        self.record.num_withdrawn += 1
        self._list(server)

    def go(self, server: Server, start: int) -> None:
        """Leave, load, and serve elsewhere: nothing is served meanwhile."""
        self._serve(server, -1)
        self.record.num_returns += start in server.left
        server.left.add(server.start)
        server.state, server.target = "moving", start
        self.record.moves_s.append(self.now_s)
        self._list(server)
        self.at(self.now_s + server.load_s, lambda: self.loaded(server))

    def leave(self, server: Server) -> None:
        if server.state == "away":
            return
        if server.state in ("online", "asking"):
            self._serve(server, -1)
        if server.state != "joining":
            self._total -= server.rate
            self._num_loaded -= 1
        server.state = "away"
        if server.crashes:
            silent_s = (self.now_s - server.phase_s) % ANNOUNCE_PERIOD_S
            self.at(self.now_s + PERIODS_ALIVE * ANNOUNCE_PERIOD_S - silent_s, lambda: self._unlist(server))
        else:
            self._unlist(server)

    def _unlist(self, server: Server) -> None:
        self._listed[server.number]["is_listed"] = False
        self._dirty = True

    def _list(self, server: Server) -> None:
        """Announce where it is, or is going; a server that crashed says nothing any more."""
        self._listed[server.number] = (
            server.number, server.target, server.target + server.length, server.rate, server.state == "online",
            server.state == "asking", server.tie, True,
        )  # fmt: skip
        self._dirty = True

    def _serve(self, server: Server, sign: int) -> None:
        where = slice(server.start, server.start + server.length)
        self._coverage[where] += sign * server.rate / server.length
        self._online[where] += sign

    # The directory.

    def _publish(self) -> None:
        self._dirty = False
        rows = self._listed[self._listed["is_listed"]]
        population = Population(
            num_blocks=self.world.num_blocks,
            start_S=rows["start"],
            end_S=rows["end"],
            rate_S=rows["rate"],
            serving_S=rows["is_serving"],
            asking_S=rows["is_asking"],
            movable_S=np.ones(len(rows), dtype=bool),
            tie_S=rows["tie"],
        )
        self.views.append(View(self.now_s, population, rows["number"]))
        oldest_s = self.now_s - LAG_S[1] - self.rotation_s - 2 * CHECK_PERIOD_S
        while len(self.views) > 1 and self.views[1].since_s < oldest_s:
            self.views.pop(0)
        self.rule.published(self, self.views[-1])

    def view(self, lag_s: float) -> View:
        """What the directory said so long ago."""
        after = bisect.bisect_right(self.views, self.now_s - lag_s, key=lambda view: view.since_s)
        return self.views[max(0, after - 1)]

    def next_check_s(self, server: Server, after_s: float) -> float:
        """When it looks at the directory next."""
        return server.phase_s + float(np.ceil((after_s - server.phase_s) / CHECK_PERIOD_S)) * CHECK_PERIOD_S

    def is_alarmed(self, server: Server) -> bool:
        """Whether the part that it reads now shows so many gone, since it was read last, that it reads on."""
        if self.num_parts == 1:
            return False
        part = (server.part + round((self.now_s - server.phase_s) / CHECK_PERIOD_S)) % self.num_parts
        before = self.view(server.lag_s + self.num_parts * CHECK_PERIOD_S).population
        now = self.view(server.lag_s).population
        was_there, is_there = self._part_of(before) == part, self._part_of(now) == part
        elsewhere_N = before.only(~was_there).going_N
        return is_alarming(before.going_N, elsewhere_N + now.only(is_there).going_N)

    def _part_of(self, population: Population) -> npt.NDArray[np.int64]:
        parts: npt.NDArray[np.int64] = population.start_S * self.num_parts // self.world.num_blocks
        return parts

    # What came of it.

    def _note_optimum(self) -> None:
        assert self.optimum is not None
        loaded = [server for server in self.servers if server.state in ("online", "asking", "moving")]
        rates, lengths = np.array([each.rate for each in loaded]), np.array([each.length for each in loaded])
        bound = float(rates.sum()) / self.world.num_blocks
        self.record.optima.append((bound, self.optimum(rates, lengths, self.world.num_blocks)))

    def _note(self) -> None:
        record = self.record
        record.times_s.append(self.now_s)
        record.throughput.append(float(self._coverage.min()) if self._online.min() else 0.0)
        record.bound.append(self._total / self.world.num_blocks)
        record.num_servers.append(self._num_loaded)
        if not self._online.min():
            self._gap_since_s = self.now_s if self._gap_since_s is None else self._gap_since_s
        elif self._gap_since_s is not None:
            length_s = self.now_s - self._gap_since_s
            record.gaps.append((self._gap_since_s, length_s, min(length_s, self._last_load_s)))
            self._gap_since_s = None
