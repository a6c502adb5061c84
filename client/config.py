"""What a user of a swarm may set."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from swarm.announcement import is_peer_id
from swarm.errors import BadLink, BadRequest
from swarm.membership import Invitation
from swarm.v1 import blocks_pb2 as pb

from .trust import Trust


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """How a client behaves towards a swarm."""

    initial_peers: tuple[str, ...]
    """libp2p multiaddrs of peers to join through."""
    invitation: Invitation | None = field(default=None, repr=False)
    """What makes it a member of a private swarm, as a join link brings it; None: the swarm is public."""
    identity_path: Path | None = None
    """Key file; None: a new identity for each run."""
    route_timeout_s: float = 30.0
    """How long to wait for a route to appear before NoRoute."""
    step_timeout_s: float = 300.0
    """How long one step of a session may take although all its servers are alive."""
    compute_timeout_s: float = 600.0
    """How long one Forward or Backward may take."""
    silence_s: float = 3.0
    """After this long without an answer the servers of a step are asked whether they are alive."""
    refresh_period_s: float = 15.0
    """How old the known announcements may be before the next new route reads the directory again."""
    idle_refresh_period_s: float = 60.0
    """The same for a client that asks for no route: it meets new servers before all those that it knows are gone."""
    directory_bytes_per_min: int = 200_000
    """How much of the directory it reads at most; of a large swarm it learns more as time goes on."""
    allowed_servers: Collection[str] | None = None
    """Peer ids of the only servers that may be on a route; None: all may. Names prove nothing."""
    blocked_servers: Collection[str] = ()
    """Peer ids of servers that are never on a route."""
    trusted_servers: Collection[str] | None = None
    """Peer ids of the only servers that may be the first and the last of a route; None: all may."""
    trusted_blocks: int | None = None
    """How many blocks at each end only they run; None: all that the one holds which reaches furthest from there."""
    max_attempts: int = 20
    """How many peers may fail one request before it fails."""
    avoid_s: float = 1.0
    """How long a peer is avoided after its first failure; doubles with each further one."""
    max_avoid_s: float = 10.0
    """Bound of that time; below route_timeout_s, so that a peer that is the only one gets further chances."""
    connect_timeout_s: float = 3.0
    """For each way that a connection is tried."""
    micro_batch_tokens: int = 4096
    """Tokens (batch x length) in one Forward or Backward; larger batches are split along the batch."""
    compression: Literal["none", "int8"] = "none"
    """Hidden states on the wire: as they are, or with 8 bits per element and a scale per row (not exact)."""
    gradient_compression: Literal["none", "int8"] = "none"
    """The same for the gradients of hidden states in Backward, there and back; "int8" above covers them too."""
    use_direct: bool = True
    """Whether servers are dialled directly where they can be; False: always through the tunnel."""

    @property
    def trust(self) -> Trust | None:
        """Whom the ends of the model are for; None: for anybody."""
        if self.trusted_servers is None:
            return None
        return Trust(servers=self.trusted_servers, num_blocks=self.trusted_blocks)

    @property
    def codec(self) -> pb.Codec:
        return pb.CODEC_INT8_PER_ROW if self.compression == "int8" else pb.CODEC_RAW

    @property
    def gradient_codec(self) -> pb.Codec:
        return pb.CODEC_INT8_PER_ROW if self.gradient_compression == "int8" else self.codec

    def __post_init__(self) -> None:
        for name in ("compression", "gradient_compression"):
            if getattr(self, name) not in ("none", "int8"):
                raise BadRequest(f"{name} {getattr(self, name)!r} is not known: use 'none' or 'int8'")
        if not self.initial_peers:
            raise BadLink("a client needs a join link or initial_peers: pass join='swarm://…'")
        for name in (
            "route_timeout_s", "step_timeout_s", "compute_timeout_s", "silence_s", "connect_timeout_s",
            "idle_refresh_period_s", "directory_bytes_per_min",
        ):  # fmt: skip
            if getattr(self, name) <= 0:
                raise BadRequest(f"{name} must be positive")
        for name in ("allowed_servers", "blocked_servers", "trusted_servers"):
            object.__setattr__(self, name, _peer_ids(name, getattr(self, name)))
        if self.trusted_blocks is not None and (self.trusted_servers is None or self.trusted_blocks < 1):
            raise BadRequest("trusted_blocks is how many blocks at each end, 1 or more, trusted_servers run: pass both")


def _peer_ids(name: str, given: Collection[str] | None) -> frozenset[str] | None:
    """Raises: BadRequest: something among them is no peer id."""
    if given is None:
        return None
    given = (given,) if isinstance(given, str) else given
    for each in given:
        if not is_peer_id(each):
            raise BadRequest(f"{each!r} in {name} is not a peer id: `swarm status --json` shows the servers' ids")
    return frozenset(given)
