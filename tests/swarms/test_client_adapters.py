"""Adapters that a client owns, inside other people's blocks: the same numbers as in a local model that is changed."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import torch
from changing import changed, layers_of, random_adapter
from swarms_help import wait_idle, wait_until, weights
from test_bad_input import assert_refused, compute, open_stub, opening, talk
from test_training import through_layers
from tiny import load_local, random_ids
from torch import Tensor

from swarm import PROTOCOL_VERSION, AutoDistributedModelForCausalLM
from swarm.errors import AdapterMissing, BadRequest, ProtocolError
from swarm.link import JoinLink
from swarm.model.adapters import BlockAdapter, Lora
from swarm.ranges import BlockRange
from swarm.rpc import translate
from swarm.server import LocalSwarm, service
from swarm.server.adapters import LEAST_BYTES, AdapterStore
from swarm.server.batches import Batch, KeptActivations, run_forward
from swarm.server.room import answer
from swarm.v1 import blocks_pb2 as pb

GRADIENT_TOLERANCE = 1e-4


def make_adapters(swarm: Any, *, seed: int = 1, **how: Any) -> list[BlockAdapter | None]:
    """An adapter for each block, each at all of its modules."""
    targets = {number: widths for store in stores(swarm) for number, widths in store.targets.items()}
    return [random_adapter(targets[number], seed=seed * 100 + number, **how) for number in sorted(targets)]


def with_leaves(adapters: list[BlockAdapter | None]) -> tuple[list[BlockAdapter | None], list[Tensor]]:
    leaves = [
        each and each.with_tensors([tensor.clone().requires_grad_() for tensor in each.tensors().values()])
        for each in adapters
    ]
    return leaves, [tensor for each in leaves if each is not None for tensor in each.tensors().values()]


def train_remote(remote: Any, adapters: list[BlockAdapter | None], ids: Tensor, **inputs: Any) -> list[Tensor]:
    leaves, tensors = with_leaves(adapters)
    remote._swarm.adapters = lambda: leaves
    try:
        loss = remote(input_ids=ids, labels=ids, use_cache=False, **inputs).loss
        return [loss.detach(), *torch.autograd.grad(loss, tensors)]
    finally:
        remote._swarm.adapters = lambda: None


def train_local(local: Any, adapters: list[BlockAdapter | None], ids: Tensor, **inputs: Any) -> list[Tensor]:
    leaves, tensors = with_leaves(adapters)
    with changed(local.model.layers, leaves):
        loss = local(input_ids=ids, labels=ids, use_cache=False, **inputs).loss
    return [loss.detach(), *torch.autograd.grad(loss, tensors)]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=GRADIENT_TOLERANCE * float(other.abs().max().clamp(1)), rtol=0)


def test_loss_and_gradients_of_all_kinds(llama):
    adapters, ids = make_adapters(llama.swarm), random_ids(2, 9)
    adapters[3] = None
    assert_same(train_remote(llama.remote, adapters, ids), train_local(llama.local, adapters, ids))


def test_micro_batches_add_up_and_what_was_not_kept_is_computed_again(llama, swarms, monkeypatch):
    adapters, ids = make_adapters(llama.swarm), random_ids(5, 9)
    wanted = train_local(llama.local, adapters, ids)
    remote = swarms.join(llama.swarm, llama.path, config={"micro_batch_tokens": 20})  # 2 + 2 + 1 sequences
    assert_same(train_remote(remote, adapters, ids), wanted)
    for server in llama.swarm.servers:
        monkeypatch.setattr(server.running.mover.tenure.kept, "max_bytes", 0)
    assert_same(train_remote(remote, adapters, ids), wanted)


def test_dropout_is_the_same_however_a_batch_is_cut(llama, swarms, monkeypatch):
    adapters = [
        BlockAdapter([Lora("mlp.up_proj", torch.randn(4, 64) * 0.1, torch.randn(96, 4) * 0.1, 0.5, dropout=0.4)])
        for _ in range(6)
    ]
    ids, results = random_ids(4, 9), []
    remotes = [llama.remote, swarms.join(llama.swarm, llama.path, config={"micro_batch_tokens": 20})]
    for number, remote in enumerate([*remotes, llama.remote]):
        torch.manual_seed(5)
        if number == 2:
            for server in llama.swarm.servers:
                monkeypatch.setattr(server.running.mover.tenure.kept, "max_bytes", 0)
        results.append(train_remote(remote, adapters, ids))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])
    torch.manual_seed(6)
    assert abs(train_remote(llama.remote, adapters, ids)[0] - results[0][0]) > 1e-4


def test_slices_of_remote_blocks_are_changed_as_well(llama):
    adapters = make_adapters(llama.swarm)
    leaves, tensors = with_leaves(adapters)
    local_leaves, local_tensors = with_leaves(adapters)
    x_BLD, results = torch.randn(2, 7, 64), []
    with changed(llama.local.model.layers, local_leaves):
        results.append(through_layers(llama.local, llama.local.model.layers[1:4], x_BLD))
    results.append(llama.remote.remote_blocks[1:4](x_BLD, adapters=leaves))
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=0)
    grads = [
        torch.autograd.grad(y.pow(2).mean(), of, allow_unused=True)
        for y, of in zip(results, (local_tensors, tensors), strict=True)
    ]
    assert [each is None for each in grads[0]] == [each is None for each in grads[1]]
    assert_same([each for each in grads[1] if each is not None], [each for each in grads[0] if each is not None])
    with pytest.raises(BadRequest, match="adapters of 3 blocks"):
        llama.remote.remote_blocks[1:4](x_BLD, adapters=leaves[:3])


# Decoding


def generate(model: Any, ids: Tensor, **how: Any) -> Tensor:
    with torch.no_grad():
        return model.generate(ids, max_new_tokens=12, do_sample=False, **how)


def num_shared(engine: Any) -> int:
    """Passes so far in which several sessions decoded."""
    return sum(num for size, num in engine.statistics().batch_sizes.items() if size > 1)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "falcon", "qwen3_next"])
def test_clients_with_different_adapters_decode_in_shared_passes(swarms, model_type):
    ranges = ((0, 2), (2, 4), (4, 6)) if model_type == "llama" else ((0, 1), (1, 3), (3, 4))
    swarm, path = swarms.get(model_type, ranges)
    local, ids = load_local(path), random_ids(2, 20)
    choices = [make_adapters(swarm, seed=1), make_adapters(swarm, seed=2), None, make_adapters(swarm, seed=1)]
    clients, wanted = [swarms.join(swarm, path) for _ in choices], []
    for client, adapters in zip(clients, choices, strict=True):
        client._swarm.adapters = lambda adapters=adapters: adapters
        with changed(layers_of(local), adapters or [None] * len(layers_of(local))):
            wanted.append(generate(local, ids))
    assert not torch.equal(wanted[0], wanted[1]) and not torch.equal(wanted[0], wanted[2])
    barrier, engines = threading.Barrier(len(clients)), [server.running.engine for server in swarm.servers]
    before = [num_shared(engine) for engine in engines]

    def decode(client: Any) -> Tensor:
        barrier.wait()
        return generate(client, ids)

    def have_shared() -> bool:
        return all(num_shared(engine) > num for engine, num in zip(engines, before, strict=True))

    with ThreadPoolExecutor(len(clients)) as pool:
        for _ in range(5):  # on a busy machine, chance may keep them apart for once
            ours = list(pool.map(decode, clients))
            assert all(torch.equal(one, other) for one, other in zip(ours, wanted, strict=True))
            if have_shared():
                break
    assert have_shared()


def test_sessions_share_pages_only_with_the_same_adapters(llama, swarms):
    clients, ids = [swarms.join(llama.swarm, llama.path) for _ in range(2)], random_ids(1, 40)
    for seeds in ((1, 1), (1, 2)):
        for client, seed in zip(clients, seeds, strict=True):
            client._swarm.adapters = lambda seed=seed: make_adapters(llama.swarm, seed=seed)
        sessions = [client.inference_session(max_length=64) for client in clients]
        with sessions[0], sessions[1]:
            for client, session in zip(clients, sessions, strict=True):
                client.generate(ids, max_new_tokens=2, do_sample=False, session=session)
            # Later servers may be given other last bits, where a prefill was cut differently.
            shared = llama.swarm.servers[0].running.sessions.statistics().cache_shared_bytes
        assert (shared > 0) == (seeds == (1, 1))
        wait_idle(llama.swarm)


def test_training_with_adapters_changes_no_server_and_nobody_else(llama, swarms):
    other, ids = swarms.join(llama.swarm, llama.path), random_ids(2, 9)
    before, logits = weights(llama.swarm), other(ids, use_cache=False).logits.detach()
    adapters, losses = make_adapters(llama.swarm, kinds=("lora",)), []
    leaves, tensors = with_leaves(adapters)
    optimizer = torch.optim.Adam(tensors, lr=0.01)
    for _ in range(8):
        now = [each.with_tensors(list(each.tensors().values())) for each in leaves]
        llama.remote._swarm.adapters = lambda now=now: now
        try:
            loss = llama.remote(input_ids=ids, labels=ids, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
        finally:
            llama.remote._swarm.adapters = lambda: None
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert weights(llama.swarm) == before
    assert torch.equal(other(ids, use_cache=False).logits, logits)


def test_gradients_of_adapters_do_not_flow_through_a_cache(llama):
    leaves, _ = with_leaves(make_adapters(llama.swarm))
    llama.remote._swarm.adapters = lambda: leaves
    try:
        for parameter in llama.remote.parameters():
            parameter.requires_grad_(False)
        with pytest.raises(BadRequest, match="use_cache=False"):
            llama.remote(random_ids(1, 4), use_cache=True)
    finally:
        llama.remote._swarm.adapters = lambda: None
        for parameter in llama.remote.parameters():
            parameter.requires_grad_(True)


# What servers forget, and servers that are lost


def stores(swarm: Any) -> list[Any]:
    return [server.running.mover.tenure.adapters for server in swarm.servers]


@pytest.fixture(scope="module")
def small(all_swarms: Any, tiny_model: Any) -> Iterator[tuple[LocalSwarm, Path]]:
    """Servers with room for three clients' adapters."""
    path = tiny_model("llama")
    with LocalSwarm(
        str(path),
        ranges=[(0, 3), (3, 6)],
        dtype="float32",
        in_process=True,
        settings={"adapter_bytes": 9 * LEAST_BYTES},
    ) as swarm:
        yield swarm, path


