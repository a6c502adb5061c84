"""Which peers run which blocks: pure functions of a snapshot of the directory and of what this client has seen."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import overload

import numpy as np
import numpy.typing as npt

from swarm import PROTOCOL_VERSION
from swarm.announcement import AdapterListing, Announcement
from swarm.coordinates import Coordinates
from swarm.errors import NoRoute, PromptTooLong
from swarm.peers import PeerAddress
from swarm.ranges import BlockRange, describe_blocks

from .trust import Ends, Trust

# S servers; J and I some of them

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Indices = npt.NDArray[np.intp]

HOP_COST_S = 0.003
"""What handing a message on costs beside the network: measured, 2 ms to 3 ms on both sides together."""

TUNNEL_COST_S = 0.020
"""What a message through the tunnel is taken to cost on top, as long as the way to that server was not measured."""

STEPS_AHEAD = 64
"""So many further steps a session is taken to have, unless it cannot be that long: its prompt counts for as much less
for each."""

BACKWARD_COST = 3.0
"""How many times what a forward takes: the forward once more, and twice as much for gradients."""

BYTES_PER_NUMBER = 2
"""Of hidden states on their way: about what servers compute in."""

FULL_CACHE_COST_S = 1.0
"""What a server costs whose cache has no room for all tokens of the session now; it may have by then."""

FEW = 32
"""So many servers are all looked at; of more, those that are no use are sorted out first."""

FAILURE_COST_S = 0.1
"""What a server costs for each failure that is remembered of it: it may fail again."""

DEFAULT_TOKENS_PER_S = 100.0
"""Of a server that did not measure its speed."""

TOKENS_PER_S = (1e-3, 1e9)
"""What a server may say counts within these bounds, so that all costs are numbers."""


@dataclass(frozen=True, slots=True, repr=False)
class Hop:
    """One peer and the blocks it runs for us."""

    server: Announcement
    blocks: BlockRange

    @property
    def peer_id(self) -> str:
        return self.server.peer_id

    @property
    def address(self) -> PeerAddress:
        return PeerAddress.of(self.server)

    @property
    def place(self) -> tuple[str, BlockRange]:
        """The same for the same hop, whatever its server announces."""
        return self.peer_id, self.blocks

    def __str__(self) -> str:
        return f"{self.blocks} at {self.server.server_name or 'peer'} ({self.peer_id[-8:]})"

    def __repr__(self) -> str:
        return f"<Hop {self}>"


@dataclass(frozen=True, slots=True)
class Needs:
    """What a route must offer."""

    blocks: BlockRange
    fingerprint: str
    commit: str | None = None
    session_tokens: int = 0
    """Length of the session, for decoding."""
    prompt_tokens: int = 0
    """Tokens, of all sequences, that a session feeds before its steps."""
    batch_tokens: int = 0
    """Tokens (batch x length) of the batch, for forward and backward."""
    batch_size: int = 0
    """Sequences in the batch, or in the session."""
    allowed: Collection[str] | None = None
    """Peer ids of the only servers that the user permits; None: all."""
    blocked: Collection[str] = frozenset()
    """Peer ids of those that the user does not permit."""
    adapter: AdapterListing | None = None
    """The hosted adapter that all of them must have."""
    trust: Trust | None = None
    """Whom the ends of the request are for; None: for anybody."""
    part_of: BlockRange | None = None
    """All blocks of the request that this is a part of; None: it is the whole one, so both ends are its own."""

    @property
    def whole(self) -> BlockRange:
        """All blocks of the request."""
        return self.part_of or self.blocks

    def fed(self, length: int, batch_size: int) -> Needs:
        """The same for a session of so many sequences, each of which is fed so many tokens first."""
        return replace(self, prompt_tokens=length * batch_size, batch_size=batch_size)

    @property
    def num_steps(self) -> int:
        """How many steps a session is taken to have after its prompt."""
        following = self.session_tokens - self.prompt_tokens // max(1, self.batch_size)
        return max(1, min(STEPS_AHEAD, following)) if self.session_tokens else STEPS_AHEAD

    def permits(self, peer_id: str) -> bool:
        """Whether the user lets a server be on the route."""
        return peer_id not in self.blocked and (self.allowed is None or peer_id in self.allowed)

    def trusts(self, peer_id: str) -> bool:
        """Whether a server may run the ends of the request."""
        return self.trust is None or peer_id in self.trust.servers


@dataclass(frozen=True, slots=True)
class View:
    """What one client knows beyond what servers announce."""

    here: Coordinates | None = None
    """Where the client is; None: it has measured nothing."""
    rtts_s: Mapping[str, float] = field(default_factory=dict)
    """Peer id -> round-trip time, where it was measured."""
    queues_s: Mapping[str, float] = field(default_factory=dict)
    """Peer id -> what a step waits there, where it told us; else what it announces counts."""
    bytes_per_s: Mapping[str, float] = field(default_factory=dict)
    """Peer id -> what our line to it carries, where that was seen."""
    line_bytes_per_s: float = 0.0
    """What our line carries to others; 0: not known."""
    slowness: Mapping[str, float] = field(default_factory=dict)
    """Peer id -> how many times longer than announced it takes for steps, where that was seen."""
    batch_slowness: Mapping[str, float] = field(default_factory=dict)
    """The same for batches."""
    doubts_s: Mapping[str, float] = field(default_factory=dict)
    """Peer id -> what is added to each block, of those that are in doubt."""
    tokens_under_way: Mapping[str, int] = field(default_factory=dict)
    """Peer id -> tokens of our batches that it is working on."""
    failures: Mapping[str, float] = field(default_factory=dict)
    """Peer id -> how many failures are remembered of it, those of long ago counting less."""
    holding: Collection[str] = frozenset()
    """Peers that hold cache for this session already: that theirs is full does not matter, and they have its prompt."""
    avoid: Collection[str] = frozenset()
    """Peers that failed a moment ago, or have refused."""


@dataclass(frozen=True, slots=True)
class HopCost:
    """What one hop of a route is expected to take, seconds."""

    network_s: float
    """From where its input comes from; on the last hop also back to the client."""
    compute_s: float
    queue_s: float
    """What it has to do before."""

    @property
    def total_s(self) -> float:
        return self.network_s + self.compute_s + self.queue_s


@dataclass(frozen=True, slots=True)
class ExplainedRoute(Sequence[Hop]):
    """A route, what it is expected to cost, and what speaks against other servers; printed, it is a table."""

    hops: Sequence[Hop]
    costs: Sequence[HopCost]
    """Of each hop: for one token of a session, or for the batch."""
    ways: Sequence[str]
    """How each hop is reached from here."""
    next_best: Sequence[Hop]
    """The best route without one of these hops; empty: there is none."""
    next_best_s: float
    """What that is expected to cost."""
    remarks: Sequence[str]
    """What was seen of servers that makes them unattractive."""

    @overload
    def __getitem__(self, index: int) -> Hop: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Hop]: ...

    def __getitem__(self, index: int | slice) -> Hop | Sequence[Hop]:
        return self.hops[index]

    def __len__(self) -> int:
        return len(self.hops)

    @property
    def total_s(self) -> float:
        return sum(cost.total_s for cost in self.costs)

    def __str__(self) -> str:
        lines = [
            f"{hop!s:48} network {cost.network_s * 1e3:8.1f} ms   compute {cost.compute_s * 1e3:8.1f} ms   "
            f"queue {cost.queue_s * 1e3:8.1f} ms   room for {hop.server.cache_free_tokens} tokens   {way}"
            for hop, cost, way in zip(self.hops, self.costs, self.ways, strict=True)
        ]
        lines.append(f"expected in all: {self.total_s * 1e3:.1f} ms")
        if self.next_best:
            lines.append(f"next best: {', '.join(map(str, self.next_best))}: {self.next_best_s * 1e3:.1f} ms")
        return "\n".join([*lines, *self.remarks])


def explain(
    hops: Sequence[Hop], roster: Roster, needs: Needs, view: View, ways: Mapping[str, str] | None = None
) -> ExplainedRoute:
    """Say what a route costs, which one is next, and which servers were seen to be slow or to fail.

    Args:
        ways: peer id -> how the tunnel leads there, of those that one was opened to.
    """
    remarks = []
    for server in roster.servers:
        name = _called(server)
        if server.peer_id in view.avoid:
            remarks.append(f"not used: {name} failed a moment ago")
        elif not needs.permits(server.peer_id) or (needs.adapter and needs.adapter not in server.adapters):
            remarks.append(f"not used: {name}, {usable(server, needs)}")
        elif server.peer_id in view.slowness:
            remarks.append(f"slow: {name} takes {view.slowness[server.peer_id]:.1f} times what it announces")
        elif server.peer_id in view.batch_slowness:
            factor = view.batch_slowness[server.peer_id]
            remarks.append(f"slow: {name} takes {factor:.1f} times what it announces for batches")
        elif server.peer_id in view.failures:
            remarks.append(f"less used: {name} failed some time ago")
    if doubtful := [hop for hop in hops if hop.peer_id in view.doubts_s]:
        remarks.append(f"not tried yet, so expected to be slower than announced: {', '.join(map(str, doubtful))}")
    remarks += _explain_trust(hops, roster, needs, view)
    in_use = [(ways or {}).get(hop.peer_id) or ("direct" if hop.server.direct else "tunnel") for hop in hops]
    next_best, next_best_s = _next_best(hops, roster, needs, view)
    return ExplainedRoute(hops, route_costs(hops, needs, view), in_use, next_best, next_best_s, remarks)


def _next_best(hops: Sequence[Hop], roster: Roster, needs: Needs, view: View) -> tuple[Sequence[Hop], float]:
    """The best route without one of these hops, and its cost."""
    best: Sequence[Hop] = ()
    best_s = float("inf")
    for hop in hops:
        try:
            others = plan_route(roster, needs, replace(view, avoid={*view.avoid, hop.peer_id}))
        except (NoRoute, PromptTooLong):
            continue
        others_s = sum(cost.total_s for cost in route_costs(others, needs, view))
        if others_s < best_s:
            best, best_s = others, others_s
    return best, best_s


def _explain_trust(hops: Sequence[Hop], roster: Roster, needs: Needs, view: View) -> list[str]:
    if needs.trust is None:
        return []
    ends, whole = roster.ends(needs, view.avoid), needs.whole
    last_start, first_end = max(ends.last_start, whole.start), min(ends.first_end, whole.end)
    trusted = ", ".join(str(hop) for hop in hops if needs.trusts(hop.peer_id))
    return [f"trusted servers run all blocks before {first_end} and from {last_start} on: {trusted}"]


def usable(server: Announcement, needs: Needs) -> str | None:
    """Return why a server cannot be part of the route, or None if it can."""
    if server.protocol_version != PROTOCOL_VERSION:
        return f"speaks protocol version {server.protocol_version} (ours is {PROTOCOL_VERSION})"
    if server.model_fingerprint != needs.fingerprint:
        return "serves another model"
    if not needs.permits(server.peer_id):
        return "is named in blocked_servers" if server.peer_id in needs.blocked else "is not named in allowed_servers"
    if needs.commit and server.model_commit and server.model_commit != needs.commit:
        return f"serves revision {server.model_commit[:12]} (ours is {needs.commit[:12]})"
    if server.state != "online":
        return f"is {server.state}"
    if needs.adapter is not None and needs.adapter not in server.adapters:
        has_other = any(each.name == needs.adapter.name for each in server.adapters)
        return f"with {'another' if has_other else 'no'} adapter {needs.adapter.name!r}"
    if server.max_session_tokens < needs.session_tokens:
        return f"allows sessions of {server.max_session_tokens} tokens (we need {needs.session_tokens})"
    if server.max_batch_tokens < needs.batch_tokens or server.max_batch_size < needs.batch_size:
        return f"takes batches of {server.max_batch_size} sequences and {server.max_batch_tokens} tokens"
    return None


@dataclass(frozen=True, slots=True)
class Reach:
    """Which servers of a roster may run which blocks of a request."""

    rows_S: Indices
    start_S: Integers
    end_S: Integers

    def covering(self, blocks: BlockRange) -> Indices:
        """The rows of those that may run all of these blocks."""
        return self.rows_S[(self.start_S <= blocks.start) & (self.end_S >= blocks.end)]


class Roster:
    """The servers of a directory, as columns: made once, asked for many routes.

    Args:
        before: the one that this replaces: what it knows of announcements that have stayed is taken over.
    """

    def __init__(self, servers: Iterable[Announcement] = (), before: Roster | None = None) -> None:
        self.servers = sorted(servers, key=lambda server: server.peer_id)
        self.indices = {server.peer_id: index for index, server in enumerate(self.servers)}
        """Peer id -> its row."""
        kept_from_S = np.array([_row_in(before, each) for each in self.servers], dtype=np.intp)
        kept, new = np.flatnonzero(kept_from_S >= 0), np.flatnonzero(kept_from_S < 0)
        self._numbers = np.empty((len(self.servers), len(_NAMES)), dtype=np.float64)
        if new.size:
            self._numbers[new] = [_numbers(self.servers[row]) for row in new]
        self._speaking_S: dict[Needs, npt.NDArray[np.bool_]] = {}
        """Needs of any size -> whether each server can be part of a route at all."""
        if before is not None:
            self._numbers[kept] = before._numbers[kept_from_S[kept]]
            for needs in list(before._speaking_S)[-MOST_KEPT:]:
                speaking_S = self._speaking_S[needs] = np.empty(len(self.servers), dtype=bool)
                speaking_S[kept] = before._speaking_S[needs][kept_from_S[kept]]
                speaking_S[new] = [usable(self.servers[row], needs) is None for row in new]
        named = dict(zip(_NAMES, self._numbers.T, strict=True))
        self.start_S, self.end_S, self.max_session_tokens_S, self.max_batch_tokens_S, self.max_batch_size_S = (
            named[name].astype(np.int64)
            for name in ("start", "end", "max_session_tokens", "max_batch_tokens", "max_batch_size")
        )
        self.cache_free_tokens_S = named["cache_free_tokens"].astype(np.int64)
        length_S = self.end_S - self.start_S
        self.decode_s: Floats = _block_s(named["decode_tokens_per_s"], length_S)
        """[S], seconds for one block and one token of a session."""
        self.forward_s: Floats = _block_s(named["forward_tokens_per_s"], length_S)
        """[S], seconds for one block and one token of a batch."""
        self.queue_s: Floats = named["queue_s"].astype(np.float32)
        self.bytes_per_s: Floats = named["bytes_per_s"].astype(np.float32)
        """[S], what it sends to other servers; 0: not known."""
        self.token_bytes_S: Floats = (BYTES_PER_NUMBER * named["hidden_size"]).astype(np.float32)
        self.is_direct_S, self.has_place_S = (named[name].astype(bool) for name in ("is_direct", "has_place"))
        self.x_s, self.y_s, self.height_s = (named[name].astype(np.float32) for name in ("x_s", "y_s", "height_s"))

    def get(self, peer_id: str) -> Announcement | None:
        """What a peer says about itself."""
        row = self.indices.get(peer_id)
        return None if row is None else self.servers[row]

    def reach(self, needs: Needs, avoid: Collection[str] = ()) -> Reach:
        """Those that can be part of a route, and which of the wanted blocks each may run."""
        rows = self.usable(needs, avoid)
        start_S = np.maximum(self.start_S[rows], needs.blocks.start)
        end_S = np.minimum(self.end_S[rows], needs.blocks.end)
        if needs.trust is not None:
            ends = self.ends(needs, avoid)
            others_S = ~self._trusted(rows, needs)
            start_S = np.where(others_S, np.maximum(start_S, ends.first_end), start_S)
            end_S = np.where(others_S, np.minimum(end_S, ends.last_start), end_S)
            some_S = start_S < end_S
            rows, start_S, end_S = rows[some_S], start_S[some_S], end_S[some_S]
        return Reach(rows, start_S, end_S)

    def ends(self, needs: Needs, avoid: Collection[str]) -> Ends:
        """Which blocks only trusted servers may run, of a request that trusts some."""
        assert needs.trust is not None
        rows = self.usable(replace(needs, blocks=needs.whole), avoid)
        trusted = rows[self._trusted(rows, needs)]
        return needs.trust.ends(needs.whole, [self.servers[row].blocks for row in trusted])

    def _trusted(self, rows: Indices, needs: Needs) -> npt.NDArray[np.bool_]:
        return np.array([needs.trusts(self.servers[row].peer_id) for row in rows], dtype=bool)

    def usable(self, needs: Needs, avoid: Collection[str]) -> Indices:
        """The rows of those that are usable, see `usable`, and not to be avoided."""
        any_size = replace(
            needs,
            blocks=_ANY_BLOCKS,
            part_of=None,
            trust=None,
            session_tokens=0,
            prompt_tokens=0,
            batch_tokens=0,
            batch_size=0,
        )
        if any_size not in self._speaking_S:
            self._speaking_S[any_size] = np.array([usable(each, any_size) is None for each in self.servers], dtype=bool)
        usable_S = (
            self._speaking_S[any_size]
            & (self.max_session_tokens_S >= needs.session_tokens)
            & (self.max_batch_tokens_S >= needs.batch_tokens)
            & (self.max_batch_size_S >= needs.batch_size)
            & (self.start_S < needs.blocks.end)
            & (self.end_S > needs.blocks.start)
        )
        usable_S[[self.indices[peer_id] for peer_id in avoid if peer_id in self.indices]] = False
        return np.flatnonzero(usable_S)

    def missing(self, needs: Needs, avoid: Collection[str]) -> set[int]:
        """The blocks that no server may run."""
        reach = self.reach(needs, avoid)
        missing = set(needs.blocks)
        for start, end in set(zip(reach.start_S.tolist(), reach.end_S.tolist(), strict=True)):
            missing.difference_update(range(start, end))
        return missing

    def num_routes(self, needs: Needs, avoid: Collection[str]) -> int:
        """How many routes there are of which no two share a server, at least: so many can share a batch."""
        rows = self.usable(needs, avoid)
        changes = np.zeros(len(needs.blocks) + 1, dtype=np.int64)
        np.add.at(changes, np.maximum(self.start_S[rows] - needs.blocks.start, 0), 1)
        np.add.at(changes, np.minimum(self.end_S[rows] - needs.blocks.start, len(needs.blocks)), -1)
        return int(np.cumsum(changes)[:-1].min())


_ANY_BLOCKS = BlockRange(0, 1)

_FIELDS = (
    "start", "end", "max_session_tokens", "max_batch_tokens", "max_batch_size", "cache_free_tokens", "hidden_size",
    "decode_tokens_per_s", "forward_tokens_per_s", "queue_s", "bytes_per_s",
)  # fmt: skip
_PLACE = ("x_s", "y_s", "height_s")
_NAMES = (*_FIELDS, "is_direct", "has_place", *_PLACE)
"""The columns of a roster."""

_fields_of, _place_of = attrgetter(*_FIELDS), attrgetter(*_PLACE)

MOST_KEPT = 8
"""Kinds of needs for which a roster takes over what the one before it has found out."""

_NOWHERE = Coordinates(height_s=0.0)
"""An unknown place is taken to be in the middle of all: what is not known costs nothing."""


def _row_in(before: Roster | None, server: Announcement) -> int:
    """The row of the very same announcement in another roster; -1: it is not there."""
    row = -1 if before is None else before.indices.get(server.peer_id, -1)
    return row if before is not None and row >= 0 and before.servers[row] is server else -1


def _numbers(server: Announcement) -> tuple[float, ...]:
    """A row of a roster."""
    place = server.coordinates
    return (*_fields_of(server), bool(server.direct), place is not None, *_place_of(place or _NOWHERE))


def plan_route(roster: Roster, needs: Needs, view: View | None = None, *, prefer: str = "") -> list[Hop]:
    """Return the hops that together run the wanted blocks in order in the shortest expected time.

    A hop costs the way to it and its blocks. A session's steps go from hop to hop and back from the last one; batches
    come back to the client after every hop. Shortest path over (block, peer), see `Graph`.

    Args:
        prefer: id of a peer that is taken, alone, if it can do all of it.
    Raises: NoRoute: some blocks have no usable server; the message names them and says why. PromptTooLong: they have,
        for shorter sessions.
    """
    view = view or View()
    reach = roster.reach(needs, view.avoid)
    rows = reach.rows_S
    row = roster.indices.get(prefer)
    if row is not None and row in reach.covering(needs.blocks):
        return [Hop(roster.servers[row], needs.blocks)]
    path = Graph(roster, reach, needs, view).shortest_path()
    if path is None:
        _check_session_tokens(roster, needs)
        raise NoRoute(_explain_gap(roster, needs, view.avoid))
    ends = [start for start, _ in path[1:]] + [needs.blocks.end]
    return [
        Hop(roster.servers[rows[index]], BlockRange(start, end)) for (start, index), end in zip(path, ends, strict=True)
    ]


def route_costs(hops: Sequence[Hop], needs: Needs, view: View | None = None) -> list[HopCost]:
    """What each hop of a route is expected to take for one token of a session, or for one batch."""
    if not hops:
        return []
    roster = Roster([hop.server for hop in hops])
    rows = np.array([roster.indices[hop.peer_id] for hop in hops])
    graph = Graph(roster, Reach(rows, roster.start_S[rows], roster.end_S[rows]), needs, view or View())
    costs = []
    for index, hop in enumerate(hops):
        network_s = float(graph.enter_s[index] - graph.queue_s[index])
        if needs.batch_tokens or index == 0:
            network_s += float(graph.upload_s[index])
        else:
            network_s += float(graph.between_s(np.array([index - 1]), np.array([index]))[0, 0])
            network_s += float(graph.leave_s[index - 1])
        if needs.batch_tokens:
            network_s += float(graph.leave_s[index])
        if needs.batch_tokens or index == len(hops) - 1:
            network_s += float(graph.client_s[index])
        compute_s = float(graph.block_s[index]) * len(hop.blocks)
        costs.append(HopCost(network_s, compute_s, float(graph.queue_s[index])))
    return costs


def compute_s(hop: Hop, num_tokens: float) -> float:
    """What a hop should take for a step of so many tokens, of all sequences, by what it announces."""
    share = len(hop.blocks) / len(hop.server.blocks)
    one_s = 1 / (hop.server.decode_tokens_per_s or DEFAULT_TOKENS_PER_S)
    all_s = num_tokens / (hop.server.forward_tokens_per_s or DEFAULT_TOKENS_PER_S)
    return share * max(one_s, all_s)


class Graph:
    """Servers and what it costs to go between them and to run blocks on them."""

    def __init__(self, roster: Roster, reach: Reach, needs: Needs, view: View) -> None:
        rows_S = reach.rows_S
        self._blocks = needs.blocks
        self._returns_each_time = needs.batch_tokens > 0
        self._count_S = np.arange(len(rows_S))
        self._start_S, self._end_S = reach.start_S, reach.end_S
        # One way is half of a round trip.
        places = (roster.x_s, roster.y_s, roster.height_s)
        self._x_s, self._y_s, self._height_s = (np.float32(0.5) * each[rows_S] for each in places)
        slowness_S = _spread(roster, view.batch_slowness if needs.batch_tokens else view.slowness, 1.0)
        holding_S = np.zeros(len(roster.servers), dtype=bool)
        holding_S[[roster.indices[peer_id] for peer_id in view.holding if peer_id in roster.indices]] = True
        if needs.batch_tokens:
            block_s = roster.forward_s * np.float32(needs.batch_tokens)
            num_sent = float(needs.batch_tokens)
        else:  # a prompt counts for each step as much as it takes, divided by their number
            num_sent = needs.prompt_tokens / needs.num_steps
            block_s = roster.decode_s + roster.forward_s * np.float32(num_sent) * ~holding_S
        block_s = block_s * slowness_S + _spread(roster, view.doubts_s, 0.0)
        self.block_s: Floats = block_s.astype(np.float32)[rows_S]
        """[S], seconds for one block."""
        queue_s = _spread(roster, view.queues_s, roster.queue_s)
        if needs.batch_tokens:
            token_s = roster.forward_s * (roster.end_S - roster.start_S)
            queue_s = queue_s + token_s * slowness_S * _spread(roster, view.tokens_under_way, 0.0)
        self.queue_s: Floats = queue_s.astype(np.float32)[rows_S]
        """[S], seconds that a server has work for before ours."""
        enter_s = HOP_COST_S + np.float32(FAILURE_COST_S) * _spread(roster, view.failures, 0.0) + queue_s
        is_measured_S = _spread(roster, view.rtts_s, 0.0) > 0
        enter_s += TUNNEL_COST_S * ~(roster.is_direct_S | is_measured_S)
        if not needs.batch_tokens:
            full_S = roster.cache_free_tokens_S < needs.session_tokens * max(1, needs.batch_size)
            enter_s += FULL_CACHE_COST_S * (full_S & ~holding_S)
        self.enter_s: Floats = enter_s[rows_S].astype(np.float32)
        """[S], seconds for handing work to a server, without the way there: overheads, and what it has to do before."""
        num_bytes_S = roster.token_bytes_S * np.float32(num_sent)
        self.leave_s: Floats = _transfer_s(num_bytes_S, roster.bytes_per_s)[rows_S]
        """[S], seconds that a server's own line takes for what it sends on."""
        rtts_s: Floats = np.zeros_like(roster.x_s)
        if view.here is not None:
            here = view.here
            ways_s = np.hypot(roster.x_s - here.x_s, roster.y_s - here.y_s) + roster.height_s + here.height_s
            rtts_s = np.where(roster.has_place_S, ways_s, 0).astype(np.float32)
        self.client_s: Floats = _spread(roster, view.rtts_s, rtts_s)[rows_S] * np.float32(0.5)
        """[S], seconds from the client to a server, or back."""
        line_S = _spread(roster, view.bytes_per_s, view.line_bytes_per_s)
        self.upload_s: Floats = self.client_s + _transfer_s(num_bytes_S, line_S)[rows_S]
        """[S], seconds from the client to a server, with what our line takes for what we send."""

    def between_s(self, from_J: Indices, to_I: Indices) -> Floats:
        """Seconds from some servers to some others, [J, I]."""
        return self._distances_s(from_J, to_I) + self._height_s[from_J, None] + self._height_s[to_I]

    def _distances_s(self, from_J: Indices, to_I: Indices) -> Floats:
        """Without the heights."""
        dx_s = self._x_s[from_J][:, None] - self._x_s[to_I]
        dy_s = self._y_s[from_J][:, None] - self._y_s[to_I]
        dx_s *= dx_s
        dy_s *= dy_s
        dx_s += dy_s
        distances_s: Floats = np.sqrt(dx_s, out=dx_s)
        return distances_s

    def shortest_path(self) -> list[tuple[int, int]] | None:
        """Return (first block, server) of every hop; None if some block has no server.

        Block by block, the least time until each server is ready for the next. Some shortest path changes the server
        only where the next one's range begins or the last one's ends: anywhere else, moving the change towards the
        faster of the two makes the path no longer. So only those changes are looked at.
        """
        first, end = self._blocks.start, self._blocks.end
        beginning, ending = _by_block(self._start_S), _by_block(self._end_S)
        running = beginning.get(first)
        if running is None:
            return None
        # Done with the blocks before b, and past its own height, at base + b * block_s: so nothing changes while a
        # server goes on.
        base_S = np.full(len(self._start_S), np.inf, dtype=np.float32)
        arrived_s = self.upload_s[running] + self.enter_s[running]
        base_S[running] = arrived_s + self._height_s[running] - first * self.block_s[running]
        changes: list[tuple[int, Indices, Indices]] = []
        """Block, the servers that it was better to change to there, and from which."""
        for block in sorted(beginning.keys() | ending.keys()):
            if not first < block < end:
                continue
            begun, ended = beginning.get(block), ending.get(block)
            if begun is not None:
                changes += self._change(base_S, block, running, begun)
            if ended is not None:
                running = running[self._end_S[running] > block]
                changes += self._change(base_S, block, ended, running)
            if begun is not None:
                running = np.concatenate([running, begun])
            if not running.size:
                return None
        if not running.size:
            return None
        done_s = base_S[running] - self._height_s[running] + end * self.block_s[running] + self.client_s[running]
        if self._returns_each_time:
            done_s += self.leave_s[running]
        last = int(running[np.argmin(done_s)])
        path = []
        for block, to_I, from_I in reversed(changes):
            found = np.flatnonzero(to_I == last)
            if found.size:
                path.append((block, last))
                last = int(from_I[found[0]])
        return [*reversed([*path, (first, last)])]

    def _change(self, base_S: Floats, block: int, from_J: Indices, to_I: Indices) -> list[tuple[int, Indices, Indices]]:
        """Let some servers be ready as soon as others can hand over to them, where that is sooner; return where."""
        if not to_I.size:
            return []
        ready_J = base_S[from_J] + block * self.block_s[from_J] + self.leave_s[from_J]
        if self._returns_each_time:
            back_J = ready_J - self._height_s[from_J] + self.client_s[from_J]
            best = int(back_J.argmin())
            arrived_I = back_J[best] + self.upload_s[to_I]
            sources_I = np.full(len(to_I), from_J[best])
        else:
            if len(from_J) > FEW:
                keep_J = self._worth_leaving(ready_J, from_J)
                from_J, ready_J = from_J[keep_J], ready_J[keep_J]
            arrived_JI = self._distances_s(from_J, to_I)
            arrived_JI += ready_J[:, None]
            best_I = arrived_JI.argmin(axis=0)
            arrived_I = arrived_JI[best_I, self._count_S[: len(to_I)]] + self._height_s[to_I]
            sources_I = from_J[best_I]
        arrived_I += self.enter_s[to_I] + self._height_s[to_I]
        arrived_I -= block * self.block_s[to_I]
        better = arrived_I < base_S[to_I]
        changed = to_I[better]
        base_S[changed] = arrived_I[better]
        return [(block, changed, sources_I[better])]

    def _worth_leaving(self, ready_J: Floats, from_J: Indices) -> npt.NDArray[np.bool_]:
        """All but those that are ready later than by way of the one that is ready first: from there, by the triangle
        inequality, everything is reached no later."""
        first = int(ready_J.argmin())
        keep_J: npt.NDArray[np.bool_] = (
            ready_J < ready_J[first] + self._distances_s(from_J[first : first + 1], from_J)[0]
        )
        keep_J[first] = True
        return keep_J


