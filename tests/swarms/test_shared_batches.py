"""Batches go over all routes that there are, by what each was measured to run."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import load_local, random_ids

from swarm import AutoDistributedModelForCausalLM
from swarm.server import LocalSwarm
from swarm.server.hardware import Speed

SLOW_S = 1.0
"""What the slow server takes longer for each piece of training work; the fast one takes milliseconds."""

SPEED = Speed(decode_tokens_per_s=100.0, forward_tokens_per_s=5000.0)
"""What both say."""


def num_trained(server: Any) -> int:
    return int(server.running.engine.statistics().counters.num_training_tokens)


def test_a_batch_is_shared_by_default_and_the_next_one_by_what_was_measured(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both servers announce the same; one of them is slow."""
    monkeypatch.setattr("swarm.server.tenure.measure_speed", lambda span: SPEED)
    path = str(tiny_model("llama"))
    ids = random_ids(8, 128)

    def gradient(model: Any) -> torch.Tensor:
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        loss = model(inputs_embeds=embeddings, labels=ids, use_cache=False).loss
        (found,) = torch.autograd.grad(loss, embeddings)
        return found

    wanted = gradient(load_local(Path(path)))
    with LocalSwarm(path, [(0, 6), (0, 6)], dtype="float32", in_process=True) as swarm:
        slow, fast = swarm.servers
        engine = slow.running.engine
        run = engine._run_training

        def run_late(job: Any) -> None:
            time.sleep(SLOW_S)
            run(job)

        engine._run_training = run_late
        remote = AutoDistributedModelForCausalLM.from_pretrained(path, join=swarm.link).eval()
        try:
            counts = []
            for _ in range(2):
                before = num_trained(slow), num_trained(fast)
                assert (gradient(remote) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
                counts.append((num_trained(slow) - before[0], num_trained(fast) - before[1]))
        finally:
            engine._run_training = run
            remote.close()
    assert min(counts[0]) > 0, "both have a part of the first one"
    assert counts[1][1] > 2 * counts[1][0], f"the faster one does most of the second one: {counts}"
