"""Keys and values of all sequences of a server: per block one large tensor of slots, one slot per token.

Which slot holds which token of which sequence is the caller's business (it keeps pages); here is only the memory.
"""

# S slots, T tokens, N key/value heads, H head dim

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from swarm.errors import UnsupportedModel
from swarm.model.span import Span
from swarm.ranges import BlockRange


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one token leaves in one block; keys and values may differ (latent attention)."""

    num_kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class KVLayout:
    """What one token leaves in each block of a span."""

    blocks: BlockRange
    shapes: tuple[KVShape, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_slot(self) -> int:
        """Memory of one token, all blocks together."""
        numbers = sum(shape.num_kv_heads * (shape.key_dim + shape.value_dim) for shape in self.shapes)
        return numbers * self.dtype.itemsize


def kv_layout(span: Span) -> KVLayout:
    """Find out, by running one token, what a token leaves in each block.

    Raises:
        UnsupportedModel: a block keeps something else than keys and values.
    """
    cache, shapes = span.one_token, []
    for number, layer in zip(span.blocks, cache.layers, strict=True):
        if type(layer) is not DynamicLayer or not layer.is_initialized:
            raise UnsupportedModel(f"block {number} keeps something else than keys and values: {type(layer).__name__}")
        (_, num_kv_heads, _, key_dim), value_dim = layer.keys.shape, layer.values.shape[-1]
        shapes.append(KVShape(num_kv_heads, key_dim, value_dim))
    return KVLayout(span.blocks, tuple(shapes), cache.layers[0].keys.dtype, span.device)


class KVStore:
    """The memory of `num_slots` tokens in every block of a layout; on a CPU it is taken only as slots are written.

    Blocks go by their number in the whole model, so that views of a span share the store of the span.
    """

    def __init__(self, layout: KVLayout, num_slots: int, *, scrap_slots: int = 0) -> None:
        """Take the memory.

        Args:
            scrap_slots: how many more there are behind them, for tokens that only fill up a row (graphs.py).
        """
        self.layout = layout
        self.num_slots = num_slots
        self.scrap_slots = scrap_slots
        with torch.inference_mode(False):
            self._heads = {
                number: (self._empty(shape, shape.key_dim), self._empty(shape, shape.value_dim))
                for number, shape in zip(layout.blocks, layout.shapes, strict=True)
            }

    def _empty(self, shape: KVShape, head_dim: int) -> Tensor:
        """Slots of keys or values, [1, N, S, H]."""
        sizes, layout = (self.num_slots + self.scrap_slots, shape.num_kv_heads, head_dim), self.layout
        if layout.device.type == "cpu":  # measured: attention reads one head's tokens faster when they are adjacent
            return torch.empty(1, sizes[1], sizes[0], sizes[2], dtype=layout.dtype)
        return torch.empty(sizes, dtype=layout.dtype, device=layout.device).transpose(0, 1).unsqueeze(0)

    @property
    def num_bytes(self) -> int:
        """Memory of all slots, used or not."""
        return (self.num_slots + self.scrap_slots) * self.layout.bytes_per_slot

    @property
    def bytes_per_token_and_block(self) -> int:
        """What attention in one block reads for one token, on average over the blocks."""
        return self.layout.bytes_per_slot // len(self.layout.shapes)

    def heads(self, number: int) -> tuple[Tensor, Tensor]:
        """The keys and values of one block, [1, N, S, H] each, as attention reads them."""
        return self._heads[number]

    def block(self, number: int) -> tuple[Tensor, Tensor]:
        """The keys and values of one block, [S, N, H] each; writing into them writes into the store."""
        keys, values = self._heads[number]
        return keys[0].transpose(0, 1), values[0].transpose(0, 1)

    def write(self, number: int, slots_T: Tensor, keys_1NTH: Tensor, values_1NTH: Tensor) -> None:
        """Write tokens of one block into their slots (int64, all different)."""
        for store, tokens in zip(self._heads[number], (keys_1NTH, values_1NTH), strict=True):
            store.index_copy_(2, slots_T, tokens)

    def copy(self, copies: Iterable[tuple[int, int, int]]) -> None:
        """Copy slots in every block: each (source, target, count) the `count` slots from `source` on to `target`."""
        with torch.inference_mode():
            for source, target, count in copies:
                for tensors in self._heads.values():
                    for each in tensors:
                        each[:, :, target : target + count] = each[:, :, source : source + count]


def read_runs(heads_1NSH: Tensor, runs: Sequence[tuple[int, int]]) -> Tensor:
    """The keys or values in some slots, in order; not copied if they are one run."""
    if len(runs) == 1:
        start, end = runs[0]
        return heads_1NSH.narrow(2, start, end - start)
    return torch.cat([heads_1NSH.narrow(2, start, end - start) for start, end in runs], dim=2)
