"""The DHT node as a process: joining, restarting, dying, closing."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from swarm.announcement import Announcement
from swarm.bootstrap import run_bootstrap
from swarm.buckets import servers_root
from swarm.dht import Dht, DhtConfig, open_dht
from swarm.directory import SwarmClock
from swarm.errors import BadRequest, PeerUnavailable, ResourceError
from swarm.identity import Identity
from swarm.server.local import free_port

MODEL = "f" * 64
NOBODY = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"

Make = Callable[..., Announcement]

_OPEN_AND_SLEEP = """
import asyncio, sys, threading
from swarm.dht import DhtConfig, open_dht

async def main():
    async with open_dht(DhtConfig()) as dht:
        print(dht._daemon.pid, dht._daemon.control_socket.parent, flush=True)
        await asyncio.sleep(600)

thread = threading.Thread(target=lambda: asyncio.run(main()))
thread.start()
thread.join()
"""


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.02)


def test_p2pd_and_its_sockets_go_away_with_a_killed_owner() -> None:
    owner = subprocess.Popen([sys.executable, "-c", _OPEN_AND_SLEEP], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        pid, directory = owner.stdout.readline().split()
        assert _is_running(int(pid)) and Path(directory).exists()
    finally:
        owner.kill()
        owner.wait()
        assert owner.stdout is not None
        owner.stdout.close()
    _wait_until(lambda: not _is_running(int(pid)))
    _wait_until(lambda: not Path(directory).exists())


def _files_of_hivemind() -> set[Path]:
    return set(Path("/tmp").glob("hivemind-*"))


async def test_closing_leaves_nothing_behind(identity_paths: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    before = (psutil.Process().num_fds(), asyncio.all_tasks(), _files_of_hivemind())
    async with open_dht(DhtConfig(identity_path=identity_paths[0])) as dht:
        directory, pid = dht._daemon.control_socket.parent, dht._daemon.pid
        async with open_dht(DhtConfig(initial_peers=tuple(await dht.multiaddrs()))) as other:
            assert other.identity.path.exists()
        assert directory.stat().st_mode & 0o777 == 0o700
    assert not directory.exists() and not other.identity.path.exists() and not _is_running(pid)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before[1]
    assert _files_of_hivemind() == before[2]
    await asyncio.sleep(0.1)  # the loop closes transports a few rounds later
    assert psutil.Process().num_fds() <= before[0]
    assert [record for record in caplog.records if not record.name.startswith("asyncio")] == []


async def test_cancelled_start_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is cancelled at once, when it has its directory, when p2pd runs, and when it waits for the initial peer."""
    temporary = tempfile.mkdtemp(dir="/tmp")
    monkeypatch.setattr(tempfile, "tempdir", temporary)
    tasks, children = asyncio.all_tasks(), psutil.Process().children()
    dialled: list[object] = []

    def says_nothing(*stream: object) -> None:
        dialled.append(stream)

    moments: list[Callable[[], bool]] = [
        lambda: True,
        lambda: os.listdir(temporary) != [],
        lambda: psutil.Process().children() != children,
        lambda: dialled != [],
    ]
    async with await asyncio.start_server(says_nothing, "127.0.0.1", 0) as peer:
        address = f"/ip4/127.0.0.1/tcp/{peer.sockets[0].getsockname()[1]}/p2p/{NOBODY}"
        for moment in moments:
            opening = asyncio.create_task(open_dht(DhtConfig(initial_peers=(address,))).__aenter__())
            async with asyncio.timeout(10):
                while not moment():
                    await asyncio.sleep(0)
            opening.cancel()
            await asyncio.wait({opening})
            assert opening.cancelled()  # it cannot have finished: the peer never answers
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == tasks
    _wait_until(lambda: psutil.Process().children() == children)
    os.rmdir(temporary)  # it is empty


async def test_restarted_node_with_the_same_identity_takes_over(
    identities: list[Identity], make_announcement: Make
) -> None:
    async with open_dht(DhtConfig()) as bootstrap:
        peers = tuple(await bootstrap.multiaddrs())
        config = DhtConfig(initial_peers=peers, identity_path=identities[1].path)
        for state in ("online", "draining"):
            async with open_dht(config) as server:
                assert server.peer_id == identities[1].peer_id
                await server.directory.announce(make_announcement(server.peer_id, state=state))
            found = await bootstrap.directory.servers(MODEL)
            assert [announcement.state for announcement in found] == [state]


async def test_others_learn_of_a_restarted_bootstrap_node(identities: list[Identity], make_announcement: Make) -> None:
    config = DhtConfig(identity_path=identities[0].path, port=free_port())
    async with open_dht(config) as bootstrap:
        peers = tuple(await bootstrap.multiaddrs())
        opened = open_dht(DhtConfig(initial_peers=peers, identity_path=identities[1].path))
        server = await opened.__aenter__()
    try:
        announcement = make_announcement(server.peer_id)
        with pytest.raises(PeerUnavailable):
            for _ in range(2):  # the first one notices that the bootstrap node is gone
                await server.directory.announce(announcement)
        async with open_dht(config):
            for _ in range(40):  # libp2p does not dial again within 5 seconds of a failure
                if await _announce(server, announcement):
                    break
                await asyncio.sleep(0.5)
            async with open_dht(DhtConfig(initial_peers=peers, client_mode=True)) as client:
                assert [each.peer_id for each in await client.directory.servers(MODEL)] == [server.peer_id]
    finally:
        await opened.__aexit__(None, None, None)


