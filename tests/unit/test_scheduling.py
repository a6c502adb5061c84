"""What the next iteration runs, by single plans and by simulated hours; see tests/simulation.py."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import Client, Clock, Machine, Server, Work, percentile

from swarm.server.scheduler import (
    Kind,
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


def memory_bound(num_tokens: int) -> float:
    """Reading the weights is what a pass costs."""
    return 0.010 + 0.0002 * num_tokens


def compute_bound(num_tokens: int) -> float:
    """Every token costs; a shared pass saves nothing to speak of."""
    return 0.0001 + 0.004 * num_tokens


def costs_of(cost) -> CostModel:
    costs = CostModel()
    for tokens in (1, 8, 32, 128, 512):
        for _ in range(3):
            costs.observe(tokens, cost(tokens))
    return costs


COSTS = costs_of(memory_bound)


def decode(number: int, *, arrived_s: float = 0.0, **more) -> Waiting:
    return Waiting(number, Kind.DECODE, 1, 1, arrived_s, **more)


def prefill(number: int, length: int, *, num_rows: int = 1, arrived_s: float = 0.0) -> Waiting:
    return Waiting(number, Kind.PREFILL, num_rows, length, arrived_s)


def training(number: int, *, arrived_s: float = 0.0) -> Waiting:
    return Waiting(number, Kind.TRAINING, 4, 128, arrived_s)


# Single plans.


def test_all_waiting_decode_steps_run_at_once():
    plan = compose(Snapshot(1.0, [decode(number) for number in range(40)]), COSTS, CONFIG)
    assert plan.slices == tuple(Slice(number, 1) for number in range(40))


def test_a_prefill_that_nobody_waits_beside_takes_the_whole_budget():
    assert compose(Snapshot(0.0, [prefill(1, 2048)]), COSTS, CONFIG).slices == (Slice(1, 512),)


@pytest.mark.parametrize("num_decoding", [1, 8, 32])
@pytest.mark.parametrize("cost", [memory_bound, compute_bound])
def test_beside_decode_steps_a_prefill_is_cut_so_that_the_pass_stays_short(num_decoding, cost):
    waiting = [*(decode(number) for number in range(num_decoding)), prefill(99, 2048)]
    plan = compose(Snapshot(1.0, waiting), costs_of(cost), CONFIG)
    (chunk,) = [each.length for each in plan.slices if each.number == 99]
    alone_s, together_s = cost(num_decoding), cost(num_decoding + chunk)
    assert len(plan.slices) == num_decoding + 1
    assert chunk == 1 or together_s <= 1.85 * alone_s
    assert cost(num_decoding + 2 * chunk) > 1.5 * alone_s  # not much smaller than it may be


def test_every_prefill_progresses_by_a_token_per_row():
    waiting = [decode(1), prefill(2, 64, num_rows=16)]
    assert Slice(2, 1) in compose(Snapshot(0.0, waiting), costs_of(compute_bound), CONFIG).slices


def test_training_runs_when_nothing_else_does_or_when_it_has_waited_long():
    assert compose(Snapshot(0.0, [training(1)]), COSTS, CONFIG).training == 1
    waiting = [training(1), decode(2)]
    assert compose(Snapshot(0.1, waiting), COSTS, CONFIG).slices == (Slice(2, 1),)
    assert compose(Snapshot(CONFIG.max_training_wait_s, waiting), COSTS, CONFIG).training == 1


def test_with_nothing_to_do_there_is_nothing_to_wait_for():
    plan = compose(Snapshot(0.0, []), COSTS, CONFIG)
    assert plan.slices == () and plan.training is None and plan.hold_until_s is None


def expected(at_s: float, *, return_s: float = 0.02) -> Expected:
    return Expected(at_s, at_s + 0.001, 1, return_s)


def test_a_step_is_held_for_one_that_comes_within_what_a_shared_pass_saves():
    snapshot = Snapshot(0.0, [decode(1, return_s=0.02)], [expected(0.002)])
    assert compose(snapshot, COSTS, CONFIG).hold_until_s == pytest.approx(0.003)


@pytest.mark.parametrize(
    "snapshot, costs",
    [
        (Snapshot(0.0, [decode(1, return_s=0.02)], [expected(0.002)]), costs_of(compute_bound)),  # nothing is saved
        (Snapshot(0.0, [decode(1, return_s=0.02)], [expected(0.2)]), COSTS),  # too late
        (Snapshot(0.0, [decode(1, return_s=0.02)], [expected(0.002, return_s=0.5)]), COSTS),  # of another rhythm
        (Snapshot(0.01, [decode(1, return_s=0.02)], [expected(0.002)]), COSTS),  # overdue
    ],
)
def test_a_step_is_not_held_in_vain(snapshot, costs):
    """But for the moment in which the messages of one pass come one after the other."""
    until_s = compose(snapshot, costs, CONFIG).hold_until_s
    assert until_s is None or until_s <= CONFIG.gather_share * costs.saving_s(1, 1)
    later = Snapshot(0.02, snapshot.waiting, snapshot.expected)
    assert compose(later, costs, CONFIG).slices == (Slice(1, 1),)


def test_the_first_server_of_a_machine_gathers_its_sessions():
    held = Snapshot(0.0, [decode(1, return_s=0.03, begins_round=True)], [expected(0.02)], shares_machine=True)
    assert compose(held, COSTS, CONFIG).hold_until_s is not None
    second = Snapshot(0.001, [decode(1, return_s=0.03)], [expected(0.02)], shares_machine=True)
    assert compose(second, COSTS, CONFIG).slices == (Slice(1, 1),)


def test_training_keeps_its_share():
    assert may_interrupt(1.0, 3.9, CONFIG) and not may_interrupt(1.0, 4.1, CONFIG)


def test_slices_of_training_are_small_while_sessions_decode():
    assert training_rows(32, 128, True, CONFIG) == 1 and training_rows(32, 128, False, CONFIG) == 16
    assert training_rows(4, 4096, True, CONFIG) == 1 and training_rows(2, 8, False, CONFIG) == 2


works = st.lists(
    st.tuples(
        st.sampled_from(list(Kind)), st.integers(1, 40), st.integers(1, 600), st.floats(0, 5), st.booleans(),
        st.one_of(st.none(), st.floats(0, 1)),
    ),
    max_size=30,
)  # fmt: skip


@given(works, st.lists(st.floats(0, 6), max_size=20), st.booleans(), st.sampled_from([memory_bound, compute_bound]))
@settings(max_examples=300, deadline=None)
def test_whatever_waits_a_plan_is_sound(works, coming, shares, cost):
    waiting = [
        Waiting(number, kind, rows, 1 if kind is Kind.DECODE else length, at_s, return_s, begins)
        for number, (kind, rows, length, at_s, begins, return_s) in enumerate(works)
    ]
    now_s = 5.0
    snapshot = Snapshot(now_s, waiting, [expected(at_s) for at_s in coming], shares_machine=shares)
    plan = compose(snapshot, costs_of(cost), CONFIG)
    by_number = {work.number: work for work in waiting}
    assert (bool(plan.slices) + (plan.training is not None) + (plan.hold_until_s is not None)) <= 1
    assert len({each.number for each in plan.slices}) == len(plan.slices)
    assert all(1 <= each.length <= by_number[each.number].length for each in plan.slices)
    assert all(by_number[each.number].kind is not Kind.TRAINING for each in plan.slices)
    tokens = [by_number[each.number].num_rows * each.length for each in plan.slices]
    assert sum(tokens) <= CONFIG.max_tokens or len(tokens) <= 2
    if plan.hold_until_s is not None:
        assert plan.hold_until_s > now_s
    if waiting and not plan.slices and plan.training is None:
        assert plan.hold_until_s is not None


# Simulated time.


def run(servers: int, clients: int, *, cost=memory_bound, think_s: float = 0.004, **more):
    """Clients that decode over a chain of servers on one machine; returns (clock, servers, clients)."""
    clock = Clock()
    machine = Machine(clock)
    machine.shared = servers > 1
    chain = [Server(clock, machine, cost, config=CONFIG, seed=seed, **more) for seed in range(servers)]
    people = [Client(clock, chain, lambda: think_s) for _ in range(clients)]
    for number, person in enumerate(people):
        person.start(0.0137 * number)
    return clock, chain, people


def p95_between(people, start_s: float, end_s: float) -> float:
    return percentile([gap for person in people for gap in person.gaps_s(start_s, end_s)], 0.95)


@pytest.mark.parametrize("cost", [memory_bound, compute_bound])
def test_all_sessions_get_the_same(cost):
    clock, _, people = run(1, 8, cost=cost)
    clock.run_until(20.0)
    counts = [len(person.token_times_s) for person in people]
    assert min(counts) > 0.9 * max(counts) > 0


def test_eight_sessions_cost_little_more_than_one():
    clock, _, alone = run(1, 1)
    clock.run_until(20.0)
    clock, _, people = run(1, 8)
    clock.run_until(20.0)
    assert sum(len(person.token_times_s) for person in people) > 6 * len(alone[0].token_times_s)


@pytest.mark.parametrize("cost", [memory_bound, compute_bound])
def test_a_long_prefill_slows_decoding_at_most_twofold_and_ends(cost):
    clock, chain, people = run(1, 8, cost=cost)
    clock.run_until(10.0)
    before_s = p95_between(people, 2.0, 10.0)
    newcomer = Client(clock, chain, lambda: 0.004, prompt=2048)
    newcomer.start(10.0)
    clock.run_until(90.0)
    assert newcomer.first_token_s is not None
    assert p95_between(people, 10.0, newcomer.first_token_s) <= 2 * before_s


@pytest.mark.parametrize("cost, most", [(memory_bound, 1.5), (compute_bound, 2.0)])
def test_training_slows_decoding_by_half_or_less_and_progresses(cost, most):
    """Where every token costs, a slice of one sequence is as small as it gets, and takes longer."""
    clock, chain, people = run(1, 8, cost=cost)
    clock.run_until(10.0)
    before_s = p95_between(people, 2.0, 10.0)

    def train() -> None:
        chain[0].arrive(Work(Kind.TRAINING, 8, 128, output=train))

    train()
    clock.run_until(60.0)
    assert p95_between(people, 10.0, 60.0) <= most * before_s
    assert chain[0].training_tokens > 0


def test_sessions_over_servers_of_one_machine_come_to_share_their_passes():
    clock, chain, _ = run(3, 8)
    clock.run_until(40.0)
    batches = [each.num_decodes for server in chain for each in server.iterations if each.ended_s > 30.0]
    assert sum(batches) / len(batches) > 5


def test_sessions_of_different_rhythm_do_not_wait_for_each_other():
    clock = Clock()
    machine = Machine(clock)
    server = Server(clock, machine, memory_bound, config=CONFIG)
    fast, slow = Client(clock, [server], lambda: 0.002), Client(clock, [server], lambda: 0.4)
    fast.start(0.0)
    slow.start(0.01)
    clock.run_until(20.0)
    assert percentile(fast.gaps_s(2.0), 0.5) < 0.016  # a pass and its own way round


def test_a_session_that_leaves_holds_nobody_up():
    clock, _, people = run(1, 4)
    clock.run_until(5.0)
    before_s = p95_between(people[1:], 2.0, 5.0)
    people[0].stop()
    clock.run_until(10.0)
    assert p95_between(people[1:], 5.1, 10.0) <= 1.1 * before_s


# What is learned of time.


def test_costs_lie_between_what_was_seen():
    for tokens in (1, 4, 8, 20, 100, 512):
        assert COSTS.iteration_s(tokens) == pytest.approx(memory_bound(tokens), rel=0.05)
    assert COSTS.tokens_within(memory_bound(100)) == pytest.approx(100, rel=0.05)
    assert COSTS.saving_s(4, 4) == pytest.approx(0.010, rel=0.1)
    assert costs_of(compute_bound).saving_s(4, 4) < 0.001


def test_one_outlier_teaches_nothing():
    costs = costs_of(memory_bound)
    costs.observe(8, 5.0)
    assert costs.iteration_s(8) == pytest.approx(memory_bound(8), rel=0.05)


def test_a_steps_return_is_expected_when_it_usually_comes_and_not_for_ever():
    returns = ReturnTimes()
    for round_ in range(20):
        returns.left("session", 1, round_ * 0.1)
        assert returns.returned("session", round_ * 0.1 + 0.03) is not None
    returns.left("session", 1, 2.0)
    (step,) = returns.expected(2.0)
    assert step.at_s == pytest.approx(2.03, abs=0.002) and step.until_s < 2.05
    assert returns.expected(100.0) == ()
    returns.forget("session")
    assert returns.expected(2.0) == ()
