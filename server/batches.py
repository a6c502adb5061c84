"""Forward and Backward: batches through a range of blocks, no cache. What they compute, without any network.

Runs in the compute thread, in slices whose graphs fit into the room that there is for them (activations.py).
"""

from __future__ import annotations

import collections
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swarm.errors import PromptTooLong
from swarm.model.narrow import narrow
from swarm.model.span import Span
from swarm.ranges import BlockRange
from swarm.rows import some_rows
from swarm.v1 import blocks_pb2 as pb

from .activations import Cut, KeptActivations, cut
from .adapters import Lease
from .autograd_graphs import Graph, Piece, TooLarge, build, pull, run
from .engine import Turns

# B batch, L length, D hidden, N blocks, P virtual tokens


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The tensors of one Forward or Backward, still on the CPU."""

    blocks: BlockRange
    x_BLD: Tensor
    mask_BL: Tensor | None
    position_ids_BL: Tensor | None
    prompts_NBPD: Tensor | None
    grad_BLD: Tensor | None
    codec: pb.Codec
    """How the hidden states came, or the gradients if there are some; the answer goes back like that."""
    forward_id: bytes = b""
    """Ties a Backward to its Forward; empty: the Forward keeps nothing."""
    adapters: Lease | None = None
    """What is changed in the blocks, already where the blocks are."""
    dropout_seed: int | None = None
    """None: nothing is dropped."""
    first_row: int = 0
    """Which sequence of the client's whole batch the first one is."""

    @property
    def num_rows(self) -> int:
        return self.x_BLD.shape[0]

    @property
    def length(self) -> int:
        return self.x_BLD.shape[1]

    @property
    def context_length(self) -> int:
        """Tokens that each sequence attends to, a prefix included."""
        return self.length + (0 if self.adapters is None else self.adapters.num_prefix_tokens)

    def rows(self, start: int, end: int) -> Piece:
        """The sequences [start, end)."""
        return Piece(
            x_BLD=self.x_BLD[start:end],
            mask_BL=some_rows(self.mask_BL, start, end),
            position_ids_BL=some_rows(self.position_ids_BL, start, end),
            prompts_NBPD=some_rows(self.prompts_NBPD, start, end, dim=1),
            adapters=None if self.adapters is None else self.adapters.adapters,
            learns=self.adapters is not None and not self.adapters.is_hosted,
            dropout_seed=self.dropout_seed,
            first_row=self.first_row + start,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Gradients:
    """What a Backward returns, on the CPU."""

    dx_BLD: Tensor
    dprompts_NBPD: Tensor | None
    """float32."""
    dadapters: Sequence[Tensor]
    """float32: of all tensors of the adapters, block by block, in the order of their names."""


def run_forward(span: Span, batch: Batch, turns: Turns, kept: KeptActivations) -> Tensor:
    """Return the hidden states that leave the span, [B, L, D], on the CPU.

    Where a Backward may follow, the activations of as many rows are kept as there is room for.
    """
    outputs, at = [], 0
    kept.drop(batch.forward_id)
    keeps, finished = bool(batch.forward_id), False
    try:
        while at < batch.num_rows:
            num_rows = turns.rows(batch.num_rows - at, batch.context_length)
            graph = _keep(span, batch, at, num_rows, turns, kept) if keeps else None
            if graph is not None:
                y_BLD, at = graph.y_BLD.detach(), graph.end
            else:
                keeps = False
                y_BLD, at = run(span, batch.rows(at, at + num_rows), turns), at + num_rows
            outputs.append(y_BLD.cpu())
        finished = True
    finally:
        if not finished:
            kept.drop(batch.forward_id)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _keep(span: Span, batch: Batch, start: int, num_rows: int, turns: Turns, kept: KeptActivations) -> Graph | None:
    """Run at most so many rows and keep their activations; None: there is no room for any."""
    sizes, num_blocks = kept.sizes, len(span.blocks)
    while True:
        piece = batch.rows(start, start + num_rows)
        row_bytes = sizes.row_bytes(piece.kind)
        if row_bytes is not None:
            kept.make_room((batch.num_rows - start) * row_bytes * num_blocks, time.monotonic())
        room_bytes = kept.free_bytes(piece.adapters or ())
        chosen = cut(num_rows, num_blocks, row_bytes, 0, room_bytes)
        if room_bytes <= 0 or chosen.num_blocks < num_blocks:
            return None
        piece = batch.rows(start, start + chosen.num_rows)
        try:
            graph = build(span, piece, start, turns, room_bytes=room_bytes)
        except TooLarge as exc:
            sizes.exceeded(piece.kind, chosen, exc.num_bytes)
            continue
        sizes.built(piece.kind, graph)
        kept.keep(batch.forward_id, graph, time.monotonic())
        return graph


def run_backward(span: Span, batch: Batch, grad_BLD: Tensor, turns: Turns, kept: KeptActivations) -> Gradients:
    """Return the gradients of the inputs, [B, L, D], of the prompts and of the adapters.

    Activations that the Forward of this batch has left here are used; the others are computed again, in slices.

    Raises: PromptTooLong: those of one sequence in one block take more than there is room for.
    """
    graphs = collections.deque(
        graph for graph in kept.take(batch.forward_id) if graph.fits(batch.rows(graph.start, graph.end))
    )
    sums, at = _Sums(batch, span.dtype), 0
    while at < batch.num_rows:
        if graphs and graphs[0].start == at:
            graph = graphs.popleft()
            at = graph.end
            sums.add(graph, 0, pull(graph, grad_BLD[graph.start : at], turns))
            del graph
        else:
            before = graphs[0].start if graphs else batch.num_rows
            num_rows = turns.rows(before - at, batch.context_length)
            at = _Slice(span, batch, at, turns, kept).pull(num_rows, grad_BLD, sums)
    return sums.gradients()


class _Sums:
    """The gradients of a batch, from those of its slices."""

    def __init__(self, batch: Batch, dtype: torch.dtype) -> None:
        self._dx_BLD = torch.empty(batch.x_BLD.shape, dtype=dtype)
        prompts = batch.prompts_NBPD
        self._dprompts = None if prompts is None else torch.zeros_like(prompts, dtype=torch.float32)
        piece, numbers = batch.rows(0, batch.num_rows), range(len(batch.blocks))
        leaves = [piece.through(piece.x_BLD, number, number + 1).leaves() for number in numbers]
        self._dadapters = [[torch.zeros_like(each, dtype=torch.float32) for each in of_block] for of_block in leaves]

    def add(self, graph: Graph, first_block: int, grads: Sequence[Tensor]) -> None:
        """Add the gradients of a graph's inputs; those of its hidden states count if it begins at the first block."""
        rows, end = slice(graph.start, graph.end), first_block + graph.num_blocks
        if not first_block:
            self._dx_BLD[rows] = grads[0]
        if self._dprompts is not None:
            self._dprompts[first_block:end, rows if self._dprompts.shape[1] > 1 else slice(None)] += grads[1].cpu()
        totals = [total for of_block in self._dadapters[first_block:end] for total in of_block]
        for total, gradient in zip(totals, grads[len(grads) - len(totals) :], strict=True):
            total += gradient

    def gradients(self) -> Gradients:
        dadapters = [total.cpu() for of_block in self._dadapters for total in of_block]
        return Gradients(self._dx_BLD, self._dprompts, dadapters)


class _Slice:
    """Some rows whose activations are computed again: at once, or a row in several parts of the span."""

    def __init__(self, span: Span, batch: Batch, start: int, turns: Turns, kept: KeptActivations) -> None:
        self._span = span
        self._batch = batch
        self._start = start
        self._turns = turns
        self._kept = kept
        self._states: dict[int, Tensor] = {}
        """Block of the span -> what enters it, of the first row; where a part begins."""

    def pull(self, num_rows: int, grad_BLD: Tensor, sums: _Sums) -> int:
        """Add the gradients of at most so many rows; return the end of those that it were.

        Raises: PromptTooLong: there is not room for one row in one block.
        """
        end_block, dy_BLD = len(self._span.blocks), grad_BLD
        while True:
            chosen = self._cut(num_rows, end_block)
            graph, first_block = self._graph(chosen, end_block)
            if graph is None:
                continue
            if end_block == len(self._span.blocks):
                num_rows = graph.num_rows
                dy_BLD = grad_BLD[graph.start : graph.end]
            grads = pull(graph, dy_BLD, self._turns)
            sums.add(graph, first_block, grads)
            if not first_block:
                return graph.end
            dy_BLD, end_block = grads[0], first_block
            del graph, grads

    def _cut(self, num_rows: int, num_blocks: int) -> Cut:
        piece = self._batch.rows(self._start, self._start + 1)
        row_bytes = self._kept.sizes.row_bytes(piece.kind)
        state_bytes = piece.x_BLD.numel() * self._span.dtype.itemsize
        return cut(num_rows, num_blocks, row_bytes, state_bytes, self._kept.graph_bytes)

    def _graph(self, chosen: Cut, end_block: int) -> tuple[Graph | None, int]:
        """The graph of the last of some blocks, and the first of them; None: it took more than was expected."""
        first_block = end_block - chosen.num_blocks
        piece = self._batch.rows(self._start, self._start + chosen.num_rows)
        part = piece.through(self._state(piece, first_block, chosen.num_blocks), first_block, end_block)
        states_bytes = sum(state.nbytes for number, state in self._states.items() if number <= first_block)
        room_bytes = self._kept.graph_bytes - states_bytes
        try:
            graph = build(self._part(first_block, end_block), part, self._start, self._turns, room_bytes=room_bytes)
        except TooLarge as exc:
            if chosen == Cut(1, 1):
                raise self._refusal(exc.num_bytes) from None
            self._kept.sizes.exceeded(piece.kind, chosen, exc.num_bytes)
            return None, first_block
        self._kept.sizes.built(piece.kind, graph)
        self._states = {number: state for number, state in self._states.items() if number < first_block}
        return graph, first_block

    def _state(self, piece: Piece, block: int, num_blocks: int) -> Tensor:
        """What enters a block; on the way there, parts of so many blocks leave theirs."""
        if not block:
            return piece.x_BLD
        at = max((number for number in self._states if number <= block), default=0)
        x_BLD = self._states.get(at, piece.x_BLD)
        while at < block:
            end = at + (block - at - 1) % num_blocks + 1
            x_BLD = run(self._part(at, end), piece.through(x_BLD, at, end), self._turns)
            self._states[end] = x_BLD
            at = end
        return x_BLD

    def _part(self, start: int, end: int) -> Span:
        if end - start == len(self._span.blocks):
            return self._span
        first = self._span.blocks.start
        return narrow(self._span, BlockRange(first + start, first + end))

    def _refusal(self, num_bytes: int) -> PromptTooLong:
        return PromptTooLong(
            f"the gradients of a sequence of {self._batch.context_length} tokens need more than {num_bytes >> 20} MiB "
            f"for the activations of one block, this server has {self._kept.graph_bytes >> 20} MiB: "
            "use shorter sequences"
        )
