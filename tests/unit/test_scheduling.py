"""What the scheduler brings about, hour by simulated hour; see tests/simulation.py. Single plans: test_scheduler.py."""

from __future__ import annotations

import pytest
from simulation import Client, Clock, Machine, Server, Work, compute_bound, memory_bound, percentile

from swarm.server.scheduler import Kind, SchedulerConfig

CONFIG = SchedulerConfig()


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
