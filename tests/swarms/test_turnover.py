"""Servers come and go until none of those that a client knew is left; the client, idle or not, stays in the swarm."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from swarms_help import wait_until
from tiny import NUM_BLOCKS, load_local, random_ids

from swarm import AutoDistributedModelForCausalLM
from swarm.client import ClientConfig
from swarm.link import JoinLink
from swarm.model.checkpoint import CheckpointSource
from swarm.ranges import BlockRange
from swarm.server.config import ServerConfig
from swarm.server.local import ThreadServer, free_port


def start(path: Path, through: ThreadServer | None = None, **config: Any) -> ThreadServer:
    """Start a server of all blocks; the caller stops it."""
    server = ThreadServer(
        ServerConfig(
            source=CheckpointSource(str(path)),
            blocks=BlockRange(0, NUM_BLOCKS),
            dtype="float32",
            initial_peers=JoinLink.parse(through.link).initial_peers if through else (),
            drain_timeout_s=0.2,
            cache_bytes=1 << 24,
            **config,
        )
    )
    server.wait_ready()
    return server


def known_to(model: Any) -> set[str]:
    """Whom a client would ask, without making it look."""
    return {server.peer_id for server in model._swarm.connection.network._servers}


def test_a_client_outlives_every_server_it_knew_and_a_moment_without_any(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    path = tiny_model("llama")
    ids = random_ids(1, 8)
    wanted = load_local(path).generate(ids, max_new_tokens=8, do_sample=False)
    fixed = {"identity_path": tmp_path / "server.key", "dht_port": free_port()}
    servers = [start(path)]
    try:
        peers = JoinLink.parse(servers[0].link).initial_peers
        config = ClientConfig(initial_peers=peers, idle_refresh_period_s=0.2)
        model = AutoDistributedModelForCausalLM.from_pretrained(str(path), client_config=config).eval()
        for config_of_next in ({}, {}, fixed):
            servers.append(start(path, through=servers[-1], **config_of_next))
            newest = servers[-1].running.peer_id
            wait_until(lambda peer_id=newest: peer_id in known_to(model), "the idle client has met the new server")
            servers[-2].stop()
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), wanted)
        servers[-1].stop()
        with ThreadPoolExecutor(max_workers=1) as user:
            waiting = user.submit(model.generate, ids, max_new_tokens=8, do_sample=False)
            servers.append(start(path, **fixed))
            assert torch.equal(waiting.result(60), wanted)
        model.close()
    finally:
        for server in servers:
            server.stop()