def test_adapters_that_were_forgotten_are_sent_again(small, swarms):
    swarm, path = small
    local, ids = load_local(path), random_ids(1, 9)
    remote = swarms.join(swarm, path)
    choices = [make_adapters(swarm, seed=seed) for seed in range(5)]
    for seed in (0, 1, 2, 3, 4, 0, 4):
        assert_same(train_remote(remote, choices[seed], ids), train_local(local, choices[seed], ids))
        assert all(0 < store.statistics().used_bytes <= 9 * LEAST_BYTES for store in stores(swarm))
    assert all(store.statistics().num_used == 0 for store in stores(swarm))


def test_adapters_of_an_open_session_stay(small, swarms):
    swarm, path = small
    local, ids = load_local(path), random_ids(1, 6)
    remote, adapters = swarms.join(swarm, path), make_adapters(swarm, seed=0)
    with changed(local.model.layers, adapters):
        wanted = generate(local, ids)
    remote._swarm.adapters = lambda: adapters
    with remote.inference_session(max_length=40):
        with torch.no_grad():
            first = remote.generate(ids, max_new_tokens=4, do_sample=False)
        for seed in range(1, 5):
            remote._swarm.adapters = lambda seed=seed: make_adapters(swarm, seed=seed)
            remote(ids, use_cache=False)
        # A server gives a batch's back when its answer has left: the client may be ahead of that.
        wait_until(lambda: all(store.statistics().num_used == 3 for store in stores(swarm)), "batches give theirs back")
        remote._swarm.adapters = lambda: adapters
        with torch.no_grad():
            rest = remote.generate(max_new_tokens=8, do_sample=False)
    assert torch.equal(torch.cat([first, rest], dim=1), wanted)
    wait_until(lambda: all(store.statistics().num_used == 0 for store in stores(swarm)), "adapters are given back")


