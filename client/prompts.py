"""Trainable prompts: virtual tokens in front of the sequence, and deep prompts added inside every block."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from swarm.errors import BadRequest

# B batch, D hidden, N blocks, P virtual tokens

TuningMode = Literal["ptune", "deep_ptune"]


class Prompts(nn.Module):
    """The parameters of prompt tuning.

    "ptune" puts P trainable vectors in front of the token embeddings (Lester et al. 2021, The Power of Scale for
    Parameter-Efficient Prompt Tuning). "deep_ptune" also adds trainable vectors to the first P hidden states that
    enter each block (after Li and Liang 2021, Prefix-Tuning, and Liu et al. 2022, P-Tuning v2).
    """

    def __init__(self, mode: TuningMode, pre_seq_len: int, num_blocks: int, hidden_size: int, dtype: torch.dtype):
        super().__init__()
        if mode not in ("ptune", "deep_ptune"):
            raise BadRequest(f"tuning_mode {mode!r} is not known: use 'ptune' or 'deep_ptune'")
        if pre_seq_len < 1:
            raise BadRequest(f"tuning_mode {mode!r} needs pre_seq_len, the number of virtual tokens: pass at least 1")
        self.mode = mode
        self.pre_seq_len = pre_seq_len
        self.embeddings_PD = nn.Parameter(torch.empty(pre_seq_len, hidden_size, dtype=dtype).normal_(std=0.02))
        deep = torch.zeros(num_blocks, 1, pre_seq_len, hidden_size, dtype=dtype) if mode == "deep_ptune" else None
        self.deep_NBPD = None if deep is None else nn.Parameter(deep)

    def prepend(self, x_BLD: Tensor) -> Tensor:
        """Return the hidden states with the virtual tokens in front, [B, P + L, D]."""
        prefix_BPD = self.embeddings_PD.to(x_BLD.device, x_BLD.dtype).expand(x_BLD.shape[0], -1, -1)
        return torch.cat([prefix_BPD, x_BLD], dim=1)

    def prepend_mask(self, mask_BL: Tensor | None) -> Tensor | None:
        """Return the attention mask with ones for the virtual tokens in front."""
        if mask_BL is None:
            return None
        return torch.cat([mask_BL.new_ones(mask_BL.shape[0], self.pre_seq_len), mask_BL], dim=1)

    def prepend_position_ids(self, position_ids_BL: Tensor | None) -> Tensor | None:
        """Return the positions moved behind those of the virtual tokens, which come in front."""
        if position_ids_BL is None:
            return None
        prefix = torch.arange(self.pre_seq_len, device=position_ids_BL.device).expand(position_ids_BL.shape[0], -1)
        return torch.cat([prefix, position_ids_BL + self.pre_seq_len], dim=1)
