"""A second route before the first one is given up: when a step stalls, and when a server is about to leave. And what
servers push to each other, come twice or in another order."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from swarms_help import wait_until
from tiny import HIDDEN, load_local, random_ids

from swarm import AutoDistributedModelForCausalLM
from swarm.server import LocalSwarm
from swarm.server.pushing import PushLink

DRAIN_TIMEOUT_S = 60.0
STALL_S = 60.0
"""How long a server is stuck: much longer than any wait for it, also on a machine that is busy with other things."""
RANGES = ((0, 3), (3, 6), (0, 6))


@pytest.fixture(scope="module")
def path(tiny_model: Callable[..., Path]) -> str:
    return str(tiny_model("llama"))


@pytest.fixture(scope="module")
def local(path: str) -> Any:
    return load_local(Path(path))


@contextmanager
def swarm_of(path: str, *ranges: tuple[int, int]) -> Iterator[tuple[LocalSwarm, Any]]:
    """Servers that wait long for their sessions when they leave, and a client."""
    settings = {"drain_timeout_s": DRAIN_TIMEOUT_S, "cache_bytes": 1 << 26, "announce_period_s": 3.0}
    with LocalSwarm(path, ranges, dtype="float32", in_process=True, settings=settings) as swarm:
        remote = AutoDistributedModelForCausalLM.from_pretrained(path, join=swarm.link).eval()
        try:
            yield swarm, remote
        finally:
            remote.close()


def generate(model: Any, ids: torch.Tensor | None = None, num_tokens: int = 8, **kwargs: Any) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, **kwargs)


def server_at(swarm: LocalSwarm, hop: Any) -> Any:
    return next(each for each in swarm.servers if each.running.peer_id == hop.peer_id)


def num_sessions(server: Any) -> int:
    count: int = server.running.sessions.num_sessions
    return count


def leaving(server: Any) -> threading.Thread:
    """Tell a server to leave; the thread ends when it has."""
    thread = threading.Thread(target=server.stop)
    thread.start()
    return thread


class Stuck:
    """A server in this process whose passes take until `release`; it answers everything else."""

    def __init__(self, server: Any) -> None:
        self._engine, self._go_on = server.running.engine, threading.Event()
        self._run, self._train = self._engine._executor.run, self._engine._run_training
        self._engine._executor.run, self._engine._run_training = self.run, self.train
        self.num_stuck = 0

    def run(self, group: Any) -> Any:
        self._wait()
        return self._run(group)

    def train(self, job: Any) -> None:
        self._wait()
        self._train(job)

    def _wait(self) -> None:
        self.num_stuck += 1
        self._go_on.wait(STALL_S)

    def release(self) -> None:
        self._engine._executor.run, self._engine._run_training = self._run, self._train
        self._go_on.set()


def test_a_step_that_stalls_is_raced_on_another_route(path, local):
    ids = random_ids(1, 6)
    with swarm_of(path, *RANGES) as (swarm, remote), remote.inference_session(max_length=64) as session:
        text = generate(remote, ids)
        stuck_server = server_at(swarm, session.route[0])
        stuck = Stuck(stuck_server)
        try:
            started_s = time.monotonic()
            text = torch.cat([text, generate(remote)], dim=1)
            seconds = time.monotonic() - started_s
        finally:
            stuck.release()
        assert stuck_server.running.peer_id not in [hop.peer_id for hop in session.route]
        wait_until(lambda: num_sessions(stuck_server) == 0, "the session on the route that stalled is closed")
        text = torch.cat([text, generate(remote)], dim=1)
    assert torch.equal(text, generate(local, ids, 24))
    assert seconds < STALL_S / 2


def test_a_step_that_stalls_without_another_route_is_waited_for(path, local):
    ids = random_ids(1, 6)
    with swarm_of(path, (0, 3), (3, 6)) as (swarm, remote), remote.inference_session(max_length=64) as session:
        text = generate(remote, ids)
        stuck = Stuck(server_at(swarm, session.route[1]))
        timer = threading.Timer(1.5, stuck.release)
        timer.start()
        text = torch.cat([text, generate(remote)], dim=1)
        assert [num_sessions(server) for server in swarm.servers] == [1, 1]
    assert torch.equal(text, generate(local, ids, 16))


def test_a_batch_that_stalls_is_raced_on_another_server(path, local):
    """In forward, and in backward on a server other than the one that ran forward."""
    ids = random_ids(4, 16)

    def forward(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        return embeddings, model(inputs_embeds=embeddings, labels=ids, use_cache=False).loss

    embeddings, loss = forward(local)
    (wanted,) = torch.autograd.grad(loss, embeddings)
    with swarm_of(path, (0, 6), (0, 6)) as (swarm, remote):
        for _ in range(3):
            torch.autograd.grad(*reversed(forward(remote)))
        for is_backward in (False, True):
            before = [num_trained(server) for server in swarm.servers]
            embeddings, loss = forward(remote)
            used = [server for server, count in zip(swarm.servers, before, strict=True) if num_trained(server) > count]
            stuck = Stuck(used[0])
            started_s = time.monotonic()
            try:
                if not is_backward:
                    embeddings, loss = forward(remote)
                (ours,) = torch.autograd.grad(loss, embeddings)
            finally:
                seconds = time.monotonic() - started_s
                stuck.release()
            assert seconds < STALL_S / 2 and (
                stuck.num_stuck or not is_backward
            )  # forward may go elsewhere in any case
            assert (ours - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def num_trained(server: Any) -> int:
    return int(server.running.engine.statistics().counters.num_training_tokens)


def test_a_session_moves_off_a_server_that_leaves_while_it_generates(path, local):
    ids = random_ids(1, 6)
    times_s: list[float] = []
    threads: list[threading.Thread] = []

    class Leave:
        def put(self, _: Any) -> None:
            times_s.append(time.monotonic())
            if len(times_s) == 10:
                threads.append(leaving(server_at(swarm, session.route[0])))
            time.sleep(0.02)  # as if the model were not tiny

        def end(self) -> None:
            pass

    with swarm_of(path, *RANGES) as (swarm, remote), remote.inference_session(max_length=160) as session:
        text = generate(remote, ids, 1)
        before = session.route[0].peer_id
        text = torch.cat([text, generate(remote, num_tokens=100, streamer=Leave())], dim=1)
        threads[0].join(DRAIN_TIMEOUT_S / 4)
        assert not threads[0].is_alive(), "it left long before the end of its patience"
        assert before not in [hop.peer_id for hop in session.route]
    assert max(later - earlier for earlier, later in pairwise(times_s)) < DRAIN_TIMEOUT_S / 4
    assert torch.equal(text, generate(local, ids, 101))


def test_an_idle_session_moves_off_a_server_that_leaves(path, local):
    ids = random_ids(1, 6)
    with swarm_of(path, *RANGES) as (swarm, remote), remote.inference_session(max_length=64) as session:
        text = generate(remote, ids)
        gone = server_at(swarm, session.route[-1])
        thread = leaving(gone)
        thread.join(DRAIN_TIMEOUT_S / 4)
        assert not thread.is_alive()
        assert session.route and gone.running.peer_id not in [hop.peer_id for hop in session.route]
        session.position = 9
        assert torch.equal(generate(remote, text[:, 10:11], 4), generate(local, text[:, :11], 4)[:, 10:])


def test_a_session_stays_with_a_server_that_leaves_while_it_is_the_only_one(path, local):
    ids = random_ids(1, 6)
    with swarm_of(path, (0, 3), (3, 6)) as (swarm, remote), remote.inference_session(max_length=64):
        text = generate(remote, ids)
        thread = leaving(swarm.servers[1])
        text = torch.cat([text, generate(remote)], dim=1)
        assert thread.is_alive() and num_sessions(swarm.servers[1]) == 1
        swarm.add((3, 6))
        thread.join(DRAIN_TIMEOUT_S / 4)
        assert not thread.is_alive(), "the session moves as soon as there is another server"
        text = torch.cat([text, generate(remote)], dim=1)
    assert torch.equal(text, generate(local, ids, 24))


class Mischief:
    """Sends every push twice, and once two of them in the wrong order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_repeated = self.num_swapped = 0
        self._held: tuple[Any, Any] | None = None
        self._send = PushLink.send
        monkeypatch.setattr(PushLink, "send", lambda link, first, more: self.send(link, first, more))

    async def send(self, link: PushLink, first: Any, more: Any) -> None:
        if first.step.step_id == 2 and not self.num_swapped:
            self._held, self.num_swapped = (first, more), 1
            return
        for _ in range(2):
            await self._send(link, first, more)
            self.num_repeated += 1
        if self._held is not None:
            held, self._held = self._held, None
            await self._send(link, *held)


def test_pushes_that_come_twice_or_in_another_order_change_nothing(path, local, monkeypatch):
    x_BLD = torch.randn(1, 1400, HIDDEN, generator=torch.Generator().manual_seed(1))  # a server takes 512 at once
    with swarm_of(path, (0, 3), (3, 6)) as (_, remote):
        with remote.inference_session(max_length=1500) as session:
            wanted = session.step(x_BLD)
        mischief = Mischief(monkeypatch)
        with remote.inference_session(max_length=1500) as session:
            ours = [session.step(x_BLD[:, :1390])]
            ours += [session.step(x_BLD[:, at : at + 1]) for at in range(1390, 1400)]
        assert (torch.cat(ours, dim=1) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        assert mischief.num_swapped == 1 and mischief.num_repeated > 20
        ids = random_ids(1, 6)
        assert torch.equal(generate(remote, ids), generate(local, ids))
