"""Forward and backward through remote blocks: stateless calls, split into micro-batches, retried on other peers."""

from __future__ import annotations

import asyncio
import collections
import logging
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import grpc.aio
import torch
from torch import Tensor

from swarm import PROTOCOL_VERSION
from swarm.announcement import AdapterListing
from swarm.codec import optional, pack, torch_dtype
from swarm.errors import NoRoute, PromptTooLong, ProtocolError
from swarm.model.adapters import ModelAdapter, num_prefix_tokens, of_blocks
from swarm.ranges import BlockRange
from swarm.rows import some_rows
from swarm.rpc import errors_from_wire
from swarm.streams import ask, read_tensors
from swarm.v1 import blocks_pb2 as pb
from swarm.v1 import blocks_pb2_grpc as pb_grpc

from .hedging import Hedges, StepTimes
from .network import Attempt, Network, blame
from .parts import LEAST_TOKENS
from .racing import race
from .routing import BACKWARD_COST, Hop, Needs
from .tasks import cancel_and_wait
from .uploads import names_of

# B batch, L length, D hidden, N blocks, P virtual tokens

logger = logging.getLogger(__name__)

T = TypeVar("T")

LEAST_PARALLEL, MAX_PARALLEL = 4, 16
"""Micro-batches on their way at once, so that the servers of a route work at the same time, and those of all routes."""

PARTS_PER_ROUTE = 2
"""Into so many micro-batches a batch is cut for each route that can share it: the faster one takes more of them."""

MAX_EARLY = 4
"""Gradients of micro-batches that wait for those of earlier ones: they are added in one order, so that sums do not
depend on which server is faster."""