def test_adapters_larger_than_the_room_are_refused(small, swarms):
    swarm, path = small
    remote = swarms.join(swarm, path)
    large = [BlockAdapter([Lora("mlp", torch.zeros(2560, 64), torch.zeros(64, 2560))]) for _ in range(6)]
    remote._swarm.adapters = lambda: large
    with pytest.raises(BadRequest, match=f"this server takes at most {9 * LEAST_BYTES // 2}"):
        remote(random_ids(1, 4), use_cache=False)


async def test_a_server_says_how_much_it_takes(small, swarms):
    server = swarms.join(*small).explain_route()[0].server
    async with open_stub(server) as stub:
        answer = await stub.Describe(pb.DescribeRequest(protocol_version=PROTOCOL_VERSION))
    assert answer.limits.max_adapter_bytes == 9 * LEAST_BYTES // 2


def test_a_server_killed_while_a_session_with_adapters_decodes(tiny_model):
    path = tiny_model("llama")
    arguments = ("--announce-period", "3", "--cache-mib", "64", "--threads", "1", "--drain-timeout", "0.5")
    with LocalSwarm(str(path), ranges=[(0, 3), (3, 6), (3, 6)], dtype="float32", arguments=arguments) as swarm:
        remote = AutoDistributedModelForCausalLM.from_pretrained(str(path), join=swarm.link).eval()
        try:
            local, ids = load_local(path), random_ids(1, 6)
            adapters = [
                BlockAdapter([Lora("self_attn.q_proj", torch.randn(4, 64), torch.randn(64, 4), 0.3)]) for _ in range(6)
            ]
            remote._swarm.adapters = lambda: adapters
            with changed(local.model.layers, adapters):
                wanted = generate(local, ids)
            with remote.inference_session(max_length=40) as session, torch.no_grad():
                first = remote.generate(ids, max_new_tokens=4, do_sample=False)
                peer_id = session.route[-1].peer_id
                next(each for each in swarm.servers if peer_id in JoinLink.parse(each.link).initial_peers[0]).kill()
                rest = remote.generate(max_new_tokens=8, do_sample=False)
                assert session.route[-1].peer_id != peer_id
            assert torch.equal(torch.cat([first, rest], dim=1), wanted)
        finally:
            remote.close()


