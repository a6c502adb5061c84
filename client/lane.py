"""A session's copy on one route: the chain in use, what its caches hold of the record, how long its steps take.

A session has one lane. It has a second one while a step is raced, or while it moves away from a server that leaves.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from swarm.streams import Step

from .chain import Chain, ChainConfig, StepOutput, Tickets, open_chain
from .hedging import StepTimes
from .network import Attempt, Network
from .parts import part_length
from .record import Record
from .routing import Hop, Needs
from .tasks import cancel_and_wait

logger = logging.getLogger(__name__)

# B batch, L length, D hidden


WRITE_TIMEOUT_S = 0.5
"""How long a step that is cancelled may go on writing, so that its stream need not break."""


class Lane:
    """One route's copy of a session.

    Args:
        on_draining: called when a hop says that it is about to leave.
    """

    def __init__(
        self, network: Network, needs: Needs, config: ChainConfig, on_draining: Callable[[Lane], None]
    ) -> None:
        self.times = StepTimes()
        self._network = network
        self._needs = needs
        self._config = config
        self._on_draining = on_draining
        self._chain: Chain | None = None
        self._hops: Sequence[Hop] = ()
        self._lengths: Sequence[int] = ()
        """Of each hop of the chain, how many leading tokens of the record its cache is known to hold."""
        self._tickets = Tickets()
        self._valid_length = 0
        """Leading tokens of the record that any cache of the newest tickets holds, as far as it reaches."""
        self._unchanged = 0
        """Leading tokens of the record that did not change since the feeding that is under way began."""
        self._owned = AsyncExitStack()
        self._is_retired = False

    @property
    def hops(self) -> Sequence[Hop]:
        """The hops in use, or being opened; empty before the first step and after a failure."""
        return self._hops

    @property
    def is_open(self) -> bool:
        """Whether all hops are open."""
        return self._chain is not None

    @property
    def draining(self) -> frozenset[str]:
        """Peers among them that are about to leave."""
        return frozenset() if self._chain is None else frozenset(self._chain.draining)

    def num_tokens_for(self, step: Step) -> int:
        """Tokens per sequence that feeding a step takes, of the record's."""
        return step.end - self._starts_of(step)[0]

    def bound_s(self, step: Step, hops: Sequence[Hop]) -> float:
        """How long feeding a step should take at most, opening a chain included.

        Args:
            hops: what `plan` has said.
        """
        num_tokens = self.num_tokens_for(step)
        own_s = self.times.bound_s(num_tokens) if self._chain is not None else None
        if own_s is not None:
            return own_s
        num_tokens *= self._config.batch_size
        return self._network.bound_s(hops, self._needs, num_tokens, opens=self._chain is None)

    def _starts_of(self, step: Step) -> list[int]:
        """From which token of the record on each hop has to run it: from the first on that it lacks, or a later hop."""
        starts: list[int] = []
        start = step.position
        for length in reversed(self._lengths or (0,)):
            start = min(start, length)
            starts.insert(0, start)
        # The record has its beams in order already, the chain's caches have not: unless they hold all, all is replayed.
        return [0] * len(starts) if step.beam_idx and starts[0] < step.position else starts

    async def plan(self, attempt: Attempt, length: int) -> Sequence[Hop]:
        """The hops in use; if there are none, those of a route for a new chain. Raises: NoRoute.

        Args:
            length: tokens of each sequence that it has to be fed first.
        """
        if self._chain is not None:
            return self._hops
        needs, holding = (
            self._needs.fed(length, self._config.batch_size),
            self._tickets.peers if self._valid_length else (),
        )
        return await self._network.route(needs, attempt, holding=holding)

    async def feed(self, step: Step, record: Record, hops: Sequence[Hop]) -> Tensor:
        """Feed a step, and before it what the caches lack of the record; open a chain first if there is none.

        Args:
            record: what the session holds after the step.
            hops: what `plan` has said, with the adapters that the chain names.
        Returns: the last `num_outputs` hidden states, [B, num_outputs, D].
        Raises: PeerError, NoRoute, UserError: the chain is gone then; the next call begins with another one.
        """
        self._unchanged = record.length
        try:
            chain = self._chain or await self._open_chain(hops)
            starts = self._starts_of(step)
            tokens = replace(step, beam_idx=()) if starts[-1] == 0 else step
            # Until all is done, the caches may hold some of the old tokens from here on, or some of the new ones.
            self._valid_length = 0 if tokens.beam_idx else min(self._valid_length, starts[-1])
            result = await self._send(chain, tokens, record, starts)
        except BaseException:
            if not self._is_retired:
                await self._drop()
            raise
        self._valid_length = self._unchanged
        self._lengths = [self._unchanged] * len(chain.hops)
        return result

    def changed(self, step: Step) -> None:
        """Note that the record takes another step meanwhile: of what it replaces, the caches may hold either."""
        self._unchanged = 0 if step.beam_idx else min(self._unchanged, step.position)
        self._lengths = [min(length, self._unchanged) for length in self._lengths]
        self._valid_length = min(self._valid_length, self._unchanged)

    async def _send(self, chain: Chain, step: Step, record: Record, starts: Sequence[int]) -> Tensor:
        """Send the record's tokens in parts that every hop takes, to each hop from its start on, and join the wanted
        outputs."""
        batch_size, start = self._config.batch_size, starts[0]
        length = part_length(record.length - start, batch_size, len(chain.hops), chain.max_step_tokens)
        began_s = time.monotonic()
        pending: list[asyncio.Future[StepOutput]] = []
        for begin in range(start, record.length, length):
            end = min(begin + length, record.length)
            part = record.part(begin, end)
            num_outputs = min(end - begin, max(0, step.num_outputs - (record.length - end)))
            beam_idx = step.beam_idx if begin == start else ()
            held = starts[1:] if starts[-1] > begin else ()
            part = replace(part, num_outputs=num_outputs, beam_idx=beam_idx, held=held)
            pending.append(await chain.send(part))
        outputs = [await chain.receive(result) for result in pending]
        wanted = [output.y_BLD for output in outputs if output.y_BLD is not None]
        if not step.num_outputs:
            wanted.append(step.x_BLD[:, :0])
        chain.check_outputs(wanted, step.num_outputs)
        for hop in chain.hops:
            self._network.succeeded(hop.peer_id)
        seconds, num_tokens = time.monotonic() - began_s, record.length - start
        self.times.took(num_tokens, seconds)
        self._network.feedings.took(num_tokens * batch_size, seconds)
        if num_tokens == 1:
            self._network.took(chain.hops, outputs[0].hop_us, batch_size, seconds)
        return wanted[0] if len(wanted) == 1 else torch.cat(wanted, dim=1)

    async def _open_chain(self, hops: Sequence[Hop]) -> Chain:
        self._hops = hops
        began_s = time.monotonic()
        self._tickets = self._tickets.following(hops)
        self.times = StepTimes()
        opening = open_chain(self._network, self._config, hops, self._tickets, lambda: self._on_draining(self))
        self._chain = await self._owned.enter_async_context(opening)
        self._network.openings.took(1, time.monotonic() - began_s)
        self._lengths = [min(position, self._valid_length) for position in self._chain.positions]
        return self._chain

    async def _drop(self) -> None:
        """Break the streams; the servers keep what they hold for a while."""
        self._chain, self._hops, self._lengths = None, (), ()
        owned, self._owned = self._owned, AsyncExitStack()
        await owned.aclose()

    async def interrupt(self, feeding: asyncio.Task[Any]) -> None:
        """Cancel a feeding and leave the streams open, so that `aclose` ends them in order.

        Streams that break leave caches behind, which servers keep for a client that may come back.
        """
        self._is_retired = True
        if self._chain is not None:
            self._chain.fail(asyncio.CancelledError())
            await asyncio.wait([feeding], timeout=WRITE_TIMEOUT_S)
        await cancel_and_wait([feeding])

    def retire(self, feeding: asyncio.Task[Any] | None = None) -> None:
        """End this lane in the background: its streams in order, and what may still be fed. It is not used again."""
        self._is_retired = True
        self._network.finish_in_background(self._end(feeding))

    async def _end(self, feeding: asyncio.Task[Any] | None) -> None:
        if feeding is not None and self._chain is None:  # it would open one
            await cancel_and_wait([feeding])
        await self.aclose()
        if feeding is not None:
            await cancel_and_wait([feeding])

    async def aclose(self) -> None:
        """Close the streams; the servers free their caches."""
        if self._chain is not None:
            await self._chain.finish()
        await self._drop()
