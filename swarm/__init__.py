"""Swarm: run and fine-tune large language models on the computers of people who share them.

The public names are imported on first use, so that `import swarm` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

PROTOCOL_VERSION = 2
"""Version of the wire contract in proto/swarm/v1; peers of another version are not called."""

_PUBLIC = {
    "AutoDistributedConfig": "swarm.client",
    "AutoDistributedModel": "swarm.client",
    "AutoDistributedModelForCausalLM": "swarm.client",
    "AutoDistributedModelForSequenceClassification": "swarm.client",
    "BottleneckConfig": "swarm.model.bottlenecks",
    "EMBEDDED_MODEL": "swarm.embedded",
    "add_bottlenecks": "swarm.model.bottlenecks",
    "load_bottlenecks": "swarm.model.bottlenecks",
}

__all__ = [
    "EMBEDDED_MODEL",
    "PROTOCOL_VERSION",
    "AutoDistributedConfig",
    "AutoDistributedModel",
    "AutoDistributedModelForCausalLM",
    "AutoDistributedModelForSequenceClassification",
    "BottleneckConfig",
    "__version__",
    "add_bottlenecks",
    "load_bottlenecks",
]

if TYPE_CHECKING:
    from swarm.client import (
        AutoDistributedConfig,
        AutoDistributedModel,
        AutoDistributedModelForCausalLM,
        AutoDistributedModelForSequenceClassification,
    )
    from swarm.embedded import EMBEDDED_MODEL
    from swarm.model.bottlenecks import BottleneckConfig, add_bottlenecks, load_bottlenecks


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'swarm' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
