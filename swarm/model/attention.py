"""Attention of a packed row: each piece's tokens over the slots of its own sequence, as they lie in the KV store.

What a token sees is decided by the library's own mask functions (causal, sliding, chunked), evaluated at positions in
the sequence. That is done once per call and kind of mask; blocks then only carry out a list of jobs.
"""

# T tokens of the row, B sequences, L tokens of a piece, K keys, S slots, N key/value heads, G query heads for each of
# them, M = N * G query heads, H head dim

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swarm.model.kv_store import KVStore, read_runs
from swarm.model.pieces import Piece

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""The library's: (batch, head, query, key) indices to bool, broadcasting."""

GATHER_BYTES = 1 << 17
"""Sequences with less of keys and values than this, per block, are copied side by side: one kernel call for all."""

DOUBLE_TOKENS = 32
"""With so many keys or more, two equal query rows are computed where one would be slow (see below)."""


class Scores(NamedTuple):
    """How products of queries and keys become weights, beyond softmax."""

    scaling: float | None = None
    softcap: float | None = None
    sinks_M: Tensor | None = None
    """A score per head that takes its share of the weights and gives nothing."""

    @property
    def plain(self) -> bool:
        return self.softcap is None and self.sinks_M is None


@dataclass(frozen=True, slots=True, eq=False)
class _Sight:
    """What one piece sees of its sequence: the tokens from `first` on."""

    piece: Piece
    start: int
    """Where the piece begins in the row."""
    first: int = 0
    visible_LK: Tensor | None = None
    """Of the tokens from `first` on; None: each token sees all tokens before it, and itself."""

    @property
    def num_keys(self) -> int:
        return self.piece.num_keys - self.first


@dataclass(slots=True, eq=False)
class _Alone:
    """One piece, read where it lies."""

    start: int
    length: int
    runs: Sequence[tuple[int, int]]
    bias_11LK: Tensor | None
    """0 or -inf; None: each token sees all tokens before it, and itself."""

    def causal_bias(self, values_1NKH: Tensor) -> Tensor | None:
        """The bias, also where none is needed to say it."""
        if self.bias_11LK is None and self.length > 1:
            square = torch.ones(1, 1, self.length, self.length, dtype=torch.bool, device=values_1NKH.device).tril()
            self.bias_11LK = _bias(square, values_1NKH.dtype)
        return self.bias_11LK


@dataclass(frozen=True, slots=True, eq=False)
class _Together:
    """Pieces of one token each, of short sequences whose keys and values are copied side by side."""

    num_sequences: int
    rows_B: Tensor | None
    """Where they are in the row; None: they are all of it."""
    slots_BK: Tensor
    """One after the other. Beyond its end, a sequence repeats a slot of its own: what others hold cannot reach it."""
    bias_B11K: Tensor


