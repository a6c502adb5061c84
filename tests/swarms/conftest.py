"""Swarms of in-process servers, started once per run, and a check after every test that nothing is left on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from swarms_help import wait_idle
from tiny import load_local

from swarm import AutoDistributedModelForCausalLM
from swarm.client import ClientConfig
from swarm.link import JoinLink
from swarm.server import LocalSwarm

THIRDS = ((0, 2), (2, 4), (4, 6))


@dataclass
class Swarms:
    """The swarms of this run, each started when first asked for."""

    tiny_model: Callable[..., Path]
    started: dict[tuple[object, ...], tuple[LocalSwarm, Path]] = field(default_factory=dict)
    models: list[Any] = field(default_factory=list)

    def get(
        self, model_type: str = "llama", ranges: tuple[tuple[int, int], ...] = THIRDS, dtype: str = "float32"
    ) -> tuple[LocalSwarm, Path]:
        key = (model_type, ranges, dtype)
        if key not in self.started:
            path = self.tiny_model(model_type)
            swarm = LocalSwarm(str(path), ranges=list(ranges), dtype=dtype, in_process=True)
            swarm.__enter__()
            self.started[key] = swarm, path
        return self.started[key]

    def join(
        self, swarm: LocalSwarm, path: Path, auto: Any = AutoDistributedModelForCausalLM, *,
        config: dict[str, Any] | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Join with a new client, closed after the test."""
        if config is not None:
            kwargs["client_config"] = ClientConfig(initial_peers=JoinLink.parse(swarm.link).initial_peers, **config)
        model = auto.from_pretrained(str(path), join=swarm.link, **kwargs)
        self.models.append(model)
        return model.eval()


@pytest.fixture(scope="session")
def all_swarms(tiny_model: Callable[..., Path]) -> Iterator[Swarms]:
    swarms = Swarms(tiny_model)
    yield swarms
    for swarm, _ in swarms.started.values():
        swarm.close()


@pytest.fixture
def swarms(all_swarms: Swarms) -> Iterator[Swarms]:
    """As all_swarms, and checks that the test left nothing on any server."""
    yield all_swarms
    for model in all_swarms.models:
        model.close()
    all_swarms.models.clear()
    for swarm, _ in all_swarms.started.values():
        wait_idle(swarm)


@dataclass(frozen=True)
class Pair:
    """A distributed model and the same model in this process."""

    swarm: LocalSwarm
    path: Path
    remote: Any
    local: Any


def make_pair(swarms: Swarms, model_type: str) -> Iterator[Pair]:
    ranges = THIRDS if model_type == "llama" else ((0, 1), (1, 3), (3, 4))
    swarm, path = swarms.get(model_type, ranges)
    remote = AutoDistributedModelForCausalLM.from_pretrained(str(path), join=swarm.link).eval()
    yield Pair(swarm, path, remote, load_local(path))
    remote.close()


@pytest.fixture(scope="session")
def _llama(all_swarms: Swarms) -> Iterator[Pair]:
    yield from make_pair(all_swarms, "llama")


@pytest.fixture
def llama(_llama: Pair, swarms: Swarms) -> Iterator[Pair]:
    """Six blocks on three servers; the client is shared by all tests, which leave its weights and gradients alone."""
    yield _llama
    _llama.remote.zero_grad()
    _llama.local.zero_grad()
    wait_idle(_llama.swarm)


@pytest.fixture
def pair(llama: Pair, swarms: Swarms) -> tuple[Any, Any]:
    """A client of its own, and the whole model."""
    return swarms.join(llama.swarm, llama.path), load_local(llama.path)
