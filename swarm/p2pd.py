"""The libp2p daemon p2pd as a child process that never outlives its owner.

A small shell stands in front of p2pd: it leaves a watchdog behind and becomes p2pd. The watchdog waits for the end
of a pipe whose other end only the owner holds, so it acts the moment the owner is gone, however it went (SIGKILL
included, on Linux and macOS, whichever thread started p2pd): it kills p2pd and removes its sockets. Both run in a
session of their own, so Ctrl-C in a terminal reaches the owner only, which can still say goodbye over the network.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from swarm.errors import ResourceError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_SOCKET_DIR_CHARS = 60  # a unix socket path may have about 104 characters, and ours add up to 40
_STOP_TIMEOUT_S = 3.0
_LAST_WORDS_S = 0.2
_MAX_LINE_BYTES = 1024 * 1024

# $1 is the directory to remove, the rest is p2pd's command line. In a subshell $$ is still the pid of the main
# shell, which `exec` turns into p2pd.
_SHELL = """
directory=$1; shift
exec 3<&0 </dev/null
( trap '' HUP INT TERM; read -r _ <&3; kill -9 $$; rm -rf -- "$directory" ) >/dev/null 2>&1 &
exec "$@" 3<&-
"""


class P2pd:
    """A running p2pd."""

    def __init__(self, process: asyncio.subprocess.Process, control_socket: Path) -> None:
        self.control_socket = control_socket
        self.pid = process.pid
        self.last_line = ""
        self._process = process
        self._ready = asyncio.Event()
        self._watch_task = asyncio.create_task(self._watch(), name="p2pd")

    async def wait_stopped(self) -> str:
        """Wait until p2pd is gone; return the last thing it said."""
        await asyncio.wait({self._watch_task})
        return self.last_line

    async def wait_ready(self) -> bool:
        """Wait until p2pd takes requests; False if it ended instead."""
        ready = asyncio.create_task(self._ready.wait())
        try:
            await asyncio.wait({ready, self._watch_task}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
        return self._ready.is_set()

    async def aclose(self) -> None:
        """Stop p2pd, by force after a few seconds, and wait for its end."""
        for stop_signal in (signal.SIGTERM, signal.SIGKILL):
            if not self._watch_task.done():
                # Not Process.send_signal: of a p2pd that has just ended by itself, it would take the exit status away
                # from asyncio, which then complains.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, stop_signal)
                await asyncio.wait({self._watch_task}, timeout=_STOP_TIMEOUT_S)
        self._watch_task.cancel()
        await asyncio.wait({self._watch_task})

    async def _watch(self) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        reading = asyncio.create_task(self._read_lines())
        try:
            await self._process.wait()
            # Not for ever: under uvloop the watchdog inherits the pipe's other end, and keeps it open.
            await asyncio.wait({reading}, timeout=_LAST_WORDS_S)
        finally:
            reading.cancel()
            stdin.close()  # releases the watchdog

    async def _read_lines(self) -> None:
        stdout = self._process.stdout
        assert stdout is not None
        while True:
            try:
                line = (await stdout.readline()).decode(errors="replace")
            except ValueError:  # longer than _MAX_LINE_BYTES: no use to us
                continue
            if not line:
                return
            self.last_line = line.strip() or self.last_line
            logger.debug("p2pd: %s", self.last_line)
            if line.startswith("Peer ID:"):
                self._ready.set()


@asynccontextmanager
async def open_p2pd(directory: Path, options: Sequence[str], *, deadline_s: float) -> AsyncIterator[P2pd]:
    """Start p2pd with its control socket in `directory`, which goes away together with p2pd.

    Args:
        options: command line options besides the control socket.
        deadline_s: loop time by which it must be ready.
    Raises: ResourceError: it does not start; the message ends with p2pd's own words.
    """
    control_socket = directory / "p2pd.sock"
    command = (_find_p2pd(), f"-listen=/unix{control_socket}", *options)
    environment = {"GOLOG_LOG_LEVEL": "error"} | os.environ
    starting = asyncio.create_task(
        asyncio.create_subprocess_exec(
            "/bin/sh", "-c", _SHELL, "swarm-p2pd", str(directory), *command,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            env=environment, start_new_session=True, limit=_MAX_LINE_BYTES,
        )
    )  # fmt: skip
    try:
        await asyncio.wait({starting})
    except asyncio.CancelledError:
        # Never cancel that: Python 3.11 may then wait for ever for the end of pipes that it has not opened yet.
        await asyncio.wait({starting})
        if starting.exception() is None:
            await finish(P2pd(starting.result(), control_socket).aclose())
        raise
    try:
        daemon = P2pd(starting.result(), control_socket)
    except OSError as exc:
        raise ResourceError(f"cannot start the libp2p daemon: {exc.strerror or exc}") from exc
    try:
        try:
            async with asyncio.timeout_at(deadline_s):
                ready = await daemon.wait_ready()
        except TimeoutError as exc:
            raise ResourceError("the libp2p daemon did not start in time: is this machine overloaded?") from exc
        if not ready:
            raise ResourceError(f"the libp2p daemon did not start: {daemon.last_line or 'it gave no reason'}")
        yield daemon
    finally:
        await finish(daemon.aclose())


@contextmanager
def open_socket_directory() -> Iterator[Path]:
    """A private directory (mode 0700) with a path short enough for unix sockets."""
    parent = tempfile.gettempdir()
    directory = tempfile.mkdtemp(prefix="swarm-", dir=parent if len(parent) <= _MAX_SOCKET_DIR_CHARS else "/tmp")
    try:
        yield Path(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def finish(work: Coroutine[Any, Any, T]) -> T:
    """Run bounded work, such as a clean-up, to its end, then let a cancellation that arrived meanwhile take effect."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


def _find_p2pd() -> str:
    spec = importlib.util.find_spec("hivemind")  # finds the package without importing it
    for location in (spec.submodule_search_locations if spec else None) or ():
        path = Path(location) / "hivemind_cli" / "p2pd"
        if path.is_file():
            return str(path)
    raise ResourceError("hivemind's libp2p daemon (p2pd) is not installed: reinstall the hivemind package")
