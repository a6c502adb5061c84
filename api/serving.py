"""The port, and leaving it in order."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from swarm.errors import ResourceError

from .service import Service

BACKLOG = 512
LAST_WORDS_S = 5.0
"""How long answers that are over may take to be read by their clients when the process ends."""


class _Server(uvicorn.Server):
    """Says when it listens, and leaves signals to the command."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listens = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listens.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def open_port(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises: ResourceError: it is in use, or is not of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except (OSError, OverflowError) as exc:
        sock.close()
        raise ResourceError(
            f"cannot listen on port {port} of {host}: {exc}; choose another one with --host and --port"
        ) from exc
    sock.setblocking(False)
    return sock


async def serve(
    app: ASGIApp,
    service: Service,
    sock: socket.socket,
    stop: asyncio.Event,
    on_ready: Callable[[], None],
    *,
    drain_timeout_s: float,
) -> None:
    """Serve until `stop` is set; then take nothing new, and let what is under way finish for `drain_timeout_s`."""
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, lifespan="off",
        timeout_graceful_shutdown=int(LAST_WORDS_S), ws="none",
    )  # fmt: skip
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        for event in (server.listens, stop):
            waiting = asyncio.create_task(event.wait())
            await asyncio.wait({waiting, serving}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if serving.done():
                break
            if event is server.listens:
                on_ready()
        await service.drain(drain_timeout_s)
        server.should_exit = True
        await serving
    finally:
        server.force_exit = server.should_exit = True
        await asyncio.gather(serving, return_exceptions=True)
        service.close()
