"""Attention of a packed row on CUDA: kernel calls for all pieces, which read the KV store by pages.

The kernel is `torch.nn.attention.varlen.varlen_attn` with a block table. Whether it computes here what `RowAttention`
does is found out when blocks are loaded, by running both. It has not been run on a GPU yet.

Single tokens, of sequences that decode, have a call of their own: the kernel then takes the query heads of a key/value
head together, and divides long sequences among its blocks of threads. It does so at the same tokens in every call, so
that what a sequence gives does not depend on those that it shares a pass with.
"""

# T tokens of the row, B sequences, P pages, S slots, N key/value heads, M query heads, H head dim

from __future__ import annotations

import dataclasses
import inspect
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import sliding_window_causal_mask_function

from swarm.model.attention import RowAttention
from swarm.model.kv_store import KVLayout, KVShape, KVStore
from swarm.model.pieces import Piece
from swarm.model.singles import Scores
from swarm.ranges import BlockRange

logger = logging.getLogger(__name__)

PAGE_TOKENS = 256
"""The kernel that comes with torch (FlashAttention 2) reads pages of a multiple of this."""
MAX_HEAD_DIM = 256
HALF = (torch.float16, torch.bfloat16)
LEAST_CAPABILITY = (8, 0)
"""FlashAttention 2 is for Ampere and later."""

SINGLE_SPLITS = 8
"""Into how many parts the longest possible sequence is divided, for single tokens. Not measured yet."""

_ALLOWED_ERROR = 0.02
"""How far what the kernel gives may be from RowAttention, relative to it: both round to 8 bits."""

Kernel = Callable[..., Any]
"""`varlen_attn`, or what stands for it in tests."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Some tokens of a row, whose attention is one call of the kernel."""

    cu_seq_q: Tensor
    """[B + 1], int32: where each piece begins among these tokens."""
    cu_seq_k: Tensor
    """[B + 1], int32: where each sequence would begin if its pages were laid end to end."""
    seqused_k: Tensor
    """[B], int32: tokens of each sequence."""
    block_table: Tensor
    """[B, P], int32: the pages of each sequence; 0 beyond its last one."""
    rows_T: Tensor | None
    """int64: where these tokens are in the row; None: they are all of it."""
    max_q: int
    max_k: int
    num_splits: int

    @property
    def tensors(self) -> list[Tensor]:
        found = (self.cu_seq_q, self.cu_seq_k, self.seqused_k, self.block_table, self.rows_T)
        return [tensor for tensor in found if tensor is not None]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Part:
        """The same with other tensors, such as those on the device."""
        names = ("cu_seq_q", "cu_seq_k", "seqused_k", "block_table", "rows_T")[: len(tensors)]
        return dataclasses.replace(self, **dict(zip(names, tensors, strict=True)))  # type: ignore[arg-type]

    def arguments(
        self, q_1MTH: Tensor, keys_1NSH: Tensor, values_1NSH: Tensor, scaling: float | None, window: int | None
    ) -> dict[str, Any]:
        """What the kernel is called with; the queries are those of these tokens.

        Args:
            window: how many tokens each one sees, itself included; None: all before it.
        """
        # A single token sees all: said like that, the kernel may take the heads together and divide the sequence.
        sees_all = (-1, -1) if self.max_q == 1 else (-1, 0)
        return {
            "query": q_1MTH[0].transpose(0, 1).contiguous(),
            "key": as_pages(keys_1NSH),
            "value": as_pages(values_1NSH),
            "cu_seq_q": self.cu_seq_q,
            "cu_seq_k": self.cu_seq_k,
            "max_q": self.max_q,
            "max_k": self.max_k,
            "scale": scaling,
            "window_size": sees_all if window is None else (window - 1, 0),
            "enable_gqa": q_1MTH.shape[1] != keys_1NSH.shape[1],
            "seqused_k": self.seqused_k,
            "block_table": self.block_table,
            "num_splits": self.num_splits if window is None else 1,
        }


