"""The client's view of a swarm: who is there, how to reach them, who failed lately; and the one retry helper."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from swarm import PROTOCOL_VERSION
from swarm.announcement import Announcement
from swarm.dht import DhtConfig, open_dht
from swarm.directory import Directory
from swarm.errors import BadLink, BadRequest, NoRoute, PeerError, PeerUnavailable, SessionLost, UserError
from swarm.peers import Connector
from swarm.rpc import errors_from_wire
from swarm.tunnel import open_tunnel
from swarm.v1 import blocks_pb2 as pb
from swarm.v1 import blocks_pb2_grpc as pb_grpc

from .routing import Hop, Needs, plan_route

logger = logging.getLogger(__name__)

T = TypeVar("T")
E = TypeVar("E", bound=PeerError)

PROBE_TIMEOUT_S = 5.0
"""How long a peer may take to say that it is alive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """How a client behaves towards a swarm."""

    initial_peers: tuple[str, ...]
    """libp2p multiaddrs of peers to join through."""
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
    use_direct: bool = True
    """Whether servers are dialled directly where they can be; False: always through the tunnel."""

    @property
    def codec(self) -> pb.Codec:
        return pb.CODEC_INT8_PER_ROW if self.compression == "int8" else pb.CODEC_RAW

    def __post_init__(self) -> None:
        if self.compression not in ("none", "int8"):
            raise BadRequest(f"compression {self.compression!r} is not known: use 'none' or 'int8'")
        if not self.initial_peers:
            raise BadLink("a client needs a join link or initial_peers: pass join='swarm://…'")
        for name in (
            "route_timeout_s", "step_timeout_s", "compute_timeout_s", "silence_s", "connect_timeout_s",
            "idle_refresh_period_s",
        ):  # fmt: skip
            if getattr(self, name) <= 0:
                raise BadRequest(f"{name} must be positive")


@dataclass(frozen=True, slots=True)
class Attempt:
    """What one attempt at a request knows from the earlier ones."""

    max_age_s: float | None = None
    """How old the known announcements may be; None: as configured."""
    refused_by: frozenset[str] = frozenset()
    """Peers that said that they cannot do what is asked."""


class FailureMemory:
    """Peers that failed lately, and until when they are avoided."""

    def __init__(self, avoid_s: float, max_avoid_s: float) -> None:
        self._avoid_s = avoid_s
        self._max_avoid_s = max_avoid_s
        self._failures: dict[str, tuple[int, float]] = {}

    def failed(self, peer_id: str, now_s: float) -> None:
        count = self._failures.get(peer_id, (0, 0.0))[0] + 1
        self._failures[peer_id] = (count, now_s + min(self._max_avoid_s, self._avoid_s * 2 ** min(count - 1, 30)))

    def succeeded(self, peer_id: str) -> None:
        self._failures.pop(peer_id, None)

    def avoided(self, now_s: float) -> set[str]:
        return {peer_id for peer_id, (_, until_s) in self._failures.items() if now_s < until_s}


