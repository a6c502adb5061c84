"""What the scheduler's decisions come to over time, in a simulated swarm: speed, fairness, and that nobody starves."""

from __future__ import annotations

import itertools

import pytest
from simulation import Client, Cost, Swarm, Trainer, p95_gap_s, tokens_per_s

from swarm.server.scheduler import SchedulerConfig

NEVER_HOLD = SchedulerConfig(hold_share=0, ring_share=0, gather_share=0)
THINK_S = 0.02
WARM_S, END_S = 8.0, 16.0


def line(fixed_s: float, per_token_s: float) -> Cost:
    return lambda num_tokens: fixed_s + per_token_s * num_tokens


MEMORY_BOUND = line(0.1, 0.002)
COMPUTE_BOUND = line(0.0, 0.05)


def two_cores(num_tokens: int) -> float:
    """A 1.1B model in bfloat16 on 2 cores, as measured: flat up to 8 tokens, then steep, then 170 tokens/s."""
    points = [(0, 0.135), (1, 0.139), (8, 0.174), (16, 0.288), (32, 0.42), (64, 0.62), (512, 2.96), (2048, 11.8)]
    for (left, left_s), (right, right_s) in itertools.pairwise(points):
        if num_tokens <= right:
            return left_s + (right_s - left_s) * (num_tokens - left) / (right - left)
    raise AssertionError(num_tokens)


def speed(swarm: Swarm, num_clients: int, think_s: float = THINK_S, **options: float) -> float:
    """Tokens per second of so many clients together, after a while."""
    clients = swarm.decoding(num_clients, think_s, **options)
    swarm.clock.run_until(END_S)
    return tokens_per_s(clients, WARM_S, END_S)


def together(cost: Cost, num_clients: int, think_s: float = THINK_S) -> float:
    """Their speed if all share every pass."""
    return num_clients / (cost(num_clients) + think_s)


COSTS = pytest.mark.parametrize("cost", [MEMORY_BOUND, two_cores], ids=["memory bound", "two cores"])
TURNS = pytest.mark.parametrize("turns", [True, False], ids=["in turns", "side by side"])
SWARMS = pytest.mark.parametrize(
    ("num_servers", "one_machine"), [(1, True), (3, True), (3, False)], ids=["one server", "one machine", "apart"]
)


# Sharing passes


@COSTS
@pytest.mark.parametrize("num_clients", [2, 8, 16])
def test_clients_of_one_server_share_its_passes(cost: Cost, num_clients: int):
    assert speed(Swarm.of(1, cost), num_clients) > 0.9 * together(cost, num_clients)


def test_without_holding_the_clients_of_one_server_take_two_passes_for_each_token():
    assert speed(Swarm.of(1, MEMORY_BOUND, config=NEVER_HOLD), 8) < 0.65 * together(MEMORY_BOUND, 8)


@COSTS
@TURNS
@pytest.mark.parametrize("num_clients", [2, 8, 16])
def test_groups_that_chase_each_other_round_three_servers_on_one_machine_merge(
    cost: Cost, num_clients: int, turns: bool
):
    swarm = Swarm.of(3, cost, one_machine=True, turns=turns)
    assert speed(swarm, num_clients) > 0.75 * together(cost, num_clients)
    sizes = [each.num_decodes for each in swarm.servers[2].iterations if each.ended_s > WARM_S]
    assert sum(sizes) / len(sizes) > 0.75 * num_clients


@TURNS
def test_without_holding_they_never_merge(turns: bool):
    swarm = Swarm.of(3, MEMORY_BOUND, one_machine=True, turns=turns, config=NEVER_HOLD)
    assert speed(swarm, 8) < 0.65 * together(MEMORY_BOUND, 8)


@pytest.mark.parametrize("num_servers", [2, 6])
def test_groups_merge_in_rings_of_other_lengths(num_servers: int):
    assert speed(Swarm.of(num_servers, MEMORY_BOUND, one_machine=True), 8) > 0.75 * together(MEMORY_BOUND, 8)


@COSTS
@pytest.mark.parametrize("num_clients", [3, 8])
def test_servers_on_machines_of_their_own_lose_little_by_holding(cost: Cost, num_clients: int):
    """They would work at the same time, each for another group: a shared pass gains nothing there."""
    held, free = (speed(Swarm.of(3, cost, config=config), num_clients) for config in (SchedulerConfig(), NEVER_HOLD))
    assert held > 0.9 * free


