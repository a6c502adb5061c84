"""The Blocks service: messages in, work for the compute thread, messages out. No arithmetic happens here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc.aio
import torch
from torch import Tensor

import swarm
from swarm import PROTOCOL_VERSION
from swarm.codec import optional, pack, wire_dtype
from swarm.errors import BadRequest, Draining, PromptTooLong, ProtocolError
from swarm.model.narrow import SpanViews
from swarm.model.span import Span
from swarm.peers import Connector, PeerAddress
from swarm.ranges import BlockRange
from swarm.rpc import errors_to_wire
from swarm.streams import read_tensors, write_message
from swarm.v1 import blocks_pb2 as pb
from swarm.v1 import blocks_pb2_grpc as pb_grpc

from . import checks
from .checks import ServiceLimits
from .engine import ComputeThread, Priority
from .pushing import PushLink, open_push_link
from .sessions import ServerSession, SessionTable, StepInput

logger = logging.getLogger(__name__)

# B batch, L length, D hidden, N blocks, P virtual tokens

MAX_OPEN_TIMEOUT_S = 120.0

Read = Callable[[], Awaitable[pb.SessionRequest]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What this server tells about itself."""

    peer_id: str
    name: str
    fingerprint: str
    num_blocks: int


@dataclass(slots=True)
class _Attached:
    """A session together with where its results go."""

    session: ServerSession
    deliver: Callable[[int, Tensor, StepInput], Awaitable[None]]


