"""How slices of steps run through the blocks: many sessions in one packed pass, or, where a model cannot be packed,
one session at a time. Both give the same results. Runs in the compute thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from swarm.model.kv_store import KVStore
from swarm.model.paged import PAGE_TOKENS
from swarm.model.ragged import PackedSpan, Piece
from swarm.model.span import Span
from swarm.model.staging import Fetch
from swarm.ranges import BlockRange

from .kv_cache import StepInput
from .pages import PageCopy

if TYPE_CHECKING:
    from .sessions import ServerSession

# B batch, L length, T all tokens of a pass, D hidden

TRIAL_PAST = 64
"""Tokens that each sequence of a trial has before."""

MAX_TWINS = 32
"""Packed twins of parts of the span that are kept; making one again takes milliseconds."""


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """Some tokens of one session's step: from `start` on, `length` of each sequence. Its pages are taken already."""

    session: ServerSession
    step: StepInput
    start: int
    length: int
    copies: Sequence[PageCopy]
    """Slots to be copied before anything is written."""

    @property
    def position(self) -> int:
        """Tokens of each sequence before this slice."""
        return self.step.position + self.start

    @property
    def num_tokens(self) -> int:
        return self.length * self.session.batch_size

    @property
    def x_BLD(self) -> Tensor:
        return self.step.x_BLD[:, self.start : self.start + self.length]

    @property
    def position_ids_BL(self) -> Tensor | None:
        ids_BL = self.step.position_ids_BL
        return None if ids_BL is None else ids_BL[:, self.start : self.start + self.length]


class Executor(Protocol):
    """Runs slices."""

    def groups(self, slices: Sequence[Slice]) -> list[list[Slice]]:
        """Divide slices into those that one pass takes together."""

    def run(self, group: Sequence[Slice]) -> list[Tensor]:
        """Run one group; return the hidden states that leave the span for each slice, [B, L, D], on the CPU.

        Raises: SessionLost: a slice of a group of one cannot be placed behind what is cached.
        """

    def trial(self, span: Span, num_rows: int, length: int) -> Callable[[], object] | None:
        """A pass of made-up sequences, to be called while nobody uses the cache; None: it has not the room."""


class PackedExecutor:
    """One pass for all slices that use the same blocks."""

    def __init__(self, store: KVStore) -> None:
        self._store = store
        self._twins: dict[BlockRange, PackedSpan] = {}

    def groups(self, slices: Sequence[Slice]) -> list[list[Slice]]:
        groups: dict[BlockRange, list[Slice]] = {}
        for each in slices:
            groups.setdefault(each.session.span.blocks, []).append(each)
        return list(groups.values())

    @torch.inference_mode()
    def run(self, group: Sequence[Slice]) -> list[Tensor]:
        for each in group:
            self._write_prefix(each.session)
        self._store.copy(
            (copy.source_slot, copy.target_slot, copy.num_tokens) for each in group for copy in each.copies
        )
        span = group[0].session.span
        pieces = [piece for each in group for piece in _pieces(each)]
        rows_TD = [each.x_BLD.flatten(0, 1) for each in group]
        x_TD = rows_TD[0] if len(rows_TD) == 1 else torch.cat([row_TD.to(span.dtype) for row_TD in rows_TD])
        y_TD = Fetch(self._twin(span)(x_TD.to(span.dtype), pieces)).collect()
        outputs = y_TD.split([each.num_tokens for each in group])
        return [y.unflatten(0, (each.session.batch_size, each.length)) for y, each in zip(outputs, group, strict=True)]

    def trial(self, span: Span, num_rows: int, length: int) -> Callable[[], object] | None:
        num_tokens = TRIAL_PAST + length
        room = num_tokens if span.device.type != "cuda" else -(-num_tokens // PAGE_TOKENS) * PAGE_TOKENS
        if num_rows * room > self._store.num_slots:
            return None
        x_TD = torch.zeros(num_rows * length, span.hidden_size, dtype=span.dtype)
        pieces = [Piece(length, TRIAL_PAST, [(row * room, row * room + num_tokens)]) for row in range(num_rows)]

        @torch.inference_mode()
        def run() -> None:
            Fetch(self._twin(span)(x_TD, pieces)).collect()

        return run

    def prepare(self, span: Span) -> None:
        """Make the twin of a span now, with all that is tried out for it."""
        self._twin(span)

    def _write_prefix(self, session: ServerSession) -> None:
        """Write what stands in front of a session's tokens, once, into pages that its sequences share."""
        cache = session.cache
        if not cache.unwritten_runs:
            return
        slots = [slot for start, end in cache.unwritten_runs for slot in range(start, end)]
        slots_T = torch.tensor(slots, device=self._store.layout.device)
        for number, heads in zip(session.span.blocks, session.span.prefix_of(session.adapters), strict=True):
            self._store.write(number, slots_T, *heads)
        cache.unwritten_runs = ()

    def _twin(self, span: Span) -> PackedSpan:
        twin = self._twins.pop(span.blocks, None) or PackedSpan(span, self._store)
        self._twins[span.blocks] = twin
        if len(self._twins) > MAX_TWINS:
            del self._twins[next(iter(self._twins))]
        return twin


def _pieces(each: Slice) -> list[Piece]:
    """One piece for each sequence of the session."""
    session, cache, end = each.session, each.session.cache, each.position + each.length
    ids_BL, prompts_NBPD = each.position_ids_BL, session.prompts_NBPD
    if prompts_NBPD is not None and each.position >= prompts_NBPD.shape[2]:
        prompts_NBPD = None
    return [
        Piece(
            length=each.length,
            position=each.position,
            runs=cache.runs(row, end),
            position_ids_L=None if ids_BL is None else ids_BL[row],
            key_mask_T=cache.key_mask(row, end),
            prompts_NPD=None if prompts_NBPD is None else prompts_NBPD[:, row if prompts_NBPD.shape[1] > 1 else 0],
            adapters=session.adapters,
        )
        for row in range(session.batch_size)
    ]


class SessionExecutor:
    """One pass for each session, over the session's own cache, for models that cannot be packed."""

    def groups(self, slices: Sequence[Slice]) -> list[list[Slice]]:
        return [[each] for each in slices]

    @torch.inference_mode()
    def run(self, group: Sequence[Slice]) -> list[Tensor]:
        (each,) = group
        session, span, cache = each.session, each.session.span, each.session.cache
        assert cache.own is not None
        if cache.own.length < cache.num_prefix_tokens:
            cache.own.begin_with(span.prefix_of(session.adapters))
        if each.start == 0:
            cache.begin_own(each.step)
        mask_BT = cache.mask_BT
        ids_BL = each.position_ids_BL
        y_BLD = span(
            each.x_BLD.to(span.device, span.dtype),
            cache=cache.own,
            attention_mask_BT=None
            if mask_BT is None
            else mask_BT[:, : each.position + each.length].to(span.device, torch.int64),
            position_ids_BL=None if ids_BL is None else ids_BL.to(span.device),
            prompts_NBPD=session.prompts_NBPD,
            adapters=session.adapters,
        )
        return [y_BLD.cpu()]

    def trial(self, span: Span, num_rows: int, length: int) -> Callable[[], object] | None:
        x_BLD = torch.zeros(num_rows, length, span.hidden_size, dtype=span.dtype, device=span.device)

        @torch.inference_mode()
        def run() -> None:
            span(x_BLD, cache=span.new_cache(num_rows))

        return run
