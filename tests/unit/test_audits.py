"""What commitments show, and what a client makes of an audit."""

from __future__ import annotations

import random
import secrets

import pytest
import torch
from fakes import announcement

from swarm.client.audits import (
    LEAST_TOKENS,
    Finding,
    Pace,
    Verdict,
    choose_auditor,
    compare,
    settle,
    tolerance_of,
)
from swarm.client.routing import Hop
from swarm.client.transcript import Transcript
from swarm.commitments import BYTES_PER_TOKEN, Sketcher, max_step_tokens, relative_error
from swarm.errors import ProtocolError
from swarm.ranges import BlockRange
from swarm.streams import Step
from swarm.v1 import blocks_pb2 as pb

HIDDEN = 96
FP32, BF16, INT4 = ("float32", None), ("bfloat16", None), ("bfloat16", "int4")


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(seed))


def sketcher() -> Sketcher:
    return Sketcher.of_key(secrets.token_bytes(16), HIDDEN)


def test_a_sketch_is_a_function_of_its_key_and_shows_any_change():
    x_BLD, key = states(1, 4), bytes(16)
    sketch = Sketcher.of_key(key, HIDDEN).sketch(x_BLD)
    assert torch.equal(sketch, Sketcher.of_key(key, HIDDEN).sketch(x_BLD))
    assert not torch.equal(sketch, sketcher().sketch(x_BLD))
    for share in (0.03, 0.3):
        changed = x_BLD + share * states(1, 4, seed=1)
        found = relative_error(Sketcher.of_key(key, HIDDEN).sketch(changed), sketch).mean()
        assert share / 2 < found < share * 2
    for feature in range(HIDDEN):
        one = x_BLD.clone()
        one[0, 0, feature] += 5.0
        assert not torch.equal(Sketcher.of_key(key, HIDDEN).sketch(one), sketch)


def test_features_that_are_much_larger_than_all_others_hide_nothing():
    x_BLD = states(1, 4)
    x_BLD[..., 7] = 3000.0
    made = sketcher()
    other = x_BLD + 0.3 * states(1, 4, seed=1)
    assert relative_error(made.sketch(other), made.sketch(x_BLD)).mean() > 0.1


def test_numbers_that_are_none_are_infinitely_wrong():
    made, x_BLD = sketcher(), states(1, 2)
    assert (relative_error(made.sketch(x_BLD * float("nan")), made.sketch(x_BLD)) > 1e9).all()
    assert (relative_error(made.sketch(x_BLD * float("inf")), made.sketch(x_BLD)) > 1e9).all()


def test_nobody_can_change_a_commitment_on_its_way_or_use_it_for_another_step():
    made, x_BLD, y_BLD = sketcher(), states(2, 3), states(2, 3, seed=1)
    commitment = made.commit(5, x_BLD, y_BLD)
    assert len(commitment.sketches) == BYTES_PER_TOKEN * 6 and len(commitment.tag) == 16
    opened = made.open(commitment, 5, 2, 3)
    assert opened is not None
    assert torch.equal(opened, torch.stack([made.sketch(x_BLD), made.sketch(y_BLD)]))
    for position, batch_size, length in ((6, 2, 3), (5, 1, 3), (5, 2, 4)):
        assert made.open(commitment, position, batch_size, length) is None
    assert sketcher().open(commitment, 5, 2, 3) is None
    for index in (0, len(commitment.sketches) - 1):
        changed = bytearray(commitment.sketches)
        changed[index] ^= 1
        assert made.open(pb.Commitment(sketches=bytes(changed), tag=commitment.tag), 5, 2, 3) is None
    assert made.open(pb.Commitment(), 5, 2, 3) is None


def test_the_commitments_of_a_step_fit_into_its_first_message():
    for num_hops in (1, 3, 32):
        assert num_hops * (max_step_tokens(num_hops) * BYTES_PER_TOKEN + 16) <= 1 << 20


class Route:
    """Hops that commit to what passes through them."""

    def __init__(self, num_hops: int = 3) -> None:
        self.hops = [Hop(announcement("abc"[at], at, at + 1), BlockRange(at, at + 1)) for at in range(num_hops)]
        self.keys = {hop.blocks: secrets.token_bytes(16) for hop in self.hops}
        self.transcript = Transcript(self.hops, self.keys, 1, HIDDEN)

    def commit(self, step: Step) -> list[pb.Commitment]:
        made = [Sketcher.of_key(self.keys[hop.blocks], HIDDEN) for hop in self.hops]
        return [each.commit(step.position, step.x_BLD + at, step.x_BLD + at + 1) for at, each in enumerate(made)]


def test_a_transcript_follows_steps_that_go_back():
    route = Route()
    for position, length, seed in ((0, 5, 0), (5, 1, 1), (3, 4, 2), (7, 1, 3)):
        step = Step(position, 1, states(1, length, seed=seed))
        route.transcript.add(step, route.commit(step), step.x_BLD[:, -1:] + 3)
    assert (route.transcript.start, route.transcript.end) == (0, 8)
    wanted = torch.cat([states(1, 5)[:, :3], states(1, 4, seed=2), states(1, 1, seed=3)], dim=1)
    for at, hop in enumerate(route.hops):
        made = Sketcher.of_key(route.keys[hop.blocks], HIDDEN)
        both = torch.stack([made.sketch(wanted + at), made.sketch(wanted + at + 1)])
        assert torch.equal(route.transcript.part(0, 8)[at], both)


