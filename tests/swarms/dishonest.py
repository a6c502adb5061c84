"""Servers that do not compute what they announce: only tests have them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from swarm.server.execution import Executor, Slice

Lie = Callable[[Tensor], Tensor]
"""Makes of the hidden states that leave a span, [B, L, D], what the server claims instead."""


class LyingExecutor:
    """Runs slices, and tells something else than what came of them."""

    def __init__(self, honest: Executor, lie: Lie) -> None:
        self._honest = honest
        self._lie = lie

    def groups(self, slices: Sequence[Slice]) -> list[list[Slice]]:
        return self._honest.groups(slices)

    def run(self, group: Sequence[Slice]) -> list[Tensor]:
        return [self._lie(y_BLD) for y_BLD in self._honest.run(group)]


def noise(magnitude: float) -> Lie:
    """Add noise of that share of what the hidden states are in size."""

    def add(y_BLD: Tensor) -> Tensor:
        return y_BLD + magnitude * y_BLD.float().std(-1, keepdim=True).to(y_BLD.dtype) * torch.randn_like(y_BLD)

    return add


def stale() -> Lie:
    """Tell again what the first token has got."""
    told: list[Tensor] = []

    def repeat(y_BLD: Tensor) -> Tensor:
        told.append(y_BLD[:1, :1])
        return told[0].expand_as(y_BLD).clone()

    return repeat


def random() -> Lie:
    """Tell anything."""
    return lambda y_BLD: torch.randn_like(y_BLD) * y_BLD.std()


def corrupt(server: Any, lie: Lie) -> str:
    """Let a server of this process lie from now on; return its peer id."""
    engine = server.running.engine
    engine._executor = LyingExecutor(engine._executor, lie)
    return server.running.service._model.peer_id
