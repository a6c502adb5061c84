"""How much a client believes of servers that have never served it: little, where there are many of them.

Identities are free, so a few machines can announce thousands of servers, each faster than all others. What they cannot
make up is that they have served this client, and an address at which they answer. So among many newcomers announced
speeds hardly count: those that have answered come before those that have not, and when one of an address prefix has
failed without ever having served, all newcomers of that prefix come last. One at a time is taken at its word, or no new
server would ever be tried. In a small swarm everybody is.

Doubt is time added to each block, so that it makes no difference on how many servers a route's blocks are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from swarm.announcement import Announcement
from swarm.prefixes import prefix_of_server

CROWD = 64
"""With more newcomers than this, announced speeds hardly count: the directory keeps as many in one bucket."""

NEWCOMER_S, UNANSWERED_S, LOWERED_S = 0.05, 1.0, 1.0
"""What is added to each block: in a crowd, of a newcomer that has answered, and of one that has not; and anywhere for
each newcomer of its prefix that has failed."""

MAX_LOWERED = 8
"""Further failures of a prefix make no difference."""

EXCUSED = 4
"""So many newcomers of a prefix may have failed for each server of it that has served."""

EXPLORE_PERIOD_S = 60.0
"""How long one newcomer is taken at its word before another one is."""

MAX_REMEMBERED = 1024


class Standing:
    """Whom this client was served by, and where newcomers failed from."""

    def __init__(self) -> None:
        self._served: dict[str, str] = {}
        """Peer id -> prefix, those that served last at the end."""
        self._failed: dict[str, str] = {}
        """The same of those that failed before they had ever served."""

    def served(self, server: Announcement) -> None:
        """Note that a server did what was asked."""
        self._failed.pop(server.peer_id, None)
        self._served.pop(server.peer_id, None)
        _remember(self._served, server)

    def failed(self, server: Announcement) -> None:
        """Note that a server did not do what was asked."""
        if server.peer_id not in self._served:
            _remember(self._failed, server)

    def is_crowded(self, servers: Sequence[Announcement]) -> bool:
        """Whether many of them are newcomers."""
        return sum(server.peer_id not in self._served for server in servers) > CROWD

    def doubts_s(self, servers: Sequence[Announcement], answered: Collection[str], now_s: float) -> dict[str, float]:
        """Peer id -> seconds to add to each block, of those that are in doubt.

        Args:
            answered: peers that have answered a call.
        """
        newcomers = [server for server in servers if server.peer_id not in self._served]
        lowered = self._lowered()
        if not lowered and len(newcomers) <= CROWD:
            return {}
        prefixes = {each.peer_id: prefix_of_server(each) for each in newcomers}
        doubts_s = {peer_id: lowered[prefix] for peer_id, prefix in prefixes.items() if prefix in lowered}
        if len(newcomers) <= CROWD:
            return doubts_s
        explored = self._explored(prefixes, lowered, answered, now_s)
        for peer_id in prefixes:
            if peer_id != explored:
                doubt_s = NEWCOMER_S if peer_id in answered else UNANSWERED_S
                doubts_s[peer_id] = doubts_s.get(peer_id, 0.0) + doubt_s
        return doubts_s

    def _lowered(self) -> dict[str, float]:
        """Prefix -> seconds, of those from which more newcomers failed than their servers excuse."""
        num_served, num_failed = Counter(self._served.values()), Counter(self._failed.values())
        return {
            prefix: LOWERED_S * min(count, MAX_LOWERED)
            for prefix, count in num_failed.items()
            if count > EXCUSED * num_served[prefix]
        }

    def _explored(
        self, prefixes: dict[str, str], lowered: Collection[str], answered: Collection[str], now_s: float
    ) -> str | None:
        """Whose word is taken now; nobody's while nobody has served, for all are alike then."""
        one_of = {prefixes[peer_id]: peer_id for peer_id in answered if peer_id in prefixes}
        candidates = sorted(peer_id for prefix, peer_id in one_of.items() if prefix not in lowered)
        if not candidates or not self._served:
            return None
        return candidates[int(now_s / EXPLORE_PERIOD_S) % len(candidates)]


def _remember(memory: dict[str, str], server: Announcement) -> None:
    memory[server.peer_id] = prefix_of_server(server)
    if len(memory) > MAX_REMEMBERED:
        del memory[next(iter(memory))]
