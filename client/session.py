"""Inference sessions: what a person's generation needs to survive any server.

A session keeps a record of every hidden state it has fed to the first block. The servers' caches are only ever a
copy of what the record implies: after a failure, the next step finds a new route and replays the record there.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace

import torch
from torch import Tensor

from swarm.errors import BadRequest, PromptTooLong
from swarm.streams import Step

from .chain import Chain, ChainConfig, StepOutput, Tickets, open_chain
from .loop import LoopThread
from .network import Attempt, Network
from .prompts import Prompts
from .record import Record
from .routing import Hop, Needs

logger = logging.getLogger(__name__)

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


class RemoteSession:
    """A session's state and its asynchronous steps; see InferenceSession for the API."""

    def __init__(self, network: Network, needs: Needs, config: ChainConfig) -> None:
        self._network = network
        self._needs = needs
        self._config = config
        self._record = Record()
        self._chain: Chain | None = None
        self._chain_length = 0
        """Leading tokens of the record that the caches of the chain are known to hold."""
        self._tickets = Tickets()
        self._valid_length = 0
        """Leading tokens of the record that any cache of the newest tickets holds, as far as it reaches."""
        self._owned = AsyncExitStack()
        self._num_moves, self._may_leave_at = 0, 0
        """How often slow hops were left, and the length before which none is left again: it doubles each time."""

    @property
    def route(self) -> Sequence[Hop]:
        """The hops in use; empty before the first step and after a failure."""
        return () if self._chain is None else self._chain.hops

    @property
    def length(self) -> int:
        """Tokens in the record."""
        return self._record.length

    async def step(self, step: Step) -> Tensor:
        """Feed tokens and return the last `num_outputs` hidden states, on any route that works.

        Raises: NoRoute, PeerError: see Network.retrying. The session is then as it was before the step.
        """
        record = self._record.followed_by(step)

        async def attempt(attempt: Attempt) -> Tensor:
            return await self._attempt(step, record, attempt)

        result = await self._network.retrying(attempt)
        self._record = record
        self._leave_slow_hops()
        return result

    def _leave_slow_hops(self) -> None:
        """End the chain if another route is worth the replay; the next step takes it."""
        if self._chain is None or self.length < self._may_leave_at:
            return
        num_steps = self._config.max_tokens - self.length
        hops = self._chain.hops
        num_tokens = self.length * self._config.batch_size
        if self._network.is_worth_leaving(hops, self._needs, num_tokens=num_tokens, num_steps=num_steps):
            logger.info("leaving %s, where a hop is slower than it says", ", ".join(map(str, hops)))
            self._num_moves += 1
            self._may_leave_at = self.length + 2 ** min(self._num_moves + 2, 20)
            # The hop that is slow would be slow to end its stream as well: nobody waits for that.
            task = asyncio.create_task(_end(self._chain, self._owned))
            self._network.leaving.add(task)
            task.add_done_callback(self._network.leaving.discard)
            self._chain, self._chain_length, self._owned = None, 0, AsyncExitStack()

    async def _attempt(self, step: Step, record: Record, attempt: Attempt) -> Tensor:
        try:
            chain = self._chain or await self._open_chain(attempt)
            tokens, start = step, min(step.position, self._chain_length)
            if step.beam_idx and (start < step.position or start == 0):
                # The record has its beams in order already, the chain's caches have not: all is replayed.
                tokens, start = replace(step, beam_idx=()), 0
            # Until all is done, the caches may hold some of the old tokens from here on, or some of the new ones.
            self._valid_length = 0 if tokens.beam_idx else min(self._valid_length, start)
            result = await self._feed(chain, tokens, record, start)
        except BaseException:
            await self._drop_chain()
            raise
        self._chain_length = self._valid_length = record.length
        return result

    async def _feed(self, chain: Chain, step: Step, record: Record, start: int) -> Tensor:
        """Send the record's tokens from `start` on, in parts that every hop takes, and join the wanted outputs."""
        length = max(1, chain.max_step_tokens // self._config.batch_size)
        began_s = time.monotonic()
        pending: list[asyncio.Future[StepOutput]] = []
        for begin in range(start, record.length, length):
            end = min(begin + length, record.length)
            part = record.part(begin, end)
            num_outputs = min(end - begin, max(0, step.num_outputs - (record.length - end)))
            beam_idx = step.beam_idx if begin == start else ()
            pending.append(await chain.send(replace(part, num_outputs=num_outputs, beam_idx=beam_idx)))
        outputs = [await chain.receive(result) for result in pending]
        wanted = [output.y_BLD for output in outputs if output.y_BLD is not None]
        if not step.num_outputs:
            wanted.append(step.x_BLD[:, :0])
        chain.check_outputs(wanted, step.num_outputs)
        for hop in chain.hops:
            self._network.succeeded(hop.peer_id)
        if record.length - start == 1:
            seconds = time.monotonic() - began_s
            self._network.took(chain.hops, outputs[0].hop_us, self._config.batch_size, seconds)
        return wanted[0] if len(wanted) == 1 else torch.cat(wanted, dim=1)

    async def _open_chain(self, attempt: Attempt) -> Chain:
        hops = await self._network.route(self._needs, attempt)
        self._tickets = self._tickets.following(hops)
        opening = open_chain(self._network, self._config, hops, self._tickets)
        self._chain = await self._owned.enter_async_context(opening)
        self._chain_length = min(self._chain.position, self._valid_length)
        return self._chain

    async def _drop_chain(self) -> None:
        self._chain, self._chain_length = None, 0
        owned, self._owned = self._owned, AsyncExitStack()
        await owned.aclose()

    def preload(self, step: Step) -> None:
        """Take a first step into the record alone; the next one replays it."""
        self._record = self._record.followed_by(step)

    async def select(self, rows: Sequence[int]) -> None:
        """Let the sequences be those of these rows from now on; the next step replays them."""
        self._record = self._record.rows(torch.tensor(rows))
        self._config = replace(self._config, batch_size=len(rows))
        await self.aclose()
        self._tickets, self._valid_length = Tickets(epoch=self._tickets.epoch), 0

    async def aclose(self) -> None:
        """Close the streams; the servers free their caches."""
        if self._chain is not None:
            await self._chain.finish()
        await self._drop_chain()


async def _end(chain: Chain, owned: AsyncExitStack) -> None:
    await chain.finish()
    await owned.aclose()


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
