"""Training over real server processes: one that is killed changes nothing but time, and no server is changed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from test_trainer import TOLERANCE, history, trained
from tiny import HIDDEN, random_ids
from torch import Tensor

from swarm import AutoDistributedModelForCausalLM
from swarm.client.routing import Hop
from swarm.link import JoinLink
from swarm.ranges import BlockRange
from swarm.server import LocalSwarm

ARGUMENTS = ("--announce-period", "3", "--cache-mib", "64", "--threads", "1", "--drain-timeout", "0.5")


@dataclass
class Herd:
    """Two copies of each block, in processes of their own; clients of them."""

    swarm: LocalSwarm
    path: Path
    clients: list[Any] = field(default_factory=list)

    def join(self, **how: Any) -> Any:
        self.clients.append(
            AutoDistributedModelForCausalLM.from_pretrained(str(self.path), join=self.swarm.link, **how)
        )
        return self.clients[-1].eval()

    def peer_id(self, index: int) -> str:
        return JoinLink.parse(self.swarm.servers[index].link).initial_peers[0].rpartition("/")[2]


@pytest.fixture
def herd(tiny_model: Any) -> Iterator[Herd]:
    path = tiny_model("llama")
    ranges = [(0, 3), (3, 6), (0, 3), (3, 6)]
    with LocalSwarm(str(path), ranges=ranges, dtype="float32", arguments=ARGUMENTS) as swarm:
        herd = Herd(swarm, path)
        yield herd
        for client in herd.clients:
            client.close()


def block_outputs(witness: Any, blocks: BlockRange) -> list[Tensor]:
    """What a server returns for each of its blocks: equal bits only from equal weights."""
    x_BLD = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return [witness.remote_blocks[number](x_BLD) for number in blocks]


def logits(client: Any) -> Tensor:
    with torch.no_grad():
        return client(random_ids(2, 7), use_cache=False).logits


def test_trainer_notices_nothing_of_killed_servers_and_no_server_notices_training(
    herd: Herd, tmp_path: Path, caplog: Any, monkeypatch: Any
) -> None:
    servers = herd.swarm.servers
    witnesses = [herd.join(allowed_servers=[herd.peer_id(index)]) for index in range(4)]
    other = herd.join()
    before = [block_outputs(*pair) for pair in zip(witnesses, (each.blocks for each in servers), strict=True)]
    before_logits = logits(other)
    whole = trained(herd.join(), tmp_path, save_strategy="no")

    remote, num_calls, killed, used = herd.join(), 0, [], []
    network = remote._swarm.connection.network
    working = network.working

    def note(hop: Hop, num_tokens: int) -> AbstractContextManager[None]:
        used.append(hop.peer_id)
        return working(hop, num_tokens)

    monkeypatch.setattr(network, "working", note)

    def kill(*_: Any) -> None:
        """Between some forwards and their backwards, end a server that ran them: of the first half, then the other."""
        nonlocal num_calls
        num_calls += 1
        if num_calls in (5, 11):
            peer_id = used[len(killed) - 2]
            killed.append(next(index for index in range(4) if herd.peer_id(index) == peer_id))
            servers[killed[-1]].kill()

    remote.lm_head.register_forward_hook(kill)
    with caplog.at_level(logging.INFO, "swarm.client"):
        again = trained(remote, tmp_path, save_strategy="no")
    assert len(killed) == 2 and num_calls > 16
    assert all(f"peer {peer_id}: " in caplog.text for peer_id in map(herd.peer_id, killed))
    for name in ("loss", "eval_loss"):
        assert history(again, name) == pytest.approx(history(whole, name), abs=TOLERANCE)
    found, wanted = get_peft_model_state_dict(again.model), get_peft_model_state_dict(whole.model)
    assert found and found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], atol=TOLERANCE, rtol=0, msg=name)

    for index in {0, 1, 2, 3} - set(killed):
        after = block_outputs(witnesses[index], servers[index].blocks)
        assert all(torch.equal(one, same) for one, same in zip(after, before[index], strict=True))
    assert torch.equal(logits(other), before_logits)
