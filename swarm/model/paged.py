"""Attention of a packed row on CUDA: one kernel call for all pieces, which reads the KV store by pages.

It is `torch.nn.attention.varlen.varlen_attn` with a block table. What its arguments are is tested on a CPU; the kernel
itself has not been run on a GPU yet.
"""

# T tokens of the row, B sequences, P pages, S slots, N key/value heads, M query heads, H head dim

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from swarm.model.kv_store import KVShape, KVStore
from swarm.model.pieces import Piece

PAGE_TOKENS = 256
"""The kernel that comes with torch (FlashAttention 2) reads pages of a multiple of this."""
MAX_HEAD_DIM = 256
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, eq=False)
class PagedAttention:
    """The attention of a row under a causal mask, with or without a window, in every block."""

    cu_seq_q: Tensor
    """[B + 1], int32: where each piece begins in the row."""
    cu_seq_k: Tensor
    """[B + 1], int32: where each sequence would begin if its pages were laid end to end."""
    seqused_k: Tensor
    """[B], int32: tokens of each sequence."""
    block_table: Tensor
    """[B, P], int32: the pages of each sequence; 0 beyond its last one."""
    max_q: int
    max_k: int
    window_size: tuple[int, int]

    def __call__(self, q_1MTH: Tensor, keys_1NSH: Tensor, values_1NSH: Tensor, scaling: float | None) -> Tensor:
        """Return [1, T, M, H]."""
        from torch.nn.attention.varlen import varlen_attn

        out_TMH = varlen_attn(**self.arguments(q_1MTH, keys_1NSH, values_1NSH, scaling))
        assert isinstance(out_TMH, Tensor)
        return out_TMH.unsqueeze(0)

    def arguments(
        self, q_1MTH: Tensor, keys_1NSH: Tensor, values_1NSH: Tensor, scaling: float | None
    ) -> dict[str, Any]:
        """What the kernel is called with."""
        return {
            "query": q_1MTH[0].transpose(0, 1).contiguous(),
            "key": as_pages(keys_1NSH),
            "value": as_pages(values_1NSH),
            "cu_seq_q": self.cu_seq_q,
            "cu_seq_k": self.cu_seq_k,
            "max_q": self.max_q,
            "max_k": self.max_k,
            "scale": scaling,
            "window_size": self.window_size,
            "enable_gqa": q_1MTH.shape[1] != keys_1NSH.shape[1],
            "seqused_k": self.seqused_k,
            "block_table": self.block_table,
        }


def plan_paged(pieces: Sequence[Piece], window: int | None, store: KVStore) -> PagedAttention | None:
    """Make the arguments; None if a sequence has padding, or does not lie on whole pages of the store.

    Args:
        window: how many tokens each one sees, itself included; None: all before it.
    """
    tables = []
    for piece in pieces:
        pages = _pages(piece)
        if pages is None or max(pages) >= store.num_slots // PAGE_TOKENS or piece.key_mask_T is not None:
            return None
        tables.append(pages)
    num_pages = max(map(len, tables))

    def to_tensor(numbers: Sequence[object]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=store.layout.device)

    return PagedAttention(
        cu_seq_q=to_tensor([0, *itertools.accumulate(piece.length for piece in pieces)]),
        cu_seq_k=to_tensor([number * num_pages * PAGE_TOKENS for number in range(len(pieces) + 1)]),
        seqused_k=to_tensor([piece.num_keys for piece in pieces]),
        block_table=to_tensor([pages + [0] * (num_pages - len(pages)) for pages in tables]),
        max_q=max(piece.length for piece in pieces),
        max_k=num_pages * PAGE_TOKENS,
        window_size=(-1, 0) if window is None else (window - 1, 0),
    )


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


def can_page(store: KVStore) -> bool:
    """Whether this torch and this store allow it: CUDA, half precision, keys and values of one size."""
    layout = store.layout
    return (
        layout.device.type == "cuda"
        and layout.dtype in HALF
        and store.num_slots >= PAGE_TOKENS
        and all(_fits(shape) for shape in layout.shapes)
        and _takes_block_table()
    )


def _fits(shape: KVShape) -> bool:
    return shape.key_dim == shape.value_dim <= MAX_HEAD_DIM and shape.key_dim % 8 == 0


@cache
def _takes_block_table() -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "block_table" in inspect.signature(varlen_attn).parameters
