"""`swarm doctor`: what can be reached, which way, at what speed, and what to open."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from swarm.dht import DhtConfig, open_dht
from swarm.errors import BadRequest
from swarm.link import JoinLink

from .common import JoinOption, console, need_join

if TYPE_CHECKING:
    from swarm.diagnosis import ModelCheck, OwnCheck, PeerCheck, Report

WAYS = {"punched": "direct (punched)"}


def doctor_command(
    model: Annotated[str, typer.Argument(help="Look at this model only.", show_default=False)] = "",
    join: JoinOption = "",
    port: Annotated[int, typer.Option(help="TCP port of this machine that others shall try; 0: any free one.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Find out what is reachable: this machine from outside, the peers of a join link, the servers of a swarm.

    Example: swarm doctor --join swarm://…
    """
    if not 0 <= port < 65536:
        raise BadRequest(f"port {port} is not between 0 and 65535")
    report = asyncio.run(_examine(need_join(join), model, port))
    if as_json:
        typer.echo(json.dumps(_as_dict(report), indent=2))
    else:
        _print(report)
    if not report.is_complete:
        raise typer.Exit(1)


async def _examine(link: JoinLink, model: str, port: int) -> Report:
    from swarm.checkup import examine

    config = DhtConfig(initial_peers=link.initial_peers, invitation=link.invitation, client_mode=True)
    async with open_dht(config) as dht:
        return await examine(dht, model, port)


def _as_dict(report: Report) -> dict[str, Any]:
    from swarm.diagnosis import advice

    models = zip(asdict(report)["models"], report.models, strict=True)
    return asdict(report) | {
        "models": [found | {"missing_blocks": sorted(model.missing_blocks)} for found, model in models],
        "is_complete": report.is_complete,
        "advice": advice(report),
    }


def _print(report: Report) -> None:
    from swarm.diagnosis import advice

    _print_own(report.own)
    _print_peers(report.peers)
    for model in report.models:
        _print_model(model)
    for sentence in advice(report):
        console.print(f"- {sentence}", highlight=False, markup=False, soft_wrap=True)


def _print_own(own: OwnCheck) -> None:
    seen = ", ".join(own.seen_as) or "nobody says"
    state = "[green]yes[/]" if own.reach.reached else "[red]no[/]" if own.reach.missed else "not tried"
    console.print(
        f"This machine: seen as {seen}{', behind a router' * own.is_translated}; TCP port {own.port} reachable from "
        f"outside: {state}",
        highlight=False,
        soft_wrap=True,
    )


def _print_peers(peers: tuple[PeerCheck, ...]) -> None:
    table = Table(title="Peers of the join link", title_justify="left")
    for column in ("peer", "reachable", "round trip", "relays", "clock", "address"):
        table.add_column(column)
    for peer in peers:
        table.add_row(
            peer.peer_id[-8:],
            "[red]no[/]" if peer.error else "[green]yes[/]",
            _milliseconds(peer.rtt_s),
            "yes" if peer.relays else "no",
            _clock(peer.clock_offset_s),
            peer.multiaddrs[0].partition("/p2p/")[0],
        )
    console.print(table)


def _print_model(model: ModelCheck) -> None:
    table = Table(title=f"{escape(model.name)}: {model.num_blocks} blocks", title_justify="left")
    for column in ("server", "blocks", "state", "way", "round trip", "Mbit/s up, down", "clock", "peer"):
        table.add_column(column, overflow="fold")
    for server in model.servers:
        way = f"relay {server.relay_id[-8:]}" if server.relay_id else WAYS.get(server.way, server.way)
        table.add_row(
            escape(server.name),
            str(server.blocks),
            server.state,
            way or "[red]none[/]",
            _milliseconds(server.rtt_s),
            ", ".join(_megabits(each) for each in (server.upload_bytes_per_s, server.download_bytes_per_s)),
            _clock(server.clock_offset_s),
            server.peer_id[-8:],
        )
    console.print(table)


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.1f} ms"


def _megabits(bytes_per_s: float | None) -> str:
    return "?" if bytes_per_s is None else f"{bytes_per_s * 8 / 1e6:.0f}"


def _clock(offset_s: float | None) -> str:
    return "" if offset_s is None else f"{offset_s:+.1f} s"