@SWARMS
@pytest.mark.parametrize("num_clients", [2, 8])
def test_nobody_is_held_where_time_grows_with_every_token(num_servers: int, one_machine: bool, num_clients: int):
    held, free = (
        speed(Swarm.of(num_servers, COMPUTE_BOUND, one_machine=one_machine, config=config), num_clients)
        for config in (SchedulerConfig(), NEVER_HOLD)
    )
    assert held > 0.97 * free


@COSTS
def test_clients_near_by_are_not_slowed_down_by_clients_far_away(cost: Cost):
    def rates(config: SchedulerConfig) -> tuple[float, float]:
        swarm = Swarm.of(1, cost, config=config)
        near, far = swarm.decoding(2, 0.005), swarm.decoding(6, 0.6)
        swarm.clock.run_until(END_S)
        return tokens_per_s(near, WARM_S, END_S), tokens_per_s(far, WARM_S, END_S)

    held, free = rates(SchedulerConfig()), rates(NEVER_HOLD)
    assert held[0] > free[0] and held[1] > 0.95 * free[1]


def test_clients_with_very_uneven_pauses_lose_little_by_holding():
    held, free = (
        speed(Swarm.of(1, MEMORY_BOUND, config=config), 8, 0.3, jitter=0.6)
        for config in (SchedulerConfig(), NEVER_HOLD)
    )
    assert held > 0.95 * free


def test_a_single_client_is_never_held():
    assert speed(Swarm.of(3, MEMORY_BOUND, one_machine=True), 1) > 0.96 * together(MEMORY_BOUND, 1)


# Fairness


@COSTS
@pytest.mark.parametrize("num_servers", [1, 3])
def test_all_sessions_get_the_same_number_of_tokens(cost: Cost, num_servers: int):
    swarm = Swarm.of(num_servers, cost, one_machine=True)
    clients = swarm.decoding(8, THINK_S)
    swarm.clock.run_until(END_S)
    counts = [len(each.gaps_s(WARM_S)) for each in clients]
    assert min(counts) > 0.9 * max(counts)


def test_more_rows_than_one_iteration_takes_are_served_in_turn():
    swarm = Swarm.of(1, MEMORY_BOUND, config=SchedulerConfig(max_tokens=16))
    clients = [swarm.client(THINK_S, num_rows=1 + number % 5).start(0.0) for number in range(16)]
    swarm.clock.run_until(END_S)
    counts = [len(each.gaps_s(WARM_S)) for each in clients]
    assert min(counts) > 0.5 * max(counts)


# Prefill beside decoding


@COSTS
@SWARMS
def test_a_prefill_of_2048_tokens_at_most_doubles_the_time_between_the_tokens_of_others(
    cost: Cost, num_servers: int, one_machine: bool
):
    swarm = Swarm.of(num_servers, cost, one_machine=one_machine)
    clients = swarm.decoding(8, THINK_S)
    swarm.clock.run_until(WARM_S)
    late = swarm.client(THINK_S, prompt_tokens=2048).start(WARM_S)
    swarm.run_until(lambda: bool(late.token_times_s), 120.0)
    assert p95_gap_s(clients, WARM_S, late.first_token_s) <= 2 * p95_gap_s(clients, 2.0, WARM_S)
    assert late.first_token_s - WARM_S < 8 * 4 * cost(512)


def test_a_prefill_alone_is_not_cut_up():
    client = (swarm := Swarm.of(1, MEMORY_BOUND)).client(THINK_S, prompt_tokens=2048).start(0.0)
    swarm.run_until(lambda: bool(client.token_times_s), 20.0)
    assert client.first_token_s < 1.1 * 4 * MEMORY_BOUND(512)


@COSTS
def test_a_short_prompt_does_not_wait_for_a_long_one_and_the_long_one_does_not_starve(cost: Cost):
    swarm = Swarm.of(1, cost)
    swarm.decoding(4, THINK_S)
    long = swarm.client(THINK_S, prompt_tokens=512).start(1.0)
    starts_s = [1.0 + 0.7 * number for number in range(60)]
    short = [swarm.client(60.0, prompt_tokens=8).start(start_s) for start_s in starts_s]
    swarm.clock.run_until(50.0)
    waits_s = sorted(each.first_token_s - start_s for each, start_s in zip(short, starts_s, strict=True))
    assert waits_s[30] < 4 * cost(16)
    assert waits_s[-1] < SchedulerConfig().max_prefill_wait_s + 4 * cost(512)
    assert long.first_token_s < 1.0 + 10 * cost(512)


