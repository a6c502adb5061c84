"""Servers that go to other blocks: what runs goes on with equal results, and gaps are filled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from swarms_help import wait_until
from tiny import load_local, random_ids

from swarm import AutoDistributedModelForCausalLM
from swarm.client import ClientConfig
from swarm.errors import BadRequest, ResourceError
from swarm.link import JoinLink
from swarm.ranges import BlockRange
from swarm.server import LocalSwarm, moving
from swarm.server.rebalancing import Population, own_move

RANGES = [(0, 3), (0, 3), (3, 6)]
NUM_TOKENS = 16


@pytest.fixture(scope="module")
def path(tiny_model: Callable[..., Path]) -> str:
    return str(tiny_model("llama"))


@pytest.fixture(scope="module")
def local(path: str) -> Any:
    return load_local(Path(path))


def join(path: str, link: str, **config: Any) -> Any:
    options = {"initial_peers": JoinLink.parse(link).initial_peers} | config
    return AutoDistributedModelForCausalLM.from_pretrained(path, client_config=ClientConfig(**options)).eval()


def generate(model: Any, ids: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
    return model.generate(ids, **{"max_new_tokens": NUM_TOKENS, "do_sample": False} | kwargs)


@pytest.mark.parametrize("room", [True, False], ids=["loading first", "leaving first"])
def test_a_generation_goes_on_while_a_server_of_its_route_moves(path, local, room, monkeypatch):
    """The first server goes to blocks 3:6, where it serves the rest of the text after the last one has left as well."""
    monkeypatch.setattr(moving, "fits", lambda *_, **__: room)
    ids = random_ids(1, 8)
    with LocalSwarm(path, RANGES, dtype="float32", in_process=True) as swarm:
        remote = join(path, swarm.link)
        try:
            servers = {server.running.peer_id: server for server in swarm.servers}
            with remote.inference_session(max_length=64) as session:
                text = generate(remote, ids, max_new_tokens=5)
                mover = servers[session.route[0].peer_id]
                mover.move((3, 6))
                assert mover.running.blocks == BlockRange(3, 6)
                text = torch.cat([text, generate(remote, None, max_new_tokens=5)], dim=1)
                assert mover.running.peer_id != session.route[0].peer_id
                swarm.servers[2].stop()
                text = torch.cat([text, generate(remote, None, max_new_tokens=5)], dim=1)
                assert session.route[1].peer_id == mover.running.peer_id
            assert torch.equal(text, generate(local, ids, max_new_tokens=15))
        finally:
            remote.close()


def test_a_batch_that_runs_while_its_server_moves_has_equal_gradients(path, local):
    ids = random_ids(4, 8)
    with LocalSwarm(path, RANGES, dtype="float32", in_process=True) as swarm:
        remote = join(path, swarm.link)
        try:
            ours, wanted = [_forward(each, ids) for each in (remote, local)]
            swarm.servers[0].move((3, 6))
            swarm.servers[2].move((0, 3))
            ours, wanted = (torch.autograd.grad(loss, x_BLD)[0] for x_BLD, loss in (ours, wanted))
            assert (ours - wanted).abs().max() <= 1e-4
        finally:
            remote.close()


def _forward(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x_BLD = model.get_input_embeddings()(ids).detach().requires_grad_()
    return x_BLD, model(inputs_embeds=x_BLD, labels=ids, use_cache=False).loss


def test_a_server_that_cannot_move_stays_as_it_is(path, local):
    with LocalSwarm(path, [(0, 6)], dtype="float32", in_process=True) as swarm:
        with pytest.raises(BadRequest, match="outside the model, which has 6 blocks"):
            swarm.servers[0].move((4, 8))
        remote = join(path, swarm.link)
        try:
            assert torch.equal(generate(remote, random_ids(1, 4)), generate(local, random_ids(1, 4)))
        finally:
            remote.close()


def test_a_server_that_chose_its_blocks_fills_the_gap_of_one_that_leaves(path, local, monkeypatch):
    """While a client generates, which waits meanwhile and goes on; servers that were told their blocks stay there."""
    monkeypatch.setattr(moving, "CHECKS_PER_PERIOD", 30)
    ids = random_ids(1, 8)
    with LocalSwarm(path, RANGES[1:], dtype="float32", in_process=True) as swarm:
        chooser = swarm.add(3)
        there = chooser.blocks
        assert there in (BlockRange(0, 3), BlockRange(3, 6))
        stays, leaves = sorted(swarm.servers[:2], key=lambda server: server.blocks != there)
        remote = join(path, swarm.link)
        try:
            with remote.inference_session(max_length=64):
                text = generate(remote, ids, max_new_tokens=5)
                leaves.stop()
                text = torch.cat([text, generate(remote, None, max_new_tokens=5)], dim=1)
                assert (stays.blocks, chooser.blocks) == (there, leaves.blocks)
                chooser.move((0, 6))
                stays.stop()
                text = torch.cat([text, generate(remote, None, max_new_tokens=5)], dim=1)
            assert torch.equal(text, generate(local, ids, max_new_tokens=15))
        finally:
            remote.close()


def test_a_killed_server_is_replaced_by_another_process(path, local):
    ids = random_ids(1, 8)
    arguments = ("--announce-period", "2", "--cache-mib", "64", "--threads", "1", "--drain-timeout", "0.5")
    with LocalSwarm(path, RANGES[1:], dtype="float32", arguments=arguments) as swarm:
        chooser = swarm.add(3)
        killed = next(server for server in swarm.servers[:2] if server.blocks != chooser.blocks)
        remote = join(path, swarm.link)
        try:
            with remote.inference_session(max_length=64):
                text = generate(remote, ids, max_new_tokens=5)
                killed.kill()
                text = torch.cat([text, generate(remote, None, max_new_tokens=5)], dim=1)
            assert torch.equal(text, generate(local, ids, max_new_tokens=10))
            wait_until(lambda: chooser.blocks == killed.blocks, "the process says where it is")
            with pytest.raises(ResourceError, match="Did not move: block range 4:9 is outside the model"):
                chooser.move((4, 9))
            chooser.move((killed.blocks.start, killed.blocks.end))  # where it is already
        finally:
            remote.close()


def test_servers_that_choose_their_blocks_come_to_rest(path, monkeypatch):
    """However often they look: nobody goes back to where it has been."""
    looks: list[tuple[int, int]] = []

    def counting(population: Population, server: int) -> BlockRange | None:
        looks.append((int(population.start_S[server]), int(population.end_S[server])))
        return own_move(population, server)

    monkeypatch.setattr(moving, "CHECKS_PER_PERIOD", 60)
    monkeypatch.setattr(moving, "own_move", counting)
    moves: list[BlockRange] = []
    with LocalSwarm(path, [(0, 6)], dtype="float32", in_process=True, settings={"on_moved": moves.append}) as swarm:
        for _ in range(4):
            swarm.add(3)
        seen, num_moves = len(looks), -1
        while len(moves) > num_moves:  # each round as long as it takes for everybody to look ten times or so
            seen, num_moves = len(looks), len(moves)
            wait_until(lambda seen=seen: len(looks) >= seen + 40, "servers look around", timeout_s=60)
            assert num_moves <= 4, f"they go round in circles: {moves}"