def _by_block(numbers_S: Integers) -> dict[int, Indices]:
    """Block -> the rows where a column has that number, in order."""
    order = np.argsort(numbers_S, kind="stable")
    if not order.size:
        return {}
    values, starts = np.unique(numbers_S[order], return_index=True)
    return dict(zip(values.tolist(), np.split(order, starts[1:]), strict=True))


def _spread(roster: Roster, values: Mapping[str, float], default: float | Floats) -> Floats:
    """A column of what is known of some peers."""
    column: Floats = np.full(len(roster.servers), default, dtype=np.float32)
    known = [peer_id for peer_id in values if peer_id in roster.indices]
    column[[roster.indices[peer_id] for peer_id in known]] = [values[peer_id] for peer_id in known]
    return column


def _block_s(rates_S: npt.NDArray[np.float64], length_S: Integers) -> Floats:
    """Seconds for one block and one token, of servers that run so many tokens in a second through all of theirs."""
    rates_S = np.where(rates_S > 0, rates_S, DEFAULT_TOKENS_PER_S).clip(*TOKENS_PER_S)
    return (1 / (rates_S * length_S)).astype(np.float32)


def _transfer_s(num_bytes_S: npt.NDArray[np.floating], bytes_per_s: Floats) -> Floats:
    """What lines take for so many bytes; nothing where it is not known what they carry."""
    known_S = bytes_per_s > 0
    return np.where(known_S, num_bytes_S / np.where(known_S, bytes_per_s, 1.0), 0.0).astype(np.float32)


