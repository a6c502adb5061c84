"""What a server says of the time that steps wait there, and of what its line carries."""

from __future__ import annotations

import pytest

from swarm.server.engine import EngineCounters, EngineStatistics
from swarm.server.waits import WINDOW_S, StepWaits
from swarm.throughput import LATEST, LEAST_BYTES, Throughput


def test_a_new_step_is_expected_to_wait_as_those_of_the_last_seconds_did():
    counters, now_s = EngineCounters(), 0.0
    waits = StepWaits(lambda: EngineStatistics(0, counters, {}), lambda: now_s)
    assert waits.expected_s() == 0.0
    counters.num_steps, counters.queued_s = 10, 2.0
    assert waits.expected_s() == pytest.approx(0.2)
    now_s += WINDOW_S
    assert waits.expected_s() == pytest.approx(0.2)
    now_s += WINDOW_S / 2
    assert waits.expected_s() == pytest.approx(0.2), "none has come since"
    counters.num_steps, counters.queued_s = 20, 2.1
    assert waits.expected_s() == pytest.approx(0.01)
    now_s += WINDOW_S
    waits.expected_s()
    now_s += WINDOW_S
    assert waits.expected_s() == 0.0, "nobody waits where nobody comes"


def test_what_a_line_carries_is_learned_from_large_messages():
    lines = Throughput()
    lines.sent("A", LEAST_BYTES - 1, 1.0)
    assert lines.bytes_per_s() == 0.0 and lines.to_peers == {}
    lines.sent("A", 1_000_000, 1.0)
    lines.sent("A", 1_000_000, 0.5)
    assert lines.to_peers == {"A": 1_500_000.0}
    lines.sent("B", 4_000_000, 1.0)
    assert lines.bytes_per_s() == 4_000_000.0
    for number in range(LATEST):
        lines.sent(str(number), 1_000_000, 1.0)
    assert lines.bytes_per_s() == 1_000_000.0
