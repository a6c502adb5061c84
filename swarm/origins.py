"""From where what a node of the DHT keeps has come, and who gives way when there is no room: whoever has most of it.

Identities are free, addresses are not: a record counts for the address prefix of the connection over which its owner
stored it. One that somebody else passed on counts for the prefix of that peer until its owner writes again, as every
server does within an announce period. Nothing here is looked at while there is room.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from swarm.throttle import Throttle

H = TypeVar("H", bound=Hashable)

BURST_S = 60.0
"""What may come in a minute may come at once."""

MAX_SOURCES = 4096
"""Peers and prefixes whose rates are kept; of more, those that asked longest ago are forgotten."""


@dataclass(frozen=True, slots=True)
class Source:
    """Who is at the other end of a connection."""

    peer_id: str
    prefix: str
    """Of the address that it comes from; "" if that is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRates:
    """What one node of the DHT does for others in a minute, counted in records stored or in buckets looked up.

    A server stores some 20 records a minute, and a client within its budget looks up as many.
    """

    per_peer: float = 600.0
    per_prefix: float = 6000.0
    """A hundred servers behind one address."""


class RequestLimiter:
    """Who has asked for more than its share."""

    def __init__(self, rates: RequestRates) -> None:
        self._rates = rates
        self._throttles: OrderedDict[str, Throttle] = OrderedDict()

    def take(self, source: Source, amount: float, now_s: float) -> bool:
        """Whether a request may be answered; it counts then."""
        throttles = [
            self._throttle(f"peer {source.peer_id}", self._rates.per_peer),
            self._throttle(f"prefix {source.prefix}", self._rates.per_prefix),
        ]
        if any(throttle.owed_s(now_s) > 0 for throttle in throttles):
            return False
        for throttle in throttles:
            throttle.wait_s(amount, now_s)
        return True

    def _throttle(self, name: str, per_min: float) -> Throttle:
        throttle = self._throttles.setdefault(name, Throttle(per_min / 60, BURST_S))
        self._throttles.move_to_end(name)
        if len(self._throttles) > MAX_SOURCES:
            self._throttles.popitem(last=False)
        return throttle


def who_gives_way(prefixes: Mapping[H, str], newcomer: str) -> H | None:
    """Which of some records leaves for one of another prefix; None: that one has its share already.

    Args:
        prefixes: record -> its prefix, the newest one at the end.
    """
    counts = Counter(prefixes.values())
    largest, count = counts.most_common(1)[0]
    if count <= counts[newcomer] + 1:
        return None
    return next(record for record in reversed(list(prefixes)) if prefixes[record] == largest)


def largest_share(sizes: Iterable[tuple[str, int]]) -> tuple[str, int]:
    """The prefix that has most, and how much. Args: sizes: (prefix, bytes) of each record, at least one."""
    shares: Counter[str] = Counter()
    for prefix, num_bytes in sizes:
        shares[prefix] += num_bytes
    return shares.most_common(1)[0]
