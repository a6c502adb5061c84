"""Who should serve which blocks, given everybody's announcements: pure functions of a snapshot.

Throughput is modelled as in a pipeline that tokens pass through block by block: a server that can run r blocks per
second, spread over its k blocks, adds r / k tokens per second to the coverage of each of them, and the swarm is as fast
as its least covered block. Every server computes the same plan from the same snapshot, and carries out its own part.

What is made small is the weakness: the sum over all blocks of exp(-coverage / tau), tau being a small share of the mean
coverage. That is nearly the minimum, but lifting any weak block counts, not the weakest alone. Moves that make it
smaller, each by some least amount, cannot go on in circles: where nobody comes or goes they end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from swarm.announcement import Announcement
from swarm.ranges import BlockRange

# S servers, N blocks of the model

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

SHARPNESS = 0.02
"""tau, as a share of the mean coverage."""

GOOD_ENOUGH = 0.95
"""While the least covered block has this share of the mean coverage, nobody moves."""

MIN_GAIN, MIN_SHARE = 0.1, 0.4
"""A move must take this share of all weakness away, and this share of what the same server could take away if all weak
blocks fitted into its range and it came from nowhere."""

MAX_MOVES = 4
"""How many servers move at a time."""

MIN_STAY_S, MAX_STAY_S = 600.0, 86400.0
"""How long a server stays before it moves for the first time, unless blocks have no server at all; after each move
twice as long as before, up to a day."""

CHECKS_PER_PERIOD = 2
"""How often a server looks whether it should move, in each announce period."""

ASK_S = 4.0
"""How long a server waits between announcing that it goes and going, to see what others have announced meanwhile."""

FREE, SETTLED, FIXED = 2, 1, 0
MOBILITY = {"free": FREE, "settled": SETTLED, "fixed": FIXED}
"""As announcements say it, and as a population has it."""


@dataclass(frozen=True, slots=True)
class Move:
    """One server's part of a plan."""

    server: int
    """Its index in the population."""
    start: int
    """The first of its new blocks; their number stays."""
    gain: float
    """The share of all weakness that it takes away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Population:
    """All servers of a model, where each is or is about to be. Draining ones are left out unless they go elsewhere."""

    num_blocks: int
    start_S: Integers
    end_S: Integers
    rate_S: Floats
    """Blocks per second, of single tokens."""
    serving_S: Bools
    """Whether it serves these blocks now and stays: if not, it is on its way there."""
    mobility_S: Integers
    """FREE, SETTLED or FIXED."""
    tie_S: Floats
    """In [0, 1), from the peer id: decides between servers that would do equally well."""

    @classmethod
    def of(cls, servers: Sequence[Announcement], num_blocks: int) -> Self:
        """Read announcements. A rate that is not known yet counts as the median of the known ones."""
        servers = [each for each in servers if each.num_model_blocks == num_blocks]
        servers = [each for each in servers if each.state != "draining" or each.next_blocks is not None]
        places = [each.next_blocks or each.blocks for each in servers]
        rates = np.array([each.decode_tokens_per_s * len(each.blocks) for each in servers], dtype=np.float64)
        known = rates[rates > 0]
        rates[rates <= 0] = np.median(known) if len(known) else 1.0
        staying = [each.state == "online" and each.next_blocks is None for each in servers]
        return cls(
            num_blocks=num_blocks,
            start_S=np.array([place.start for place in places], dtype=np.int64),
            end_S=np.array([place.end for place in places], dtype=np.int64),
            rate_S=rates,
            serving_S=np.array(staying, dtype=bool),
            mobility_S=np.array([MOBILITY[each.mobility] for each in servers], dtype=np.int64),
            tie_S=np.array([tie_break(each.peer_id) for each in servers], dtype=np.float64),
        )

    @property
    def coverage_N(self) -> Floats:
        """Tokens per second that each block can take, when everybody is where it is going."""
        return self._per_block(self.rate_S / (self.end_S - self.start_S))

    @property
    def servers_N(self) -> Floats:
        """How many servers serve each block and stay there."""
        return self._per_block(self.serving_S.astype(np.float64))

    @property
    def going_N(self) -> Floats:
        """How many servers serve each block or are on their way to it."""
        return self._per_block(np.ones_like(self.rate_S))

    @property
    def mean_coverage(self) -> float:
        """The throughput if all were covered alike: no placement gives more."""
        return max(float(self.rate_S.sum()) / self.num_blocks, 1e-9)

    @property
    def tau(self) -> float:
        return SHARPNESS * self.mean_coverage

    def _per_block(self, value_S: Floats) -> Floats:
        steps = np.bincount(self.start_S, value_S, self.num_blocks + 1)
        steps -= np.bincount(self.end_S, value_S, self.num_blocks + 1)
        sums: Floats = np.cumsum(steps[:-1])
        return np.maximum(sums, 0.0)


def choose_blocks(servers: Sequence[Announcement], num_model_blocks: int, num_blocks: int) -> BlockRange:
    """Return the blocks that a server joining with room for `num_blocks` should serve; see `choose_start`."""
    num_blocks = min(num_blocks, num_model_blocks)
    start = choose_start(Population.of(servers, num_model_blocks), num_blocks)
    return BlockRange(start, start + num_blocks)


def choose_start(population: Population, num_blocks: int) -> int:
    """Return the first of the blocks that a server joining with `num_blocks` blocks should serve; ties go to the front.

    Blocks that nobody serves come first, then the least covered ones.
    """
    weakness_N = _weakness(population.coverage_N, population)
    sums = np.concatenate([[0.0], np.cumsum(weakness_N)])
    gains = sums[num_blocks:] - sums[:-num_blocks]
    return int(np.flatnonzero(gains >= gains.max() * (1 - 1e-9))[0])


def plan_moves(population: Population, *, max_moves: int = MAX_MOVES) -> list[Move]:
    """Return the moves that help most, one after the other, each counting on those before it.

    While there are blocks that nobody serves or is about to serve, every move is for one of those, and settled servers
    take part. No move takes a block away from its last server.
    """
    moves: list[Move] = []
    while len(moves) < max_moves and (move := _best_move(population)) is not None:
        moves.append(move)
        population = _after(population, move)
    return moves


def own_move(population: Population, server: int) -> BlockRange | None:
    """Where one server should go now; None: it should stay."""
    for move in plan_moves(population):
        if move.server == server:
            length = int(population.end_S[server] - population.start_S[server])
            return BlockRange(move.start, move.start + length)
    return None


def reconsider(population: Population, server: int, start: int) -> BlockRange | None:
    """Where a server that has announced that it goes should go, now that it sees what others have announced.

    Args:
        start: the first of its present blocks; the population has it on its way to others.
    Returns: usually what it has announced; None: it should stay after all.
    """
    starts, ends, serving = population.start_S.copy(), population.end_S.copy(), population.serving_S.copy()
    ends[server] += start - starts[server]
    starts[server], serving[server] = start, True
    alone = np.where(np.arange(len(starts)) == server, population.mobility_S, FIXED)
    back = replace(population, start_S=starts, end_S=ends, serving_S=serving, mobility_S=alone)
    return own_move(back, server)


def mobility(moves_by_itself: bool, settled_s: float, num_moves: int) -> Literal["fixed", "settled", "free"]:
    """What a server announces that has been where it is for so long, after so many moves."""
    if not moves_by_itself:
        return "fixed"
    return "free" if settled_s >= stay_s(num_moves) else "settled"


def stay_s(num_moves: int) -> float:
    """How long a server stays after so many moves."""
    return min(MAX_STAY_S, MIN_STAY_S * 2.0 ** min(num_moves, 30))


def tie_break(peer_id: str) -> float:
    """A number in [0, 1) that everybody computes alike, and that says nothing about the peer."""
    return int.from_bytes(hashlib.sha256(peer_id.encode()).digest()[:6], "big") / 2.0**48


def _weakness(coverage: Floats, population: Population) -> Floats:
    """exp(-coverage / tau), relative to the least covered block; far below or above that, it makes no difference."""
    weakness: Floats = np.exp(np.clip((population.coverage_N.min() - coverage) / population.tau, -60.0, 10.0))
    return weakness


def _best_move(population: Population) -> Move | None:
    coverage_N, is_gap_N = population.coverage_N, population.going_N < 0.5
    has_gaps = bool(is_gap_N.any())
    if not has_gaps and coverage_N.min() >= GOOD_ENOUGH * population.mean_coverage:
        return None
    lengths_S = population.end_S - population.start_S
    may_S = population.serving_S & (population.mobility_S >= (SETTLED if has_gaps else FREE))
    movers = np.flatnonzero(may_S & (lengths_S < population.num_blocks))
    if not len(movers):
        return None
    left_M, relief_MN = _reliefs(population, movers)
    allowed_MN = _allowed(population, movers)
    least_M = np.full(len(movers), 1e-9)
    if has_gaps:
        allowed_MN &= _window_sums(is_gap_N.astype(np.float64)[None, :], lengths_S[movers, None]) > 0.5
    else:
        most_M = 1 - np.exp(-(population.rate_S / lengths_S)[movers] / population.tau)
        least_M = np.maximum(MIN_GAIN, MIN_SHARE * most_M)
    # As shares, rounded: in which order servers are listed, and so summed up, shall decide nothing.
    now = _weakness(coverage_N, population).sum()
    relief_MN = np.where(allowed_MN, np.round(relief_MN / now, 9), -np.inf)
    gain_M = np.round(1 - left_M / now, 9) + relief_MN.max(axis=1)
    gain_M = np.where(gain_M >= least_M, gain_M * (1 + 1e-3 * population.tie_S[movers]), 0.0)
    best = int(np.argmax(gain_M))
    if gain_M[best] <= 0.0:
        return None
    return Move(int(movers[best]), int(relief_MN[best].argmax()), float(gain_M[best]))


def _reliefs(population: Population, movers: Integers) -> tuple[Floats, Floats]:
    """For each of these servers, the sum of weakness once it has left its blocks, and by how much blocks of the same
    number, from each start on, lower that sum again; starts too near to the end are to be left out."""
    blocks_N, coverage_N = np.arange(population.num_blocks), population.coverage_N
    start_M1, end_M1 = population.start_S[movers, None], population.end_S[movers, None]
    adds_M1 = population.rate_S[movers, None] / (end_M1 - start_M1)
    is_own_MN = (start_M1 <= blocks_N) & (blocks_N < end_M1)
    rest_MN = np.where(is_own_MN, coverage_N - adds_M1, coverage_N)
    weakness_MN = _weakness(rest_MN, population)
    relief_MN = weakness_MN - _weakness(rest_MN + adds_M1, population)
    return weakness_MN.sum(axis=1), _window_sums(relief_MN, end_M1 - start_M1)


def _window_sums(values_MN: Floats, length_M1: Integers) -> Floats:
    """The sum of so many values from each place on, cut off at the end."""
    num_blocks = values_MN.shape[1]
    sums_MN = np.concatenate([np.zeros((len(values_MN), 1)), np.cumsum(values_MN, axis=1)], axis=1)
    sums_MN = np.broadcast_to(sums_MN, (len(length_M1), num_blocks + 1))
    ends_MN = np.minimum(np.arange(num_blocks) + length_M1, num_blocks)
    sums: Floats = np.take_along_axis(sums_MN, ends_MN, axis=1) - sums_MN[:, :-1]
    return sums


def _allowed(population: Population, movers: Integers) -> Bools:
    """From where on each of these servers may serve: inside the model, and blocks that it alone serves stay with it."""
    num_blocks = population.num_blocks
    blocks_N = np.arange(num_blocks)
    start_M1, end_M1 = population.start_S[movers, None], population.end_S[movers, None]
    is_alone_MN = (start_M1 <= blocks_N) & (blocks_N < end_M1) & (population.servers_N < 1.5)
    is_bound_M1 = is_alone_MN.any(axis=1)[:, None]
    first_M1 = np.where(is_bound_M1, is_alone_MN.argmax(axis=1)[:, None], num_blocks)
    behind_M1 = np.where(is_bound_M1, num_blocks - is_alone_MN[:, ::-1].argmax(axis=1)[:, None], 0)
    ends_MN = blocks_N + (end_M1 - start_M1)
    allowed: Bools = (blocks_N <= first_M1) & (ends_MN >= behind_M1) & (ends_MN <= num_blocks)
    return allowed


def _after(population: Population, move: Move) -> Population:
    """The population once a server is on its way."""
    start_S, end_S = population.start_S.copy(), population.end_S.copy()
    serving_S = population.serving_S.copy()
    end_S[move.server] += move.start - start_S[move.server]
    start_S[move.server], serving_S[move.server] = move.start, False
    return replace(population, start_S=start_S, end_S=end_S, serving_S=serving_S)
