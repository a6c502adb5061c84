"""A server from start to end: join, choose blocks, load, serve, announce, drain, leave.

Everything is acquired top-down and released bottom-up by one exit stack, so that a failure or Ctrl-C at any line
leaves no process, no socket and no announcement behind.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass, replace
from typing import Any

import grpc
import grpc.aio
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

import swarm
from swarm import PROTOCOL_VERSION
from swarm.announcement import Announcement
from swarm.codec import dtype_name
from swarm.dht import Dht, DhtConfig, open_dht
from swarm.dialling import rule_for
from swarm.errors import ResourceError, SwarmError
from swarm.identity import TlsCertificate
from swarm.link import JoinLink
from swarm.model.anatomy import anatomy_of
from swarm.model.checkpoint import Checkpoint
from swarm.model.kv_store import KVStore, kv_layout
from swarm.model.narrow import SpanViews
from swarm.model.ragged import is_packable
from swarm.model.span import Span, load_span
from swarm.peers import Connector
from swarm.ranges import BlockRange
from swarm.rpc import SERVER_OPTIONS
from swarm.survey import Survey
from swarm.tunnel import open_tunnel, serve_tunnel
from swarm.v1 import blocks_pb2 as pb
from swarm.v1 import blocks_pb2_grpc as pb_grpc

from .batches import KeptActivations
from .compute import ComputeThread
from .config import PERIODS_ALIVE, ServerConfig
from .cores import Cores, cores_path
from .engine import Engine
from .execution import Executor, PackedExecutor, SessionExecutor
from .hardware import SPEED_TOKENS, Speed, choose_device, free_bytes, measure_speed
from .metrics import ServerCollector, serve_metrics
from .pages import PagePool
from .placement import MemoryPlan, choose_blocks, plan_memory
from .precision import Precision, choose_precision
from .service import BlocksService, ServedModel
from .sessions import SessionTable
from .timing import CostModel

logger = logging.getLogger(__name__)

PAGE_TOKENS = 16
"""Tokens in one page of the KV cache: the most that a sequence wastes; sequences are kept in one run anyway."""

CUDA_PAGE_TOKENS = 256
"""On CUDA, where attention reads page by page."""

SURVEYED, SURVEY_PERIODS = 8, 8
"""How many other servers are called to see how far they are, and every how many announcements."""

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Blocks"].full_name


@dataclass(frozen=True, slots=True)
class Running:
    """What a caller learns when the server is ready."""

    link: str
    """Join link for clients and further servers."""
    blocks: BlockRange
    peer_id: str
    model_name: str
    device: str
    precision: Precision
    service: BlocksService
    sessions: SessionTable
    engine: Engine


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where and in which form the blocks are held."""

    device: torch.device
    precision: Precision
    blocks: BlockRange
    memory: MemoryPlan


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
    if config.blocks is not None:
        config.blocks.check_inside(anatomy.num_blocks)
    if anatomy.max_session_tokens is not None:
        longest = min(config.limits.max_session_tokens, anatomy.max_session_tokens)
        config = replace(config, limits=replace(config.limits, max_session_tokens=longest))
    async with AsyncExitStack() as owned:
        dht = await owned.enter_async_context(open_dht(_dht_config(config)))
        plan = await _plan(config, checkpoint, dht)
        num_threads = config.num_threads or torch.get_num_threads()
        cores = owned.enter_context(closing(Cores(cores_path(plan.device, num_threads))))
        thread = owned.enter_context(ComputeThread(num_threads=config.num_threads))
        logger.info("loading blocks %s of %s", plan.blocks, checkpoint.name)
        span = await thread.run(lambda: _load(config, checkpoint, plan, thread))
        speed = await thread.run(lambda: measure_speed(span))
        sessions, executor = await thread.run(lambda: _open_cache(config, span, plan.memory.cache_bytes))
        engine = owned.enter_context(Engine(thread, cores, sessions, executor, _costs(speed), config.scheduler))
        connector = Connector(
            lambda peer_id, addresses: open_tunnel(dht, peer_id, addresses),
            rule=await rule_for(await dht.multiaddrs()),
        )
        owned.push_async_callback(connector.aclose)
        model = ServedModel(
            peer_id=dht.peer_id,
            name=public_name(checkpoint),
            fingerprint=checkpoint.fingerprint,
            num_blocks=anatomy.num_blocks,
        )
        kept = KeptActivations(config.kept_activation_bytes)
        service = BlocksService(model, sessions.views, engine, sessions, connector, config.limits, kept)
        if config.metrics_port is not None:
            collector = ServerCollector(engine, sessions, kept)
            owned.enter_context(serve_metrics((config.metrics_host, config.metrics_port), collector))
        certificate = dht.identity.tls_certificate()
        port = await owned.enter_async_context(_open_grpc(config, service, certificate))
        await owned.enter_async_context(serve_tunnel(dht, ("127.0.0.1", port)))
        announcement = await _announcement(config, checkpoint, plan, speed, dht, certificate, port)
        async with _announced(dht, announcement, config, engine, Survey(connector)) as announcer:
            link = JoinLink(
                initial_peers=tuple(await _link_peers(config, dht)), model_name=public_name(checkpoint)
            ).encode()
            on_ready(
                Running(
                    link,
                    plan.blocks,
                    dht.peer_id,
                    public_name(checkpoint),
                    str(plan.device),
                    plan.precision,
                    service,
                    sessions,
                    engine,
                )
            )
            await _until_stopped(stop, dht, announcer.task, engine)
            await announcer.say("draining")
            service.drain()
            await _wait_idle(service, config.drain_timeout_s)


