"""Sessions on the wire: opening one, reading its steps, and passing each output to the next hop or the client."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

import grpc.aio
import torch
from torch import Tensor

from swarm.codec import Unpacker, optional, pack, raw_bytes
from swarm.errors import BadRequest, PeerUnavailable, PromptTooLong, ProtocolError, SessionLost, TooManyRequests
from swarm.model.span import Span
from swarm.peers import Connector, PeerAddress
from swarm.ranges import BlockRange
from swarm.streams import PART_TIMEOUT_S, Step, counting_step, fill, write_message
from swarm.v1 import blocks_pb2 as pb

from . import checks
from .adapters import AdapterStore
from .callers import Caller
from .checks import ServiceLimits
from .engine import Engine
from .fairness import Fairness
from .hardware import own_addresses
from .kv_cache import StepInput
from .pushing import PushLink, open_push_link
from .room import SMALL_BYTES, Held, MessageRoom
from .sessions import Deliver, ServerSession, SessionKey, SessionTable

logger = logging.getLogger(__name__)

# B batch, L length, D hidden, N blocks, P virtual tokens

MAX_OPEN_TIMEOUT_S = 120.0

MAX_PUSHES = 4
"""Streams that feed a session at a time: one, and those of earlier epochs that have not ended yet."""

Read = Callable[[], Awaitable[pb.SessionRequest]]


class Decoding:
    """The sessions of a server, as their streams drive them."""

    def __init__(
        self,
        *,
        span: Span,
        engine: Engine,
        sessions: SessionTable,
        connector: Connector,
        limits: ServiceLimits,
        adapters: AdapterStore,
        room: MessageRoom,
        fairness: Fairness,
    ) -> None:
        self._span = span
        self._engine = engine
        self._sessions = sessions
        self._connector = connector
        self._limits = limits
        self._adapters = adapters
        self._room = room
        self._fairness = fairness
        self._own_addresses = own_addresses()
        self._draining = asyncio.Event()

    def drain(self) -> None:
        """Tell the clients of all sessions, also of those that open from now on, to go on elsewhere."""
        self._draining.set()

    @asynccontextmanager
    async def open(
        self, context: grpc.aio.ServicerContext, read: Read, opening: pb.SessionOpen, caller: Caller
    ) -> AsyncIterator[ServerSession]:
        """Check what is asked for, take it in when there is room, and open the way to the next hop."""
        blocks = checks.check_blocks(opening.blocks, self._span.blocks, self._span.num_model_blocks)
        self._check_size(opening)
        async with AsyncExitStack() as arriving:
            adapters = arriving.enter_context(self._adapters.lease(opening.adapters, blocks, opening.hosted_adapter))
            checks.check_prefix(adapters.num_prefix_tokens, opening)
            room = await arriving.enter_async_context(AsyncExitStack())
            prompts = await self._read_prompts(read, opening, blocks, caller, room)
            key = SessionKey(
                session_id=opening.session_id,
                blocks=blocks,
                batch_size=opening.batch_size,
                max_tokens=opening.max_tokens,
                prompts_digest=b"" if prompts is None else _digest(prompts),
                adapters=adapters.names,
            )
            timeout_s = min(opening.timeout_ms / 1000, MAX_OPEN_TIMEOUT_S)
            async with self._sessions.open(
                key, epoch=opening.epoch, prompts_NBPD=prompts, adapters=adapters, timeout_s=timeout_s, caller=caller
            ) as session:
                await room.aclose()  # its pages count them from now on
                try:
                    session.shares_machine = caller.is_own or any(map(self._is_here, opening.next.direct))
                    async with (
                        self._open_delivery(context, opening, session) as session.deliver,
                        self._passing_on(session),
                    ):
                        yield session
                finally:
                    self._engine.forget(session)

    @contextmanager
    def attach(self, attach: pb.SessionAttach, peer: str) -> Iterator[ServerSession]:
        """Let a Push stream feed its session while the body runs.

        Args:
            peer: the caller's address, as gRPC writes it.
        Raises: SessionLost: there is no such session, or not any more. TooManyRequests: others feed it.
        """
        session = self._sessions.get(attach.session_id, attach.epoch)
        if session.deliver is None:
            raise SessionLost("this session is not open yet")
        if session.num_pushes >= MAX_PUSHES:
            raise TooManyRequests(f"{MAX_PUSHES} streams feed this session already")
        session.shares_machine |= self._is_here(peer.partition(":")[2])
        session.num_pushes += 1
        try:
            yield session
        finally:
            session.num_pushes -= 1

    def _is_here(self, target: str) -> bool:
        """Whether a "host:port" is on this machine."""
        return target.rpartition(":")[0].strip("[]") in self._own_addresses

    async def serve(self, context: grpc.aio.ServicerContext, read: Read, session: ServerSession) -> None:
        """Run the steps of the client's own stream, and tell the client when this server is about to leave.

        Raises: see `run`.
        """

        async def tell() -> None:
            await self._draining.wait()
            try:
                await _answer(context, session, pb.SessionResponse(draining=pb.SessionDraining()), [])
            except PeerUnavailable as exc:
                session.fail(exc)

        telling = asyncio.create_task(tell())
        try:
            await self.run(read, session, from_client=True)
        finally:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)

    async def run(self, read: Read, session: ServerSession, *, from_client: bool) -> None:
        """Run the steps of a stream until it ends, or until the session fails on whatever stream.

        Raises: what went wrong; the session has failed with it.
        """
        steps = asyncio.create_task(self._run_steps(read, session, from_client))
        try:
            while not (steps.done() or session.failure.done()):
                idle_s = time.monotonic() - session.used_at_s
                if idle_s >= self._limits.session_idle_s:
                    session.fail(SessionLost(f"nothing came for {idle_s:.0f} s: replay the session when it goes on"))
                timeout_s = max(0.1, self._limits.session_idle_s - idle_s)
                await asyncio.wait({steps, session.failure}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if steps.done() and (error := steps.exception()) is not None:
                session.fail(error)
            await (steps if steps.done() else session.failure)
        finally:
            steps.cancel()
            await asyncio.gather(steps, return_exceptions=True)

    def _check_size(self, opening: pb.SessionOpen) -> None:
        if not 1 <= opening.batch_size <= self._limits.max_batch_size:
            raise BadRequest(
                f"a session holds 1 to {self._limits.max_batch_size} sequences, {opening.batch_size} were asked for"
            )
        if not 1 <= opening.max_tokens <= self._limits.max_session_tokens:
            raise PromptTooLong(
                f"a session on this server holds 1 to {self._limits.max_session_tokens} tokens, "
                f"{opening.max_tokens} were asked for"
            )
        if len(opening.session_id) != 16:
            raise ProtocolError("a session id has 16 bytes")

    async def _read_prompts(
        self, read: Read, opening: pb.SessionOpen, blocks: BlockRange, caller: Caller, room: AsyncExitStack
    ) -> Tensor | None:
        """Return the deep prompts, for which `room` has room from then on."""
        specs = optional(opening, "prompts")
        checks.check_prompts_spec(specs[0], blocks, opening.batch_size, self._span.hidden_size, self._limits)
        max_bytes = checks.max_message_bytes(0, self._span.hidden_size, len(blocks), self._limits)
        unpacker = Unpacker(specs, max_bytes=max_bytes)
        if specs[0] is not None:
            await room.enter_async_context(self._room.hold(caller, checks.room_bytes(unpacker.num_raw_bytes, 0)))
        (prompts,) = await fill(unpacker, read, opening.data)
        return prompts

    @asynccontextmanager
    async def _open_delivery(
        self, context: grpc.aio.ServicerContext, opening: pb.SessionOpen, session: ServerSession
    ) -> AsyncIterator[Deliver]:
        """Yield what passes a step's output on: to the next hop, or back to the client."""
        if opening.HasField("next"):
            attach = pb.SessionAttach(
                protocol_version=opening.protocol_version, session_id=opening.next_session_id, epoch=opening.epoch
            )
            async with open_push_link(
                self._connector, PeerAddress.from_wire(opening.next), attach, on_end=session.fail
            ) as link:
                yield lambda y_BLD, step: _push(link, session, y_BLD, step)
        else:
            yield lambda y_BLD, step: _reply(context, session, y_BLD, step)

    @asynccontextmanager
    async def _passing_on(self, session: ServerSession) -> AsyncIterator[None]:
        """Pass outputs on in the order of their steps, while later steps are read and run."""

        async def pass_on() -> None:
            assert session.deliver is not None
            try:
                while True:
                    step, output, held = await session.under_way.get()
                    try:
                        await session.deliver(await output, step)
                    finally:
                        held.release()
                    session.under_way.task_done()
            except asyncio.CancelledError:
                raise
            except BaseException as exc:  # it ends the session, whose stream raises it
                session.fail(exc)

        task = asyncio.create_task(pass_on())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            while not session.under_way.empty():
                session.under_way.get_nowait()[2].release()

    async def _run_steps(self, read: Read, session: ServerSession, from_client: bool) -> None:
        closed = False
        while not closed and (message := await read()) is not grpc.aio.EOF:
            if closed := message.WhichOneof("kind") == "close":
                continue
            if message.WhichOneof("kind") != "step":
                raise ProtocolError("after its first message a session's stream carries steps")
            await self._take_step(read, message.step, session, from_client)
        if from_client and closed:
            return  # nobody waits for what is under way
        await session.under_way.join()
        if from_client:
            raise PeerUnavailable("the client's stream ended without a word")

    async def _take_step(self, read: Read, wire: pb.Step, session: ServerSession, from_client: bool) -> None:
        """Read a step and queue it, unless it was seen before. It keeps its room until its output is passed on."""
        checks.check_held(wire.held)
        if not wire.HasField("hidden_states") and not from_client:  # only a server knows what the next one holds
            await self._queue(self._step_of_nothing(wire, session), Held(), session, from_client)
            return
        unpacker = self._check_step(wire, session)
        num_bytes = checks.room_bytes(unpacker.num_raw_bytes, raw_bytes(wire.hidden_states))
        held = await self._room.take(session.caller, num_bytes) if num_bytes > SMALL_BYTES else Held()
        try:
            step = await self._read_step(unpacker, read, wire, session)
            if await self._queue(step, held, session, from_client):
                held = Held()  # whoever passes the step on has it
        finally:
            held.release()

    async def _queue(self, step: StepInput, held: Held, session: ServerSession, from_client: bool) -> bool:
        """Have a step run when those before it are; False: it was seen before."""
        async with session.lock:
            session.used_at_s = now_s = time.monotonic()
            if step.step_id <= session.last_step_id:
                logger.debug("dropped a repeated step")
                return False
            if step.step_id > session.last_step_id + 1:
                raise SessionLost(f"step {step.step_id} came after step {session.last_step_id}: replay the session")
            if step.length:
                self._fairness.step(session.caller, session, session.batch_size, step.length, now_s)
                await self._fairness.wait(session.caller)
            session.last_step_id = step.step_id
            await session.under_way.put((step, self._run(session, step, from_client), held))
        return True

    def _run(self, session: ServerSession, step: StepInput, from_client: bool) -> asyncio.Future[Tensor]:
        """Have the engine run a step; one of no tokens has its output already."""
        if step.length:
            return self._engine.step(session, step, begins_round=from_client)
        nothing: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
        nothing.set_result(step.x_BLD)
        return nothing

    def _check_step(self, wire: pb.Step, session: ServerSession) -> Unpacker:
        """Check what a step claims, before any more of it is read."""
        max_tokens = max(self._limits.max_step_tokens, session.batch_size)
        specs = optional(wire, "hidden_states", "attention_mask", "position_ids")
        checks.check_batch_spec(specs[0], self._span.hidden_size, self._limits, max_tokens=max_tokens)
        max_bytes = checks.max_message_bytes(max_tokens, self._span.hidden_size, 0, self._limits)
        return Unpacker(specs, max_bytes=max_bytes)

    async def _read_step(self, unpacker: Unpacker, read: Read, wire: pb.Step, session: ServerSession) -> StepInput:
        x_BLD, mask_BL, ids_BL = await fill(unpacker, read, wire.data)
        assert x_BLD is not None
        batch_size, length, _ = x_BLD.shape
        if not 0 <= wire.num_outputs <= length:
            raise BadRequest(f"a step of {length} tokens cannot return {wire.num_outputs}")
        checks.check_mask(mask_BL, batch_size, length)
        checks.check_position_ids(ids_BL, batch_size, length)
        checks.check_beam_idx(list(wire.beam_idx), session.batch_size)
        checks.check_hop_times(wire.hop_us)
        position = session.num_prefix_tokens + wire.position
        step = StepInput(
            step_id=wire.step_id,
            position=position,
            num_outputs=wire.num_outputs,
            beam_idx=list(wire.beam_idx),
            x_BLD=x_BLD,
            mask_BL=None if mask_BL is None or bool(mask_BL.all()) else mask_BL,
            position_ids_BL=_unless_counting(ids_BL, position),
            codec=wire.hidden_states.codec,
            arrived_s=time.monotonic(),
            hop_us=list(wire.hop_us),
            held=list(wire.held),
        )
        session.check(step)
        return step

    def _step_of_nothing(self, wire: pb.Step, session: ServerSession) -> StepInput:
        """A step of which this hop holds all tokens: it only counts."""
        x_BLD = torch.empty(session.batch_size, 0, self._span.hidden_size)
        return StepInput(
            step_id=wire.step_id,
            position=0,
            num_outputs=0,
            beam_idx=(),
            x_BLD=x_BLD,
            mask_BL=None,
            position_ids_BL=None,
            arrived_s=time.monotonic(),
            held=list(wire.held),
        )