class Network:
    """A joined swarm, seen for one model."""

    def __init__(self, config: ClientConfig, directory: Directory, connector: Connector) -> None:
        self.config = config
        self.connector = connector
        self._directory = directory
        self._servers: list[Announcement] = []
        self._fingerprint = ""
        """The model that was asked for last; "" before that."""
        self._refreshed_at_s = -float("inf")
        self._refreshing = asyncio.Lock()
        self._failures = FailureMemory(config.avoid_s, config.max_avoid_s)
        self._missing: dict[str, asyncio.Task[None]] = {}
        """Peers that could not be reached, and the task that looks for each."""
        self.farewells: set[Callable[[], Awaitable[None]]] = set()
        """What open sessions want done before the client leaves."""

    async def servers(self, fingerprint: str, *, max_age_s: float | None = None) -> list[Announcement]:
        """Return the announced servers of the model, at most `max_age_s` old while the directory can be reached.

        Raises: NoRoute: it cannot be reached, and never could.
        """
        self._fingerprint = fingerprint
        max_age_s = self.config.refresh_period_s if max_age_s is None else max_age_s
        if self._age_s <= max_age_s:
            return self._servers
        async with self._refreshing:
            if self._age_s > max_age_s:
                try:
                    found = await self._directory.servers(fingerprint)
                    self._forgive_moved(found)
                    self._servers = found
                except PeerUnavailable as exc:
                    if not self._servers:
                        raise NoRoute(f"the directory of the swarm cannot be reached: {exc}") from exc
                    logger.info("the directory cannot be reached, known servers are used on: %s", exc)
                self._refreshed_at_s = time.monotonic()
        return self._servers

    @property
    def _age_s(self) -> float:
        return time.monotonic() - self._refreshed_at_s

    async def keep_in_touch(self) -> None:
        """Read the directory now and then, until cancelled, also while nobody asks for a route."""
        period_s = self.config.idle_refresh_period_s
        while True:
            await asyncio.sleep(period_s)
            if self._fingerprint:
                with contextlib.suppress(NoRoute):
                    await self.servers(self._fingerprint, max_age_s=period_s / 2)

    async def route(self, needs: Needs, attempt: Attempt, *, prefer: str = "") -> list[Hop]:
        """Return a route over live peers that have not refused this request.

        Args:
            prefer: id of a peer to take alone if it can do all of it.
        Raises: NoRoute.
        """
        servers = await self.servers(needs.fingerprint, max_age_s=attempt.max_age_s)
        if not self.config.use_direct:
            servers = [server.model_copy(update={"direct": []}) for server in servers]
        return plan_route(servers, needs, avoid=self._avoided() | attempt.refused_by, prefer=prefer)

    def _avoided(self) -> set[str]:
        return self._failures.avoided(time.monotonic()) | self._missing.keys()

    async def check_model(self, needs: Needs, model_name: str) -> None:
        """Say early, and clearly, when the swarm serves something else than the model that was loaded.

        Raises: BadLink: it serves other models only.
        """
        if await self.servers(needs.fingerprint):
            return
        listings = await self._directory.models()
        if listings:
            served = ", ".join(f"{listing.name} (fingerprint {listing.fingerprint[:12]})" for listing in listings[:5])
            raise BadLink(
                f"this swarm serves {served}, not {model_name} (fingerprint {needs.fingerprint[:12]}): "
                "use the join link of a swarm for this model, or load the model and revision that it serves"
            )

    async def retrying(self, work: Callable[[Attempt], Awaitable[T]]) -> T:
        """Call `work` until it succeeds: peers that fail are avoided, a missing route is waited for.

        A peer's refusal counts for that peer alone; it is raised when nobody is left who has not refused.

        Raises: NoRoute: none appeared for route_timeout_s. PeerError: max_attempts peers failed one after another.
            UserError: ours at once, the servers' after all were asked. Any other error at once: it is our bug.
        """
        loop = asyncio.get_running_loop()
        attempt, deadline_s = Attempt(), None
        num_failures, last_failure = 0, ""
        refusal: UserError | None = None
        while True:
            try:
                return await work(attempt)
            except NoRoute as exc:
                if refusal is not None:
                    raise refusal from exc
                deadline_s = loop.time() + self.config.route_timeout_s if deadline_s is None else deadline_s
                if loop.time() >= deadline_s:
                    raise NoRoute(f"{exc}{f'; the last failure was: {last_failure}' if last_failure else ''}") from exc
                await asyncio.sleep(min(0.5, max(0.0, deadline_s - loop.time())))
                attempt = replace(attempt, max_age_s=1.0)
            except (UserError, PeerError) as exc:
                if isinstance(exc, UserError) and not exc.peer_id:
                    raise
                num_failures, last_failure, deadline_s = num_failures + 1, str(exc), None
                logger.info("peer %s: %s", exc.peer_id, exc)
                if num_failures >= self.config.max_attempts:
                    raise
                if isinstance(exc, UserError):
                    refusal = exc
                    attempt = replace(attempt, refused_by=attempt.refused_by | {exc.peer_id})
                else:
                    await self._note_failure(exc)
                    attempt = replace(attempt, max_age_s=1.0 if num_failures > 1 else attempt.max_age_s)

    async def while_alive(self, work: Awaitable[T], hops: Sequence[Hop], timeout_s: float) -> T:
        """Wait for what these hops are doing for us; whenever it takes long, ask them whether they are alive.

        Raises: PeerUnavailable: one does not answer, or all do and there is still no result after timeout_s.
        """
        task = asyncio.ensure_future(work)
        try:
            async with asyncio.timeout(timeout_s):
                while not (await asyncio.wait({task}, timeout=self.config.silence_s))[0]:
                    await self._probe(hops)
        except TimeoutError as exc:
            raise blame(PeerUnavailable(f"peer {hops[0]} gave no result in {timeout_s:.0f} s"), hops[0]) from exc
        finally:
            if not task.done():
                task.cancel()
        return await task

    async def _probe(self, hops: Sequence[Hop]) -> None:
        for hop, answers in zip(hops, await asyncio.gather(*map(self._answers, hops)), strict=True):
            if not answers:
                raise blame(PeerUnavailable(f"peer {hop} does not answer within {PROBE_TIMEOUT_S:.0f} s"), hop)

    async def _answers(self, hop: Hop) -> bool:
        try:
            async with self.connector.lease(hop.address) as channel, errors_from_wire(hop.peer_id):
                request = pb.DescribeRequest(protocol_version=PROTOCOL_VERSION)
                await pb_grpc.BlocksStub(channel).Describe(request, timeout=PROBE_TIMEOUT_S)
        except PeerError as exc:
            logger.debug("%s does not answer: %s", hop, exc)
            return False
        return True

    def succeeded(self, peer_id: str) -> None:
        """Forget a peer's failures after it did what was asked."""
        self._failures.succeeded(peer_id)

    async def _note_failure(self, error: PeerError) -> None:
        assert error.peer_id, f"an error of a peer does not say which: {error!r}"
        if isinstance(error, SessionLost):
            return
        self._failures.failed(error.peer_id, time.monotonic())
        if isinstance(error, PeerUnavailable):
            await self.connector.forget(error.peer_id)
            if error.peer_id not in self._missing:
                task = self._missing[error.peer_id] = asyncio.create_task(self._look_for(error.peer_id))
                task.add_done_callback(partial(self._found, error.peer_id))

    def _found(self, peer_id: str, task: asyncio.Task[None]) -> None:
        if self._missing.get(peer_id) is task:
            del self._missing[peer_id]

    def _forgive_moved(self, found: Sequence[Announcement]) -> None:
        """Let a peer that could not be reached be tried at once where, by its newest announcement, it is now."""
        before = {server.peer_id: Hop(server, server.blocks).address for server in self._servers}
        for server in found:
            moved = before.get(server.peer_id) != Hop(server, server.blocks).address
            if moved and (task := self._missing.pop(server.peer_id, None)) is not None:
                task.cancel()
                self._failures.succeeded(server.peer_id)

    async def _look_for(self, peer_id: str) -> None:
        """Ask a peer that cannot be reached whether it is back, while it is announced, so that no request has to."""
        delay_s = self.config.avoid_s
        while server := next((each for each in self._servers if each.peer_id == peer_id), None):
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, self.config.max_avoid_s)
            if await self._answers(Hop(server, server.blocks)):
                self._failures.succeeded(peer_id)
                return
            await self.connector.forget(peer_id)

    async def aclose(self) -> None:
        """Tell servers that open sessions end, and stop what runs in the background."""
        await asyncio.gather(*(farewell() for farewell in self.farewells))
        await cancel_and_wait(list(self._missing.values()))


def blame(error: E, hop: Hop) -> E:
    """Note in an error which peer is at fault."""
    error.peer_id = hop.peer_id
    return error


async def cancel_and_wait(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """End tasks, whatever they are doing, and wait until they have."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def open_network(config: ClientConfig) -> AsyncIterator[Network]:
    """Join the swarm. Raises: PeerUnavailable: none of the initial peers answers."""
    async with AsyncExitStack() as owned:
        dht_config = DhtConfig(initial_peers=config.initial_peers, identity_path=config.identity_path, client_mode=True)
        dht = await owned.enter_async_context(open_dht(dht_config))
        connector = Connector(
            lambda peer_id, multiaddrs: open_tunnel(dht, peer_id, multiaddrs),
            connect_timeout_s=config.connect_timeout_s,
        )
        owned.push_async_callback(connector.aclose)
        network = Network(config, dht.directory, connector)
        owned.push_async_callback(network.aclose)
        touching = asyncio.create_task(network.keep_in_touch())
        owned.push_async_callback(cancel_and_wait, [touching])
        yield network
