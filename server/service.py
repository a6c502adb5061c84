"""The Blocks service: messages in, work for the compute thread, messages out. No arithmetic happens here."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio

import swarm
from swarm import PROTOCOL_VERSION
from swarm.codec import CHUNK_BYTES, Unpacker, optional, pack, raw_bytes, wire_dtype
from swarm.errors import Draining, ProtocolError
from swarm.model.hosted import HostedAdapter
from swarm.model.narrow import SpanViews
from swarm.peers import Connector
from swarm.rpc import errors_to_wire
from swarm.streams import fill
from swarm.v1 import blocks_pb2 as pb
from swarm.v1 import blocks_pb2_grpc as pb_grpc

from . import checks
from .adapters import AdapterStore, Lease
from .batches import Batch, KeptActivations, run_backward, run_forward
from .callers import Caller
from .checks import ServiceLimits
from .decoding import Decoding
from .engine import Engine
from .fairness import Fairness
from .gate import Gate
from .limits import What
from .room import MessageRoom, answer
from .sessions import SessionTable
from .waits import StepWaits

logger = logging.getLogger(__name__)

MESSAGE_TIMEOUT_S = 30.0
"""How long a caller may take to say what it wants."""

FORWARD_PASSES, BACKWARD_PASSES = 1, 3
"""How many passes through the blocks they take: a Backward computes the activations again where none are kept."""

Read = Callable[[], Awaitable[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What this server tells about itself."""

    peer_id: str
    name: str
    fingerprint: str
    num_blocks: int
    hosted: Sequence[HostedAdapter] = ()
    """Adapters for clients to choose by name."""


