"""How fast adapters are sent: no more than a line carries within a second, whatever buffers it has."""

from __future__ import annotations

import pytest

from swarm.client.uploads import LEAST_WINDOW_BYTES, MOST_WINDOW_BYTES, next_window_bytes


@pytest.mark.parametrize(
    ("bytes_per_s", "rtt_s", "least", "most"),
    [
        (125_000, 0.05, LEAST_WINDOW_BYTES, 130_000),  # 1 Mbit/s
        (1_250_000, 0.1, 128 << 10, 1_300_000),
        (10**9, 0.0003, MOST_WINDOW_BYTES, MOST_WINDOW_BYTES),
        (12_500, 0.05, LEAST_WINDOW_BYTES, LEAST_WINDOW_BYTES),
        (10**9, 0.6, LEAST_WINDOW_BYTES, LEAST_WINDOW_BYTES),  # far away, or a long queue: it cannot be told which
    ],
)
def test_what_waits_on_the_line_follows_its_rate(bytes_per_s: float, rtt_s: float, least: float, most: float) -> None:
    window_bytes = LEAST_WINDOW_BYTES
    for _ in range(20):
        window_bytes = next_window_bytes(window_bytes, rtt_s + window_bytes / bytes_per_s)
    assert least <= window_bytes <= most


def test_a_line_that_gets_slow_is_given_less() -> None:
    window_bytes = MOST_WINDOW_BYTES
    for _ in range(20):
        window_bytes = next_window_bytes(window_bytes, window_bytes / 125_000)
    assert window_bytes <= 125_000
