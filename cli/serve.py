"""`swarm serve`: host blocks of a model."""

from __future__ import annotations

import asyncio
import platform
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from swarm.errors import BadRequest, SwarmError
from swarm.ranges import BlockRange

from .common import (
    JoinOption,
    Lifetime,
    console,
    errors,
    exit_with_parent,
    parse_join,
    run_until_signal,
    write_atomically,
)

if TYPE_CHECKING:
    from swarm.server.app import Running
    from swarm.server.config import ServerConfig


def serve_command(
    model: Annotated[str, typer.Argument(help="Hub repository or local directory.")],
    blocks: Annotated[str, typer.Option(help="Exactly these blocks, START:END.", show_default=False)] = "",
    move: Annotated[bool, typer.Option(help="Go to other blocks when the swarm needs that.")] = True,
    num_blocks: Annotated[int, typer.Option(help="How many blocks; default: what fits.", show_default=False)] = 0,
    join: JoinOption = "",
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
        identity_path=identity,
        name=name,
        device=device,
        dtype=dtype,
        quantization=quantization,
        host=host,
        port=port,
        dht_port=dht_port,
        announce_host=announce_host or None,
        tunnel_only=tunnel_only,
        relay=replace(BESIDE_SERVING, max_bytes_per_s=relay_mbit * 1e6 / 8) if relay else None,
        adapters=tuple(AdapterSource.parse(each, token=token, cache_dir=cache_dir) for each in adapters or ()),
        cache_bytes=cache_mib << 20 or None,
        adapter_bytes=None if adapter_mib < 0 else adapter_mib << 20,
        limits=ServiceLimits(max_session_tokens=max_session_tokens),
        session_grace_s=session_grace,
        kept_activation_bytes=None if kept_mib < 0 else kept_mib << 20,
        metrics_port=metrics_port or None,
        metrics_host=metrics_host,
        drain_timeout_s=drain_timeout,
        announce_period_s=announce_period,
        num_threads=threads or None,
    )
    _serve_until_signal(config, link_file, orders)


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


def _serve_until_signal(config: ServerConfig, link_file: Path | None, orders: Orders) -> None:
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
            _print_ready(running)
            if link_file is not None:  # whoever waits for it finds that it was said as well
                write_atomically(link_file, running.link + "\n")
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


def _print_ready(running: Running) -> None:
    console.print(
        f"Serving blocks [bold]{running.blocks}[/] of [bold]{running.model_name}[/] "
        f"on {running.device} in {running.precision}. Ctrl-C to stop.",
        highlight=False,
    )
    console.print(f"Join link: {running.link}", soft_wrap=True, highlight=False, markup=False)


def _print_moved(blocks: BlockRange) -> None:
    console.print(f"Now serving blocks [bold]{blocks}[/].", highlight=False)
