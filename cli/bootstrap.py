"""`swarm dht`: a bare DHT node for others to join through."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from swarm.dht import DhtConfig
from swarm.link import JoinLink

from .common import JoinOption, Lifetime, console, parse_join, run_until_signal, write_atomically


def dht_command(
    join: JoinOption = "",
    host: Annotated[str, typer.Option(help="IP address to listen on; 0.0.0.0: all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port; 0: any.")] = 0,
    announce_host: Annotated[str, typer.Option(help="Address that others dial instead.", show_default=False)] = "",
    identity: Annotated[Path | None, typer.Option(help="Key file; keeps the join link the same.")] = None,
    link_file: Annotated[Path | None, typer.Option(help="Also write the join link into this file.")] = None,
    relay: Annotated[bool, typer.Option(help="Carry connections to servers that nobody can dial.")] = True,
    relay_mbit: Annotated[float, typer.Option(help="Megabits per second that it carries at most.")] = 400.0,
    mirror_port: Annotated[
        int, typer.Option(help="TCP port at which it helps peers to dial each other instead; 0: any free one.")
    ] = 0,
) -> None:
    """Run a bootstrap node: servers and clients join through it; it holds no blocks.

    Example: swarm dht --host 0.0.0.0 --port 31337 --identity dht.key
    """
    from swarm.bootstrap import run_bootstrap
    from swarm.relaying import RelayConfig

    link = parse_join(join)
    config = DhtConfig(
        initial_peers=link.initial_peers if link else (),
        identity_path=identity,
        host=host,
        port=port,
        announce_host=announce_host or None,
    )

    relaying = RelayConfig(max_bytes_per_s=relay_mbit * 1e6 / 8, mirror_port=mirror_port) if relay else None

    async def work(lifetime: Lifetime) -> None:
        def on_ready(multiaddrs: list[str]) -> None:
            lifetime.ready = True
            text = JoinLink(initial_peers=tuple(multiaddrs[:4])).encode()
            if link_file is not None:
                write_atomically(link_file, text + "\n")
            console.print("The DHT node runs. Ctrl-C to stop.", highlight=False)
            console.print(f"Join link: {text}", soft_wrap=True, highlight=False, markup=False)

        await run_bootstrap(config, lifetime.stop, on_ready, relay=relaying)

    run_until_signal(work)
