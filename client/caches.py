"""Sessions in the shape of `past_key_values`: what the Hugging Face code of a model takes for its cache."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from swarm.model.remote_cache import RemoteCache

from .session import InferenceSession

# B batch, L new tokens, T cached and new tokens, D hidden

DEFAULT_SESSION_TOKENS = 2048
"""Length of a session that nobody named one for."""


class SessionCache(RemoteCache):
    """The session behind a generation, in the shape of `past_key_values`."""

    def __init__(self, session: InferenceSession | None) -> None:
        super().__init__()
        self._session = session
        self.used_beams = False
        """Whether its rows were reordered, so that they may no longer be those of the caller's batch."""
        self.mask_BT: Tensor | None = None
        """The attention mask of all tokens so far, if any of them is padding."""
        self._beam_idx: Tensor | None = None

    @property
    def session(self) -> InferenceSession:
        assert self._session is not None
        return self._session

    @property
    def position(self) -> int:
        return self.session.position

    def advance(self, num_tokens: int) -> None:
        """Nothing to note: the session counts."""

    def crop(self, tokens_to_remove: int) -> None:
        self.session.rewind(self.kept_of(tokens_to_remove))

    def reset(self) -> None:
        self.session.rewind(0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        beam_idx = beam_idx.cpu()
        self.used_beams = True
        self._beam_idx = beam_idx if self._beam_idx is None else self._beam_idx[beam_idx]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.session.select(torch.arange(self.session.batch_size).repeat_interleave(repeats).tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        self.session.select(torch.arange(self.session.batch_size)[indices.cpu()].tolist())

    def take_beam_idx(self) -> tuple[int, ...]:
        """Return the order of the rows that the next step asks for, once; empty if it is the present one."""
        beam_idx, self._beam_idx = self._beam_idx, None
        if beam_idx is None or bool((beam_idx == torch.arange(len(beam_idx))).all()):
            return ()
        return tuple(beam_idx.tolist())


class DeferredCache(SessionCache):
    """The cache that a call returns where nobody asked for one: it opens no session before it is used.

    As Hugging Face's models do, ours return a cache by default, and most callers drop it. So the first call runs
    without one on any server, and its hidden states are kept here, to be fed to a session by the second call.
    """

    def __init__(self, open_session: Callable[[int], InferenceSession]) -> None:
        super().__init__(None)
        self._open_session = open_session
        self._first: tuple[Tensor, Tensor | None, Tensor | None] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether the call that made it has not been answered yet."""
        return self._first is None and self._session is None

    def hold(self, x_BLD: Tensor, mask_BL: Tensor | None, position_ids_BL: Tensor | None) -> None:
        """Keep what the first call fed to the blocks."""
        self._first = x_BLD.detach(), mask_BL, position_ids_BL

    @property
    def session(self) -> InferenceSession:
        if self._session is None:
            assert self._first is not None
            x_BLD, mask_BL, position_ids_BL = self._first
            session = self._open_session(max(DEFAULT_SESSION_TOKENS, 2 * x_BLD.shape[1]))
            session.begin_with(self.prefix)
            weakref.finalize(self, session.close_soon)
            session.preload(x_BLD, attention_mask=mask_BL, position_ids=position_ids_BL)
            self._session, self._first = session, None
        return self._session

    @property
    def position(self) -> int:
        if self._session is None:
            return 0 if self._first is None else self._first[0].shape[1]
        return self._session.position
