"""What is told of a server that runs, while it runs."""

from __future__ import annotations

import pytest
import torch
from swarms_help import wait_idle, wait_until
from tiny import HIDDEN, NUM_BLOCKS, random_ids

from swarm.errors import BadRequest
from swarm.server import LocalSwarm, engine, overload
from swarm.server.local import ProcessServer
from swarm.server.scheduler import Kind

HALVES = ((0, 3), (3, 6))


def test_a_swarm_in_this_process_tells_what_it_does(llama, swarms):
    with LocalSwarm(str(llama.path), HALVES, dtype="float32", in_process=True) as swarm:
        before = swarm.statistics()
        model = swarms.join(swarm, llama.path)
        with model.inference_session(max_length=64):
            model.generate(random_ids(1, 20), max_new_tokens=5, do_sample=False)
            during = swarm.statistics()
        for old, now, blocks in zip(before, during, HALVES, strict=True):
            assert old.tenure is not None and now.tenure is not None
            assert (now.tenure.blocks.start, now.tenure.blocks.end) == blocks
            assert old.tenure.engine.counters.num_decode_tokens == 0 < now.tenure.engine.counters.num_decode_tokens
            assert now.tenure.engine.queue_s[Kind.PREFILL].count >= 1
            assert now.tenure.engine.tokens_per_s[Kind.DECODE] > 0
            (session,) = now.tenure.sessions.sessions
            assert session.num_tokens >= 20 and session.num_pages >= 2 and session.age_s >= session.idle_s >= 0
            assert now.tenure.sessions.num_used_pages >= 2 and now.num_connections >= 0
            assert all(name.startswith("late_") for name in overload.overload(old, now)), "there is room for all"
        wait_idle(swarm)
        last = swarm.servers[1].running
        wait_until(lambda: last.service.announced()["bytes_per_s"] > 0, "the line to another server was measured")


def test_processes_of_their_own_say_where_else_to_look():
    with pytest.raises(BadRequest, match="--metrics-port"):
        ProcessServer.__new__(ProcessServer).statistics()


def test_a_server_whose_cache_is_full_says_so_in_a_line(swarms, tiny_model, monkeypatch, caplog):
    monkeypatch.setattr(engine, "MAX_PAGES_WAIT_S", 0.2)
    monkeypatch.setattr(overload, "PERIOD_S", 0.5)
    path = tiny_model("llama")
    settings = {"cache_bytes": 128 * NUM_BLOCKS * 2 * 2 * 16 * 4}  # 128 tokens
    whole = (0, NUM_BLOCKS)
    with LocalSwarm(str(path), [whole, whole], dtype="float32", in_process=True, settings=settings) as swarm:
        model = swarms.join(swarm, path)
        with model.inference_session(max_length=128) as first, model.inference_session(max_length=128) as second:
            for session in (first, second):
                session.step(torch.randn(1, 100, HIDDEN))
        wait_until(lambda: "overloaded:" in caplog.text, "it is logged")
        wait_idle(swarm)
    said = [message for message in caplog.messages if "overloaded:" in message]
    assert any(" steps_without_pages=" in line and " pages=8 " in line for line in said), said