def _digest(tensor: Tensor) -> bytes:
    digest = hashlib.sha256(repr((tensor.dtype, tensor.shape)).encode())
    digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.digest()


def _unless_counting(ids_BL: Tensor | None, position: int) -> Tensor | None:
    """Positions that are not simply position, position + 1, …"""
    if ids_BL is None or bool((ids_BL == torch.arange(position, position + ids_BL.shape[1])).all()):
        return None
    return ids_BL


async def _reply(context: grpc.aio.ServicerContext, session: ServerSession, y_BLD: Tensor, step: StepInput) -> None:
    wanted = y_BLD[:, y_BLD.shape[1] - step.num_outputs :] if step.num_outputs else None
    packed = pack(wanted, codec=step.codec)
    result = pb.StepResult(
        step_id=step.step_id, hidden_states=packed.specs[0], data=packed.data, hop_us=step.hop_us_by_now()
    )
    await _answer(context, session, pb.SessionResponse(result=result), packed.more)


async def _answer(
    context: grpc.aio.ServicerContext, session: ServerSession, first: pb.SessionResponse, more: list[bytes]
) -> None:
    """Send the client a message. Raises: PeerUnavailable: it does not take it."""
    try:
        async with asyncio.timeout(PART_TIMEOUT_S), session.answering:
            await write_message(context.write, first, more)
    except TimeoutError as exc:
        raise PeerUnavailable(f"the client does not take its results within {PART_TIMEOUT_S:.0f} s") from exc


async def _push(link: PushLink, session: ServerSession, y_BLD: Tensor, step: StepInput) -> None:
    """Pass on what the next hop does not hold already."""
    further = Step(
        step.position - session.num_prefix_tokens,
        step.num_outputs,
        step.x_BLD,
        step.mask_BL,
        step.position_ids_BL,
        step.beam_idx,
        step.hop_us_by_now(),
        step.held,
    ).passed_on(y_BLD)
    if further is None:
        await link.send(counting_step(step.step_id, step.held[1:]), [])
    else:
        await link.send(*further.to_wire(step.step_id, step.codec))
