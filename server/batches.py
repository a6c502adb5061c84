"""Forward and Backward: batches through a range of blocks, no cache. What they compute, without any network.

Runs in the compute thread, in slices of rows, and lets others go first at every boundary between submodules.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from swarm.model.adapters import BlockAdapter
from swarm.model.dropout import Dropout
from swarm.model.edits import Adapters
from swarm.model.span import Span
from swarm.ranges import BlockRange
from swarm.rows import some_rows
from swarm.v1 import blocks_pb2 as pb

from .adapters import Lease
from .engine import Turns

# B batch, L length, D hidden, N blocks, P virtual tokens

MAX_KEPT_S = 120.0
"""How long activations wait for their Backward."""


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

    @property
    def changes(self) -> tuple[Adapters | None, int | None, int]:
        """What happens in the blocks beside the client's tensors."""
        adapters = None if self.adapters is None else self.adapters.adapters
        return adapters, self.dropout_seed, self.first_row

    @property
    def num_gradient_bytes(self) -> int:
        """What the answer to a Backward takes, uncompressed: `Gradients`."""
        tensors = [self.x_BLD] if self.prompts_NBPD is None else [self.x_BLD, self.prompts_NBPD]
        of_adapters = sum(tensor.numel() for tensor in _adapter_tensors(self)) * torch.float32.itemsize
        return sum(tensor.nbytes for tensor in tensors) + of_adapters

    def rows(self, start: int, end: int) -> Batch:
        """The sequences [start, end)."""
        return replace(
            self,
            x_BLD=self.x_BLD[start:end],
            mask_BL=some_rows(self.mask_BL, start, end),
            position_ids_BL=some_rows(self.position_ids_BL, start, end),
            prompts_NBPD=some_rows(self.prompts_NBPD, start, end, dim=1),
            grad_BLD=None if self.grad_BLD is None else self.grad_BLD[start:end],
            first_row=self.first_row + start,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Gradients:
    """What a Backward returns, on the CPU."""

    dx_BLD: Tensor
    dprompts_NBPD: Tensor | None
    dadapters: Sequence[Tensor]
    """float32: of all tensors of the adapters, block by block, in the order of their names."""


@dataclass(frozen=True, slots=True, eq=False)
class _Graph:
    """Some rows of a batch on their way through a span, ready for backward."""

    start: int
    end: int
    inputs: list[Tensor]
    """Hidden states, prompts if there are any, and the tensors of the adapters; leaves."""
    changes: tuple[Adapters | None, int | None, int]
    y_BLD: Tensor
    num_bytes: int
    """Without the adapters."""

    @property
    def adapters(self) -> list[BlockAdapter]:
        return [adapter for adapter in self.changes[0] or () if adapter is not None]

    def fits(self, batch: Batch) -> bool:
        """Whether the batch has the shapes of the one that this was made of, and the same changes."""
        part = batch.rows(self.start, self.end)
        shapes = [part.x_BLD.shape] + ([] if part.prompts_NBPD is None else [part.prompts_NBPD.shape])
        shapes += [tensor.shape for tensor in _adapter_tensors(part)]
        return self.changes == part.changes and shapes == [tensor.shape for tensor in self.inputs]


class KeptActivations:
    """Activations of recent Forward calls, within a budget, for the Backward that may follow; the oldest go first.

    They keep the adapters that they were computed with, which count once however many slices have them.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self.num_hits = 0
        """Slices whose activations did not have to be computed again."""
        self._kept: collections.OrderedDict[bytes, tuple[float, list[_Graph]]] = collections.OrderedDict()
        self._users: collections.Counter[BlockAdapter] = collections.Counter()
        """How many slices keep an adapter."""

    def room(self, num_bytes: int) -> bool:
        """Whether so much can be kept, were all else dropped."""
        return num_bytes <= self.max_bytes

    def keep(self, forward_id: bytes, graphs: list[_Graph], now_s: float) -> None:
        """Keep these until they are taken, drop what is too old or too much."""
        self._remove(forward_id)
        self._kept[forward_id] = now_s, graphs
        for graph in graphs:
            self.used_bytes += graph.num_bytes
            for adapter in graph.adapters:
                self.used_bytes += 0 if self._users[adapter] else adapter.num_bytes
                self._users[adapter] += 1
        while self._kept:
            oldest, (kept_s, _) = next(iter(self._kept.items()))
            if self.used_bytes <= self.max_bytes and now_s - kept_s <= MAX_KEPT_S:
                break
            self._remove(oldest)

    def take(self, forward_id: bytes) -> list[_Graph]:
        """Return what is kept of this Forward, and keep it no longer."""
        graphs = self._remove(forward_id)
        self.num_hits += len(graphs)
        return graphs

    def _remove(self, forward_id: bytes) -> list[_Graph]:
        _, graphs = self._kept.pop(forward_id, (0.0, []))
        for graph in graphs:
            self.used_bytes -= graph.num_bytes
            for adapter in graph.adapters:
                self._users[adapter] -= 1
                if not self._users[adapter]:
                    del self._users[adapter]
                    self.used_bytes -= adapter.num_bytes
        return graphs


def run_forward(span: Span, batch: Batch, turns: Turns, kept: KeptActivations) -> Tensor:
    """Return the hidden states that leave the span, [B, L, D], on the CPU."""
    graphs: list[_Graph] = []
    outputs, at = [], 0
    num_bytes = sum(adapter.num_bytes for adapter in {*(batch.changes[0] or ())} if adapter is not None)
    with _boundaries(span, turns):
        while at < batch.num_rows:
            end = min(batch.num_rows, at + turns.rows(batch.num_rows - at, batch.context_length))
            # What the next slice will take is not known; that of the last one is the best guess.
            expected = num_bytes + (graphs[-1].num_bytes if graphs else 0)
            if batch.forward_id and kept.room(expected):
                graphs.append(_graph(span, batch, at, end))
                num_bytes += graphs[-1].num_bytes
                outputs.append(graphs[-1].y_BLD.detach().cpu())
            else:
                with torch.inference_mode():
                    part = batch.rows(at, end)
                    outputs.append(_run_span(span, part, _on_device(span, part)).cpu())
            at = end
    if graphs:
        kept.keep(batch.forward_id, graphs, time.monotonic())
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def run_backward(span: Span, batch: Batch, grad_BLD: Tensor, turns: Turns, kept: KeptActivations) -> Gradients:
    """Return the gradients of the inputs, [B, L, D], of the prompts and of the adapters.

    Activations that the Forward of this batch has left here are used; the others are computed again.
    """
    graphs = collections.deque(graph for graph in kept.take(batch.forward_id) if graph.fits(batch))
    prompts = batch.prompts_NBPD
    dprompts = None if prompts is None else torch.zeros_like(prompts, dtype=torch.float32)
    dadapters = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in _adapter_tensors(batch)]
    gradients, at = [], 0
    with _boundaries(span, turns):
        while at < batch.num_rows:
            if graphs and graphs[0].start == at:
                graph = graphs.popleft()
            else:
                before = graphs[0].start if graphs else batch.num_rows
                graph = _graph(span, batch, at, min(before, at + turns.rows(before - at, batch.context_length)))
            dy_BLD = grad_BLD[at : graph.end].to(graph.y_BLD.device, graph.y_BLD.dtype)
            grads = torch.autograd.grad(graph.y_BLD, graph.inputs, dy_BLD, materialize_grads=True)
            gradients.append(grads[0].cpu())
            if dprompts is not None:
                rows = slice(at, graph.end) if dprompts.shape[1] > 1 else slice(None)
                dprompts[:, rows] += grads[1].cpu()
            for total, gradient in zip(dadapters, grads[len(grads) - len(dadapters) :], strict=True):
                total += gradient
            at = graph.end
            del graph, grads
    dx_BLD = gradients[0] if len(gradients) == 1 else torch.cat(gradients)
    dprompts = None if dprompts is None else dprompts.to(span.dtype)
    return Gradients(dx_BLD, dprompts, [total.cpu() for total in dadapters])


def _adapter_tensors(batch: Batch) -> list[Tensor]:
    """Those that get gradients."""
    adapters = batch.changes[0] or ()
    if batch.adapters is not None and batch.adapters.is_hosted:
        return []
    return [tensor for adapter in adapters if adapter is not None for tensor in adapter.tensors().values()]


def _on_device(span: Span, batch: Batch) -> list[Tensor]:
    """The tensors that gradients may be wanted of: hidden states, prompts if there are any, and those of adapters."""
    tensors = [batch.x_BLD] if batch.prompts_NBPD is None else [batch.x_BLD, batch.prompts_NBPD]
    return [tensor.to(span.device, span.dtype) for tensor in tensors] + _adapter_tensors(batch)


def _run_span(span: Span, batch: Batch, inputs: list[Tensor]) -> Tensor:
    device = span.device
    adapters, seed, first_row = batch.changes
    rest = inputs[1 if batch.prompts_NBPD is None else 2 :]
    if rest and adapters:
        tensors = iter(rest)
        adapters = [each and each.with_tensors([next(tensors) for _ in each.tensors()]) for each in adapters]
    return span(
        inputs[0],
        attention_mask_BT=None if batch.mask_BL is None else batch.mask_BL.to(device),
        position_ids_BL=None if batch.position_ids_BL is None else batch.position_ids_BL.to(device),
        prompts_NBPD=None if batch.prompts_NBPD is None else inputs[1],
        adapters=adapters,
        dropout=None if seed is None else Dropout(seed, first_row, batch.length),
    )


def _graph(span: Span, batch: Batch, start: int, end: int) -> _Graph:
    """Run forward on some rows, with all that backward needs."""
    part = batch.rows(start, end)
    known = [*span.parameters(), *span.buffers(), *_adapter_tensors(batch)]
    with torch.enable_grad(), _counting_saved(known) as saved:
        inputs = [tensor.detach().requires_grad_() for tensor in _on_device(span, part)]
        y_BLD = _run_span(span, part, inputs)
    return _Graph(start, end, inputs, part.changes, y_BLD, saved.num_bytes)


@dataclass(slots=True)
class _Saved:
    num_bytes: int = 0


@contextmanager
def _counting_saved(known: Sequence[Tensor]) -> Iterator[_Saved]:
    """Count the bytes that autograd keeps for backward, each storage once, those of known tensors not at all."""
    saved = _Saved()
    seen = {tensor.untyped_storage().data_ptr() for tensor in known}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            saved.num_bytes += storage.nbytes()
        return tensor.detach()  # the tensor itself may be the output of the node that keeps it: a cycle

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


@contextmanager
def _boundaries(span: Span, turns: Turns) -> Iterator[None]:
    """Call `turns.at_boundary` between the submodules of every block, on the way forward and on the way back."""

    def before(_module: nn.Module, _args: Any) -> None:
        turns.at_boundary()

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        y = output[0] if isinstance(output, tuple) else output
        if isinstance(y, Tensor) and y.requires_grad:
            y.register_hook(lambda _gradient: turns.at_boundary())

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
