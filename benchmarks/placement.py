"""How well do servers spread themselves over the blocks while they come and go? They are made up, and so is the time.

What the simulated servers (simulator.py) decide comes from the functions that real servers call. References: the
optimum, were all servers that are there placed at will, and the published rule of Petals (arXiv 2209.01188, section
3.2): a server joins where blocks are weakest, and moves when re-placing everybody would raise the throughput enough.

python benchmarks/placement.py --scenario trouble --servers 10,100,1000 --seeds 0,1,2
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Any

import numpy as np
import numpy.typing as npt
from common import print_plain, rounded, say
from simulator import CHECK_PERIOD_S, HOUR_S, Rule, Server, Simulation, View, World

from swarm.ranges import BlockRange
from swarm.server import rebalancing
from swarm.server.rebalancing import Population

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

SCENARIOS: dict[str, dict[str, Any]] = {
    "churn": {"night": 0.5},
    "trouble": {"night": 0.5, "crowd": True, "num_outages": 4},
    "still": {"median_life_h": None, "random_start": True},
    "gap": {"median_life_h": None, "gap_at_h": 1.5},
}
"""churn: lives of log-normal length, more by day than by night. trouble: also a crowd that comes and leaves, and groups
of neighbours that go at once. still: nobody comes or leaves, all begin anywhere. gap: nobody comes, all servers of one
block leave at once."""


class Ours:
    """The rule of swarm.server.rebalancing."""

    def __str__(self) -> str:
        return "ours"

    def __init__(self) -> None:
        self.plan_s: list[float] = []
        """How long it took to find each."""

    def join(self, population: Population, length: int) -> BlockRange:
        start = rebalancing.choose_start(population, length)
        return BlockRange(start, start + length)

    def begin(self, simulation: Simulation, server: Server) -> None:
        """Only the server that a plan names needs to look."""

    def published(self, simulation: Simulation, view: View) -> None:
        """Everybody who sees this view finds the same moves: find them once, and let the servers in them look."""
        if not simulation.is_populated:
            return
        began_s = time.perf_counter()
        moves = rebalancing.best_moves(view.population)
        self.plan_s.append(time.perf_counter() - began_s)
        for move in moves:
            server = simulation.servers[view.numbers[move.server]]
            self._check_from(simulation, server, view, move.start, view.since_s + server.lag_s)

    def _check_from(self, simulation: Simulation, server: Server, view: View, start: int, from_s: float) -> None:
        check_s = simulation.next_check_s(server, from_s)
        simulation.at(check_s, lambda: self._check(simulation, server, view, start))

    def _check(self, simulation: Simulation, server: Server, view: View, start: int) -> None:
        if server.state != "online":
            return
        lag_s = server.confirm_lag_s if simulation.is_alarmed(server) else server.check_lag_s
        if simulation.view(lag_s) is not view:
            if simulation.now_s < view.since_s + server.check_lag_s:
                self._check_from(simulation, server, view, start, simulation.now_s + 0.5 * CHECK_PERIOD_S)
            return
        if simulation.now_s < server.looks_from_s:
            self._check_from(simulation, server, view, start, server.looks_from_s)
        else:
            simulation.ask(server, start)
            simulation.at(simulation.now_s + rebalancing.ASK_S, lambda: self._confirm(simulation, server))

    def _confirm(self, simulation: Simulation, server: Server) -> None:
        if server.state != "asking":
            return
        view = simulation.view(server.confirm_lag_s)
        population, numbers = view.population, view.numbers
        index = int(np.flatnonzero(numbers == server.number)[0])
        blocks = rebalancing.reconsider(population, index, server.start)
        if blocks is None:
            simulation.withdraw(server)
        else:
            simulation.go(server, blocks.start)


class Petals:
    """The published rule of Petals, with the settings of its servers: a look every two minutes on average.

    A server takes the blocks whose coverage, sorted, comes first. When it looks, it takes itself out, chooses anew, and
    lets all others choose anew until nobody changes: if the throughput is below `balance_quality` of what comes out, it
    goes. It reads the whole directory each time, so what it knows is as fresh as what a server that joins knows.
    """

    check_s = 120.0
    preference = 1.001
    """A server that chooses anew takes out a little more than it adds, so as to stay where others are as good."""
    fresh_s = 60.0
    """What re-placing everybody gives takes a second to compute, and is used by those that look within this time."""

    def __init__(self, balance_quality: float = 0.75) -> None:
        self.balance_quality = balance_quality
        self._replaced: tuple[float, float] = (-np.inf, 0.0)
        self._rng = np.random.default_rng(1)

    def __str__(self) -> str:
        return f"petals {self.balance_quality}"

    def join(self, population: Population, length: int) -> BlockRange:
        start = weakest_window(population.coverage_N, length)
        return BlockRange(start, start + length)

    def published(self, simulation: Simulation, view: View) -> None:
        """Nobody looks before it is time."""

    def begin(self, simulation: Simulation, server: Server) -> None:
        """It looks from now on."""
        self._later(simulation, server)

    def _later(self, simulation: Simulation, server: Server) -> None:
        wait_s = float(self._rng.uniform(0, 2 * self.check_s))
        simulation.at(simulation.now_s + wait_s, lambda: self._check(simulation, server))

    def _check(self, simulation: Simulation, server: Server) -> None:
        if server.state == "away":
            return
        self._later(simulation, server)
        if server.state != "online":
            return
        view = simulation.view(server.lag_s)
        population, found = view.population, np.flatnonzero(view.numbers == server.number)
        now = float(population.coverage_N.min())
        if now >= self.balance_quality * population.mean_coverage or not len(found):
            return  # re-placing everybody cannot give more than the mean
        rest = population.coverage_N
        rest[server.start : server.start + server.length] -= self.preference * server.rate / server.length
        start = weakest_window(rest, server.length)
        if start == server.start or (now > 0.0 and rest.min() <= 0.0):
            return  # in its best place already, or the only one there
        if simulation.now_s - self._replaced[0] > self.fresh_s:
            self._replaced = simulation.now_s, self._replace_all(population, int(found[0]), start)
        if now < self.balance_quality * self._replaced[1]:
            simulation.go(server, start)

    def _replace_all(self, population: Population, first: int, start: int) -> float:
        """The throughput when one server has moved, and then all others choose anew until nobody does."""
        starts, lengths = population.start_S.copy(), population.end_S - population.start_S
        adds = population.rate_S / lengths
        coverage = population.coverage_N

        def put(index: int, to: int) -> None:
            coverage[starts[index] : starts[index] + lengths[index]] -= adds[index]
            coverage[to : to + lengths[index]] += adds[index]
            starts[index] = to

        put(first, start)
        for _ in range(10):
            changed = False
            for index in self._rng.permutation(len(starts)):
                rest = coverage.copy()
                rest[starts[index] : starts[index] + lengths[index]] -= self.preference * adds[index]
                to = weakest_window(rest, int(lengths[index]))
                changed |= to != starts[index]
                put(int(index), to)
            if not changed:
                break
        return float(coverage.min())


def weakest_window(coverage: Floats, length: int) -> int:
    """The window whose sorted coverage comes first."""
    windows = np.sort(np.lib.stride_tricks.sliding_window_view(coverage, length), axis=1)
    left = np.arange(len(windows))
    for column in range(length):
        values = windows[left, column]
        left = left[values <= values.min() + 1e-9]
        if len(left) == 1:
            break
    return int(left[0])


def optimum(rate_S: Floats, length_S: Integers, num_blocks: int) -> float:
    """The throughput if every server could be divided among all the ranges of its length: a linear program.

    Servers of one length are one variable for each start, their rates taken together.
    """
    from scipy.optimize import linprog

    lengths = np.unique(length_S)
    columns = [(length, start) for length in lengths for start in range(num_blocks - length + 1)]
    # Maximize t: coverage of each block at least t, each length's rate used up.
    covers = np.zeros((num_blocks, len(columns) + 1))
    covers[:, -1] = 1.0
    uses = np.zeros((len(lengths), len(columns) + 1))
    for column, (length, start) in enumerate(columns):
        covers[start : start + length, column] = -1.0
        uses[np.searchsorted(lengths, length), column] = 1.0
    adds = [float((rate_S[length_S == length] / length).sum()) for length in lengths]
    goal = np.zeros(len(columns) + 1)
    goal[-1] = -1.0
    found = linprog(goal, A_ub=covers, b_ub=np.zeros(num_blocks), A_eq=uses, b_eq=adds, method="highs")
    return float(-found.fun)


def exact_optimum(rate_S: Floats, length_S: Integers, num_blocks: int) -> float:
    """The best of all placements; for a handful of servers."""
    coverage = np.zeros((1, num_blocks))
    for rate, length in zip(rate_S, length_S, strict=True):
        windows = np.zeros((num_blocks - length + 1, num_blocks))
        for start in range(len(windows)):
            windows[start, start : start + length] = rate / length
        coverage = np.unique((coverage[:, None, :] + windows).reshape(-1, num_blocks).round(9), axis=0)
    return float(coverage.min(axis=1).max())


def measure(world: World, rule: Rule, *, from_h: float = 1.0) -> dict[str, Any]:
    """Run one world under one rule; averages are over time, from an hour on."""
    began_s = time.perf_counter()
    record = Simulation(world, rule, optimum).run()
    times_s = np.array(record.times_s)
    lasts_s = np.diff(times_s, append=times_s[-1])
    lasts_s[times_s < from_h * HOUR_S] = 0.0
    total_s = max(float(lasts_s.sum()), 1e-9)
    throughput, bound = np.array(record.throughput), np.array(record.bound)
    shares = throughput / np.maximum(bound, 1e-9)
    order = np.argsort(shares)
    reached = np.cumsum(lasts_s[order]) / total_s
    row = {
        "rule": str(rule),
        "mean_servers": rounded(float((np.array(record.num_servers) * lasts_s).sum() / total_s)),
        "of_optimum": rounded(float((throughput * lasts_s).sum() / max((bound * lasts_s).sum(), 1e-9))),
        "of_optimum_p5": rounded(float(shares[order][np.searchsorted(reached, 0.05)])),
        "of_optimum_end": rounded(float(shares[-1])),
        "optimum_of_bound": rounded(min(each / most for most, each in record.optima)),
        "moves": len(record.moves_s),
        "returns": record.num_returns,
        "withdrawn": record.num_withdrawn,
        "last_move_h": rounded(record.moves_s[-1] / HOUR_S) if record.moves_s else None,
        "gaps": len(record.gaps),
        "longest_gap_s": rounded(max((length_s for _, length_s, _ in record.gaps), default=0.0)),
        "longest_gap_before_loading_s": rounded(max((all_s - load_s for _, all_s, load_s in record.gaps), default=0.0)),
        "took_s": rounded(time.perf_counter() - began_s),
    }
    if isinstance(rule, Ours):
        row |= {"plans": len(rule.plan_s), "plan_ms": rounded(1e3 * statistics.median(rule.plan_s))}
    return row


def measure_few(num_swarms: int, seed: int) -> dict[str, Any]:
    """Four servers of twelve blocks, coming one after the other, against the best placement there is."""
    rng = np.random.default_rng(seed)
    shares: dict[str, list[float]] = {"join": [], "moved": [], "petals_join": []}
    moves = []
    for _ in range(num_swarms):
        length_S = rng.integers(3, 9, 4)
        rate_S = rng.lognormal(5.0, 0.7, 4)
        best = exact_optimum(rate_S, length_S, 12)
        if best <= 0.0:
            continue
        swarm = _joined(rate_S, length_S, lambda population, length: rebalancing.choose_start(population, length))
        shares["join"].append(float(swarm.coverage_N.min()) / best)
        petals = _joined(rate_S, length_S, lambda population, length: weakest_window(population.coverage_N, length))
        shares["petals_join"].append(float(petals.coverage_N.min()) / best)
        moves.append(0)
        while found := rebalancing.best_moves(swarm):
            moves[-1] += 1
            swarm = swarm.moved(found[0].server, found[0].start, serving=True)
        shares["moved"].append(float(swarm.coverage_N.min()) / best)
    return {
        "swarms": len(moves),
        "of_optimum": {name: rounded(statistics.mean(values)) for name, values in shares.items()},
        "moves": rounded(statistics.mean(moves)),
        "most_moves": max(moves),
    }


def placed(rate_S: Floats, length_S: Integers, start_S: Integers) -> Population:
    """Servers that are somewhere and may move."""
    number = len(start_S)
    return Population(
        num_blocks=12,
        start_S=start_S,
        end_S=start_S + length_S[:number],
        rate_S=rate_S[:number],
        serving_S=np.ones(number, dtype=bool),
        asking_S=np.zeros(number, dtype=bool),
        movable_S=np.ones(number, dtype=bool),
        tie_S=np.linspace(0, 1, number, endpoint=False),
    )


def _joined(rate_S: Floats, length_S: Integers, choose: Any) -> Population:
    starts: list[int] = []
    for length in length_S:
        starts.append(choose(placed(rate_S, length_S, np.array(starts, dtype=np.int64)), int(length)))
    return placed(rate_S, length_S, np.array(starts, dtype=np.int64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", choices=[*SCENARIOS, "few"], default="churn")
    parser.add_argument("--servers", default="1000", help="numbers of servers, on average")
    parser.add_argument("--blocks", type=int, default=80)
    parser.add_argument("--hours", type=float, default=24.0)
    parser.add_argument("--seeds", default="0")
    parser.add_argument(
        "--rules", default="ours,petals", help="ours, petals, or petals-Q for another quality than 0.75"
    )
    arguments = parser.parse_args()
    if arguments.scenario == "few":
        print_plain("placement", scenario="few", **measure_few(200, 0))
        return
    options, rows = SCENARIOS[arguments.scenario], []
    for number, seed, name in itertools.product(
        map(int, arguments.servers.split(",")), map(int, arguments.seeds.split(",")), arguments.rules.split(",")
    ):
        world = World(num_servers=number, num_blocks=arguments.blocks, hours=arguments.hours, seed=seed, **options)
        rule: Rule = Ours() if name == "ours" else Petals(float(name.partition("-")[2] or 0.75))
        row = measure(world, rule)
        rows.append({"servers": number, "seed": seed, **row})
        say(f"{number} servers, seed {seed}, {rule}: {row['of_optimum']} of the optimum, {row['moves']} moves")
    setting = {"blocks": arguments.blocks, "hours": arguments.hours, "world": options}
    print_plain("placement", scenario=arguments.scenario, **setting, rows=rows)


if __name__ == "__main__":
    main()
