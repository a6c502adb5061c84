"""What tests need of the machine."""

from __future__ import annotations

import pytest

from swarm.model import kernels

needs_compiled = pytest.mark.skipif(not kernels.is_compiled(), reason="built without a C compiler, or not for AVX2")

PRODUCTS_ARE_WIDE = [False, True] if kernels.is_wide() else [False]
"""For `kernels.is_wide`: the instruction sets of this machine that products can be computed with."""
