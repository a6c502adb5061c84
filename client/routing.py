"""Which peers run which blocks: pure functions of a snapshot of the directory and of what this client has seen."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import overload

import numpy as np
import numpy.typing as npt

from swarm import PROTOCOL_VERSION
from swarm.announcement import AdapterListing, Announcement
from swarm.coordinates import Coordinates
from swarm.errors import NoRoute, PromptTooLong
from swarm.peers import PeerAddress
from swarm.ranges import BlockRange, describe_blocks

# S servers; J and I some of them

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Indices = npt.NDArray[np.intp]

HOP_COST_S = 0.003
"""What handing a message on costs beside the network: measured, 2 ms to 3 ms on both sides together."""

TUNNEL_COST_S = 0.020
"""What a message through the tunnel is taken to cost on top."""

FULL_CACHE_COST_S = 1.0
"""What a server costs whose cache has no room for all tokens of the session now; it may have by then."""

FEW = 32
"""So many servers are all looked at; of more, those that are no use are sorted out first."""

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
    batch_tokens: int = 0
    """Tokens (batch x length) of the batch, for forward and backward."""
    batch_size: int = 0
    """Sequences in the batch, for forward and backward."""
    allowed: Collection[str] | None = None
    """Peer ids of the only servers that the user permits; None: all."""
    blocked: Collection[str] = frozenset()
    """Peer ids of those that the user does not permit."""
    adapter: AdapterListing | None = None
    """The hosted adapter that all of them must have."""
    false: Collection[str] = frozenset()
    """Peer ids of those that audits have found to compute something else."""

    def permits(self, peer_id: str) -> bool:
        """Whether a server may be on the route: the user lets it, and it was not found to be false."""
        return (
            peer_id not in self.blocked
            and peer_id not in self.false
            and (self.allowed is None or peer_id in self.allowed)
        )


@dataclass(frozen=True, slots=True)
class View:
    """What one client knows beyond what servers announce."""

    here: Coordinates | None = None
    """Where the client is; None: it has measured nothing."""
    rtts_s: Mapping[str, float] = field(default_factory=dict)
    """Peer id -> round-trip time, where it was measured."""
    slowness: Mapping[str, float] = field(default_factory=dict)
    """Peer id -> how many times longer than announced it takes, where that was seen."""
    tokens_under_way: Mapping[str, int] = field(default_factory=dict)
    """Peer id -> tokens of our batches that it is working on."""
    holding: Collection[str] = frozenset()
    """Peers that hold cache for this session already: that theirs is full does not matter."""
    avoid: Collection[str] = frozenset()
    """Peers that failed a moment ago, or have refused."""


@dataclass(frozen=True, slots=True)
class HopCost:
    """What one hop of a route is expected to take, seconds."""

    network_s: float
    """From where its input comes from; on the last hop also back to the client."""
    compute_s: float

    @property
    def total_s(self) -> float:
        return self.network_s + self.compute_s


@dataclass(frozen=True, slots=True)
class ExplainedRoute(Sequence[Hop]):
    """A route, what it is expected to cost, and what speaks against other servers; printed, it is a table."""

    hops: Sequence[Hop]
    costs: Sequence[HopCost]
    """Of each hop: for one token of a session, or for the batch."""
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
            f"{hop!s:48} network {cost.network_s * 1e3:8.1f} ms   compute {cost.compute_s * 1e3:8.1f} ms"
            for hop, cost in zip(self.hops, self.costs, strict=True)
        ]
        return "\n".join([*lines, f"expected in all: {self.total_s * 1e3:.1f} ms", *self.remarks])


def explain(hops: Sequence[Hop], roster: Roster, needs: Needs, view: View) -> ExplainedRoute:
    """Say what a route costs, and which servers were seen to be slow or to fail."""
    remarks = []
    for server in roster.servers:
        name = _called(server)
        if server.peer_id in view.avoid:
            remarks.append(f"not used: {name} failed a moment ago")
        elif not needs.permits(server.peer_id) or (needs.adapter and needs.adapter not in server.adapters):
            remarks.append(f"not used: {name}, {usable(server, needs)}")
        elif server.peer_id in view.slowness:
            remarks.append(f"slow: {name} takes {view.slowness[server.peer_id]:.1f} times what it announces")
    return ExplainedRoute(hops, route_costs(hops, needs, view), remarks)


def usable(server: Announcement, needs: Needs) -> str | None:
    """Return why a server cannot be part of the route, or None if it can."""
    if server.protocol_version != PROTOCOL_VERSION:
        return f"speaks protocol version {server.protocol_version} (ours is {PROTOCOL_VERSION})"
    if server.model_fingerprint != needs.fingerprint:
        return "serves another model"
    if server.peer_id in needs.false:
        return "was found to compute something else than its blocks"
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


class Roster:
    """The servers of a directory, as columns: made once, asked for many routes."""

    def __init__(self, servers: Iterable[Announcement] = ()) -> None:
        self.servers = sorted(servers, key=lambda server: server.peer_id)
        self.indices = {server.peer_id: index for index, server in enumerate(self.servers)}
        """Peer id -> its row."""
        self.start_S = self._integers("start")
        self.end_S = self._integers("end")
        self.max_session_tokens_S = self._integers("max_session_tokens")
        self.max_batch_tokens_S = self._integers("max_batch_tokens")
        self.max_batch_size_S = self._integers("max_batch_size")
        self.cache_free_tokens_S = self._integers("cache_free_tokens")
        length_S = self.end_S - self.start_S
        self.decode_s: Floats = (1 / (self._rates("decode_tokens_per_s") * length_S)).astype(np.float32)
        """[S], seconds for one block and one token of a session."""
        self.forward_s: Floats = (1 / (self._rates("forward_tokens_per_s") * length_S)).astype(np.float32)
        """[S], seconds for one block and one token of a batch."""
        self.has_place_S = np.array([each.coordinates is not None for each in self.servers], dtype=bool)
        places = [each.coordinates or _NOWHERE for each in self.servers]
        self.x_s: Floats = np.array([place.x_s for place in places], dtype=np.float32)
        self.y_s: Floats = np.array([place.y_s for place in places], dtype=np.float32)
        self.height_s: Floats = np.array([place.height_s for place in places], dtype=np.float32)
        direct_S = np.array([bool(each.direct) for each in self.servers], dtype=bool)
        self.handing_over_s: Floats = np.where(direct_S, HOP_COST_S, HOP_COST_S + TUNNEL_COST_S).astype(np.float32)
        self._speaking_S: dict[Needs, npt.NDArray[np.bool_]] = {}

    def _integers(self, name: str) -> Integers:
        return np.array([getattr(each, name) for each in self.servers], dtype=np.int64)

    def _rates(self, name: str) -> npt.NDArray[np.float64]:
        rates = [getattr(each, name) or DEFAULT_TOKENS_PER_S for each in self.servers]
        return np.array(rates, dtype=np.float64).clip(*TOKENS_PER_S)

    def usable(self, needs: Needs, avoid: Collection[str]) -> Indices:
        """The rows of those that can be part of a route, see `usable`, and are not to be avoided."""
        any_size = replace(needs, blocks=_ANY_BLOCKS, session_tokens=0, batch_tokens=0, batch_size=0)
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
        """The blocks that no usable server has."""
        rows = self.usable(needs, avoid)
        missing = set(needs.blocks)
        for start, end in {(int(self.start_S[row]), int(self.end_S[row])) for row in rows}:
            missing.difference_update(range(start, end))
        return missing


_ANY_BLOCKS = BlockRange(0, 1)

_NOWHERE = Coordinates(height_s=0.0)
"""An unknown place is taken to be in the middle of all: what is not known costs nothing."""


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
    rows = roster.usable(needs, view.avoid)
    row = roster.indices.get(prefer)
    if row is not None and row in rows and roster.servers[row].blocks.covers(needs.blocks):
        return [Hop(roster.servers[row], needs.blocks)]
    path = Graph(roster, rows, needs, view).shortest_path()
    if path is None:
        _check_session_tokens(roster.servers, needs)
        raise NoRoute(_explain_gap(roster.servers, needs, view.avoid))
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
    graph = Graph(roster, rows, needs, view or View())
    costs = []
    for index, hop in enumerate(hops):
        network_s = float(graph.enter_s[index])
        if needs.batch_tokens or index == 0:
            network_s += float(graph.client_s[index])
        else:
            network_s += float(graph.between_s(np.array([index - 1]), np.array([index]))[0, 0])
        if needs.batch_tokens or index == len(hops) - 1:
            network_s += float(graph.client_s[index])
        costs.append(HopCost(network_s, float(graph.block_s[index]) * len(hop.blocks)))
    return costs


class Graph:
    """Servers and what it costs to go between them and to run blocks on them."""

    def __init__(self, roster: Roster, rows_S: Indices, needs: Needs, view: View) -> None:
        self._blocks = needs.blocks
        self._returns_each_time = needs.batch_tokens > 0
        self._count_S = np.arange(len(rows_S))
        self._start_S = np.maximum(roster.start_S[rows_S], needs.blocks.start)
        self._end_S = np.minimum(roster.end_S[rows_S], needs.blocks.end)
        # One way is half of a round trip.
        places = (roster.x_s, roster.y_s, roster.height_s)
        self._x_s, self._y_s, self._height_s = (np.float32(0.5) * each[rows_S] for each in places)
        per_token_s = roster.forward_s if needs.batch_tokens else roster.decode_s
        slowness_S = _spread(roster, view.slowness, 1.0)
        num_tokens = np.float32(max(1, needs.batch_tokens))
        self.block_s: Floats = (per_token_s * slowness_S * num_tokens)[rows_S]
        """[S], seconds for one block."""
        enter_s: npt.NDArray[np.floating] = roster.handing_over_s
        if needs.batch_tokens:
            token_s = roster.forward_s * (roster.end_S - roster.start_S)
            enter_s = enter_s + token_s * slowness_S * _spread(roster, view.tokens_under_way, 0.0)
        else:
            full_S = roster.cache_free_tokens_S < needs.session_tokens
            full_S[[roster.indices[peer_id] for peer_id in view.holding if peer_id in roster.indices]] = False
            enter_s = enter_s + FULL_CACHE_COST_S * full_S
        self.enter_s: Floats = enter_s[rows_S].astype(np.float32)
        """[S], seconds for handing work to a server, without the way there: overheads, and what it has to do before."""
        rtts_s: Floats = np.zeros_like(roster.x_s)
        if view.here is not None:
            here = view.here
            ways_s = np.hypot(roster.x_s - here.x_s, roster.y_s - here.y_s) + roster.height_s + here.height_s
            rtts_s = np.where(roster.has_place_S, ways_s, 0).astype(np.float32)
        self.client_s: Floats = _spread(roster, view.rtts_s, rtts_s)[rows_S] * np.float32(0.5)
        """[S], seconds from the client to a server, or back."""

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
        arrived_s = self.client_s[running] + self.enter_s[running]
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
        ready_J = base_S[from_J] + block * self.block_s[from_J]
        if self._returns_each_time:
            back_J = ready_J - self._height_s[from_J] + self.client_s[from_J]
            best = int(back_J.argmin())
            arrived_I = back_J[best] + self.client_s[to_I]
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


def _check_session_tokens(servers: Sequence[Announcement], needs: Needs) -> None:
    """Raise PromptTooLong if the servers, also those that failed a moment ago, allow shorter sessions only."""
    any_length = replace(needs, session_tokens=0)
    fitting = [server for server in servers if usable(server, any_length) is None]
    limit = min(
        max((server.max_session_tokens for server in fitting if block in server.blocks), default=0)
        for block in needs.blocks
    )
    if 0 < limit < needs.session_tokens:
        raise PromptTooLong(
            f"a session of {needs.session_tokens} tokens was asked for, the servers of this model allow {limit}: "
            "use a smaller max_length"
        )


def _explain_gap(servers: Sequence[Announcement], needs: Needs, avoid: Collection[str]) -> str:
    missing = set(needs.blocks)
    reasons: dict[str, int] = {}
    for server in servers:
        reason = usable(server, needs)
        if reason is None and server.peer_id in avoid:
            reason = "failed a moment ago"
        if reason is None:
            missing -= set(server.blocks)
        else:
            reasons[reason] = reasons.get(reason, 0) + 1
    known = "; ".join(f"{count} known server{'s' * (count > 1)} {reason}" for reason, count in sorted(reasons.items()))
    where = f"block{'s' * (len(missing) > 1)} {describe_blocks(missing)}"
    if needs.adapter is not None:
        having = ", ".join(_called(server) for server in servers if needs.adapter in server.adapters)
        return (
            f"the adapter {needs.adapter} is not served for {where} of {needs.blocks}{f' ({known})' if known else ''}; "
            f"servers that have it: {having or 'none'}"
        )
    return (
        f"no server is available for {where} of {needs.blocks}{f' ({known})' if known else ''}: start a server for "
        "them with `swarm serve`"
    )


def _called(server: Announcement) -> str:
    return f"{server.blocks} at {server.server_name or 'peer'} ({server.peer_id[-8:]})"
