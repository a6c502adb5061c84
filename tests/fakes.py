"""Announcements without servers behind them."""

from __future__ import annotations

import time
from typing import Any

from swarm import PROTOCOL_VERSION
from swarm.announcement import Announcement

FINGERPRINT = "f" * 32


def peer_id(name: str) -> str:
    """A well-formed peer id that ends in `name` (base58 letters only)."""
    return name.rjust(46, "Q")


def announcement(name: str, start: int, end: int, **changes: Any) -> Announcement:
    """What a healthy server of the blocks [start, end) of a 12-block model would say."""
    fields: dict[str, Any] = {
        "protocol_version": PROTOCOL_VERSION,
        "software_version": "0.1.0",
        "peer_id": peer_id(name),
        "server_name": f"server-{name}",
        "model_name": "tiny",
        "model_fingerprint": FINGERPRINT,
        "num_model_blocks": 12,
        "hidden_size": 8,
        "start": start,
        "end": end,
        "dtype": "float32",
        "state": "online",
        "direct": ["127.0.0.1:31337"],
        "tls_certificate": b"certificate",
        "decode_tokens_per_s": 100.0,
        "forward_tokens_per_s": 1000.0,
        "max_session_tokens": 2048,
        "max_step_tokens": 512,
        "max_batch_tokens": 4096,
        "max_batch_size": 16,
        "cache_free_tokens": 10_000,
        "expires_at_s": time.time() + 60,
    }
    return Announcement(**(fields | changes))
