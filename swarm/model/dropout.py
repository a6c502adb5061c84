"""Which features are dropped in training: a pure function, so that every pass over the same tokens drops the same.

Backward may compute a forward again, on another server, on another device, in other slices of rows. So a feature's
fate follows from the client's seed and from where the feature is, not from what was drawn before it.
"""

# B batch, L length, T = B * L tokens, F features

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from swarm.model.changes import Drop


@dataclass(frozen=True, slots=True)
class Dropout:
    """The dropping in one call of a span, of the sequences from `first_row` on of the client's whole batch."""

    seed: int
    first_row: int
    length: int
    """Tokens of each sequence."""

    def at(self, block: int, target: str) -> Drop:
        """What drops features of the input of a module; `block` counts from the model's first."""
        digest = hashlib.sha256(f"{self.seed}/{block}/{target}".encode()).digest()
        keys = [int.from_bytes(digest[at : at + 4], "little") for at in (0, 4, 8)]

        def drop(x: Tensor, share: float) -> Tensor:
            num_tokens = x.numel() // x.shape[-1]
            tokens = torch.arange(num_tokens, device=x.device)
            rows_T, positions_T = tokens // self.length + self.first_row, tokens % self.length
            tokens_T = _mixed_words(_mixed_words(rows_T + keys[0]) + positions_T + keys[1])
            features_F = _mixed_words(torch.arange(x.shape[-1], device=x.device) + keys[2])
            kept_TF = _as_int32(tokens_T)[:, None] ^ _as_int32(features_F)
            kept = (_mix(kept_TF) >= round(share * 2**32) - 2**31).reshape(x.shape)
            return x * (kept.to(x.dtype) / (1 - share))

        return drop


def _mix(words: Tensor) -> Tensor:
    """Scatter 32-bit words in place: the last steps of Appleby's MurmurHash3."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        words ^= (words >> shift) & ((1 << (32 - shift)) - 1)
        words *= factor - (1 << 32)
    words ^= (words >> 16) & 0xFFFF
    return words


def _mixed_words(words: Tensor) -> Tensor:
    """The same of small int64 numbers; the lower 32 bits count."""
    return _mix(_as_int32(words)).to(torch.int64)


def _as_int32(words: Tensor) -> Tensor:
    """The lower 32 bits of int64 numbers, as a signed word."""
    return (((words + 2**31) & 0xFFFFFFFF) - 2**31).to(torch.int32)
