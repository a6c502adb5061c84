"""Servers that do not compute what they announce: only tests have them.

Some tell something else than what came of their blocks; others serve a checkpoint whose tensors have the right names
and shapes, so that its fingerprint is the right one, and which is another model.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from swarm.server.batches import Gradients
from swarm.server.execution import Executor, Slice

Lie = Callable[[Tensor], Tensor]
"""Makes of the hidden states that leave a span, [B, L, D], what the server claims instead."""


def noise(magnitude: float) -> Lie:
    """Add noise of that share of what the hidden states are in size."""

    def add(y_BLD: Tensor) -> Tensor:
        return y_BLD + magnitude * y_BLD.float().std(-1, keepdim=True).to(y_BLD.dtype) * torch.randn_like(y_BLD)

    return add


def stale() -> Lie:
    """Tell again what came of an earlier step."""
    told: list[Tensor] = []

    def repeat(y_BLD: Tensor) -> Tensor:
        told.append(y_BLD[:1, -1:])
        return told[-2:][0].expand_as(y_BLD).clone()

    return repeat


def random() -> Lie:
    """Tell anything."""
    return lambda y_BLD: torch.randn_like(y_BLD) * y_BLD.std()


class LyingExecutor:
    """Runs slices, and tells something else than what came of them."""

    def __init__(self, honest: Executor, lie: Lie) -> None:
        self._honest = honest
        self._lie = lie

    def groups(self, slices: Sequence[Slice]) -> list[list[Slice]]:
        return self._honest.groups(slices)

    def run(self, group: Sequence[Slice]) -> list[Tensor]:
        return [self._lie(y_BLD) for y_BLD in self._honest.run(group)]


def corrupt(server: Any, lie: Lie) -> None:
    """Let a server of this process lie from now on, in sessions and in batches."""
    engine = server.running.engine
    engine._executor = LyingExecutor(engine._executor, lie)
    honest = engine.train

    async def train(*args: Any, **kwargs: Any) -> Any:
        result = await honest(*args, **kwargs)
        return replace(result, dx_BLD=lie(result.dx_BLD)) if isinstance(result, Gradients) else lie(result)

    engine.train = train


def dropped(name: str, tensor: Tensor) -> Tensor:
    """Of the blocks 1 and 3, which are the last ones of two servers, nothing is left but the way around them."""
    is_last = any(f".layers.{number}." in name for number in (1, 3))
    return torch.zeros_like(tensor) if is_last and name.endswith(("o_proj.weight", "down_proj.weight")) else tensor


def smaller(name: str, tensor: Tensor) -> Tensor:
    """Half of the intermediate features are missing in all blocks, as in a model of that size."""
    if not name.endswith("down_proj.weight"):
        return tensor
    kept = tensor.clone()
    kept[:, tensor.shape[1] // 2 :] = 0
    return kept


def tampered(checkpoint: Path, directory: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    """A copy of a checkpoint with other weights of the same names."""
    shutil.copytree(checkpoint, directory, dirs_exist_ok=True)
    path = directory / "model.safetensors"
    save_file({name: change(name, each) for name, each in load_file(path).items()}, path, metadata={"format": "pt"})
    return directory
