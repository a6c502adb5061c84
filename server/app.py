"""A server from start to end: join, choose blocks, load, serve, announce, drain, leave.

Everything is acquired top-down and released bottom-up by one exit stack, so that a failure or Ctrl-C at any line
leaves no process, no socket and no announcement behind.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace

import swarm
from swarm import PROTOCOL_VERSION
from swarm.announcement import Announcement
from swarm.codec import dtype_name
from swarm.connector import open_connector
from swarm.dht import Dht, DhtConfig, open_dht
from swarm.dialling import UntilSeenOutside, rule_for
from swarm.errors import ResourceError
from swarm.identity import TlsCertificate
from swarm.link import JoinLink
from swarm.model.anatomy import anatomy_of
from swarm.model.checkpoint import Checkpoint
from swarm.model.hosted import read_hosted
from swarm.ranges import BlockRange
from swarm.survey import Survey
from swarm.tunnel import serve_tunnel

from .announcer import announced
from .config import PERIODS_ALIVE, ServerConfig, for_device
from .engine import Engine
from .front import Front, open_grpc
from .gate import Gate
from .hardware import choose_device, free_bytes
from .metrics import ServerCollector, serve_metrics
from .moving import Mover
from .overload import log_overload
from .placement import plan_memory
from .precision import Precision, choose_precision
from .reachability import Reachability, open_reachability
from .rebalancing import choose_blocks
from .server_statistics import ServerStatistics, StatisticsReader
from .service import BlocksService, ServedModel
from .sessions import SessionTable
from .tenure import Holding, open_tenure

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Running:
    """What a caller has of a server that is ready."""

    link: str = field(repr=False)
    """Join link for clients and further servers; of a member of somebody's private swarm, its addresses only."""
    peer_id: str
    model_name: str
    mover: Mover
    gate: Gate
    statistics: Callable[[], ServerStatistics]
    """Counts everything; called in any thread. Raises: ResourceError: the server has ended."""

    async def move(self, blocks: BlockRange) -> None:
        """Serve these blocks instead; see Mover."""
        await self.mover.move(blocks)

    @property
    def blocks(self) -> BlockRange:
        return self.mover.tenure.blocks

    @property
    def device(self) -> str:
        return str(self.mover.tenure.holding.device)

    @property
    def precision(self) -> Precision:
        return self.mover.tenure.holding.precision

    @property
    def service(self) -> BlocksService:
        return self.mover.tenure.service

    @property
    def sessions(self) -> SessionTable:
        return self.mover.tenure.sessions

    @property
    def engine(self) -> Engine:
        return self.mover.tenure.engine


def public_name(checkpoint: Checkpoint) -> str:
    """The model's name as others see it: of a local directory, the last part of its path alone."""
    directory = checkpoint.source.directory
    return (directory.resolve().name if directory is not None else checkpoint.name)[-256:]


async def serve(config: ServerConfig, stop: asyncio.Event, on_ready: Callable[[Running], None]) -> None:
    """Run a server until `stop` is set.

    Args:
        on_ready: called once, when clients can use the server.
    Raises: BadCheckpoint, UnsupportedModel, BadRequest, ResourceError, PeerUnavailable: each says what to do.
    """
    checkpoint = await asyncio.to_thread(Checkpoint.open, config.source)
    anatomy = anatomy_of(checkpoint.config)
    config = for_device(config, choose_device(config.device).type)
    if config.blocks is not None:
        config.blocks.check_inside(anatomy.num_blocks)
    hosted = [await asyncio.to_thread(read_hosted, source, checkpoint) for source in config.adapters]
    if anatomy.max_session_tokens is not None:
        longest = min(config.limits.max_session_tokens, anatomy.max_session_tokens)
        config = replace(config, limits=replace(config.limits, max_session_tokens=longest))
    async with AsyncExitStack() as owned:
        dht = await owned.enter_async_context(open_dht(_dht_config(config)))
        holding = await _choose_holding(config, checkpoint, dht, sum(each.num_bytes for each in hosted))
        rule = UntilSeenOutside(await rule_for(await dht.multiaddrs()))
        connector, _ = await owned.enter_async_context(open_connector(dht, rule=rule))
        model = ServedModel(
            peer_id=dht.peer_id,
            name=public_name(checkpoint),
            fingerprint=checkpoint.fingerprint,
            num_blocks=anatomy.num_blocks,
            hosted=hosted,
        )
        gate = Gate(config.quotas)
        front = Front()
        mover = await owned.enter_async_context(
            Mover(
                lambda holding: open_tenure(config, checkpoint, holding, model, connector, gate),
                front,
                config,
            )
        )
        certificate = dht.identity.tls_certificate()
        port, connections = await owned.enter_async_context(open_grpc(config, front, certificate, gate, dht.gate))
        statistics = StatisticsReader(lambda: mover.present, gate.quotas, connections)
        if config.metrics_port is not None:
            address = (config.metrics_host, config.metrics_port)
            owned.enter_context(serve_metrics(address, ServerCollector(statistics)))
        reachability = await owned.enter_async_context(
            open_reachability(dht, config, port, certificate.certificate_der, rule, connector.forget)
        )
        await owned.enter_async_context(
            serve_tunnel(dht, ("127.0.0.1", port), reachability.relays, rule, gate.callers.entering)
        )
        announcement = _announcement(config, checkpoint, holding, dht, certificate, reachability)
        announcement = announcement.model_copy(update={"adapters": tuple(each.listing for each in hosted)})
        announcer, announcing = await owned.enter_async_context(
            announced(dht.directory, announcement, Survey(connector), config.announce_period_s)
        )
        await owned.enter_async_context(reachability.telling(announcer.say))
        await mover.settle(announcer, holding)
        initial_peers = tuple(await _link_peers(config, dht))
        name = public_name(checkpoint) if config.invitation is None else None
        link = JoinLink(initial_peers, name, invitation=config.guest_invitation).encode()
        on_ready(Running(link, dht.peer_id, public_name(checkpoint), mover, gate, statistics))
        await _until_stopped(stop, dht, announcing, mover, statistics)
        await announcer.say(state="draining")
        await mover.drain()


