"""A RemoteCall of local spans that applies a client's adapters, and pairs of PEFT models with equal parameters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from exact import LocalCache, SpanChain, open_split, whole_model
from torch import Tensor, nn

from swarm.model.dropout import Dropout
from swarm.model.peft_layers import read_adapters
from swarm.model.prefixes import with_prefix
from swarm.model.shadows import RemoteLayers
from swarm.model.span import Span
from swarm.model.span_cache import SpanCache


@dataclass
class AdaptedChain(SpanChain):
    """As SpanChain, with the adapters that lie in a client's shadows."""

    client: Any = None

    def __call__(
        self, x_BLD: Tensor, *, cache: Any, attention_mask_BT: Any, position_ids_BL: Any, prefix: Any
    ) -> Tensor:
        layers = next(module for module in self.client.modules() if isinstance(module, RemoteLayers))
        adapters = with_prefix(read_adapters(self.client, layers), prefix) or [None] * len(layers)
        caches: list[Any] = [None] * len(self.spans)
        if cache is not None:
            assert isinstance(cache, LocalCache)
            caches = cache.caches = cache.caches or [
                _new_cache(span, x_BLD.shape[0], adapters[span.blocks.start : span.blocks.end]) for span in self.spans
            ]
        dropout = Dropout(int(torch.randint(1 << 62, ())), 0, x_BLD.shape[1])
        for span, span_cache in zip(self.spans, caches, strict=True):
            x_BLD = span(
                x_BLD,
                cache=span_cache,
                attention_mask_BT=attention_mask_BT,
                position_ids_BL=position_ids_BL,
                adapters=adapters[span.blocks.start : span.blocks.end],
                dropout=dropout,
            )
        return x_BLD


def _new_cache(span: Span, batch_size: int, adapters: Any) -> SpanCache:
    cache = span.new_cache(batch_size)
    if prefix := span.prefix_of(adapters):
        cache.begin_with(prefix)
    return cache


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
