"""Which peers run which blocks: pure functions of a snapshot of the directory."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from swarm import PROTOCOL_VERSION
from swarm.announcement import Announcement
from swarm.errors import NoRoute, PromptTooLong
from swarm.peers import PeerAddress
from swarm.ranges import BlockRange, describe_blocks

HOP_COST_S = 0.005
"""What another hop is taken to cost where nothing was measured."""


@dataclass(frozen=True, slots=True, repr=False)
class Hop:
    """One peer and the blocks it runs for us."""

    server: Announcement
    blocks: BlockRange

    @property
    def peer_id(self) -> str:
        return self.server.peer_id

    @property
    def address(self) -> PeerAddress:
        server = self.server
        return PeerAddress(server.peer_id, tuple(server.direct), server.tls_certificate, tuple(server.multiaddrs))

    def __str__(self) -> str:
        return f"{self.blocks} at {self.server.server_name or 'peer'} ({self.peer_id[-8:]})"

    def __repr__(self) -> str:
        return f"<Hop {self}>"


@dataclass(frozen=True, slots=True)
class Needs:
    """What a route must offer."""

    blocks: BlockRange
    fingerprint: str
    commit: str | None = None
    session_tokens: int = 0
    """Length of the session, for decoding."""
    batch_tokens: int = 0
    """Tokens (batch x length) of the batch, for forward and backward."""
    batch_size: int = 0
    """Sequences in the batch, for forward and backward."""


def usable(server: Announcement, needs: Needs) -> str | None:
    """Return why a server cannot be part of the route, or None if it can."""
    if server.protocol_version != PROTOCOL_VERSION:
        return f"speaks protocol version {server.protocol_version} (ours is {PROTOCOL_VERSION})"
    if server.model_fingerprint != needs.fingerprint:
        return "serves another model"
    if needs.commit and server.model_commit and server.model_commit != needs.commit:
        return f"serves revision {server.model_commit[:12]} (ours is {needs.commit[:12]})"
    if server.state != "online":
        return f"is {server.state}"
    if server.max_session_tokens < needs.session_tokens:
        return f"allows sessions of {server.max_session_tokens} tokens (we need {needs.session_tokens})"
    if server.max_batch_tokens < needs.batch_tokens or server.max_batch_size < needs.batch_size:
        return f"takes batches of {server.max_batch_size} sequences and {server.max_batch_tokens} tokens"
    return None


def plan_route(
    servers: Sequence[Announcement], needs: Needs, *, avoid: Collection[str] = (), prefer: str = ""
) -> list[Hop]:
    """Return the cheapest hops that together run the wanted blocks in order.

    A block costs the announced time, for one token when decoding or for the whole batch; changing the peer costs
    HOP_COST_S. Dynamic programming over
    (block, peer): O(blocks x servers).

    Args:
        avoid: ids of peers that failed a moment ago.
        prefer: id of a peer that is taken, alone, if it can do all of it.
    Raises: NoRoute: some blocks have no usable server; the message names them and says why. PromptTooLong: they have,
        for shorter sessions.
    """
    candidates = [server for server in servers if usable(server, needs) is None and server.peer_id not in avoid]
    for server in candidates:
        if server.peer_id == prefer and server.blocks.covers(needs.blocks):
            return [Hop(server, needs.blocks)]
    candidates.sort(key=lambda server: server.peer_id)
    best: dict[int, tuple[float, int]] = {}
    history: list[dict[int, int]] = []
    arrived_s, arrived_by = 0.0, -1
    for block in needs.blocks:
        costs: dict[int, tuple[float, int]] = {}
        for index, server in enumerate(candidates):
            if not server.start <= block < server.end:
                continue
            stay_s = best[index][0] if index in best else float("inf")
            change_s = arrived_s + HOP_COST_S
            cost_s, previous = min((stay_s, index), (change_s, arrived_by))
            costs[index] = (cost_s + _block_cost_s(server, needs), previous)
        if not costs:
            _check_session_tokens(servers, needs)
            raise NoRoute(_explain_gap(servers, needs, avoid))
        best = costs
        arrived_by = min(best, key=lambda index: (best[index][0], index))
        arrived_s = best[arrived_by][0]
        history.append({index: previous for index, (_, previous) in costs.items()})
    return _hops(needs.blocks, candidates, history, arrived_by)


def _hops(
    blocks: BlockRange, candidates: Sequence[Announcement], history: list[dict[int, int]], last: int
) -> list[Hop]:
    hops: list[Hop] = []
    end, current = blocks.end, last
    for block in range(blocks.end - 1, blocks.start - 1, -1):
        previous = history[block - blocks.start][current]
        if previous != current or block == blocks.start:
            hops.append(Hop(candidates[current], BlockRange(block, end)))
            end, current = block, previous
    return hops[::-1]


def _block_cost_s(server: Announcement, needs: Needs) -> float:
    if needs.batch_tokens:
        rate = (server.forward_tokens_per_s or 100.0) / needs.batch_tokens
    else:
        rate = server.decode_tokens_per_s or 100.0
    return 1.0 / (rate * len(server.blocks))


def _check_session_tokens(servers: Sequence[Announcement], needs: Needs) -> None:
    """Raise PromptTooLong if the servers, also those that failed a moment ago, allow shorter sessions only."""
    any_length = replace(needs, session_tokens=0)
    fitting = [server for server in servers if usable(server, any_length) is None]
    limit = min(
        max((server.max_session_tokens for server in fitting if block in server.blocks), default=0)
        for block in needs.blocks
    )
    if 0 < limit < needs.session_tokens:
        raise PromptTooLong(
            f"a session of {needs.session_tokens} tokens was asked for, the servers of this model allow {limit}: "
            "use a smaller max_length"
        )


def _explain_gap(servers: Sequence[Announcement], needs: Needs, avoid: Collection[str]) -> str:
    missing = set(needs.blocks)
    reasons: dict[str, int] = {}
    for server in servers:
        reason = usable(server, needs)
        if reason is None and server.peer_id in avoid:
            reason = "failed a moment ago"
        if reason is None:
            missing -= set(server.blocks)
        else:
            reasons[reason] = reasons.get(reason, 0) + 1
    known = "; ".join(f"{count} known server{'s' * (count > 1)} {reason}" for reason, count in sorted(reasons.items()))
    return (
        f"no server is available for block{'s' * (len(missing) > 1)} {describe_blocks(missing)} of "
        f"{needs.blocks}{f' ({known})' if known else ''}: start a server for them with `swarm serve`"
    )
