"""Room for the activations that Backward needs: what is kept of Forward calls, and what is computed again, in budgets.

Room is found before a graph is built, and building ends where the room does (`autograd_graphs.build`). What a graph
takes is learned from the last one of its kind, so that batches can be cut into slices that fit.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from swarm.model.adapters import BlockAdapter

from .autograd_graphs import Graph

MAX_KEPT_S = 120.0
"""How long activations wait for their Backward."""

PROTECTED_S = 20.0
"""So long they are not dropped for others: whoever comes would gain no more than is lost."""

EXPIRY_PERIOD_S = 15.0
"""How often it is looked whether some are too old, without any traffic."""

MAX_KINDS = 256
"""Kinds of graphs whose size is remembered."""

SAFETY = 1.02
"""Graphs of one kind differ by little: allocators round, and blocks may differ."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The next slice of a batch: so many rows, through so many blocks at a time."""

    num_rows: int
    num_blocks: int


def cut(num_rows: int, num_blocks: int, row_bytes: float | None, state_bytes: int, room_bytes: int) -> Cut:
    """Return how to cut a batch so that the graph of a slice fits into a room.

    As many rows as fit go through all blocks; where not even one does, it goes through as many blocks at a time as fit
    beside the hidden states in front of the others.

    Args:
        num_rows: how many there are at most.
        num_blocks: that they still have to go through.
        row_bytes: what a graph of one row through one block takes; None: not known, so that one row shows it.
        state_bytes: hidden states of one row.
    """
    if row_bytes is None:
        return Cut(1, num_blocks)
    fitting = int(room_bytes // (row_bytes * num_blocks))
    if fitting:
        return Cut(min(num_rows, fitting), num_blocks)
    for count in range(num_blocks - 1, 1, -1):
        num_states = -(-num_blocks // count) - 1
        if count * row_bytes + num_states * state_bytes <= room_bytes:
            return Cut(1, count)
    return Cut(1, 1)


class GraphSizes:
    """What graphs take, learned from those that were built."""

    def __init__(self) -> None:
        self._row_bytes: collections.OrderedDict[Hashable, float] = collections.OrderedDict()

    def row_bytes(self, kind: Hashable) -> float | None:
        """Bytes for one row through one block; None: none of this kind was built yet."""
        return self._row_bytes.get(kind)

    def built(self, kind: Hashable, graph: Graph) -> None:
        """Learn from a graph."""
        self._learn(kind, SAFETY * graph.num_bytes / (graph.num_rows * graph.num_blocks))

    def exceeded(self, kind: Hashable, tried: Cut, num_bytes: int) -> None:
        """Learn that a graph took more than so much: how much more is not known, so the next one is half as large.

        Args:
            num_bytes: more than the room was, or the next one would be as large.
        """
        self._learn(kind, 2 * num_bytes / (tried.num_rows * tried.num_blocks))

    def _learn(self, kind: Hashable, row_bytes: float) -> None:
        self._row_bytes[kind] = row_bytes
        self._row_bytes.move_to_end(kind)
        if len(self._row_bytes) > MAX_KINDS:
            self._row_bytes.popitem(last=False)


@dataclass(slots=True, eq=False)
class _Forward:
    """What is kept of one Forward."""

    since_s: float
    graphs: list[Graph] = field(default_factory=list)


class KeptActivations:
    """Activations of recent Forward calls for the Backward that may follow, and room to compute others again.

    They keep the adapters that they were computed with, which count once however many slices have them. The compute
    thread keeps and takes, the event loop drops what is too old.

    Args:
        max_bytes: for what is kept.
        graph_bytes: for the graph that a Backward builds, beside that.
    """

    def __init__(self, max_bytes: int, graph_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.graph_bytes = graph_bytes
        self.sizes = GraphSizes()
        self.used_bytes = 0
        self.num_hits = 0
        """Slices whose activations did not have to be computed again."""
        self._kept: collections.OrderedDict[bytes, _Forward] = collections.OrderedDict()
        """The oldest first."""
        self._users: collections.Counter[BlockAdapter] = collections.Counter()
        """How many slices keep an adapter."""
        self._guard = threading.Lock()

    def make_room(self, num_bytes: float, now_s: float) -> None:
        """Drop what is too old; and what may be dropped for others, if so much can be kept then."""
        with self._guard:
            self._expire(now_s)
            protected = [each for each in self._kept.values() if now_s - each.since_s < PROTECTED_S]
            protected_bytes = sum(graph.num_bytes for each in protected for graph in each.graphs)
            if num_bytes > self.max_bytes - protected_bytes:
                return
            while self.used_bytes + num_bytes > self.max_bytes and len(self._kept) > len(protected):
                self._remove(next(iter(self._kept)))

    def free_bytes(self, adapters: Sequence[BlockAdapter | None]) -> int:
        """How large a graph can be that keeps these adapters."""
        with self._guard:
            more = sum(each.num_bytes for each in {*adapters} if each is not None and not self._users[each])
            return self.max_bytes - self.used_bytes - more

    def keep(self, forward_id: bytes, graph: Graph, now_s: float) -> None:
        """Keep the next slice of a Forward until it is taken. There must be room for it: `free_bytes`."""
        with self._guard:
            kept = self._kept.setdefault(forward_id, _Forward(now_s))
            kept.since_s = now_s
            self._kept.move_to_end(forward_id)
            kept.graphs.append(graph)
            self.used_bytes += graph.num_bytes
            for adapter in graph.adapters:
                self.used_bytes += 0 if self._users[adapter] else adapter.num_bytes
                self._users[adapter] += 1

    def take(self, forward_id: bytes) -> list[Graph]:
        """Return what is kept of this Forward, and keep it no longer."""
        with self._guard:
            graphs = self._remove(forward_id)
            self.num_hits += len(graphs)
            return graphs

    def drop(self, forward_id: bytes) -> None:
        """Keep nothing of this Forward."""
        with self._guard:
            self._remove(forward_id)

    def expire(self, now_s: float) -> None:
        """Drop what has waited too long."""
        with self._guard:
            self._expire(now_s)

    def _expire(self, now_s: float) -> None:
        while self._kept:
            oldest, kept = next(iter(self._kept.items()))
            if now_s - kept.since_s <= MAX_KEPT_S:
                break
            self._remove(oldest)

    def _remove(self, forward_id: bytes) -> list[Graph]:
        kept = self._kept.pop(forward_id, None)
        if kept is None:
            return []
        for graph in kept.graphs:
            self.used_bytes -= graph.num_bytes
            for adapter in graph.adapters:
                self._users[adapter] -= 1
                if not self._users[adapter]:
                    del self._users[adapter]
                    self.used_bytes -= adapter.num_bytes
        return kept.graphs
