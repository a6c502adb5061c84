"""Trainable prompts: virtual tokens in front of the sequence, and deep prompts added inside every block."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from swarm.errors import BadCheckpoint, BadRequest

# B batch, D hidden, N blocks, P virtual tokens

TuningMode = Literal["ptune", "deep_ptune"]

CONFIG_FILE = "prompts.json"
WEIGHTS_FILE = "prompts.safetensors"


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

    def save_pretrained(self, directory: str | Path) -> None:
        """Write mode and weights, and nothing of the model; `from_pretrained(…, prompts=directory)` reads them."""
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        (path / CONFIG_FILE).write_text(json.dumps({"tuning_mode": self.mode}) + "\n")
        weights = {name: each.detach().cpu().contiguous() for name, each in self.state_dict().items()}
        save_file(weights, path / WEIGHTS_FILE)

    @classmethod
    def from_pretrained(cls, directory: str | Path, num_blocks: int, hidden_size: int) -> Prompts:
        """Read saved prompts of a model of this size.

        Raises: BadCheckpoint: there are none in the directory, or of another model.
        """
        path = Path(directory)
        try:
            mode = json.loads((path / CONFIG_FILE).read_text())["tuning_mode"]
            weights = load_file(path / WEIGHTS_FILE)
            prompts = cls(mode, len(weights["embeddings_PD"]), num_blocks, hidden_size, torch.float32)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError, BadRequest) as exc:
            raise BadCheckpoint(f"there are no prompts in {str(path)!r}: {exc}") from exc
        try:
            prompts.load_state_dict(weights)
        except RuntimeError as exc:
            raise BadCheckpoint(f"the prompts in {str(path)!r} are those of another model") from exc
        return prompts