# Slow lines


def arrivals(monkeypatch: Any, swarm: LocalSwarm, slow: dict[int, float]) -> list[tuple[int, bytes]]:
    """From now on, the uploads of these servers take so many seconds; returns (server, digest) as they come."""
    came: list[tuple[int, bytes]] = []
    for number, store in enumerate(stores(swarm)):

        async def receive(wire: Any, read: Any, *, number: int = number, store: Any = store, **how: Any) -> None:
            came.append((number, wire.digest))
            await asyncio.sleep(slow.get(number, 0.0))
            await AdapterStore.receive(store, wire, read, **how)

        monkeypatch.setattr(store, "receive", receive)
    return came


def test_a_session_opens_when_all_its_servers_have_their_adapters_however_long_that_takes(llama, swarms, monkeypatch):
    monkeypatch.setattr(service, "MESSAGE_TIMEOUT_S", 0.4)
    came = arrivals(monkeypatch, llama.swarm, {2: 0.6})  # for each of two files
    remote, adapters, ids = swarms.join(llama.swarm, llama.path), make_adapters(llama.swarm, seed=7), random_ids(1, 6)
    opened: list[bytes] = []
    for server in llama.swarm.servers:
        table = server.running.sessions

        def note(key: Any, *, open_session: Any = table.open, **how: Any) -> Any:
            opened.append(key.session_id)
            return open_session(key, **how)

        monkeypatch.setattr(table, "open", note)
    remote._swarm.adapters = lambda: adapters
    with changed(llama.local.model.layers, adapters):
        wanted = generate(llama.local, ids)
    assert torch.equal(generate(remote, ids), wanted)
    assert len(opened) == 3 and len(came) == len(set(came)) == 6
    opening_s = remote._swarm.connection.network.openings.bound_s(1)
    assert opening_s is not None and opening_s < 1.2


@pytest.mark.parametrize("how", ["training", "decoding"])
def test_a_slow_upload_is_not_raced_onto_another_server(swarms, monkeypatch, how):
    swarm, path = swarms.get("llama", ((0, 6), (0, 6)))
    remote, ids = swarms.join(swarm, path), random_ids(2, 9)

    def work(seed: int) -> None:
        adapters = make_adapters(swarm, seed=seed)
        if how == "training":
            train_remote(remote, adapters, ids)
        else:
            remote._swarm.adapters = lambda: adapters
            generate(remote, ids)

    for seed in (1, 1, 2, 2):
        work(seed)
    came = arrivals(monkeypatch, swarm, {0: 0.3, 1: 0.3})  # for each of six files, so longer than any bound
    began_s = time.monotonic()
    work(3)
    assert time.monotonic() - began_s > 1.5
    # Nobody else is sent any before one has them all; a step that is late afterwards may be raced.
    assert len({number for number, _ in came[:6]}) == 1 and len(set(came)) == len(came) >= 6
    bounds = [each.bound_s(18 * 6) for each in remote._swarm.blocks._compute._times.values()]
    assert all(bound_s is None or bound_s < 1.5 for bound_s in bounds)


