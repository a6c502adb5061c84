"""Reading and writing messages whose tensors may need several parts; used at both ends of every stream."""

# B batch, L length, D hidden

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import grpc.aio
from torch import Tensor

from swarm.codec import Unpacker, pack
from swarm.errors import PeerUnavailable, ProtocolError
from swarm.v1 import blocks_pb2 as pb

logger = logging.getLogger(__name__)

PART_TIMEOUT_S = 60.0
"""How long the next part of a message that has begun may take."""

LEAST_BYTES_PER_S = 64 << 10
"""Who sends or takes the parts of a message more slowly holds room that others need."""


def total_timeout_s(num_bytes: int) -> float:
    """How long a message of so many bytes may take, all parts together."""
    return PART_TIMEOUT_S + num_bytes / LEAST_BYTES_PER_S


@dataclass(frozen=True, slots=True)
class Step:
    """What one step of a session sends to a hop; see Step in the wire contract."""

    position: int
    num_outputs: int
    x_BLD: Tensor
    mask_BL: Tensor | None = None
    position_ids_BL: Tensor | None = None
    beam_idx: Sequence[int] = ()
    hop_us: Sequence[int] = ()
    """How long each earlier hop had it, microseconds."""
    held: Sequence[int] = ()
    """How many leading tokens of the session each later hop holds, and need not be sent; empty: all are sent all."""

    @property
    def end(self) -> int:
        """Tokens of each sequence after it."""
        return self.position + self.x_BLD.shape[1]

    def passed_on(self, y_BLD: Tensor) -> Step | None:
        """What the next hop is sent of it, given what came out here, [B, L, D]; None: it holds all of that."""
        start = max(self.position, *self.held[:1], 0)
        if start >= self.end:
            return None
        skipped = start - self.position
        return replace(
            self,
            position=start,
            x_BLD=y_BLD[:, skipped:],
            mask_BL=None if self.mask_BL is None else self.mask_BL[:, skipped:],
            position_ids_BL=None if self.position_ids_BL is None else self.position_ids_BL[:, skipped:],
            held=self.held[1:],
        )

    def to_wire(self, step_id: int, codec: pb.Codec) -> tuple[pb.SessionRequest, list[bytes]]:
        """Return the message, and the parts of its tensors that did not fit into it: see `write_message`."""
        packed = pack(self.x_BLD, self.mask_BL, self.position_ids_BL, codec=codec)
        step = pb.Step(
            step_id=step_id,
            position=self.position,
            num_outputs=self.num_outputs,
            beam_idx=self.beam_idx,
            hidden_states=packed.specs[0],
            attention_mask=packed.specs[1],
            position_ids=packed.specs[2],
            data=packed.data,
            hop_us=self.hop_us,
            held=self.held,
        )
        return pb.SessionRequest(step=step), packed.more


def counting_step(step_id: int, held: Sequence[int]) -> pb.SessionRequest:
    """A step of which a hop gets nothing, because it holds all of it."""
    return pb.SessionRequest(step=pb.Step(step_id=step_id, held=held))


async def write_message(write: Callable[[Any], Awaitable[None]], first: Any, more: Sequence[bytes]) -> None:
    """Send a message and the parts of its tensors that did not fit into it."""
    await write(first)
    for part in more:
        await write(type(first)(more=part))


async def ask(call: grpc.aio.StreamStreamCall, first: Any, more: Sequence[bytes]) -> Any:
    """Send a message as `write_message` does and return the first one of the answer, or gRPC's end of a stream.

    Raises: AioRpcError: the other side refused, perhaps before it had all.
    """
    try:
        await write_message(call.write, first, more)
    except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
        logger.debug("a call ended while its message was sent")  # reading says why
        await wait_status(call)
    return await call.read()


async def wait_status(call: grpc.aio.StreamStreamCall | grpc.aio.StreamUnaryCall) -> None:
    """Wait for the status that the other side gave a call that ended while it was written to.

    gRPC puts one of its own first, as if the connection had broken, and replaces it within some turns of the loop.
    """
    for _ in range(50):
        if await call.code() is not grpc.StatusCode.INTERNAL or await call.trailing_metadata():
            return
        await asyncio.sleep(0.01)


async def read_tensors(
    read: Callable[[], Awaitable[Any]], specs: Sequence[pb.TensorSpec | None], data: bytes, *, max_bytes: int
) -> list[Tensor | None]:
    """Return the tensors of a message whose first part is `data`, reading more parts as needed.

    Raises: ProtocolError: specs that are not allowed, or parts that do not add up to them. PeerUnavailable: they come
        too slowly.
    """
    return await fill(Unpacker(specs, max_bytes=max_bytes), read, data)


async def fill(unpacker: Unpacker, read: Callable[[], Awaitable[Any]], data: bytes) -> list[Tensor | None]:
    """The same where the specs have been checked before: whoever reads may have had to find room first."""
    if data:
        unpacker.feed(data)
    timeout_s = total_timeout_s(unpacker.num_bytes)
    try:
        async with asyncio.timeout(timeout_s):
            while not unpacker.done:
                unpacker.feed(await _read_part(read))
    except TimeoutError as exc:
        raise PeerUnavailable(f"a message of {unpacker.num_bytes} bytes did not come within {timeout_s:.0f} s") from exc
    return unpacker.tensors()


async def read_parts(
    read: Callable[[], Awaitable[Any]],
    data: bytes,
    num_bytes: int,
    on_part: Callable[[bytes], None],
    *,
    timeout_s: float = PART_TIMEOUT_S,
) -> None:
    """Hand over the parts of a message whose first part is `data`, reading more as needed.

    Args:
        num_bytes: how many there are in all; whoever calls has checked that so many are welcome.
        on_part: called with each part in turn; what it raises ends the reading.
        timeout_s: how long the next part may take.
    Raises: ProtocolError: parts that do not add up to them.
    """
    received = 0
    while True:
        received += len(data)
        if received > num_bytes:
            raise ProtocolError(f"{num_bytes} bytes were announced, {received} came")
        on_part(data)
        if received == num_bytes:
            return
        data = await _read_part(read, timeout_s)
        if not data:
            raise ProtocolError("a message part carries no bytes although some are missing")


async def _read_part(read: Callable[[], Awaitable[Any]], timeout_s: float = PART_TIMEOUT_S) -> bytes:
    """Return the next part of a message that has begun."""
    try:
        async with asyncio.timeout(timeout_s):
            message = await read()
    except TimeoutError as exc:
        raise PeerUnavailable(f"the rest of a message did not come within {timeout_s:.0f} s") from exc
    if message is grpc.aio.EOF or message.WhichOneof("kind") != "more":
        raise ProtocolError("a message ended before the bytes that it announced had come")
    return bytes(message.more)
