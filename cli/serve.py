"""`swarm serve`: host blocks of a model."""

from __future__ import annotations

import asyncio
import platform
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from swarm.errors import BadRequest, SwarmError
from swarm.files import default_config_dir, write_atomically
from swarm.link import JoinLink
from swarm.ownership import OwnedSwarm, revocations_path
from swarm.ranges import BlockRange
from swarm.server.limits import LimitsConfig

from .common import (
    JoinOption,
    Lifetime,
    cache_home,
    console,
    errors,
    exit_with_parent,
    parse_join,
    run_until_signal,
)
from .private import AsOption, PrivateOption, free_usual_port, name_for, own_swarm, print_link

if TYPE_CHECKING:
    from swarm.server.app import Running
    from swarm.server.config import ServerConfig


LIMITS = LimitsConfig()


def limit(what: str) -> Any:
    """A flag for how much callers may have."""
    return typer.Option(help=what, rich_help_panel="Limits")


def serve_command(
    model: Annotated[str, typer.Argument(help="Hub repository or local directory.")],
    blocks: Annotated[str, typer.Option(help="Exactly these blocks, START:END.", show_default=False)] = "",
    move: Annotated[bool, typer.Option(help="Go to other blocks when the swarm needs that.")] = True,
    num_blocks: Annotated[int, typer.Option(help="How many blocks; default: what fits.", show_default=False)] = 0,
    join: JoinOption = "",
    private: PrivateOption = False,
    swarm_name: AsOption = "",
    link_file: Annotated[Path | None, typer.Option(help="Also write the join link into this file.")] = None,
    name: Annotated[str, typer.Option(help="What people see in `swarm status`.")] = platform.node(),
    identity: Annotated[Path | None, typer.Option(help="Key file that keeps this server's identity.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    quantization: Annotated[str, typer.Option(help="auto, none, int8, int4 or nf4 (CUDA only).")] = "auto",
    host: Annotated[str, typer.Option(help="IP address to listen on; 0.0.0.0: all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port for clients; 0: any.")] = 0,
    dht_port: Annotated[int, typer.Option(help="TCP port of the DHT; 0: any.")] = 0,
    announce_host: Annotated[str, typer.Option(help="Address that others dial instead.", show_default=False)] = "",
    tunnel_only: Annotated[bool, typer.Option(help="Be reachable through the tunnel only.")] = False,
    relay: Annotated[bool, typer.Option(help="Carry connections to servers that nobody can dial.")] = True,
    relay_mbit: Annotated[float, typer.Option(help="Megabits per second that it carries at most.")] = 80.0,
    cache_mib: Annotated[int, typer.Option(help="KV cache; default: from free memory.", show_default=False)] = 0,
    adapters: Annotated[
        list[str] | None,
        typer.Option(help="PEFT adapter to host, REPO_OR_PATH or NAME=REPO_OR_PATH; repeatable.", show_default=False),
    ] = None,
    adapter_mib: Annotated[
        int, typer.Option(help="Clients' adapters; 0: none; default: from free memory.", show_default=False)
    ] = -1,
    max_session_tokens: Annotated[int, typer.Option(help="Longest session.")] = 8192,
    max_connections: Annotated[int, limit("TCP connections in all.")] = LIMITS.max_connections,
    caller_connections: Annotated[int, limit("TCP connections of one caller.")] = LIMITS.max_connections_per_caller,
    max_calls: Annotated[int, limit("Calls at a time, in all.")] = LIMITS.max_calls,
    caller_calls: Annotated[int, limit("Calls of one caller.")] = LIMITS.max_calls_per_caller,
    max_sessions: Annotated[int, limit("Sessions at a time, in all.")] = LIMITS.max_sessions,
    caller_sessions: Annotated[int, limit("Sessions of one caller.")] = LIMITS.max_sessions_per_caller,
    max_batches: Annotated[int, limit("Batches of training at a time, in all.")] = LIMITS.max_batches,
    caller_batches: Annotated[int, limit("Batches of one caller.")] = LIMITS.max_batches_per_caller,
    caller_messages: Annotated[float, limit("Messages of one caller per second.")] = LIMITS.messages_per_s,
    caller_mbit: Annotated[float, limit("Megabits of one caller per second.")] = LIMITS.bytes_per_s * 8 / 1e6,
    message_mib: Annotated[int, limit("Room for messages; 0: as much as two of the largest.")] = 0,
    room_share: Annotated[float, limit("Share of it that one caller may have.")] = LIMITS.room_share,
    cache_share: Annotated[float, limit("Share of the cache that one keeps if others wait.")] = LIMITS.cache_share,
    work_share: Annotated[float, limit("Share of the time that one may take from others.")] = LIMITS.work_share,
    limit_loopback: Annotated[bool, limit("Programs of this machine are callers, too.")] = False,
    session_grace: Annotated[float, typer.Option(help="Seconds that a cache outlives a broken connection.")] = 30.0,
    kept_mib: Annotated[
        int, typer.Option(help="Activations kept for backward; 0: none; default: from free memory.", show_default=False)
    ] = -1,
    metrics_port: Annotated[int, typer.Option(help="TCP port for Prometheus; 0: none.")] = 0,
    metrics_host: Annotated[str, typer.Option(help="IP address of the metrics port.")] = "127.0.0.1",
    drain_timeout: Annotated[float, typer.Option(help="Seconds for running sessions when stopping.")] = 20.0,
    announce_period: Annotated[float, typer.Option(help="Seconds between announcements.")] = 15.0,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's default.")] = 0,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub repository.")] = None,
    token: Annotated[str | None, typer.Option(envvar="HF_TOKEN", help="Hub token.", show_default=False)] = None,
    cache_dir: Annotated[str | None, typer.Option(help="Where downloads go.")] = None,
    with_parent: Annotated[bool, typer.Option("--exit-with-parent", hidden=True)] = False,
) -> None:
    """Host blocks of a model. Without --join, start a new swarm and print its join link.

    Example: swarm serve Qwen/Qwen3-8B --host 0.0.0.0
    """
    orders = Orders()
    if with_parent:
        exit_with_parent(drain_timeout + 5, orders.take)
    link = parse_join(join)
    owned = own_swarm(private, swarm_name, name_for(model), link)
    invitation = owned.own_invitation() if owned else link.invitation if link else None
    block_range = BlockRange.parse(blocks) if blocks else None
    from swarm.model.checkpoint import CheckpointSource
    from swarm.model.hosted import AdapterSource
    from swarm.relaying import BESIDE_SERVING
    from swarm.server.checks import ServiceLimits
    from swarm.server.config import ServerConfig

    config = ServerConfig(
        source=CheckpointSource(model, revision, token, cache_dir),
        blocks=block_range,
        num_blocks=num_blocks or None,
        moves=move,
        initial_peers=link.initial_peers if link else (),
        invitation=invitation,
        guest_invitation=owned.guest_invitation() if owned else None,
        revocations_path=revocations_path(default_config_dir(), invitation.owner_key) if invitation else None,
        identity_path=identity or (owned.node_identity_path if owned else None),
        name=name,
        device=device,
        dtype=dtype,
        quantization=quantization,
        host=host,
        port=port,
        dht_port=dht_port or (free_usual_port(owned, host) if owned else 0),
        announce_host=announce_host or None,
        tunnel_only=tunnel_only,
        relay=replace(BESIDE_SERVING, max_bytes_per_s=relay_mbit * 1e6 / 8) if relay else None,
        adapters=tuple(AdapterSource.parse(each, token=token, cache_dir=cache_dir) for each in adapters or ()),
        cache_bytes=cache_mib << 20 or None,
        adapter_bytes=None if adapter_mib < 0 else adapter_mib << 20,
        limits=ServiceLimits(max_session_tokens=max_session_tokens),
        quotas=LimitsConfig(
            max_connections=max_connections,
            max_connections_per_caller=caller_connections,
            max_calls=max_calls,
            max_calls_per_caller=caller_calls,
            max_sessions=max_sessions,
            max_sessions_per_caller=caller_sessions,
            max_batches=max_batches,
            max_batches_per_caller=caller_batches,
            messages_per_s=caller_messages,
            bytes_per_s=caller_mbit * 1e6 / 8,
            message_bytes=message_mib << 20 or None,
            room_share=room_share,
            cache_share=cache_share,
            work_share=work_share,
            loopback_is_caller=limit_loopback,
        ),
        session_grace_s=session_grace,
        kept_activation_bytes=None if kept_mib < 0 else kept_mib << 20,
        metrics_port=metrics_port or None,
        metrics_host=metrics_host,
        drain_timeout_s=drain_timeout,
        announce_period_s=announce_period,
        num_threads=threads or None,
        speeds_path=cache_home() / "speeds.json",
    )
    _serve_until_signal(config, link_file, orders, owned)


class Orders:
    """What a parent process writes into our standard input, a line each: `move START:END`."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running: Running | None = None

    def begin(self, running: Running) -> None:
        """Carry out orders from now on; called in the event loop."""
        self._loop, self._running = asyncio.get_running_loop(), running

    def take(self, line: str) -> None:
        """Have an order carried out; called in any thread."""
        if self._loop is not None:
            asyncio.run_coroutine_threadsafe(self._obey(line), self._loop)

    async def _obey(self, line: str) -> None:
        assert self._running is not None
        verb, _, blocks = line.partition(" ")
        try:
            if verb != "move":
                raise BadRequest(f"{line!r} is no order: write `move START:END`")
            await self._running.move(BlockRange.parse(blocks))
        except SwarmError as exc:
            console.print(f"Did not move: {exc}", soft_wrap=True, highlight=False, markup=False)


def _serve_until_signal(config: ServerConfig, link_file: Path | None, orders: Orders, owned: OwnedSwarm | None) -> None:
    """Run the server behind a loading bar; say, and write into `link_file`, how others join when it is ready."""
    from swarm.server.app import serve
    from swarm.server.hardware import keep_freed_memory

    keep_freed_memory()
    progress = _loading_bar()
    task = progress.add_task("loading", total=None)

    def on_progress(done_bytes: int, total_bytes: int) -> None:
        progress.update(task, completed=done_bytes, total=total_bytes)

    async def work(lifetime: Lifetime) -> None:
        def on_ready(running: Running) -> None:
            lifetime.ready = True
            memory = running.mover.tenure.holding.memory
            keep_freed_memory(memory.kept_bytes + memory.graph_bytes)
            progress.stop()
            _print_ready(running, config)
            if link_file is not None:  # whoever waits for it finds that it was said as well
                write_atomically(link_file, f"{running.link}\n".encode())
            if owned is not None:
                owned.remember_addresses(JoinLink.parse(running.link).initial_peers)
            orders.begin(running)

        await serve(replace(config, on_progress=on_progress, on_moved=_print_moved), lifetime.stop, on_ready)

    with progress:
        run_until_signal(work)


def _loading_bar() -> Progress:
    return Progress(
        TextColumn("loading blocks"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=errors,
        disable=not errors.is_terminal,
        transient=True,
    )


def _print_ready(running: Running, config: ServerConfig) -> None:
    console.print(
        f"Serving blocks [bold]{running.blocks}[/] of [bold]{running.model_name}[/] "
        f"on {running.device} in {running.precision}. Ctrl-C to stop.",
        highlight=False,
    )
    if config.invitation is not None and config.guest_invitation is None:
        console.print(
            "This swarm is private: its owner invites others with `swarm invite WHO`.", highlight=False, soft_wrap=True
        )
    else:
        print_link(running.link)


def _print_moved(blocks: BlockRange) -> None:
    console.print(f"Now serving blocks [bold]{blocks}[/].", highlight=False)
