"""The store of adapters: what is used stays, what is not goes when room is needed, and nothing is counted twice."""

from __future__ import annotations

import asyncio
import hashlib
import random
import threading
from typing import Any

import pytest
import torch

from swarm.errors import AdapterMissing, BadRequest, CacheFull, PeerUnavailable, ProtocolError
from swarm.model.adapters import Bias, BlockAdapter, Lora
from swarm.model.hosted import HostedAdapter
from swarm.model.targets import Width
from swarm.ranges import BlockRange
from swarm.server import adapters
from swarm.server.adapters import LEAST_BYTES, MAX_ARRIVING, AdapterStore, Lease
from swarm.v1 import blocks_pb2 as pb

BLOCKS = BlockRange(2, 4)
TARGETS = {number: {"mlp": Width(64, 64)} for number in BLOCKS}
ADAPTERS = [BlockAdapter([Bias("mlp", torch.full((64,), float(number)))]) for number in range(12)]
SIZE = LEAST_BYTES  # what each counts


def new_store(num_adapters: int = 4) -> AdapterStore:
    return AdapterStore(num_adapters * SIZE, TARGETS, torch.device("cpu"))


async def nothing_more() -> Any:
    raise PeerUnavailable("the connection broke")


async def put(store: AdapterStore, adapter: BlockAdapter, caller: str = "") -> None:
    data = adapter.to_bytes()
    wire = pb.AdapterFile(digest=adapter.digest, num_bytes=len(data), data=data)
    await store.receive(wire, nothing_more, caller=caller)


