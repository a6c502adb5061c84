"""What the tokens of a packed row see of their sequences.

It is decided by the library's own mask functions (causal, sliding, chunked), evaluated at positions in the sequence.
"""

# B sequences, L tokens of a piece, T all its tokens, K keys

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swarm.model.pieces import Piece

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""The library's: (batch, head, query, key) indices to bool, broadcasting."""


@dataclass(frozen=True, slots=True, eq=False)
class Sight:
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

    def bias_11LK(self, dtype: torch.dtype) -> Tensor | None:
        """0 or -inf; None where `visible_LK` is."""
        return None if self.visible_LK is None else bias_of(self.visible_LK[None, None], dtype)


def look(pieces: Sequence[Piece], mask_function: MaskFunction | None, device: torch.device) -> list[Sight]:
    """Find out what each piece sees."""
    starts = itertools.accumulate((piece.length for piece in pieces), initial=0)
    sights = [Sight(piece, start) for piece, start in zip(pieces, starts, strict=False)]
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
            sights[sights.index(sight)] = Sight(sight.piece, sight.start, first, visible)
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


def bias_of(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
