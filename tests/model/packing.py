"""Compare packed execution with one sequence at a time: mixed lengths, prefill and decode in one row, scattered slots,
left padding, deep prompts, windows shorter than the context, a part of the blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from tiny_configs import tiny_config
from torch import Tensor
from transformers import PretrainedConfig

from swarm.model.anatomy import anatomy_of, base_class_of
from swarm.model.cutting import renumber, span_class
from swarm.model.edits import Adapters
from swarm.model.kv_store import KVStore, kv_layout
from swarm.model.narrow import narrow
from swarm.model.ragged import PackedSpan, Piece
from swarm.model.span import Span
from swarm.model.span_cache import SpanCache
from swarm.ranges import BlockRange

NUM_SLOTS = 96


def make_span(config: PretrainedConfig, blocks: BlockRange | None = None) -> Span:
    """Some blocks with random weights, each disturbed so that none has a value that hides its absence."""
    torch.manual_seed(0)
    anatomy = anatomy_of(config)
    blocks = blocks or BlockRange(0, anatomy.num_blocks)
    model = span_class(base_class_of(config), anatomy, blocks)(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    renumber(model, anatomy, blocks)
    return Span(model, anatomy, blocks)


@dataclass
class History:
    """One sequence twice: in a cache of its own, and in slots of a store."""

    span: Span
    slots: list[int]
    """In the order of its tokens."""
    padding: int = 0
    prompts_NPD: Tensor | None = None
    adapters: Adapters | None = None
    length: int = 0
    cache: SpanCache = field(init=False)

    def __post_init__(self) -> None:
        self.cache = self.span.new_cache(1)

    def take(self, x_LD: Tensor) -> tuple[Piece, Tensor]:
        """The piece for these tokens, and what they give one sequence at a time."""
        position, length = self.length, len(x_LD)
        self.length += length
        mask = torch.arange(self.length) >= self.padding if self.padding else None
        ids = (torch.arange(position, self.length) - self.padding).clamp(min=0) if self.padding else None
        prompts = None if self.prompts_NPD is None else self.prompts_NPD.unsqueeze(1)
        expected = self.span(
            x_LD.unsqueeze(0),
            cache=self.cache,
            attention_mask_BT=None if mask is None else mask.long().unsqueeze(0),
            position_ids_BL=None if ids is None else ids.unsqueeze(0),
            prompts_NBPD=prompts,
            adapters=self.adapters,
        )[0]
        piece = Piece(length, position, runs_of(self.slots[: self.length]), ids, mask, self.prompts_NPD, self.adapters)
        expected[: max(0, self.padding - position)] = torch.nan  # nobody looks at what padding gives
        return piece, expected


def runs_of(slots: Sequence[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for slot in slots:
        if runs and runs[-1][1] == slot:
            runs[-1] = (runs[-1][0], slot + 1)
        else:
            runs.append((slot, slot + 1))
    return runs


STEPS: list[list[tuple[int, int]]] = [
    [(0, 9), (3, 5)],
    [(1, 1), (0, 1), (3, 8), (2, 8)],
    [(3, 1), (2, 1), (1, 1), (0, 1)],
    [(0, 1), (1, 1), (2, 1), (3, 1)],
    [(1, 1)],
    [(2, 1), (0, 3), (1, 1)],
    [(0, 1), (1, 5), (2, 2), (3, 1)],
    [(0, 1), (1, 1), (3, 1)],
]
"""Rows: which sequence takes how many tokens."""


def packing_error(model_type: str, blocks: BlockRange) -> float:
    """How far packed results are from those of one sequence at a time, over a mixed history of four sequences."""
    whole = make_span(tiny_config(model_type))
    span = narrow(whole, blocks)
    store = KVStore(kv_layout(whole), NUM_SLOTS)
    for number in whole.blocks:
        for heads in store.block(number):
            heads.fill_(torch.nan)  # what is read without having been written shows
    packed = PackedSpan(span, store)
    size = span.hidden_size
    sequences = [
        History(span, [*range(40, 46), *range(10, 30)], prompts_NPD=torch.randn(len(blocks), 11, size)),
        History(span, list(range(60, 80))),
        History(span, list(range(80, 96)), padding=3),
        History(span, [*range(0, 10), *range(30, 40)], prompts_NPD=torch.randn(len(blocks), 2, size)),
    ]
    error = 0.0
    for step in STEPS:
        pieces, inputs, expected = [], [], []
        for number, length in step:
            x_LD = torch.randn(length, size)
            with torch.no_grad():
                piece, y_LD = sequences[number].take(x_LD)
            pieces.append(piece)
            inputs.append(x_LD)
            expected.append(y_LD)
        ours, theirs = packed(torch.cat(inputs), pieces), torch.cat(expected)
        seen = ~theirs.isnan().any(-1)
        error = max(error, float((ours - theirs)[seen].abs().max())) if ours.isfinite().all() else torch.inf
    return error


def page_by_page(
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
    num_splits: int,
) -> Tensor:
    """What `varlen_attn` says it does with a block table, by the plainest means."""
    assert query.is_contiguous() and key.stride(-1) == 1 and num_splits >= 1
    assert all(t.dtype == torch.int32 for t in (cu_seq_q, cu_seq_k, seqused_k, block_table))
    assert enable_gqa == (query.shape[1] != key.shape[2])
    assert cu_seq_k.diff().tolist() == [block_table.shape[1] * key.shape[1]] * len(seqused_k)
    left, right = window_size
    assert right == 0 or (left, right) == (-1, -1)
    outputs = []
    for start, end, num_keys, pages in zip(cu_seq_q, cu_seq_q[1:], seqused_k, block_table, strict=False):
        assert end - start <= max_q and num_keys <= max_k
        keys, values = (
            pool[pages].flatten(0, 1)[:num_keys].repeat_interleave(query.shape[1] // key.shape[2], 1).transpose(0, 1)
            for pool in (key, value)
        )
        products = query[start:end].transpose(0, 1) @ keys.transpose(1, 2)
        products = products * (query.shape[2] ** -0.5 if scale is None else scale)
        diagonal = int(num_keys - (end - start))
        seen = torch.ones_like(products[0], dtype=torch.bool)
        seen = seen.tril(diagonal) if right == 0 else seen
        seen = seen.triu(diagonal - left) if left >= 0 else seen
        weights = products.masked_fill(~seen, -math.inf).softmax(-1)
        outputs.append((weights @ values).transpose(0, 1))
    return torch.cat(outputs)