def large(seed: int, num_bytes: int = 2 * SIZE) -> bytes:
    """A file of about this size."""
    torch.manual_seed(seed)
    return BlockAdapter([Lora("mlp", torch.randn(num_bytes // 512, 64), torch.randn(64, num_bytes // 512))]).to_bytes()


class Upload:
    """A file that somebody sends part by part; nothing comes unless it is told to."""

    def __init__(self, store: AdapterStore, data: bytes, caller: str) -> None:
        self._data = data
        self._parts: asyncio.Queue[bytes] = asyncio.Queue()
        wire = pb.AdapterFile(digest=hashlib.sha256(data).digest(), num_bytes=len(data))
        self.task = asyncio.create_task(store.receive(wire, self._read, caller=caller))

    async def _read(self) -> pb.PutAdaptersRequest:
        return pb.PutAdaptersRequest(more=await self._parts.get())

    async def send(self, num_bytes: int) -> None:
        part, self._data = self._data[:num_bytes], self._data[num_bytes:]
        self._parts.put_nowait(part)
        await settle()

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def held(store: AdapterStore) -> list[int]:
    result = []
    for number, adapter in enumerate(ADAPTERS):
        try:
            store.lease([adapter.digest, b""], BLOCKS).close()
            result.append(number)
        except AdapterMissing:
            pass
    return result


async def test_what_was_not_used_for_longest_goes_first() -> None:
    store = new_store()
    for number in range(4):
        await put(store, ADAPTERS[number])
    store.lease([ADAPTERS[0].digest, b""], BLOCKS).close()
    await put(store, ADAPTERS[4])
    await put(store, ADAPTERS[5])
    assert held(store) == [0, 3, 4, 5]
    assert store.statistics().used_bytes == 4 * SIZE


async def test_what_is_lent_stays_until_every_lease_is_closed() -> None:
    store = new_store()
    lease = None
    for number in range(4):
        await put(store, ADAPTERS[number])
    lease = store.lease([ADAPTERS[0].digest, ADAPTERS[1].digest], BLOCKS)
    shared, others = lease.share(), store.lease([ADAPTERS[2].digest, ADAPTERS[3].digest], BLOCKS)
    assert lease.adapters is not None and [each.changes[0].bias_O[0] for each in lease.adapters] == [0, 1]  # type: ignore[union-attr,attr-defined]
    with pytest.raises(CacheFull, match="those in use"):
        await put(store, ADAPTERS[4])
    lease.close()
    lease.close()
    with pytest.raises(CacheFull):
        await put(store, ADAPTERS[4])
    shared.close()
    await put(store, ADAPTERS[4])
    assert held(store) == [1, 2, 3, 4]
    others.close()
    assert store.statistics().num_used == 0


async def test_what_does_not_arrive_whole_takes_no_room() -> None:
    store, data = new_store(), ADAPTERS[0].to_bytes()
    for wire, error in (
        (pb.AdapterFile(digest=ADAPTERS[0].digest, num_bytes=len(data), data=data[:9]), PeerUnavailable),
        (pb.AdapterFile(digest=bytes(32), num_bytes=len(data), data=data), BadRequest),
        (pb.AdapterFile(digest=ADAPTERS[0].digest, num_bytes=len(data) - 1, data=data), ProtocolError),
        (pb.AdapterFile(digest=ADAPTERS[0].digest, num_bytes=10 << 30), BadRequest),
    ):
        with pytest.raises(error):
            await store.receive(wire, nothing_more)
        assert store.statistics().used_bytes == 0 == store.statistics().num_adapters


async def test_the_same_file_twice_is_held_once() -> None:
    store = new_store()
    await asyncio.gather(*(put(store, ADAPTERS[0], caller=str(number)) for number in range(4)))
    assert store.statistics().used_bytes == SIZE


async def test_one_request_may_not_take_more_than_half() -> None:
    store = AdapterStore(3 * SIZE, TARGETS, torch.device("cpu"))
    await put(store, ADAPTERS[0])
    await put(store, ADAPTERS[1])
    with pytest.raises(BadRequest, match="takes at most"):
        store.lease([ADAPTERS[0].digest, ADAPTERS[1].digest], BLOCKS)
    with store.lease([ADAPTERS[0].digest, ADAPTERS[0].digest], BLOCKS):  # one file, two blocks
        assert store.statistics().num_used == 1
    with pytest.raises(BadRequest, match="takes at most 0"):
        await put(new_store(0), ADAPTERS[0])


async def test_requests_without_adapters_take_none() -> None:
    store = new_store()
    for names in ([], [b"", b""]):
        with store.lease(names, BLOCKS) as lease:
            assert lease.adapters is None
    with pytest.raises(BadRequest, match="adapters of 1 blocks"):
        store.lease([b""], BLOCKS)


async def test_nothing_is_lost_or_counted_twice_in_any_order() -> None:
    store, draw, leases = new_store(6), random.Random(0), []
    for _ in range(3000):
        adapter = draw.choice(ADAPTERS)
        action = draw.random()
        try:
            if action < 0.4:
                await put(store, adapter)
            elif action < 0.7:
                leases.append((adapter, store.lease([b"", adapter.digest], BLOCKS)))
            elif leases:
                leases.pop(draw.randrange(len(leases)))[1].close()
        except (AdapterMissing, CacheFull):
            pass
        statistics = store.statistics()
        assert statistics.used_bytes == statistics.num_adapters * SIZE <= 6 * SIZE
        assert statistics.num_used == len({adapter.digest for adapter, _ in leases})


async def test_an_announcement_that_has_no_room_drops_nothing() -> None:
    store = new_store()
    for number in range(4):
        await put(store, ADAPTERS[number])
    with store.lease([ADAPTERS[0].digest, ADAPTERS[1].digest], BLOCKS), store.lease([ADAPTERS[2].digest, b""], BLOCKS):
        with pytest.raises(CacheFull):
            await store.receive(pb.AdapterFile(digest=bytes(32), num_bytes=2 * SIZE), nothing_more)
        assert held(store) == [0, 1, 2, 3]


async def test_what_is_here_already_needs_no_room() -> None:
    store = new_store(2)
    await put(store, ADAPTERS[0])
    await put(store, ADAPTERS[1])
    with store.lease([ADAPTERS[0].digest, b""], BLOCKS), store.lease([ADAPTERS[1].digest, b""], BLOCKS):
        await put(store, ADAPTERS[0])
        assert store.statistics().used_bytes == 2 * SIZE


async def test_an_upload_that_is_given_up_takes_its_room_until_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    store, parsing, go_on = new_store(), asyncio.Event(), threading.Event()
    loop, parse = asyncio.get_running_loop(), store._parse

    def slowly(data: bytes, digest: bytes) -> BlockAdapter:
        loop.call_soon_threadsafe(parsing.set)
        assert go_on.wait(30)
        return parse(data, digest)

    monkeypatch.setattr(store, "_parse", slowly)
    upload = asyncio.create_task(put(store, ADAPTERS[0]))
    await parsing.wait()
    upload.cancel()
    await asyncio.sleep(0.05)
    assert store.statistics().used_bytes == SIZE
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await upload
    assert store.statistics().used_bytes == 0


# Files on their way


async def test_uploads_that_send_nothing_hold_nothing() -> None:
    store = new_store(4)
    await put(store, ADAPTERS[0])
    silent = [Upload(store, large(number, 2 * SIZE - 4096), str(number)) for number in range(8)]
    await settle()
    assert store.statistics().num_arriving == 8
    assert held(store) == [0] and store.statistics().used_bytes == SIZE
    for number in (1, 2, 3):
        await put(store, ADAPTERS[number], caller="honest")
    assert held(store) == [0, 1, 2, 3]
    for upload in silent:
        await upload.stop()
    assert store.statistics().num_arriving == 0 and store.statistics().used_bytes == 4 * SIZE


async def test_room_is_taken_as_bytes_come_and_given_back_when_they_stop() -> None:
    store = new_store(4)
    for number in range(4):
        await put(store, ADAPTERS[number])
    upload = Upload(store, large(0, 2 * SIZE - 4096), "slow")
    await settle()
    assert held(store) == [0, 1, 2, 3]
    await upload.send(SIZE)
    assert held(store) == [1, 2, 3] and store.statistics().used_bytes == 4 * SIZE
    await upload.send(100)
    assert held(store) == [2, 3] and store.statistics().used_bytes == 3 * SIZE + 100
    await upload.stop()
    assert store.statistics().used_bytes == 2 * SIZE


async def test_an_upload_that_stops_on_its_way_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "STALL_S", 0.05)
    store = new_store(4)
    upload = Upload(store, large(0, SIZE), "slow")
    await upload.send(1000)
    with pytest.raises(PeerUnavailable, match="did not come within"):
        await upload.task
    assert store.statistics().used_bytes == 0


async def test_one_caller_may_have_half_of_the_room_on_its_way() -> None:
    store = new_store(4)
    uploads = [Upload(store, large(number, 2 * SIZE - 4096), "one") for number in range(2)]
    await uploads[0].send(2 * SIZE - 8192)
    await uploads[1].send(2 * SIZE - 8192)
    with pytest.raises(CacheFull, match="from one place"):
        await uploads[1].task
    await put(store, ADAPTERS[0], caller="other")
    assert held(store) == [0]
    await uploads[0].stop()
    many = [Upload(store, large(number, SIZE), "one") for number in range(MAX_ARRIVING + 1)]
    await settle()
    with pytest.raises(CacheFull, match=f"{MAX_ARRIVING} adapters are on their way"):
        await many[-1].task
    for upload in many[:-1]:
        await upload.stop()


async def test_an_upload_that_comes_whole_is_held_and_counted_once() -> None:
    store, data = new_store(4), large(0, SIZE)
    upload = Upload(store, data, "")
    while not upload.task.done():
        await upload.send(100_000)
        await asyncio.sleep(0.001)
    upload.task.result()
    assert store.statistics().used_bytes == len(data) and store.statistics().num_adapters == 1


# What memory there is not


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
async def test_a_device_without_memory_is_short_of_room_for_now(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(self: BlockAdapter, tensors: object) -> BlockAdapter:
        raise error

    store = new_store()
    monkeypatch.setattr(BlockAdapter, "with_tensors", full)
    with pytest.raises(CacheFull, match="no memory on cpu for an adapter"):
        await put(store, ADAPTERS[0])
    assert store.statistics().used_bytes == 0


# What gives way


async def test_what_nobody_uses_goes_first_then_what_rests_and_what_is_lent_stays() -> None:
    store, ended = new_store(4), []
    for number in range(4):
        await put(store, ADAPTERS[number])

    def resting(*numbers: int) -> Lease:
        lease = store.lease([(ADAPTERS[number].digest) for number in numbers], BLOCKS)

        def end() -> None:
            ended.append(numbers)
            lease.close()

        lease.rest(end)
        return lease

    live = store.lease([ADAPTERS[2].digest, b""], BLOCKS)
    resting(0, 2)
    resting(1, 1)
    await put(store, ADAPTERS[4])  # instead of 3, which nobody uses
    assert ended == [] and store.statistics().num_used == 3
    store.lease([ADAPTERS[4].digest, b""], BLOCKS).close()
    holding = store.lease([ADAPTERS[4].digest, b""], BLOCKS)
    await put(store, ADAPTERS[5])
    assert ended == [(0, 2)]
    in_use = store.lease([ADAPTERS[5].digest, b""], BLOCKS)
    await put(store, ADAPTERS[6])
    assert ended == [(0, 2), (1, 1)]
    last = store.lease([ADAPTERS[6].digest, b""], BLOCKS)
    with pytest.raises(CacheFull):
        await put(store, ADAPTERS[7])
    assert held(store) == [2, 4, 5, 6]
    for lease in (live, holding, in_use, last):
        lease.close()
    assert store.statistics().num_used == 0


async def test_a_lease_that_is_used_again_does_not_give_way() -> None:
    store = new_store(4)
    for number in range(4):
        await put(store, ADAPTERS[number])
    leases = [store.lease([ADAPTERS[number].digest, ADAPTERS[number + 1].digest], BLOCKS) for number in (0, 2)]
    for lease in leases:
        lease.rest(pytest.fail)
        lease.resume()
    with pytest.raises(CacheFull):
        await put(store, ADAPTERS[4])
    for lease in leases:
        lease.close()
    await put(store, ADAPTERS[4])
    assert store.statistics().num_used == 0


# Adapters of the server's own

HOSTED = HostedAdapter("poet", [None, None, ADAPTERS[0], None], [b"", b"", ADAPTERS[0].digest, b""])


async def test_a_hosted_adapter_stays_and_takes_nothing_of_the_budget() -> None:
    store = new_store(2)
    store.host(HOSTED, BLOCKS)
    for number in range(1, 5):
        await put(store, ADAPTERS[number])
    await put(store, ADAPTERS[0])  # a client's that is the same
    assert held(store) == [0, 3, 4] and store.statistics().used_bytes == 2 * SIZE
    name = HOSTED.listing.digest_bytes
    with store.lease([], BLOCKS, name) as lease:
        assert lease.is_hosted and lease.share().is_hosted and lease.names == (ADAPTERS[0].digest, b"")
    with store.lease([], BlockRange(3, 4), name) as lease:
        assert lease.adapters is None and lease.names == ()
    with pytest.raises(BadRequest, match="one or the other"):
        store.lease([ADAPTERS[0].digest, b""], BLOCKS, name)
    with pytest.raises(BadRequest, match="not hosted here"):
        store.lease([], BLOCKS, bytes(16))


def test_a_hosted_adapter_that_does_not_fit_is_refused() -> None:
    wrong = BlockAdapter([Bias("mlp", torch.zeros(63))])
    with pytest.raises(BadRequest, match="the adapter 'poet' cannot be hosted: in block 2, the bias change of mlp"):
        new_store().host(HostedAdapter("poet", [wrong] * 4, [wrong.digest] * 4), BLOCKS)
