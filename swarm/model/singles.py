"""Attention of single tokens, those of sequences that decode: by a kernel of our own where torch's are slow."""

# T tokens of the row, B sequences, K keys, S slots, N key/value heads, G query heads for each of them, M = N * G query
# heads, L tokens, H head dim

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from swarm.model import kernels
from swarm.model.kernels import has_fast_floats
from swarm.model.kv_store import KVLayout, KVStore, read_runs
from swarm.model.sights import Sight, bias_of

GATHER_BYTES = 1 << 17
"""Sequences with less of keys and values than this, per block, are copied side by side: one kernel call for all."""

HEAD_COLUMNS = 16
"""Our kernel takes keys and values of a multiple of so many numbers."""

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


class Singles(Protocol):
    """The attention of some pieces of one token."""

    @property
    def rows(self) -> Sequence[int]:
        """Where they are in the row, in the order of what the call returns."""

    def __call__(self, q_1MTH: Tensor, keys_1NSH: Tensor, values_1NSH: Tensor, scores: Scores) -> Tensor:
        """Return [1, B, M, H] of the values' head size."""


def plan_singles(sights: Sequence[Sight], store: KVStore, *, may_use_kernel: bool) -> list[Singles]:
    """Divide single tokens among the ways to compute their attention.

    Args:
        may_use_kernel: whether our kernel computes what is wanted, softmax alone, and takes the keys and values.
    """
    planned: list[Singles] = []
    if may_use_kernel and _is_for_kernel(store.layout):
        seeing_all = [sight for sight in sights if sight.visible_LK is None]
        sights = [sight for sight in sights if sight.visible_LK is not None]
        if seeing_all:
            planned.append(_InPlace(seeing_all))
    if sights:
        planned.append(_Copied(sights, store))
    return planned


class _InPlace:
    """The attention of single tokens by our own kernel, which reads the store."""

    def __init__(self, sights: Sequence[Sight]) -> None:
        self.rows = [sight.start for sight in sights]
        self._runs = kernels.Runs([sight.piece.runs_from(sight.first) for sight in sights])

    def __call__(self, q_1MTH: Tensor, keys_1NSH: Tensor, values_1NSH: Tensor, scores: Scores) -> Tensor:
        """See Singles."""
        q_TMH = q_1MTH[0].transpose(0, 1)
        if len(self.rows) < q_TMH.shape[0]:
            q_TMH = q_TMH[self.rows]
        q_TNGH = q_TMH.unflatten(1, (keys_1NSH.shape[1], -1))
        scaling = q_TMH.shape[2] ** -0.5 if scores.scaling is None else scores.scaling
        return kernels.attention(q_TNGH, keys_1NSH, values_1NSH, self._runs, scaling).flatten(1, 2).unsqueeze(0)


@dataclass(frozen=True, slots=True, eq=False)
class _Alone:
    """A token of a sequence that is read where it lies."""

    start: int
    runs: Sequence[tuple[int, int]]
    bias_11LK: Tensor | None
    """0 or -inf; None: it sees them all."""


@dataclass(frozen=True, slots=True, eq=False)
class _Together:
    """Pieces of one token each, of short sequences whose keys and values are copied side by side."""

    num_sequences: int
    rows_B: Tensor
    """Where they are in the row."""
    slots_BK: Tensor
    """One after the other. Beyond its end, a sequence repeats a slot of its own: what others hold cannot reach it."""
    bias_B11K: Tensor


