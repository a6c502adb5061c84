"""Every RPC of a real server with messages that are wrong in a few places, and with bytes that are no messages.

Each call ends with one of our errors or with an answer, soon; afterwards the server holds nothing and serves as before.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import torch
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from mutation import malformed
from swarms_help import wait_idle
from tiny import HIDDEN, load_local, random_ids

from swarm import PROTOCOL_VERSION, AutoDistributedModelForCausalLM
from swarm.codec import pack
from swarm.errors import PeerBug
from swarm.identity import TLS_NAME, certificate_pem
from swarm.rpc import open_channel, translate
from swarm.server import LocalSwarm
from swarm.v1 import blocks_pb2 as pb

CALL_TIMEOUT_S = 20.0
"""After which a call counts as hanging; a busy machine is slow."""

NUMBERS = (0, 1, 2, 3, 5, 7, 16, 64, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
BYTES = (b"", b"\0", b"x" * 15, b"x" * 16, b"x" * 17, b"\xff" * 32, b"y" * 5000)
TEXTS = ("", "f", "\x00", "é" * 300, "../../etc/passwd", "127.0.0.1:1", "unix:/tmp/x", "9" * 46)


@dataclass
class Victim:
    """A server, a way to send it raw bytes, and a client to see that it works."""

    swarm: LocalSwarm
    path: Path
    client: Any
    loop: asyncio.AbstractEventLoop
    num_calls: int = 0
    codes: set[grpc.StatusCode] = field(default_factory=set)

    def call(self, method: str, messages: list[bytes]) -> grpc.aio.AioRpcError:
        """Send messages, read all that is answered, and return how the call ended; it ends within CALL_TIMEOUT_S."""
        self.num_calls += 1
        return self.loop.run_until_complete(self._call(method, messages))

    async def _call(self, method: str, messages: list[bytes]) -> grpc.aio.AioRpcError:
        server = self.client.explain_route()[0].server
        pem = certificate_pem(server.tls_certificate)
        async with open_channel(server.direct[0], pem, TLS_NAME) as channel, asyncio.timeout(CALL_TIMEOUT_S):
            call = channel.stream_stream(f"/swarm.v1.Blocks/{method}")(iter(messages))
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for _ in call:
                    pass
            code = await call.code()
            self.codes.add(code)
            metadata = await call.initial_metadata(), await call.trailing_metadata()
            return grpc.aio.AioRpcError(code, *metadata, await call.details())


def was_answered_or_refused(ended: grpc.aio.AioRpcError) -> bool:
    """Whether a call ended with an answer or with an error for its caller, not with one that is the server's bug."""
    return ended.code() is grpc.StatusCode.OK or not isinstance(translate(ended, "peer"), PeerBug)


@pytest.fixture(scope="module")
def victim(tiny_model: Callable[..., Path]) -> Iterator[Victim]:
    path = tiny_model("llama")
    loop = asyncio.new_event_loop()
    with LocalSwarm(str(path), ranges=[(0, 6)], dtype="float32", in_process=True) as swarm:
        client = AutoDistributedModelForCausalLM.from_pretrained(str(path), join=swarm.link).eval()
        found = Victim(swarm, path, client, loop)
        began_s = time.monotonic()
        yield found
        wait_idle(swarm)
        ids = random_ids(1, 5)
        expected = load_local(path).generate(ids, max_new_tokens=3, do_sample=False)
        assert torch.equal(client.generate(ids, max_new_tokens=3, do_sample=False), expected)
        tenure = swarm.servers[0].running.mover.tenure
        assert tenure.adapters.statistics().num_arriving == 0
        assert tenure.room.statistics().used_bytes == 0
        print(
            f"{found.num_calls} calls in {time.monotonic() - began_s:.0f} s ended with {sorted(map(str, found.codes))}"
        )
        client.close()
    loop.close()


