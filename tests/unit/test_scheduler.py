"""What one snapshot leads to; what is learned of time. Over time: test_scheduling.py."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import compute_bound, memory_bound

from swarm.server.scheduler import (
    Kind,
    Plan,
    SchedulerConfig,
    Slice,
    Snapshot,
    Waiting,
    compose,
    may_interrupt,
    training_rows,
)
from swarm.server.timing import CostModel, Expected, ReturnTimes

CONFIG = SchedulerConfig()


def costs_of(cost) -> CostModel:
    costs = CostModel()
    for tokens in (1, 8, 32, 128, 512):
        for _ in range(3):
            costs.observe(tokens, cost(tokens))
    return costs


COSTS = costs_of(memory_bound)


def decode(number: int, *, num_rows: int = 1, arrived_s: float = 0.0, **more) -> Waiting:
    return Waiting(number, Kind.DECODE, num_rows, 1, arrived_s, **more)


def prefill(number: int, length: int, *, num_rows: int = 1, arrived_s: float = 0.0) -> Waiting:
    return Waiting(number, Kind.PREFILL, num_rows, length, arrived_s)


def training(number: int, *, arrived_s: float = 0.0) -> Waiting:
    return Waiting(number, Kind.TRAINING, 4, 128, arrived_s)


def expected(at_s: float, *, return_s: float = 0.02, num_rows: int = 1) -> Expected:
    return Expected(at_s, at_s + 0.001, num_rows, return_s)


def plan(now_s: float, waiting, coming=(), *, costs: CostModel = COSTS, **more) -> Plan:
    return compose(Snapshot(now_s, waiting, coming, **more), costs, CONFIG)


# Decode steps


def test_all_waiting_decode_steps_run_at_once():
    assert plan(1.0, [decode(number) for number in range(40)]).slices == tuple(Slice(n, 1) for n in range(40))


def test_of_more_decode_steps_than_fit_the_oldest_run():
    waiting = [decode(number, num_rows=100) for number in (7, 3, 9, 1, 8, 2)]
    assert {each.number for each in plan(1.0, waiting).slices} == {1, 2, 3, 7, 8}


def test_a_step_with_more_rows_than_fit_runs_when_it_is_the_oldest():
    assert plan(1.0, [decode(1, num_rows=600), decode(2)]).slices == (Slice(1, 1),)
    assert plan(1.0, [decode(1), decode(2, num_rows=600), decode(3)]).slices == (Slice(1, 1), Slice(3, 1))


def test_with_nothing_to_do_there_is_nothing_to_wait_for():
    assert plan(0.0, []) == Plan()


# Prefill


def test_a_prefill_that_nobody_waits_beside_takes_the_whole_budget():
    assert plan(0.0, [prefill(1, 2048)]).slices == (Slice(1, 512),)


@pytest.mark.parametrize("num_decoding", [1, 8, 32])
@pytest.mark.parametrize("cost", [memory_bound, compute_bound])
def test_beside_decode_steps_a_prefill_is_cut_so_that_the_pass_stays_short(num_decoding, cost):
    waiting = [*(decode(number) for number in range(num_decoding)), prefill(99, 2048)]
    slices = plan(1.0, waiting, costs=costs_of(cost)).slices
    (chunk,) = [each.length for each in slices if each.number == 99]
    alone_s, together_s = cost(num_decoding), cost(num_decoding + chunk)
    assert len(slices) == num_decoding + 1
    assert chunk == 1 or together_s <= 1.85 * alone_s
    assert cost(num_decoding + 2 * chunk) > 1.5 * alone_s  # not much smaller than it may be


def test_every_iteration_with_prefill_progresses_by_a_token_per_row_of_it():
    waiting = [decode(1), prefill(2, 64, num_rows=16)]
    assert Slice(2, 1) in plan(0.0, waiting, costs=costs_of(compute_bound)).slices
    crowd = [*(decode(number) for number in range(600)), prefill(999, 64, num_rows=16)]
    slices = plan(0.0, crowd).slices
    assert Slice(999, 1) in slices and len(slices) - 1 + 16 <= CONFIG.max_tokens


def test_the_shortest_prefill_goes_first_and_longer_ones_take_what_is_left():
    assert plan(0.0, [prefill(1, 500), prefill(2, 20)]).slices == (Slice(2, 20), Slice(1, 492))


def test_a_prefill_that_has_waited_too_long_goes_before_shorter_ones():
    late_s = CONFIG.max_prefill_wait_s
    waiting = [prefill(1, 500), prefill(2, 600), prefill(3, 20, arrived_s=late_s)]
    assert plan(late_s, waiting).slices == (Slice(1, 500), Slice(2, 12))


@given(st.floats(0.0, 0.2))
def test_between_two_decode_steps_a_prefill_runs_no_longer_than_the_gap(gap_s):
    now = plan(0.0, [prefill(1, 2048)], [expected(gap_s)])
    if now.slices:
        assert memory_bound(now.slices[0].length) <= min(gap_s, CONFIG.prefill_slowdown * memory_bound(1)) + 1e-3
    else:
        assert gap_s < memory_bound(1) + 1e-3
        assert now.hold_until_s == pytest.approx(gap_s + 0.001)


def test_a_prefill_does_not_wait_for_a_decode_step_that_is_overdue():
    assert plan(1.0, [prefill(1, 2048)], [expected(0.9)]).slices


def test_where_servers_share_a_machine_the_gap_between_two_passes_belongs_to_the_others():
    assert plan(0.0, [prefill(1, 2048)], [expected(0.03)], shares_machine=True).slices == ()
    assert plan(0.0, [prefill(1, 2048)], [expected(0.3)], shares_machine=True).slices


# Training


def test_training_runs_when_nothing_else_does_or_when_it_has_waited_long():
    assert plan(0.0, [training(1)]).training == 1
    waiting = [training(1), decode(2)]
    assert plan(0.1, waiting).slices == (Slice(2, 1),)
    assert plan(CONFIG.max_training_wait_s, waiting).training == 1


def test_training_runs_while_decode_steps_are_held_and_prefills_wait_for_a_gap():
    assert plan(0.0, [training(1), decode(2, return_s=0.02)], [expected(0.002)]).training == 1
    assert plan(0.0, [training(1), prefill(2, 2048)], [expected(0.002)]).training == 1


def test_the_oldest_training_goes_first():
    assert plan(9.0, [training(5, arrived_s=1.0), training(3), training(4)]).training == 3


@given(st.floats(0.001, 100.0), st.floats(0.0, 100.0))
def test_training_yields_exactly_while_it_has_its_share(training_s, other_s):
    assert may_interrupt(training_s, other_s, CONFIG) == (training_s / (training_s + other_s) >= CONFIG.training_share)


def test_training_that_has_just_begun_yields():
    assert may_interrupt(0.0, 0.0, CONFIG)


@given(st.integers(1, 64), st.integers(1, 8192), st.booleans())
def test_a_slice_of_training_has_at_least_one_row_and_no_more_tokens_than_it_may(num_rows, length, decoding):
    rows = training_rows(num_rows, length, decoding, CONFIG)
    most = CONFIG.training_tokens_while_decoding if decoding else CONFIG.training_tokens
    assert 1 <= rows <= num_rows and (rows == 1 or rows * length <= most)


# Holding


def test_a_step_is_held_for_one_that_comes_within_what_a_shared_pass_saves():
    assert plan(0.0, [decode(1, return_s=0.02)], [expected(0.002)]).hold_until_s == pytest.approx(0.003)


def test_it_is_held_for_the_last_of_those_that_come_in_time():
    coming = [expected(0.002), expected(0.004), expected(0.9)]
    assert plan(0.0, [decode(1, return_s=0.02)], coming).hold_until_s == pytest.approx(0.005)


@pytest.mark.parametrize(
    "now_s, coming, costs",
    [
        (0.0, expected(0.002), costs_of(compute_bound)),  # nothing is saved
        (0.0, expected(0.2), COSTS),  # too late
        (0.0, expected(0.002, return_s=0.5), COSTS),  # of another rhythm
        (0.01, expected(0.002), COSTS),  # overdue
        (0.0, expected(0.002, num_rows=600), COSTS),  # does not fit
    ],
)
def test_a_step_is_not_held_in_vain(now_s, coming, costs):
    """But for the moment in which the messages of one pass come one after the other."""
    until_s = plan(now_s, [decode(1, return_s=0.02)], [coming], costs=costs).hold_until_s
    assert until_s is None or until_s <= CONFIG.gather_share * costs.iteration_s(1)
    assert plan(0.02, [decode(1, return_s=0.02)], [coming], costs=costs).slices == (Slice(1, 1),)


def test_a_step_that_arrived_during_a_pass_is_held_from_its_end():
    waiting, coming = [decode(1, return_s=0.02)], [expected(1.002)]
    assert plan(1.0, waiting, coming, free_since_s=1.0).hold_until_s == pytest.approx(1.003)
    assert plan(1.0, waiting, coming, free_since_s=0.5).slices == (Slice(1, 1),)


def test_while_steps_arrive_the_next_one_is_waited_for_a_moment():
    waiting, coming = [decode(1), decode(2, arrived_s=0.0004)], [expected(9.0)]
    until_s = plan(0.0004, waiting, coming).hold_until_s
    assert until_s == pytest.approx(0.0004 + CONFIG.gather_share * 0.010, rel=0.05)
    assert plan(until_s, waiting, coming).slices == (Slice(1, 1), Slice(2, 1))


def test_the_first_server_of_a_machine_gathers_its_sessions():
    coming = [expected(0.02)]
    first = plan(0.0, [decode(1, return_s=0.03, begins_round=True)], coming, shares_machine=True)
    assert first.hold_until_s == pytest.approx(0.021)
    assert plan(0.001, [decode(1, return_s=0.03)], coming, shares_machine=True).slices == (Slice(1, 1),)
    assert plan(0.001, [decode(1, return_s=0.03, begins_round=True)], coming).slices == (Slice(1, 1),)


def test_a_lone_session_is_never_held():
    for shares_machine in (False, True):
        waiting = [decode(1, return_s=0.03, begins_round=True)]
        assert plan(0.0, waiting, shares_machine=shares_machine).slices == (Slice(1, 1),)


# Any snapshot


works = st.lists(
    st.tuples(
        st.sampled_from(list(Kind)), st.integers(1, 40), st.integers(1, 600), st.floats(0, 5), st.booleans(),
        st.one_of(st.none(), st.floats(0, 1)),
    ),
    max_size=30,
)  # fmt: skip
coming = st.lists(st.floats(0, 6), max_size=20)


def snapshot_of(works, coming, shares_machine: bool, now_s: float = 5.0) -> Snapshot:
    waiting = [
        Waiting(number, kind, rows, 1 if kind is Kind.DECODE else length, at_s, return_s, begins)
        for number, (kind, rows, length, at_s, begins, return_s) in enumerate(works)
    ]
    return Snapshot(now_s, waiting, [expected(at_s) for at_s in coming], now_s - 0.001, shares_machine)


@given(works, coming, st.booleans(), st.sampled_from([memory_bound, compute_bound]))
@settings(max_examples=200, deadline=None)
def test_whatever_waits_a_plan_is_sound(works, coming, shares, cost):
    snapshot = snapshot_of(works, coming, shares)
    now = compose(snapshot, costs_of(cost), CONFIG)
    by_number = {work.number: work for work in snapshot.waiting}
    assert bool(now.slices) + (now.training is not None) + (now.hold_until_s is not None) == bool(by_number)
    assert len({each.number for each in now.slices}) == len(now.slices)
    assert all(1 <= each.length <= by_number[each.number].length for each in now.slices)
    assert all(by_number[each.number].kind is not Kind.TRAINING for each in now.slices)
    assert now.training is None or by_number[now.training].kind is Kind.TRAINING
    assert now.hold_until_s is None or now.hold_until_s > snapshot.now_s
    tokens = [by_number[each.number].num_rows * each.length for each in now.slices]
    assert sum(tokens) <= CONFIG.max_tokens or len(tokens) <= 2


@given(works, coming, st.booleans())
@settings(max_examples=100, deadline=None)
def test_holding_ends_though_nobody_comes(works, coming, shares):
    snapshot = snapshot_of(works, coming, shares)
    for _ in range(100):
        now = compose(snapshot, COSTS, CONFIG)
        if now.hold_until_s is None:
            break
        snapshot = Snapshot(now.hold_until_s, snapshot.waiting, snapshot.expected, 4.999, shares)
    assert now.hold_until_s is None and snapshot.now_s < 7.1


@given(works, coming, st.integers(0, 29))
@settings(max_examples=100, deadline=None)
def test_what_was_cancelled_is_as_if_it_had_never_come(works, coming, gone):
    snapshot = snapshot_of(works, coming, False)
    rest = [work for work in snapshot.waiting if work.number != gone]
    now = compose(Snapshot(snapshot.now_s, rest, snapshot.expected), COSTS, CONFIG)
    assert now.training != gone and all(each.number != gone for each in now.slices)


# What passes cost


def test_costs_lie_between_what_was_seen():
    for tokens in (1, 4, 8, 20, 100, 512):
        assert COSTS.iteration_s(tokens) == pytest.approx(memory_bound(tokens), rel=0.05)
    assert COSTS.tokens_within(memory_bound(100)) == pytest.approx(100, rel=0.05)
    assert COSTS.saving_s(4, 4) == pytest.approx(0.010, rel=0.1)
    assert costs_of(compute_bound).saving_s(4, 4) < 0.001


def test_a_bend_in_the_costs_is_followed():
    points = {1: 0.139, 8: 0.174, 16: 0.288, 32: 0.42, 512: 2.96}
    costs = CostModel()
    for tokens, seconds in points.items():
        costs.observe(tokens, seconds)
    assert costs.tokens_within(1.8 * costs.iteration_s(8)) == pytest.approx(19, abs=1)


def test_one_outlier_teaches_nothing():
    costs = costs_of(memory_bound)
    costs.observe(8, 5.0)
    assert costs.iteration_s(8) == pytest.approx(memory_bound(8), rel=0.05)


def test_a_machine_that_has_become_slower_is_believed():
    costs = costs_of(memory_bound)
    for _ in range(5):
        costs.observe(8, 0.05)
    assert costs.iteration_s(8) == 0.05 and costs.iteration_s(32) >= 0.05


def test_many_iterations_of_one_size_do_not_wipe_out_what_is_known_of_others():
    costs = costs_of(memory_bound)
    for _ in range(1000):
        costs.observe(8, memory_bound(8))
    assert costs.iteration_s(512) == pytest.approx(memory_bound(512))


def test_nothing_observed_costs_nothing_and_allows_nothing():
    assert CostModel().iteration_s(8) == 0.0 and CostModel().tokens_within(1.0) == 0
    assert CostModel().saving_s(1, 1) == 0.0


@given(st.lists(st.tuples(st.integers(1, 2048), st.floats(1e-4, 10.0)), min_size=1, max_size=60))
@settings(max_examples=150, deadline=None)
def test_whatever_was_observed_more_tokens_take_longer_and_less_each(observed):
    costs = CostModel()
    for tokens, seconds in observed:
        costs.observe(tokens, seconds)
    sizes = [1, 2, 3, 5, 8, 13, 40, 100, 300, 1000, 2048, 5000]
    for fewer, more in itertools.pairwise(sizes):
        fewer_s, more_s = costs.iteration_s(fewer), costs.iteration_s(more)
        assert 0 < fewer_s <= more_s * (1 + 1e-9)
        assert more_s / more <= fewer_s / fewer * (1 + 1e-9)
        assert costs.saving_s(fewer, more) >= 0
        tokens = costs.tokens_within(more_s)
        assert costs.iteration_s(tokens) <= more_s * (1 + 1e-9)


# When steps come


def rounds(returns: ReturnTimes, times_s: list[float], *, session: object = "session") -> float:
    """Let a session go round, taking so long each time; returns the time at which its last output left."""
    now_s = 0.0
    for time_s in times_s:
        returns.left(session, 1, now_s)
        returns.returned(session, now_s + time_s)
        now_s += time_s + 0.07
    returns.left(session, 1, now_s)
    return now_s


def test_a_step_is_expected_when_it_usually_comes():
    returns = ReturnTimes()
    left_s = rounds(returns, [0.03] * 20)
    (step,) = returns.expected(left_s)
    assert step.at_s == pytest.approx(left_s + 0.03, abs=0.002) and step.until_s < left_s + 0.05
    assert step.return_s == pytest.approx(0.03, abs=0.002)


def test_the_less_regular_a_session_the_later_it_is_overdue():
    regular, uneven = ReturnTimes(), ReturnTimes()
    waits_s = [
        step.until_s - step.at_s
        for returns, times_s in ((regular, [0.03] * 40), (uneven, [0.01, 0.05] * 20))
        for step in returns.expected(rounds(returns, times_s))
    ]
    assert waits_s[0] < 0.005 < 0.02 < waits_s[1]


def test_a_session_is_expected_only_between_its_output_and_its_next_step():
    returns = ReturnTimes()
    now_s = rounds(returns, [0.03] * 3)
    assert len(returns.expected(now_s)) == 1
    assert returns.returned("session", now_s + 0.03) == pytest.approx(0.03, abs=0.005)
    assert returns.expected(now_s + 0.03) == ()


def test_a_session_is_not_expected_before_it_has_returned_once():
    returns = ReturnTimes()
    assert returns.returned("session", 0.0) is None
    returns.left("session", 1, 1.0)
    assert returns.expected(1.0) == ()


def test_a_silent_session_is_idle_after_a_while_and_a_closed_one_at_once():
    returns = ReturnTimes()
    now_s = rounds(returns, [0.03] * 3)
    assert len(returns.expected(now_s + 0.5)) == 1 and returns.expected(now_s + 1.5) == ()
    returns.forget("session")
    assert returns.expected(now_s) == ()


def test_a_long_pause_is_soon_forgotten_and_a_new_rhythm_soon_learned():
    paused, slower = ReturnTimes(), ReturnTimes()
    left_s = rounds(paused, [*[0.03] * 20, 60.0, *[0.03] * 8])
    assert paused.expected(left_s)[0].return_s < 0.045
    left_s = rounds(slower, [*[0.03] * 20, *[0.3] * 12])
    assert slower.expected(left_s)[0].return_s > 0.2