def _open_cache(config: ServerConfig, span: Span, cache_bytes: int) -> tuple[SessionTable, Executor]:
    """Divide the cache budget into pages; choose how sessions run.

    Raises: ResourceError: it has not room for one page.
    """
    page_tokens = CUDA_PAGE_TOKENS if span.device.type == "cuda" else PAGE_TOKENS
    packed = is_packable(span)
    layout = kv_layout(span) if packed else None
    bytes_per_page = page_tokens * (span.cache_bytes_per_token() if layout is None else layout.bytes_per_slot)
    num_pages = cache_bytes // max(1, bytes_per_page)
    if num_pages < 1:
        raise ResourceError(
            f"a KV cache of {cache_bytes} bytes has not room for one page of {bytes_per_page}: give it more"
        )
    pool = PagePool(num_pages, page_tokens)
    sessions = SessionTable(SpanViews(span), pool, bytes_per_page, packed=packed, grace_s=config.session_grace_s)
    if layout is None:
        return sessions, SessionExecutor()
    return sessions, PackedExecutor(KVStore(layout, num_pages * page_tokens))


def _costs(speed: Speed) -> CostModel:
    """What iterations cost, as measured at start."""
    costs = CostModel()
    costs.observe(1, 1 / speed.decode_tokens_per_s)
    costs.observe(SPEED_TOKENS, SPEED_TOKENS / speed.forward_tokens_per_s)
    return costs


def _load(config: ServerConfig, checkpoint: Checkpoint, plan: _Plan, thread: ComputeThread) -> Span:
    def progress(done_bytes: int, total_bytes: int) -> None:
        if thread.closed:
            raise asyncio.CancelledError("loading was interrupted")
        if config.on_progress is not None:
            config.on_progress(done_bytes, total_bytes)

    precision = plan.precision
    return load_span(
        checkpoint,
        plan.blocks,
        dtype=precision.dtype,
        device=plan.device,
        scheme=precision.scheme,
        progress=progress,
    )


