"""Servers that die, hang or are missing: the client carries on elsewhere with equal results, or says what it lacks."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from swarms_help import wait_until
from tiny import NUM_BLOCKS, load_local, random_ids

from swarm import PROTOCOL_VERSION, AutoDistributedModelForCausalLM
from swarm.client import ClientConfig
from swarm.errors import NoRoute
from swarm.identity import TLS_NAME, certificate_pem
from swarm.link import JoinLink
from swarm.rpc import open_channel
from swarm.server import LocalSwarm
from swarm.v1 import blocks_pb2 as pb
from swarm.v1 import blocks_pb2_grpc as pb_grpc

ARGUMENTS = ("--announce-period", "3", "--cache-mib", "64", "--threads", "1", "--drain-timeout", "0.5")
NUM_TOKENS = 16


class Herd:
    """Processes with more copies of each block than a kill takes away; replacements start while tests go on."""

    def __init__(self, swarm: LocalSwarm, pool: ThreadPoolExecutor) -> None:
        self.swarm = swarm
        self._pool = pool
        self._starting: list[Future[Any]] = []

    def kill(self, peer_id: str) -> None:
        """End the server of this peer without a word, and start another one for its blocks."""
        victim = next(server for server in self._ready() if f"/p2p/{peer_id}" in _address(server))
        victim.kill()
        self.replace(victim)

    def replace(self, server: Any) -> None:
        self._starting.append(self._pool.submit(self.swarm.add, (server.blocks.start, server.blocks.end)))

    def wait_redundant(self) -> None:
        """Wait until the loss of any server leaves all blocks covered."""
        while not self._redundant():
            self._starting.pop(0).result()

    def server_of(self, peer_id: str) -> Any:
        return next(server for server in self._ready() if f"/p2p/{peer_id}" in _address(server))

    def _ready(self) -> list[Any]:
        return [server for server in self.swarm.servers if server.alive and server.link]

    def _redundant(self) -> bool:
        counts = [sum(block in server.blocks for server in self._ready()) for block in range(NUM_BLOCKS)]
        return min(counts) >= 2


def _address(server: Any) -> str:
    return JoinLink.parse(server.link).initial_peers[0]


@pytest.fixture(scope="module")
def path(tiny_model: Callable[..., Path]) -> str:
    return str(tiny_model("llama"))


@pytest.fixture(scope="module")
def local(path: str) -> Any:
    return load_local(Path(path))


@pytest.fixture(scope="module")
def herd(path: str) -> Iterator[Herd]:
    ranges = [(0, 6), (0, 3), (3, 6), (0, 6)]
    with (
        LocalSwarm(path, ranges=ranges, dtype="float32", arguments=ARGUMENTS) as swarm,
        ThreadPoolExecutor(max_workers=2) as pool,
    ):
        yield Herd(swarm, pool)


def join(path: str, link: str, **config: Any) -> Any:
    options = {"initial_peers": JoinLink.parse(link).initial_peers, "silence_s": 1.0} | config
    return AutoDistributedModelForCausalLM.from_pretrained(path, client_config=ClientConfig(**options)).eval()


@pytest.fixture(scope="module")
def remote(herd: Herd, path: str) -> Iterator[Any]:
    model = join(path, herd.swarm.link, micro_batch_tokens=16)
    yield model
    model.close()


class At:
    """A streamer that does something when the given token comes."""

    def __init__(self, token: int, action: Callable[[], None]) -> None:
        self.token, self.action = token, action
        self.count = -1  # the prompt is put first

    def put(self, _: Any) -> None:
        if self.count == self.token:
            self.action()
        self.count += 1

    def end(self) -> None:
        pass


def generate(model: Any, ids: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
    return model.generate(ids, **{"max_new_tokens": NUM_TOKENS, "do_sample": False} | kwargs)


@torch.enable_grad()  # also from within generate
def forward(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    return embeddings, model(inputs_embeds=embeddings, labels=ids, use_cache=False).loss


@torch.enable_grad()
def backward(embeddings: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    (gradient,) = torch.autograd.grad(loss, embeddings)
    return gradient


def gradient_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return backward(*forward(model, ids))


def assert_gradient(ours: torch.Tensor, local: Any, ids: torch.Tensor) -> None:
    assert (ours - gradient_of(local, ids)).abs().max() <= 1e-4


@pytest.mark.parametrize("seed", range(20))
def test_a_server_killed_at_a_random_token_changes_neither_tokens_nor_gradients(herd, remote, local, seed):
    """Even seeds kill between a forward and its backward, odd ones while both run in another thread."""
    herd.wait_redundant()
    rng = random.Random(seed)
    ids, batch = random_ids(1, 8, seed=seed), random_ids(6, 8, seed=100 + seed)
    gradients: list[torch.Tensor] = []
    killed: list[str] = []

    with remote.inference_session(max_length=64) as session:

        def kill() -> None:
            killed.append(rng.choice(session.route).peer_id)
            herd.kill(killed[0])

        def between() -> None:
            embeddings, loss = forward(remote, batch)
            kill()
            gradients.append(backward(embeddings, loss))

        started = threading.Event()
        # Each run of the blocks is three micro-batches: the kill hits some of them on their way.
        hook = remote.model.norm.register_forward_pre_hook(lambda *_: started.set()) if seed % 2 else None

        def during() -> None:
            assert started.wait(60)
            kill()

        with ThreadPoolExecutor(max_workers=1) as trainer:
            training = [trainer.submit(gradient_of, remote, batch) for _ in range(4 if seed % 2 else 0)]
            action = during if seed % 2 else between
            ours = generate(remote, ids, streamer=At(rng.randrange(NUM_TOKENS), action))
            gradients += [each.result(120) for each in training]
        if hook is not None:
            hook.remove()
    assert killed
    assert torch.equal(ours, generate(local, ids))
    assert len(gradients) == (4 if seed % 2 else 1)
    for gradient in gradients:
        assert_gradient(gradient, local, batch)


def test_a_server_killed_during_beam_search(herd, remote, local):
    herd.wait_redundant()
    ids = random_ids(2, 8, seed=50)
    killed: list[str] = []

    with remote.inference_session(max_length=64) as session:

        def kill(*_: Any) -> None:
            if session.position > 14 and not killed:
                killed.append(session.route[0].peer_id)
                herd.kill(killed[0])

        hook = remote.model.norm.register_forward_hook(kill)
        ours = generate(remote, ids, num_beams=4)
        hook.remove()
    assert killed and torch.equal(ours, generate(local, ids, num_beams=4))


def test_a_server_killed_with_a_padded_batch(herd, remote, local):
    herd.wait_redundant()
    ids, mask = random_ids(3, 8, seed=51), torch.ones(3, 8, dtype=torch.int64)
    ids[1, :4], mask[1, :4] = 0, 0
    killed: list[str] = []

    with remote.inference_session(max_length=64) as session:

        def kill(*_: Any) -> None:
            if session.position == 12:
                killed.append(session.route[0].peer_id)
                herd.kill(killed[0])

        hook = remote.model.norm.register_forward_hook(kill)
        ours = generate(remote, ids, attention_mask=mask)
        hook.remove()
    assert killed and torch.equal(ours, generate(local, ids, attention_mask=mask))


def test_a_server_that_hangs_is_left(herd, remote, local):
    """It keeps its connections open and answers nothing."""
    herd.wait_redundant()
    ids, batch = random_ids(1, 8, seed=52), random_ids(2, 8, seed=53)
    paused: list[Any] = []

    with remote.inference_session(max_length=64) as session:

        def pause() -> None:
            paused.append(herd.server_of(session.route[0].peer_id))
            paused[0].pause()

        try:
            ours = generate(remote, ids, streamer=At(5, pause))
            gradient = gradient_of(remote, batch)
        finally:
            for server in paused:
                server.resume()
    assert paused and torch.equal(ours, generate(local, ids))
    assert_gradient(gradient, local, batch)


def test_a_server_that_hangs_before_a_session_opens_costs_it_no_more_than_a_late_step(herd, path, local):
    """How long opening and a first prefill take is known from earlier sessions, and raced as any step is."""
    herd.wait_redundant()
    ids = random_ids(1, 8, seed=54)
    client = join(path, herd.swarm.link, silence_s=20.0, connect_timeout_s=20.0)
    try:
        for _ in range(16):
            generate(client, ids, max_new_tokens=2)
        server = herd.server_of(client.explain_route()[0].peer_id)
        server.pause()
        try:
            began_s = time.monotonic()
            ours = generate(client, ids)
            seconds = time.monotonic() - began_s
        finally:
            server.resume()
    finally:
        client.close()
    assert torch.equal(ours, generate(local, ids))
    assert seconds < 12.0  # openings are given up after more than 20


def test_a_client_that_is_gone_leaves_no_session(herd, path):
    """The server notices that the connection broke, also where nobody closed it."""
    herd.wait_redundant()
    client = join(path, herd.swarm.link)
    session = client.inference_session(max_length=32)
    session.step(torch.zeros(1, 4, client.config.hidden_size))
    server = session.route[0].server
    assert num_sessions(server) == 1
    client.close()
    wait_until(lambda: num_sessions(server) == 0, "the session of the client that left is closed")


def num_sessions(server: Any) -> int:
    """How many sessions a server says that it holds."""

    async def describe() -> int:
        pem = certificate_pem(server.tls_certificate)
        async with open_channel(server.direct[0], pem, TLS_NAME) as channel:
            request = pb.DescribeRequest(protocol_version=PROTOCOL_VERSION)
            answer = await pb_grpc.BlocksStub(channel).Describe(request, timeout=20)
        return answer.load.num_sessions

    return asyncio.run(describe())


def test_no_route_names_the_missing_blocks_and_the_session_goes_on_when_they_are_back(path, local):
    ids = random_ids(1, 8)
    embeddings = local.get_input_embeddings()(ids).detach()
    with LocalSwarm(path, ranges=[(0, 3), (3, 6)], dtype="float32", arguments=ARGUMENTS) as swarm:
        remote = join(path, swarm.link, route_timeout_s=2.0)
        with remote.inference_session(max_length=64):
            first = generate(remote, ids, max_new_tokens=4)
            swarm.servers[1].kill()
            with pytest.raises(NoRoute, match=r"blocks 3-5 of 0:6"):
                generate(remote, None, max_new_tokens=4)
            with pytest.raises(NoRoute, match=r"blocks 3-5"):
                remote(inputs_embeds=embeddings, use_cache=False)
            swarm.add((3, 6))
            rest = generate(remote, None, max_new_tokens=4)
        remote.close()
    assert torch.equal(torch.cat([first, rest], dim=1), generate(local, ids, max_new_tokens=8))
