"""How a private swarm hears whom its owner has revoked: the newest list lies in the directory, and members pass it on.

Any member may write it there, as the owner has signed it, so it outlives every node that carried it. Nodes of the DHT
keep none that is older than what they know themselves (swarm/dht_records.py).
"""

from __future__ import annotations

import asyncio
import logging

from swarm.admission import Gate
from swarm.buckets import REVOCATIONS
from swarm.directory import MAX_LIFETIME_S, Shelves, SwarmClock
from swarm.errors import NotAMember, SwarmError
from swarm.listing import Entry

logger = logging.getLogger(__name__)


class SharedRevocations:
    """The list as one member finds it in the directory, and puts it back."""

    def __init__(self, gate: Gate, shelves: Shelves, clock: SwarmClock) -> None:
        self._gate = gate
        self._shelves = shelves
        self._clock = clock

    async def run(self, period_s: float) -> None:
        """Look once a period, until cancelled."""
        while True:
            await asyncio.sleep(period_s)
            await self.try_share()

    async def try_share(self) -> None:
        """The same as `share`; a directory that cannot be reached is tried again with the next period."""
        try:
            await self.share()
        except SwarmError as exc:
            logger.debug("the list of revocations cannot be read: %s", exc)

    async def share(self) -> None:
        """Look for a newer list, here and in the directory; write ours if what lies there is older, or about to end.

        Raises: PeerUnavailable: the directory cannot be reached.
        """
        self._gate.look_at_file()
        page = await self._shelves.read(REVOCATIONS)
        for entry in page.entries:
            self._take(entry)
        own = self._gate.revocations.data
        fresh_s = self._clock.now_s() - MAX_LIFETIME_S / 2
        if own and not any(each.data == own and each.written_at_s > fresh_s for each in page.entries):
            await self._shelves.write(REVOCATIONS, own, MAX_LIFETIME_S)

    def _take(self, entry: Entry) -> None:
        try:
            if entry.lifetime_s:
                self._gate.adopt(entry.data)
        except NotAMember as exc:
            logger.info("peer %s passes on a list of revocations: %s", entry.peer_id, exc)