@dataclass(frozen=True, slots=True, eq=False)
class PagedRow:
    """How the attention of a row is computed: in calls of the kernel, and without it for what it cannot read."""

    parts: Sequence[Part]
    rest: Sequence[Piece]
    """Pieces with padding, or off whole pages."""
    rest_rows_T: Tensor | None
    """int64: where their tokens are in the row; None: there are none."""
    kernel: Kernel

    @property
    def tensors(self) -> list[Tensor]:
        """All that has to be on the device."""
        found = [tensor for part in self.parts for tensor in part.tensors]
        return found if self.rest_rows_T is None else [*found, self.rest_rows_T]

    def with_tensors(self, tensors: Sequence[Tensor]) -> PagedRow:
        """The same with those on the device."""
        left = iter(tensors)
        parts = [part.with_tensors([next(left) for _ in part.tensors]) for part in self.parts]
        rest_rows_T = None if self.rest_rows_T is None else next(left)
        return dataclasses.replace(self, parts=parts, rest_rows_T=rest_rows_T)

    def attend(
        self,
        q_1MTH: Tensor,
        keys_1NSH: Tensor,
        values_1NSH: Tensor,
        scaling: float | None,
        window: int | None,
        attend_rest: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Return [1, T, M, H].

        Args:
            attend_rest: [1, M, T, H] of the tokens of `rest` to their [1, T, M, H].
        """

        def call(part: Part, q_1MTH: Tensor) -> Tensor:
            out_TMH: Tensor = self.kernel(**part.arguments(q_1MTH, keys_1NSH, values_1NSH, scaling, window))
            return out_TMH

        if len(self.parts) == 1 and self.parts[0].rows_T is None:
            return call(self.parts[0], q_1MTH).unsqueeze(0)
        out_TMH = q_1MTH.new_empty(q_1MTH.shape[2], q_1MTH.shape[1], q_1MTH.shape[3])
        for part in self.parts:
            assert part.rows_T is not None
            out_TMH.index_copy_(0, part.rows_T, call(part, q_1MTH.index_select(2, part.rows_T)))
        if self.rest_rows_T is not None:
            rest_TMH = attend_rest(q_1MTH.index_select(2, self.rest_rows_T))[0]
            out_TMH.index_copy_(0, self.rest_rows_T, rest_TMH)
        return out_TMH.unsqueeze(0)


class Pager:
    """Plans rows over one store."""

    def __init__(self, store: KVStore, kernel: Kernel) -> None:
        """Ask for one by `open_pager`, which knows whether the kernel can be used."""
        self._num_pages = store.num_slots // PAGE_TOKENS
        self._kernel = kernel

    def over(self, store: KVStore) -> Pager:
        """The same over another store of the same layout."""
        return Pager(store, self._kernel)

    def pages(self, piece: Piece) -> list[int] | None:
        """The pages of a piece's sequence, in order; None: it has padding, or does not lie on whole pages."""
        pages = None if piece.key_mask_T is not None else _pages(piece)
        return None if pages is None or max(pages) >= self._num_pages else pages

    def plan(self, pieces: Sequence[Piece]) -> PagedRow:
        """Divide the pieces of a row among single tokens, longer pieces and the rest; tensors are on the CPU."""
        kinds: dict[str, list[tuple[int, Piece, list[int]]]] = {"single": [], "longer": [], "rest": []}
        starts = itertools.accumulate((piece.length for piece in pieces), initial=0)
        for start, piece in zip(starts, pieces, strict=False):
            pages = self.pages(piece)
            kind = "rest" if pages is None else "single" if piece.length == 1 else "longer"
            kinds[kind].append((start, piece, pages or []))
        rest = kinds.pop("rest")
        found = [each for each in kinds.values() if each]
        is_whole = len(found) == 1 and not rest
        return PagedRow(
            parts=[self._part(each, None if is_whole else _rows(each)) for each in found],
            rest=[piece for _, piece, _ in rest],
            rest_rows_T=_rows(rest) if rest else None,
            kernel=self._kernel,
        )

    def single_tokens(self, seqused_k: Tensor, block_table: Tensor) -> PagedRow:
        """A row of single tokens, whose pages are written where these tensors are; what else it needs, on the CPU."""
        num_rows, num_pages = block_table.shape
        ends_k = range(0, (num_rows + 1) * num_pages * PAGE_TOKENS, num_pages * PAGE_TOKENS)
        part = Part(
            cu_seq_q=_int32(range(num_rows + 1)),
            cu_seq_k=_int32(ends_k),
            seqused_k=seqused_k,
            block_table=block_table,
            rows_T=None,
            max_q=1,
            max_k=self._num_pages * PAGE_TOKENS,
            num_splits=SINGLE_SPLITS,
        )
        return PagedRow([part], [], None, self._kernel)

    def _part(self, found: Sequence[tuple[int, Piece, list[int]]], rows_T: Tensor | None) -> Part:
        lengths = [piece.length for _, piece, _ in found]
        tables = [pages for _, _, pages in found]
        width = max(map(len, tables))
        table = _int32([pages + [0] * (width - len(pages)) for pages in tables])
        row = self.single_tokens(_int32([piece.num_keys for _, piece, _ in found]), table).parts[0]
        if max(lengths) == 1:
            return dataclasses.replace(row, rows_T=rows_T)
        cu_seq_q = _int32([0, *itertools.accumulate(lengths)])
        return dataclasses.replace(row, rows_T=rows_T, cu_seq_q=cu_seq_q, max_q=max(lengths), num_splits=1)


def _int32(numbers: Sequence[object]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def _rows(found: Sequence[tuple[int, Piece, list[int]]]) -> Tensor:
    return torch.tensor([row for start, piece, _ in found for row in range(start, start + piece.length)])


def _pages(piece: Piece) -> list[int] | None:
    """The pages of a sequence, in order; None if a run begins or goes on in the middle of one."""
    *full, (last_start, _) = piece.runs
    if last_start % PAGE_TOKENS or any(start % PAGE_TOKENS or end % PAGE_TOKENS for start, end in full):
        return None
    return [page for start, end in piece.runs for page in range(start // PAGE_TOKENS, -(-end // PAGE_TOKENS))]


def as_pages(heads_1NSH: Tensor) -> Tensor:
    """Keys or values of one block as [P, PAGE_TOKENS, N, H], without copying."""
    heads_SNH = heads_1NSH[0].transpose(0, 1)
    num_pages = heads_SNH.shape[0] // PAGE_TOKENS
    return heads_SNH.narrow(0, 0, num_pages * PAGE_TOKENS).unflatten(0, (num_pages, PAGE_TOKENS))


def open_pager(store: KVStore, num_heads: int) -> Pager | None:
    """Return what reads the store by pages, if the kernel is there and computes what RowAttention does.

    Args:
        num_heads: query heads of every block.
    """
    layout = store.layout
    if store.num_slots < PAGE_TOKENS or not can_page(layout, num_heads):
        return None
    if not all(_is_same(shape, num_heads, layout.dtype, layout.device) for shape in set(layout.shapes)):
        return None
    return Pager(store, _kernel())


def can_page(layout: KVLayout, num_heads: int) -> bool:
    """Whether torch, the device and the sizes are such that the kernel can be tried."""
    return (
        layout.device.type == "cuda"
        and layout.dtype in HALF
        and all(_fits(shape, num_heads) for shape in layout.shapes)
        and torch.cuda.get_device_capability(layout.device) >= LEAST_CAPABILITY
        and _has_kernel()
    )


def _fits(shape: KVShape, num_heads: int) -> bool:
    sizes_fit = shape.key_dim == shape.value_dim <= MAX_HEAD_DIM and shape.key_dim % 8 == 0
    return sizes_fit and num_heads % shape.num_kv_heads == 0


def _kernel() -> Kernel:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


@cache
def _has_kernel() -> bool:
    try:
        parameters = inspect.signature(_kernel()).parameters
    except ImportError:
        return False
    return {"block_table", "num_splits"} <= parameters.keys()


@cache
def _is_same(shape: KVShape, num_heads: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Try it once for each kind of block; say why it is not used."""
    try:
        is_same = computes_the_same(_kernel(), shape, num_heads, dtype, device)
        reason = "the kernel that reads pages gives other results"
    except (RuntimeError, ValueError, TypeError) as exc:
        is_same, reason = False, str(exc)
    if not is_same:
        logger.warning("attention reads one sequence after the other: %s", reason)
    return is_same


TRIAL = (
    Piece(1, 600, [(512, 1024), (0, 89)]),
    Piece(30, 260, [(1024, 1314)]),
    Piece(1, 4, [(1536, 1541)]),
    Piece(5, 0, [(1800, 1805)]),
)
"""Single tokens and longer pieces, pages in any order, and a piece that is not on a page."""


def computes_the_same(kernel: Kernel, shape: KVShape, num_heads: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a row in calls of the kernel is what RowAttention gives, with and without a window."""
    store = KVStore(KVLayout(BlockRange(0, 1), (shape,), dtype, device), 2048)
    seeded = torch.Generator().manual_seed(0)
    for heads in store.heads(0):
        heads.copy_(torch.randn(heads.shape, generator=seeded))
    num_tokens = sum(piece.length for piece in TRIAL)
    q_1MTH = torch.randn(1, num_heads, num_tokens, shape.key_dim, generator=seeded).to(device, dtype)
    planned = Pager(store, kernel).plan(TRIAL)
    row = planned.with_tensors([tensor.to(device) for tensor in planned.tensors])
    keys, values = store.heads(0)
    for window in (None, 100):
        function = None if window is None else sliding_window_causal_mask_function(window)
        rest = RowAttention(row.rest, function, store)
        scores = Scores(None)
        wanted = RowAttention(TRIAL, function, store)(q_1MTH, keys, values, scores).float()
        found = row.attend(q_1MTH, keys, values, None, window, lambda q: rest(q, keys, values, scores)).float()  # noqa: B023
        if not bool(((found - wanted).norm(dim=-1) <= _ALLOWED_ERROR * wanted.norm(dim=-1)).all()):
            return False
    return True