class _Copied:
    """The attention of single tokens by torch's kernels; what many short sequences hold is copied side by side."""

    def __init__(self, sights: Sequence[Sight], store: KVStore) -> None:
        self._dtype, self._device = store.layout.dtype, store.layout.device
        most_keys = max(sight.num_keys for sight in sights)
        self._doubles = most_keys >= DOUBLE_TOKENS and _single_rows_are_slow(self._dtype, self._device)
        max_keys = GATHER_BYTES // store.bytes_per_token_and_block
        short = [sight for sight in sights if sight.num_keys <= max_keys]
        gathered = {sight.start for sight in short} if len(short) > 1 else set()
        self._alone = [
            _Alone(sight.start, sight.piece.runs_from(sight.first), sight.bias_11LK(self._dtype))
            for sight in sights
            if sight.start not in gathered
        ]
        self._together = self._read_together(short) if gathered else None
        self.rows = [sight.start for sight in short] if gathered else []
        self.rows += [job.start for job in self._alone]

    def __call__(self, q_1MTH: Tensor, keys_1NSH: Tensor, values_1NSH: Tensor, scores: Scores) -> Tensor:
        """See Singles. The query heads of a key/value head are rows of one product."""
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
        if self._alone:
            rows = q_TNGH.chunk(num_tokens) if num_tokens > 1 else (q_TNGH,)
            for job in self._alone:
                keys_1NKH, values_1NKH = read_runs(keys_1NSH, job.runs), read_runs(values_1NSH, job.runs)
                outputs.append(_attend_one(rows[job.start], keys_1NKH, values_1NKH, job.bias_11LK, scores))
        out_BNGH = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if doubled:
            out_BNGH = out_BNGH.narrow(2, 0, 1)
        return out_BNGH.reshape(1, -1, num_heads, out_BNGH.shape[-1])

    def _read_together(self, sights: Sequence[Sight]) -> _Together:
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
            rows_B=torch.tensor([sight.start for sight in sights], device=self._device),
            slots_BK=torch.tensor(slots, device=self._device),
            bias_B11K=bias_of(visible_BK[:, None, None], self._dtype),
        )


def _attend_one(
    q_BNGH: Tensor, keys_BNKH: Tensor, values_BNKH: Tensor, bias_B11K: Tensor | None, scores: Scores
) -> Tensor:
    """Attention of one token of each sequence."""
    if scores.plain:
        return F.scaled_dot_product_attention(q_BNGH, keys_BNKH, values_BNKH, bias_B11K, scale=scores.scaling)
    return attend_step_by_step(q_BNGH.unsqueeze(3), keys_BNKH, values_BNKH, bias_B11K, scores).squeeze(3)


def _attend_together(job: _Together, q_TNGH: Tensor, keys_1NSH: Tensor, values_1NSH: Tensor, scores: Scores) -> Tensor:
    q_BNGH = q_TNGH if q_TNGH.shape[0] == job.num_sequences else q_TNGH.index_select(0, job.rows_B)
    keys_BNKH, values_BNKH = (
        heads.index_select(2, job.slots_BK).view(heads.shape[1], job.num_sequences, -1, heads.shape[3]).transpose(0, 1)
        for heads in (keys_1NSH, values_1NSH)
    )
    return _attend_one(q_BNGH, keys_BNKH, values_BNKH, job.bias_B11K, scores)


def attend_step_by_step(
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


def _single_rows_are_slow(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether one query row takes longer than two.

    Without instructions for the type, torch multiplies one row in half precision by a loop of its own: measured on
    AVX2, up to 3 times slower than two rows.
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return False
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{'bf16' if dtype == torch.bfloat16 else 'fp16'}_supported", None)
    return supported is not None and not supported()


def _is_for_kernel(layout: KVLayout) -> bool:
    """Whether our kernel is faster than torch's, which are made for AVX-512."""
    is_half = layout.device.type == "cpu" and layout.dtype == torch.bfloat16
    return is_half and kernels.is_compiled() and not has_fast_floats()


def fits_kernel(keys_1NSH: Tensor, values_1NSH: Tensor) -> bool:
    """Whether our kernel takes them; some models make keys and values from something smaller, in any layout."""
    return all(
        heads.dtype == torch.bfloat16 and heads.stride(3) == 1 and heads.shape[3] % HEAD_COLUMNS == 0
        for heads in (keys_1NSH, values_1NSH)
    )
