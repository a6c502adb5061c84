"""What tests need of the machine."""

from __future__ import annotations

import pytest

from swarm.model import kernels

needs_compiled = pytest.mark.skipif(not kernels.is_compiled(), reason="built without a C compiler, or not for AVX2")
