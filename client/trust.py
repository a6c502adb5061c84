"""Whom the user trusts with the ends of a model: pure functions of ranges of blocks.

What enters the first blocks can be turned back into the user's tokens, and from what leaves the last ones follow those
that the model will say. So these blocks may be kept to servers that the user names; the others run the rest.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from swarm.ranges import BlockRange


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """Which servers the ends of a request are for."""

    servers: Collection[str]
    """Their peer ids."""
    num_blocks: int | None = None
    """How many blocks at each end; None: all that the trusted server holds which reaches furthest from there."""

    def ends(self, whole: BlockRange, trusted: Iterable[BlockRange]) -> Ends:
        """Which blocks of a request only trusted servers run: at least the first one and the last one.

        Args:
            whole: all blocks of the request.
            trusted: the ranges of the trusted servers that could run some of them now.
        """
        if self.num_blocks is not None:
            return Ends(whole.start + self.num_blocks, whole.end - self.num_blocks)
        spans = list(trusted)
        return Ends(
            max((span.end for span in spans if whole.start in span), default=whole.start + 1),
            min((span.start for span in spans if whole.end - 1 in span), default=whole.end - 1),
        )


@dataclass(frozen=True, slots=True)
class Ends:
    """The blocks before `first_end` and from `last_start` on are for trusted servers; these parts may overlap."""

    first_end: int
    last_start: int

    def lacking(self, missing: Collection[int]) -> str:
        """Which of the ends some missing blocks belong to, in words; "" for neither."""
        at_first = any(block < self.first_end for block in missing)
        at_last = any(block >= self.last_start for block in missing)
        return " and ".join(["the first"] * at_first + ["the last"] * at_last)
