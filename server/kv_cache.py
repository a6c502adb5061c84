"""What one session has cached: a page table for each of its sequences, their padding, and names for full pages.

Where the model cannot run packed, the session also owns a SpanCache with its keys and values, and its pages only count.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swarm.errors import SessionLost, UnsupportedModel
from swarm.model.span_cache import SpanCache
from swarm.v1 import blocks_pb2 as pb

from .adapters import Lease
from .pages import OutOfPages, PageCopy, PagePool

# B batch, L length, T cached + L, D hidden

MAX_HOP_US = 2**32 - 1


@dataclass(frozen=True, slots=True, eq=False)
class StepInput:
    """One step as it arrived: see Step in the wire contract."""

    step_id: int
    position: int
    num_outputs: int
    beam_idx: Sequence[int]
    x_BLD: Tensor
    mask_BL: Tensor | None
    """None where nothing is padding."""
    position_ids_BL: Tensor | None
    """None where they are position, position + 1, …"""
    codec: pb.Codec = pb.CODEC_RAW
    """How the hidden states came, and how the output goes on."""
    arrived_s: float = 0.0
    """On the monotonic clock."""
    hop_us: Sequence[int] = ()
    """How long each earlier hop had it, microseconds."""
    held: Sequence[int] = ()
    """How many leading tokens of the session each later hop holds; see Step in the wire contract."""

    def hop_us_by_now(self) -> list[int]:
        """The same with this hop."""
        return [*self.hop_us, min(MAX_HOP_US, round((time.monotonic() - self.arrived_s) * 1e6))]

    @property
    def length(self) -> int:
        return self.x_BLD.shape[1]


class PageNames:
    """Names of a session's full pages: hashes of everything that their keys and values follow from.

    A name covers its page, the name of the page before it, and for the first page the context: blocks, prompts and
    adapters. A step that goes back into the middle of a page, reorders or pads sequences ends the naming: those pages
    are not shared.
    """

    def __init__(self, batch_size: int, page_tokens: int, context: bytes, num_prefix_tokens: int = 0) -> None:
        self._page_tokens = page_tokens
        self._length = num_prefix_tokens
        self._alive = True
        # The pages that a prefix fills are not shared; it is part of the context.
        before = 1 + num_prefix_tokens // page_tokens
        self._names = [[hashlib.sha256(context).digest()] * before for _ in range(batch_size)]
        self._hashes = [hashlib.sha256(names[-1]) for names in self._names]

    def of_step(self, step: StepInput) -> list[list[tuple[int, bytes]]]:
        """Take note of a step; return (page number, name) of the pages that it fills, for each sequence."""
        if step.beam_idx or step.mask_BL is not None or step.position_ids_BL is not None:
            self._alive = False
        if self._alive and step.position < self._length:
            self._cut(step.position)
        self._alive = self._alive and step.position == self._length
        if not self._alive:
            return []
        # Two types of numbers have the same bytes for other hidden states: what is named is what the bytes stand for.
        rows_BLX = step.x_BLD.to(torch.float32).contiguous().view(torch.uint8)
        named = [self._feed(row, rows_BLX[row]) for row in range(len(self._names))]
        self._length += step.length
        return named

    def _feed(self, row: int, data_LX: Tensor) -> list[tuple[int, bytes]]:
        names, at, length = self._names[row], 0, data_LX.shape[0]
        first_new = len(names)
        while at < length:
            count = min(length - at, self._page_tokens - (self._length + at) % self._page_tokens)
            self._hashes[row].update(data_LX[at : at + count].numpy().data)
            at += count
            if (self._length + at) % self._page_tokens == 0:
                names.append(self._hashes[row].digest())
                self._hashes[row] = hashlib.sha256(names[-1])
        return [(index - 1, names[index]) for index in range(first_new, len(names))]

    def _cut(self, position: int) -> None:
        num_pages, rest = divmod(position, self._page_tokens)
        self._alive = rest == 0
        self._length = position
        for row, names in enumerate(self._names):
            del names[num_pages + 1 :]
            self._hashes[row] = hashlib.sha256(names[-1])


class SessionCache:
    """The pages of a session's sequences, which all have the same length, and its share in the adapters that made them.

    Everything that takes or frees pages is called under the guard of the SessionTable; `own` belongs to the compute
    thread.
    """

    def __init__(
        self,
        pool: PagePool,
        batch_size: int,
        *,
        expected_tokens: int,
        own: SpanCache | None,
        num_prefix_tokens: int = 0,
        ballast_pages: int = 0,
        adapters: Lease | None = None,
    ) -> None:
        self._pool = pool
        self.adapters = adapters
        self._ballast, first = pool.open(), pool.open(expected_tokens)
        self._tables = [first]
        self.own = own
        self.num_prefix_tokens = num_prefix_tokens
        """Tokens in front of each sequence, which positions and lengths here count: keys and values of an adapter."""
        self.unwritten_runs: Sequence[tuple[int, int]] = ()
        """Slots of the prefix that are still to be written, before any is copied."""
        self.mask_BT: Tensor | None = None
        """bool, False for padding; None while there is none."""
        self.length = num_prefix_tokens
        self.broken = False
        """Whether a step failed half-way, so that nobody knows what is cached."""
        self.closed = False
        try:
            pool.append(self._ballast, ballast_pages * pool.page_tokens)
            pool.append(first, num_prefix_tokens)
        except OutOfPages:
            self.close()
            raise
        self.unwritten_runs = first.runs()
        self._tables += [pool.fork(first) for _ in range(batch_size - 1)]

    @property
    def batch_size(self) -> int:
        return len(self._tables)

    @property
    def num_pages(self) -> int:
        """Pages that it holds; those that it shares with others count as if they were its own."""
        return sum(len(table.pages) for table in (*self._tables, self._ballast))

    def check(self, step: StepInput) -> None:
        """Raise SessionLost unless the step follows what is cached."""
        if self.broken or step.position > self.length:
            raise SessionLost(f"the session's cache ends at {self.length}, a step at {step.position} came")

    def begin(self, step: StepInput) -> None:
        """Bring pages and padding to where the step begins: its beams' order, its position."""
        self.check(step)
        if step.beam_idx and list(step.beam_idx) != list(range(self.batch_size)):
            self._reorder(step.beam_idx)
            if self.mask_BT is not None:
                self.mask_BT = self.mask_BT[list(step.beam_idx)]
        self.cut(step.position)
        self._extend_mask(step)

    def begin_own(self, step: StepInput) -> None:
        """The same for `own`. Raises: SessionLost: a recurrent state cannot go back that far."""
        assert self.own is not None
        if step.beam_idx:
            self.own.reorder(torch.tensor(step.beam_idx))
        if step.position < self.own.length:
            try:
                self.own.rewind(step.position)
            except UnsupportedModel as exc:
                raise SessionLost(f"{exc}: replay the session") from exc

    def cut(self, length: int) -> None:
        """Free what lies beyond the first `length` tokens."""
        if length < self.length:
            for table in self._tables:
                self._pool.cut(table, length)
            self.length = length
            if self.mask_BT is not None:
                self.mask_BT = self.mask_BT[:, :length]

    def append(self, num_tokens: int, *, spare_pages: int = 0) -> list[PageCopy]:
        """Make room for the next tokens of every sequence, or change nothing.

        Args:
            spare_pages: how many have to be free afterwards.
        Raises: OutOfPages: there are not enough free pages.
        """
        needed = sum(self._pool.pages_needed(table, num_tokens) for table in self._tables)
        if needed > max(0, self._pool.num_free - spare_pages):
            raise OutOfPages
        copies = [copy for table in self._tables for copy in self._pool.append(table, num_tokens)]
        self.length += num_tokens
        return copies

    def runs(self, row: int, length: int) -> Sequence[tuple[int, int]]:
        """The slots that hold the first `length` tokens of a sequence."""
        return self._tables[row].runs(length)

    def key_mask(self, row: int, length: int) -> Tensor | None:
        """bool [length], False for padding; None if nothing is padding."""
        if self.mask_BT is None or bool(self.mask_BT[row, :length].all()):
            return None
        return self.mask_BT[row, :length]

    def publish(self, names: Sequence[Sequence[tuple[int, bytes]]], start: int, end: int) -> None:
        """Let other sequences share the named pages whose last token is among those just written, `start` to `end`.

        Args:
            names: for each sequence, (page number, name).
        """
        if self.closed:
            return
        for table, named in zip(self._tables, names, strict=False):
            for page, name in named:
                if start < (page + 1) * self._pool.page_tokens <= end:
                    self._pool.publish(table, page, name)

    def close(self) -> None:
        """Free everything; what was freed already is left alone."""
        if self.closed:
            return
        self.closed = self.broken = True
        for table in (*self._tables, self._ballast):
            self._pool.close(table)
        self._tables.clear()
        self.own = None
        if self.adapters is not None:
            self.adapters.close()

    def _reorder(self, beam_idx: Sequence[int]) -> None:
        """Let sequence b be what sequence beam_idx[b] was: those that go on keep their tables, further copies fork."""
        first_use = [beam_idx.index(row) == at for at, row in enumerate(beam_idx)]
        reordered = [
            self._tables[row] if first else self._pool.fork(self._tables[row])
            for row, first in zip(beam_idx, first_use, strict=True)
        ]
        for row in set(range(self.batch_size)) - set(beam_idx):
            self._pool.close(self._tables[row])
        self._tables = reordered

    def _extend_mask(self, step: StepInput) -> None:
        new = step.mask_BL
        if self.mask_BT is None and new is None:
            return
        past = self.mask_BT
        if past is None:
            past = torch.ones(self.batch_size, step.position, dtype=torch.bool)
        if new is None:
            new = torch.ones(self.batch_size, step.length, dtype=torch.bool)
        self.mask_BT = torch.cat([past[:, : step.position], new.bool()], dim=1)
