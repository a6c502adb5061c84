"""Messages in parts: what comes too slowly is given up, and takes no more memory than its bytes."""

from __future__ import annotations

import asyncio
import sys

import pytest
import torch

from swarm import streams
from swarm.codec import Unpacker, pack
from swarm.errors import PeerUnavailable
from swarm.streams import LEAST_BYTES_PER_S, fill, total_timeout_s
from swarm.v1 import blocks_pb2 as pb

X = torch.arange(1 << 16, dtype=torch.float32)


async def test_a_byte_at_a_time_is_given_up_although_each_comes_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "total_timeout_s", lambda num_bytes: 0.05)
    packed = pack(X)

    async def read() -> pb.ComputeRequest:
        await asyncio.sleep(0.001)
        return pb.ComputeRequest(more=b"x")

    unpacker = Unpacker(packed.specs, max_bytes=1 << 20)
    with pytest.raises(PeerUnavailable, match="did not come within"):
        await fill(unpacker, read, b"")


async def test_many_small_parts_take_no_more_than_their_bytes() -> None:
    packed = pack(X)
    parts = iter(packed.data[at : at + 1] for at in range(len(packed.data)))

    async def read() -> pb.ComputeRequest:
        return pb.ComputeRequest(more=next(parts))

    unpacker = Unpacker(packed.specs, max_bytes=1 << 20)
    (y,) = await fill(unpacker, read, b"")
    assert y is not None and torch.equal(X, y)
    assert sys.getsizeof(unpacker._buffer) < 1.25 * len(packed.data)


def test_slow_lines_have_the_time_that_they_need() -> None:
    assert total_timeout_s(100 << 20) > (100 << 20) / LEAST_BYTES_PER_S