# Training beside the rest


@COSTS
@SWARMS
def test_training_raises_the_time_between_tokens_by_at_most_half_and_progresses(
    cost: Cost, num_servers: int, one_machine: bool
):
    swarm = Swarm.of(num_servers, cost, one_machine=one_machine)
    clients = swarm.decoding(8, THINK_S)
    swarm.clock.run_until(WARM_S)
    trainer = Trainer(swarm.clock, swarm.servers, 4, 128).start(WARM_S)
    swarm.clock.run_until(38.0)
    assert p95_gap_s(clients, WARM_S, 38.0) <= 1.5 * p95_gap_s(clients, 2.0, WARM_S)
    assert trainer.busy_s > 0.1 * 30.0


def test_training_runs_at_full_speed_while_nobody_decodes():
    trainer = Trainer((swarm := Swarm.of(1, MEMORY_BOUND)).clock, swarm.servers, 4, 128).start(0.0)
    swarm.clock.run_until(60.0)
    assert trainer.num_batches >= 8  # each 3.4 s forward and 3.4 s backward


def test_training_keeps_its_share_where_decoding_never_pauses():
    swarm = Swarm.of(1, MEMORY_BOUND)
    clients = [each for think_s in (0.0, 0.05) for each in swarm.decoding(8, think_s, jitter=0.0)]
    trainer = Trainer(swarm.clock, swarm.servers, 4, 128).start(0.0)
    swarm.clock.run_until(40.0)
    assert 0.15 < trainer.busy_s / 40.0 < 0.35
    assert all(each.token_times_s[-1] > 39.0 for each in clients)


def test_training_and_prefills_and_decoding_all_progress_together():
    swarm = Swarm.of(1, two_cores)
    clients = swarm.decoding(8, THINK_S)
    trainer = Trainer(swarm.clock, swarm.servers, 4, 128).start(1.0)
    prompts = [swarm.client(60.0, prompt_tokens=64).start(5.0 + 5 * number) for number in range(6)]
    swarm.clock.run_until(50.0)
    assert all(each.first_token_s < 5.0 + 5 * number + 10.0 for number, each in enumerate(prompts))
    assert trainer.busy_s > 0.1 * 50.0
    assert max(gap_s for each in clients for gap_s in each.gaps_s(5.0)) < 8 * two_cores(8)


# Leaving


def test_sessions_that_leave_in_the_middle_disturb_nobody():
    swarm = Swarm.of(3, MEMORY_BOUND, one_machine=True)
    leaving, staying = swarm.decoding(8, THINK_S), swarm.decoding(8, THINK_S)
    prompt = swarm.client(THINK_S, prompt_tokens=2048).start(WARM_S - 1.0)
    for number, each in enumerate([*leaving, prompt]):
        swarm.clock.at(WARM_S + 0.037 * number, each.stop)
    swarm.clock.run_until(3 * WARM_S)
    assert tokens_per_s(staying, 2 * WARM_S, 3 * WARM_S) > 0.75 * together(MEMORY_BOUND, 8)
    assert all(each.token_times_s[-1] < WARM_S + 2.0 for each in leaving)
    assert all(work.session in staying for server in swarm.servers for work in server.waiting.values())


def test_sessions_that_fall_silent_are_waited_for_only_for_a_moment():
    swarm = Swarm.of(1, MEMORY_BOUND)
    clients = swarm.decoding(8, THINK_S)
    silent = Client(swarm.clock, swarm.servers, lambda: THINK_S if swarm.clock.now_s < WARM_S else 1e9).start(0.0)
    swarm.clock.run_until(END_S)
    assert silent.token_times_s[-1] < WARM_S + 1.0
    assert tokens_per_s(clients, WARM_S, END_S) > 0.9 * together(MEMORY_BOUND, 8)


def test_training_whose_deadline_passes_in_the_queue_or_half_way_gives_way_to_the_next():
    swarm = Swarm.of(1, MEMORY_BOUND)
    half_way, queued, served = (Trainer(swarm.clock, swarm.servers, 4, 128).start(0.1 * number) for number in range(3))
    swarm.clock.at(1.0, half_way.stop)
    swarm.clock.at(1.0, queued.stop)
    swarm.clock.run_until(20.0)
    assert half_way.num_batches == queued.num_batches == 0
    assert served.num_batches == 2
