"""Block ranges: parsing, containment and how sets of blocks are written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import BadRequest
from swarm.ranges import BlockRange, describe_blocks


def test_a_range_is_read_and_written_alike():
    assert BlockRange.parse("4:8") == BlockRange(4, 8)
    assert str(BlockRange(4, 8)) == "4:8" and list(BlockRange(4, 8)) == [4, 5, 6, 7] and len(BlockRange(4, 8)) == 4


@pytest.mark.parametrize("text", ["", "4", "4:", ":8", "a:b", "4-8", "4:8:2", "-1:3", "1.5:3", "4:\u00bd"])
def test_text_that_is_no_range_is_refused(text):
    with pytest.raises(BadRequest, match="must be written START:END"):
        BlockRange.parse(text)


@pytest.mark.parametrize("start, end", [(3, 3), (5, 2), (-1, 4), (0, 0)])
def test_empty_and_reversed_ranges_are_refused(start, end):
    with pytest.raises(BadRequest, match="0 <= start < end"):
        BlockRange(start, end)


def test_a_range_outside_the_model_is_refused_with_what_is_possible():
    BlockRange(0, 12).check_inside(12)
    with pytest.raises(BadRequest, match="which has 12 blocks: choose a range within 0:12"):
        BlockRange(10, 13).check_inside(12)


def test_covers():
    assert BlockRange(2, 6).covers(BlockRange(2, 6)) and BlockRange(2, 6).covers(BlockRange(3, 4))
    assert not BlockRange(2, 6).covers(BlockRange(1, 4)) and not BlockRange(2, 6).covers(BlockRange(5, 7))


def test_describe_blocks_joins_runs():
    assert describe_blocks({0, 1, 2, 7}) == "0-2, 7"
    assert describe_blocks([]) == ""


@given(st.sets(st.integers(0, 60)))
def test_describe_blocks_names_exactly_the_set(blocks):
    named: set[int] = set()
    for run in filter(None, describe_blocks(blocks).split(", ")):
        first, _, last = run.partition("-")
        named |= set(range(int(first), int(last or first) + 1))
    assert named == blocks
