"""Who of those that wait for pages of the cache is let in next: a pure function, without clock or pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from .callers import Caller


@dataclass(slots=True, eq=False)
class Applicant:
    """A session that waits for its first pages."""

    caller: Caller
    num_pages: int
    passed_pages: int = 0
    """What others were given that were let in past it."""


A = TypeVar("A", bound=Applicant)


@dataclass(frozen=True, slots=True)
class Admission(Generic[A]):
    """Who is let in, and past whom."""

    chosen: A | None
    passed: A | None
    """Who is first, and has to wait all the same; None: nobody has to."""


def choose(waiting: Sequence[A], held: Mapping[Caller, int], num_pages: int) -> Admission[A]:
    """Return who is let in now.

    Those come first whose callers hold least, then those who came first. One that is too large for the present room
    lets others past, until they have taken as many pages as it wants itself; then room is kept for it, until it fits or
    gives up. So nobody who would fit has to wait for a large one that never will, but for one time of it, and nobody is
    passed for ever.

    Args:
        waiting: in the order of arrival; at least one.
        held: the pages of each caller.
        num_pages: that there are, or can be had, for sessions that come now.
    """
    first, *others = sorted(waiting, key=lambda each: held.get(each.caller, 0))
    if first.num_pages <= num_pages:
        return Admission(first, None)
    most = min(num_pages, first.num_pages - first.passed_pages)
    return Admission(next((each for each in others if each.num_pages <= most), None), first)
