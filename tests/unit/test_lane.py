"""How a long step is cut into parts."""

from __future__ import annotations

import pytest

from swarm.client.lane import LEAST_PART_TOKENS, part_tokens


def time_of(num_tokens: int, part: int, num_hops: int, *, line_s: float, compute_s: float) -> float:
    """How long parts take through equal lines and hops, each of which has one part at a time; seconds per token."""
    free_s = [0.0] * (2 * num_hops)
    for begin in range(0, num_tokens, part):
        size, ready_s = min(part, num_tokens - begin), 0.0
        for index in range(2 * num_hops):
            ready_s = max(ready_s, free_s[index]) + size * (compute_s if index % 2 else line_s)
            free_s[index] = ready_s
    return free_s[-1]


@pytest.mark.parametrize("num_hops", [2, 3, 8])
def test_parts_hide_the_lines_between_hops_behind_one_another(num_hops):
    part = part_tokens(4096, num_hops, 4096)
    pipelined_s = time_of(4096, part, num_hops, line_s=1e-3, compute_s=2e-4)
    assert pipelined_s < 0.75 * time_of(4096, 4096, num_hops, line_s=1e-3, compute_s=2e-4)


def test_parts_are_neither_too_short_to_pay_nor_longer_than_servers_take():
    assert part_tokens(1024, 3, 512) == LEAST_PART_TOKENS
    assert part_tokens(1 << 20, 3, 512) == 512
    assert part_tokens(1024, 3, 100) == 100
    assert part_tokens(1024, 1, 512) == 512  # nothing to hide behind
    assert part_tokens(1, 3, 0) == 1
