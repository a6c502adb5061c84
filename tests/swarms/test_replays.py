"""What a lost server costs those that are well: they run again only what those after them lack."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import HIDDEN, load_local

from swarm import AutoDistributedModelForCausalLM
from swarm.errors import PeerUnavailable
from swarm.server import LocalSwarm

RANGES = ((0, 2), (0, 2), (2, 4), (2, 4), (4, 6), (4, 6))
PROMPT_TOKENS, STEPS = 700, 3
"""The prompt goes in parts: a server takes 512 tokens at once."""


@pytest.fixture(scope="module")
def path(tiny_model: Callable[..., Path]) -> str:
    return str(tiny_model("llama"))


@pytest.fixture(scope="module")
def swarm(path: str) -> Iterator[LocalSwarm]:
    with LocalSwarm(path, RANGES, dtype="float32", in_process=True, settings={"cache_bytes": 1 << 26}) as swarm:
        yield swarm


def num_run(server: Any) -> int:
    """Tokens that a server has run for sessions so far."""
    counters = server.running.engine.statistics().counters
    return int(counters.num_prefill_tokens + counters.num_decode_tokens)


def through_local(path: str, x_BLD: torch.Tensor, mask_BL: torch.Tensor | None) -> torch.Tensor:
    model = load_local(Path(path)).model
    model.norm = torch.nn.Identity()
    with torch.no_grad():
        return model(inputs_embeds=x_BLD, attention_mask=mask_BL, use_cache=False).last_hidden_state


@pytest.mark.parametrize(("lost", "runs_all"), [(0, (True, False, False)), (1, (True, True, False)), (2, (True,) * 3)])
@pytest.mark.parametrize("padded", [False, True])
def test_servers_that_are_well_run_again_only_what_those_after_them_lack(swarm, path, lost, runs_all, padded):
    """Without its server, the first hop alone runs the prompt again; where a later one is lost, those before it do too,
    for it is their output that the new one needs."""
    x_BLD = torch.randn(2, PROMPT_TOKENS + STEPS, HIDDEN, generator=torch.Generator().manual_seed(lost))
    mask_BL = torch.ones(2, PROMPT_TOKENS + STEPS, dtype=torch.int64)
    mask_BL[0, :5] = 0 if padded else 1
    remote = AutoDistributedModelForCausalLM.from_pretrained(path, join=swarm.link).eval()
    try:
        with remote.inference_session(max_length=1024) as session:
            mask = mask_BL if padded else None

            def step(start: int, end: int) -> torch.Tensor:
                return session.step(x_BLD[:, start:end], attention_mask=None if mask is None else mask[:, start:end])

            outputs = [step(0, PROMPT_TOKENS)]
            before = [hop.peer_id for hop in session.route]
            servers = {each.running.peer_id: each for each in swarm.servers}
            counts = {peer_id: num_run(each) for peer_id, each in servers.items()}
            servers[before[lost]].running.sessions.fail_all(PeerUnavailable("it is gone"))
            outputs += [step(at, at + 1) for at in range(PROMPT_TOKENS, PROMPT_TOKENS + STEPS)]
            after = [hop.peer_id for hop in session.route]
            ran = [num_run(servers[peer_id]) - counts[peer_id] for peer_id in after]
    finally:
        remote.close()
    assert after[lost] != before[lost] and after[lost + 1 :] == before[lost + 1 :]  # those before it run again anyway
    least = [2 * (PROMPT_TOKENS * of_all + STEPS) for of_all in runs_all]
    # Those before the lost one may have run the step that failed before they knew.
    assert all(count in (few, few + 2 * (hop < lost)) for hop, (count, few) in enumerate(zip(ran, least, strict=True)))
    real = mask_BL.bool()
    wanted = through_local(path, x_BLD, mask_BL if padded else None)
    assert (torch.cat(outputs, dim=1) - wanted)[real].abs().max() <= 1e-5 * wanted[real].abs().max()
