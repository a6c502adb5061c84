"""What the options of gRPC promise, with its own calls over connections that are cut."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest

from swarm.rpc import CHANNEL_OPTIONS, SERVER_OPTIONS

NOTICED_S = 20.0
"""Twice the time until a ping is sent and counts as unanswered."""


class Wire:
    """Carries connections to a port until it is cut; then nothing moves any more, and nobody is told."""

    def __init__(self) -> None:
        self.is_cut = False

    @asynccontextmanager
    async def open(self, target: int) -> AsyncIterator[int]:
        tasks: set[asyncio.Task[None]] = set()

        async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(1 << 16):
                if not self.is_cut:
                    writer.write(data)

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            other = await asyncio.open_connection("127.0.0.1", target)
            tasks.update(map(asyncio.create_task, (carry(reader, other[1]), carry(other[0], writer))))

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class Echo(grpc.GenericRpcHandler):
    def service(self, _: object) -> grpc.RpcMethodHandler:
        return grpc.stream_stream_rpc_method_handler(self._echo)

    async def _echo(self, _requests: object, context: grpc.aio.ServicerContext) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            await context.write(message)


async def test_a_stream_over_a_line_that_was_cut_just_after_data_came_fails_within_seconds() -> None:
    """Data makes gRPC ping, to learn what the line can carry. The ping that keeps watch waits for that one."""
    wire = Wire()
    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers((Echo(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with (
        wire.open(port) as wired,
        grpc.aio.insecure_channel(f"127.0.0.1:{wired}", options=CHANNEL_OPTIONS) as channel,
    ):
        call = channel.stream_stream("/swarm.Test/Echo")()
        for _ in range(3):
            await call.write(b"x" * 5000)
            await call.read()
        wire.is_cut = True
        cut_s = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await call.write(b"x" * 5000)
            async with asyncio.timeout(2 * NOTICED_S):
                await call.read()
        assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
        assert time.monotonic() - cut_s < NOTICED_S
    await server.stop(None)
