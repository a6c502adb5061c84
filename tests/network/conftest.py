"""Identities made once per run, nodes of them, and announcements with sensible defaults."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from swarm.announcement import Announcement
from swarm.dht import Dht, DhtConfig, open_dht
from swarm.identity import Identity

OpenNode = Callable[..., Awaitable[Dht]]

MODEL = "f" * 64


@pytest.fixture(scope="session")
def identities(tmp_path_factory: pytest.TempPathFactory) -> list[Identity]:
    directory = tmp_path_factory.mktemp("identities")
    return [Identity.load_or_create(directory / f"{number}.key") for number in range(4)]


@pytest.fixture
def identity_paths(identities: list[Identity]) -> list[Path]:
    return [identity.path for identity in identities]


@pytest.fixture
async def open_node(identities: list[Identity]) -> AsyncIterator[OpenNode]:
    """`await open_node(1, client_mode=True)`: a node with that identity, which is closed at the end of the test."""
    async with AsyncExitStack() as owned:

        async def open_one(number: int, **options: Any) -> Dht:
            return await owned.enter_async_context(
                open_dht(DhtConfig(identity_path=identities[number].path, **options))
            )

        yield open_one


@pytest.fixture
def make_announcement(identities: list[Identity]) -> Callable[..., Announcement]:
    certificate_der = identities[0].tls_certificate().certificate_der

    def make(peer_id: str = identities[0].peer_id, **changes: Any) -> Announcement:
        fields: dict[str, Any] = {
            "protocol_version": 1, "software_version": "0.1.0", "peer_id": peer_id, "server_name": "a server",
            "model_name": "tiny", "model_fingerprint": MODEL, "num_model_blocks": 4, "hidden_size": 8,
            "start": 0, "end": 4, "dtype": "float32", "state": "online", "direct": ["127.0.0.1:31337"],
            "tls_certificate": certificate_der, "decode_tokens_per_s": 10.0, "forward_tokens_per_s": 100.0,
            "max_session_tokens": 2048, "max_step_tokens": 512, "max_batch_tokens": 4096, "max_batch_size": 16,
            "cache_free_tokens": 10_000, "expires_at_s": time.time() + 60,
        }  # fmt: skip
        return Announcement(**(fields | changes))

    return make
