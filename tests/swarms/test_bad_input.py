"""What nobody should send: each gets one clear sentence, and the server goes on and holds nothing.

The requests here go over a raw gRPC stub, past the checks of our own client.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from swarms_help import wait_idle
from tiny import HIDDEN, random_ids, save_tiny

from swarm import PROTOCOL_VERSION, AutoDistributedModelForCausalLM
from swarm.codec import pack
from swarm.directory import DirectoryStatistics
from swarm.errors import (
    BadCheckpoint,
    BadLink,
    BadRequest,
    Draining,
    NoRoute,
    PromptTooLong,
    ProtocolError,
    ResourceError,
    SessionLost,
    SwarmError,
)
from swarm.identity import TLS_NAME, certificate_pem
from swarm.link import JoinLink
from swarm.rpc import open_channel, translate
from swarm.server import LocalSwarm
from swarm.v1 import blocks_pb2 as pb
from swarm.v1 import blocks_pb2_grpc as pb_grpc


@pytest.fixture
def server(llama: Any) -> Iterator[Any]:
    """The announcement of the server of blocks 2:4; afterwards it still serves, and holds nothing."""
    yield next(hop.server for hop in llama.remote.explain_route() if hop.server.start == 2)
    wait_idle(llama.swarm)
    ids = random_ids(1, 5)
    ours = llama.remote.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(ours, llama.local.generate(ids, max_new_tokens=3, do_sample=False))


@asynccontextmanager
async def open_stub(server: Any) -> AsyncIterator[pb_grpc.BlocksStub]:
    pem = certificate_pem(server.tls_certificate)
    async with open_channel(server.direct[0], pem, TLS_NAME) as channel, asyncio.timeout(60):
        yield pb_grpc.BlocksStub(channel)


def opening(server: Any, **changes: Any) -> pb.SessionOpen:
    fields = {
        "protocol_version": PROTOCOL_VERSION,
        "model_fingerprint": server.model_fingerprint,
        "session_id": secrets.token_bytes(16),
        "blocks": pb.BlockRange(start=2, end=4),
        "batch_size": 1,
        "max_tokens": 16,
        "timeout_ms": 100,
    }
    return pb.SessionOpen(**(fields | changes))


def make_step(x_BLD: torch.Tensor | None = None, **changes: Any) -> pb.SessionRequest:
    x_BLD = torch.zeros(1, 3, HIDDEN) if x_BLD is None else x_BLD
    packed = pack(x_BLD, changes.pop("attention_mask", None), changes.pop("position_ids", None))
    fields = {
        "step_id": 1, "position": 0, "num_outputs": 1, "data": packed.data,
        "hidden_states": packed.specs[0], "attention_mask": packed.specs[1], "position_ids": packed.specs[2],
    }  # fmt: skip
    return pb.SessionRequest(step=pb.Step(**(fields | changes)))


def compute(server: Any, x_BLD: torch.Tensor | None = None, **changes: Any) -> pb.ComputeRequest:
    x_BLD = torch.zeros(1, 3, HIDDEN) if x_BLD is None else x_BLD
    names = ("attention_mask", "position_ids", "prompts", "grad_outputs")
    packed = pack(x_BLD, *(changes.pop(name, None) for name in names))
    fields = {
        "protocol_version": PROTOCOL_VERSION,
        "model_fingerprint": server.model_fingerprint,
        "blocks": pb.BlockRange(start=2, end=4),
        "data": packed.data,
        **dict(zip(("hidden_states", *names), packed.specs, strict=True)),
    }
    return pb.ComputeRequest(open=pb.ComputeOpen(**(fields | changes)))


async def talk(call: Any, *messages: Any, num_answers: int = 0) -> list[Any]:
    """Send messages, read that many answers, and raise how the call ends."""
    answers = []
    try:
        for message in messages:
            await call.write(message)
        for _ in range(num_answers):
            answers.append(await call.read())
        if num_answers:
            return answers
        while await call.read() is not grpc.aio.EOF:
            pass
        await call.code()
    except asyncio.InvalidStateError:
        pass  # it ended while we wrote; its status says why
    except grpc.aio.AioRpcError as exc:
        raise translate(exc, "peer") from exc
    if await call.code() is not grpc.StatusCode.OK:
        failure = grpc.aio.AioRpcError(
            await call.code(), await call.initial_metadata(), await call.trailing_metadata(), await call.details()
        )
        raise translate(failure, "peer")
    return answers


async def assert_refused(error: type[SwarmError], sentence: str, call: Any, *messages: Any) -> None:
    """Assert that a call with these messages ends with this error, in one sentence."""
    with pytest.raises(error, match=sentence) as caught:
        await talk(call, *messages)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


HUGE = pb.TensorSpec(dtype=pb.DTYPE_FLOAT32, codec=pb.CODEC_RAW, shape=[2**31, 2**31, HIDDEN], num_bytes=2**40)
LARGE = pb.TensorSpec(dtype=pb.DTYPE_FLOAT32, codec=pb.CODEC_RAW, shape=[1, 2**31, HIDDEN], num_bytes=2**39)


def spec(shape: list[int], **changes: Any) -> pb.TensorSpec:
    fields = {"dtype": pb.DTYPE_FLOAT32, "codec": pb.CODEC_RAW, "shape": shape, "num_bytes": 3 * HIDDEN * 4}
    return pb.TensorSpec(**(fields | changes))


TENSORS = [
    pytest.param({"hidden_states": spec([1, 3, HIDDEN + 1])}, BadRequest, "hidden size is 64", id="width"),
    pytest.param({"hidden_states": spec([3, HIDDEN])}, BadRequest, "must have the shape", id="rank 2"),
    pytest.param({"hidden_states": spec([1, 1, 1, 3, HIDDEN])}, BadRequest, "must have the shape", id="rank 5"),
    pytest.param({"hidden_states": spec([])}, BadRequest, "must have the shape", id="rank 0"),
    pytest.param({"hidden_states": spec([1] * 5000)}, BadRequest, "must have the shape", id="rank 5000"),
    pytest.param(
        {"hidden_states": spec([1, 3, HIDDEN], dtype=pb.DTYPE_INT64)}, BadRequest, "must be float32", id="integers"
    ),
    pytest.param({"hidden_states": spec([1, 3, HIDDEN], dtype=99)}, BadRequest, "must be float32", id="dtype 99"),
    pytest.param({"hidden_states": spec([1, 3, HIDDEN], codec=99)}, ProtocolError, "unknown tensor codec", id="codec"),
    pytest.param({"hidden_states": spec([1, 0, HIDDEN], num_bytes=0)}, ProtocolError, "at least 1", id="no tokens"),
    pytest.param({"hidden_states": spec([0, 3, HIDDEN], num_bytes=0)}, ProtocolError, "at least 1", id="no sequences"),
    pytest.param(
        {"hidden_states": spec([1, 3, HIDDEN], num_bytes=7)}, ProtocolError, "takes 768 bytes.*claims 7", id="few bytes"
    ),
    pytest.param(
        {"hidden_states": spec([1, 3, HIDDEN], num_bytes=2**40)}, ProtocolError, "takes 768 bytes", id="lying bytes"
    ),
    pytest.param({"hidden_states": HUGE}, BadRequest, "at most 256", id="huge batch"),
    pytest.param({"hidden_states": LARGE}, PromptTooLong, "at most", id="huge length"),
    pytest.param({"hidden_states": None}, ProtocolError, "must carry hidden states", id="nothing"),
    pytest.param({"data": bytes(769)}, ProtocolError, "768 bytes were announced, 769 came", id="too many bytes"),
    pytest.param(
        {"attention_mask": torch.ones(1, 4, dtype=torch.int64)}, BadRequest, "attention_mask must be", id="mask shape"
    ),
    pytest.param({"attention_mask": torch.ones(1, 3)}, BadRequest, "attention_mask must be", id="mask dtype"),
    pytest.param({"attention_mask": torch.full((1, 3), 2)}, BadRequest, "zeros and ones only", id="mask values"),
    pytest.param(
        {"position_ids": torch.zeros(2, 3, dtype=torch.int64)}, BadRequest, "position_ids must be", id="positions"
    ),
    pytest.param({"position_ids": torch.full((1, 3), -1)}, BadRequest, "between 0 and", id="negative positions"),
    pytest.param({"position_ids": torch.full((1, 3), 2**60)}, BadRequest, "between 0 and", id="huge positions"),
]


@pytest.mark.parametrize("changes, error, sentence", TENSORS)
async def test_tensors_that_do_not_fit(server, changes, error, sentence):
    async with open_stub(server) as stub:
        session = pb.SessionRequest(open=opening(server))
        await assert_refused(error, sentence, stub.Session(), session, make_step(**changes))
        await assert_refused(error, sentence, stub.Forward(), compute(server, **changes))
        gradient = {} if "data" in changes else {"grad_outputs": torch.zeros(1, 3, HIDDEN)}
        if gradient:
            await assert_refused(error, sentence, stub.Backward(), compute(server, **changes, **gradient))


@pytest.mark.parametrize(
    "changes, error, sentence",
    [
        ({"protocol_version": PROTOCOL_VERSION + 1}, ProtocolError, "install the same release"),
        ({"protocol_version": 0}, ProtocolError, "install the same release"),
        ({"model_fingerprint": "0" * 32}, BadRequest, "load the same model and revision"),
        ({"model_fingerprint": ""}, BadRequest, "load the same model and revision"),
        ({"blocks": pb.BlockRange(start=0, end=4)}, Draining, "this server holds 2:4"),
        ({"blocks": pb.BlockRange(start=3, end=3)}, BadRequest, "start < end"),
        ({"blocks": pb.BlockRange(start=4, end=2)}, BadRequest, "start < end"),
        ({"blocks": pb.BlockRange(start=2, end=2**32 - 1)}, BadRequest, "outside the model, which has 6 blocks"),
        ({"blocks": None}, BadRequest, "start < end"),
    ],
)
async def test_calls_for_something_else(server, changes, error, sentence):
    async with open_stub(server) as stub:
        await assert_refused(error, sentence, stub.Session(), pb.SessionRequest(open=opening(server, **changes)))
        await assert_refused(error, sentence, stub.Forward(), compute(server, **changes))
        await assert_refused(error, sentence, stub.Backward(), compute(server, **changes))


@pytest.mark.parametrize(
    "changes, error, sentence",
    [
        ({"batch_size": 0}, BadRequest, "holds 1 to 256 sequences"),
        ({"batch_size": 2**32 - 1}, BadRequest, "holds 1 to 256 sequences"),
        ({"max_tokens": 0}, PromptTooLong, "holds 1 to 8192 tokens"),
        ({"max_tokens": 2**32 - 1}, PromptTooLong, "holds 1 to 8192 tokens"),
        ({"session_id": b"short"}, ProtocolError, "16 bytes"),
        ({"session_id": b""}, ProtocolError, "16 bytes"),
        ({"prompts": spec([1, 1, 3, HIDDEN])}, BadRequest, "prompts must be floating point of shape"),
        ({"prompts": spec([2, 1, 10**6, HIDDEN])}, BadRequest, "prompts must be floating point of shape"),
        ({"data": b"bytes of nothing"}, ProtocolError, "0 bytes were announced"),
        ({"next": pb.PeerAddress(peer_id="somebody")}, ProtocolError, "a peer address is malformed: .*tls_certificate"),
    ],
)
async def test_sessions_that_cannot_be(server, changes, error, sentence):
    async with open_stub(server) as stub:
        await assert_refused(error, sentence, stub.Session(), pb.SessionRequest(open=opening(server, **changes)))


async def test_a_session_larger_than_the_whole_cache(swarms):
    swarm, path = swarms.get("gpt2", ((0, 1), (1, 3), (3, 4)))
    server = swarms.join(swarm, path).explain_route()[1].server
    async with open_stub(server) as stub:
        huge = opening(server, blocks=pb.BlockRange(start=1, end=3), batch_size=256, max_tokens=8192)  # 2 GiB
        await assert_refused(PromptTooLong, "use a shorter max_length", stub.Session(), pb.SessionRequest(open=huge))


@pytest.mark.parametrize(
    "changes, error, sentence",
    [
        ({"position": 14}, PromptTooLong, "opened for 16 tokens, this step would make it 17"),
        ({"position": 2**32 - 1}, PromptTooLong, "opened for 16 tokens"),
        ({"position": 4}, SessionLost, "cache ends at 0, a step at 4 came"),
        ({"num_outputs": 4}, BadRequest, "cannot return 4"),
        ({"beam_idx": [1]}, BadRequest, "beam_idx must name 1 sequences"),
        ({"beam_idx": [0, 0]}, BadRequest, "beam_idx must name 1 sequences"),
        ({"x_BLD": torch.zeros(2, 1, HIDDEN)}, BadRequest, "opened for 1 sequences, the step has 2"),
        ({"x_BLD": torch.zeros(1, 17, HIDDEN)}, PromptTooLong, "opened for 16 tokens"),
        ({"x_BLD": torch.zeros(1, 513, HIDDEN)}, PromptTooLong, "at most 512"),
    ],
)
async def test_steps_that_do_not_fit_the_session(server, changes, error, sentence):
    async with open_stub(server) as stub:
        await assert_refused(
            error, sentence, stub.Session(), pb.SessionRequest(open=opening(server)), make_step(**changes)
        )


async def test_first_and_later_messages_of_the_wrong_kind(server):
    opened = pb.SessionRequest(open=opening(server))
    attach = pb.SessionRequest(
        attach=pb.SessionAttach(protocol_version=PROTOCOL_VERSION, session_id=opened.open.session_id)
    )
    async with open_stub(server) as stub:
        for first in (make_step(), attach, pb.SessionRequest(more=b"x"), pb.SessionRequest()):
            await assert_refused(ProtocolError, "first message of this call must be `open`", stub.Session(), first)
        for second in (opened, attach, pb.SessionRequest(more=b"x"), pb.SessionRequest()):
            await assert_refused(ProtocolError, "carries steps", stub.Session(), opened, second)
        for first in (make_step(), opened, pb.SessionRequest(more=b"x"), pb.SessionRequest()):
            call = stub.Push()
            with pytest.raises(ProtocolError, match="must be `attach`"):
                await push(call, first)
        for call in (stub.Forward(), stub.Backward()):
            await assert_refused(ProtocolError, "must be `open`", call, pb.ComputeRequest(more=b"x"))


async def push(call: Any, *messages: Any) -> None:
    try:
        for message in messages:
            await call.write(message)
        await call
    except asyncio.InvalidStateError:
        await push(call)
    except grpc.aio.AioRpcError as exc:
        raise translate(exc, "peer") from exc


async def test_pushing_into_a_session_that_is_not_there(server):
    async with open_stub(server) as stub:
        for session_id in (secrets.token_bytes(16), b"", b"x" * 1000):
            attach = pb.SessionAttach(protocol_version=PROTOCOL_VERSION, session_id=session_id)
            with pytest.raises(SessionLost, match="no such session"):
                await push(stub.Push(), pb.SessionRequest(attach=attach))
        attach = pb.SessionAttach(protocol_version=PROTOCOL_VERSION + 1, session_id=b"x" * 16)
        with pytest.raises(ProtocolError, match="install the same release"):
            await push(stub.Push(), pb.SessionRequest(attach=attach))


async def test_a_pushed_step_that_does_not_fit_is_told_to_the_client(server):
    async with open_stub(server) as stub:
        session, opened = stub.Session(), opening(server)
        await talk(session, pb.SessionRequest(open=opened), num_answers=1)
        attach = pb.SessionAttach(protocol_version=PROTOCOL_VERSION, session_id=opened.session_id)
        with pytest.raises(BadRequest, match="cannot return 9"):
            await push(stub.Push(), pb.SessionRequest(attach=attach), make_step(num_outputs=9))
        await assert_refused(BadRequest, "cannot return 9", session)


async def test_two_sessions_of_one_id(server):
    async with open_stub(server) as stub:
        opened = pb.SessionRequest(open=opening(server))
        first = stub.Session()
        await talk(first, opened, num_answers=1)
        await assert_refused(BadRequest, "a session with this id is open already", stub.Session(), opened)
        other = pb.SessionRequest(open=opening(server, session_id=opened.open.session_id, epoch=7, max_tokens=8))
        await assert_refused(BadRequest, "a session with this id is open already", stub.Session(), other)
        (answer,) = await talk(first, make_step(), num_answers=1)
        assert answer.result.step_id == 1
        first.cancel()


async def test_repeated_steps_are_dropped(server):
    async with open_stub(server) as stub:
        call = stub.Session()
        await talk(call, pb.SessionRequest(open=opening(server)), num_answers=1)
        x_BLD = torch.randn(1, 3, HIDDEN)
        answers = await talk(
            call, make_step(x_BLD), make_step(x_BLD), make_step(x_BLD, step_id=2, position=3), num_answers=2
        )
        assert [answer.result.step_id for answer in answers] == [1, 2]
        call.cancel()


async def test_a_step_before_its_turn_ends_the_session(server):
    """Whatever its position: the one that is missing was meant to come before it."""
    async with open_stub(server) as stub:
        opened = pb.SessionRequest(open=opening(server))
        await assert_refused(SessionLost, "step 2 came after step 0", stub.Session(), opened, make_step(step_id=2))
        session, opened = stub.Session(), opening(server)
        await talk(session, pb.SessionRequest(open=opened), make_step(), num_answers=2)
        attach = pb.SessionAttach(protocol_version=PROTOCOL_VERSION, session_id=opened.session_id)
        steps = [make_step(step_id=1), make_step(step_id=3, position=1)]
        with pytest.raises(SessionLost, match="step 3 came after step 1"):
            await push(stub.Push(), pb.SessionRequest(attach=attach), *steps)
        await assert_refused(SessionLost, "step 3 came after step 1", session)


async def test_a_position_that_is_not_reached_yet_ends_the_session(server):
    async with open_stub(server) as stub:
        opened = pb.SessionRequest(open=opening(server))
        await assert_refused(SessionLost, "ends at 0, a step at 2 came", stub.Session(), opened, make_step(position=2))


async def test_a_stream_that_ends_within_a_tensor(server):
    async with open_stub(server) as stub:
        whole = compute(server, torch.zeros(4, 20, HIDDEN))
        whole.open.data = whole.open.data[:100]
        for call in (stub.Forward(), stub.Backward()):
            await call.write(whole)
            await call.done_writing()
            await assert_refused(ProtocolError, "ended before the bytes", call)
        session = stub.Session()
        cut = make_step()
        cut.step.data = cut.step.data[:100]
        await talk(session, pb.SessionRequest(open=opening(server)), num_answers=1)
        await session.write(cut)
        await session.done_writing()
        await assert_refused(ProtocolError, "ended before the bytes", session)


async def test_another_step_within_a_tensor(server):
    cut = make_step()
    cut.step.data = cut.step.data[:100]
    async with open_stub(server) as stub:
        session = pb.SessionRequest(open=opening(server))
        await assert_refused(
            ProtocolError, "ended before the bytes", stub.Session(), session, cut, make_step(step_id=2)
        )


async def test_streams_that_say_nothing(server):
    async with open_stub(server) as stub:
        for call in (stub.Session(), stub.Forward(), stub.Backward()):
            await call.done_writing()
            await assert_refused(ProtocolError, "first message", call)


async def test_backward_without_a_gradient_or_with_another_one(server):
    async with open_stub(server) as stub:
        for gradient in (None, torch.zeros(1, 4, HIDDEN), torch.zeros(1, 3, HIDDEN, dtype=torch.int64)):
            await assert_refused(
                BadRequest, "grad_outputs of the same shape", stub.Backward(), compute(server, grad_outputs=gradient)
            )


async def test_bytes_that_are_no_message(server):
    pem = certificate_pem(server.tls_certificate)
    async with open_channel(server.direct[0], pem, TLS_NAME) as channel, asyncio.timeout(60):
        for name in ("Session", "Forward", "Backward"):
            call = channel.stream_stream(f"/swarm.v1.Blocks/{name}")()
            with pytest.raises(SwarmError):
                await talk(call, b"\xff" * 100)
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.unary_unary("/swarm.v1.Blocks/Describe")(b"\xff" * 100)


async def test_a_message_larger_than_any_of_ours(server):
    pem = certificate_pem(server.tls_certificate)
    async with open_channel(server.direct[0], pem, TLS_NAME) as channel, asyncio.timeout(60):
        call = channel.stream_stream("/swarm.v1.Blocks/Forward")()
        with pytest.raises(SwarmError):
            await talk(call, bytes(5 << 20))


async def test_numbers_that_are_not_finite_hurt_only_who_sends_them(server):
    x_BLD = torch.full((1, 3, HIDDEN), float("nan"))
    async with open_stub(server) as stub:
        session = stub.Session()
        _, answer = await talk(session, pb.SessionRequest(open=opening(server)), make_step(x_BLD), num_answers=2)
        assert answer.WhichOneof("kind") == "result"
        session.cancel()


async def test_describe_answers_every_version(server):
    async with open_stub(server) as stub:
        for version in (0, PROTOCOL_VERSION, 99):
            answer = await stub.Describe(pb.DescribeRequest(protocol_version=version))
            assert answer.protocol_version == PROTOCOL_VERSION
            assert answer.model_fingerprint == server.model_fingerprint
            assert (answer.blocks.start, answer.blocks.end) == (2, 4)
            assert answer.hidden_size == HIDDEN and answer.limits.max_session_tokens == 8192


async def test_health_and_reflection_answer(server):
    pem = certificate_pem(server.tls_certificate)
    async with open_channel(server.direct[0], pem, TLS_NAME) as channel, asyncio.timeout(60):
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "swarm.v1.Blocks"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        services = {service.name for service in (await call.read()).list_services_response.service}
        assert {"swarm.v1.Blocks", "grpc.health.v1.Health"} <= services
        call.cancel()


async def test_another_certificate_is_not_spoken_to(server, llama):
    other = next(hop.server for hop in llama.remote.explain_route() if hop.server.start == 0)
    async with open_channel(server.direct[0], certificate_pem(other.tls_certificate), TLS_NAME) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pb_grpc.BlocksStub(channel).Describe(pb.DescribeRequest(), timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


# Links, swarms and peers that are not the right ones


def test_a_link_of_a_swarm_with_another_model(llama, tiny_model):
    other = tiny_model("gpt2")
    with pytest.raises(BadLink) as caught:
        AutoDistributedModelForCausalLM.from_pretrained(str(other), join=llama.swarm.link)
    assert llama.path.name in str(caught.value) and other.name in str(caught.value)


def test_another_revision_of_the_model(llama, tmp_path):
    other = save_tiny(tmp_path / "other", "llama", seed=1, rope_theta=5000.0)
    with pytest.raises(BadLink, match="load the model and revision that it serves"):
        AutoDistributedModelForCausalLM.from_pretrained(str(other), join=llama.swarm.link)


@pytest.mark.parametrize("field, value", [("protocol_version", 9), ("model_commit", "b" * 40)])
def test_peers_of_another_version_or_revision_are_not_used(llama, swarms, monkeypatch, field, value):
    client = swarms.join(llama.swarm, llama.path, config={"route_timeout_s": 0.1})
    network = client._swarm.connection.network
    client._swarm.needs = replace(client._swarm.needs, commit="a" * 40)
    others = [hop.server.model_copy(update={field: value}) for hop in llama.remote.explain_route()]

    class Directory:
        async def servers(self, fingerprint: str, *, max_bytes: float, blocks: Collection[int]) -> list[Any]:
            return others

        def statistics(self) -> DirectoryStatistics:
            return DirectoryStatistics()

    monkeypatch.setattr(network._known, "_directory", Directory())
    monkeypatch.setattr(network._known, "_refreshed_at_s", -float("inf"))
    reason = "speaks protocol version 9" if field == "protocol_version" else "serves revision bbbbbbbbbbbb"
    with pytest.raises(NoRoute, match=f"3 known servers {reason}"):
        client.generate(random_ids(1, 3), max_new_tokens=2)


@pytest.mark.parametrize("text", ["", "swarm://", "swarm://v1.abc", "http://example.org", "swarm://v9.abcd"])
def test_malformed_links(llama, text):
    with pytest.raises(BadLink):
        AutoDistributedModelForCausalLM.from_pretrained(str(llama.path), join=text)


def test_an_expired_link(llama):
    link = JoinLink(JoinLink.parse(llama.swarm.link).initial_peers, expires_at_s=1.0)
    with pytest.raises(BadLink, match="expired"):
        AutoDistributedModelForCausalLM.from_pretrained(str(llama.path), join=link.encode())


def test_a_path_that_is_not_there(llama, tmp_path):
    with pytest.raises(BadCheckpoint, match="does not exist"):
        AutoDistributedModelForCausalLM.from_pretrained(str(tmp_path / "nothing"), join=llama.swarm.link)


def truncate_weights(directory: Path) -> Path:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    return directory


def test_a_truncated_checkpoint(llama, tmp_path):
    broken = truncate_weights(save_tiny(tmp_path / "broken", "llama"))
    with pytest.raises(BadCheckpoint):
        AutoDistributedModelForCausalLM.from_pretrained(str(broken), join=llama.swarm.link)
    with pytest.raises(BadCheckpoint), LocalSwarm(str(broken), ranges=[(0, 2)], in_process=True):
        pass


@pytest.mark.parametrize("blocks", [(0, 7), (6, 8)])
def test_blocks_outside_the_model(llama, blocks):
    with (
        pytest.raises(BadRequest, match="which has 6 blocks: choose a range within 0:6"),
        LocalSwarm(str(llama.path), ranges=[blocks], in_process=True),
    ):
        pass


@pytest.mark.parametrize("blocks", [(3, 3), (4, 2), (-1, 2)])
def test_empty_and_reversed_blocks(llama, blocks):
    with pytest.raises(BadRequest, match="0 <= start < end"):
        LocalSwarm(str(llama.path), ranges=[blocks], in_process=True)


def test_a_local_swarm_needs_ranges(llama):
    with pytest.raises(BadRequest, match="at least one block range"):
        LocalSwarm(str(llama.path), ranges=[])
    with pytest.raises(ResourceError, match="no server of this local swarm runs"):
        _ = LocalSwarm(str(llama.path), ranges=[(0, 2)]).link


# The command line


def run_cli(*arguments: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "swarm.cli.app", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)


def test_bad_commands_end_with_one_sentence_and_no_traceback(llama, tmp_path):
    path, link = str(llama.path), llama.swarm.link
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    broken = truncate_weights(save_tiny(tmp_path / "broken", "llama"))
    expired = JoinLink(JoinLink.parse(link).initial_peers, expires_at_s=1.0).encode()
    cases = [
        (2, "does not exist", ("serve", str(tmp_path / "nothing"))),
        (2, "", ("serve", str(broken), "--blocks", "0:2")),
        (2, "START:END", ("serve", path, "--blocks", "two")),
        (2, "0 <= start < end", ("serve", path, "--blocks", "4:2")),
        (2, "which has 6 blocks", ("serve", path, "--blocks", "4:9")),
        (2, "not a join link", ("serve", path, "--join", "swarm://nonsense")),
        (2, "expired", ("generate", path, "text", "--join", expired)),
        (2, "a join link is needed", ("generate", path, "text")),
        (1, "in use", ("serve", path, "--blocks", "0:2", "--port", str(taken.getsockname()[1]))),
        (2, "dtype", ("serve", path, "--blocks", "0:2", "--dtype", "int3")),
    ]
    with taken, ThreadPoolExecutor(max_workers=2) as pool:
        results = pool.map(lambda case: run_cli(*case[2]), cases)
        for (code, sentence, arguments), result in zip(cases, results, strict=True):
            said = " ".join(result.stderr.split())
            assert result.returncode == code, (arguments, result.stdout, result.stderr)
            assert sentence in said and "Traceback" not in said, (arguments, said)
