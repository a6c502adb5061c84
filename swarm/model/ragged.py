"""Packed execution: tokens of many sequences in one row through the library's own model code.

The interface of the server's engine. A first version; attention runs one sequence after the other.
"""

# T all new tokens of a row, L new tokens of one piece, D hidden, P prompt tokens, N blocks

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from swarm.model.kv_store import KVStore
from swarm.model.span import Span


def is_packable(span: Span) -> bool:
    """Whether this span can run packed; if not, run one session at a time with `span.new_cache`."""
    raise NotImplementedError


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """The next tokens of one sequence (a session of batch B has B sequences)."""

    length: int
    """New tokens, at least 1."""
    position: int
    """Tokens of the sequence that are in the store already."""
    runs: Sequence[tuple[int, int]]
    """Slots [start, end) that hold the tokens 0..position+length-1 in order; the last `length` are written now."""
    position_ids_L: Tensor | None = None
    """int64; None means position..position+length-1."""
    key_mask_T: Tensor | None = None
    """bool, one per token 0..position+length-1, False for padding, on any device; None means no padding."""
    prompts_NPD: Tensor | None = None
    """Deep prompts of the blocks of this PackedSpan, on its device, added at the positions below P."""


class PackedSpan:
    """A twin of a span that runs pieces of many sequences in one row, over the same weights.

    The span itself is left as it is. Making a twin takes milliseconds: keep one per view (see narrow.SpanViews).
    Calls may nest, also inside those of the span itself. Not differentiable.
    """

    def __init__(self, span: Span, store: KVStore) -> None:
        """Raises: UnsupportedModel: these blocks cannot run packed."""
        raise NotImplementedError

    def __call__(self, x_TD: Tensor, pieces: Sequence[Piece]) -> Tensor:
        """Run the blocks on all pieces and write their keys and values into the store.

        Args:
            x_TD: hidden states entering the first block, those of the first piece first, on the span's device.
            pieces: at most one per sequence; no two may write the same slot.
        Returns: hidden states leaving the last block, [T, D], in the span's dtype, in the same order.
        Raises: BadRequest: shapes do not fit. A call that fails may have written the new slots, and no others.
        """
        raise NotImplementedError
