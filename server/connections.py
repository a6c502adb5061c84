"""TCP connections to the gRPC port: how many there are, whose they are, and closing those that are too many.

gRPC bounds their number in all (`grpc.max_allowed_incoming_connections`) but not for one caller, and tells nobody of
those on which there is no call. They are sockets of this process, however: they can be found among its open files, and
shut down there; gRPC then sees that the other end has gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

from .callers import Caller
from .gate import Gate
from .limits import Connected, Refusal, What, surplus

FILES = next((path for path in (Path("/proc/self/fd"), Path("/dev/fd")) if path.is_dir()), None)
"""Where a process finds its own open files: Linux, macOS."""

CALM_S, BUSY_S = 2.0, 0.1
"""How often connections are looked at: while there are few, and while there are many or somebody is shut out."""


class Connections:
    """Those of one port."""

    def __init__(self, gate: Gate, port: int) -> None:
        self._gate = gate
        self._port = port
        self._numbers: dict[tuple[str, int], int] = {}
        """Where each connection comes from -> when it was first seen, in order."""
        self._last_number = 0
        self._closed_until_s = float("-inf")
        """Until then somebody may be shut out."""
        self.num_open = 0

    def close_of(self, caller: Caller) -> None:
        """Close the connections of a caller that was shut out, and those that it opens soon."""
        self._closed_until_s = time.monotonic() + 60.0
        for opened, host, port in _sockets(self._port):
            if self._gate.callers.of_address(host, port) == caller:
                _shut(opened)

    async def watch(self) -> None:
        """Keep their number within the limits, until cancelled."""
        config = self._gate.config
        while True:
            self.look()
            is_busy = self.num_open > config.max_connections_per_caller or time.monotonic() < self._closed_until_s
            await asyncio.sleep(BUSY_S if is_busy else CALM_S)

    def look(self) -> None:
        """Close what is too many now."""
        quotas, now_s = self._gate.quotas, time.monotonic()
        numbers: dict[tuple[str, int], int] = {}
        found: list[Connected] = []
        for _, host, port in _sockets(self._port):
            if (host, port) not in self._numbers:
                self._last_number += 1
            number = numbers[host, port] = self._numbers.get((host, port), self._last_number)
            found.append(Connected(self._gate.callers.of_address(host, port), number))
        self._numbers, self.num_open = numbers, len(found)
        closing = surplus(found, self._gate.config)
        for each in closing:
            quotas.refused(each.caller, Refusal(What.CONNECTIONS, "too many connections"), now_s)
            self._gate.log(each.caller, "connections closed: there are too many")
        closing += [each for each in found if quotas.is_shut_out(each.caller, now_s)]
        if closing:
            self._close({each.number for each in closing})

    def _close(self, numbers: set[int]) -> None:
        for opened, host, port in _sockets(self._port):
            if self._numbers.get((host, port)) in numbers:
                _shut(opened)


@asynccontextmanager
async def watch_connections(gate: Gate, port: int) -> AsyncIterator[Connections]:
    """Keep the connections to a port of ours within the limits while the body runs."""
    connections = Connections(gate, port)
    gate.on_shut_out = connections.close_of
    watching = asyncio.create_task(connections.watch())
    try:
        yield connections
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


def _sockets(port: int) -> Iterator[tuple[socket.socket, str, int]]:
    """Copies of the sockets of accepted connections at this port, and from where they come."""
    if FILES is None:
        return
    for name in os.listdir(FILES):
        with contextlib.suppress(OSError):  # it was closed meanwhile, or is a listening socket
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as opened:
                if opened.family not in (socket.AF_INET, socket.AF_INET6) or opened.getsockname()[1] != port:
                    continue
                host, remote_port, *_ = opened.getpeername()
                yield opened, host.partition("%")[0], remote_port


def _shut(opened: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the other end has gone already
        opened.shutdown(socket.SHUT_RDWR)