async def test_an_adapter_counts_once_among_the_activations_that_are_kept(llama):
    tenure = llama.swarm.servers[0].running.mover.tenure
    span, blocks = tenure.sessions.views.span, BlockRange(0, 2)
    adapter = random_adapter(tenure.adapters.targets[0])
    store = AdapterStore(1 << 22, tenure.adapters.targets, torch.device("cpu"))
    await store.receive(pb.AdapterFile(**as_file(adapter)), None)
    with store.lease([adapter.digest, b""], blocks) as lease:
        used_bytes = []
        for num_rows in (8, 1):
            kept = KeptActivations(1 << 30)
            for forward_id in (bytes(16), bytes([1] * 16)):
                batch = Batch(blocks, torch.randn(8, 3, 64), None, None, None, None, pb.CODEC_RAW, forward_id, lease)
                run_forward(span, batch, Rows(num_rows), kept)
            used_bytes.append(kept.used_bytes)
            kept.take(bytes(16))
            assert used_bytes[-1] / 2 < kept.used_bytes <= used_bytes[-1] / 2 + adapter.num_bytes
            kept.take(bytes([1] * 16))
            assert kept.used_bytes == 0
    assert used_bytes[1] < used_bytes[0] + 7 * adapter.num_bytes  # 14 more slices, which have some more to keep


@dataclass
class Rows:
    """Turns of a computation that nobody interrupts."""

    num_rows: int

    def at_boundary(self) -> None: ...

    def rows(self, num_rows: int, length: int) -> int:
        return self.num_rows


def as_file(adapter: BlockAdapter) -> dict[str, Any]:
    return {"digest": adapter.digest, "num_bytes": len(adapter.to_bytes()), "data": adapter.to_bytes()}


# What nobody should send


@pytest.fixture
def server(llama: Any) -> Iterator[Any]:
    """The announcement of the server of blocks 2:4; afterwards it holds what it held, and works."""
    before = [store.statistics() for store in stores(llama.swarm)]
    yield next(hop.server for hop in llama.remote.explain_route() if hop.server.start == 2)
    wait_until(lambda: [store.statistics() for store in stores(llama.swarm)] == before, "nothing is left")
    ids = random_ids(1, 5)
    assert torch.equal(generate(llama.remote, ids), generate(llama.local, ids))


async def put(stub: Any, server: Any, *messages: Any) -> None:
    opening = pb.PutAdaptersOpen(protocol_version=PROTOCOL_VERSION, model_fingerprint=server.model_fingerprint)
    call = stub.PutAdapters()
    try:
        for message in (opening, *messages):
            kind = {pb.PutAdaptersOpen: "open", pb.AdapterFile: "adapter", bytes: "more"}[type(message)]
            await call.write(pb.PutAdaptersRequest(**{kind: message}))
        await call.done_writing()
    except asyncio.InvalidStateError:
        pass  # it ended while we wrote; its status says why
    try:
        await call
    except grpc.aio.AioRpcError as exc:
        raise translate(exc, "peer") from exc


def file(data: bytes, **changes: Any) -> pb.AdapterFile:
    fields = {"digest": hashlib.sha256(data).digest(), "num_bytes": len(data), "data": data}
    return pb.AdapterFile(**(fields | changes))


def good(target: str = "mlp", rows: int = 64, value: float = 0.1) -> bytes:
    return BlockAdapter([Lora(target, torch.ones(2, 64), torch.full((rows, 2), value))]).to_bytes()


