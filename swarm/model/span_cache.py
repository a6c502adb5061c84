"""The KV cache of one session on one span.

Attention layers keep every token, windows or not (the masks implement windows), so going back to any position is
cutting. Linear-attention layers keep a state that cannot be cut: a copy from before the newest step allows to go back
over that step, and position 0 is always possible.
"""

# B batch, T cached tokens, P tokens of a prefix, M key/value heads, H head dim

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import (
    CacheLayerMixin,
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
)

from swarm.errors import BadRequest, UnsupportedModel

CUTTABLE = (DynamicLayer, DynamicIndexedLayer, DummyLayer, LinearAttentionAndFullAttentionLayer)
FLAGS = "has_previous_state", "is_conv_states_initialized", "is_recurrent_states_initialized"


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """The linear-attention states at one position: per layer, per kind, per state number."""

    position: int
    states: list[dict[str, dict[int, Any]] | None]


def cache_layers(config: PretrainedConfig) -> list[Any]:
    """The cache layers that the blocks of a (cut) config need, with windows turned into full layers."""
    layers = []
    for layer in DynamicCache(config=config).layers:
        if type(layer) is DynamicSlidingWindowLayer:
            layer = DynamicLayer()
        elif type(layer) is LinearAttentionAndSlidingWindowAttentionLayer:
            layer = LinearAttentionAndFullAttentionLayer(number_of_states=layer.number_of_states)
        layers.append(layer)
    return layers


class SpanCache(Cache):
    """Keys, values and linear-attention states of the blocks of one span.

    It counts tokens itself, because a span may have no attention layer to ask.
    """

    def __init__(self, config: PretrainedConfig, batch_size: int) -> None:
        super().__init__(layers=cache_layers(config))
        self._config = config
        self._batch = batch_size
        self._length = 0
        self._snapshot: _Snapshot | None = None
        self._has_states = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.layers)
        self._linear = [
            isinstance(layer, LinearAttentionCacheLayerMixin) and not isinstance(layer, CacheLayerMixin)
            for layer in self.layers
        ]
        self._dummy = [isinstance(layer, DummyLayer) for layer in self.layers]

    @property
    def length(self) -> int:
        """Tokens cached."""
        return self._length

    @property
    def batch_size(self) -> int:
        return self._batch

    @property
    def can_rewind(self) -> bool:
        """Whether every earlier position can be gone back to."""
        return not self._has_states and all(type(layer) in CUTTABLE for layer in self.layers)

    @property
    def num_bytes(self) -> int:
        """Memory held at present, on whatever device."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())

    def begin_with(self, prefix: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Let an empty cache begin with these keys and values, [1, M, P, H] for each block, in all sequences."""
        assert self._length == 0, f"a prefix behind {self._length} tokens"
        for layer, heads in zip(self.layers, prefix, strict=True):
            layer.update(*(each.expand(self._batch, -1, -1, -1) for each in heads))
        self._length = prefix[0][0].shape[2]

    def begin_step(self) -> None:
        """Make sure that this step can be undone."""
        if self._has_states and self._length:
            self._snapshot = _Snapshot(self._length, [_copy_states(layer) for layer in self.layers])

    def end_step(self, num_tokens: int) -> None:
        self._length += num_tokens

    def undo_step(self) -> None:
        """Forget what a failed step has written; the length is still that from before it."""
        self.rewind(self._length)

    def rewind(self, position: int) -> None:
        """Go back to the first `position` tokens.

        Raises:
            BadRequest: `position` is negative, or more tokens than are cached.
            UnsupportedModel: a recurrent state would have to go back further than its copy allows.
        """
        if not 0 <= position <= self._length:
            raise BadRequest(f"cannot rewind to position {position}: {self._length} tokens are cached")
        if position == 0:
            self.layers = cache_layers(self._config)
            self._snapshot = None
        elif self._has_states:
            self._restore(position)
        if position:
            for layer in self.layers:
                _cut(layer, position)
        self._length = position

    def _restore(self, position: int) -> None:
        snapshot = self._snapshot
        if snapshot is None or snapshot.position != position:
            if position == self._length:
                return
            allowed = "0" if snapshot is None else f"0 or {snapshot.position}"
            raise UnsupportedModel(
                f"this model's linear-attention blocks keep a state that cannot go back to position {position}, only "
                f"to {allowed}: start the sequence again from position 0"
            )
        for layer, states in zip(self.layers, snapshot.states, strict=True):
            for name, values in (states or {}).items():
                getattr(layer, name).update(
                    {key: value.clone() if isinstance(value, Tensor) else value for key, value in values.items()}
                )

    def reorder(self, beam_idx: Tensor) -> None:
        """Let row b be what row beam_idx[b] was; `beam_idx` is int64 of any length."""
        self.reorder_cache(beam_idx)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._batch = len(beam_idx)
        for states in self._snapshot.states if self._snapshot else ():
            for values in (states or {}).values():
                for key, value in values.items():
                    if isinstance(value, Tensor):
                        values[key] = value.index_select(0, beam_idx.to(value.device))

    def _tensors(self) -> Iterator[Tensor]:
        for layer in self.layers:
            for value in vars(layer).values():
                for tensor in value.values() if isinstance(value, dict) else (value,):
                    if isinstance(tensor, Tensor):
                        yield tensor

    # What the library's mask and position code asks of a cache.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        layer = self.layers[layer_idx] if layer_idx else None
        return layer.get_seq_length() if isinstance(layer, CacheLayerMixin) else self._length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return super().has_previous_state(layer_idx, state_idx) if self._has_states else self._length > 0

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self.layers)

    @property
    def is_linear(self) -> list[bool]:
        return self._linear

    @property
    def is_dummy(self) -> list[bool]:
        return self._dummy


def _copy_states(layer: Any) -> dict[str, dict[int, Any]] | None:
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        return None
    copies = {name: dict(getattr(layer, name)) for name in FLAGS}
    for name in ("conv_states", "recurrent_states"):
        states = getattr(layer, name)
        copies[name] = {key: None if state is None else state.clone() for key, state in states.items()}
    return copies


def _cut(layer: Any, position: int) -> None:
    """Drop what one layer holds beyond the first `position` tokens."""
    if isinstance(layer, DynamicLayer) and layer.is_initialized and layer.keys.shape[-2] > position:
        layer.keys = layer.keys[..., :position, :]
        layer.values = layer.values[..., :position, :]
    indexed = getattr(layer, "indexer_keys", None)
    if isinstance(indexed, torch.Tensor) and indexed.shape[1] > position:
        layer.indexer_keys = indexed[:, :position]
        if layer.indexer_position_ids is not None:
            layer.indexer_position_ids = layer.indexer_position_ids[..., :position]
