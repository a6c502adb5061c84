"""Inference sessions as people use them: from ordinary code, one step after the other."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import CancelledError
from dataclasses import replace

import torch
from torch import Tensor

from swarm.errors import BadRequest, PromptTooLong
from swarm.model.adapters import ModelAdapter, frozen
from swarm.model.prefixes import ModelPrefix, with_prefix
from swarm.streams import Step

from .chain import ChainConfig
from .hosted import check_one_way
from .loop import LoopThread
from .network import Network
from .prompts import Prompts
from .remote_session import RemoteSession
from .routing import Hop, Needs
from .uploads import names_of

# B batch, L length, T all tokens so far, D hidden, N blocks, P virtual tokens


def _as_int64(tensor: Tensor | None, batch_size: int) -> Tensor | None:
    """As it travels; one row stands for all sequences."""
    if tensor is None:
        return None
    tensor = tensor.detach().to("cpu", torch.int64)
    return tensor.expand(batch_size, -1) if tensor.dim() == 2 and tensor.shape[0] == 1 else tensor


def _check_hidden_states(x_BLD: Tensor, hidden_size: int) -> None:
    fits = x_BLD.dim() == 3 and x_BLD.shape[2] == hidden_size and x_BLD.is_floating_point()
    if not fits or 0 in x_BLD.shape:
        raise BadRequest(
            f"a step takes hidden states of shape [batch, length, {hidden_size}] in floating point, with at least one "
            f"sequence and one token, got {x_BLD.dtype} {list(x_BLD.shape)}"
        )


def _check_step(step: Step) -> None:
    """Raise BadRequest for what every server would refuse, before it reaches the record."""
    batch_size, length, _ = step.x_BLD.shape
    for name, tensor in (("attention_mask", step.mask_BL), ("position_ids", step.position_ids_BL)):
        if tensor is not None and tensor.shape != (batch_size, length):
            raise BadRequest(f"{name} must have the shape [{batch_size}, {length}], got {list(tensor.shape)}")
    if step.mask_BL is not None and bool(((step.mask_BL != 0) & (step.mask_BL != 1)).any()):
        raise BadRequest("attention_mask must contain zeros and ones only")
    if step.position_ids_BL is not None and bool((step.position_ids_BL < 0).any()):
        raise BadRequest("position_ids must not be negative")
    if step.beam_idx and (len(step.beam_idx) != batch_size or not all(0 <= row < batch_size for row in step.beam_idx)):
        raise BadRequest(f"beam_idx must name {batch_size} sequences, each below {batch_size}")
    if not 0 <= step.num_outputs <= length:
        raise BadRequest(f"a step of {length} tokens cannot return {step.num_outputs}")


def _close_soon(loop: LoopThread, session: RemoteSession) -> None:
    loop.submit(session.aclose())


class InferenceSession:
    """A decoding session over remote blocks, for use from ordinary code; one thread at a time.

    Positions and lengths count the caller's tokens; virtual tokens in front of them are the session's own affair.

    Args:
        config: its max_tokens counts the virtual tokens.
        batch_size: number of sequences; None: that of the first step.
        prompts: virtual tokens to feed before the first step.
    """

    def __init__(
        self,
        loop: LoopThread,
        network: Network,
        needs: Needs,
        config: ChainConfig,
        *,
        batch_size: int | None = None,
        prompts: Prompts | None = None,
    ) -> None:
        self._loop = loop
        self._network = network
        self._needs = needs
        self._config = config
        self._wanted_batch_size = batch_size
        self._batch_size = batch_size
        self._prompts = prompts
        self._num_virtual_tokens = 0 if prompts is None else prompts.pre_seq_len
        self._session: RemoteSession | None = None
        self._position = 0
        self._closed = False
        self._cancelled = False
        self._stepping = threading.Lock()
        self.output_ids: Tensor | None = None
        """Token ids of all calls of `generate` in this session, [B, T]; None before the first."""
        self.output_mask: Tensor | None = None
        """Attention mask of output_ids where some are padding."""

    @property
    def batch_size(self) -> int:
        """Number of sequences; 0 before the first step where none was given."""
        return self._batch_size or 0

    @property
    def max_length(self) -> int:
        """Tokens it may reach, per sequence."""
        return self._config.max_tokens - self._num_virtual_tokens

    @property
    def adapters(self) -> ModelAdapter | None:
        """What is changed in the blocks, for as long as it is open."""
        return self._config.adapters

    def begin_with(self, prefix: ModelPrefix | None) -> None:
        """Put keys and values, or none, in front of all tokens; positions and lengths do not count them.

        Raises: BadRequest: it holds tokens that came after something else.
        """
        adapters = frozen(with_prefix(self._config.adapters, prefix))
        if names_of(adapters) == names_of(self._config.adapters):
            return
        if self._position:
            raise BadRequest("a session that holds tokens cannot begin with another prefix: open a new one")
        check_one_way(adapters, self._config.hosted)
        self.restart()
        self._config = replace(self._config, adapters=adapters)

    @property
    def route(self) -> Sequence[Hop]:
        """The servers in use right now."""
        return () if self._session is None else self._session.route

    @property
    def position(self) -> int:
        """Tokens fed so far. Set it to a smaller value to roll back: the next step continues from there."""
        return self._position

    @position.setter
    def position(self, value: int) -> None:
        self.rewind(value)
        if self.output_ids is not None:
            self.output_ids = self.output_ids[:, : value + 1] if value else None
        if self.output_mask is not None:
            self.output_mask = self.output_mask[:, : value + 1] if value else None

    def rewind(self, position: int) -> None:
        """Go back to a position and leave `output_ids` as they are: what is fed next is part of them."""
        if not 0 <= position <= self._position:
            raise BadRequest(f"the session is at position {self._position}; it can be set back to 0..{self._position}")
        self._position = position

    def step(
        self,
        x_BLD: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        beam_idx: Sequence[int] = (),
        num_outputs: int | None = None,
    ) -> Tensor:
        """Run tokens through all blocks, continuing what was fed before.

        Args:
            x_BLD: hidden states entering the first block.
            attention_mask: int64 [B, L], 0 for padding; None: no padding.
            position_ids: int64 [B, L]; None: position, position + 1, ...
            beam_idx: sequences of the cache in their new order, applied before the step.
            num_outputs: how many trailing positions to return; None: all.
        Returns: [B, L or num_outputs, D], dtype and device of x_BLD.
        Raises: PromptTooLong: more tokens than max_length. BadRequest: x_BLD does not fit the session.
            concurrent.futures.CancelledError: `cancel` was called.
            NoRoute: no servers for some blocks within the timeout; the session is unchanged and can go on later.
        """
        if self._closed:
            raise BadRequest("the session is closed: open a new one")
        _check_hidden_states(x_BLD, self._config.hidden_size)
        batch_size, length, _ = x_BLD.shape
        if self._position + length > self.max_length:
            raise PromptTooLong(
                f"the session was opened for {self.max_length} tokens and holds {self._position}; {length} more do not "
                "fit: open it with a larger max_length"
            )
        if not self._stepping.acquire(blocking=False):
            raise BadRequest("another thread is feeding this session: use one session per thread")
        try:
            session = self._session_for(batch_size)
            if self._cancelled:
                raise CancelledError
            count = length if num_outputs is None else num_outputs
            mask, ids = _as_int64(attention_mask, batch_size), _as_int64(position_ids, batch_size)
            step = Step(self._position, count, x_BLD.detach().to("cpu"), mask, ids, tuple(beam_idx))
            _check_step(step)
            y_BLD = self._loop.run(session.step(self._behind_prompts(step)))
            self._position += length
        finally:
            self._stepping.release()
        return y_BLD.to(x_BLD.device, x_BLD.dtype)

    def preload(self, x_BLD: Tensor, *, attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
        """Count tokens as fed that no server has seen yet: they travel with the first step. Arguments as for `step`."""
        batch_size, length, _ = x_BLD.shape
        mask, ids = _as_int64(attention_mask, batch_size), _as_int64(position_ids, batch_size)
        step = Step(0, 0, x_BLD.detach().to("cpu"), mask, ids)
        _check_step(step)
        self._session_for(batch_size).preload(self._behind_prompts(step))
        self._position = length

    def _behind_prompts(self, step: Step) -> Step:
        """The step as the servers see it: virtual tokens in front of the first one, positions moved behind them."""
        prompts = self._prompts
        if prompts is None:
            return step
        ids_BL = step.position_ids_BL
        if step.position:
            moved = None if ids_BL is None else ids_BL + prompts.pre_seq_len
            return replace(step, position=step.position + prompts.pre_seq_len, position_ids_BL=moved)
        with torch.no_grad():
            return replace(
                step,
                x_BLD=prompts.prepend(step.x_BLD),
                mask_BL=prompts.prepend_mask(step.mask_BL),
                position_ids_BL=prompts.prepend_position_ids(ids_BL),
            )

    def _session_for(self, batch_size: int) -> RemoteSession:
        if self._batch_size not in (None, batch_size):
            raise BadRequest(f"the session holds {self._batch_size} sequences, the step has {batch_size}")
        self._batch_size = batch_size
        if self._session is None:
            config = replace(self._config, batch_size=batch_size)
            self._session = RemoteSession(self._network, self._needs, config)
            # A session that is dropped without a word ends in order all the same; closing twice is fine.
            weakref.finalize(self, _close_soon, self._loop, self._session).atexit = False
        return self._session

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows of the batch, in this order; a row may come several times."""
        if self._session is not None:
            self._loop.run(self._session.select(rows))
            self._batch_size = len(rows)

    def restart(self) -> None:
        """Go back to position 0 and the number of sequences it was opened for; output_ids stay."""
        session, self._session = self._session, None
        self._position, self._batch_size = 0, self._wanted_batch_size
        if session is not None:
            self._loop.run(session.aclose())

    def cancel(self) -> None:
        """End the session from another thread, in the middle of a step, without waiting for it.

        The step under way and all later ones raise concurrent.futures.CancelledError; servers free the cache at once.
        """
        self._cancelled = True
        if (session := self._session) is not None:
            self._loop.submit(session.cancel())

    def close_soon(self) -> None:
        """End the session without waiting for it; for use where nothing may block, as in a finalizer."""
        self._closed = True
        session, self._session = self._session, None
        if session is not None:
            _close_soon(self._loop, session)

    def close(self) -> None:
        """End the session; servers free its cache. Closing twice, or after the model, is fine."""
        self._closed = True
        session, self._session = self._session, None
        if session is not None and not self._loop.closed:
            self._loop.run(session.aclose())

    def __enter__(self) -> InferenceSession:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
