"""Waiting for what other threads bring about."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from itertools import chain

import torch

from swarm.server import LocalSwarm

RELEASE_TIMEOUT_S = 20.0
"""How long a server may take to notice that a client is gone; it takes milliseconds."""


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = RELEASE_TIMEOUT_S) -> None:
    """Assert that another thread brings a condition about in time."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.01)


def held(swarm: LocalSwarm) -> list[tuple[int, int]]:
    """(sessions, cache bytes) of each server in this process."""
    stats = [server.running.sessions.statistics() for server in swarm.servers if server.alive]
    return [(each.num_sessions, each.cache_used_bytes) for each in stats]


def wait_idle(swarm: LocalSwarm) -> None:
    """Assert that soon no server holds a session or cache."""
    wait_until(lambda: all(each == (0, 0) for each in held(swarm)), f"servers hold nothing, but {held(swarm)}")


def weights(swarm: LocalSwarm) -> list[str]:
    """A hash of all that each server in this process has loaded, in few bits or not; none of it has a gradient."""
    hashes = []
    for server in swarm.servers:
        digest = hashlib.sha256()
        span = server.running.sessions.views.span
        for name, tensor in sorted(chain(span.named_parameters(), span.named_buffers())):
            assert not tensor.requires_grad and tensor.grad is None, name
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        hashes.append(digest.hexdigest())
    return hashes
