"""One attempt at a session: an open stream to every hop of a route, steps in at one end and results out at the other.

A chain is never repaired. When any hop fails, everything that waits on the chain fails with the error of the peer
at fault, and the session opens another chain and replays its record.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace

import grpc.aio
from torch import Tensor

from swarm import PROTOCOL_VERSION
from swarm.announcement import AdapterListing
from swarm.codec import optional, pack, torch_dtype
from swarm.errors import PeerError, PeerUnavailable, ProtocolError, SwarmError
from swarm.model.adapters import ModelAdapter, of_blocks
from swarm.ranges import BlockRange
from swarm.rpc import errors_from_wire
from swarm.streams import Step, ask, read_tensors, write_message
from swarm.v1 import blocks_pb2 as pb
from swarm.v1 import blocks_pb2_grpc as pb_grpc

from .network import Network, blame
from .routing import Hop
from .tasks import cancel_and_wait
from .uploads import names_of

logger = logging.getLogger(__name__)

# B batch, L length, D hidden, N blocks, P virtual tokens

FINISH_TIMEOUT_S = 2.0
"""How long ending a session in order may take before its streams are just broken off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainConfig:
    """What every hop of a chain is opened with."""

    fingerprint: str
    batch_size: int
    max_tokens: int
    hidden_size: int
    open_timeout_s: float
    prompts_NBPD: Tensor | None = None
    """Deep prompts of all blocks of the model."""
    adapters: ModelAdapter | None = None
    """What is changed in the blocks of the model."""
    hosted: AdapterListing | None = None
    """The hosted adapter to use instead."""


@dataclass(frozen=True, slots=True)
class Tickets:
    """What lets a chain take up the caches that an earlier one left on the same hops."""

    session_ids: Mapping[tuple[str, BlockRange], bytes] = field(default_factory=dict, repr=False)
    """(peer id, blocks) -> session id."""
    epoch: int = 0
    """Grows with each chain of a session."""

    def following(self, hops: Sequence[Hop]) -> Tickets:
        """The tickets of the next chain: the same ids where it takes the same hops."""
        keys = [hop.place for hop in hops]
        ids = {key: self.session_ids.get(key) or secrets.token_bytes(16) for key in keys}
        return Tickets(ids, self.epoch + 1)

    @property
    def peers(self) -> frozenset[str]:
        """Ids of the peers on whom the last chain may have left caches."""
        return frozenset(peer_id for peer_id, _ in self.session_ids)

    def session_id(self, hop: Hop) -> bytes:
        return self.session_ids[hop.place]


@dataclass(frozen=True, slots=True, eq=False)
class StepOutput:
    """What the last hop returns for a step."""

    y_BLD: Tensor | None
    """The wanted positions; None if none were."""
    hop_us: Sequence[int]
    """How long each hop had the step, microseconds, as they say; empty: not all of them said it."""


