"""Adapters that are none, sent to a server process: one clear sentence each, and it holds what it did before."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from test_bad_input import assert_refused, compute, open_stub
from test_client_adapters import file, good, put
from tiny import load_local, random_ids

from swarm import PROTOCOL_VERSION, AutoDistributedModelForCausalLM
from swarm.errors import BadRequest, ProtocolError, SwarmError
from swarm.server import LocalSwarm
from swarm.server.hardware import KEPT_FREE_BYTES
from swarm.server.local import free_port
from swarm.v1 import blocks_pb2 as pb

ROOM_BYTES = 16 << 20
GROWTH_BYTES = 48 << 20
"""What allocators may keep of what was sent, which is several times that."""

NUM_LARGE = 100
"""Large uploads: together more than the process keeps of what has been freed, and than GROWTH_BYTES."""


class Target:
    """A server in a process of its own, and what it says about what it holds."""

    def __init__(self, swarm: LocalSwarm, remote: Any, local: Any, metrics_port: int) -> None:
        self.remote, self.local = remote, local
        self.server = remote.explain_route()[0].server
        self._process = psutil.Process(swarm.servers[0].process.pid)
        self._metrics_port = metrics_port

    @property
    def rss_bytes(self) -> int:
        return int(self._process.memory_info().rss)

    async def held(self) -> dict[str, float]:
        """The metrics of the store."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._metrics_port)
        writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
        lines = (await reader.read()).decode().splitlines()
        writer.close()
        pairs = [line.split() for line in lines if line.startswith(("swarm_adapter", "swarm_message"))]
        return {name: float(value) for name, value in pairs}

    async def wait_holds(self, wanted: dict[str, float]) -> None:
        async with asyncio.timeout(20):
            while await self.held() != wanted:
                await asyncio.sleep(0.05)


@pytest.fixture(scope="module")
def target(tiny_model: Callable[..., Path]) -> Iterator[Target]:
    path = tiny_model("llama")
    port = free_port()
    arguments = (
        "--adapter-mib",
        str(ROOM_BYTES >> 20),
        "--metrics-port",
        str(port),
        "--threads",
        "1",
        "--cache-mib",
        "64",
    )
    with LocalSwarm(str(path), ranges=[(0, 6)], dtype="float32", arguments=arguments) as swarm:
        remote = AutoDistributedModelForCausalLM.from_pretrained(str(path), join=swarm.link).eval()
        try:
            yield Target(swarm, remote, load_local(path), port)
        finally:
            remote.close()


