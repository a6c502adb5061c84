"""Adapters that a client owns, inside other people's blocks: the same numbers as in a local model that is changed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tiny import random_ids
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))

from changing import changed, random_adapter

from swarm.model.adapters import BlockAdapter
from swarm.model.targets import find_targets

GRADIENT_TOLERANCE = 1e-4


def make_adapters(swarm: Any, *, seed: int = 1, **how: Any) -> list[BlockAdapter | None]:
    """An adapter for each block, each at all of its modules."""
    spans = [server.running.sessions.views.span for server in swarm.servers]
    targets = {number: widths for span in spans for number, widths in find_targets(span).items()}
    return [random_adapter(targets[number], seed=seed * 100 + number, **how) for number in sorted(targets)]


def with_leaves(adapters: list[BlockAdapter | None]) -> tuple[list[BlockAdapter | None], list[Tensor]]:
    leaves = [
        each and each.with_tensors([tensor.clone().requires_grad_() for tensor in each.tensors().values()])
        for each in adapters
    ]
    return leaves, [tensor for each in leaves if each is not None for tensor in each.tensors().values()]


def train_remote(remote: Any, adapters: list[BlockAdapter | None], ids: Tensor, **inputs: Any) -> list[Tensor]:
    leaves, tensors = with_leaves(adapters)
    remote._swarm.adapters = lambda: leaves
    try:
        loss = remote(input_ids=ids, labels=ids, use_cache=False, **inputs).loss
        return [loss.detach(), *torch.autograd.grad(loss, tensors)]
    finally:
        remote._swarm.adapters = lambda: None


def train_local(local: Any, adapters: list[BlockAdapter | None], ids: Tensor, **inputs: Any) -> list[Tensor]:
    leaves, tensors = with_leaves(adapters)
    with changed(local.model.layers, leaves):
        loss = local(input_ids=ids, labels=ids, use_cache=False, **inputs).loss
    return [loss.detach(), *torch.autograd.grad(loss, tensors)]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=GRADIENT_TOLERANCE * float(other.abs().max().clamp(1)), rtol=0)


def test_loss_and_gradients_of_all_kinds(llama):
    adapters, ids = make_adapters(llama.swarm), random_ids(2, 9)
    adapters[3] = None
    assert_same(train_remote(llama.remote, adapters, ids), train_local(llama.local, adapters, ids))
