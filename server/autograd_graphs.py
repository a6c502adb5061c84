"""Some rows of a batch on their way through some blocks, with or without what Backward needs: graphs of bounded size.

Runs in the compute thread, and lets others go first at every boundary between submodules.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from swarm.model.adapters import BlockAdapter
from swarm.model.dropout import Dropout
from swarm.model.edits import Adapters
from swarm.model.span import Span

from .engine import Turns

# B batch, L length, D hidden, N blocks, P virtual tokens


class TooLarge(Exception):
    """Raised out of a forward pass whose graph takes more than its room; nothing of it is left."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__(f"a graph took more than {num_bytes} bytes")
        self.num_bytes = num_bytes


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Some rows of a batch and what is changed for them in some blocks."""

    x_BLD: Tensor
    """What enters the first of these blocks; anywhere, in any dtype."""
    mask_BL: Tensor | None
    position_ids_BL: Tensor | None
    prompts_NBPD: Tensor | None
    adapters: Adapters | None
    """Where the blocks are."""
    learns: bool
    """Whether gradients of the adapters are wanted."""
    dropout_seed: int | None
    first_row: int
    """Which sequence of the client's whole batch the first one is."""

    @property
    def changes(self) -> tuple[Adapters | None, int | None, int]:
        """What happens in the blocks beside the client's tensors."""
        return self.adapters, self.dropout_seed, self.first_row

    @property
    def kind(self) -> Hashable:
        """Pieces of one kind have graphs of one size for each row and block."""
        names = [None if each is None else tuple(change.name for change in each) for each in self.adapters or ()]
        shape = self.x_BLD.shape[1], self.mask_BL is None, self.prompts_NBPD is None, self.dropout_seed is None
        return shape, self.learns, tuple(names)

    def leaves(self) -> list[Tensor]:
        """The tensors of the adapters that gradients are wanted of."""
        wanted = (self.adapters or ()) if self.learns else ()
        return [tensor for adapter in wanted if adapter is not None for tensor in adapter.tensors().values()]

    def through(self, x_BLD: Tensor, start: int, end: int) -> Piece:
        """The same rows on their way through the blocks [start, end), counted from the first of these."""
        prompts, adapters = self.prompts_NBPD, self.adapters
        return replace(
            self,
            x_BLD=x_BLD,
            prompts_NBPD=None if prompts is None else prompts[start:end],
            adapters=None if adapters is None else adapters[start:end],
        )


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """A piece on its way through its blocks, ready for backward."""

    start: int
    """Its rows in the batch."""
    end: int
    num_blocks: int
    inputs: list[Tensor]
    """Hidden states, prompts if there are any, and the tensors of the adapters; leaves."""
    changes: tuple[Adapters | None, int | None, int]
    y_BLD: Tensor
    num_bytes: int
    """Without the adapters."""

    @property
    def num_rows(self) -> int:
        return self.end - self.start

    @property
    def adapters(self) -> list[BlockAdapter]:
        return [adapter for adapter in self.changes[0] or () if adapter is not None]

    def fits(self, piece: Piece) -> bool:
        """Whether a piece has the shapes of the one that this was made of, and the same changes."""
        shapes = [piece.x_BLD.shape] + ([] if piece.prompts_NBPD is None else [piece.prompts_NBPD.shape])
        shapes += [tensor.shape for tensor in piece.leaves()]
        return self.changes == piece.changes and shapes == [tensor.shape for tensor in self.inputs]


def run(span: Span, piece: Piece, turns: Turns) -> Tensor:
    """Return the hidden states that leave the span, [B, L, D], on its device, and keep nothing."""
    with torch.inference_mode(), _boundaries(span, turns):
        tensors = [piece.x_BLD] if piece.prompts_NBPD is None else [piece.x_BLD, piece.prompts_NBPD]
        return _run_span(span, piece, [tensor.to(span.device, span.dtype) for tensor in tensors])