MAX_REMEMBERED = 1024
"""Servers whose times are remembered."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Hidden states on their way through a range of blocks, with what belongs to them."""

    x_BLD: Tensor
    through: BlockRange
    """All the blocks that it goes through."""
    mask_BL: Tensor | None = None
    position_ids_BL: Tensor | None = None
    prompts_NBPD: Tensor | None = None
    """Deep prompts of all blocks of the model (block 0 first), or None."""
    adapters: ModelAdapter | None = None
    """What is changed in the blocks of the model."""
    hosted: AdapterListing | None = None
    """The hosted adapter to use instead."""
    dropout_seed: int | None = None
    """For the changes that drop features; None: nothing is dropped."""
    first_row: int = 0
    """Which sequence of the whole batch the first one is."""

    @property
    def context_length(self) -> int:
        """Tokens that each sequence attends to, a prefix included."""
        return self.x_BLD.shape[1] + num_prefix_tokens(self.adapters)

    def split(self, max_tokens: int, max_rows: int, wanted_tokens: int) -> list[Batch]:
        """Cut along the batch, into parts of about the wanted tokens.

        Raises: PromptTooLong: one sequence alone has more tokens than the most that are allowed.
        """
        batch_size, length = self.x_BLD.shape[0], self.context_length
        if length > max_tokens:
            raise PromptTooLong(
                f"a sequence of {length} tokens does not fit the {max_tokens} that servers take at once in training: "
                "use shorter sequences (a prefix counts)"
            )
        rows = max(1, min(max_rows, min(max_tokens, wanted_tokens) // length))
        return [self.rows(start, min(start + rows, batch_size)) for start in range(0, batch_size, rows)]

    def rows(self, start: int, end: int) -> Batch:
        """The sequences [start, end)."""
        return replace(
            self,
            x_BLD=self.x_BLD[start:end],
            mask_BL=some_rows(self.mask_BL, start, end),
            position_ids_BL=some_rows(self.position_ids_BL, start, end),
            prompts_NBPD=some_rows(self.prompts_NBPD, start, end, dim=1),
            first_row=self.first_row + start,
        )


def shared_tokens(num_tokens: int, num_routes: int) -> int:
    """Into parts of how many tokens a batch is cut, so that so many routes can share it by what each of them runs."""
    if num_routes < 2:
        return num_tokens
    return max(LEAST_TOKENS, -(-num_tokens // (PARTS_PER_ROUTE * num_routes)))


def num_parallel(num_routes: int) -> int:
    """How many micro-batches are on their way at once."""
    return min(MAX_PARALLEL, max(LEAST_PARALLEL, PARTS_PER_ROUTE * num_routes))


@dataclass(frozen=True, slots=True, eq=False)
class Gradients:
    """What a batch's backward gives."""

    dx_BLD: Tensor
    dprompts_NBPD: Tensor | None
    """float32."""
    dadapters: Mapping[int, Sequence[Tensor]]
    """Number of a block -> gradients of its adapter's tensors, in the order of their names, float32."""


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """What one hop did in a forward pass: where its backward starts again."""

    hop: Hop
    x_BLD: Tensor
    """The hidden states that entered it."""
    forward_id: bytes
    """What the hop may have kept its activations under; empty if it was not asked to."""


@dataclass(frozen=True, slots=True)
class Trace:
    """One micro-batch's way forward."""

    segments: Sequence[Segment]


class RemoteCompute:
    """Forward and backward over the blocks of one model."""

    def __init__(self, network: Network, needs: Needs) -> None:
        self._network = network
        self._needs = needs
        self._hedges = Hedges()
        self._times: dict[tuple[str, bool], StepTimes] = {}
        """(peer id, whether backward) -> how long its batches take; a token counts once for each block."""

    async def find_adapter(self, wanted: str) -> AdapterListing:
        """The hosted adapter that a name means. Raises: BadRequest: nobody has it."""
        return await self._network.find_adapter(wanted, self._needs)

    async def forward(self, batch: Batch, *, keep: bool) -> tuple[Tensor, list[Trace]]:
        """Return the hidden states that leave the blocks, and one trace per micro-batch.

        Args:
            keep: whether a backward will follow, so that servers may keep their activations for it.
        Raises: NoRoute, PeerError: see Network.retrying.
        """
        max_tokens, max_rows = await self._micro_batch_size(batch.through, batch.hosted)
        num_routes = self._network.num_routes(replace(self._needs, blocks=batch.through, adapter=batch.hosted))
        wanted = shared_tokens(batch.x_BLD.shape[0] * batch.context_length, num_routes)
        parts = batch.split(max_tokens, max_rows, wanted)
        jobs = [partial(self._forward_part, part, batch.through, keep) for part in parts]
        results = await _gather_bounded(jobs, num_parallel(num_routes))
        return torch.cat([y_BLD for y_BLD, _ in results]), [trace for _, trace in results]

    async def backward(self, batch: Batch, traces: Sequence[Trace], grad_BLD: Tensor) -> Gradients:
        """Return the gradients with respect to the batch's hidden states, prompts and adapters."""
        sizes = [trace.segments[0].x_BLD.shape[0] for trace in traces]
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        jobs = [
            partial(self._backward_part, batch.rows(start, start + size), trace, grad_BLD[start : start + size])
            for start, size, trace in zip(starts, sizes, traces, strict=True)
        ]
        sums = _Sums(prompts_of_rows=batch.prompts_NBPD is not None and batch.prompts_NBPD.shape[1] > 1)
        blocks = BlockRange(traces[0].segments[0].hop.blocks.start, traces[0].segments[-1].hop.blocks.end)
        num_routes = self._network.num_routes(replace(self._needs, blocks=blocks, adapter=batch.hosted))
        await _fold(jobs, sums.add, num_parallel(num_routes))
        return sums.gradients()

    async def _micro_batch_size(self, blocks: BlockRange, hosted: AdapterListing | None) -> tuple[int, int]:
        """How many tokens and how many sequences all servers of a route take at once."""
        needs = replace(self._needs, blocks=blocks, adapter=hosted)

        async def attempt(attempt: Attempt) -> tuple[int, int]:
            servers = [hop.server for hop in await self._network.route(needs, attempt)]
            max_tokens = min(self._network.config.micro_batch_tokens, *(each.max_batch_tokens for each in servers))
            return max_tokens, min(each.max_batch_size for each in servers)

        return await self._network.retrying(attempt)

    def _needs_of(self, batch: Batch, blocks: BlockRange) -> Needs:
        batch_size, length = batch.x_BLD.shape[0], batch.context_length
        num_tokens = batch_size * length
        return replace(
            self._needs,
            blocks=blocks,
            part_of=batch.through,
            adapter=batch.hosted,
            batch_size=batch_size,
            batch_tokens=num_tokens,
        )

    async def _forward_part(self, batch: Batch, blocks: BlockRange, keep: bool) -> tuple[Tensor, Trace]:
        x_BLD, segments = batch.x_BLD, []
        start = blocks.start
        while start < blocks.end:
            rest = BlockRange(start, blocks.end)
            y_BLD, segment = await self._forward_hop(replace(batch, x_BLD=x_BLD), rest, keep)
            segments.append(segment)
            x_BLD, start = y_BLD, segment.hop.blocks.end
        return x_BLD, Trace(segments)

    async def _forward_hop(self, batch: Batch, rest: BlockRange, keep: bool) -> tuple[Tensor, Segment]:
        """Run the first hop of a route through the remaining blocks; say how far it went."""

        async def attempt(attempt: Attempt) -> tuple[Tensor, Segment]:
            async def run(hop: Hop) -> tuple[Tensor, Segment]:
                segment = Segment(hop, batch.x_BLD, secrets.token_bytes(16) if keep else b"")
                result = await self._call(hop, batch, None, segment.forward_id)
                return result.dx_BLD, segment

            needs = self._needs_of(batch, rest)
            hops = await self._network.route(needs, attempt)
            return await self._prepared(
                batch, hops, lambda: self._raced(run, batch, hops[0], needs, attempt, is_backward=False)
            )

        return await self._network.retrying(attempt)

    async def _prepared(self, batch: Batch, hops: Sequence[Hop], call: Callable[[], Awaitable[T]]) -> T:
        """Call the first of some hops when all have been sent their adapters, at the same time.

        The time that these take is not the call's, nor is it raced.
        """
        batch_size, length, _ = batch.x_BLD.shape
        with self._network.working(hops[0], batch_size * length):
            return await self._network.uploads.calling(hops, batch.adapters, self._needs.fingerprint, call)

    async def _raced(
        self,
        run: Callable[[Hop], Coroutine[Any, Any, T]],
        batch: Batch,
        hop: Hop,
        needs: Needs,
        attempt: Attempt,
        *,
        is_backward: bool,
    ) -> T:
        """Run a micro-batch on a hop that has its adapters; where that takes too long, on another one as well."""
        others_asked: list[Hop] = []

        async def elsewhere(number: int) -> T:
            tried = [hop, *others_asked]
            others = await self._network.route(needs, await self._network.elsewhere(attempt, needs, tried, number))
            if any(others[0].peer_id == each.peer_id for each in tried):
                raise NoRoute(f"no other server has block {needs.blocks.start}")
            if is_backward and len(others) > 1:
                raise NoRoute(f"no other server has all of {hop.blocks}")
            logger.info("a batch takes long at %s: asking %s as well", hop, others[0])
            others_asked.append(others[0])
            return await self._prepared(batch, others[:1], lambda: run(others[0]))

        size = needs.batch_tokens * len(hop.blocks)
        times = self._times.get((hop.peer_id, is_backward))
        bound_s = times.bound_s(size) if times is not None else None
        if bound_s is None:
            bound_s = self._network.prior_s([hop], needs, needs.batch_tokens * (BACKWARD_COST if is_backward else 1))
        self._hedges.fed(size)
        outcome = await race(
            run(hop), elsewhere, lambda number: self._hedges.after_s(bound_s, size, number), self._network.note_failure
        )
        await cancel_and_wait(list(outcome.left.values()))
        for other in others_asked:
            self._hedges.ended(size, won=outcome.winner > 0 and other is others_asked[-1])
        return outcome.result

    async def _backward_part(self, batch: Batch, trace: Trace, grad_BLD: Tensor) -> Gradients:
        prompts = batch.prompts_NBPD
        dprompts = None if prompts is None else torch.zeros_like(prompts, dtype=torch.float32)
        dadapters: dict[int, Sequence[Tensor]] = {}
        segments = list(trace.segments)
        while segments:
            segment = segments.pop()
            blocks = segment.hop.blocks

            async def attempt(
                attempt: Attempt, segment: Segment = segment, grad: Tensor = grad_BLD
            ) -> Gradients | None:
                needs = self._needs_of(batch, segment.hop.blocks)
                hops = await self._network.route(needs, attempt, prefer=segment.hop.peer_id)
                if len(hops) > 1:
                    return None

                async def run(hop: Hop) -> Gradients:
                    return await self._call(hop, replace(batch, x_BLD=segment.x_BLD), grad, segment.forward_id)

                return await self._prepared(
                    batch, hops, lambda: self._raced(run, batch, hops[0], needs, attempt, is_backward=True)
                )

            result = await self._network.retrying(attempt)
            if result is None:
                # No single peer serves these blocks any more: find the states between the peers that do.
                _, finer = await self._forward_part(replace(batch, x_BLD=segment.x_BLD), blocks, keep=True)
                segments.extend(finer.segments)
                continue
            grad_BLD = result.dx_BLD
            dadapters.update(result.dadapters)
            if dprompts is not None and result.dprompts_NBPD is not None:
                dprompts[blocks.start : blocks.end] = result.dprompts_NBPD
        return Gradients(grad_BLD, dprompts, dadapters)

    async def _call(self, hop: Hop, batch: Batch, grad_BLD: Tensor | None, forward_id: bytes) -> Gradients:
        """One Forward (without a gradient; what leaves the blocks is in place of one) or Backward on one peer.

        Raises: PeerError, UserError.
        """
        is_backward = grad_BLD is not None
        adapters = of_blocks(batch.adapters, hop.blocks)
        opening, more = self._opening(hop, batch, grad_BLD, forward_id)
        batch_size, length, _ = batch.x_BLD.shape
        expected_s = self._network.expected_batch_s(hop, self._needs_of(batch, hop.blocks))
        began_s = time.monotonic()
        tensors = await self._exchange(hop, opening, more, batch, is_backward)
        y_BLD, dprompts, *rest = tensors
        if y_BLD is None or [_shape(each) for each in tensors] != self._answer_shapes(hop, batch, is_backward):
            raise blame(ProtocolError(f"peer {hop} returned tensors of the wrong shape"), hop)
        self._network.succeeded(hop.peer_id)
        seconds = time.monotonic() - began_s
        self._took(hop, is_backward, batch_size * length * len(hop.blocks), seconds)
        self._network.took_batch(hop, seconds, expected_s * (BACKWARD_COST if is_backward else 1))
        gradients = iter([each for each in rest if each is not None])
        dadapters = {
            number: [next(gradients) for _ in adapter.tensors()]
            for number, adapter in zip(hop.blocks, adapters or (), strict=False)
            if adapter is not None and is_backward
        }
        return Gradients(y_BLD.to(batch.x_BLD.dtype), dprompts, dadapters)

    def _answer_shapes(self, hop: Hop, batch: Batch, is_backward: bool) -> list[torch.Size | None]:
        """Shapes of the tensors that a call returns."""
        if not is_backward:
            return [batch.x_BLD.shape, None]
        prompts = batch.prompts_NBPD
        adapters = [each for each in of_blocks(batch.adapters, hop.blocks) or () if each is not None]
        return [
            batch.x_BLD.shape,
            None if prompts is None else torch.Size([len(hop.blocks), *prompts.shape[1:]]),
            *(tensor.shape for adapter in adapters for tensor in adapter.tensors().values()),
        ]

    def _opening(
        self, hop: Hop, batch: Batch, grad_BLD: Tensor | None, forward_id: bytes
    ) -> tuple[pb.ComputeOpen, list[bytes]]:
        """The message of a call, and the parts of its tensors that did not fit into it."""
        dtype = torch_dtype(hop.server.dtype)
        prompts, config = batch.prompts_NBPD, self._network.config
        packed = pack(
            batch.x_BLD.to(dtype),
            batch.mask_BL,
            batch.position_ids_BL,
            None if prompts is None else prompts[hop.blocks.start : hop.blocks.end].to(dtype),
            None if grad_BLD is None else grad_BLD.to(dtype),
            codec=[*[config.codec] * 4, config.gradient_codec],
        )
        opening = pb.ComputeOpen(
            protocol_version=PROTOCOL_VERSION,
            model_fingerprint=self._needs.fingerprint,
            blocks=pb.BlockRange(start=hop.blocks.start, end=hop.blocks.end),
            hidden_states=packed.specs[0],
            attention_mask=packed.specs[1],
            position_ids=packed.specs[2],
            prompts=packed.specs[3],
            grad_outputs=packed.specs[4],
            data=packed.data,
            forward_id=forward_id,
            adapters=names_of(of_blocks(batch.adapters, hop.blocks)),
            hosted_adapter=b"" if batch.hosted is None else batch.hosted.digest_bytes,
            dropout_seed=batch.dropout_seed,
            first_row=batch.first_row,
        )
        return opening, packed.more

    def _took(self, hop: Hop, is_backward: bool, size: int, seconds: float) -> None:
        times = self._times.pop((hop.peer_id, is_backward), None) or StepTimes()
        times.took(size, seconds)
        self._times[hop.peer_id, is_backward] = times
        if len(self._times) > MAX_REMEMBERED:
            del self._times[next(iter(self._times))]

    async def _exchange(
        self, hop: Hop, opening: pb.ComputeOpen, more: list[bytes], batch: Batch, is_backward: bool
    ) -> list[Tensor | None]:
        timeout_s = self._network.config.compute_timeout_s
        max_bytes = 8 * sum(math.prod(shape) for shape in self._answer_shapes(hop, batch, is_backward) if shape)

        async def exchange(call: grpc.aio.StreamStreamCall) -> list[Tensor | None]:
            message = await ask(call, pb.ComputeRequest(open=opening), more)
            if message is grpc.aio.EOF or message.WhichOneof("kind") != "result":
                await call.code()
                raise ProtocolError(f"peer {hop} answered without a result")
            specs = [*optional(message.result, "hidden_states", "prompts"), *message.result.adapter_grads]
            return await read_tensors(call.read, specs, message.result.data, max_bytes=max_bytes)

        async with self._network.connector.lease(hop.address) as channel, errors_from_wire(hop.peer_id):
            stub = pb_grpc.BlocksStub(channel)
            call = (stub.Backward if is_backward else stub.Forward)(timeout=timeout_s)
            try:
                return await self._network.while_alive(exchange(call), [hop], timeout_s)
            finally:
                call.cancel()


class _Sums:
    """The gradients of a batch, from those of its micro-batches, each added when it is handed over.

    Args:
        prompts_of_rows: whether each sequence has deep prompts of its own.
    """

    def __init__(self, *, prompts_of_rows: bool) -> None:
        self._prompts_of_rows = prompts_of_rows
        self._dx: list[Tensor] = []
        self._dprompts: list[Tensor] = []
        self._dadapters: dict[int, Sequence[Tensor]] = {}

    def add(self, part: Gradients) -> None:
        """Add the next one; its tensors may be changed."""
        self._dx.append(part.dx_BLD)
        if part.dprompts_NBPD is not None and (self._prompts_of_rows or not self._dprompts):
            self._dprompts.append(part.dprompts_NBPD)
        elif part.dprompts_NBPD is not None:
            self._dprompts[0] += part.dprompts_NBPD
        for number, tensors in part.dadapters.items():
            for total, tensor in zip(self._dadapters.setdefault(number, tensors), tensors, strict=True):
                if total is not tensor:
                    total += tensor

    def gradients(self) -> Gradients:
        dprompts = torch.cat(self._dprompts, dim=1) if self._dprompts else None
        return Gradients(torch.cat(self._dx), dprompts, self._dadapters)


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


async def _fold(jobs: Iterable[Callable[[], Awaitable[T]]], add: Callable[[T], None], at_once: int) -> None:
    """Run jobs, some at once, and add their results in the order of the jobs, whichever comes first.

    No more than MAX_EARLY wait for those before them, so that few are in memory. The first failure cancels the rest.
    """
    gate = asyncio.Semaphore(at_once)
    failed = asyncio.Event()
    tasks: collections.deque[asyncio.Task[T]] = collections.deque()

    async def bounded(job: Callable[[], Awaitable[T]]) -> T:
        async with gate:
            return await job()

    def note(task: asyncio.Task[T]) -> None:
        if not task.cancelled() and task.exception() is not None:
            failed.set()

    async def add_first() -> None:
        await asyncio.wait({tasks[0], failing}, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()  # raises why one has failed
        await asyncio.to_thread(add, tasks.popleft().result())

    failing = asyncio.create_task(failed.wait())
    try:
        for job in jobs:
            if len(tasks) == at_once + MAX_EARLY:
                await add_first()
            tasks.append(asyncio.create_task(bounded(job)))
            tasks[-1].add_done_callback(note)
        while tasks:
            await add_first()
    finally:
        await cancel_and_wait([*tasks, failing])


async def _gather_bounded(jobs: Sequence[Callable[[], Awaitable[T]]], at_once: int) -> list[T]:
    """Run jobs, some at once; the first failure cancels the rest."""
    gate = asyncio.Semaphore(at_once)

    async def bounded(job: Callable[[], Awaitable[T]]) -> T:
        async with gate:
            return await job()

    tasks = [asyncio.create_task(bounded(job)) for job in jobs]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await cancel_and_wait(tasks)
