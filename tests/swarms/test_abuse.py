"""One caller that takes all it can get leaves the others what they need, and the server its memory.

Whoever abuses the server here comes from 127.0.0.2, which counts as a caller of its own; honest clients from 127.0.0.1.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from swarms_help import wait_idle, wait_until
from test_bad_input import compute, opening, talk
from tiny import HIDDEN, load_local, random_ids

from swarm import AutoDistributedModelForCausalLM
from swarm.codec import CHUNK_BYTES, pack
from swarm.errors import PeerError, PeerUnavailable, TooManyRequests
from swarm.identity import TLS_NAME, certificate_pem
from swarm.pipes import cancel_all, join_streams
from swarm.rpc import open_channel
from swarm.server import LocalSwarm
from swarm.server.limits import LimitsConfig, QuotaStatistics, What
from swarm.v1 import blocks_pb2 as pb
from swarm.v1 import blocks_pb2_grpc as pb_grpc

ABUSER = "127.0.0.2"
QUOTAS = LimitsConfig(
    max_sessions_per_caller=8,
    max_batches_per_caller=6,
    max_connections_per_caller=12,
    message_bytes=8 << 20,
    loopback_is_caller=True,
)
NEW_TOKENS = 4


@dataclass(frozen=True)
class Guarded:
    """A server with limits, and an honest client."""

    swarm: LocalSwarm
    path: Path
    remote: Any
    local: Any

    @property
    def running(self) -> Any:
        return self.swarm.servers[0].running

    @property
    def quotas(self) -> QuotaStatistics:
        return self.running.gate.quotas.statistics()

    @property
    def server(self) -> Any:
        """Its announcement."""
        return self.remote.explain_route()[0].server

    def join(self) -> Any:
        return AutoDistributedModelForCausalLM.from_pretrained(str(self.path), join=self.swarm.link).eval()

    def check_honest(self, remote: Any = None, seed: int = 0) -> None:
        """Assert that an honest client gets its text, without an error."""
        ids = random_ids(1, 5, seed=seed)
        ours = (remote or self.remote).generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert torch.equal(ours, self.local.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False))


@pytest.fixture(scope="module")
def _guarded(tiny_model: Callable[..., Path]) -> Iterator[Guarded]:
    path = tiny_model("llama")
    with LocalSwarm(str(path), [(0, 6)], dtype="float32", in_process=True, settings={"quotas": QUOTAS}) as swarm:
        remote = AutoDistributedModelForCausalLM.from_pretrained(str(path), join=swarm.link).eval()
        yield Guarded(swarm, path, remote, load_local(path))
        remote.close()


@pytest.fixture
def guarded(_guarded: Guarded) -> Iterator[Guarded]:
    """Afterwards nothing is left of whoever abused it."""
    yield _guarded
    wait_idle(_guarded.swarm)
    wait_until(lambda: not sum(_guarded.quotas.under_way.values()), f"nothing is under way: {_guarded.quotas}")
    wait_until(lambda: not _guarded.running.mover.tenure.room.statistics().used_bytes, "the room is empty")
    _guarded.check_honest()


@asynccontextmanager
async def open_way(server: Any, path: Path, source: str = ABUSER) -> AsyncIterator[str]:
    """A gRPC target whose connections reach the server from another address of this machine."""
    host, _, port = server.direct[0].rpartition(":")
    tasks: set[asyncio.Task[None]] = set()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            onward = await asyncio.open_connection(host, int(port), local_addr=(source, 0))
        except OSError:
            writer.close()
        else:
            await join_streams((reader, writer), onward)

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(carry(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    listening = await asyncio.start_unix_server(accept, path=path)
    try:
        yield f"unix:{path}"
    finally:
        listening.close()
        await cancel_all(tasks)


@asynccontextmanager
async def open_stub(guarded: Guarded, directory: Path, source: str = ABUSER) -> AsyncIterator[pb_grpc.BlocksStub]:
    async with AsyncExitStack() as owned:
        target = await owned.enter_async_context(open_way(guarded.server, directory / "way", source))
        pem = certificate_pem(guarded.server.tls_certificate)
        channel = await owned.enter_async_context(open_channel(target, pem, TLS_NAME))
        yield pb_grpc.BlocksStub(channel)


def first_mib(guarded: Guarded, num_tokens: int) -> pb.ComputeRequest:
    """The first MiB of a Forward with eight sequences."""
    packed = pack(torch.zeros(8, num_tokens, HIDDEN))
    assert len(packed.data) == CHUNK_BYTES
    blocks = pb.BlockRange(start=0, end=6)
    return compute(guarded.server, blocks=blocks, hidden_states=packed.specs[0], data=packed.data)


async def open_sessions(guarded: Guarded, stub: Any, number: int) -> tuple[list[Any], list[PeerError]]:
    """Open sessions; return the calls of those that were let in, and how the others were refused."""
    calls = [stub.Session() for _ in range(number)]
    request = [pb.SessionRequest(open=opening(guarded.server, blocks=pb.BlockRange(start=0, end=6))) for _ in calls]
    answers = await asyncio.gather(
        *(talk(call, each, num_answers=1) for call, each in zip(calls, request, strict=True)), return_exceptions=True
    )
    failures = [each for each in answers if isinstance(each, PeerError)]
    assert len(failures) + sum(isinstance(each, list) for each in answers) == number
    return [call for call, each in zip(calls, answers, strict=True) if isinstance(each, list)], failures


async def test_of_many_sessions_a_caller_gets_its_number_and_is_told_when_to_come_back(guarded, tmp_path):
    async with open_stub(guarded, tmp_path) as stub:
        opened, refused = await open_sessions(guarded, stub, 100)
        assert len(opened) == QUOTAS.max_sessions_per_caller and len(refused) == 92
        assert {type(each) for each in refused} == {TooManyRequests}
        assert all(each.retry_after_s > 0 and "sessions" in str(each) for each in refused)
        await asyncio.to_thread(guarded.check_honest)
        assert guarded.quotas.refused[What.SESSIONS] >= 92
        for call in opened:
            await call.write(pb.SessionRequest(close=pb.SessionClose()))
            await call.done_writing()
        wait_until(lambda: guarded.running.sessions.num_sessions == 0, "its sessions are closed")
        again, _ = await open_sessions(guarded, stub, 1)
        assert again


async def test_who_goes_on_asking_loses_its_connections_and_nobody_else_does(guarded, tmp_path):
    async with open_stub(guarded, tmp_path, "127.0.0.3") as stub:
        failures: list[PeerError] = []
        while not any(isinstance(each, PeerUnavailable) for each in failures):
            _, refused = await open_sessions(guarded, stub, 100)
            failures += refused
            assert len(failures) < 2000
        await asyncio.to_thread(guarded.check_honest)
        with suppress(PeerError):
            await open_sessions(guarded, stub, 1)


async def test_half_sent_batches_take_no_more_than_a_share_of_the_room(guarded, tmp_path):
    room = guarded.running.mover.tenure.room
    wire = first_mib(guarded, 1024)  # of 2 MiB; its answer takes three times as much
    async with open_stub(guarded, tmp_path) as stub:
        calls = [stub.Forward() for _ in range(40)]
        for call in calls:
            with suppress(asyncio.InvalidStateError):
                await call.write(wire)
        await wait_for(lambda: guarded.quotas.under_way[What.BATCHES] == QUOTAS.max_batches_per_caller)
        assert 0 < room.statistics().used_bytes <= QUOTAS.message_bytes // 2
        # Meanwhile an honest client trains, whose batches need room as well.
        await asyncio.to_thread(train, guarded)
        assert room.statistics().used_bytes <= QUOTAS.message_bytes // 2
        for call in calls:
            call.cancel()


def train(guarded: Guarded) -> None:
    ids = random_ids(2, 200)
    ours = guarded.remote(input_ids=ids, labels=ids, use_cache=False).loss
    theirs = guarded.local(input_ids=ids, labels=ids, use_cache=False).loss
    assert torch.allclose(ours, theirs, atol=1e-4)


async def wait_for(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def test_answers_that_nobody_reads_hold_back_their_caller_alone(guarded, tmp_path):
    room = guarded.running.mover.tenure.room
    wire = first_mib(guarded, 512)  # which is all
    async with open_stub(guarded, tmp_path) as stub:
        calls = [stub.Forward() for _ in range(20)]
        for call in calls:
            with suppress(asyncio.InvalidStateError):
                await call.write(wire)
        await asyncio.to_thread(train, guarded)
        await asyncio.to_thread(guarded.check_honest)
        assert room.statistics().used_bytes <= QUOTAS.message_bytes // 2
        for call in calls:
            call.cancel()


async def test_of_many_connections_a_caller_keeps_its_number_and_others_come_in(guarded):
    host, _, port = guarded.server.direct[0].rpartition(":")
    opened = [socket.create_connection((host, int(port)), 10, ("127.0.0.4", 0)) for _ in range(100)]
    try:
        await wait_for(lambda: sum(map(is_closed, opened)) >= 100 - QUOTAS.max_connections_per_caller)
        newcomer = await asyncio.to_thread(guarded.join)
        await asyncio.to_thread(guarded.check_honest, newcomer, 1)
        await asyncio.to_thread(newcomer.close)
        assert guarded.quotas.refused[What.CONNECTIONS] >= 88
    finally:
        for each in opened:
            each.close()


def is_closed(opened: socket.socket) -> bool:
    opened.setblocking(False)
    try:
        return opened.recv(1 << 16) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_clients_of_one_address_with_more_sessions_than_it_may_have_wait_for_one_another(guarded):
    number = 2 * QUOTAS.max_sessions_per_caller
    errors: list[BaseException] = []

    def generate(seed: int) -> None:
        try:
            with guarded.remote.inference_session(max_length=16) as session:
                ids = random_ids(1, 5, seed=seed)
                guarded.remote.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, session=session)
        except BaseException as exc:
            errors.append(exc)

    before = guarded.quotas.refused.get(What.SESSIONS, 0)
    threads = [threading.Thread(target=generate, args=(seed,)) for seed in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors
    assert guarded.quotas.refused[What.SESSIONS] > before


def test_this_machine_itself_has_no_limits_of_its_own(llama):
    """LocalSwarm, tests and benchmarks: everything on one machine."""
    gate = llama.swarm.servers[0].running.gate
    assert not gate.config.loopback_is_caller
    assert gate.callers.of_peer("ipv4:127.0.0.1:1").is_own
    assert not any(gate.quotas.statistics().refused.values())