def build(span: Span, piece: Piece, start: int, turns: Turns, *, room_bytes: int) -> Graph:
    """Run forward on a piece, with all that backward needs.

    Args:
        start: its first row in the batch.
    Raises: TooLarge: that takes more than `room_bytes`; it was noticed as soon as it did.
    """
    tensors = [piece.x_BLD] if piece.prompts_NBPD is None else [piece.x_BLD, piece.prompts_NBPD]
    # Copies, for a row would keep the whole batch that it is a part of.
    inputs = [tensor.to(span.device, span.dtype, copy=True) for tensor in tensors] + piece.leaves()
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    of_adapters = [tensor for each in piece.adapters or () if each is not None for tensor in each.tensors().values()]
    known = [*span.parameters(), *span.buffers(), *of_adapters, *inputs]
    own_bytes = sum(tensor.nbytes for tensor in inputs[: len(tensors)]) + inputs[0].nbytes
    with torch.enable_grad(), _boundaries(span, turns), _counting_saved(known, own_bytes, room_bytes) as saved:
        y_BLD = _run_span(span, piece, inputs)
    num_rows, num_bytes = piece.x_BLD.shape[0], saved.num_bytes
    return Graph(start, start + num_rows, len(span.blocks), inputs, piece.changes, y_BLD, num_bytes)


def pull(graph: Graph, dy_BLD: Tensor, turns: Turns) -> tuple[Tensor, ...]:
    """Return the gradients of a graph's inputs, on its device, given that of its output."""
    turns.at_boundary()
    dy_BLD = dy_BLD.to(graph.y_BLD.device, graph.y_BLD.dtype)
    with torch.autograd.set_multithreading_enabled(False):  # in this thread, on CUDA devices too
        return torch.autograd.grad(graph.y_BLD, graph.inputs, dy_BLD, materialize_grads=True)


def _run_span(span: Span, piece: Piece, inputs: Sequence[Tensor]) -> Tensor:
    """Run the span on inputs that stand for those of the piece: hidden states, prompts, tensors of adapters."""
    device, adapters, seed = span.device, piece.adapters, piece.dropout_seed
    rest = inputs[1 if piece.prompts_NBPD is None else 2 :]
    if rest and adapters:
        tensors = iter(rest)
        adapters = [each and each.with_tensors([next(tensors) for _ in each.tensors()]) for each in adapters]
    return span(
        inputs[0],
        attention_mask_BT=None if piece.mask_BL is None else piece.mask_BL.to(device),
        position_ids_BL=None if piece.position_ids_BL is None else piece.position_ids_BL.to(device),
        prompts_NBPD=None if piece.prompts_NBPD is None else inputs[1],
        adapters=adapters,
        dropout=None if seed is None else Dropout(seed, piece.first_row, inputs[0].shape[1]),
    )


@dataclass(slots=True)
class _Saved:
    num_bytes: int


@contextmanager
def _counting_saved(known: Sequence[Tensor], own_bytes: int, room_bytes: int) -> Iterator[_Saved]:
    """Add the bytes that autograd keeps for backward to some, each storage once, those of known tensors not at all.

    Raises, from the operation that keeps it: TooLarge: they are more than `room_bytes`.
    """
    saved = _Saved(own_bytes)
    seen = {tensor.untyped_storage().data_ptr() for tensor in known}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            saved.num_bytes += storage.nbytes()
            if saved.num_bytes > room_bytes:
                raise TooLarge(saved.num_bytes)
        return tensor.detach()  # the tensor itself may be the output of the node that keeps it: a cycle

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


@contextmanager
def _boundaries(span: Span, turns: Turns) -> Iterator[None]:
    """Call `turns.at_boundary` between the submodules of every block, on the way forward and on the way back."""

    def before(_module: nn.Module, _args: Any) -> None:
        turns.at_boundary()

    def on_the_way_back(_gradient: Tensor) -> None:
        turns.at_boundary()

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        y = output[0] if isinstance(output, tuple) else output
        if isinstance(y, Tensor) and y.requires_grad:
            y.register_hook(on_the_way_back)

    handles = []
    for layer in span.layers:
        for child in layer.children():
            if next(child.parameters(), None) is not None or next(child.buffers(), None) is not None:
                handles += [child.register_forward_pre_hook(before), child.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
