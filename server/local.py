"""Servers on this machine, for demos, tests and notebooks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from swarm.errors import BadRequest, ResourceError, SwarmError
from swarm.link import JoinLink
from swarm.membership import Invitation, Role
from swarm.model.checkpoint import CheckpointSource
from swarm.ownership import OwnedSwarm, open_owned
from swarm.ranges import BlockRange

from .app import Running, serve
from .config import ServerConfig
from .server_statistics import ServerStatistics

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0

OWNED_NAME = "local"
"""What a private local swarm is called in its own configuration."""

_SERVING = re.compile(r"[Ss]erving blocks (\d+:\d+)")
_MOVED = re.compile(r"Now serving blocks (?P<blocks>\d+:\d+)|Did not move: .*")
"""What `swarm serve` says after an order to move."""

_THREAD_SETTINGS = {"drain_timeout_s": 0.2, "cache_bytes": 1 << 30, "session_grace_s": 1.0}


class LocalServer(Protocol):
    """One server of a LocalSwarm."""

    link: str

    @property
    def blocks(self) -> BlockRange:
        """What it serves."""

    def kill(self) -> None:
        """End it without a word, as a power cut would."""

    def stop(self) -> None:
        """Ask it to drain and leave, and wait until it has."""

    def pause(self) -> None:
        """Freeze it: connections stay open, nothing answers."""

    def resume(self) -> None:
        """Let it go on after `pause`."""

    def move(self, blocks: tuple[int, int]) -> None:
        """Let it serve these blocks instead, and wait until it has left the others."""

    def statistics(self) -> ServerStatistics:
        """Count what it does and has. Raises: ResourceError: it does not run."""

    @property
    def alive(self) -> bool:
        """Whether it still runs."""


def free_port() -> int:
    """A TCP port that is free on this machine now."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


