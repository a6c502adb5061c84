"""Private swarms on the command line: what `serve` and `dht` take; `swarm invite`, `members`, `revoke` and `join`."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from swarm.dht import DhtConfig, open_dht
from swarm.errors import BadRequest, PeerUnavailable, SwarmError
from swarm.files import default_config_dir
from swarm.link import JoinLink
from swarm.membership import Role
from swarm.ownership import MAX_ADDRESSES, InvitedMember, OwnedSwarm, open_owned, the_owned
from swarm.profiles import save_link

from .common import console, errors

REFRESH_TIMEOUT_S = 5.0
"""How long `swarm invite` and `swarm revoke` try to reach the swarm."""

_DURATION = re.compile(r"([1-9][0-9]{0,5})([mhd])")
_UNIT_S = {"m": 60, "h": 3600, "d": 86400}

PrivateOption = Annotated[bool, typer.Option("--private", help="Start a swarm that takes an invitation to join.")]
AsOption = Annotated[
    str, typer.Option("--as", help="What the private swarm is called on this computer.", show_default=False)
]
SwarmOption = Annotated[str, typer.Option("--swarm", help="Which one, if this computer owns several.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def name_for(model: str) -> str:
    """What the private swarm of a model is called where nobody says it."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name).strip("-._")
    return name[:64] or "private"


def own_swarm(private: bool, name: str, default_name: str, link: JoinLink | None) -> OwnedSwarm | None:
    """The swarm of this computer's that is to be started; None: another one, or a public one."""
    if not private:
        if name:
            raise BadRequest("--as names a private swarm: add --private")
        return None
    if link is not None:
        raise BadRequest(
            "--private starts a swarm of your own: leave out --join (and SWARM_JOIN), or leave out --private"
        )
    return open_owned(default_config_dir(), name or default_name, create=True)


def free_usual_port(owned: OwnedSwarm, host: str) -> int:
    """The libp2p port that the swarm's links name, if nobody has taken it meanwhile; else 0, any."""
    port = owned.usual_port()
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return 0
    return port


def print_link(text: str) -> None:
    """Show a join link, and what it lets its reader do."""
    console.print(f"Join link: {text}", soft_wrap=True, highlight=False, markup=False)
    if (invitation := JoinLink.parse(text, now_s=0.0).invitation) is not None:
        until = _date(invitation.member.expires_at_s)
        console.print(
            f"Whoever has it is a member until {until}: give it to those only whom you trust.", highlight=False
        )


def invite_command(
    who: Annotated[str, typer.Argument(help="What to call the new member in `swarm members`.")],
    swarm_name: SwarmOption = "",
    expires: Annotated[str, typer.Option(help="How long it holds: 12h, 30d …")] = "30d",
    role: Annotated[str, typer.Option(help="serve: may hold blocks as well; use: may only use the models.")] = "serve",
    as_json: JsonOption = False,
) -> None:
    """Print a join link for one more member of a private swarm that this computer owns.

    Example: swarm invite anna --role use --expires 7d
    """
    expires_at_s = time.time() + parse_duration(expires)
    wanted = _parse_role(role)
    owned = the_owned(default_config_dir(), swarm_name)
    addresses = asyncio.run(_refreshed(owned))
    link = JoinLink(addresses, invitation=owned.invite(who, wanted, expires_at_s)).encode()
    if as_json:
        typer.echo(json.dumps({"name": who, "role": role, "expires_at_s": int(expires_at_s), "link": link}, indent=2))
    else:
        print_link(link)


def members_command(swarm_name: SwarmOption = "", as_json: JsonOption = False) -> None:
    """List whom this computer has invited into its private swarm.

    Example: swarm members --swarm home
    """
    members = the_owned(default_config_dir(), swarm_name).members()
    if as_json:
        typer.echo(json.dumps([_as_dict(each) for each in members], indent=2))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("name", "role", "until", "state", "key"):
        table.add_column(column)
    for each in members:
        line = _as_dict(each)
        table.add_row(each.name, line["role"], _date(each.member.expires_at_s), line["state"], line["key"][:16])
    console.print(table)


