"""The client's stand-in for a KV cache that lies on servers: it counts tokens and holds no tensor."""

from __future__ import annotations

from torch import Tensor
from transformers import Cache


class RemoteCache(Cache):
    """A position, in the shape that the library's generation, mask and position code expects.

    Client code subclasses it to tie it to a session: `position` and `advance` may be overridden together, and
    `reorder_cache`, `crop`, `batch_repeat_interleave`, `batch_select_indices` and `reset` are told what is to happen
    to the remote caches.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._position = 0

    @property
    def position(self) -> int:
        """Tokens that the remote caches hold."""
        return self._position

    def advance(self, num_tokens: int) -> None:
        """Note that a call has appended tokens; the client half says so after each call that succeeded."""
        self._position += num_tokens

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens: -n removes the last n; a positive number is the length to keep, as older releases have it."""
        self._position = (
            min(self._position, tokens_to_remove) if tokens_to_remove > 0 else self._position + tokens_to_remove
        )

    def reset(self) -> None:
        self._position = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row b be what row beam_idx[b] was."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.position

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.position + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.position > 0

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.position > 0

    @property
    def is_croppable(self) -> bool:
        return True