class RowAttention:
    """The attention of a row under one mask, in every block."""

    def __init__(self, pieces: Sequence[Piece], mask_function: MaskFunction | None, store: KVStore) -> None:
        """Plan it; a `mask_function` of None stands for plain causal attention."""
        self._dtype, self._device = store.layout.dtype, store.layout.device
        sights = _look(pieces, mask_function, self._device)
        most_keys = max((sight.num_keys for sight in sights if sight.piece.length == 1), default=0)
        self._doubles = most_keys >= DOUBLE_TOKENS and _single_rows_are_slow(self._dtype, self._device)
        max_keys = GATHER_BYTES // store.bytes_per_token_and_block
        short = [sight for sight in sights if sight.piece.length == 1 and sight.num_keys <= max_keys]
        gathered = {sight.start for sight in short} if len(short) > 1 else set()
        alone = [self._read_alone(sight) for sight in sights if sight.start not in gathered]
        self._together = self._read_together(short, everything=not alone) if gathered else None
        self._ones = [job for job in alone if job.length == 1]
        self._many = [job for job in alone if job.length > 1]
        rows = [sight.start for sight in short] if gathered else []
        for job in (*self._ones, *self._many):
            rows += range(job.start, job.start + job.length)
        self._order_T = None if rows == list(range(len(rows))) else torch.tensor(rows, device=self._device).argsort()

    def __call__(self, q_1MTH: Tensor, keys_1NSH: Tensor, values_1NSH: Tensor, scores: Scores) -> Tensor:
        """Return [1, T, M, H] of the values' head size."""
        outputs = []
        if self._together is not None or self._ones:
            outputs.append(self._attend_ones(q_1MTH, keys_1NSH, values_1NSH, scores))
        for job in self._many:
            keys_1NKH, values_1NKH = read_runs(keys_1NSH, job.runs), read_runs(values_1NSH, job.runs)
            outputs.append(_attend_many(job, q_1MTH, keys_1NKH, values_1NKH, scores))
        out_1TMH = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        return out_1TMH if self._order_T is None else out_1TMH.index_select(1, self._order_T)

    def _attend_ones(self, q_1MTH: Tensor, keys_1NSH: Tensor, values_1NSH: Tensor, scores: Scores) -> Tensor:
        """Attention of the pieces of one token; the query heads of a key/value head are rows of one product."""
        _, num_heads, num_tokens, head_dim = q_1MTH.shape
        num_kv_heads = keys_1NSH.shape[1]
        q_1TMH = q_1MTH.transpose(1, 2) if num_tokens > 1 else q_1MTH
        q_TNGH = q_1TMH.reshape(num_tokens, num_kv_heads, -1, head_dim)
        doubled = self._doubles and num_heads == num_kv_heads
        if doubled:
            q_TNGH = torch.cat((q_TNGH, q_TNGH), 2)
        outputs = []
        if self._together is not None:
            outputs.append(_attend_together(self._together, q_TNGH, keys_1NSH, values_1NSH, scores))
        if self._ones:
            rows = q_TNGH.chunk(num_tokens) if num_tokens > 1 else (q_TNGH,)
            for job in self._ones:
                keys_1NKH, values_1NKH = read_runs(keys_1NSH, job.runs), read_runs(values_1NSH, job.runs)
                outputs.append(_attend_one(rows[job.start], keys_1NKH, values_1NKH, job.bias_11LK, scores))
        out_BNGH = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if doubled:
            out_BNGH = out_BNGH.narrow(2, 0, 1)
        return out_BNGH.reshape(1, -1, num_heads, out_BNGH.shape[-1])

    def _read_alone(self, sight: _Sight) -> _Alone:
        visible = sight.visible_LK
        bias = None if visible is None else _bias(visible[None, None], self._dtype)
        return _Alone(sight.start, sight.piece.length, sight.piece.runs_from(sight.first), bias)

    def _read_together(self, sights: Sequence[_Sight], *, everything: bool) -> _Together:
        num_keys = max(sight.num_keys for sight in sights)
        slots: list[int] = []
        for sight in sights:
            own = list(sight.piece.slots_from(sight.first))
            slots += own + own[:1] * (num_keys - len(own))
        lengths_B = torch.tensor([sight.num_keys for sight in sights], device=self._device)
        visible_BK = torch.arange(num_keys, device=self._device) < lengths_B[:, None]
        for row_K, sight in zip(visible_BK, sights, strict=True):
            if sight.visible_LK is not None:
                row_K[: sight.num_keys] = sight.visible_LK[0]
        return _Together(
            num_sequences=len(sights),
            rows_B=None if everything else torch.tensor([sight.start for sight in sights], device=self._device),
            slots_BK=torch.tensor(slots, device=self._device),
            bias_B11K=_bias(visible_BK[:, None, None], self._dtype),
        )


def _attend_one(
    q_BNGH: Tensor, keys_BNKH: Tensor, values_BNKH: Tensor, bias_B11K: Tensor | None, scores: Scores
) -> Tensor:
    """Attention of one token of each sequence."""
    if scores.plain:
        return F.scaled_dot_product_attention(q_BNGH, keys_BNKH, values_BNKH, bias_B11K, scale=scores.scaling)
    return _attend_step_by_step(q_BNGH.unsqueeze(3), keys_BNKH, values_BNKH, bias_B11K, scores).squeeze(3)


def _attend_together(job: _Together, q_TNGH: Tensor, keys_1NSH: Tensor, values_1NSH: Tensor, scores: Scores) -> Tensor:
    q_BNGH = q_TNGH if job.rows_B is None else q_TNGH.index_select(0, job.rows_B)
    keys_BNKH, values_BNKH = (
        heads.index_select(2, job.slots_BK).view(heads.shape[1], job.num_sequences, -1, heads.shape[3]).transpose(0, 1)
        for heads in (keys_1NSH, values_1NSH)
    )
    return _attend_one(q_BNGH, keys_BNKH, values_BNKH, job.bias_B11K, scores)


def _attend_many(job: _Alone, q_1MTH: Tensor, keys_1NKH: Tensor, values_1NKH: Tensor, scores: Scores) -> Tensor:
    """Attention of several tokens of one sequence, [1, L, M, H]."""
    q_1MLH = q_1MTH.narrow(2, job.start, job.length)
    num_heads, num_kv_heads = q_1MLH.shape[1], keys_1NKH.shape[1]
    if scores.plain:
        out_1MLH = F.scaled_dot_product_attention(
            q_1MLH,
            keys_1NKH,
            values_1NKH,
            job.bias_11LK,
            is_causal=job.bias_11LK is None,
            scale=scores.scaling,
            enable_gqa=num_heads != num_kv_heads,
        )
    else:
        q_1NGLH, bias = q_1MLH.unflatten(1, (num_kv_heads, -1)), job.causal_bias(values_1NKH)
        out_1MLH = _attend_step_by_step(q_1NGLH, keys_1NKH, values_1NKH, bias, scores).flatten(1, 2)
    return out_1MLH.transpose(1, 2)


