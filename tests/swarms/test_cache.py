"""The KV cache as several clients use it: full, shared, kept for those who come back, freed for those who do not."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import suppress
from typing import Any

import psutil
import pytest
import torch
from swarms_help import wait_idle, wait_until
from tiny import HIDDEN, NUM_BLOCKS, random_ids

from swarm.server import LocalSwarm, engine

WHOLE = (0, NUM_BLOCKS)
THIRDS = ((0, 2), (2, 4), (4, 6))


def generate(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return model.generate(ids, **{"max_new_tokens": 6, "do_sample": False} | kwargs)


def hidden(length: int, *, seed: int = 1, batch_size: int = 1) -> torch.Tensor:
    return torch.randn(batch_size, length, HIDDEN, generator=torch.Generator().manual_seed(seed))


def prefilled(server: Any) -> int:
    """Prefill tokens that a server in this process has run so far."""
    return server.running.engine.statistics().counters.num_prefill_tokens


def cut_connections(model: Any) -> None:
    """Shut every TCP connection to a server of the model's route, from the client and from other servers, as a router
    that restarts would."""
    ports = {int(address.rpartition(":")[2]) for hop in model.explain_route() for address in hop.server.direct}
    for connection in psutil.Process().net_connections(kind="tcp"):
        if connection.raddr and connection.raddr.port in ports:
            with suppress(OSError), socket.socket(fileno=os.dup(connection.fd)) as twin:  # it may be closed by now
                twin.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def small(swarms, tiny_model):
    """Two servers of the whole model with room for 128 tokens each."""
    path = tiny_model("llama")
    bytes_per_token = NUM_BLOCKS * 2 * 2 * 16 * 4
    settings = {"cache_bytes": 128 * bytes_per_token, "session_grace_s": 3.0}
    with LocalSwarm(str(path), [WHOLE, WHOLE], dtype="float32", in_process=True, settings=settings) as swarm:
        yield swarm, path
        wait_idle(swarm)


def test_a_session_that_finds_one_server_full_goes_to_another(small, swarms, monkeypatch):
    monkeypatch.setattr(engine, "MAX_PAGES_WAIT_S", 0.3)
    swarm, path = small
    model = swarms.join(swarm, path)
    with model.inference_session(max_length=128) as first, model.inference_session(max_length=128) as second:
        first.step(hidden(100))
        second.step(hidden(100, seed=2))
        assert {session.route[0].peer_id for session in (first, second)} == {
            server.running.peer_id for server in swarm.servers
        }
        for session in (first, second):
            session.step(hidden(1, seed=3))


def test_many_sessions_of_one_prefix_store_it_once(swarms, tiny_model):
    path = tiny_model("llama", max_position_embeddings=1024)
    with LocalSwarm(str(path), [WHOLE], dtype="float32", in_process=True) as swarm:
        model = swarms.join(swarm, path)
        (server,) = swarm.servers
        prefix, bytes_per_token = hidden(512), NUM_BLOCKS * 2 * 2 * 16 * 4
        sessions = [model.inference_session(max_length=600) for _ in range(16)]
        outputs = [session.step(prefix) for session in sessions]
        assert all(torch.allclose(output, outputs[0], atol=1e-5) for output in outputs)
        statistics = server.running.sessions.statistics()
        assert statistics.cache_used_bytes == statistics.cache_shared_bytes == 512 * bytes_per_token
        rests = [session.step(hidden(3, seed=seed)) for seed, session in enumerate(sessions)]
        with model.inference_session(max_length=600) as alone:
            alone.step(prefix[:, :511] * 1.5)
            alone.position = 0
            alone.step(torch.cat([prefix, hidden(3, seed=7)], dim=1), num_outputs=3)
        assert not torch.allclose(rests[0], rests[1], atol=1e-2)
        for session in sessions:
            session.close()
        wait_idle(swarm)


def test_a_client_that_reconnects_goes_on_without_a_new_prefill(llama, swarms):
    settings = {"session_grace_s": 60.0}
    with LocalSwarm(str(llama.path), THIRDS, dtype="float32", in_process=True, settings=settings) as swarm:
        model = swarms.join(swarm, llama.path)
        ids = random_ids(1, 40)
        with model.inference_session(max_length=80):
            first = generate(model, ids, max_new_tokens=6)
            before = [prefilled(server) for server in swarm.servers]
            cut_connections(model)
            rest = generate(model, torch.zeros(1, 0, dtype=torch.int64), max_new_tokens=6)
            assert [prefilled(server) for server in swarm.servers] == before
        wait_idle(swarm)
    assert torch.equal(torch.cat([first, rest], dim=1), generate(llama.local, ids, max_new_tokens=12))


def test_a_connection_cut_in_mid_generation_changes_nothing(llama, swarms):
    model = swarms.join(llama.swarm, llama.path)
    ids = random_ids(1, 30, seed=5)
    wanted = generate(llama.local, ids, max_new_tokens=40)
    tokens = 0

    class Cutter:
        def put(self, value: torch.Tensor) -> None:
            nonlocal tokens
            tokens += 1
            if tokens in (5, 20, 21):
                threading.Thread(target=cut_connections, args=(model,)).start()

        def end(self) -> None: ...

    assert torch.equal(generate(model, ids, max_new_tokens=40, streamer=Cutter()), wanted)


def test_a_client_that_vanishes_frees_its_pages_after_the_grace(small, swarms):
    swarm, path = small
    model = swarms.join(swarm, path)
    session = model.inference_session(max_length=100)
    session.step(hidden(50))
    tables = [server.running.sessions for server in swarm.servers]
    assert sum(table.statistics().cache_used_bytes for table in tables) > 0
    cut_connections(model)
    wait_until(lambda: any(table.statistics().num_kept for table in tables), "the cache is kept")
    wait_idle(swarm)
    assert not any(table.statistics().num_kept for table in tables)
    session.step(hidden(1))  # it can go on all the same, by a replay
    session.close()


def test_clients_that_decode_at_once_share_passes(llama, swarms):
    models = [swarms.join(llama.swarm, llama.path) for _ in range(3)]
    prompts = [random_ids(1, 5 + 3 * number, seed=number) for number in range(6)]
    wanted = [generate(llama.local, ids, max_new_tokens=24) for ids in prompts]
    results: dict[int, torch.Tensor] = {}
    barrier = threading.Barrier(len(prompts))

    def run(number: int) -> None:
        barrier.wait()
        results[number] = generate(models[number % 3], prompts[number], max_new_tokens=24)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(prompts))]
    before = llama.swarm.servers[0].running.engine.statistics().counters.num_shared_passes
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[number], tokens) for number, tokens in enumerate(wanted))
    assert llama.swarm.servers[0].running.engine.statistics().counters.num_shared_passes > before
