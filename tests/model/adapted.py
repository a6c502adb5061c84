"""A RemoteCall of local spans that applies a client's adapters, and pairs of PEFT models with equal parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from exact import SpanChain, open_split, whole_model
from torch import Tensor, nn

from swarm.model.adapters import Change
from swarm.model.peft_layers import read_adapters
from swarm.model.shadows import RemoteLayers


@contextmanager
def changed(module: nn.Module, change: Change) -> Iterator[None]:
    """Let a change apply to a module, written plainly."""
    drop = nn.functional.dropout
    before = module.register_forward_pre_hook(lambda _, args: (change.enter(args[0]), *args[1:]))
    after = module.register_forward_hook(lambda _, args, y: change.apply(args[0], y, drop))
    yield
    before.remove()
    after.remove()


@dataclass
class AdaptedChain(SpanChain):
    """As SpanChain, with the adapters that lie in a client's shadows."""

    client: Any = None

    def __call__(self, x_BLD: Tensor, **kwargs: Any) -> Tensor:
        layers = next(module for module in self.client.modules() if isinstance(module, RemoteLayers))
        adapters = read_adapters(self.client, layers) or [None] * len(layers)
        blocks = [block for span in self.spans for block in span.layers]
        with ExitStack() as applied:
            for block, adapter in zip(blocks, adapters, strict=True):
                for change in adapter or ():
                    applied.enter_context(changed(block.get_submodule(change.target), change))
            return super().__call__(x_BLD, **kwargs)


def open_adapted(directory: Path, **kwargs: Any) -> tuple[Any, Any]:
    """The client half of a model over adapted spans, and the whole model."""
    client, chain = open_split(directory, **kwargs)
    adapted = AdaptedChain(chain.spans, client=client)
    for module in client.modules():
        if isinstance(module, RemoteLayers):
            module.__dict__["remote"].call = adapted
    return client, whole_model(directory, **kwargs)


def fill(ours: nn.Module, theirs: nn.Module, seed: int = 0) -> dict[str, nn.Parameter]:
    """Give the trainable parameters of two PEFT models the same random values, none of them zero; return ours."""
    generator = torch.Generator().manual_seed(seed)
    trained = {name: each for name, each in ours.named_parameters() if each.requires_grad}
    others = {name: each for name, each in theirs.named_parameters() if each.requires_grad}
    assert trained and trained.keys() == others.keys()
    with torch.no_grad():
        for name, parameter in trained.items():
            offset = 1.0 if "ia3" in name else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + offset)
            others[name].copy_(parameter)
    return trained
