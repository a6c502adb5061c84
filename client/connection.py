"""A client's connection to a swarm: the loop thread with the network on it, opened and closed together."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from .config import ClientConfig
from .loop import LoopThread
from .network import Network, open_network


class Connection:
    """Joins a swarm on construction. Raises: PeerUnavailable: none of the initial peers answers."""

    def __init__(self, config: ClientConfig) -> None:
        self.loop = LoopThread()
        try:
            self.network = self.loop.run(self._start(config))
        except BaseException:
            self.loop.close()
            raise

    async def _start(self, config: ClientConfig) -> Network:
        ready: asyncio.Future[Network] = asyncio.get_running_loop().create_future()
        self._stop = asyncio.Event()
        self._task = asyncio.create_task(self._hold(config, ready))
        try:
            waiting: set[asyncio.Future[Any]] = {ready, self._task}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            raise
        if not ready.done():
            await self._task
        return ready.result()

    async def _hold(self, config: ClientConfig, ready: asyncio.Future[Network]) -> None:
        """Own the network: it is opened and closed by the same task."""
        async with open_network(config) as network:
            ready.set_result(network)
            await self._stop.wait()

    async def _finish(self) -> None:
        self._stop.set()
        await asyncio.gather(self._task, return_exceptions=True)

    def close(self) -> None:
        """Leave the swarm; closing twice is fine."""
        if self.loop.is_current:
            # The garbage collector may run on any thread, also on the one that has to be ended.
            threading.Thread(target=self.close, name="swarm-close", daemon=True).start()
        elif not self.loop.closed:
            self.loop.run(self._finish())
            self.loop.close()
