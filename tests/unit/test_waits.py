"""What a server says of the time that steps wait there, and of what its line carries."""

from __future__ import annotations

import pytest

from swarm.server.counters import EngineRecord
from swarm.server.scheduler import Kind
from swarm.server.waits import WINDOW_S, StepWaits
from swarm.throughput import LATEST, LEAST_BYTES, Throughput


def test_a_new_step_is_expected_to_wait_as_those_of_the_last_seconds_did():
    record, now_s = EngineRecord(0.0), 0.0
    waits = StepWaits(lambda: record.read(now_s, queue_length=0, oldest_wait_s=0.0), lambda: now_s)
    assert waits.expected_s() == 0.0
    for kind in (Kind.DECODE, Kind.PREFILL) * 5:
        record.begun(kind, 0.2)
    record.begun(Kind.TRAINING, 9.0)
    assert waits.expected_s() == pytest.approx(0.2)
    now_s += WINDOW_S
    assert waits.expected_s() == pytest.approx(0.2)
    now_s += WINDOW_S / 2
    assert waits.expected_s() == pytest.approx(0.2), "none has come since"
    for _ in range(10):
        record.begun(Kind.DECODE, 0.01)
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
