"""`swarm status`: what a swarm serves, and who serves it."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from swarm.announcement import AdapterListing, Announcement, ModelListing
from swarm.dht import DhtConfig, open_dht
from swarm.errors import BadRequest, NoRoute
from swarm.link import JoinLink
from swarm.ranges import BlockRange, describe_blocks

from .common import AllowOption, BlockOption, JoinOption, TrustOption, console, need_join


def status_command(
    join: JoinOption = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    route: Annotated[bool, typer.Option("--route", help="Also the fastest route from here, and why.")] = False,
    allow: AllowOption = None,
    block: BlockOption = None,
    trust: TrustOption = None,
) -> None:
    """Show the models of a swarm and the servers that hold their blocks.

    Example: swarm status --join swarm://…
    """
    if as_json and route:
        raise BadRequest("--route is for people to read: leave out --json")
    if (allow or block or trust) and not route:
        raise BadRequest("--allow, --block and --trust are about the route: add --route")
    link = need_join(join)
    models = asyncio.run(_read(link))
    if as_json:
        typer.echo(json.dumps([_as_dict(listing, servers) for listing, servers in models], indent=2))
        return
    if not models:
        console.print("Nobody serves a model here yet: start with `swarm serve MODEL --join …`.")
    wanted = {"allowed_servers": allow or None, "blocked_servers": block or (), "trusted_servers": trust or None}
    for listing, servers in models:
        _print_model(listing, servers)
        if route and not _missing(listing, servers):
            console.print(
                asyncio.run(_explain(link, listing, wanted)),
                highlight=False,
                markup=False,
                soft_wrap=True,
            )


async def _explain(link: JoinLink, listing: ModelListing, wanted: dict[str, Any]) -> str:
    """The fastest route over the servers that the options let be on it, or why there is none."""
    from swarm.client.config import ClientConfig
    from swarm.client.network import open_network
    from swarm.client.routing import Needs

    config = ClientConfig(initial_peers=link.initial_peers, invitation=link.invitation, **wanted)
    needs = Needs(BlockRange(0, listing.num_blocks), listing.fingerprint)
    async with open_network(config) as network:
        try:
            return str(await network.explain_route(needs))
        except NoRoute as exc:
            return str(exc)


async def _read(link: JoinLink) -> list[tuple[ModelListing, list[Announcement]]]:
    config = DhtConfig(initial_peers=link.initial_peers, invitation=link.invitation, client_mode=True)
    async with open_dht(config) as dht:
        listings = await dht.directory.models()
        return [(listing, await dht.directory.servers(listing.fingerprint)) for listing in listings]


def _missing(listing: ModelListing, servers: list[Announcement]) -> set[int]:
    covered = {block for server in servers if server.state == "online" for block in server.blocks}
    return set(range(listing.num_blocks)) - covered


def _hosted(servers: list[Announcement]) -> list[tuple[AdapterListing, list[Announcement]]]:
    """The adapters that servers host, and which servers do, by name."""
    adapters = sorted(
        {each for server in servers for each in server.adapters}, key=lambda each: (each.name, each.digest)
    )
    return [(adapter, [server for server in servers if adapter in server.adapters]) for adapter in adapters]


def _as_dict(listing: ModelListing, servers: list[Announcement]) -> dict[str, Any]:
    return {
        "model": listing.name,
        "fingerprint": listing.fingerprint,
        "num_blocks": listing.num_blocks,
        "missing_blocks": sorted(_missing(listing, servers)),
        "adapters": [
            {**adapter.model_dump(), "missing_blocks": sorted(_missing(listing, having))}
            for adapter, having in _hosted(servers)
        ],
        "servers": [server.model_dump(mode="json", exclude={"tls_certificate"}) for server in servers],
    }


def _print_model(listing: ModelListing, servers: list[Announcement]) -> None:
    missing = _missing(listing, servers)
    state = f"[red]blocks {describe_blocks(missing)} are missing[/]" if missing else "[green]complete[/]"
    table = Table(title=f"{escape(listing.name)}: {listing.num_blocks} blocks, {state}", title_justify="left")
    for column in ("server", "blocks", "state", "weights", "decode tok/s", "forward tok/s", "direct", "peer"):
        table.add_column(column)
    for server in sorted(servers, key=lambda each: (each.start, each.end)):
        table.add_row(
            escape(server.server_name),
            str(server.blocks),
            server.state,
            server.quantization or server.dtype,
            f"{server.decode_tokens_per_s:.1f}",
            f"{server.forward_tokens_per_s:.0f}",
            server.direct[0] if server.direct else "tunnel",
            server.peer_id[-8:],
        )
    console.print(table)
    for adapter, having in _hosted(servers):
        lacking = _missing(listing, having)
        state = f"[red]not for blocks {describe_blocks(lacking)}[/]" if lacking else "[green]complete[/]"
        console.print(
            f"adapter [bold]{adapter}[/]: {state}, on {len(having)} server{'s' * (len(having) > 1)}", highlight=False
        )
