"""`swarm status`: what a swarm serves, and who serves it."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any

import typer
from rich.table import Table

from swarm.announcement import Announcement, ModelListing
from swarm.dht import DhtConfig, open_dht
from swarm.ranges import describe_blocks

from .common import JoinOption, console, need_join


def status_command(
    join: JoinOption = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show the models of a swarm and the servers that hold their blocks.

    Example: swarm status --join swarm://…
    """
    models = asyncio.run(_read(need_join(join).initial_peers))
    if as_json:
        typer.echo(json.dumps([_as_dict(listing, servers) for listing, servers in models], indent=2))
        return
    if not models:
        console.print("Nobody serves a model here yet: start with `swarm serve MODEL --join …`.")
    for listing, servers in models:
        _print_model(listing, servers)


async def _read(initial_peers: tuple[str, ...]) -> list[tuple[ModelListing, list[Announcement]]]:
    async with open_dht(DhtConfig(initial_peers=initial_peers, client_mode=True)) as dht:
        listings = await dht.directory.models()
        return [(listing, await dht.directory.servers(listing.fingerprint)) for listing in listings]


def _missing(listing: ModelListing, servers: list[Announcement]) -> set[int]:
    covered = {block for server in servers if server.state == "online" for block in server.blocks}
    return set(range(listing.num_blocks)) - covered


def _as_dict(listing: ModelListing, servers: list[Announcement]) -> dict[str, Any]:
    return {
        "model": listing.name,
        "fingerprint": listing.fingerprint,
        "num_blocks": listing.num_blocks,
        "missing_blocks": sorted(_missing(listing, servers)),
        "servers": [server.model_dump(mode="json", exclude={"tls_certificate"}) for server in servers],
    }


def _print_model(listing: ModelListing, servers: list[Announcement]) -> None:
    missing = _missing(listing, servers)
    state = f"[red]blocks {describe_blocks(missing)} are missing[/]" if missing else "[green]complete[/]"
    table = Table(title=f"{listing.name}: {listing.num_blocks} blocks, {state}", title_justify="left")
    for column in ("server", "blocks", "state", "weights", "decode tok/s", "forward tok/s", "direct", "peer"):
        table.add_column(column)
    for server in sorted(servers, key=lambda each: (each.start, each.end)):
        table.add_row(
            server.server_name,
            str(server.blocks),
            server.state,
            server.quantization or server.dtype,
            f"{server.decode_tokens_per_s:.1f}",
            f"{server.forward_tokens_per_s:.0f}",
            server.direct[0] if server.direct else "tunnel",
            server.peer_id[-8:],
        )
    console.print(table)