async def _until_stopped(stop: asyncio.Event, dht: Dht, announcing: asyncio.Task[None], engine: Engine) -> None:
    """Wait for `stop`. Raises: ResourceError: the DHT node ended by itself. What ended announcing or the engine."""
    stopping, ended = asyncio.create_task(stop.wait()), asyncio.create_task(dht.wait_stopped())
    computing = asyncio.create_task(engine.wait_ended())
    try:
        await asyncio.wait({stopping, ended, announcing, computing}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
        ended.cancel()
        computing.cancel()
    for task in (announcing, computing):
        if task.done() and not task.cancelled():
            task.result()
    if not stop.is_set():
        raise ResourceError("the libp2p daemon of this server ended by itself: start the server again")


async def _wait_idle(service: BlocksService, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await service.wait_idle()
    except TimeoutError:
        logger.info("sessions still run after %.0f s; their clients continue elsewhere", timeout_s)


def _dht_config(config: ServerConfig) -> DhtConfig:
    return DhtConfig(
        initial_peers=config.initial_peers,
        identity_path=config.identity_path,
        host=config.host,
        port=config.dht_port,
        announce_host=config.announce_host,
    )


async def _plan(config: ServerConfig, checkpoint: Checkpoint, dht: Dht) -> _Plan:
    """Resolve every "auto": device, dtype, quantization, blocks and cache."""
    device = choose_device(config.device)
    free = free_bytes(device)
    precision = await asyncio.to_thread(choose_precision, config, checkpoint.config, device, free)
    num_model_blocks = anatomy_of(checkpoint.config).num_blocks
    wanted = len(config.blocks) if config.blocks is not None else config.num_blocks
    if wanted is not None and config.blocks is None:
        wanted = min(wanted, num_model_blocks)
    memory = plan_memory(precision.needs, free_bytes=free, num_model_blocks=num_model_blocks, num_blocks=wanted)
    if config.cache_bytes is not None:
        memory = replace(memory, cache_bytes=config.cache_bytes)
    blocks = config.blocks
    if blocks is None:
        servers = await dht.directory.servers(checkpoint.fingerprint)
        blocks = choose_blocks(servers, num_model_blocks, memory.num_blocks)
    logger.info("device %s, %s, blocks %s, cache %d MiB", device, precision, blocks, memory.cache_bytes >> 20)
    return _Plan(device, precision, blocks, memory)


@asynccontextmanager
async def _open_grpc(config: ServerConfig, service: BlocksService, certificate: TlsCertificate) -> AsyncIterator[int]:
    """Serve Blocks, health and reflection over TLS; yield the port. Raises: ResourceError: the port is taken."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    pb_grpc.add_BlocksServicer_to_server(service, server)
    health_service = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    credentials = grpc.ssl_server_credentials([(certificate.private_key_pem, certificate.certificate_pem)])
    host = "127.0.0.1" if config.tunnel_only else config.host
    try:
        port = server.add_secure_port(f"{host}:{config.port}", credentials)
    except RuntimeError as exc:
        raise ResourceError(
            f"port {config.port} on {host} is in use or not allowed: choose another --port, or 0 for any free one"
        ) from exc
    await server.start()
    for name in ("", SERVICE_NAME):
        await health_service.set(name, health_pb2.HealthCheckResponse.SERVING)
    try:
        yield port
    finally:
        await health_service.enter_graceful_shutdown()
        await server.stop(grace=0.5)


async def _announcement(
    config: ServerConfig,
    checkpoint: Checkpoint,
    plan: _Plan,
    speed: Speed,
    dht: Dht,
    certificate: TlsCertificate,
    port: int,
) -> Announcement:
    limits = config.limits
    multiaddrs = await dht.multiaddrs()
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
        start=plan.blocks.start,
        end=plan.blocks.end,
        dtype=dtype_name(plan.precision.dtype),  # type: ignore[arg-type]  # checked when it is made
        quantization=plan.precision.quantization,
        state="online",
        direct=[] if config.tunnel_only else _direct_addresses(config, multiaddrs, port),
        tls_certificate=certificate.certificate_der,
        multiaddrs=multiaddrs[:16],
        decode_tokens_per_s=speed.decode_tokens_per_s,
        forward_tokens_per_s=speed.forward_tokens_per_s,
        max_session_tokens=limits.max_session_tokens,
        max_step_tokens=limits.max_step_tokens,
        max_batch_tokens=limits.max_batch_tokens,
        max_batch_size=limits.max_batch_size,
        cache_free_tokens=0,
        expires_at_s=time.time() + PERIODS_ALIVE * config.announce_period_s,
    )


def _direct_addresses(config: ServerConfig, multiaddrs: list[str], port: int) -> list[str]:
    """host:port for each address that the DHT node is visible at; loopback only if there is nothing else."""
    hosts = []
    for address in multiaddrs:
        parts = address.split("/")
        if len(parts) > 2 and parts[1] in ("ip4", "ip6", "dns", "dns4", "dns6") and parts[2] not in hosts:
            hosts.append(parts[2])
    outside = [host for host in hosts if not (host.startswith("127.") or host == "::1")]
    return [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in (outside or hosts)][:8]


async def _link_peers(config: ServerConfig, dht: Dht) -> list[str]:
    """Addresses for the join link: ours, and one of each peer that we joined through."""
    own = await dht.multiaddrs()
    outside = [address for address in own if not address.startswith(("/ip4/127.", "/ip6/::1/"))]
    return list(dict.fromkeys([*(outside or own)[:3], *config.initial_peers[:3]]))


class _Announcer:
    """Keeps the directory up to date."""

    def __init__(
        self, dht: Dht, announcement: Announcement, config: ServerConfig, engine: Engine, survey: Survey
    ) -> None:
        self._dht = dht
        self._config = config
        self._engine = engine
        self._survey = survey
        self.current = announcement

    async def say(self, state: str | None = None) -> None:
        """Announce the present state; a directory that cannot be reached is tried again with the next period."""
        update: dict[str, Any] = {
            "expires_at_s": time.time() + PERIODS_ALIVE * self._config.announce_period_s,
            "cache_free_tokens": self._engine.sessions.cache_free_tokens,
            "coordinates": self._survey.here,
            "decode_tokens_per_s": 1 / self._engine.costs.iteration_s(1),
            "forward_tokens_per_s": SPEED_TOKENS / self._engine.costs.iteration_s(SPEED_TOKENS),
        }
        if state is not None:
            update["state"] = state
        self.current = self.current.model_copy(update=update)
        try:
            await self._dht.directory.announce(self.current)
        except SwarmError as exc:
            logger.warning("the directory could not be reached, clients may not find this server: %s", exc)

    def start(self) -> None:
        """Announce from now on, until `task` is cancelled."""
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_announcing())
            group.create_task(self._keep_looking_around())

    async def _keep_announcing(self) -> None:
        while True:
            await asyncio.sleep(self._config.announce_period_s)
            await self.say()

    async def _keep_looking_around(self) -> None:
        """See now and then how far other servers are."""
        while True:
            await self._look_around()
            await asyncio.sleep(SURVEY_PERIODS * self._config.announce_period_s)

    async def _look_around(self) -> None:
        try:
            servers = await self._dht.directory.servers(self.current.model_fingerprint)
        except SwarmError as exc:
            logger.debug("no other servers can be looked up: %s", exc)
            return
        before = self._survey.here
        await self._survey.visit([each for each in servers if each.peer_id != self._dht.peer_id], SURVEYED)
        if before is None and self._survey.here is not None:
            await self.say()


@asynccontextmanager
async def _announced(
    dht: Dht, announcement: Announcement, config: ServerConfig, engine: Engine, survey: Survey
) -> AsyncIterator[_Announcer]:
    """Be in the directory while the body runs."""
    announcer = _Announcer(dht, announcement, config, engine, survey)
    await announcer.say()
    announcer.start()
    try:
        yield announcer
    finally:
        announcer.task.cancel()
        await asyncio.gather(announcer.task, return_exceptions=True)
        try:
            async with asyncio.timeout(5):
                await dht.directory.withdraw(announcer.current)
        except (SwarmError, TimeoutError) as exc:
            logger.warning("could not withdraw from the directory, the announcement will expire: %s", exc)
