"""In how many parts a long input goes through a route: enough for all hops to work at once, none too small."""

from __future__ import annotations

MOST_LOST = 0.25
"""How much longer than one line takes for all parts the lines of a route may take for them."""

LEAST_TOKENS = 256
"""Of a part, in all sequences together: passes over fewer take longer for each token, weights being read as often."""


def part_length(length: int, batch_size: int, num_hops: int, max_step_tokens: int) -> int:
    """Return how many tokens of each sequence to send in one step, of an input of `length` tokens.

    A hop passes a part on when it has all of it. So with k parts, what a line or a hop takes for the input is waited
    for once, and 1/k of it at each further hop: a share that is the same for lines of any speed.

    Args:
        max_step_tokens: the most that every hop takes in one step, in all sequences together.
    """
    most = max(1, max_step_tokens // batch_size)
    wanted_parts = max(1.0, (num_hops - 1) / MOST_LOST)
    least = -(-LEAST_TOKENS // batch_size)
    return min(most, max(least, -(-length // int(wanted_parts))))
