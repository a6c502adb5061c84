"""The first and the last blocks of a real swarm are run by trusted servers, or by nobody."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from swarms_help import wait_idle
from tiny import load_local, random_ids

from swarm import AutoDistributedModelForCausalLM
from swarm.client import ClientConfig
from swarm.errors import NoRoute
from swarm.link import JoinLink
from swarm.server import LocalSwarm

WHOLE, REST = 0, 1


@dataclass(frozen=True)
class Mixed:
    """Servers of blocks 0:6 and 2:6 in this process, and one of 0:2 in a process of its own, which can be killed."""

    path: Path
    threads: LocalSwarm
    process: LocalSwarm

    @property
    def first(self) -> str:
        return JoinLink.parse(self.process.link).initial_peers[0].rpartition("/p2p/")[2]

    def peer_id(self, index: int) -> str:
        return self.threads.servers[index].running.peer_id

    def num_tokens(self, index: int) -> int:
        """What a server in this process has computed."""
        counters = self.threads.servers[index].running.engine.statistics().counters
        return counters.num_decode_tokens + counters.num_prefill_tokens + counters.num_training_tokens

    def join(self, **options: Any) -> Any:
        config = ClientConfig(
            initial_peers=JoinLink.parse(self.threads.link).initial_peers, route_timeout_s=0.5, silence_s=0.5
        )
        return AutoDistributedModelForCausalLM.from_pretrained(str(self.path), client_config=config, **options).eval()


@pytest.fixture(scope="module")
def mixed(tiny_model: Callable[..., Path]) -> Iterator[Mixed]:
    path = tiny_model("llama")
    with (
        LocalSwarm(str(path), ranges=[(0, 6), (2, 6)], dtype="float32", in_process=True) as threads,
        LocalSwarm(
            str(path), ranges=[(0, 2)], dtype="float32", join=threads.link, arguments=("--cache-mib", "64")
        ) as process,
    ):
        yield Mixed(path, threads, process)


def test_trusted_servers_run_the_ends_and_when_one_dies_calls_fail_rather_than_go_elsewhere(mixed):
    remote, local = mixed.join(trusted_servers=[mixed.first, mixed.peer_id(REST)]), load_local(mixed.path)
    ids = random_ids(1, 8)
    assert "trusted servers run all blocks before 2 and from 2 on" in str(remote.explain_route())
    embeddings = remote.get_input_embeddings()(ids).detach().requires_grad_()
    loss = remote(inputs_embeds=embeddings, use_cache=False).logits.square().mean()
    with remote.inference_session(max_length=64) as session:
        ours = remote.generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(ours, local.generate(ids, max_new_tokens=4, do_sample=False))
        assert [hop.peer_id for hop in session.route] == [mixed.first, mixed.peer_id(REST)]
        mixed.process.servers[0].kill()
        with pytest.raises(NoRoute, match="no server of trusted_servers is available for the first blocks of 0:6"):
            remote.generate(ours, max_new_tokens=4, do_sample=False)
    for call in (loss.backward, lambda: remote(ids, use_cache=False)):
        with pytest.raises(NoRoute, match="for the first blocks of 0:6"):
            call()
    remote.close()
    assert mixed.num_tokens(REST) > 0 and mixed.num_tokens(WHOLE) == 0, "another server was asked"
    wait_idle(mixed.threads)


def test_one_trusted_server_runs_all_that_it_holds_or_as_many_blocks_as_asked_for(mixed):
    local, ids = load_local(mixed.path), random_ids(1, 8)
    expected = local.generate(ids, max_new_tokens=4, do_sample=False)
    for num_blocks in (None, 1):
        remote = mixed.join(trusted_servers=[mixed.peer_id(WHOLE)], trusted_blocks=num_blocks)
        hops = remote.explain_route()
        assert (hops[0].peer_id, hops[-1].peer_id) == (mixed.peer_id(WHOLE),) * 2
        assert len(hops) == 1 or num_blocks is not None
        assert torch.equal(remote.generate(ids, max_new_tokens=4, do_sample=False), expected)
        remote.close()
    wait_idle(mixed.threads)


def test_an_empty_list_trusts_nobody(mixed):
    remote = mixed.join(trusted_servers=[])
    with pytest.raises(NoRoute, match="for the first and the last blocks of 0:6"):
        remote(random_ids(1, 8), use_cache=False)
    remote.close()
