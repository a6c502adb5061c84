"""Other ways through a swarm: overlapping ranges, parts of a server's range, the tunnel; and other architectures."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import Pair, make_pair
from tiny import load_local, random_ids

from swarm import AutoDistributedModelForCausalLM
from swarm.client import ClientConfig
from swarm.client.routing import Roster
from swarm.link import JoinLink
from swarm.model.checkpoint import CheckpointSource
from swarm.ranges import BlockRange
from swarm.server import LocalSwarm, ServerConfig
from swarm.server.local import ThreadServer


def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    return model.generate(*args, **{"max_new_tokens": 12, "do_sample": False} | kwargs)


def gradient(model: Any, ids: torch.Tensor) -> torch.Tensor:
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embeddings, use_cache=False).logits.square().mean().backward()
    model.zero_grad()
    assert embeddings.grad is not None
    return embeddings.grad


def assert_equal_models(remote: Any, local: Any, *, batch_size: int = 2) -> None:
    """Compare logits, tokens and gradients, with and without padding."""
    ids, mask = random_ids(batch_size, 9), torch.ones(batch_size, 9, dtype=torch.int64)
    with torch.no_grad():
        assert (remote(ids).logits - local(ids).logits).abs().max() <= 1e-5
    assert torch.equal(generate(remote, ids), generate(local, ids))
    ours, theirs = gradient(remote, ids), gradient(local, ids)
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max().clamp(1)
    ids[0, :3], mask[0, :3] = 0, 0
    assert torch.equal(generate(remote, ids, attention_mask=mask), generate(local, ids, attention_mask=mask))


# Ranges


@pytest.mark.parametrize(
    "ranges",
    [((0, 4), (2, 6)), ((0, 4), (2, 6), (0, 6)), ((0, 5), (1, 3), (2, 6))],
    ids=lambda ranges: " ".join(f"{start}:{end}" for start, end in ranges),
)
def test_overlapping_ranges(swarms, ranges):
    swarm, path = swarms.get("llama", ranges)
    remote, local = swarms.join(swarm, path), load_local(path)
    hops = remote.explain_route()
    assert [hop.blocks.start for hop in hops] == [0, *(hop.blocks.end for hop in hops[:-1])]
    assert_equal_models(remote, local)


def test_several_sessions_over_different_parts_of_one_server(swarms):
    """A server of all blocks runs 0:6 for one client and parts of them for others, at the same time."""
    swarm, path = swarms.get("llama", ((0, 6),))
    remote, local = swarms.join(swarm, path), load_local(path)
    parts = [remote.remote_blocks[start:end] for start, end in ((0, 2), (2, 5), (5, 6))]
    ids = random_ids(1, 7)
    with remote.inference_session(max_length=32):
        first = generate(remote, ids, max_new_tokens=4)
        with torch.no_grad():
            x_BLD = remote.model.embed_tokens(ids)
            for part in parts:
                x_BLD = part(x_BLD)
            logits = remote.lm_head(remote.model.norm(x_BLD))
        rest = generate(remote, max_new_tokens=4)
    assert (logits - local(ids).logits).abs().max() <= 1e-5
    assert torch.equal(torch.cat([first, rest], dim=1), generate(local, ids, max_new_tokens=8))


# Speed


class Brake:
    """Makes a server in this process take longer for every pass."""

    def __init__(self, server: Any) -> None:
        self._executor = server.running.engine._executor
        self._run, self.delay_s = self._executor.run, 0.0
        self._executor.run = self.run

    def run(self, group: Any) -> Any:
        time.sleep(self.delay_s)
        return self._run(group)

    def release(self) -> None:
        self._executor.run = self._run


def test_a_session_leaves_a_server_that_gets_slow_within_three_steps(tiny_model):
    path = str(tiny_model("llama"))
    ids = random_ids(1, 6)
    wanted = generate(load_local(path), ids, max_new_tokens=30)
    ranges = [(0, 3), (3, 6), (3, 6)]
    with LocalSwarm(path, ranges, dtype="float32", in_process=True) as swarm:
        remote = AutoDistributedModelForCausalLM.from_pretrained(path, join=swarm.link)
        brakes = {server.running.peer_id: Brake(server) for server in swarm.servers}
        try:
            with remote.inference_session(max_length=64) as session:
                texts = [generate(remote, ids, max_new_tokens=8)]
                slow = session.route[1].peer_id
                brakes[slow].delay_s = 0.3
                routes = []
                while sum(text.shape[1] for text in texts) < wanted.shape[1]:
                    texts.append(generate(remote, max_new_tokens=1))
                    routes.append([hop.peer_id for hop in session.route])
                assert torch.equal(torch.cat(texts, dim=1), wanted)
            assert all(slow not in route for route in routes[2:])
            route = remote.explain_route()
            assert slow not in [hop.peer_id for hop in route] and "slow: 3:6" in str(route)
            assert f"expected in all: {route.total_s * 1e3:.1f} ms" in str(route) and 0 < route.total_s < 0.3
        finally:
            for brake in brakes.values():
                brake.release()
            remote.close()


def test_a_session_stays_with_a_slow_server_that_is_the_only_one(swarms):
    swarm, path = swarms.get()
    remote, ids = swarms.join(swarm, path), random_ids(1, 6)
    brake = Brake(swarm.servers[1])
    try:
        brake.delay_s = 0.1
        with remote.inference_session(max_length=32) as session:
            text = generate(remote, ids, max_new_tokens=4)
            route = session.route
            text = torch.cat([text, generate(remote, max_new_tokens=4)], dim=1)
            assert session.route == route
        assert torch.equal(text, generate(load_local(path), ids, max_new_tokens=8))
    finally:
        brake.release()


def test_parts_of_a_batch_go_to_all_servers_that_are_equally_fast(tiny_model):
    path = str(tiny_model("llama"))
    with LocalSwarm(path, [(0, 6), (0, 6)], dtype="float32", in_process=True) as swarm:
        config = ClientConfig(initial_peers=JoinLink.parse(swarm.link).initial_peers, micro_batch_tokens=16)
        remote = AutoDistributedModelForCausalLM.from_pretrained(path, join=swarm.link, client_config=config)
        try:
            remote.explain_route()
            network = remote._swarm.connection.network
            # As if computing took long enough for chance not to decide.
            slow = [server.model_copy(update={"forward_tokens_per_s": 50.0}) for server in network._known.servers]
            network._known.roster = Roster(slow)
            ids = random_ids(8, 16)
            ours, theirs = gradient(remote, ids), gradient(load_local(path), ids)
            assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max().clamp(1)
            for server in swarm.servers:
                assert server.running.engine.statistics().counters.num_training_tokens > 0
        finally:
            remote.close()


# The tunnel


@pytest.fixture(scope="module")
def tunnelled(tiny_model: Any) -> Iterator[tuple[list[ThreadServer], str]]:
    """Two servers; the second announces no address that could be dialled."""
    path = tiny_model("llama")
    servers: list[ThreadServer] = []
    try:
        for blocks, tunnel_only in ((BlockRange(0, 3), False), (BlockRange(3, 6), True)):
            peers = JoinLink.parse(servers[0].link).initial_peers if servers else ()
            servers.append(
                ThreadServer(
                    ServerConfig(
                        source=CheckpointSource(str(path)),
                        blocks=blocks,
                        dtype="float32",
                        initial_peers=peers,
                        tunnel_only=tunnel_only,
                        drain_timeout_s=0.2,
                        cache_bytes=1 << 28,
                    )
                )
            )
            servers[-1].wait_ready()
        yield servers, str(path)
    finally:
        for server in reversed(servers):
            server.stop()


def test_a_server_that_only_the_tunnel_reaches(tunnelled):
    servers, path = tunnelled
    remote = AutoDistributedModelForCausalLM.from_pretrained(path, join=servers[0].link)
    try:
        assert [bool(hop.server.direct) for hop in remote.explain_route()] == [True, False]
        assert_equal_models(remote, load_local(path))
        ids = random_ids(1, 120)  # more than one message each way
        with torch.no_grad():
            assert (remote(ids).logits - load_local(path)(ids).logits).abs().max() <= 1e-5
    finally:
        remote.close()


def test_a_client_that_dials_nobody(swarms):
    swarm, path = swarms.get()
    remote = swarms.join(swarm, path, config={"use_direct": False})
    assert_equal_models(remote, load_local(path))


# Other architectures


@pytest.mark.parametrize("model_type", ["gpt2", "falcon"])
def test_other_architectures(swarms, model_type):
    for pair in make_pair(swarms, model_type):
        assert_equal_models(pair.remote, pair.local)
        ours = generate(pair.remote, random_ids(1, 8), num_beams=3)
        assert torch.equal(ours, generate(pair.local, random_ids(1, 8), num_beams=3))


@pytest.fixture
def hybrid(swarms: Any) -> Iterator[Pair]:
    yield from make_pair(swarms, "qwen3_next")


def test_a_hybrid_of_linear_and_full_attention(hybrid):
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert (hybrid.remote(ids).logits - hybrid.local(ids).logits).abs().max() <= 1e-5
    assert torch.equal(generate(hybrid.remote, ids), generate(hybrid.local, ids))


def test_a_hybrid_is_rolled_back_by_replaying(hybrid):
    ids, other = random_ids(1, 7), random_ids(1, 3, seed=2)
    with hybrid.remote.inference_session(max_length=64) as session:
        first = generate(hybrid.remote, ids)
        for position in (14, 9, 3):
            session.position = position
            kept = first[:, : position + 1]
            assert torch.equal(session.output_ids, kept)
            generate(hybrid.remote, other, max_new_tokens=5)
            wanted = generate(hybrid.local, torch.cat([kept, other], dim=1), max_new_tokens=5)
            assert torch.equal(session.output_ids, wanted)
            first = wanted