def revoke_command(
    who: Annotated[str, typer.Argument(help="The member, as `swarm members` names it.")], swarm_name: SwarmOption = ""
) -> None:
    """Take an invitation back: its holder is no member any more, within one announce period.

    Example: swarm revoke anna
    """
    owned = the_owned(default_config_dir(), swarm_name)
    owned.revoke(who)
    try:
        asyncio.run(_publish(owned))
    except SwarmError as exc:
        raise PeerUnavailable(
            f"{who} is revoked in the owner's book, but the swarm could not be told now ({exc}); "
            "it will be as soon as a node of yours runs in it"
        ) from exc
    console.print(f"{who} is no member of {owned.name} any more.", highlight=False, soft_wrap=True)


def join_command(
    link: Annotated[str, typer.Argument(help="Join link, swarm://…; -: read from standard input.")],
    name: Annotated[str, typer.Option("--as", help="What to call it: --join NAME works then.", show_default=False)],
) -> None:
    """Give a join link a name on this computer, for --join and SWARM_JOIN. Nothing is connected yet.

    Example: swarm join swarm://v2.… --as home
    """
    parsed = JoinLink.parse(sys.stdin.readline() if link == "-" else link)
    save_link(default_config_dir(), name, parsed)
    until = "" if parsed.ends_at_s is None else f", until {_date(parsed.ends_at_s)}"
    console.print(
        f"--join {name} leads there now{until}. Next: swarm status --join {name}", highlight=False, soft_wrap=True
    )


def parse_duration(text: str) -> float:
    """Seconds in a text such as 90m, 12h or 30d. Raises: BadRequest."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise BadRequest(f"{text!r} is no duration: write a number of minutes, hours or days, such as 90m, 12h or 30d")
    return float(match[1]) * _UNIT_S[match[2]]


def _parse_role(text: str) -> Role:
    try:
        return Role[text.upper()]
    except KeyError:
        raise BadRequest(f"{text!r} is no role: it is serve or use") from None


async def _refreshed(owned: OwnedSwarm) -> tuple[str, ...]:
    """Where the swarm is now, if it can be reached; else where it was."""
    known = owned.addresses()
    try:
        async with open_dht(_as_owner(owned, known)) as dht:
            for listing in await dht.directory.models():
                await dht.directory.servers(listing.fingerprint)
            found = _best_addresses(list(dht.known_peers().values()), known)
    except SwarmError as exc:
        errors.print(f"The swarm cannot be reached now; the link has its last addresses. ({exc})", highlight=False)
        return known
    owned.remember_addresses(found)
    return found


def _best_addresses(by_peer: Sequence[Sequence[str]], known: Sequence[str]) -> tuple[str, ...]:
    """The known addresses and, while there is room, one of each other peer of the swarm."""
    others = [addresses[0] for addresses in by_peer if addresses and "/p2p/" in addresses[0]]
    return tuple(dict.fromkeys([*known, *others]))[:MAX_ADDRESSES]


async def _publish(owned: OwnedSwarm) -> None:
    """Put the owner's newest list of revocations into the directory. Raises: PeerUnavailable."""
    async with open_dht(_as_owner(owned, owned.addresses())) as dht:
        assert dht.revocations is not None
        await dht.revocations.share()


def _as_owner(owned: OwnedSwarm, addresses: tuple[str, ...]) -> DhtConfig:
    return DhtConfig(
        initial_peers=addresses,
        client_mode=True,
        invitation=owned.own_invitation(),
        revocations_path=owned.revocations_path,
        startup_timeout_s=REFRESH_TIMEOUT_S,
    )


def _as_dict(each: InvitedMember) -> dict[str, str]:
    member = each.member
    state = "revoked" if each.is_revoked else "expired" if member.expires_at_s <= time.time() else "member"
    return {
        "name": each.name,
        "role": member.role.name.lower(),
        "until": _date(member.expires_at_s),
        "state": state,
        "key": member.public_key.hex(),
    }


def _date(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(time_s))