class BlocksService(pb_grpc.BlocksServicer):
    """Serves a range of blocks. See proto/swarm/v1/blocks.proto for the contract of each call."""

    def __init__(
        self,
        model: ServedModel,
        views: SpanViews,
        engine: ComputeThread,
        sessions: SessionTable,
        connector: Connector,
        limits: ServiceLimits,
    ) -> None:
        self._model = model
        self._views = views
        self._span = views.span
        self._engine = engine
        self._sessions = sessions
        self._connector = connector
        self._limits = limits
        self._attached: dict[bytes, _Attached] = {}
        self._num_calls = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False

    async def wait_idle(self) -> None:
        """Wait until no call is in progress."""
        await self._idle.wait()

    # The RPCs.

    async def Describe(self, request: pb.DescribeRequest, context: grpc.aio.ServicerContext) -> pb.DescribeResponse:
        """See the wire contract; a caller of another version gets an answer too, so that it can say so."""
        stats = self._sessions.statistics()
        return pb.DescribeResponse(
            protocol_version=PROTOCOL_VERSION,
            software_version=swarm.__version__,
            peer_id=self._model.peer_id,
            model_name=self._model.name,
            model_fingerprint=self._model.fingerprint,
            num_model_blocks=self._model.num_blocks,
            blocks=pb.BlockRange(start=self._span.blocks.start, end=self._span.blocks.end),
            dtype=wire_dtype(self._span.dtype),
            hidden_size=self._span.hidden_size,
            limits=self._limits.to_wire(),
            load=pb.Load(
                num_sessions=stats.num_sessions,
                cache_used_bytes=stats.cache_used_bytes,
                cache_total_bytes=stats.cache_total_bytes,
                queue_length=self._engine.statistics().queue_length,
            ),
            can_rewind=self._span.can_rewind,
        )

    async def Session(self, _requests: object, context: grpc.aio.ServicerContext) -> None:
        """See the wire contract."""
        async with errors_to_wire(context, "Session"), self._counted(), self._open_session(context) as attached:
            session = attached.session
            await context.write(
                pb.SessionResponse(
                    opened=pb.SessionOpened(max_tokens=session.max_tokens, max_step_tokens=self._limits.max_step_tokens)
                )
            )
            steps = asyncio.create_task(self._run_steps(context.read, attached))
            try:
                await asyncio.wait({steps, session.failure}, return_when=asyncio.FIRST_COMPLETED)
                await (steps if steps.done() else session.failure)
            finally:
                steps.cancel()
                await asyncio.gather(steps, return_exceptions=True)

    async def Push(self, _requests: object, context: grpc.aio.ServicerContext) -> pb.PushResponse:
        """See the wire contract. What goes wrong here ends the session, whose client is told on its own stream."""
        async with errors_to_wire(context, "Push"), self._counted(admit=True):
            message = await context.read()
            if message is grpc.aio.EOF or message.WhichOneof("kind") != "attach":
                raise ProtocolError("the first message of a Push stream must be `attach`")
            checks.check_version(message.attach.protocol_version)
            session = self._sessions.get(message.attach.session_id)
            attached = self._attached[session.session_id]
            steps = asyncio.create_task(self._run_steps(context.read, attached))
            try:
                await asyncio.wait({steps, session.failure}, return_when=asyncio.FIRST_COMPLETED)
                if steps.done() and (error := steps.exception()) is not None:
                    session.fail(error if isinstance(error, Exception) else RuntimeError(repr(error)))
                await (steps if steps.done() else session.failure)
            finally:
                steps.cancel()
                await asyncio.gather(steps, return_exceptions=True)
        return pb.PushResponse()

    async def Forward(self, _requests: object, context: grpc.aio.ServicerContext) -> None:
        """See the wire contract."""
        async with errors_to_wire(context, "Forward"), self._counted():
            batch = await self._read_batch(context.read)
            span = self._views.view(batch.blocks)
            y_BLD = await self._engine.run(Priority.TRAINING, lambda: _forward(span, batch))
            packed = pack(y_BLD)
            result = pb.ComputeResult(hidden_states=packed.specs[0], data=packed.data)
            await write_message(context.write, pb.ComputeResponse(result=result), packed.more)

    async def Backward(self, _requests: object, context: grpc.aio.ServicerContext) -> None:
        """See the wire contract."""
        async with errors_to_wire(context, "Backward"), self._counted():
            batch = await self._read_batch(context.read)
            grad_BLD = checks.check_same_shape(batch.grad_BLD, batch.x_BLD)
            span = self._views.view(batch.blocks)
            dx_BLD, dprompts = await self._engine.run(Priority.TRAINING, lambda: _backward(span, batch, grad_BLD))
            packed = pack(dx_BLD, dprompts)
            result = pb.ComputeResult(hidden_states=packed.specs[0], prompts=packed.specs[1], data=packed.data)
            await write_message(context.write, pb.ComputeResponse(result=result), packed.more)

    # Sessions.

    @asynccontextmanager
    async def _open_session(self, context: grpc.aio.ServicerContext) -> AsyncIterator[_Attached]:
        message = await context.read()
        if message is grpc.aio.EOF or message.WhichOneof("kind") != "open":
            raise ProtocolError("the first message of a session must be `open`")
        opening: pb.SessionOpen = message.open
        checks.check_version(opening.protocol_version)
        checks.check_fingerprint(opening.model_fingerprint, self._model.fingerprint, self._model.name)
        blocks = checks.check_blocks(opening.blocks, self._span.blocks)
        self._check_session_size(opening)
        prompts = await self._read_prompts(context.read, opening, blocks)
        async with (
            self._sessions.open(
                opening.session_id,
                blocks,
                batch_size=opening.batch_size,
                max_tokens=opening.max_tokens,
                prompts_NBPD=prompts,
                timeout_s=min(opening.timeout_ms / 1000, MAX_OPEN_TIMEOUT_S),
            ) as session,
            self._open_delivery(context, opening, session) as deliver,
        ):
            attached = _Attached(session, deliver)
            self._attached[session.session_id] = attached
            try:
                yield attached
            finally:
                del self._attached[session.session_id]

    def _check_session_size(self, opening: pb.SessionOpen) -> None:
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

    async def _read_prompts(self, read: Read, opening: pb.SessionOpen, blocks: BlockRange) -> Tensor | None:
        specs = optional(opening, "prompts")
        checks.check_prompts_spec(specs[0], blocks, opening.batch_size, self._span.hidden_size, self._limits)
        max_bytes = 0 if specs[0] is None else specs[0].num_bytes * 4
        (prompts,) = await read_tensors(read, specs, opening.data, max_bytes=max_bytes)
        return prompts

    @asynccontextmanager
    async def _open_delivery(
        self, context: grpc.aio.ServicerContext, opening: pb.SessionOpen, session: ServerSession
    ) -> AsyncIterator[Callable[[int, Tensor, StepInput], Awaitable[None]]]:
        """Yield what passes a step's output on: to the next hop, or back to the client."""
        if not opening.HasField("next"):

            async def reply(length: int, y_BLD: Tensor, step: StepInput) -> None:
                packed = pack(y_BLD[:, length - step.num_outputs :] if step.num_outputs else None)
                result = pb.StepResult(step_id=step.step_id, hidden_states=packed.specs[0], data=packed.data)
                await write_message(context.write, pb.SessionResponse(result=result), packed.more)

            yield reply
            return
        address = PeerAddress.from_wire(opening.next)
        async with open_push_link(self._connector, address, session, opening.next_session_id) as link:

            async def push(_length: int, y_BLD: Tensor, step: StepInput) -> None:
                await _push(link, y_BLD, step)

            yield push

    async def _run_steps(self, read: Read, attached: _Attached) -> None:
        while (message := await read()) is not grpc.aio.EOF:
            if message.WhichOneof("kind") != "step":
                raise ProtocolError("after its first message a session's stream carries steps")
            step = await self._read_step(read, message.step, attached.session)
            await self._run_step(attached, step)

    async def _run_step(self, attached: _Attached, step: StepInput) -> None:
        session = attached.session
        async with session.lock:
            if step.step_id <= session.last_step_id:
                logger.debug("dropped a repeated step")
                return
            length = step.x_BLD.shape[1]
            priority = Priority.DECODE if length == 1 else Priority.PREFILL
            y_BLD = await self._engine.run(priority, lambda: session.step(step))
            session.last_step_id = step.step_id
            await attached.deliver(length, y_BLD, step)

    async def _read_step(self, read: Read, wire: pb.Step, session: ServerSession) -> StepInput:
        max_tokens = max(self._limits.max_step_tokens, session.batch_size)
        specs = optional(wire, "hidden_states", "attention_mask", "position_ids")
        checks.check_batch_spec(specs[0], self._span.hidden_size, self._limits, max_tokens=max_tokens)
        max_bytes = checks.max_message_bytes(max_tokens, self._span.hidden_size, 0, self._limits)
        x_BLD, mask_BL, ids_BL = await read_tensors(read, specs, wire.data, max_bytes=max_bytes)
        assert x_BLD is not None
        batch_size, length, _ = x_BLD.shape
        if not 0 <= wire.num_outputs <= length:
            raise BadRequest(f"a step of {length} tokens cannot return {wire.num_outputs}")
        checks.check_mask(mask_BL, batch_size, length)
        checks.check_position_ids(ids_BL, batch_size, length)
        checks.check_beam_idx(list(wire.beam_idx), session.batch_size)
        step = StepInput(wire.step_id, wire.position, wire.num_outputs, list(wire.beam_idx), x_BLD, mask_BL, ids_BL)
        session.check(step)
        return step

    # Forward and Backward.

    async def _read_batch(self, read: Callable[[], Awaitable[pb.ComputeRequest]]) -> _Batch:
        message = await read()
        if message is grpc.aio.EOF or message.WhichOneof("kind") != "open":
            raise ProtocolError("the first message of a call must be `open`")
        wire: pb.ComputeOpen = message.open
        checks.check_version(wire.protocol_version)
        checks.check_fingerprint(wire.model_fingerprint, self._model.fingerprint, self._model.name)
        blocks = checks.check_blocks(wire.blocks, self._span.blocks)
        specs = optional(wire, "hidden_states", "attention_mask", "position_ids", "prompts", "grad_outputs")
        max_tokens, hidden_size = self._limits.max_batch_tokens, self._span.hidden_size
        checks.check_batch_spec(specs[0], hidden_size, self._limits, max_tokens=max_tokens)
        batch_size, length, _ = wire.hidden_states.shape
        checks.check_prompts_spec(specs[3], blocks, batch_size, hidden_size, self._limits)
        max_bytes = checks.max_message_bytes(max_tokens, hidden_size, len(blocks), self._limits)
        x_BLD, mask_BL, ids_BL, prompts, grad_BLD = await read_tensors(read, specs, wire.data, max_bytes=max_bytes)
        assert x_BLD is not None
        checks.check_mask(mask_BL, batch_size, length)
        checks.check_position_ids(ids_BL, batch_size, length)
        return _Batch(blocks, x_BLD, mask_BL, ids_BL, prompts, grad_BLD)

    @asynccontextmanager
    async def _counted(self, *, admit: bool = False) -> AsyncIterator[None]:
        """Count the call while it runs; a draining server admits only what belongs to open sessions."""
        if self.draining and not admit:
            raise Draining("this server is about to leave: use another one")
        self._num_calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_calls -= 1
            if not self._num_calls:
                self._idle.set()


