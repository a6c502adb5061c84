"""The gate of a server: carries out what limits.py decides, for every call of whatever service at its port."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import grpc
import grpc.aio

from swarm.errors import TooManyRequests
from swarm.rpc import abort
from swarm.rpc_members import current_member
from swarm.v1 import blocks_pb2 as pb

from .callers import Caller, Callers
from .limits import LimitsConfig, Quotas, Refusal, What

logger = logging.getLogger(__name__)

PUSH = f"/{pb.DESCRIPTOR.services_by_name['Blocks'].full_name}/Push"


class Gate(grpc.aio.ServerInterceptor):
    """Lets calls in, or tells their callers to come back later."""

    def __init__(self, config: LimitsConfig) -> None:
        self.config = config
        self.callers = Callers(loopback_is_caller=config.loopback_is_caller)
        self.quotas = Quotas(config)
        self.on_shut_out: Callable[[Caller], None] = lambda caller: None
        """Called when a caller asks that is shut out; closes its connections."""

    def caller(self, context: grpc.aio.ServicerContext) -> Caller:
        """Whom a call counts for; its address before it has shown which member calls."""
        member = current_member.get()
        return self.callers.of_peer(context.peer(), "" if member is None else str(member))

    @contextmanager
    def hold(self, caller: Caller, what: What) -> Iterator[None]:
        """Let a caller have one more of something while the body runs. Raises: TooManyRequests: it may not."""
        if (refusal := self.quotas.begin(caller, what, time.monotonic())) is not None:
            raise self._error(caller, refusal)
        try:
            yield
        finally:
            self.quotas.end(caller, what)

    def reader(self, context: grpc.aio.ServicerContext, caller: Caller) -> Callable[[], Awaitable[Any]]:
        """What reads the messages of a call, no faster than its caller may send."""

        async def read() -> Any:
            message = await context.read()
            if message is not grpc.aio.EOF:
                await self._delay(caller, message.ByteSize())
            return message

        return read

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        # Streams from other servers count for the sessions that they feed: the service sees to them.
        return self._limited(handler, None if handler_call_details.method == PUSH else What.CALLS)

    def _limited(self, handler: grpc.RpcMethodHandler, what: What | None) -> grpc.RpcMethodHandler:
        kind = ("stream_" if handler.request_streaming else "unary_") + (
            "stream" if handler.response_streaming else "unary"
        )
        behave = getattr(handler, kind)

        async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
            async with self._admitted(context, what):
                return await behave(request, context)

        async def generate(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            async with self._admitted(context, what):
                async for message in behave(request, context):
                    yield message

        make = getattr(grpc, f"{kind}_rpc_method_handler")
        limited = generate if inspect.isasyncgenfunction(behave) else call
        made: grpc.RpcMethodHandler = make(limited, handler.request_deserializer, handler.response_serializer)
        return made

    @asynccontextmanager
    async def _admitted(self, context: grpc.aio.ServicerContext, what: What | None) -> AsyncIterator[None]:
        """Count a call while it runs."""
        caller, now_s = self.caller(context), time.monotonic()
        refusal = self.quotas.call(caller, now_s)
        if refusal is None and what is not None:
            refusal = self.quotas.begin(caller, what, now_s)
        if refusal is not None:
            await abort(context, self._error(caller, refusal))
        try:
            await self._delay(caller, 0)
            yield
        finally:
            if what is not None:
                self.quotas.end(caller, what)

    async def _delay(self, caller: Caller, num_bytes: int) -> None:
        if (wait_s := self.quotas.wait_s(caller, num_bytes, time.monotonic())) > 0:
            await asyncio.sleep(wait_s)

    def _error(self, caller: Caller, refusal: Refusal) -> TooManyRequests:
        now_s = time.monotonic()
        self.log(caller, f"refused: {refusal.reason}")
        if self.quotas.is_shut_out(caller, now_s):
            self.on_shut_out(caller)
        return TooManyRequests(f"{refusal.reason}: use another peer, or come back later", refusal.retry_after_s)

    def log(self, caller: Caller, what: str) -> None:
        """Say something about a caller, once a minute at most."""
        if self.quotas.should_log(caller, time.monotonic()):
            logger.info("%s: %s", caller.key, what)
