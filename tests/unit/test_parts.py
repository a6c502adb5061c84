"""In how many parts a prompt travels: a simulated route of lines and hops, each passing on whole parts."""

from __future__ import annotations

import math

import pytest

from swarm.client.parts import LEAST_TOKENS, MOST_LOST, part_length

MOST = 512


def seconds(length: int, part: int, num_hops: int, token_s: float, pass_s: float = 0.0) -> float:
    """How long an input takes over equal lines into hops that take `pass_s` for a part, each one part at a time."""
    line_free_s, hop_free_s = [0.0] * num_hops, [0.0] * num_hops
    for begin in range(0, length, part):
        at_s = 0.0
        for hop in range(num_hops):
            line_free_s[hop] = max(at_s, line_free_s[hop]) + token_s * min(part, length - begin)
            at_s = hop_free_s[hop] = max(line_free_s[hop], hop_free_s[hop]) + pass_s
    return hop_free_s[-1]


@pytest.mark.parametrize("num_hops", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [2048, 4096, 8192])
def test_the_further_lines_of_a_route_take_a_fraction_of_what_the_first_one_takes(num_hops, length):
    part = part_length(length, 1, num_hops, MOST)
    most = MOST_LOST if part > LEAST_TOKENS else (num_hops - 1) * LEAST_TOKENS / length
    assert seconds(length, part, num_hops, 1e-3) <= length * 1e-3 * (1 + most) + num_hops * 1e-3


def test_a_prompt_of_1024_tokens_over_three_servers_is_half_again_as_long_on_the_way_as_over_one_line_not_twice():
    whole, ours = seconds(1024, MOST, 3, 1e-3), seconds(1024, part_length(1024, 1, 3, MOST), 3, 1e-3)
    assert whole == pytest.approx(2 * 1.024) and ours == pytest.approx(1.5 * 1.024)


def test_a_single_hop_gets_as_much_at_once_as_it_takes():
    assert part_length(1024, 1, 1, MOST) == MOST and part_length(300, 1, 1, MOST) >= 300


def test_no_part_is_smaller_than_pays_and_none_larger_than_every_hop_takes():
    for batch_size in (1, 3, 8, 600):
        for num_hops in (1, 2, 10):
            for length in (1, 2, 100, 5000, 100_000):
                part = part_length(length, batch_size, num_hops, MOST)
                assert part >= 1 and (part * batch_size <= MOST or part == 1)
                assert part * batch_size >= LEAST_TOKENS or part == max(1, MOST // batch_size)


def test_short_inputs_and_decode_steps_are_one_part():
    for num_hops in (1, 3, 20):
        assert all(math.ceil(length / part_length(length, 1, num_hops, MOST)) == 1 for length in (1, 11, LEAST_TOKENS))