async def _push(link: PushLink, y_BLD: Tensor, step: StepInput) -> None:
    packed = pack(y_BLD, step.mask_BL, step.position_ids_BL)
    wire = pb.Step(
        step_id=step.step_id,
        position=step.position,
        num_outputs=step.num_outputs,
        beam_idx=step.beam_idx,
        hidden_states=packed.specs[0],
        attention_mask=packed.specs[1],
        position_ids=packed.specs[2],
        data=packed.data,
    )
    await link.send(pb.SessionRequest(step=wire), packed.more)


@dataclass(frozen=True, slots=True)
class _Batch:
    """The tensors of one Forward or Backward, still on the CPU."""

    blocks: BlockRange
    x_BLD: Tensor
    mask_BL: Tensor | None
    position_ids_BL: Tensor | None
    prompts_NBPD: Tensor | None
    grad_BLD: Tensor | None


def _run_span(span: Span, batch: _Batch, x_BLD: Tensor, prompts: Tensor | None) -> Tensor:
    device = span.device
    return span(
        x_BLD,
        attention_mask_BT=None if batch.mask_BL is None else batch.mask_BL.to(device),
        position_ids_BL=None if batch.position_ids_BL is None else batch.position_ids_BL.to(device),
        prompts_NBPD=prompts,
    )


def _forward(span: Span, batch: _Batch) -> Tensor:
    with torch.inference_mode():
        prompts = None if batch.prompts_NBPD is None else batch.prompts_NBPD.to(span.device, span.dtype)
        return _run_span(span, batch, batch.x_BLD.to(span.device, span.dtype), prompts).cpu()


def _backward(span: Span, batch: _Batch, grad_BLD: Tensor) -> tuple[Tensor, Tensor | None]:
    with torch.enable_grad():
        inputs = [batch.x_BLD.to(span.device, span.dtype).requires_grad_()]
        if batch.prompts_NBPD is not None:
            inputs.append(batch.prompts_NBPD.to(span.device, span.dtype).requires_grad_())
        y_BLD = _run_span(span, batch, inputs[0], inputs[1] if len(inputs) == 2 else None)
        gradients = torch.autograd.grad(y_BLD, inputs, grad_BLD.to(y_BLD.device, y_BLD.dtype))
    return gradients[0].cpu(), gradients[1].cpu() if len(inputs) == 2 else None
