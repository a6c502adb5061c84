"""Servers that do not compute what they announce are found and left, and nobody else is accused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dishonest
import pytest
import torch
from swarms_help import wait_idle
from tiny import load_local, random_ids

from swarm import AutoDistributedModelForCausalLM
from swarm.client import ClientConfig
from swarm.link import JoinLink
from swarm.server import LocalSwarm

NUM_TOKENS = 100

LIES: dict[str, Callable[[], dishonest.Lie]] = {
    "little noise": lambda: dishonest.noise(0.03),
    "noise": lambda: dishonest.noise(0.3),
    "stale states": dishonest.stale,
    "random states": dishonest.random,
}

OTHER_MODELS = {"dropped layers": dishonest.dropped, "a smaller model": dishonest.smaller}


@pytest.fixture(scope="module")
def path(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def honest(path: Path) -> Iterator[LocalSwarm]:
    """Two servers with all blocks."""
    with LocalSwarm(str(path), ranges=[(0, 6), (0, 6)], dtype="float32", in_process=True) as swarm:
        yield swarm


@pytest.fixture
def join(path: Path) -> Iterator[Callable[..., Any]]:
    """Makes clients that audit; closes them after the test."""
    models: list[Any] = []

    def make(swarm: LocalSwarm, *, seed: int = 0, **config: Any) -> Any:
        options = {"initial_peers": JoinLink.parse(swarm.link).initial_peers, "audit_fraction": 0.05} | config
        model = AutoDistributedModelForCausalLM.from_pretrained(str(path), client_config=ClientConfig(**options)).eval()
        models.append(model)
        model._swarm.connection.network.pace._rng.seed(seed)
        return model

    yield make
    for model in models:
        model.close()


def liar_in(swarm: LocalSwarm, path: Path, directory: Path, name: str, blocks: tuple[int, int]) -> Any:
    """A swarm of one server that lies, which has joined another one."""
    model = path if name in LIES else dishonest.tampered(path, directory / "other", OTHER_MODELS[name])
    return LocalSwarm(str(model), ranges=[blocks], dtype="float32", in_process=True, join=swarm.link)


def peer_id(server: Any) -> str:
    return JoinLink.parse(server.link).initial_peers[0].rpartition("/")[2]


def dislike(model: Any, servers: list[Any]) -> None:
    """Let a client believe that these servers are slow, so that it routes around them while it can."""
    network = model._swarm.connection.network
    view, slowness = network.view, {peer_id(server): 1e5 for server in servers}
    network.view = lambda attempt=None: replace(view(attempt), slowness=slowness)


def false_peers(model: Any) -> frozenset[str]:
    return model._swarm.connection.network.audits.false


def generate(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return model.generate(ids, **{"max_new_tokens": NUM_TOKENS, "do_sample": False} | kwargs)


@pytest.mark.parametrize("name", [*LIES, *OTHER_MODELS])
def test_a_server_that_lies_in_a_session_is_found_and_the_text_is_right(honest, join, path, tmp_path, name):
    ids = random_ids(1, 8, seed=7)
    with liar_in(honest, path, tmp_path, name, (2, 4)) as lying:
        if name in LIES:
            dishonest.corrupt(lying.servers[0], LIES[name]())
        remote = join(honest)
        remote.explain_route()
        dislike(remote, honest.servers)
        assert peer_id(lying.servers[0]) in {hop.peer_id for hop in remote.explain_route()}
        ours = generate(remote, ids)
        assert false_peers(remote) == {peer_id(lying.servers[0])}
        assert torch.equal(ours, generate(load_local(path), ids))
        explained = str(remote.explain_route())
        assert "was found to compute something else" in explained and peer_id(lying.servers[0])[-8:] in explained
    wait_idle(honest)


@pytest.mark.parametrize("name", ["noise", "dropped layers"])
def test_a_server_that_lies_in_training_is_found_and_the_gradients_are_right(honest, join, path, tmp_path, name):
    """Of six micro-batches, each asked for forward and backward, half are audited."""
    local, batch = load_local(path), random_ids(6, 8, seed=3)

    def gradient(model: Any) -> torch.Tensor:
        x_BLD = model.get_input_embeddings()(batch).detach().requires_grad_()
        return torch.autograd.grad(model(inputs_embeds=x_BLD, labels=batch, use_cache=False).loss, x_BLD)[0]

    with liar_in(honest, path, tmp_path, name, (2, 4)) as lying:
        if name in LIES:
            dishonest.corrupt(lying.servers[0], LIES[name]())
        remote = join(honest, audit_fraction=0.5, micro_batch_tokens=8)
        remote.explain_route()
        dislike(remote, honest.servers)
        gradient(remote)
        assert false_peers(remote) == {peer_id(lying.servers[0])}
        assert (gradient(remote) - gradient(local)).abs().max() <= 1e-4
    wait_idle(honest)


def test_a_false_auditor_is_found_instead_of_the_honest_server(honest, join, path, tmp_path):
    """It is the only other one with the precision of the server that is audited, so it is chosen first."""
    with (
        LocalSwarm(str(path), ranges=[(0, 6)], dtype="bfloat16", in_process=True, join=honest.link) as audited,
        LocalSwarm(str(path), ranges=[(0, 6)], dtype="bfloat16", in_process=True, join=honest.link) as lying,
    ):
        dishonest.corrupt(lying.servers[0], dishonest.noise(0.5))
        remote = join(honest)
        remote.explain_route()
        dislike(remote, [*honest.servers, *lying.servers])
        assert [hop.peer_id for hop in remote.explain_route()] == [peer_id(audited.servers[0])]
        generate(remote, random_ids(2, 8))
        assert false_peers(remote) == {peer_id(lying.servers[0])}
    wait_idle(honest)


def test_without_a_third_server_nobody_is_excluded_and_the_doubt_is_told(path, join):
    with LocalSwarm(str(path), ranges=[(0, 6), (0, 6)], dtype="float32", in_process=True) as swarm:
        dishonest.corrupt(swarm.servers[0], dishonest.noise(0.3))
        remote = join(swarm)
        generate(remote, random_ids(1, 8))
        assert not false_peers(remote)
        explained = str(remote.explain_route())
        assert "in doubt" in explained and all(peer_id(each)[-8:] in explained for each in swarm.servers)


def test_what_nobody_else_serves_is_said_to_be_unaudited(path, join):
    with LocalSwarm(str(path), ranges=[(0, 3), (3, 6), (0, 3)], dtype="float32", in_process=True) as swarm:
        remote, ids = join(swarm), random_ids(1, 8)
        assert torch.equal(generate(remote, ids), generate(load_local(path), ids))
        assert str(remote.explain_route()).count("not audited: no other server has all of 3:6") == 1
        wait_idle(swarm)
        assert not false_peers(remote)


def test_a_stream_that_was_shown_goes_on_with_the_right_states(honest, join, path, tmp_path):
    """What was shown stays; each later token is what the local model makes of all tokens before it."""
    shown: list[int] = []

    class Shown:
        def put(self, tokens: torch.Tensor) -> None:
            shown.extend(tokens.flatten().tolist())

        def end(self) -> None:
            pass

    with liar_in(honest, path, tmp_path, "noise", (2, 4)) as lying:
        dishonest.corrupt(lying.servers[0], dishonest.noise(3.0))
        remote = join(honest)
        remote.explain_route()
        dislike(remote, honest.servers)
        ours = generate(remote, random_ids(1, 8), streamer=Shown())
        assert false_peers(remote) == {peer_id(lying.servers[0])}
    assert ours[0].tolist() == shown
    with torch.no_grad():
        wanted = load_local(path)(ours).logits[0].argmax(-1)
    assert torch.equal(ours[0, -10:], wanted[-11:-1])
    wait_idle(honest)


def test_sampling_draws_the_same_numbers_when_it_begins_again(honest, join, path, tmp_path):
    ids = random_ids(1, 8)
    with liar_in(honest, path, tmp_path, "random states", (0, 2)) as lying:
        dishonest.corrupt(lying.servers[0], dishonest.random())
        remote = join(honest)
        remote.explain_route()
        dislike(remote, honest.servers)
        torch.manual_seed(5)
        ours = generate(remote, ids, do_sample=True)
        assert false_peers(remote) == {peer_id(lying.servers[0])}
    torch.manual_seed(5)
    assert torch.equal(ours, generate(load_local(path), ids, do_sample=True))
    wait_idle(honest)


@pytest.mark.parametrize(("dtype", "quantization"), [("bfloat16", "none"), ("float32", "int8"), ("bfloat16", "int8")])
def test_honest_servers_of_any_precision_are_not_accused(honest, join, path, dtype, quantization):
    """Beams, padding and a session that goes back included."""
    other = {"dtype": dtype, "quantization": quantization, "in_process": True, "join": honest.link}
    with LocalSwarm(str(path), ranges=[(0, 2), (2, 6), (0, 6)], **other) as mixed:
        remote = join(honest, audit_fraction=1.0)
        remote.explain_route()
        dislike(remote, [*honest.servers, mixed.servers[2]])
        ids, mask = random_ids(3, 12, seed=1), torch.ones(3, 12, dtype=torch.int64)
        ids[1, :5], mask[1, :5] = 0, 0
        generate(remote, ids, attention_mask=mask)
        generate(remote, ids[:2], num_beams=2, max_new_tokens=30)
        with remote.inference_session(max_length=128) as session:
            generate(remote, ids[:1], max_new_tokens=30)
            session.position = 20
            generate(remote, ids[:1, :3], max_new_tokens=30)
        x_BLD = remote.get_input_embeddings()(ids).detach().requires_grad_()
        remote(inputs_embeds=x_BLD, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        network = remote._swarm.connection.network
        assert not network.audits.remarks()
        assert network.pace.num_audits > 3
    wait_idle(honest)
