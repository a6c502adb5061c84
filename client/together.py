"""Training one set of adapters or prompts together with others: hivemind's DHT among those who know the run's name."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from swarm.dht_training import addresses_of, end_training_dht, greet, start_training_dht
from swarm.errors import BadRequest, SwarmError

from .connection import Connection

if TYPE_CHECKING:
    from hivemind import DHT

logger = logging.getLogger(__name__)

MAX_GREETINGS = 8
"""Peers that are greeted in one round, any of those not known yet: some may be made up."""
MEET_PERIOD_S = 10.0
"""How often a peer says that it is there, and looks who else is."""

LIFETIME_S = 60.0
"""How long others look for a peer that is gone without a word."""


@contextmanager
def open_training_dht(
    model: Any, run_id: str, *, host_maddrs: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",), **options: Any
) -> Iterator[DHT]:
    """Give a `hivemind.DHT` over all peers that train under this name in the model's swarm, for `hivemind.Optimizer`.

    Who knows the join link and the name takes part; nodes of the swarm that keep the records can as well. Peers trust
    one another with what they train: one that sends wrong gradients spoils the run. It forks, so open it before threads
    of your own start.

    Args:
        model: a distributed model, PEFT around it or not.
        run_id: the same for all; also the `run_id` of the optimizer.
        host_maddrs: where other peers can dial this one; loopback by default, /ip4/0.0.0.0/tcp/0 over the network.
        options: what else hivemind.DHT takes, such as announce_maddrs or use_auto_relay.
    Raises:
        BadRequest: the swarm is private.
        ResourceError: hivemind does not start.
        PeerUnavailable: contact with the swarm is lost.
    """
    if not run_id or "." in run_id:
        raise BadRequest(f"run_id {run_id!r} must be a name without dots: choose another one")
    connection: Connection = model._swarm.connection
    if connection.network.config.invitation is not None:
        raise BadRequest(
            "peers cannot train together in a private swarm: hivemind's averagers would take part with anybody who "
            "finds them. Use a public swarm for it"
        )
    dht = start_training_dht(host_maddrs, options)
    try:
        meeting = _Meeting(connection, run_id, dht)
        connection.loop.run(meeting.look_around())
        task = connection.loop.run(_started(meeting.keep_meeting()))
        try:
            yield dht
        finally:
            if not connection.loop.closed:
                connection.loop.run(meeting.leave(task))
    finally:
        end_training_dht(dht)


class _Meeting:
    """This peer among those of its run."""

    def __init__(self, connection: Connection, run_id: str, dht: DHT) -> None:
        self._directory = connection.network.directory
        self._name = f"training {run_id}"
        self._dht = dht
        self._addresses = addresses_of(dht)
        self._greeted: set[tuple[str, ...]] = set()

    async def look_around(self) -> None:
        """Be found, and greet those who were not greeted yet."""
        found = await self._directory.meet(self._name, self._addresses, LIFETIME_S)
        others = {tuple(each.multiaddrs) for each in found} - {tuple(self._addresses)}
        unknown = sorted(others - self._greeted)
        new = random.sample(unknown, min(MAX_GREETINGS, len(unknown)))
        answers = await asyncio.gather(*(asyncio.to_thread(greet, self._dht, each) for each in new))
        self._greeted = (self._greeted & others) | {
            each for each, answered in zip(new, answers, strict=True) if answered
        }

    async def keep_meeting(self) -> None:
        """Do so again and again, until cancelled."""
        while True:
            await asyncio.sleep(MEET_PERIOD_S)
            try:
                await self.look_around()
            except SwarmError as exc:  # those who know one another go on without the swarm's DHT
                logger.info("looking for peers of this training run failed: %s", exc)

    async def leave(self, task: asyncio.Task[None]) -> None:
        """Stop looking, and no longer be found."""
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        try:
            await self._directory.meet(self._name, (), 0.0)
        except SwarmError as exc:
            logger.info("saying goodbye to a training run failed: %s", exc)


async def _started(coroutine: Any) -> asyncio.Task[None]:
    return asyncio.create_task(coroutine)
