"""How fast lines carry what is sent, learned from large messages on their way."""

from __future__ import annotations

LEAST_BYTES = 256 << 10
"""Smaller messages say nothing: they fit into the buffers on the way."""

MEMORY = 0.5
"""How much of an earlier measurement stays in the next."""

LATEST = 8
"""One's own line is as fast as the fastest of so many to which something was sent last."""

MAX_REMEMBERED = 1024
"""Peers of whom it is kept."""


class Throughput:
    """What was sent to peers in a second. A line that is faster than its reader counts as what the reader takes."""

    def __init__(self) -> None:
        self.to_peers: dict[str, float] = {}
        """Peer id -> bytes per second, those sent to last at the end."""

    def sent(self, peer_id: str, num_bytes: int, seconds: float) -> None:
        """Note how long a message took until the line had taken it."""
        if num_bytes < LEAST_BYTES or seconds <= 0:
            return
        now = num_bytes / seconds
        before = self.to_peers.pop(peer_id, now)
        self.to_peers[peer_id] = MEMORY * before + (1 - MEMORY) * now
        if len(self.to_peers) > MAX_REMEMBERED:
            del self.to_peers[next(iter(self.to_peers))]

    def bytes_per_s(self) -> float:
        """What our own line carries; 0: not known."""
        return max(list(self.to_peers.values())[-LATEST:], default=0.0)