async def _until_stopped(
    stop: asyncio.Event,
    dht: Dht,
    announcing: asyncio.Task[None],
    mover: Mover,
    statistics: Callable[[], ServerStatistics],
) -> None:
    """Wait for `stop`, carry out moves meanwhile, and say so when there is too much to do.

    Raises: ResourceError: the DHT node ended by itself. What ended announcing, moving or an engine.
    """
    stopping, ended = asyncio.create_task(stop.wait()), asyncio.create_task(dht.wait_stopped())
    moving, computing = asyncio.create_task(mover.run()), asyncio.create_task(mover.wait_failed())
    logging_overload = asyncio.create_task(log_overload(statistics))
    own = (stopping, ended, moving, computing, logging_overload)
    try:
        await asyncio.wait({*own, announcing}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in own:
            task.cancel()
        await asyncio.gather(*own, return_exceptions=True)
    for task in (announcing, moving, computing, logging_overload):
        if task.done() and not task.cancelled():
            task.result()
    if not stop.is_set():
        raise ResourceError("the libp2p daemon of this server ended by itself: start the server again")


def _dht_config(config: ServerConfig) -> DhtConfig:
    return DhtConfig(
        initial_peers=config.initial_peers,
        identity_path=config.identity_path,
        host=config.host,
        port=config.dht_port,
        announce_host=config.announce_host,
        invitation=config.invitation,
        revocations_path=config.revocations_path,
        revocation_period_s=config.announce_period_s,
    )


async def _choose_holding(config: ServerConfig, checkpoint: Checkpoint, dht: Dht, hosted_bytes: int) -> Holding:
    """Resolve every "auto": device, dtype, quantization, blocks and cache.

    Args:
        hosted_bytes: what the adapters of this server will take on the device; those on the CPU are there already.
    """
    device = choose_device(config.device)
    free = free_bytes(device) - (0 if device.type == "cpu" else hosted_bytes)
    precision = await asyncio.to_thread(choose_precision, config, checkpoint.config, device, free)
    num_model_blocks = anatomy_of(checkpoint.config).num_blocks
    wanted = len(config.blocks) if config.blocks is not None else config.num_blocks
    if wanted is not None and config.blocks is None:
        wanted = min(wanted, num_model_blocks)
    memory = plan_memory(
        precision.needs,
        free_bytes=free,
        num_model_blocks=num_model_blocks,
        num_blocks=wanted,
        adapter_bytes=config.adapter_bytes,
        kept_bytes=config.kept_activation_bytes,
    )
    if config.cache_bytes is not None:
        memory = replace(memory, cache_bytes=config.cache_bytes)
    blocks = config.blocks
    if blocks is None:
        servers = await dht.directory.servers(checkpoint.fingerprint)
        others = [each for each in servers if each.peer_id != dht.peer_id]
        blocks = choose_blocks(others, num_model_blocks, memory.num_blocks)
    logger.info("device %s, %s, blocks %s, cache %d MiB", device, precision, blocks, memory.cache_bytes >> 20)
    return Holding(device, precision, blocks, memory)


def _announcement(
    config: ServerConfig,
    checkpoint: Checkpoint,
    holding: Holding,
    dht: Dht,
    certificate: TlsCertificate,
    reachability: Reachability,
) -> Announcement:
    """What a server says while it loads its first blocks."""
    limits = config.limits
    return Announcement(
        protocol_version=PROTOCOL_VERSION,
        software_version=swarm.__version__,
        peer_id=dht.peer_id,
        server_name=config.name[:64],
        model_name=public_name(checkpoint),
        model_fingerprint=checkpoint.fingerprint,
        model_commit=checkpoint.commit,
        num_model_blocks=anatomy_of(checkpoint.config).num_blocks,
        hidden_size=anatomy_of(checkpoint.config).hidden_size,
        start=holding.blocks.start,
        end=holding.blocks.end,
        dtype=dtype_name(holding.precision.dtype),  # type: ignore[arg-type]  # checked when it is made
        quantization=holding.precision.quantization,
        state="joining",
        direct=reachability.direct,
        tls_certificate=certificate.certificate_der,
        multiaddrs=reachability.multiaddrs,
        decode_tokens_per_s=0.0,
        forward_tokens_per_s=0.0,
        max_session_tokens=limits.max_session_tokens,
        max_step_tokens=limits.max_step_tokens,
        max_batch_tokens=limits.max_batch_tokens,
        max_batch_size=limits.max_batch_size,
        cache_free_tokens=0,
        expires_at_s=time.time() + PERIODS_ALIVE * config.announce_period_s,
    )


async def _link_peers(config: ServerConfig, dht: Dht) -> list[str]:
    """Addresses for the join link: ours if others can dial them, and those of peers that we joined through."""
    own = [] if dht.hidden else await dht.multiaddrs()
    outside = [address for address in own if not address.startswith(("/ip4/127.", "/ip6/::1/"))]
    return list(dict.fromkeys([*(outside or own)[:3], *config.initial_peers[:3]]))