async def test_node_may_be_given_its_own_address(identities: list[Identity]) -> None:
    port = free_port()
    address = f"/ip4/127.0.0.1/tcp/{port}/p2p/{identities[0].peer_id}"
    config = DhtConfig(initial_peers=(address,), identity_path=identities[0].path, port=port)
    async with open_dht(config) as dht:
        assert await dht.multiaddrs() == [address]


async def test_unreachable_peers_are_named(identity_paths: list[Path]) -> None:
    address = f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/{NOBODY}"
    with pytest.raises(PeerUnavailable, match=address):
        async with open_dht(DhtConfig(initial_peers=(address,), identity_path=identity_paths[0])):
            pass


async def test_hanging_peer_costs_no_more_than_the_timeout(identity_paths: list[Path]) -> None:
    async with await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0) as hanging:
        hangs = f"/ip4/127.0.0.1/tcp/{hanging.sockets[0].getsockname()[1]}/p2p/{NOBODY}"
        started_s = time.monotonic()
        with pytest.raises(PeerUnavailable, match=NOBODY):
            config = DhtConfig(initial_peers=(hangs,), identity_path=identity_paths[0], startup_timeout_s=1.5)
            async with open_dht(config):
                pass
        assert time.monotonic() - started_s < 6
        async with open_dht(DhtConfig(identity_path=identity_paths[0])) as bootstrap:
            peers = (hangs, *await bootstrap.multiaddrs())
            started_s = time.monotonic()
            async with open_dht(DhtConfig(initial_peers=peers, identity_path=identity_paths[1])):
                assert time.monotonic() - started_s < 5


@pytest.mark.parametrize(
    "address", ["nonsense", "/ip4/127.0.0.1/tcp/1", "/ip4/localhost/tcp/1/p2p/" + NOBODY, "/p2p/0"]
)
async def test_malformed_address_is_a_bad_request(address: str) -> None:
    with pytest.raises(BadRequest, match="is not an address"):
        async with open_dht(DhtConfig(initial_peers=(address,))):
            pass