def _check_session_tokens(roster: Roster, needs: Needs) -> None:
    """Raise PromptTooLong if the servers, also those that failed a moment ago, allow shorter sessions only."""
    reach = roster.reach(replace(needs, session_tokens=0))
    limits = dict.fromkeys(needs.blocks, 0)
    for row, start, end in zip(reach.rows_S, reach.start_S.tolist(), reach.end_S.tolist(), strict=True):
        for block in range(start, end):
            limits[block] = max(limits[block], roster.servers[row].max_session_tokens)
    limit = min(limits.values())
    if 0 < limit < needs.session_tokens:
        raise PromptTooLong(
            f"a session of {needs.session_tokens} tokens was asked for, the servers of this model allow {limit}: "
            "use a smaller max_length"
        )


def _explain_gap(roster: Roster, needs: Needs, avoid: Collection[str]) -> str:
    missing = roster.missing(needs, avoid)
    reasons: dict[str, int] = {}
    for server in roster.servers:
        reason = usable(server, needs)
        if reason is None and server.peer_id in avoid:
            reason = "failed a moment ago"
        if reason is None and not needs.trusts(server.peer_id) and missing.intersection(server.blocks):
            reason = "is not named in trusted_servers"
        if reason is not None:
            reasons[reason] = reasons.get(reason, 0) + 1
    known = "; ".join(f"{count} known server{'s' * (count > 1)} {reason}" for reason, count in sorted(reasons.items()))
    where = f"block{'s' * (len(missing) > 1)} {describe_blocks(missing)}"
    if needs.adapter is not None:
        having = ", ".join(_called(server) for server in roster.servers if needs.adapter in server.adapters)
        return (
            f"the adapter {needs.adapter} is not served for {where} of {needs.blocks}{f' ({known})' if known else ''}; "
            f"servers that have it: {having or 'none'}"
        )
    lacking = roster.ends(needs, avoid).lacking(missing) if needs.trust is not None else ""
    if lacking:
        return (
            f"no server of trusted_servers is available for {lacking} blocks of {needs.whole}: {where} "
            f"{'are' if len(missing) > 1 else 'is'} missing{f' ({known})' if known else ''}"
        )
    return (
        f"no server is available for {where} of {needs.blocks}{f' ({known})' if known else ''}: start a server for "
        "them with `swarm serve`"
    )


def _called(server: Announcement) -> str:
    return f"{server.blocks} at {server.server_name or 'peer'} ({server.peer_id[-8:]})"
