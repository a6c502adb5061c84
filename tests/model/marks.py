"""What tests need of the machine."""

from __future__ import annotations

import pytest

from swarm.model import kernels

needs_compiled = pytest.mark.skipif(not kernels.is_compiled(), reason="built without a C compiler, or not for AVX2")

LEVELS = [level for level in kernels.Level if level <= kernels.best_level()]
"""For `kernels.best_level`: what products can be computed with on this machine."""
