"""Who should serve which blocks, given everybody's announcements: pure functions of a snapshot.

Throughput is modelled as in a pipeline that tokens pass through block by block: a server that can run r blocks per
second, spread over its k blocks, adds r / k tokens per second to the coverage of each of them, and the swarm is as fast
as its least covered block, the bottleneck. Every server computes the same move from the same snapshot; the one that it
names carries it out.

What is made small is the weakness: the sum over all blocks of exp(-coverage / tau). Its logarithm is nearly that of the
bottleneck, but lifting any weak block counts, not the weakest alone. Each move lowers it by some least amount, so moves
cannot go on in circles: where nobody comes or goes they end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from swarm.announcement import Announcement
from swarm.ranges import BlockRange

# S servers, M of them that may move, N blocks of the model

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

SHARPNESS = 0.1
"""tau, as a share of the spread."""

SLACK = 1.1
"""By how many spreads the mean coverage may be above the bottleneck; see `Population.good_enough`."""

MIN_GAIN = 0.1
"""A move must take this share of all weakness away; of a server that adds little to each block, compared to tau, this
share of what it could take away if all weak blocks fitted into its range and it came from nowhere."""

MAX_RATIO = 30.0
"""A server that claims to be more times as fast as the median counts as so much faster only."""

CHECKS_PER_PERIOD = 2
"""How often a server looks whether it should move, in each announce period."""

READ_BYTES = 100_000
"""About how much of the directory it reads each time: 250 servers; of more, the rest is what it has read before."""

CONFIRM_BYTES = 400_000
"""The same before it goes, which few do: what it decides then should not rest on what has changed meanwhile. And when
what it has read shows that many have gone."""

ALARMING_LOSS = 0.1
"""What share of the servers of a block must have gone between two looks to read that much."""

MAX_FILLERS = 32
"""So many servers may announce that they fill a hole: of a large swarm, not all see it at once. One goes."""

ASK_S = 3.0
"""How long a server waits between announcing that it goes and going, to see what others have announced meanwhile."""


PATIENCE_PERIODS = 2.0
"""A server that has announced that it goes, and stayed after all, looks again after up to so many announce periods: two
that have hindered each other shall not do so again and again."""


BYTES_PER_NUMBER = 2
"""Of hidden states on their way: about what servers compute in."""

STEADY_LINE = 2.0
"""What a line carries, as it is measured again and again, must differ by so much from what counts to count itself:
placement goes by it, and moves that followed every measurement would never end."""


def pipeline_rate(blocks_per_s: float, num_blocks: int, line_bytes_per_s: float, hidden_size: int) -> float:
    """Return the blocks per second that a server adds to the swarm: as many as it computes, or as many as those tokens
    have whose hidden states its line carries on, if that is less.

    Args:
        num_blocks: that each token passes here, before it leaves.
        line_bytes_per_s: 0: not known, then only computing counts.
    """
    if line_bytes_per_s <= 0:
        return blocks_per_s
    return min(blocks_per_s, num_blocks * line_bytes_per_s / (BYTES_PER_NUMBER * hidden_size))


def steady_line(counted: float, measured: float) -> float:
    """Return what a line is taken to carry, after one more measurement; 0 of either: not known."""
    if not (counted and measured):
        return measured or counted
    return measured if max(measured / counted, counted / measured) > STEADY_LINE else counted


@dataclass(frozen=True, slots=True)
class Move:
    """One server to other blocks."""

    server: int
    """Its index in the population."""
    start: int
    """The first of its new blocks; their number stays."""


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
    asking_S: Bools
    """Whether it has announced that it goes there, and is still where it was."""
    movable_S: Bools
    """Whether it goes elsewhere by itself."""
    tie_S: Floats
    """In [0, 1), from the peer id: decides between servers that would do equally well."""

    @classmethod
    def of(cls, servers: Sequence[Announcement], num_blocks: int) -> Self:
        """Read announcements. A rate that is not known yet counts as the median of the known ones."""
        servers = [each for each in servers if each.num_model_blocks == num_blocks]
        servers = [each for each in servers if each.state != "draining" or each.next_blocks is not None]
        places = [each.next_blocks or each.blocks for each in servers]
        rates = np.array([each.blocks_per_s for each in servers], np.float32).astype(np.float64)  # as others read them
        median = float(np.median(rates[rates > 0])) if (rates > 0).any() else 1.0
        staying = [each.state == "online" and each.next_blocks is None for each in servers]
        return cls(
            num_blocks=num_blocks,
            start_S=np.array([place.start for place in places], dtype=np.int64),
            end_S=np.array([place.end for place in places], dtype=np.int64),
            rate_S=np.minimum(np.where(rates > 0, rates, median), MAX_RATIO * median),
            serving_S=np.array(staying, dtype=bool),
            asking_S=np.array(
                [each.state == "online" and each.next_blocks is not None for each in servers], dtype=bool
            ),
            movable_S=np.array([each.movable for each in servers], dtype=bool),
            tie_S=np.array([tie_break(each.peer_id) for each in servers], dtype=np.float64),
        )

    @property
    def add_S(self) -> Floats:
        """What each server adds to the coverage of its blocks."""
        adds: Floats = self.rate_S / (self.end_S - self.start_S)
        return adds

    @property
    def coverage_N(self) -> Floats:
        """Tokens per second that each block can take, when everybody is where it is going."""
        return self._per_block(self.add_S)

    @property
    def servers_N(self) -> Floats:
        """How many servers serve each block and stay there."""
        return self._per_block(self.serving_S.astype(np.float64))

    @property
    def going_N(self) -> Floats:
        """How many servers serve each block or are on their way to it."""
        return self._per_block(np.ones_like(self.rate_S))

    @property
    def has_holes(self) -> bool:
        """Whether there is a block that nobody serves or is on the way to."""
        return bool((self.going_N < 0.5).any())

    @property
    def mean_coverage(self) -> float:
        """The throughput if all were covered alike: no placement gives more."""
        return float(self.rate_S.sum()) / self.num_blocks

    @property
    def spread(self) -> float:
        """The coverage of a typical block if what its servers add were added as errors are: the root of the sum of
        squares. By about so much coverage differs from block to block where servers are anywhere."""
        return max(1e-9, float(np.sqrt(self._per_block(self.add_S**2).mean())))

    @property
    def tau(self) -> float:
        """By how much coverage must differ to matter."""
        return SHARPNESS * self.spread

    @property
    def good_enough(self) -> float:
        """With so much coverage of the bottleneck, nobody moves: the more servers there are, the nearer to the mean."""
        return self.mean_coverage**2 / max(1e-9, self.mean_coverage + SLACK * self.spread)

    def _per_block(self, value_S: Floats) -> Floats:
        steps = np.bincount(self.start_S, value_S, self.num_blocks + 1)
        steps -= np.bincount(self.end_S, value_S, self.num_blocks + 1)
        sums: Floats = np.cumsum(steps[:-1])
        return np.maximum(sums, 0.0)

    def only(self, is_kept_S: Bools) -> Self:
        """Some of the servers."""
        return replace(
            self,
            start_S=self.start_S[is_kept_S],
            end_S=self.end_S[is_kept_S],
            rate_S=self.rate_S[is_kept_S],
            serving_S=self.serving_S[is_kept_S],
            asking_S=self.asking_S[is_kept_S],
            movable_S=self.movable_S[is_kept_S],
            tie_S=self.tie_S[is_kept_S],
        )

    def moved(self, server: int, start: int, *, serving: bool) -> Self:
        """The same with one server elsewhere."""
        start_S, end_S, serving_S = self.start_S.copy(), self.end_S.copy(), self.serving_S.copy()
        end_S[server] += start - start_S[server]
        start_S[server], serving_S[server] = start, serving
        return replace(self, start_S=start_S, end_S=end_S, serving_S=serving_S)


def choose_blocks(servers: Sequence[Announcement], num_model_blocks: int, num_blocks: int) -> BlockRange:
    """Return the blocks that a server joining with room for `num_blocks` should serve; see `choose_start`."""
    num_blocks = min(num_blocks, num_model_blocks)
    start = choose_start(Population.of(servers, num_model_blocks), num_blocks)
    return BlockRange(start, start + num_blocks)


def choose_start(population: Population, num_blocks: int) -> int:
    """Return the first of the blocks that a server joining with `num_blocks` blocks should serve; ties go to the front.

    Blocks that nobody serves come first, then the least covered ones.
    """
    coverage_N = population.coverage_N
    sums = np.concatenate([[0.0], np.cumsum(_weakness(coverage_N, coverage_N.min(), population.tau))])
    gains = sums[num_blocks:] - sums[:-num_blocks]
    return int(np.flatnonzero(gains >= gains.max() * (1 - 1e-9))[0])


def best_moves(population: Population) -> list[Move]:
    """Return the one move that helps most, if any helps enough; it lowers the coverage of no block below the least.

    While there are holes, blocks that nobody serves or is about to serve, only moves to some of those count, however
    little they help, and the best MAX_FILLERS are returned, best first: see `reconsider`. No move takes a block away
    from the last server that stays there.
    """
    coverage_N, has_holes = population.coverage_N, population.has_holes
    if not has_holes and coverage_N.min() >= population.good_enough:
        return []
    length_S = population.end_S - population.start_S
    movers = np.flatnonzero(population.serving_S & population.movable_S & (length_S < population.num_blocks))
    if not len(movers):
        return []
    left_M, relief_MN = _reliefs(population, movers)
    allowed_MN = _allowed(population, movers)
    if has_holes:
        is_hole_1N = (population.going_N < 0.5).astype(np.float64)[None, :]
        allowed_MN &= _window_sums(is_hole_1N, length_S[movers, None]) > 0.5
        least_M = np.full(len(movers), 1e-9)
    else:
        least_M = MIN_GAIN * (1 - np.exp(-population.add_S[movers] / population.tau))
    # As shares, rounded: in which order servers are listed, and so summed up, shall decide nothing.
    now = _weakness(coverage_N, coverage_N.min(), population.tau).sum()
    relief_MN = np.where(allowed_MN, np.round(relief_MN / now, 9), -np.inf)
    gain_M = np.round(1 - left_M / now, 9) + relief_MN.max(axis=1)
    gain_M = np.where(gain_M >= least_M, gain_M * (1 + 1e-3 * population.tie_S[movers]), 0.0)
    best = np.argsort(-gain_M, kind="stable")[: MAX_FILLERS if has_holes else 1]
    return [Move(int(movers[each]), int(relief_MN[each].argmax())) for each in best if gain_M[each] > 0.0]


def own_move(population: Population, server: int) -> BlockRange | None:
    """Where one server should go now; None: it should stay."""
    for move in best_moves(population):
        if move.server == server:
            return BlockRange(move.start, move.start + int(population.end_S[server] - population.start_S[server]))
    return None


def reconsider(population: Population, server: int, start: int) -> BlockRange | None:
    """Where a server that has announced that it goes should go, now that it sees what others have announced.

    To fill a hole, several may have: the one whose tie is lowest goes.

    Args:
        start: the first of its present blocks; the population has it on its way to others.
    Returns: usually what it has announced; None: it should stay after all.
    """
    index_S = np.arange(len(population.start_S))
    back = population.moved(server, start, serving=True)
    back = replace(back, movable_S=back.movable_S & (index_S == server))
    gives_way_S = population.asking_S & (population.tie_S > population.tie_S[server])
    alone = back.only(~gives_way_S)
    if alone.has_holes:
        return own_move(alone, server - int(gives_way_S[:server].sum()))
    return own_move(back, server)


def is_alarming(before_N: Floats, now_N: Floats) -> bool:
    """Whether so many servers of some block have gone between two looks that others may have gone as well.

    Args: how many servers each block had and has, as in `Population.going_N`.
    """
    return bool((now_N <= (1 - ALARMING_LOSS) * before_N - 0.5).any())


def tie_break(peer_id: str) -> float:
    """A number in [0, 1) that everybody computes alike, and that says nothing about the peer."""
    return int.from_bytes(hashlib.sha256(peer_id.encode()).digest()[:6], "big") / 2.0**48


def _weakness(coverage: Floats, least: float, tau: float) -> Floats:
    """exp(-coverage / tau), relative to the least covered block; far below or above that, it makes no difference."""
    weakness: Floats = np.exp(np.clip((least - coverage) / tau, -60.0, 10.0))
    return weakness


def _reliefs(population: Population, movers: Integers) -> tuple[Floats, Floats]:
    """For each of these servers, the sum of weakness once it has left its blocks, and by how much blocks of the same
    number, from each start on, lower that sum again; starts too near to the end are to be left out."""
    coverage_N, tau = population.coverage_N, population.tau
    add_M1, length_M1 = population.add_S[movers, None], (population.end_S - population.start_S)[movers, None]
    rest_MN = coverage_N - add_M1 * _is_own(population, movers)
    weakness_MN = _weakness(rest_MN, coverage_N.min(), tau)
    relief_MN = weakness_MN - _weakness(rest_MN + add_M1, coverage_N.min(), tau)
    return weakness_MN.sum(axis=1), _window_sums(relief_MN, length_M1)


def _allowed(population: Population, movers: Integers) -> Bools:
    """From where on each of these servers may serve: inside the model, and with those of its present blocks that would
    be covered less than any block is now, or by nobody."""
    num_blocks, coverage_N = population.num_blocks, population.coverage_N
    blocks_N = np.arange(num_blocks)
    rest_MN = coverage_N - population.add_S[movers, None]
    is_needed_N = (population.servers_N < 1.5) | (rest_MN < coverage_N.min() - 1e-9)
    is_bound_MN = _is_own(population, movers) & is_needed_N
    is_bound_M1 = is_bound_MN.any(axis=1)[:, None]
    first_M1 = np.where(is_bound_M1, is_bound_MN.argmax(axis=1)[:, None], num_blocks)
    behind_M1 = np.where(is_bound_M1, num_blocks - is_bound_MN[:, ::-1].argmax(axis=1)[:, None], 0)
    ends_MN = blocks_N + (population.end_S - population.start_S)[movers, None]
    allowed: Bools = (blocks_N <= first_M1) & (ends_MN >= behind_M1) & (ends_MN <= num_blocks)
    return allowed


def _is_own(population: Population, movers: Integers) -> Bools:
    """Which blocks each of these servers has."""
    blocks_N = np.arange(population.num_blocks)
    is_own: Bools = (population.start_S[movers, None] <= blocks_N) & (blocks_N < population.end_S[movers, None])
    return is_own


def _window_sums(values_MN: Floats, length_M1: Integers) -> Floats:
    """The sum of so many values from each place on, cut off at the end."""
    num_blocks = values_MN.shape[1]
    sums_MN = np.concatenate([np.zeros((len(values_MN), 1)), np.cumsum(values_MN, axis=1)], axis=1)
    sums_MN = np.broadcast_to(sums_MN, (len(length_M1), num_blocks + 1))
    ends_MN = np.minimum(np.arange(num_blocks) + length_M1, num_blocks)
    sums: Floats = np.take_along_axis(sums_MN, ends_MN, axis=1) - sums_MN[:, :-1]
    return sums