@pytest.mark.parametrize(
    "message, error, sentence",
    [
        (file(good(), num_bytes=10 * 2**30), BadRequest, "take 10737418240 bytes"),
        (file(good(), digest=bytes(32)), BadRequest, "not that of its bytes"),
        (file(good(), digest=b"short"), ProtocolError, "32 bytes"),
        (file(good(), num_bytes=len(good()) + 1), ProtocolError, "before the bytes that it announced"),
        (file(good(), num_bytes=5), ProtocolError, "5 bytes were announced"),
        (file(b"\x80\x04pickled"), BadRequest, "not a whole safetensors file"),
        (file(good()[:-4]), BadRequest, "not a whole safetensors file"),
        (file(good(value=torch.nan)), BadRequest, "not finite"),
        (file(good().replace(b"mlp/lora", b"mlp/code")), BadRequest, "changed by 'code', which is not known here"),
        (b"more", ProtocolError, "must be `adapter`"),
    ],
)
async def test_files_that_are_no_adapters(server, message, error, sentence):
    async with open_stub(server) as stub:
        with pytest.raises(error, match=sentence) as caught:
            await put(stub, server, message)
    assert type(caught.value) is error and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data, sentence",
    [
        (good(rows=63), r"in block 2, the lora change of mlp needs 'b_OR' of the shape \[64, 2\], not \[63, 2\]"),
        (good(target="mlp.gone"), "block 2 has no module mlp.gone that can be changed, but input_layernorm, mlp"),
    ],
)
async def test_adapters_that_do_not_fit_the_blocks(llama, data, sentence):
    server = next(hop.server for hop in llama.remote.explain_route() if hop.server.start == 2)
    digest = hashlib.sha256(data).digest()
    async with open_stub(server) as stub:
        for names, wanted, error in (
            ([b"", bytes(32)], "1 of the adapters that were named are not here", AdapterMissing),
            ([digest], "adapters of 1 blocks were named", BadRequest),
            ([digest, b""], sentence, BadRequest),
        ):
            await put(stub, server, file(data))
            await assert_refused(error, wanted, stub.Forward(), compute(server, adapters=names))
            gradient = torch.zeros(1, 3, 64)
            await assert_refused(error, wanted, stub.Backward(), compute(server, adapters=names, grad_outputs=gradient))
            await assert_refused(error, wanted, stub.Session(), pb.SessionRequest(open=opening(server, adapters=names)))


async def test_backward_answers_that_nobody_takes_hold_the_next_ones_back(llama, monkeypatch):
    server = next(hop.server for hop in llama.remote.explain_route() if hop.server.start == 2)
    tenure = next(
        each.running.mover.tenure for each in llama.swarm.servers if each.running.mover.tenure.blocks.start == 2
    )
    answering, go_on = asyncio.Semaphore(0), threading.Event()

    async def slowly(*args):
        answering_loop.call_soon_threadsafe(answering.release)
        await asyncio.to_thread(go_on.wait, 30)
        await answer(*args)

    answering_loop = asyncio.get_running_loop()
    monkeypatch.setattr(service, "answer", slowly)
    monkeypatch.setattr(tenure.room, "_max_bytes", 150_000)
    data = BlockAdapter([Lora("mlp", torch.ones(64, 64), torch.ones(64, 64))]).to_bytes()
    names = [hashlib.sha256(data).digest(), b""]
    async with open_stub(server) as stub:
        await put(stub, server, file(data))
        tasks = []
        for _ in range(3):
            call = stub.Backward()
            gradient = torch.zeros(1, 3, 64)
            tasks.append(
                asyncio.create_task(talk(call, compute(server, adapters=names, grad_outputs=gradient), num_answers=1))
            )
        await answering.acquire()  # one is computed: 2 x 64 x 64 x 4 bytes and some, three times
        while tenure.room.statistics().num_waiting < 2:
            await asyncio.sleep(0.01)
        assert 3 * 32_768 < tenure.room.statistics().used_bytes < 150_000
        go_on.set()
        assert all([answer.WhichOneof("kind") == "result" for task in tasks for answer in await task])
    wait_until(lambda: tenure.room.statistics().used_bytes == 0, "the room is free")


async def test_a_session_opened_again_with_other_adapters_is_refused(llama):
    server = next(hop.server for hop in llama.remote.explain_route() if hop.server.start == 2)
    data = good()
    names = [hashlib.sha256(data).digest(), b""]
    async with open_stub(server) as stub:
        await put(stub, server, file(data))
        first = opening(server, adapters=names, epoch=1)
        call = stub.Session()
        await talk(call, pb.SessionRequest(open=first), num_answers=1)
        for others in ([], names[::-1]):
            again = opening(server, session_id=first.session_id, adapters=others, epoch=2)
            await assert_refused(
                BadRequest, "a session with this id is open already", stub.Session(), pb.SessionRequest(open=again)
            )
        again = opening(server, session_id=first.session_id, adapters=names, epoch=2)
        second = stub.Session()
        await talk(second, pb.SessionRequest(open=again), num_answers=1)
        second.cancel()
