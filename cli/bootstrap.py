"""`swarm dht`: a bare DHT node for others to join through."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from swarm.dht import DhtConfig
from swarm.files import default_config_dir, write_atomically
from swarm.link import JoinLink
from swarm.ownership import MAX_ADDRESSES, revocations_path

from .common import JoinOption, Lifetime, console, parse_join, run_until_signal
from .private import AsOption, PrivateOption, free_usual_port, own_swarm, print_link


def dht_command(
    join: JoinOption = "",
    private: PrivateOption = False,
    swarm_name: AsOption = "",
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
    owned = own_swarm(private, swarm_name, "private", link)
    invitation = owned.own_invitation() if owned else link.invitation if link else None
    config = DhtConfig(
        initial_peers=link.initial_peers if link else (),
        identity_path=identity or (owned.node_identity_path if owned else None),
        host=host,
        port=port or (free_usual_port(owned, host) if owned else 0),
        announce_host=announce_host or None,
        invitation=invitation,
        revocations_path=revocations_path(default_config_dir(), invitation.owner_key) if invitation else None,
    )

    relaying = RelayConfig(max_bytes_per_s=relay_mbit * 1e6 / 8, mirror_port=mirror_port) if relay else None

    async def work(lifetime: Lifetime) -> None:
        def on_ready(multiaddrs: list[str]) -> None:
            lifetime.ready = True
            guests = owned.guest_invitation() if owned else None
            text = JoinLink(tuple(multiaddrs[:MAX_ADDRESSES]), invitation=guests).encode()
            if owned is not None:
                owned.remember_addresses(multiaddrs)
            if link_file is not None:
                write_atomically(link_file, f"{text}\n".encode())
            console.print("The DHT node runs. Ctrl-C to stop.", highlight=False)
            print_link(text)

        await run_bootstrap(config, lifetime.stop, on_ready, relay=relaying)

    run_until_signal(work)
