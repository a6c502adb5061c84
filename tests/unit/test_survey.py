"""What a server finds out of its own line before there is traffic that tells."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio
import pytest
from fakes import announcement

from swarm import survey as survey_module
from swarm.errors import PeerUnavailable
from swarm.survey import LINE_BYTES, LINE_CALLS, Survey
from swarm.throughput import Throughput
from swarm.v1 import blocks_pb2 as pb
from swarm.v1 import blocks_pb2_grpc as pb_grpc

SERVERS = [announcement(name, 0, 12) for name in "ABC"]


class SlowReader(pb_grpc.BlocksServicer):
    """Takes so many bytes in a second."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self.num_paddings = 0

    async def Describe(self, request: pb.DescribeRequest, context: grpc.aio.ServicerContext) -> pb.DescribeResponse:
        self.num_paddings += bool(request.padding)
        await asyncio.sleep(len(request.padding) / self.bytes_per_s)
        return pb.DescribeResponse()


class OneChannel:
    """Stands for Connector: all servers are the same."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self.throughput = Throughput()

    @asynccontextmanager
    async def lease(self, address) -> AsyncIterator[grpc.aio.Channel]:
        if address.peer_id == SERVERS[2].peer_id:
            raise PeerUnavailable("gone")
        yield self._channel

    async def forget(self, peer_id: str) -> None:
        pass


@asynccontextmanager
async def surveying(reader: SlowReader) -> AsyncIterator[tuple[Survey, Throughput]]:
    server = grpc.aio.server()
    pb_grpc.add_BlocksServicer_to_server(reader, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            connector = OneChannel(channel)
            yield Survey(connector), connector.throughput  # type: ignore[arg-type]
    finally:
        await server.stop(None)


async def test_a_line_is_filled_once_with_those_that_answer():
    reader = SlowReader(10e6)
    async with surveying(reader) as (survey, throughput):
        await survey.visit(SERVERS, 3)
        await survey.measure_line(SERVERS, 3)
        assert sorted(throughput.to_peers) == sorted(each.peer_id for each in SERVERS[:2])
        assert 0 < throughput.bytes_per_s() <= 1.2 * reader.bytes_per_s
        await survey.measure_line(SERVERS, 3)
        assert reader.num_paddings == 2 * LINE_CALLS, "what is sent anyway tells the rest"


async def test_a_line_that_takes_too_long_is_slow_not_unknown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(survey_module, "LINE_TIMEOUT_S", 0.5)
    async with surveying(SlowReader(1e3)) as (survey, throughput):
        await survey.visit(SERVERS[:1], 1)
        await survey.measure_line(SERVERS[:1], 1)
        assert 0 < throughput.bytes_per_s() <= 1.2 * LINE_BYTES / 0.5