async def test_port_in_use_is_named(identity_paths: list[Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=f"port {port} on 127.0.0.1 is already in use"):
            async with open_dht(DhtConfig(port=port, identity_path=identity_paths[0])):
                pass


async def test_identity_in_use_is_refused(identity_paths: list[Path]) -> None:
    async with open_dht(DhtConfig(identity_path=identity_paths[0])):
        with pytest.raises(ResourceError, match="in use by another running node"):
            async with open_dht(DhtConfig(identity_path=identity_paths[0])):
                pass
    async with open_dht(DhtConfig(identity_path=identity_paths[0])):
        pass


async def test_end_of_p2pd_is_noticed(identity_paths: list[Path]) -> None:
    async with open_dht(DhtConfig(identity_path=identity_paths[0])) as dht:
        os.kill(dht._daemon.pid, signal.SIGKILL)
        async with asyncio.timeout(5):
            await dht.wait_stopped()
        with pytest.raises(PeerUnavailable, match="daemon"):
            await dht.connect(NOBODY, [], timeout_s=5)


async def test_nobody_can_write_for_another_peer(identities: list[Identity], make_announcement: Make) -> None:
    from hivemind.dht.routing import DHTID

    from swarm.dht_records import RECORD_LIFETIME_S, sign_record

    key = DHTID.generate(servers_root(MODEL).key)
    async with open_dht(DhtConfig(identity_path=identities[0].path)) as honest:
        peers = tuple(await honest.multiaddrs())
        async with open_dht(DhtConfig(initial_peers=peers, identity_path=identities[1].path)) as attacker:
            await honest.directory.announce(make_announcement(honest.peer_id))
            victim, own = identities[0].public_key, identities[1].public_key
            data = make_announcement(state="draining").to_bytes()
            now_s = time.time() + 10

            def signed(in_bucket: bytes = key.to_bytes(), written_at_s: float = now_s) -> bytes:
                return sign_record(identities[1], in_bucket, data, written_at_s=written_at_s, lifetime_s=60)

            forgeries: list[tuple[object, bytes, float]] = [
                (victim, data, now_s),  # not a record
                (victim, signed(), now_s),  # signed by somebody else
                (own, signed(in_bucket=b"\0" * 20), now_s),  # for another bucket
                (own, signed(), now_s + 1),  # of another time
                (own, signed()[:-1] + b"x", now_s),  # changed
                (None, signed(), now_s),  # a plain value in place of the dictionary
                ("anything", signed(), now_s),
                (own, signed(written_at_s=now_s + 10_000), now_s + 10_000),  # it would stay for hours
            ]
            for subkey, value, written_at_s in forgeries:
                expiration_s = written_at_s + RECORD_LIFETIME_S
                stored = await attacker._node.protocol.call_store(
                    honest.p2p.peer_id, [key], [value], expiration_s, subkeys=[subkey]
                )
                assert stored == [False]
            [found] = await honest.directory.servers(MODEL)
            assert (found.peer_id, found.state) == (honest.peer_id, "online")


async def test_a_bucket_keeps_no_more_than_it_has_room_for(
    identities: list[Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarm.dht_records.CAPACITY", 2)
    monkeypatch.setattr("swarm.dht_records.MAX_BUCKETS_HELD", 2)
    from hivemind.dht.routing import DHTID

    from swarm.dht_records import RECORD_LIFETIME_S, BucketStorage, sign_record

    clock = SwarmClock()
    storage = BucketStorage(clock.now_s)

    def store(writer: int, name: str = "bucket", *, age_s: float = 0.0, lifetime_s: float = 60.0) -> bool:
        key, written_at_s = DHTID.generate(name), time.time() - age_s
        value = sign_record(identities[writer], key.to_bytes(), b"", written_at_s=written_at_s, lifetime_s=lifetime_s)
        return storage.store_subkey(key, identities[writer].public_key, value, written_at_s + RECORD_LIFETIME_S)

    assert store(0, age_s=50) and store(1)
    assert not store(2)
    assert store(0) and store(1)  # who is in there can go on
    assert store(1, age_s=-1, lifetime_s=0)  # and leave
    clock.offset_s = 2
    assert store(2)
    assert not store(3)
    assert store(3, "another") and not store(3, "one too many")
    assert not store(3, "another", age_s=-400)


async def test_wrong_clocks_do_not_hide_servers(identities: list[Identity], make_announcement: Make) -> None:
    async with open_dht(DhtConfig(identity_path=identities[0].path)) as bootstrap:
        peers = tuple(await bootstrap.multiaddrs())
        async with open_dht(DhtConfig(initial_peers=peers, identity_path=identities[1].path)) as server:
            server._clock.wall_s = lambda: time.time() - 200
            await server._measure_clock([bootstrap.peer_id])
            announcement = make_announcement(server.peer_id, expires_at_s=time.time() - 200 + 60)
            await server.directory.announce(announcement)
            [found] = await bootstrap.directory.servers(MODEL)
            assert found.expires_at_s == pytest.approx(time.time() + 60, abs=5)
            [found] = await server.directory.servers(MODEL)
            assert found.expires_at_s == pytest.approx(announcement.expires_at_s, abs=5)


async def test_a_clock_that_is_set_while_a_node_runs_is_measured_again(
    identities: list[Identity], make_announcement: Make
) -> None:
    async with open_dht(DhtConfig(identity_path=identities[0].path)) as bootstrap:
        peers = tuple(await bootstrap.multiaddrs())
        async with open_dht(DhtConfig(initial_peers=peers, identity_path=identities[1].path)) as server:
            server._clock.wall_s = lambda: time.time() + 2000
            await server.directory.announce(make_announcement(server.peer_id, expires_at_s=time.time() + 2060))
            [found] = await bootstrap.directory.servers(MODEL)
            assert found.expires_at_s == pytest.approx(time.time() + 60, abs=5)


async def test_bootstrap_runs_until_it_is_stopped(identities: list[Identity]) -> None:
    stop, ready = asyncio.Event(), asyncio.Event()
    addresses: list[str] = []

    def on_ready(multiaddrs: list[str]) -> None:
        addresses.extend(multiaddrs)
        ready.set()

    running = asyncio.create_task(run_bootstrap(DhtConfig(identity_path=identities[0].path), stop, on_ready))
    await ready.wait()
    assert addresses[0].endswith(identities[0].peer_id)
    async with open_dht(DhtConfig(initial_peers=tuple(addresses), client_mode=True)) as client:
        assert await client.directory.models() == []
        assert await client.multiaddrs() == []
    stop.set()
    await running


def test_importing_the_core_imports_neither_hivemind_nor_torch() -> None:
    code = (
        "import sys, swarm.dht, swarm.tunnel, swarm.bootstrap, swarm.link, swarm.directory\n"
        "sys.exit(bool({'hivemind', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_hivemind_says_nothing_on_the_terminal() -> None:
    code = (
        "import asyncio, logging\n"
        "logging.basicConfig(level=logging.INFO)\n"
        "from swarm.dht import *\n"
        "async def main():\n"
        "    async with open_dht(DhtConfig()) as a, open_dht(DhtConfig(initial_peers=tuple(await a.multiaddrs()))):\n"
        "        pass\n"
        "asyncio.run(main())\n"
        "assert logging.getLevelName(logging.WARNING) == 'WARNING'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "" and done.stderr == ""


async def _announce(server: Dht, announcement: Announcement) -> bool:
    try:
        await server.directory.announce(announcement)
    except PeerUnavailable:
        return False
    return True