def good_messages(method: str, fingerprint: str, rng: random.Random) -> list[Message]:
    """A call as it should be."""
    x_BLD, blocks = torch.randn(1, 3, HIDDEN), pb.BlockRange(start=0, end=6)
    packed = pack(x_BLD, torch.ones(1, 3, dtype=torch.int64))
    common = {"protocol_version": PROTOCOL_VERSION, "model_fingerprint": fingerprint}
    tensors = {"hidden_states": packed.specs[0], "attention_mask": packed.specs[1], "data": packed.data}
    compute = pb.ComputeOpen(**common, blocks=blocks, **tensors)
    session_id = rng.randbytes(16)
    match method:
        case "Describe":
            return [pb.DescribeRequest(protocol_version=PROTOCOL_VERSION, padding=b"x" * 9, echo=True)]
        case "Session":
            opened = pb.SessionOpen(
                **common, session_id=session_id, blocks=blocks, batch_size=1, max_tokens=16, timeout_ms=100
            )
            steps = [
                pb.SessionRequest(step=pb.Step(step_id=number, position=3 * (number - 1), num_outputs=1, **tensors))
                for number in (1, 2)
            ]
            return [pb.SessionRequest(open=opened), *steps, pb.SessionRequest(close=pb.SessionClose())]
        case "Push":
            attach = pb.SessionAttach(protocol_version=PROTOCOL_VERSION, session_id=session_id)
            step = pb.Step(step_id=1, num_outputs=1, **tensors)
            return [pb.SessionRequest(attach=attach), pb.SessionRequest(step=step), pb.SessionRequest(more=b"123")]
        case "Forward":
            return [pb.ComputeRequest(open=compute)]
        case "Backward":
            packed = pack(x_BLD, x_BLD)
            both = pb.ComputeOpen(
                **common, blocks=blocks, hidden_states=packed.specs[0], grad_outputs=packed.specs[1], data=packed.data
            )
            return [pb.ComputeRequest(open=both)]
    file = pb.AdapterFile(digest=b"d" * 32, num_bytes=64, data=b"x" * 32)
    opened = pb.PutAdaptersOpen(**common)
    return [
        pb.PutAdaptersRequest(open=opened), pb.PutAdaptersRequest(adapter=file), pb.PutAdaptersRequest(more=b"y" * 32),
    ]  # fmt: skip


def spoil(message: Message, rng: random.Random) -> None:
    """Change one field somewhere in a message."""
    fields = message.DESCRIPTOR.fields
    inner = [each for each in fields if each.message_type and not each.is_repeated and message.HasField(each.name)]
    if inner and rng.random() < 0.7:
        spoil(getattr(message, rng.choice(inner).name), rng)
        return
    if not fields:
        return
    chosen = rng.choice(fields)
    message.ClearField(chosen.name)
    if rng.random() < 0.3:
        return
    if chosen.message_type:
        each = getattr(message, chosen.name).add() if chosen.is_repeated else getattr(message, chosen.name)
        each.SetInParent()
        return
    value: Any = rng.choice(NUMBERS)
    if chosen.type == chosen.TYPE_BYTES:
        value = rng.choice(BYTES)
    elif chosen.type == chosen.TYPE_STRING:
        value = rng.choice(TEXTS)
    elif chosen.type == chosen.TYPE_BOOL:
        value = bool(value % 2)
    elif chosen.cpp_type in (chosen.CPPTYPE_INT32, chosen.CPPTYPE_ENUM):
        value = min(value, 2**31 - 1)
    if chosen.is_repeated:
        getattr(message, chosen.name).extend([value] * rng.choice((1, 2, 5, 300)))
    else:
        setattr(message, chosen.name, value)


@pytest.mark.parametrize("method", ["Describe", "Session", "Push", "Forward", "Backward", "PutAdapters"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32))
def test_messages_that_are_wrong_somewhere_end_the_call_and_nothing_else(
    victim: Victim, method: str, seed: int
) -> None:
    rng = random.Random(seed)
    messages = good_messages(method, victim.client._swarm.needs.fingerprint, rng)
    for _ in range(rng.randint(0, 3)):
        spoil(rng.choice(messages), rng)
    if rng.random() < 0.2:
        rng.shuffle(messages)
    ended = victim.call(method, [message.SerializeToString() for message in messages])
    assert was_answered_or_refused(ended), ended


@pytest.mark.parametrize("method", ["Describe", "Session", "Push", "Forward", "Backward", "PutAdapters"])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32))
def test_bytes_that_are_no_messages_end_the_call_and_nothing_else(victim: Victim, method: str, seed: int) -> None:
    rng = random.Random(seed)
    good = [each.SerializeToString() for each in good_messages(method, victim.client._swarm.needs.fingerprint, rng)]
    ended = victim.call(method, list(itertools.islice(malformed(good, rng), rng.randint(1, 3))))
    assert was_answered_or_refused(ended), ended


@pytest.mark.parametrize("method", ["Describe", "Session", "Push", "Forward", "Backward", "PutAdapters"])
def test_an_unspoilt_call_gets_as_far_as_the_test_means_it_to(victim: Victim, method: str) -> None:
    messages = good_messages(method, victim.client._swarm.needs.fingerprint, random.Random(0))
    if method == "Push":
        messages = messages[:1]  # refused at once: what is written after that may end the call with an error of gRPC
    code = victim.call(method, [message.SerializeToString() for message in messages]).code()
    refused = {"Push": grpc.StatusCode.NOT_FOUND, "PutAdapters": grpc.StatusCode.INVALID_ARGUMENT}
    assert code is refused.get(method, grpc.StatusCode.OK)
