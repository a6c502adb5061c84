"""The server: hosts a range of a model's transformer blocks. Names are imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .app import serve
    from .config import ServerConfig
    from .local import LocalSwarm

_PUBLIC = {"LocalSwarm": ".local", "ServerConfig": ".config", "serve": ".app"}

__all__ = ["LocalSwarm", "ServerConfig", "serve"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'swarm.server' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name], __name__), name)