class ProcessServer:
    """A `swarm serve` process with a process group of its own.

    We hold the other end of its standard input: orders go there, and it ends when that closes, so also when we are
    killed ourselves.
    """

    def __init__(
        self,
        model: str,
        blocks: BlockRange | int,
        join: str | None,
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        metrics: bool = False,
    ) -> None:
        self._wanted = blocks
        self.link = ""
        self.metrics_port = free_port() if metrics else None
        """Where Prometheus finds what it does, on 127.0.0.1."""
        self._directory = tempfile.TemporaryDirectory(prefix="swarm-local-")
        self._log_path = Path(self._directory.name, "log")
        self._link_path = Path(self._directory.name, "link")
        command = [sys.executable, "-m", "swarm.cli.app", "serve", model]
        command += ["--num-blocks" if isinstance(blocks, int) else "--blocks", str(blocks)]
        command += ["--link-file", str(self._link_path), "--exit-with-parent", *arguments]
        command += [] if self.metrics_port is None else ["--metrics-port", str(self.metrics_port)]
        environment = {**os.environ, "SWARM_JOIN": join or "", **(environment or {})}
        with self._log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def blocks(self) -> BlockRange:
        """What it serves, as it has said last. Raises: ResourceError: it chooses itself, and has not said yet."""
        if said := _SERVING.findall(self.log):
            self._wanted = BlockRange.parse(said[-1])
        if isinstance(self._wanted, int):
            raise ResourceError(f"the local server of {self._wanted} blocks has not chosen them yet")
        return self._wanted

    @property
    def log(self) -> str:
        """What it has printed so far."""
        return self._log_path.read_text(errors="replace") if self._log_path.exists() else ""

    def wait_ready(self) -> None:
        """Wait for its join link. Raises: ResourceError: it ended instead, or takes too long."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self.link:
            if self._link_path.exists():
                self.link = self._link_path.read_text().strip()
            elif not self.alive or time.monotonic() > deadline_s:
                log = self.log.strip()
                self.kill()
                raise ResourceError(f"the local server of blocks {self._wanted} did not start: {log[-2000:]}")
            else:
                time.sleep(0.05)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        self.process.wait()
        with contextlib.suppress(ResourceError):
            _ = self.blocks  # what it served stays known when its log is gone
        if self.process.stdin is not None:
            self.process.stdin.close()
        self._directory.cleanup()

    def stop(self) -> None:
        self._signal(signal.SIGCONT)
        if self.alive:
            self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_TIMEOUT_S)
        self.kill()

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def move(self, blocks: tuple[int, int]) -> None:
        """See LocalServer. Raises: ResourceError: it did not, and why; it still serves what it did."""
        wanted, seen = BlockRange(*blocks), len(self.log)
        assert self.process.stdin is not None
        self.process.stdin.write(f"move {wanted}\n".encode())
        self.process.stdin.flush()
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while (found := _MOVED.search(self.log, seen)) is None:
            if not self.alive or time.monotonic() > deadline_s:
                raise ResourceError(f"the local server of blocks {self.blocks} did not move: {self.log[seen:].strip()}")
            time.sleep(0.02)
        if found["blocks"] != str(wanted):
            raise ResourceError(f"the local server of blocks {self.blocks} did not move: {found[0]}")

    def statistics(self) -> ServerStatistics:
        raise BadRequest("a server in a process of its own tells Prometheus: use in_process=True, or --metrics-port")

    def _signal(self, number: signal.Signals) -> None:
        if self.alive:  # once it was waited for, its number may belong to somebody else
            os.killpg(self.process.pid, number)


class ThreadServer:
    """A server in a thread of this process: quick to start; it cannot be killed or paused."""

    def __init__(self, config: ServerConfig) -> None:
        self.link = ""
        self.running: Running | None = None
        self._config = config
        self._error: BaseException | None = None
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name=f"server {config.blocks or ''}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(serve(self._config, self._stop, self._on_ready))
        except SwarmError as exc:
            self._error = exc
        finally:
            self._loop.close()
            self._ready.set()

    def _on_ready(self, running: Running) -> None:
        self.running, self.link = running, running.link
        self._ready.set()

    @property
    def blocks(self) -> BlockRange:
        """What it serves. Raises: ResourceError: nothing yet, or it is on its way."""
        if self.running is not None and self.running.mover.present is not None:
            return self.running.blocks
        if self._config.blocks is None:
            raise ResourceError(f"the local server of {self._config.num_blocks} blocks serves none at the moment")
        return self._config.blocks

    def wait_ready(self) -> None:
        """Wait for its join link. Raises: what `serve` raises."""
        self._ready.wait(START_TIMEOUT_S)
        if self._error is not None:
            raise self._error
        if not self.link:
            raise ResourceError(f"a local server did not start in {START_TIMEOUT_S:.0f} s")

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(STOP_TIMEOUT_S)

    def kill(self) -> None:
        raise BadRequest("a server in this process cannot be killed: use LocalSwarm(..., in_process=False)")

    def pause(self) -> None:
        raise BadRequest("a server in this process cannot be paused: use LocalSwarm(..., in_process=False)")

    def resume(self) -> None:
        """Nothing to resume."""

    def statistics(self) -> ServerStatistics:
        """See LocalServer."""
        if self.running is None or not self.alive:
            raise ResourceError("this local server does not run")
        return self.running.statistics()

    def move(self, blocks: tuple[int, int]) -> None:
        assert self.running is not None
        wanted = BlockRange(*blocks)
        asyncio.run_coroutine_threadsafe(self.running.move(wanted), self._loop).result(START_TIMEOUT_S)


class LocalSwarm:
    """Servers of one model on loopback. Use as a context manager; all of them end with its body.

    Args:
        model: hub repository or local directory.
        ranges: the blocks of each server, as (start, end).
        dtype: of the servers' weights.
        quantization: of these weights, as `swarm serve` takes it.
        in_process: threads instead of processes: quicker, but they cannot be killed.
        arguments: further flags for `swarm serve`; processes only.
        settings: further fields of ServerConfig; threads only.
        join: the link of a swarm to join; default: a new one.
        metrics: whether each server process tells Prometheus what it does, see ProcessServer.
        private: a new swarm that takes an invitation; `link` is one, `invite` and `revoke` are its owner's.
    """

    def __init__(
        self,
        model: str,
        ranges: Sequence[tuple[int, int]],
        *,
        dtype: str = "auto",
        quantization: str = "auto",
        in_process: bool = False,
        arguments: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
        join: str | None = None,
        private: bool = False,
        metrics: bool = False,
    ) -> None:
        if private and join is not None:
            raise BadRequest("a private local swarm is a new one: leave out either join or private")
        if not ranges:
            raise BadRequest("a local swarm needs at least one block range, for example ranges=[(0, 4)]")
        self._model = str(model)
        self._ranges = [BlockRange(*each) for each in ranges]
        self._precision: dict[str, Any] = {"dtype": dtype, "quantization": quantization}
        self._in_process = in_process
        self._arguments = tuple(arguments)
        self._settings = _THREAD_SETTINGS | dict(settings or {})
        self._join = join
        self._metrics = metrics
        self.servers: list[ProcessServer | ThreadServer] = []
        self._config_home: tempfile.TemporaryDirectory[str] | None = None
        self._owned: OwnedSwarm | None = None
        if private:
            self._config_home = tempfile.TemporaryDirectory(prefix="swarm-local-")
            self._owned = open_owned(Path(self._config_home.name, "swarm"), OWNED_NAME, create=True)

    @property
    def link(self) -> str:
        """Join link of the swarm, naming all servers that still run, so that it works after any of them died."""
        return self._link_with(self._owned.guest_invitation() if self._owned is not None else None)

    def invite(self, name: str, *, role: Literal["serve", "use"] = "serve", lifetime_s: float = 86400.0) -> str:
        """A join link of its own for one more member of a private swarm."""
        return self._link_with(self._owner.invite(name, Role[role.upper()], time.time() + lifetime_s))

    def revoke(self, name: str) -> None:
        """Take an invitation back: its holder is no member any more within one announce period."""
        self._owner.revoke(name)

    @property
    def _owner(self) -> OwnedSwarm:
        if self._owned is None:
            raise BadRequest("this local swarm is public: make it with LocalSwarm(..., private=True)")
        return self._owned

    def _link_with(self, invitation: Invitation | None) -> str:
        links = [JoinLink.parse(server.link) for server in self.servers if server.alive and server.link]
        if not links:
            raise ResourceError("no server of this local swarm runs any more: add one with .add((start, end))")
        peers = dict.fromkeys(link.initial_peers[0] for link in links)
        return JoinLink(tuple(peers), links[0].model_name, invitation=invitation).encode()

    def __enter__(self) -> LocalSwarm:
        try:
            first, *others = self._ranges
            self.add((first.start, first.end))
            link = self.link
            for blocks in others:
                self.servers.append(self._start(blocks, link))
            for server in self.servers[1:]:
                server.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def add(self, blocks: tuple[int, int] | int, *, arguments: Sequence[str] = ()) -> ProcessServer | ThreadServer:
        """Start one more server and wait until it serves.

        Args:
            blocks: exactly these, as (start, end); or so many, which ones it chooses, and it moves by itself.
            arguments: flags of its own for `swarm serve`; processes only.
        """
        join = self.link if any(server.alive for server in self.servers) else self._join
        server = self._start(blocks if isinstance(blocks, int) else BlockRange(*blocks), join, arguments)
        self.servers.append(server)
        server.wait_ready()
        return server

    def statistics(self) -> list[ServerStatistics]:
        """Of each server that runs, in their order; of servers in this process only.

        Raises: BadRequest: they are processes of their own, which tell Prometheus.
        """
        return [server.statistics() for server in self.servers if server.alive]

    def close(self) -> None:
        """End all servers."""
        for server in reversed(self.servers):
            if isinstance(server, ProcessServer):
                server.kill()
            else:
                server.stop()
        if self._config_home is not None:
            self._config_home.cleanup()

    def _start(
        self, blocks: BlockRange | int, join: str | None, arguments: Sequence[str] = ()
    ) -> ProcessServer | ThreadServer:
        if not self._in_process:
            flags = [part for name, value in self._precision.items() for part in (f"--{name}", value)]
            if self._owned is not None and join is None:
                flags += ["--private", "--as", self._owned.name]
            home = {} if self._config_home is None else {"XDG_CONFIG_HOME": self._config_home.name}
            flags += [*self._arguments, *arguments]
            return ProcessServer(self._model, blocks, join, flags, home, metrics=self._metrics)
        link = JoinLink.parse(join) if join else None
        owned = self._owned
        own = owned.own_invitation() if owned is not None else None
        return ThreadServer(
            ServerConfig(
                source=CheckpointSource(self._model),
                blocks=None if isinstance(blocks, int) else blocks,
                num_blocks=blocks if isinstance(blocks, int) else None,
                **self._precision,
                initial_peers=link.initial_peers if link is not None else (),
                invitation=own or (link.invitation if link is not None else None),
                guest_invitation=owned.guest_invitation() if owned is not None else None,
                revocations_path=owned.revocations_path if owned is not None else None,
                **self._settings,
            )
        )