class Chain:
    """The streams of a session over one route; made by `open_chain`."""

    def __init__(
        self,
        network: Network,
        config: ChainConfig,
        hops: Sequence[Hop],
        tickets: Tickets,
        on_draining: Callable[[], None],
    ) -> None:
        self.hops = hops
        self.draining: set[str] = set()
        """Peers among the hops that said that they are about to leave."""
        self.max_step_tokens = 1
        self.positions: Sequence[int] = ()
        """Of each hop, how many tokens it has still cached from an earlier chain of the same tickets."""
        self._tickets = tickets
        self._on_draining = on_draining
        self._network = network
        self._config = config
        self._calls: list[grpc.aio.StreamStreamCall] = []
        self._results: dict[int, asyncio.Future[StepOutput]] = {}
        self._last_step_id = 0
        self._failure: BaseException | None = None
        self._finishing: asyncio.Task[None] | None = None

    async def send(self, step: Step) -> asyncio.Future[StepOutput]:
        """Send a step into the first hop; the future gives the last hop's output, [B, num_outputs, D].

        Raises: PeerError: some hop failed.
        """
        self._raise_failure()
        self._last_step_id += 1
        # The server casts to its own dtype first thing; casting here makes the message smaller, not different.
        x_BLD = step.x_BLD.to(torch_dtype(self.hops[0].server.dtype))
        request, more = replace(step, x_BLD=x_BLD).to_wire(self._last_step_id, self._network.config.codec)
        result: asyncio.Future[StepOutput] = asyncio.get_running_loop().create_future()
        self._results[self._last_step_id] = result
        sending = self._write(request, more)
        try:
            async with self._errors_of(0):
                if more:
                    # The hop reads on only as fast as it computes: ask whether it is alive rather than set a limit.
                    await self._network.while_alive(sending, self.hops, self._network.config.step_timeout_s)
                else:
                    await sending
        except PeerError:
            # The stream's reader learns why it ended; give it a moment, for its reason is the better one.
            await self._wait_failure()
            self._raise_failure()
            raise
        return result

    async def _write(self, request: pb.SessionRequest, more: list[bytes]) -> None:
        began_s = time.monotonic()
        await write_message(self._calls[0].write, request, more)
        num_bytes = len(request.step.data) + sum(map(len, more))
        self._network.connector.throughput.sent(self.hops[0].peer_id, num_bytes, time.monotonic() - began_s)

    async def receive(self, result: asyncio.Future[StepOutput]) -> StepOutput:
        """Wait for a step's result, asking the hops whether they are alive when it takes long.

        Raises: PeerError: some hop failed or fell silent.
        """
        return await self._network.while_alive(result, self.hops, self._network.config.step_timeout_s)

    def _blame(self, index: int, what: str) -> PeerUnavailable:
        return blame(PeerUnavailable(f"peer {self.hops[index]} {what}"), self.hops[index])

    def check_outputs(self, outputs: Sequence[Tensor], num_outputs: int) -> None:
        """Raise ProtocolError, and blame the last hop, unless the outputs are what was asked for."""
        batch_size, width = self._config.batch_size, self._config.hidden_size
        fits = all(y.shape[0] == batch_size and y.shape[2] == width and y.is_floating_point() for y in outputs)
        if not fits or sum(y.shape[1] for y in outputs) != num_outputs:
            raise blame(ProtocolError(f"peer {self.hops[-1]} returned hidden states of the wrong shape"), self.hops[-1])

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    async def _wait_failure(self) -> None:
        for _ in range(20):
            if self._failure is not None:
                return
            await asyncio.sleep(0.01)

    def fail(self, error: BaseException) -> None:
        """End the chain: whatever waits for a result gets this error; the first one counts.

        With a CancelledError, what is being written is written to its end: a write that is cancelled breaks the stream.
        """
        if self._failure is None:
            self._failure = error
        for result in self._results.values():
            if not result.done():
                result.set_exception(self._failure)
                result.exception()  # retrieved: the step that waits for it may have been cancelled

    def _errors_of(self, index: int) -> AbstractAsyncContextManager[None]:
        """Translate the errors of one hop, which may blame the one that it pushes to."""
        following = self.hops[index + 1 : index + 2]
        return errors_from_wire(self.hops[index].peer_id, {hop.peer_id for hop in following})

    async def _open_hop(self, index: int, leases: AsyncExitStack) -> int:
        """Open the stream to one hop and wait until it has room; return how many tokens it has still cached.

        Raises: PeerError, UserError.
        """
        hop = self.hops[index]
        channel = await leases.enter_async_context(self._network.connector.lease(hop.address))
        answer = await self._ask_to_open(index, pb_grpc.BlocksStub(channel))
        self.max_step_tokens = min(self.max_step_tokens, max(1, answer.opened.max_step_tokens))
        return int(answer.opened.position)

    async def _ask_to_open(self, index: int, stub: pb_grpc.BlocksStub) -> pb.SessionResponse:
        hop, config = self.hops[index], self._config
        async with self._errors_of(index):
            call = stub.Session()
            self._calls[index] = call
            timeout_s = config.open_timeout_s + self._network.config.connect_timeout_s
            answer = await self._network.while_alive(ask(call, *self._opening(index)), [hop], timeout_s)
            if answer is grpc.aio.EOF:
                await call.code()
                raise self._blame(index, "closed the session at once")
            if answer.WhichOneof("kind") != "opened":
                raise ProtocolError(f"peer {hop} did not answer `open` with `opened`")
        return answer

    def _opening(self, index: int) -> tuple[pb.SessionRequest, list[bytes]]:
        hop, config = self.hops[index], self._config
        prompts = config.prompts_NBPD
        packed = pack(None if prompts is None else prompts[hop.blocks.start : hop.blocks.end])
        opening = pb.SessionOpen(
            protocol_version=PROTOCOL_VERSION,
            model_fingerprint=config.fingerprint,
            session_id=self._tickets.session_id(hop),
            epoch=self._tickets.epoch,
            blocks=pb.BlockRange(start=hop.blocks.start, end=hop.blocks.end),
            batch_size=config.batch_size,
            max_tokens=config.max_tokens,
            timeout_ms=int(config.open_timeout_s * 1000),
            prompts=packed.specs[0],
            data=packed.data,
            adapters=names_of(of_blocks(config.adapters, hop.blocks)),
            hosted_adapter=b"" if config.hosted is None else config.hosted.digest_bytes,
        )
        if index + 1 < len(self.hops):
            opening.next.CopyFrom(self.hops[index + 1].address.to_wire())
            opening.next_session_id = self._tickets.session_id(self.hops[index + 1])
        return pb.SessionRequest(open=opening), packed.more

    async def open(self, owned: AsyncExitStack) -> None:
        """Open all hops at once; `owned` gets what must be closed at the end."""
        self._calls = [None] * len(self.hops)
        self.max_step_tokens = 1 << 30
        leases = await owned.enter_async_context(AsyncExitStack())
        openings = [asyncio.create_task(self._open_hop(index, leases)) for index in range(len(self.hops))]
        owned.push_async_callback(cancel_and_wait, openings)
        self.positions = await asyncio.gather(*openings)
        self._listeners = [asyncio.create_task(self._listen(index)) for index in range(len(self.hops))]
        owned.push_async_callback(cancel_and_wait, self._listeners)
        self._network.farewells.add(self.finish)
        owned.callback(self._network.farewells.discard, self.finish)

    async def _listen(self, index: int) -> None:
        """Read a hop's stream to its end, which is the chain's: results from the last hop, errors from any."""
        hop, call = self.hops[index], self._calls[index]
        error: SwarmError = self._blame(index, "closed the session")
        try:
            async with self._errors_of(index):
                while (message := await call.read()) is not grpc.aio.EOF:
                    if message.WhichOneof("kind") == "draining":
                        self.draining.add(hop.peer_id)
                        self._on_draining()
                        continue
                    if message.WhichOneof("kind") != "result" or index + 1 < len(self.hops):
                        raise ProtocolError(f"peer {hop} sent an unexpected message")
                    await self._take_result(message.result, call)
                await call.code()
        except SwarmError as exc:
            error = exc
        finally:
            self.fail(error)

    async def _take_result(self, wire: pb.StepResult, call: grpc.aio.StreamStreamCall) -> None:
        config = self._config
        max_bytes = config.batch_size * config.max_tokens * config.hidden_size * 4
        specs = optional(wire, "hidden_states")
        if specs[0] is not None and len(specs[0].shape) != 3:
            raise ProtocolError("a step's result must have the shape [batch, length, hidden_size]")
        (y_BLD,) = await read_tensors(call.read, specs, wire.data, max_bytes=max_bytes)
        result = self._results.pop(wire.step_id, None)
        if result is not None and not result.done():
            result.set_result(StepOutput(y_BLD, list(wire.hop_us) if len(wire.hop_us) == len(self.hops) else []))

    async def finish(self) -> None:
        """End the streams in order, so that the servers free their caches at once and keep none for a while.

        Several may ask for it, a session that is closed and a client that leaves: they wait for the same end.
        """
        if self._finishing is None:
            self._finishing = asyncio.create_task(self._finish())
        await asyncio.shield(self._finishing)

    async def _finish(self) -> None:
        """Tell every hop that the session is over, also where others have gone."""
        try:
            async with asyncio.timeout(FINISH_TIMEOUT_S):
                await asyncio.gather(*map(self._close_hop, range(len(self._calls))))
                await asyncio.gather(*self._listeners)
        except TimeoutError:
            logger.debug("a session could not be ended in order within %.0f s", FINISH_TIMEOUT_S)

    async def _close_hop(self, index: int) -> None:
        try:
            async with self._errors_of(index):
                await self._calls[index].write(pb.SessionRequest(close=pb.SessionClose()))
                await self._calls[index].done_writing()
        except SwarmError as exc:
            logger.debug("a hop of a session could not be told that it is over: %s", exc)

    def cancel_calls(self) -> None:
        """Break all streams; the servers keep what they hold for us for a while."""
        for call in self._calls:
            if call is not None:
                call.cancel()


@asynccontextmanager
async def open_chain(
    network: Network,
    config: ChainConfig,
    hops: Sequence[Hop],
    tickets: Tickets,
    on_draining: Callable[[], None],
) -> AsyncIterator[Chain]:
    """Open a session on every hop. Raises: PeerError: a hop cannot be reached or has no room; UserError.

    Args:
        on_draining: called when a hop says that it is about to leave.
    """
    chain = Chain(network, config, hops, tickets, on_draining)
    async with AsyncExitStack() as owned:
        try:
            await chain.open(owned)
            yield chain
        finally:
            chain.cancel_calls()
