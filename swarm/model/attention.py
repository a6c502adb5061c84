"""Attention of a packed row: each piece's tokens over the slots of its own sequence, as they lie in the KV store.

What each token sees is found out once per call and kind of mask (sights.py); blocks then only carry out the plan.
"""

# T tokens of the row, B sequences, L tokens of a piece, K keys, S slots, N key/value heads, M query heads, H head dim

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from swarm.model.kv_store import KVStore, read_runs
from swarm.model.pieces import Piece
from swarm.model.sights import MaskFunction, bias_of, look
from swarm.model.singles import Scores, Singles, attend_step_by_step, fits_kernel, plan_singles


@dataclass(slots=True, eq=False)
class _Many:
    """A piece of several tokens."""

    start: int
    length: int
    runs: Sequence[tuple[int, int]]
    bias_11LK: Tensor | None
    """0 or -inf; None: each token sees all tokens before it, and itself."""

    def causalbias_of(self, values_1NKH: Tensor) -> Tensor | None:
        """The bias, also where none is needed to say it."""
        if self.bias_11LK is None and self.length > 1:
            square = torch.ones(1, 1, self.length, self.length, dtype=torch.bool, device=values_1NKH.device).tril()
            self.bias_11LK = bias_of(square, values_1NKH.dtype)
        return self.bias_11LK


class RowAttention:
    """The attention of a row under one mask, in every block."""

    def __init__(self, pieces: Sequence[Piece], mask_function: MaskFunction | None, store: KVStore) -> None:
        """Plan it; a `mask_function` of None stands for plain causal attention."""
        self._store = store
        sights = look(pieces, mask_function, store.layout.device)
        self._ones = [sight for sight in sights if sight.piece.length == 1]
        self._many = [
            _Many(each.start, each.piece.length, each.piece.runs_from(each.first), each.bias_11LK(store.layout.dtype))
            for each in sights
            if each.piece.length > 1
        ]

    def __call__(self, q_1MTH: Tensor, keys_1NSH: Tensor, values_1NSH: Tensor, scores: Scores) -> Tensor:
        """Return [1, T, M, H] of the values' head size."""
        takes_kernel = scores.plain and fits_kernel(keys_1NSH, values_1NSH)
        singles, order_T = self._by_kernel if takes_kernel else self._by_torch
        outputs = [each(q_1MTH, keys_1NSH, values_1NSH, scores) for each in singles]
        for job in self._many:
            keys_1NKH, values_1NKH = read_runs(keys_1NSH, job.runs), read_runs(values_1NSH, job.runs)
            outputs.append(_attend_many(job, q_1MTH, keys_1NKH, values_1NKH, scores))
        out_1TMH = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        return out_1TMH if order_T is None else out_1TMH.index_select(1, order_T)

    @cached_property
    def _by_kernel(self) -> tuple[list[Singles], Tensor | None]:
        return self._with_order(plan_singles(self._ones, self._store, may_use_kernel=True))

    @cached_property
    def _by_torch(self) -> tuple[list[Singles], Tensor | None]:
        return self._with_order(plan_singles(self._ones, self._store, may_use_kernel=False))

    def _with_order(self, singles: list[Singles]) -> tuple[list[Singles], Tensor | None]:
        """With what puts the outputs, those of single tokens first, into the order of the row; None: they are in it."""
        order = [row for each in singles for row in each.rows]
        order += itertools.chain.from_iterable(range(job.start, job.start + job.length) for job in self._many)
        if order == list(range(len(order))):
            return singles, None
        return singles, torch.tensor(order, device=self._store.layout.device).argsort()


def _attend_many(job: _Many, q_1MTH: Tensor, keys_1NKH: Tensor, values_1NKH: Tensor, scores: Scores) -> Tensor:
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
        q_1NGLH, bias = q_1MLH.unflatten(1, (num_kv_heads, -1)), job.causalbias_of(values_1NKH)
        out_1MLH = attend_step_by_step(q_1NGLH, keys_1NKH, values_1NKH, bias, scores).flatten(1, 2)
    return out_1MLH.transpose(1, 2)
