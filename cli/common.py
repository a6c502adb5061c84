"""What several commands need: join links, output, running until a signal comes."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from rich.console import Console

from swarm.errors import BadLink
from swarm.link import JoinLink
from swarm.profiles import resolve_join

console = Console()
errors = Console(stderr=True)

MAX_FILES = 10_240
"""What macOS allows at most, and enough for a relay with all its connections."""

JoinOption = Annotated[
    str,
    typer.Option(
        "--join", "-j", envvar="SWARM_JOIN", help="Join link of the swarm, swarm://…, or its name.", show_default=False
    ),
]

AllowOption = Annotated[
    list[str] | None, typer.Option("--allow", help="Peer id of a server to use, and no others; repeatable.")
]
BlockOption = Annotated[list[str] | None, typer.Option("--block", help="Peer id of a server not to use; repeatable.")]
TrustOption = Annotated[
    list[str] | None,
    typer.Option("--trust", help="Peer id of a server that may run the first and last blocks, no other; repeatable."),
]


def parse_join(text: str) -> JoinLink | None:
    """Return the link of --join or SWARM_JOIN, or that they name; None where neither is set. Raises: BadLink."""
    return resolve_join(text) if text.strip() else None


def need_join(text: str) -> JoinLink:
    """Return the link of --join or SWARM_JOIN. Raises: BadLink: there is none, or it cannot be read."""
    link = parse_join(text)
    if link is None:
        raise BadLink("a join link is needed: pass --join swarm://…, as printed by `swarm serve`, or set SWARM_JOIN")
    return link


def cache_home() -> Path:
    """Where this user's programs keep what can be made again: $XDG_CACHE_HOME/swarm, or ~/.cache/swarm."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "swarm"


def exit_with_parent(grace_s: float, on_line: Callable[[str], None] = lambda line: None) -> None:
    """End this process when its standard input closes, which its parent holds open: first politely, then for good.

    Args:
        grace_s: time between the two.
        on_line: called, in a thread of its own, with each line that the parent writes there.
    """

    def watch() -> None:
        with os.fdopen(0, errors="replace", closefd=False) as lines:
            for line in lines:
                on_line(line.strip())
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_s)
        os._exit(1)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()


@dataclass(slots=True)
class Lifetime:
    """What a long-running command shares with the signal handlers."""

    stop: asyncio.Event
    ready: bool = False
    """Set by the command when it has something to wind down; before that, a signal cancels it at once."""


def raise_file_limit() -> None:
    """Let this process open more files than a shell usually allows: each connection that it carries takes two."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(MAX_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def run_until_signal(work: Callable[[Lifetime], Awaitable[None]]) -> None:
    """Run `work`, with as many open files as it may need.

    Once it is ready, the first SIGINT or SIGTERM asks it to stop, and a second one cancels it.

    Raises: typer.Exit: it was cancelled (130).
    """

    async def run() -> None:
        lifetime = Lifetime(asyncio.Event())
        task = asyncio.ensure_future(work(lifetime))

        def on_signal() -> None:
            if lifetime.ready and not lifetime.stop.is_set():
                lifetime.stop.set()
            else:
                task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, on_signal)
        try:
            await task
        except asyncio.CancelledError:
            raise typer.Exit(130) from None

    raise_file_limit()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