def _attend_step_by_step(
    q_BNGLH: Tensor, keys_BNKH: Tensor, values_BNKH: Tensor, bias_B1LK: Tensor | None, scores: Scores
) -> Tensor:
    """Attention for which the fused kernels have no parameter, in float32; [B, N, G, L, H]."""
    num_groups, length, head_dim = q_BNGLH.shape[2:]
    scaling = head_dim**-0.5 if scores.scaling is None else scores.scaling
    products = torch.matmul(q_BNGLH.flatten(2, 3).float() * scaling, keys_BNKH.float().transpose(2, 3))
    scores_BNGLK = products.unflatten(2, (num_groups, length))
    if scores.softcap is not None:
        scores_BNGLK = torch.tanh(scores_BNGLK / scores.softcap) * scores.softcap
    if bias_B1LK is not None:
        scores_BNGLK = scores_BNGLK + bias_B1LK.unsqueeze(2)
    if scores.sinks_M is not None:
        sinks_NG11 = scores.sinks_M.float().view(-1, num_groups, 1, 1)
        sinks = sinks_NG11.expand(*scores_BNGLK.shape[:-1], 1)
        weights = torch.cat([scores_BNGLK, sinks], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores_BNGLK.softmax(-1)
    out = torch.matmul(weights.flatten(2, 3), values_BNKH.float())
    return out.unflatten(2, (num_groups, length)).to(values_BNKH.dtype)


def _look(pieces: Sequence[Piece], mask_function: MaskFunction | None, device: torch.device) -> list[_Sight]:
    """Find out what each piece sees."""
    starts = itertools.accumulate((piece.length for piece in pieces), initial=0)
    sights = [_Sight(piece, start) for piece, start in zip(pieces, starts, strict=False)]
    # Nothing needs to be evaluated for a token that sees its whole sequence, and a square that the kernels know.
    masked = [
        sight
        for sight in sights
        if mask_function is not None
        or sight.piece.key_mask_T is not None
        or (sight.piece.length > 1 and sight.piece.position > 0)
    ]
    for group in [[s for s in masked if s.piece.length == 1], *([s] for s in masked if s.piece.length > 1)]:
        if not group:
            continue
        visible_BLK = _visible([sight.piece for sight in group], mask_function, device)
        firsts = visible_BLK.any(1).int().argmax(-1).tolist()
        counts = visible_BLK.sum((1, 2)).tolist()
        for sight, visible_LK, first, count in zip(group, visible_BLK, firsts, counts, strict=True):
            end, length = sight.piece.num_keys, sight.piece.length
            visible = None if length == 1 and count == end - first else visible_LK[:, first:end]
            sights[sights.index(sight)] = _Sight(sight.piece, sight.start, first, visible)
    return sights


def _visible(pieces: Sequence[Piece], mask_function: MaskFunction | None, device: torch.device) -> Tensor:
    """What pieces of the same length see, [B, L, K] with K that of the longest sequence.

    A token that sees nothing, which is padding, sees itself, so that its weights are numbers.
    """
    positions_L = torch.arange(pieces[0].length, device=device)
    positions_BL1 = (
        torch.tensor([[piece.position] for piece in pieces], device=device)[..., None] + positions_L[:, None]
    )
    keys_K = torch.arange(max(piece.num_keys for piece in pieces), device=device)
    visible_BLK = keys_K <= positions_BL1
    if mask_function is not None:
        # The library counts chunks from the first token that is no padding.
        paddings_B11 = torch.tensor([[[_left_padding(piece)]] for piece in pieces], device=device)
        zero = torch.zeros(1, 1, 1, dtype=torch.int64, device=device)
        visible_BLK = visible_BLK & mask_function(zero, zero, positions_BL1 - paddings_B11, keys_K - paddings_B11)
    for visible_LK, piece in zip(visible_BLK, pieces, strict=True):
        if piece.key_mask_T is not None:
            visible_LK[:, : piece.num_keys] &= piece.key_mask_T.to(device)
    blind_BL1 = ~visible_BLK.any(-1, keepdim=True)
    return visible_BLK | (blind_BL1 & (keys_K == positions_BL1))


def _left_padding(piece: Piece) -> int:
    return 0 if piece.key_mask_T is None else int(piece.key_mask_T.int().argmax())


def _bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


def _single_rows_are_slow(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether one query row takes longer than two.

    Without instructions for the type, torch multiplies one row in half precision by a loop of its own: measured on
    AVX2, up to 3 times slower than two rows.
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return False
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{'bf16' if dtype == torch.bfloat16 else 'fp16'}_supported", None)
    return supported is not None and not supported()
