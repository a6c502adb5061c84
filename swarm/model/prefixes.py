"""Prefixes as people bring them: keys and values in a cache of the library's, as PEFT's prefix tuning makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from swarm.errors import BadRequest
from swarm.model.adapters import BlockAdapter, ModelAdapter, num_prefix_tokens
from swarm.model.changes import PAST, Prefix

# B batch, P tokens of a prefix, M key/value heads, H head dim

ModelPrefix = Sequence[Prefix]
"""One for each block of a model, all of the same length."""


def read_prefix(cache: Any, num_blocks: int) -> ModelPrefix:
    """Return what a cache holds as the prefix of a call; differentiable in its tensors.

    Raises: BadRequest: it is empty, not the same for all sequences, or keeps something else than keys and values.
    """
    num_tokens = cache.get_seq_length() if isinstance(cache, Cache) else 0
    layers = cache.layers if num_tokens else []
    if len(layers) != num_blocks or not all(_holds_keys_and_values(layer) for layer in layers):
        raise BadRequest(
            f"past_key_values is a {type(cache).__name__} that does not hold keys and values of all {num_blocks} "
            "blocks, and those of remote blocks lie on servers: pass a cache that this model returned, or none"
        )
    return [Prefix(PAST, *(_rows(heads, num_tokens) for heads in (layer.keys, layer.values))) for layer in layers]


def with_prefix(adapters: ModelAdapter | None, prefix: ModelPrefix | None) -> ModelAdapter | None:
    """The adapters of all blocks, with this prefix, or none, in front instead of the one that they may have."""
    adapters = adapters or [None] * len(prefix or ())
    if prefix is None and not num_prefix_tokens(adapters):
        return adapters or None
    others = [[change for change in adapter or () if not isinstance(change, Prefix)] for adapter in adapters]
    if prefix is None:
        return [BlockAdapter(changes) if changes else None for changes in others]
    return [BlockAdapter([*changes, each]) for changes, each in zip(others, prefix, strict=True)]


def _holds_keys_and_values(layer: Any) -> bool:
    return isinstance(layer, DynamicLayer) and layer.is_initialized and layer.keys.numel() > 0


def _rows(heads_BMPH: Tensor, num_tokens: int) -> Tensor:
    """[P, M * H]. PEFT repeats it for each sequence; here all its gradients go to the first."""
    first = heads_BMPH[:1]
    if not torch.equal(first.expand_as(heads_BMPH), heads_BMPH):
        raise BadRequest(
            "past_key_values holds other keys and values for each sequence: servers put the same ones in front of all, "
            "as prefix tuning does; pass one sequence at a time"
        )
    rows_PX = first[0].transpose(0, 1).flatten(1)
    # A layer with a window has forgotten what no new token sees.
    return torch.cat([rows_PX.new_zeros(num_tokens - len(rows_PX), rows_PX.shape[1]), rows_PX])
