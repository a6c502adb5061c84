"""The client's stand-in for a KV cache that lies on servers: it counts tokens and holds no tensor."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import Cache

from swarm.model.changes import Prefix


class RemoteCache(Cache):
    """A position, behind a prefix or none, in the shape that the library's generation, mask and position code expects.

    Client code subclasses it to tie it to a session: `position` and `advance` may be overridden together, and
    `reorder_cache`, `crop`, `batch_repeat_interleave`, `batch_select_indices` and `reset` are told what is to happen
    to the remote caches.
    """

    def __init__(self, prefix: Sequence[Prefix] | None = None) -> None:
        super().__init__(layers=[])
        self._position = 0
        self.prefix = prefix
        """What stands in front of the tokens, for each block. The library counts it, positions here do not."""

    @property
    def position(self) -> int:
        """Tokens that the remote caches hold."""
        return self._position

    @property
    def num_prefix_tokens(self) -> int:
        return self.prefix[0].num_tokens if self.prefix else 0

    def advance(self, num_tokens: int) -> None:
        """Note that a call has appended tokens; the client half says so after each call that succeeded."""
        self._position += num_tokens

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens: -n removes the last n; a positive number is the length to keep, as older releases have it."""
        self._position = self.kept_of(tokens_to_remove)

    def kept_of(self, tokens_to_remove: int) -> int:
        """How many tokens `crop` leaves."""
        kept = tokens_to_remove - self.num_prefix_tokens if tokens_to_remove > 0 else self.position + tokens_to_remove
        return min(self.position, max(0, kept))

    def reset(self) -> None:
        self._position = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row b be what row beam_idx[b] was."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.num_prefix_tokens + self.position

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def max_cache_len(self) -> int:
        """The same under an older name, which PEFT looks for."""
        return self.get_max_length()

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.get_seq_length() > 0

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.get_seq_length() > 0

    @property
    def is_croppable(self) -> bool:
        return True