def with_header(change: Callable[[dict[str, Any]], Any]) -> bytes:
    """A good file whose header is changed, or replaced by what `change` returns."""
    data = good()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    changed = change(header)
    text = changed if isinstance(changed, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def entry(name: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[f"mlp/lora/{name}"].update(fields)


def twice(header: dict[str, Any]) -> bytes:
    """The same tensor once more, with other bytes."""
    again = {**header["mlp/lora/a_RI"], "data_offsets": header["mlp/lora/b_OR"]["data_offsets"]}
    text = json.dumps(header)[:-1]
    return f'{text}, "mlp/lora/a_RI": {json.dumps(again)}}}'.encode()


def many(header: dict[str, Any]) -> None:
    header.update({f"mlp/lora/{number}": header["mlp/lora/a_RI"] for number in range(4000)})


FILES = {
    "no bytes": (b"", "whole safetensors file"),
    "a header of 2**64 - 1 bytes": (b"\xff" * 8 + good()[8:], "whole safetensors file"),
    "a header longer than the file": (len(good()).to_bytes(8, "little") + good()[8:], "whole safetensors file"),
    "a header of spaces": (with_header(lambda _: b" " * 300_000 + b"{}"), "longer than 256 KiB"),
    "a header of brackets": (with_header(lambda _: b"[" * 200_000), "header of an adapter cannot be read"),
    "a header that is nested": (with_header(lambda _: b'{"a":' * 40_000 + b"1" + b"}" * 40_000), "cannot be read"),
    "a header that is no text": (with_header(lambda _: b"\xff\xfe{}" * 10), "cannot be read"),
    "overlapping tensors": (with_header(entry("b_OR", data_offsets=[256, 768])), "whole safetensors file"),
    "the same bytes twice": (with_header(entry("b_OR", data_offsets=[0, 512])), "whole safetensors file"),
    "bytes behind the end": (with_header(entry("b_OR", data_offsets=[512, 1 << 40])), "whole safetensors file"),
    "bytes before the beginning": (with_header(entry("b_OR", data_offsets=[-512, 0])), "whole safetensors file"),
    "no width": (with_header(entry("a_RI", shape=[0, 64], data_offsets=[0, 0])), "greater than or equal to 1"),
    "a negative width": (with_header(entry("a_RI", shape=[-2, -64])), "greater than or equal to 1"),
    "more than any memory": (with_header(entry("a_RI", shape=[2**62, 2**62])), "more tensors than it has bytes"),
    "a width that overflows": (with_header(entry("a_RI", shape=[2**64 + 2, 64])), "cannot be read|more tensors"),
    "one name twice": (with_header(twice), "whole safetensors file"),
    "thousands of tensors": (with_header(many), "header is longer|tensors was sent"),
    "an unknown kind": (good().replace(b"mlp/lora", b"mlp/code"), "changed by 'code', which is not known here"),
    "a module outside": (good().replace(b"mlp/lora", b"m-p/lora"), "is no name of a module"),
    "NaN": (good(value=torch.nan), "not finite"),
    "inf": (good(value=torch.inf), "not finite"),
}


async def test_files_that_are_no_adapters_leave_nothing_in_a_server(target: Target) -> None:
    before, rss_bytes = await target.held(), target.rss_bytes
    async with open_stub(target.server) as stub:
        for what, (data, sentence) in FILES.items():
            with pytest.raises(BadRequest, match=sentence) as caught:
                await put(stub, target.server, file(data))
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 400, what
        for wire, error, sentence in (
            (file(good(), num_bytes=10 << 30), BadRequest, "take 10737418240 bytes"),
            (file(good(), num_bytes=2**64 - 1), BadRequest, "take 18446744073709551615 bytes"),
            (file(good(), digest=bytes(32)), BadRequest, "not that of its bytes"),
            (file(good(), digest=b""), ProtocolError, "32 bytes"),
            (file(good(), num_bytes=0), ProtocolError, "0 bytes were announced"),
        ):
            await assert_put_refused(stub, target, error, sentence, wire)
    await target.wait_holds(before)
    assert target.rss_bytes < rss_bytes + GROWTH_BYTES


async def assert_put_refused(stub: Any, target: Target, error: type[SwarmError], sentence: str, *messages: Any) -> None:
    with pytest.raises(error, match=sentence) as caught:
        await put(stub, target.server, *messages)
    assert type(caught.value) is error and "\n" not in str(caught.value)


async def test_large_files_that_are_refused_at_their_end_leave_nothing(target: Target) -> None:
    before, rss_bytes = await target.held(), target.rss_bytes
    data = bytes(7 << 20)
    parts = [data[at : at + (1 << 20)] for at in range(0, len(data), 1 << 20)]
    async with open_stub(target.server) as stub:
        for number in range(NUM_LARGE):
            digest = hashlib.sha256(data).digest() if number % 2 else bytes(32)
            wire = pb.AdapterFile(digest=digest, num_bytes=len(data), data=parts[0])
            await assert_put_refused(
                stub, target, BadRequest, "whole safetensors" if number % 2 else "not that of", wire, *parts[1:]
            )
    await target.wait_holds(before)
    allowed_bytes = KEPT_FREE_BYTES + GROWTH_BYTES
    assert NUM_LARGE * len(data) > allowed_bytes and target.rss_bytes < rss_bytes + allowed_bytes


async def test_uploads_that_are_broken_off_leave_nothing(target: Target) -> None:
    before, calls = await target.held(), []
    async with open_stub(target.server) as stub:
        for number in range(8):
            call = stub.PutAdapters()
            opening = pb.PutAdaptersOpen(
                protocol_version=PROTOCOL_VERSION, model_fingerprint=target.server.model_fingerprint
            )
            await call.write(pb.PutAdaptersRequest(open=opening))
            wire = pb.AdapterFile(digest=bytes([number] * 32), num_bytes=7 << 20, data=bytes(100_000))
            await call.write(pb.PutAdaptersRequest(adapter=wire))
            calls.append(call)
        await target.wait_holds(before | {"swarm_adapters_arriving": 8.0, "swarm_adapter_bytes": 800_000.0})
        await put(stub, target.server, file(good()))  # they hold nobody up
        for call in calls:
            call.cancel()
        await target.wait_holds(before | {"swarm_adapters": 1.0, "swarm_adapter_bytes": 256.0 * 1024})


async def test_many_small_files_take_no_more_than_the_room(target: Target) -> None:
    rss_bytes = target.rss_bytes
    files = [file(good(value=0.001 * number)) for number in range(1, 600)]
    async with open_stub(target.server) as stub:
        await put(stub, target.server, *files)
        held = await target.held()
        assert held["swarm_adapter_bytes"] == ROOM_BYTES == held["swarm_adapters"] * 256 * 1024
        assert held["swarm_adapters_in_use"] == held["swarm_adapters_arriving"] == 0
        assert target.rss_bytes < rss_bytes + GROWTH_BYTES
        announced = pb.AdapterFile(digest=bytes(32), num_bytes=ROOM_BYTES // 2 + 1)
        await assert_put_refused(stub, target, BadRequest, "this server takes at most 8388608", announced)


async def test_adapters_that_fit_no_module_are_refused_by_each_call_that_names_them(target: Target) -> None:
    async with open_stub(target.server) as stub:
        for data, sentence in (
            (good(rows=63), r"needs 'b_OR' of the shape \[64, 2\], not \[63, 2\]"),
            (good(target="mlp.gone"), "has no module mlp.gone that can be changed"),
        ):
            await put(stub, target.server, file(data))
            names = [hashlib.sha256(data).digest(), *[b""] * 5]
            request = compute(target.server, blocks=pb.BlockRange(start=0, end=6), adapters=names)
            await assert_refused(BadRequest, sentence, stub.Forward(), request)
    held = await target.held()
    assert held["swarm_adapters_in_use"] == held["swarm_message_bytes"] == held["swarm_messages_waiting"] == 0


def test_the_server_works_as_before(target: Target) -> None:
    ids = random_ids(1, 5)
    with torch.no_grad():
        ours, theirs = (
            model.generate(ids, max_new_tokens=6, do_sample=False) for model in (target.remote, target.local)
        )
    assert torch.equal(ours, theirs)