class BlocksService(pb_grpc.BlocksServicer):
    """Serves a range of blocks. See proto/swarm/v1/blocks.proto for the contract of each call."""

    def __init__(
        self,
        *,
        model: ServedModel,
        views: SpanViews,
        engine: Engine,
        sessions: SessionTable,
        connector: Connector,
        limits: ServiceLimits,
        kept: KeptActivations,
        adapters: AdapterStore,
        gate: Gate,
        room: MessageRoom,
        fairness: Fairness,
    ) -> None:
        self._model = model
        self._connector = connector
        self._views = views
        self._span = views.span
        self._engine = engine
        self._sessions = sessions
        self._limits = limits
        self._kept = kept
        self._adapters = adapters
        self._gate = gate
        self._room = room
        self._fairness = fairness
        self._waits = StepWaits(engine.statistics, time.monotonic)
        self._decoding = Decoding(
            span=views.span,
            engine=engine,
            sessions=sessions,
            connector=connector,
            limits=limits,
            adapters=adapters,
            room=room,
            fairness=fairness,
        )
        self._can_rewind = views.span.can_rewind
        self._num_calls = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False

    def drain(self) -> None:
        """Take no new work from now on, and tell the clients of open sessions to go on elsewhere."""
        self._draining = True
        self._decoding.drain()

    async def wait_idle(self) -> None:
        """Wait until no call is in progress."""
        await self._idle.wait()

    def announced(self) -> dict[str, float]:
        """The fields of an announcement that say how fast calls get on here."""
        return {"queue_s": self._waits.expected_s(), "bytes_per_s": self._connector.throughput.bytes_per_s()}

    # The RPCs.

    async def Describe(self, request: pb.DescribeRequest, context: grpc.aio.ServicerContext) -> pb.DescribeResponse:
        """See the wire contract; a caller of another version gets an answer too, so that it can say so."""
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
            limits=self._limits.to_wire(self._adapters.max_request_bytes),
            load=pb.Load(
                num_sessions=self._sessions.num_sessions,
                cache_used_bytes=self._sessions.cache_used_bytes,
                cache_total_bytes=self._sessions.cache_total_bytes,
                queue_length=self._engine.queue_length,
                queue_s=self._waits.expected_s(),
            ),
            can_rewind=self._can_rewind,
            clock_s=time.time(),
            padding=request.padding[:CHUNK_BYTES] if request.echo else b"",
        )

    async def Session(self, _requests: object, context: grpc.aio.ServicerContext) -> None:
        """See the wire contract."""
        caller = self._gate.caller(context)
        async with errors_to_wire(context, "Session"), self._counted():
            read = self._gate.reader(context, caller)
            opening = (await _next_message(read, "open")).open
            self._check_caller(opening)
            with self._gate.hold(caller, What.SESSIONS):
                await self._serve_session(context, read, opening, caller)

    async def _serve_session(
        self, context: grpc.aio.ServicerContext, read: Read, opening: pb.SessionOpen, caller: Caller
    ) -> None:
        async with self._decoding.open(context, read, opening, caller) as session:
            opened = pb.SessionOpened(
                max_tokens=session.max_tokens,
                max_step_tokens=self._limits.max_step_tokens,
                position=session.cache.length - session.num_prefix_tokens,
            )
            await context.write(pb.SessionResponse(opened=opened))
            await self._decoding.serve(context, read, session)

    async def Push(self, _requests: object, context: grpc.aio.ServicerContext) -> pb.PushResponse:
        """See the wire contract. What goes wrong here ends the session, whose client is told on its own stream."""
        caller = self._gate.caller(context)
        async with errors_to_wire(context, "Push"), self._counted(admit=True):
            with self._gate.hold(caller, What.PUSHES):
                attach = (await _next_message(context.read, "attach")).attach
            checks.check_version(attach.protocol_version)
            with self._decoding.attach(attach, context.peer()) as session:
                # From now on it is the caller who opened the session that sends.
                read = self._gate.reader(context, session.caller)
                await self._decoding.run(read, session, from_client=False)
        return pb.PushResponse()

    async def Forward(self, _requests: object, context: grpc.aio.ServicerContext) -> None:
        """See the wire contract."""
        caller = self._gate.caller(context)
        async with (
            errors_to_wire(context, "Forward"),
            self._counted(),
            self._open_batch(context, caller, is_backward=False) as batch,
        ):
            span = self._views.view(batch.blocks)
            await self._wait_turn(caller, batch, FORWARD_PASSES)
            y_BLD = await self._engine.train(
                lambda turns: run_forward(span, batch, turns, self._kept),
                num_rows=batch.num_rows,
                length=batch.context_length,
            )
            packed = pack(y_BLD, codec=batch.codec)
            result = pb.ComputeResult(hidden_states=packed.specs[0], data=packed.data)
            await answer(context, pb.ComputeResponse(result=result), packed.more)

    async def Backward(self, _requests: object, context: grpc.aio.ServicerContext) -> None:
        """See the wire contract."""
        caller = self._gate.caller(context)
        async with (
            errors_to_wire(context, "Backward"),
            self._counted(),
            self._open_batch(context, caller, is_backward=True) as batch,
        ):
            grad_BLD = checks.check_same_shape(batch.grad_BLD, batch.x_BLD)
            span = self._views.view(batch.blocks)
            await self._wait_turn(caller, batch, BACKWARD_PASSES)
            gradients = await self._engine.train(
                lambda turns: run_backward(span, batch, grad_BLD, turns, self._kept),
                num_rows=batch.num_rows,
                length=batch.context_length,
            )
            # An optimizer adds up the gradients of prompts and adapters: they go as they are.
            codecs = [batch.codec, pb.CODEC_RAW]
            packed = await asyncio.to_thread(
                pack, gradients.dx_BLD, gradients.dprompts_NBPD, codec=codecs, raw=gradients.dadapters
            )
            del gradients
            result = pb.ComputeResult(
                hidden_states=packed.specs[0],
                prompts=packed.specs[1],
                adapter_grads=[spec for spec in packed.specs[2:] if spec is not None],
                data=packed.data,
            )
            await answer(context, pb.ComputeResponse(result=result), packed.more)

    async def PutAdapters(self, _requests: object, context: grpc.aio.ServicerContext) -> pb.PutAdaptersResponse:
        """See the wire contract."""
        caller = self._gate.caller(context)
        async with errors_to_wire(context, "PutAdapters"), self._counted():
            read = self._gate.reader(context, caller)
            self._check_caller((await _next_message(read, "open")).open)
            num_bytes = 0
            while (message := await _next_message(read, "adapter", or_end=True)) is not None:
                num_bytes += message.adapter.num_bytes
                self._adapters.check_request(num_bytes)
                await self._adapters.receive(message.adapter, read, caller=caller.key)
        return pb.PutAdaptersResponse()

    def _check_caller(self, opening: pb.SessionOpen | pb.ComputeOpen | pb.PutAdaptersOpen) -> None:
        checks.check_version(opening.protocol_version)
        checks.check_fingerprint(opening.model_fingerprint, self._model.fingerprint, self._model.name)

    async def _wait_turn(self, caller: Caller, batch: Batch, num_passes: int) -> None:
        """Wait while the caller has taken more of the computing time than its share."""
        share = len(batch.blocks) / len(self._span.blocks)
        pass_s = self._engine.costs.iteration_s(batch.num_rows * batch.context_length)
        self._fairness.batch(caller, num_passes * share * pass_s, time.monotonic())
        await self._fairness.wait(caller)

    @asynccontextmanager
    async def _open_batch(
        self, context: grpc.aio.ServicerContext, caller: Caller, *, is_backward: bool
    ) -> AsyncIterator[Batch]:
        """Check what is asked for, find room, read its tensors; keep its adapters while the body runs."""
        read = self._gate.reader(context, caller)
        wire: pb.ComputeOpen = (await _next_message(read, "open")).open
        self._check_caller(wire)
        blocks = checks.check_blocks(wire.blocks, self._span.blocks, self._span.num_model_blocks)
        specs = optional(wire, "hidden_states", "attention_mask", "position_ids", "prompts", "grad_outputs")
        max_tokens, hidden_size = self._limits.max_batch_tokens, self._span.hidden_size
        checks.check_batch_spec(specs[0], hidden_size, self._limits, max_tokens=max_tokens)
        batch_size, length, _ = wire.hidden_states.shape
        checks.check_prompts_spec(specs[3], blocks, batch_size, hidden_size, self._limits)
        checks.check_forward_id(wire.forward_id)
        max_bytes = checks.max_message_bytes(max_tokens, hidden_size, len(blocks), self._limits)
        async with AsyncExitStack() as owned:
            owned.enter_context(self._gate.hold(caller, What.BATCHES))
            lease = owned.enter_context(self._adapters.lease(wire.adapters, blocks, wire.hosted_adapter))
            checks.check_prefix(lease.num_prefix_tokens, wire)
            checks.check_num_tokens(batch_size, lease.num_prefix_tokens + length, max_tokens)
            unpacker = Unpacker(specs, max_bytes=max_bytes)
            await owned.enter_async_context(
                self._room.hold(caller, _batch_bytes(unpacker, wire, lease, is_backward=is_backward))
            )
            tensors = await fill(unpacker, read, wire.data)
            x_BLD, mask_BL, ids_BL, prompts, grad_BLD = tensors
            assert x_BLD is not None
            checks.check_mask(mask_BL, batch_size, length)
            checks.check_position_ids(ids_BL, batch_size, length)
            yield Batch(
                blocks,
                x_BLD,
                mask_BL,
                ids_BL,
                prompts,
                grad_BLD,
                (wire.grad_outputs if wire.HasField("grad_outputs") else wire.hidden_states).codec,
                wire.forward_id,
                lease,
                wire.dropout_seed if wire.HasField("dropout_seed") else None,
                wire.first_row,
            )

    @asynccontextmanager
    async def _counted(self, *, admit: bool = False) -> AsyncIterator[None]:
        """Count the call while it runs; a draining server admits only what belongs to open sessions."""
        if self._draining and not admit:
            raise Draining("this server is about to leave: use another one")
        self._num_calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_calls -= 1
            if not self._num_calls:
                self._idle.set()


def _batch_bytes(unpacker: Unpacker, wire: pb.ComputeOpen, lease: Lease, *, is_backward: bool) -> int:
    """Room that a batch takes from before it is read until its answer is sent."""
    num_output_bytes = raw_bytes(wire.hidden_states)
    if is_backward:
        num_output_bytes += lease.num_gradient_bytes
        num_output_bytes += raw_bytes(wire.prompts) if wire.HasField("prompts") else 0
    return checks.room_bytes(unpacker.num_raw_bytes, num_output_bytes)


async def _next_message(read: Read, kind: str, *, or_end: bool = False) -> Any:
    """Return the message that a call begins or goes on with; None at its end, if that may be.

    Raises: ProtocolError: it is of another kind, or none comes.
    """
    try:
        async with asyncio.timeout(MESSAGE_TIMEOUT_S):
            message = await read()
    except TimeoutError as exc:
        raise ProtocolError(f"no message came within {MESSAGE_TIMEOUT_S:.0f} s") from exc
    if message is grpc.aio.EOF and or_end:
        return None
    if message is grpc.aio.EOF or message.WhichOneof("kind") != kind:
        which = "next" if or_end else "first"
        raise ProtocolError(f"the {which} message of this call must be `{kind}`")
    return message
