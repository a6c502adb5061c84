"""Callers that take all they can get: each kind is a coroutine that goes on until it is cancelled.

They come from an address of their own (127.0.0.2 and so on), and run in a process of their own, at the lowest priority:
on a machine of its own an abuser would take no processor time from honest clients. They ignore what they are told.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import secrets
import ssl
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc.aio
import torch

from swarm import PROTOCOL_VERSION
from swarm.announcement import Announcement
from swarm.codec import pack, torch_dtype
from swarm.identity import TLS_NAME, certificate_pem
from swarm.pipes import cancel_all, join_streams
from swarm.rpc import open_channel
from swarm.v1 import blocks_pb2 as pb
from swarm.v1 import blocks_pb2_grpc as pb_grpc

NUM_SESSIONS, NUM_CONNECTIONS = 10_000, 1_000
NUM_CHANNELS = 8
"""Connections on which an abuser makes its calls."""
PATIENCE_S = 5.0
"""How long an abuser waits for an answer before it goes on."""
PAUSE_S = 0.02
"""Before it tries again what failed at once."""


@dataclass(frozen=True, slots=True)
class Victim:
    """What an abuser knows of a server."""

    server: Announcement
    source: str
    """IP address that it comes from."""

    def tensor(self, num_tokens: int, num_rows: int = 1) -> torch.Tensor:
        """Hidden states."""
        return torch.zeros(num_rows, num_tokens, self.server.hidden_size, dtype=torch_dtype(self.server.dtype))

    def opening(self, max_tokens: int) -> pb.SessionRequest:
        """The first message of a session."""
        server = self.server
        return pb.SessionRequest(
            open=pb.SessionOpen(
                protocol_version=PROTOCOL_VERSION,
                model_fingerprint=server.model_fingerprint,
                session_id=secrets.token_bytes(16),
                blocks=pb.BlockRange(start=server.start, end=server.end),
                batch_size=1,
                max_tokens=max_tokens,
                timeout_ms=100_000,
            )
        )

    def batch(self, num_rows: int, num_tokens: int) -> tuple[pb.ComputeRequest, list[bytes]]:
        """A Forward, and the parts of its tensors that do not fit into the first message."""
        server, packed = self.server, pack(self.tensor(num_tokens, num_rows))
        opening = pb.ComputeOpen(
            protocol_version=PROTOCOL_VERSION,
            model_fingerprint=server.model_fingerprint,
            blocks=pb.BlockRange(start=server.start, end=server.end),
            hidden_states=packed.specs[0],
            data=packed.data,
        )
        return pb.ComputeRequest(open=opening), packed.more


Counts = Counter[str]
Abuse = Callable[[Victim, pb_grpc.BlocksStub, int, Counts], Awaitable[None]]


async def open_sessions(victim: Victim, stub: pb_grpc.BlocksStub, _worker: int, counts: Counts) -> None:
    """Open sessions and keep them, ten thousand in all."""
    kept: list[Any] = []
    while counts["asked"] < NUM_SESSIONS:
        counts["asked"] += 1
        call = stub.Session()
        async with counted(counts, "opened"):
            await call.write(victim.opening(64))
            async with asyncio.timeout(PATIENCE_S):
                if await call.read() is grpc.aio.EOF:
                    raise ConnectionError
            kept.append(call)
    await asyncio.Event().wait()


async def send_at_full_rate(victim: Victim, stub: pb_grpc.BlocksStub, worker: int, counts: Counts) -> None:
    """Send long prompts into sessions, and batches, as fast as they are taken."""
    while True:
        if worker % 2:
            request, more = victim.batch(8, 128)
            call = stub.Forward()
            async with counted(counts, "batches"):
                await call.write(request)
                for part in more:
                    await call.write(pb.ComputeRequest(more=part))
                while await call.read() is not grpc.aio.EOF:
                    pass
                await _raise_status(call)
        else:
            call = stub.Session()
            async with counted(counts, "sessions"):
                await call.write(victim.opening(4096))
                await call.read()
                packed = pack(victim.tensor(512))
                for step_id in range(1, 9):
                    step = pb.Step(
                        step_id=step_id,
                        position=512 * (step_id - 1),
                        num_outputs=1,
                        hidden_states=packed.specs[0],
                        data=packed.data,
                    )
                    await call.write(pb.SessionRequest(step=step))
                    if await call.read() is grpc.aio.EOF:
                        await _raise_status(call)
                        break
            call.cancel()


async def read_nothing(victim: Victim, stub: pb_grpc.BlocksStub, _worker: int, counts: Counts) -> None:
    """Ask for large answers and read none."""
    request, more = victim.batch(16, 256)
    kept: list[Any] = []
    while True:
        call = stub.Forward()
        async with counted(counts, "asked"), asyncio.timeout(PATIENCE_S):
            await call.write(request)
            for part in more:
                await call.write(pb.ComputeRequest(more=part))
            kept.append(call)
        await asyncio.sleep(PAUSE_S)
        kept = [each for each in kept if not each.done()]


async def send_a_byte_a_second(victim: Victim, stub: pb_grpc.BlocksStub, _worker: int, counts: Counts) -> None:
    """Announce large batches, send half of each, and then a byte a second."""
    request, more = victim.batch(32, 256)

    async def trickle() -> None:
        call = stub.Forward()
        async with counted(counts, "ended"):
            await call.write(request)
            for part in more[: len(more) // 2]:
                await call.write(pb.ComputeRequest(more=part))
            while not call.done():
                await call.write(pb.ComputeRequest(more=b"x"))
                await asyncio.sleep(1.0)
            await _raise_status(call)

    while True:
        await asyncio.gather(*(trickle() for _ in range(16)))


async def open_connections(victim: Victim, _stub: pb_grpc.BlocksStub, worker: int, counts: Counts) -> None:
    """Keep a thousand connections open, with TLS and without a call; open them again when they are closed."""
    tls = ssl.create_default_context()
    tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    tls.set_alpn_protocols(["h2"])
    host, _, port = victim.server.direct[0].rpartition(":")

    async def hold() -> None:
        while True:
            async with counted(counts, "closed"):
                source = (victim.source, 0)
                reader, writer = await asyncio.open_connection(host, int(port), ssl=tls, local_addr=source)
                counts["opened"] += 1
                try:
                    while await reader.read(1 << 16):
                        pass
                finally:
                    writer.transport.abort()
            await asyncio.sleep(1.0)

    await asyncio.gather(*(hold() for _ in range(NUM_CONNECTIONS // NUM_CHANNELS)))


KINDS: dict[str, Abuse] = {
    "sessions": open_sessions,
    "full rate": send_at_full_rate,
    "reads nothing": read_nothing,
    "a byte a second": send_a_byte_a_second,
    "connections": open_connections,
}


@asynccontextmanager
async def counted(counts: Counts, what: str) -> AsyncIterator[None]:
    """Count what the body does, or how it failed; nothing stops an abuser."""
    try:
        yield
        counts[what] += 1
        return
    except grpc.aio.AioRpcError as exc:
        counts[exc.code().name.lower()] += 1
    except (OSError, TimeoutError, asyncio.InvalidStateError, grpc.aio.UsageError) as exc:
        counts[type(exc).__name__] += 1
    await asyncio.sleep(PAUSE_S)


async def _raise_status(call: Any) -> None:
    if await call.code() is not grpc.StatusCode.OK:
        raise grpc.aio.AioRpcError(
            await call.code(), await call.initial_metadata(), await call.trailing_metadata(), await call.details()
        )


@asynccontextmanager
async def open_way(victim: Victim, path: Path) -> AsyncIterator[str]:
    """A gRPC target whose connections come from the abuser's address."""
    host, _, port = victim.server.direct[0].rpartition(":")
    tasks: set[asyncio.Task[None]] = set()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            onward = await asyncio.open_connection(host, int(port), local_addr=(victim.source, 0))
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


