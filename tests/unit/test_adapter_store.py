"""The store of adapters: what is used stays, what is not goes when room is needed, and nothing is counted twice."""

from __future__ import annotations

import asyncio
import random
import threading
from typing import Any

import pytest
import torch

from swarm.errors import AdapterMissing, BadRequest, CacheFull, PeerUnavailable, ProtocolError
from swarm.model.adapters import Bias, BlockAdapter
from swarm.model.hosted import HostedAdapter
from swarm.model.targets import Width
from swarm.ranges import BlockRange
from swarm.server.adapters import LEAST_BYTES, AdapterStore
from swarm.v1 import blocks_pb2 as pb

BLOCKS = BlockRange(2, 4)
TARGETS = {number: {"mlp": Width(64, 64)} for number in BLOCKS}
ADAPTERS = [BlockAdapter([Bias("mlp", torch.full((64,), float(number)))]) for number in range(12)]
SIZE = LEAST_BYTES  # what each counts


def new_store(num_adapters: int = 4) -> AdapterStore:
    return AdapterStore(num_adapters * SIZE, TARGETS, torch.device("cpu"))


async def nothing_more() -> Any:
    raise PeerUnavailable("the connection broke")


async def put(store: AdapterStore, adapter: BlockAdapter) -> None:
    data = adapter.to_bytes()
    await store.receive(pb.AdapterFile(digest=adapter.digest, num_bytes=len(data), data=data), nothing_more)


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
    await asyncio.gather(*(put(store, ADAPTERS[0]) for _ in range(4)))
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
