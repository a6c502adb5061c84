"""What `swarm doctor` has found, what it means, and what to do about it: a report, and functions of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from swarm import PROTOCOL_VERSION
from swarm.ranges import BlockRange, describe_blocks
from swarm.reach import Reach

MAX_CLOCK_OFFSET_S = 60.0
"""Beyond it, announcements may seem to have expired."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnCheck:
    """Whether others can dial this machine."""

    port: int
    """TCP port that was tried."""
    is_chosen: bool
    """Whether somebody named that port; otherwise it was any free one."""
    seen_as: tuple[str, ...]
    """IP addresses that others see this machine under."""
    is_translated: bool
    """Whether none of them is its own: there is a router in between."""
    reach: Reach


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerCheck:
    """One peer of the join link."""

    peer_id: str
    multiaddrs: tuple[str, ...]
    error: str = ""
    """Why it cannot be reached; empty: it can."""
    rtt_s: float | None = None
    clock_offset_s: float | None = None
    """By how much its clock is ahead of ours."""
    relays: bool = False
    """Whether it carries connections to servers that nobody can dial."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerCheck:
    """One server of a model."""

    name: str
    peer_id: str
    blocks: BlockRange
    state: str
    protocol_version: int
    way: str = ""
    """"direct", "relay", "libp2p" for a tunnel without a relay, "punched" where a relay has only arranged that both
    dial each other; empty: there is none."""
    relay_id: str = ""
    error: str = ""
    rtt_s: float | None = None
    upload_bytes_per_s: float | None = None
    download_bytes_per_s: float | None = None
    clock_offset_s: float | None = None

    @property
    def is_usable(self) -> bool:
        return bool(self.way) and self.state == "online" and self.protocol_version == PROTOCOL_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCheck:
    """One model and its servers."""

    name: str
    num_blocks: int
    servers: tuple[ServerCheck, ...]

    @property
    def missing_blocks(self) -> set[int]:
        """Blocks that no server can run that is reachable from here."""
        return set(range(self.num_blocks)) - {
            block for server in self.servers if server.is_usable for block in server.blocks
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that was found."""

    own: OwnCheck
    peers: tuple[PeerCheck, ...]
    models: tuple[ModelCheck, ...]

    @property
    def is_complete(self) -> bool:
        """Whether some model is served, and a route over all blocks of each can be reached from here."""
        return bool(self.models) and not any(model.missing_blocks for model in self.models)


def advice(report: Report) -> list[str]:
    """What all this means, and what to do, in plain sentences."""
    return [
        *_advice_on_this_machine(report),
        *_advice_on_peers(report.peers),
        *(sentence for model in report.models for sentence in _advice_on_model(model)),
        *([] if report.models else ["Nobody serves a model here yet: start with `swarm serve MODEL --join …`."]),
    ]


def _advice_on_this_machine(report: Report) -> list[str]:
    own = report.own
    router = " This machine is behind a router." if own.is_translated else ""
    forward = f" and forward {'it' if own.is_chosen else 'them'} on the router" if own.is_translated else ""
    if own.reach.reached:
        where = ", ".join(own.reach.reached)
        return [f"Others can dial this machine ({where}, TCP port {own.port}): a server here serves directly.{router}"]
    if not own.reach.missed:
        return [f"Nobody could try whether this machine can be dialled.{router}"]
    ports = f"TCP port {own.port}" if own.is_chosen else "two TCP ports (one for --port, one for --dht-port)"
    sentences = [
        f"Others cannot dial this machine ({', '.join(own.reach.missed)}, TCP port {own.port}).{router} To let a "
        f"server here serve directly, open {ports} in its firewall{forward}; otherwise clients come through a relay."
    ]
    if not any(peer.relays for peer in report.peers):
        sentences.append("No peer of the join link relays: run `swarm dht` on a machine that others can dial.")
    return sentences


def _advice_on_peers(peers: Sequence[PeerCheck]) -> list[str]:
    sentences = [
        f"Peer {peer.peer_id[-8:]} of the join link does not answer: start it again, or ask for a newer link."
        for peer in peers
        if peer.error
    ]
    for peer in peers:
        offset_s = abs(peer.clock_offset_s or 0.0)
        if offset_s > MAX_CLOCK_OFFSET_S:
            sentences.append(
                f"The clock of peer {peer.peer_id[-8:]} and this machine's differ by {offset_s:.0f} s: "
                "set the wrong one right."
            )
    return sentences


def _advice_on_model(model: ModelCheck) -> list[str]:
    sentences = []
    for server in model.servers:
        who = f"Server {server.name} (blocks {server.blocks}, {server.peer_id[-8:]})"
        if server.protocol_version != PROTOCOL_VERSION:
            sentences.append(
                f"{who} speaks protocol {server.protocol_version}, this program {PROTOCOL_VERSION}: "
                "update the older one."
            )
        elif not server.way:
            sentences.append(f"{who} cannot be reached: {server.error}.")
        elif server.way == "relay":
            sentences.append(
                f"{who} is reached through relay {server.relay_id[-8:]}: it would be faster if its owner opened and "
                "forwarded its TCP port."
            )
        if abs(server.clock_offset_s or 0) > MAX_CLOCK_OFFSET_S:
            sentences.append(
                f"{who} has a clock that differs from ours by {server.clock_offset_s:.0f} s: set it right."
            )
    if model.missing_blocks:
        sentences.append(
            f"Blocks {describe_blocks(model.missing_blocks)} of {model.name} cannot be reached: "
            "start a server for them with `swarm serve`."
        )
    else:
        sentences.append(f"All {model.num_blocks} blocks of {model.name} can be reached from here.")
    return sentences