async def _abuse(kind: str, victim: Victim, until: asyncio.Event, counts: Counts) -> None:
    pem = certificate_pem(victim.server.tls_certificate)
    async with AsyncExitStack() as owned:
        directory = Path(owned.enter_context(tempfile.TemporaryDirectory(prefix="swarm-abuse-")))
        target = await owned.enter_async_context(open_way(victim, directory / "way"))
        workers = []
        for worker in range(NUM_CHANNELS):
            channel = await owned.enter_async_context(open_channel(target, pem, TLS_NAME))
            workers.append(asyncio.create_task(KINDS[kind](victim, pb_grpc.BlocksStub(channel), worker, counts)))
        stopped = asyncio.create_task(until.wait())
        await asyncio.wait({stopped, *workers}, return_when=asyncio.FIRST_COMPLETED)
        failed = [each for each in workers if each.done() and each.exception() is not None]
        await cancel_all([stopped, *workers])
        for each in failed:
            each.result()


def _process(pipe: Connection, kind: str, victim: Victim) -> None:
    """An abuser's whole life: until anything comes through the pipe, where it then says what became of its requests."""
    os.nice(19)
    torch.set_num_threads(1)

    async def run() -> Counts:
        until, counts = asyncio.Event(), Counts()
        asyncio.get_running_loop().add_reader(pipe.fileno(), until.set)
        await _abuse(kind, victim, until, counts)
        return counts

    pipe.send(asyncio.run(run()))


@contextmanager
def abusing(kinds: list[str], server: Announcement) -> Iterator[Callable[[], dict[str, dict[str, int]]]]:
    """Abuse a server in these ways, each from an address of its own, while the body runs.

    Yields: what ends it, and says what the server did with them.
    """
    context = multiprocessing.get_context("spawn")
    running: list[tuple[str, Any, Connection]] = []
    for kind in kinds:
        ours, theirs = context.Pipe()
        victim = Victim(server, f"127.0.0.{2 + list(KINDS).index(kind)}")
        process = context.Process(target=_process, args=(theirs, kind, victim), daemon=True)
        process.start()
        theirs.close()
        running.append((kind, process, ours))

    def stop() -> dict[str, dict[str, int]]:
        counts = {}
        for _, _, pipe in running:
            pipe.send("stop")
        for kind, _, pipe in running:
            counts[kind] = dict(pipe.recv()) if pipe.poll(60) else {}
        return counts

    try:
        yield stop
    finally:
        for _, process, pipe in running:
            with contextlib.suppress(OSError):
                pipe.close()
            process.join(5)
            if process.is_alive():
                process.kill()
