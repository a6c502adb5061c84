"""What a server is told, by flags, environment or code."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from swarm.announcement import MAX_HOSTED_ADAPTERS
from swarm.directory import MAX_LIFETIME_S
from swarm.errors import BadRequest
from swarm.membership import Invitation, Role
from swarm.model.checkpoint import CheckpointSource
from swarm.model.hosted import AdapterSource
from swarm.model.quantization import CHOICES
from swarm.ranges import BlockRange
from swarm.relaying import BESIDE_SERVING, RelayConfig

from .checks import ServiceLimits
from .hardware import pass_tokens
from .limits import LimitsConfig
from .scheduler import SchedulerConfig

PERIODS_ALIVE = 4
"""After so many announce periods of silence, a server is forgotten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """One server of one model."""

    source: CheckpointSource
    """The model to serve."""
    blocks: BlockRange | None = None
    """Exactly these blocks; None: those that the swarm lacks."""
    num_blocks: int | None = None
    """How many blocks; None: as many as the free memory holds."""
    moves: bool = True
    """Whether it goes to other blocks when the swarm needs that; never if `blocks` says which."""
    initial_peers: tuple[str, ...] = ()
    """Multiaddrs to join through; empty: start a new swarm."""
    invitation: Invitation | None = field(default=None, repr=False)
    """What makes it a member of a private swarm; None: the swarm is public."""
    guest_invitation: Invitation | None = field(default=None, repr=False)
    """What its join link gives to others, in a private swarm of its own; None: the link has addresses only."""
    revocations_path: Path | None = None
    """Where it keeps the newest list of a private swarm's revocations; None: nowhere."""
    identity_path: Path | None = None
    """Key file that keeps this server's identity; None: a new identity for each run."""
    name: str = field(default_factory=platform.node)
    """What people see in `swarm status`."""
    device: str = "auto"
    """A torch device; "auto": CUDA, else MPS, else CPU."""
    dtype: str = "auto"
    """float32, float16 or bfloat16; "auto": that of the checkpoint."""
    quantization: str = "auto"
    """int8, int4, nf4 or none; "auto": NF4 on CUDA where the blocks would not fit otherwise."""
    host: str = "127.0.0.1"
    """IP address to listen on; 0.0.0.0 for all interfaces."""
    port: int = 0
    """TCP port of the gRPC service; 0: any free one."""
    dht_port: int = 0
    """TCP port of the DHT node; 0: any free one."""
    announce_host: str | None = None
    """Address that others shall dial instead of `host`; needs fixed ports."""
    tunnel_only: bool = False
    """Announce no address to dial, so that clients come through the tunnel."""
    relay: RelayConfig | None = BESIDE_SERVING
    """How much it carries to servers that nobody can dial, if others can dial this one; None: nothing."""
    reachability_period_s: float = 300.0
    """How often it asks others whether they can dial it."""
    cache_bytes: int | None = None
    """Budget of the KV cache over all sessions; None: from the free memory."""
    limits: ServiceLimits = field(default_factory=ServiceLimits)
    """How large one request may be."""
    quotas: LimitsConfig = field(default_factory=LimitsConfig)
    """How much one caller may have at a time, and all together."""
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    """How decoding, prefill and training share the time."""
    session_grace_s: float = 30.0
    """How long the cache of a session whose connection broke is kept, so that it can go on; 0: not at all."""
    adapters: tuple[AdapterSource, ...] = ()
    """Adapters that it hosts, for clients to choose by name."""
    adapter_bytes: int | None = None
    """Budget for what clients change in the blocks; None: from the free memory; 0: they may change nothing."""
    kept_activation_bytes: int | None = None
    """Budget for activations of Forward calls that wait for their Backward; None: from the free memory; 0: they are
    always computed again."""
    metrics_port: int | None = None
    """TCP port where Prometheus finds this server's metrics; None: nowhere."""
    metrics_host: str = "127.0.0.1"
    """IP address of that port."""
    drain_timeout_s: float = 20.0
    """How long a stopping server lets running sessions finish."""
    announce_period_s: float = 15.0
    """How often it tells the directory that it is alive; it is forgotten after PERIODS_ALIVE of silence."""
    num_threads: int | None = None
    """CPU threads of the compute thread; None: torch's default."""
    speeds_path: Path | None = None
    """File in which it remembers how fast blocks were on this machine; None: they are measured at each start."""
    on_progress: Callable[[int, int], None] | None = field(default=None, repr=False)
    """Called with (bytes loaded, bytes in all) while the blocks load."""
    on_moved: Callable[[BlockRange], None] | None = field(default=None, repr=False)
    """Called with the blocks in service after each move."""

    def __post_init__(self) -> None:
        if self.blocks is not None and self.num_blocks is not None:
            raise BadRequest("give either blocks or num_blocks, not both")
        if self.invitation is not None and self.invitation.member.role is not Role.SERVE:
            raise BadRequest(
                "this invitation is for using the swarm, not for serving in it: ask its owner for another one"
            )
        if self.num_blocks is not None and self.num_blocks < 1:
            raise BadRequest(f"num_blocks must be at least 1, got {self.num_blocks}")
        if self.quantization not in CHOICES:
            raise BadRequest(f"quantization must be one of {', '.join(CHOICES)}, not {self.quantization!r}")
        if self.session_grace_s < 0 or (self.kept_activation_bytes or 0) < 0:
            raise BadRequest("session_grace_s and kept_activation_bytes must not be negative")
        names = [each.name for each in self.adapters]
        if len(set(names)) < len(names) or len(names) > MAX_HOSTED_ADAPTERS:
            raise BadRequest(
                f"the hosted adapters are called {', '.join(names)}: at most {MAX_HOSTED_ADAPTERS} are possible, each "
                "with a name of its own, as in --adapters NAME=REPO_OR_PATH"
            )
        if self.adapter_bytes is not None and self.adapter_bytes < 0:
            raise BadRequest("adapter_bytes must not be negative")
        if self.metrics_port is not None and not 0 < self.metrics_port < 65536:
            raise BadRequest(f"metrics_port {self.metrics_port} is not between 1 and 65535")
        if not 0 <= self.port < 65536:
            raise BadRequest(f"port {self.port} is not between 0 and 65535")
        if self.reachability_period_s <= 0:
            raise BadRequest("reachability_period_s must be positive")
        if self.cache_bytes is not None and self.cache_bytes < 1 << 16:
            raise BadRequest("cache_bytes must be at least 64 KiB")
        if not 0 < self.announce_period_s <= MAX_LIFETIME_S / PERIODS_ALIVE or self.drain_timeout_s < 0:
            raise BadRequest(
                f"announce_period_s must lie between 0 and {MAX_LIFETIME_S / PERIODS_ALIVE:.0f}, and drain_timeout_s "
                "must not be negative"
            )


def for_device(config: ServerConfig, device_type: str) -> ServerConfig:
    """The same config, with steps and iterations of as many tokens as the device takes well, or more if it says so."""
    num_tokens = pass_tokens(device_type)
    limits, scheduler = config.limits, config.scheduler
    return replace(
        config,
        limits=replace(limits, max_step_tokens=max(num_tokens, limits.max_step_tokens)),
        scheduler=replace(scheduler, max_tokens=max(num_tokens, scheduler.max_tokens)),
    )
