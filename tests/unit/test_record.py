"""A session's record against the plainest account of the same steps: lists that are cut, reordered and extended."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swarm.client.record import Record
from swarm.streams import Step

BATCH, HIDDEN = 3, 2


@dataclass
class Oracle:
    """Per sequence, the list of (hidden state, mask, position) of its tokens."""

    rows: list[list[tuple[float, int, int]]] = field(default_factory=lambda: [[] for _ in range(BATCH)])

    def step(self, step: Step) -> None:
        if step.beam_idx:
            self.rows = [list(self.rows[index]) for index in step.beam_idx]
        for number, row in enumerate(self.rows):
            del row[step.position :]
            for at in range(step.x_BLD.shape[1]):
                mask = 1 if step.mask_BL is None else int(step.mask_BL[number, at])
                position = step.position + at if step.position_ids_BL is None else int(step.position_ids_BL[number, at])
                row.append((float(step.x_BLD[number, at, 0]), mask, position))


def seen(record: Record) -> list[list[tuple[float, int, int]]]:
    part = record.part(0, record.length)
    rows = []
    for number in range(BATCH):
        row = []
        for at in range(record.length):
            mask = 1 if part.mask_BL is None else int(part.mask_BL[number, at])
            position = at if part.position_ids_BL is None else int(part.position_ids_BL[number, at])
            row.append((float(part.x_BLD[number, at, 0]), mask, position))
        rows.append(row)
    return rows


def make_step(position: int, length: int, number: int, *, mask: bool, ids: bool, beams: list[int]) -> Step:
    generator = torch.Generator().manual_seed(number)
    x_BLD = torch.randn(BATCH, length, HIDDEN, generator=generator)
    mask_BL = torch.randint(0, 2, (BATCH, length), generator=generator) if mask else None
    ids_BL = torch.randint(0, 50, (1, length), generator=generator).expand(BATCH, -1) if ids else None
    return Step(position, 1, x_BLD, mask_BL, ids_BL, tuple(beams))


steps = st.lists(
    st.tuples(
        st.integers(1, 5),
        st.integers(0, 3),
        st.booleans(),
        st.booleans(),
        st.just([]) | st.lists(st.integers(0, BATCH - 1), min_size=BATCH, max_size=BATCH),
    ),
    min_size=1,
    max_size=12,
)


@given(steps)
@settings(max_examples=200, deadline=None)
def test_a_record_is_what_a_naive_account_says(script):
    record, oracle = Record(), Oracle()
    for number, (length, back, mask, ids, beams) in enumerate(script):
        position = max(0, record.length - back)
        step = make_step(position, length, number, mask=mask, ids=ids, beams=beams if record.length else [])
        untouched = step.x_BLD.clone()
        record = record.followed_by(step)
        oracle.step(step)
        assert seen(record) == oracle.rows
        assert torch.equal(step.x_BLD, untouched)


@given(steps)
@settings(max_examples=100, deadline=None)
def test_the_tensors_of_a_step_are_never_written_to(script):
    record, kept = Record(), []
    for number, (length, back, mask, ids, _) in enumerate(script):
        step = make_step(max(0, record.length - back), length, number, mask=mask, ids=ids, beams=[])
        kept.append((step.x_BLD, step.x_BLD.clone()))
        record = record.followed_by(step)
    assert all(torch.equal(now, then) for now, then in kept)


def test_a_step_that_fails_in_the_end_leaves_the_record_as_it_was():
    record = Record().followed_by(make_step(0, 5, 0, mask=False, ids=False, beams=[]))
    record = record.followed_by(make_step(5, 1, 1, mask=False, ids=False, beams=[]))
    before = seen(record)
    record.followed_by(make_step(6, 3, 2, mask=True, ids=False, beams=[2, 2, 0]))
    record.followed_by(make_step(6, 1, 3, mask=False, ids=False, beams=[]))
    assert seen(record) == before and record.length == 6


def test_a_decode_step_does_not_copy_the_past():
    record = Record()
    for number in range(200):
        record = record.followed_by(make_step(number, 1, number, mask=False, ids=False, beams=[]))
    assert record.x_BTD is not None and 200 <= record.x_BTD.shape[1] <= 400
    again = record.followed_by(make_step(200, 1, 0, mask=False, ids=False, beams=[]))
    assert again.x_BTD is not None
    assert again.x_BTD.data_ptr() == record.x_BTD.data_ptr() or record.x_BTD.shape[1] == 200


def test_rows_can_be_repeated_and_dropped():
    record = Record().followed_by(make_step(0, 4, 0, mask=True, ids=True, beams=[]))
    rows = seen(record)
    picked = record.rows(torch.tensor([2, 2, 0]))
    assert seen(picked) == [rows[2], rows[2], rows[0]] and seen(record) == rows


def test_a_part_is_a_step_that_returns_nothing():
    record = Record().followed_by(make_step(0, 6, 0, mask=False, ids=False, beams=[]))
    part = record.part(2, 5)
    assert (part.position, part.num_outputs, part.x_BLD.shape) == (2, 0, (BATCH, 3, HIDDEN))
    assert isinstance(part.x_BLD, Tensor) and part.mask_BL is None