def test_commitments_that_are_missing_foreign_or_not_about_the_result_are_refused():
    route = Route()
    step = Step(0, 1, states(1, 4))
    good = route.commit(step)
    for commitments, y_BLD, match, at_fault in (
        ([], None, "3 hops were to commit", {0, 1, 2}),
        ([good[0], good[0], good[2]], None, "not one that it can have made", {1, 2}),
        (good, step.x_BLD[:, -1:] * 1.5, "returned something else", {2}),
    ):
        blamed = set()
        for _ in range(64):
            with pytest.raises(ProtocolError, match=match) as raised:
                route.transcript.add(step, commitments, y_BLD)
            blamed.add(raised.value.peer_id)
        assert blamed == {route.hops[at].peer_id for at in at_fault}
    assert route.transcript.end == 0


def errors(**at: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What three hops claim of 20 tokens, and what is true; a name as `left1` says where they differ, and how much."""
    made = sketcher()
    hops = [[made.sketch(states(1, 20, seed=10 * hop + side))[0] for side in (0, 1)] for hop in range(3)]
    true = torch.stack([torch.stack(sides) for sides in hops])
    false = true.clone()
    for name, share in at.items():
        side, hop = int(name.startswith("left")), int(name[-1])
        false[hop, side] += (share * made.sketch(states(1, 20, seed=99))[0].float()).to(false.dtype)
    return false, true


def test_the_first_hop_that_was_entered_by_the_right_states_and_left_by_others_is_found():
    assert compare(*errors(), [0.03] * 3).finding is Finding.RIGHT
    for hop in range(3):
        later = {f"{side}{at}": 1.0 for at in range(hop + 1, 3) for side in ("entered", "left")}
        verdict = compare(*errors(**{f"left{hop}": 0.3}, **later), [0.03] * 3)
        assert (verdict.finding, verdict.hop) == (Finding.WRONG, hop)


def test_what_two_neighbours_contradict_each_other_about_accuses_neither():
    assert compare(*errors(entered1=0.5, left1=0.5), [0.03] * 3).finding is Finding.UNCLEAR


def test_a_hop_is_allowed_what_the_hops_before_it_have_let_in():
    assert compare(*errors(left0=0.06, entered1=0.06, left1=0.11), [0.1, 0.01, 0.01]).finding is Finding.RIGHT
    assert compare(*errors(left0=0.06, entered1=0.06, left1=0.5), [0.1, 0.01, 0.01]) == Verdict(
        Finding.WRONG, 1, pytest.approx(0.5, rel=0.3)
    )


def test_a_hop_that_nobody_recomputes_is_not_judged():
    assert compare(*errors(left1=1.0), [0.03, None, 0.03]).finding is Finding.RIGHT


def test_a_single_wrong_token_among_many_is_seen():
    false, true = errors()
    false[1, 1, 13] = -true[1, 1, 13]
    assert compare(false, true, [0.03] * 3) == Verdict(Finding.WRONG, 1, pytest.approx(0.4, rel=0.1))


def test_three_accounts_are_settled_only_where_two_agree_much_better():
    assert settle((0.01, 0.5, 0.5)) == 0
    assert settle((0.5, 0.01, 0.5)) == 1
    assert settle((0.5, 0.5, 0.01)) == 2
    assert settle((0.2, 0.5, 0.5)) is None
    assert settle((0.01, 0.02, 0.5)) is None


def test_tolerances_know_what_differs():
    assert tolerance_of(FP32, FP32, 4) < tolerance_of(BF16, BF16, 4) < tolerance_of(BF16, FP32, 4)
    assert tolerance_of(INT4, INT4, 4) == tolerance_of(BF16, BF16, 4)
    assert tolerance_of(INT4, BF16, 4) > tolerance_of(("float32", "int8"), BF16, 4) == tolerance_of(BF16, FP32, 4)
    assert tolerance_of(FP32, FP32, 4, exact_wire=False) == tolerance_of(FP32, BF16, 4)
    assert tolerance_of(FP32, FP32, 32) == 2 * tolerance_of(FP32, FP32, 8)


def test_an_auditor_is_elsewhere_if_possible_then_of_the_same_precision():
    hop = Hop(announcement("a", 0, 4, direct=["192.0.2.1:1"], dtype="bfloat16"), BlockRange(0, 4))
    near = announcement("b", 0, 4, direct=["192.0.2.7:1"], dtype="bfloat16")
    far = announcement("c", 0, 8, direct=["198.51.100.1:1"], dtype="float32")
    same = announcement("d", 0, 8, direct=["198.51.100.2:1"], dtype="bfloat16")
    part = announcement("e", 0, 3, direct=["203.0.113.1:1"], dtype="bfloat16")
    rng = random.Random(0)
    assert choose_auditor([part], hop, rng) is None
    assert choose_auditor([near, part], hop, rng) == near
    assert choose_auditor([near, far], hop, rng) == far
    assert choose_auditor([near, far, same], hop, rng) == same


def test_audits_take_no_more_than_their_share_of_the_time():
    pace, audits_s, steps_s, since = Pace(0.05, random.Random(0)), 0.0, 0.0, 0
    for _ in range(20_000):
        pace.stepped(0.1)
        steps_s, since = steps_s + 0.1, since + 1
        if pace.is_due(since):
            assert since >= LEAST_TOKENS
            pace.took(0.6)
            audits_s, since = audits_s + 0.6, 0
    assert 0.03 < audits_s / steps_s < 0.0505


def test_who_does_not_audit_never_does():
    pace = Pace(0.0, random.Random(0))
    pace.stepped(1e9)
    assert not pace.is_due(1 << 30) and not any(pace.is_drawn() for _ in range(100))
