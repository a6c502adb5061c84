"""The client's view of a swarm: who is there, how to reach them, who failed lately; and the one retry helper."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import math
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from swarm import PROTOCOL_VERSION
from swarm.announcement import AdapterListing, Announcement
from swarm.connector import open_connector
from swarm.dht import DhtConfig, open_dht
from swarm.directory import Directory
from swarm.errors import (
    AdapterMissing,
    BadLink,
    BadRequest,
    NoRoute,
    PeerError,
    PeerUnavailable,
    PromptTooLong,
    SessionLost,
    SwarmError,
    TooManyRequests,
    UserError,
)
from swarm.peers import Connector
from swarm.rpc import errors_from_wire
from swarm.survey import Survey
from swarm.v1 import blocks_pb2 as pb
from swarm.v1 import blocks_pb2_grpc as pb_grpc

from .audits import Pace, choose_auditor
from .config import ClientConfig
from .hedging import StepTimes
from .hosted import choose_adapter
from .known_servers import KnownServers
from .observations import AuditMemory, FailureMemory, SpeedMemory
from .routing import DEFAULT_TOKENS_PER_S, ExplainedRoute, Hop, Needs, Roster, View, explain, plan_route, route_costs
from .tasks import cancel_and_wait
from .uploads import Uploads

logger = logging.getLogger(__name__)

T = TypeVar("T")
E = TypeVar("E", bound=PeerError)

SURVEYED_AT_FIRST, SURVEYED_LATER = 16, 4
"""How many servers are called to see how far they are: before the first route, and each time the directory is read."""

SURVEY_WAIT_S = 0.5
"""How long the first route waits for that; what comes later counts for later routes."""

WORTH_LEAVING = 1.5
"""A session leaves a slow peer for a route that takes less than its own time divided by this."""

STEPS_AHEAD = 64
"""So many further steps a session is taken to have, unless it cannot be that long."""

PROBE_TIMEOUT_S = 5.0
"""How long a peer may take to say that it is alive."""

FRESH_S = 1.0
"""How old the known announcements may be when something has failed that newer ones might help with."""

SUSPECT_S = 0.2
"""A peer that takes longer to say it is the first to be suspected when a step stalls."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """What one attempt at a request knows from the earlier ones."""

    max_age_s: float | None = None
    """How old the known announcements may be; None: as configured."""
    refused_by: frozenset[str] = frozenset()
    """Peers that said that they cannot do what is asked."""


class Network:
    """A joined swarm, seen for one model."""

    def __init__(self, config: ClientConfig, directory: Directory, connector: Connector) -> None:
        self.config = config
        self.connector = connector
        self.uploads = Uploads(connector, self.while_alive, config.compute_timeout_s)
        """Adapters on their way to servers."""
        self.directory = directory
        self._known = KnownServers(
            directory,
            bytes_per_min=config.directory_bytes_per_min,
            use_direct=config.use_direct,
            on_found=self._forgive_moved,
        )
        self._failures = FailureMemory(config.avoid_s, config.max_avoid_s)
        self._speeds = SpeedMemory()
        self.audits = AuditMemory()
        """What audits have found."""
        self._rng = random.Random()
        self.pace = Pace(config.audit_fraction, self._rng)
        """When to audit."""
        self.openings = StepTimes()
        """How long opening the chains of sessions takes."""
        self.feedings = StepTimes()
        """How long steps take, of all sessions, by their tokens in all sequences: what a new chain goes by."""
        self._survey = Survey(connector)
        self._surveying: asyncio.Task[None] | None = None
        self._tokens_under_way: collections.Counter[str] = collections.Counter()
        self._missing: dict[str, asyncio.Task[None]] = {}
        """Peers that could not be reached, and the task that looks for each."""
        self._silent: collections.Counter[str] = collections.Counter()
        """Peer id -> questions to it that wait for an answer longer than they should."""
        self._trying: set[asyncio.Task[Any]] = set()
        """What would be good to have done, and is given up when the client leaves."""
        self.farewells: set[Callable[[], Awaitable[None]]] = set()
        """What open sessions want done before the client leaves."""
        self._leaving: set[asyncio.Task[None]] = set()
        """What sessions still do on hops that they have left."""

    async def servers(
        self, fingerprint: str, *, max_age_s: float | None = None, blocks: Collection[int] = ()
    ) -> list[Announcement]:
        """Return the announced servers of the model, at most `max_age_s` old while the directory can be reached.

        Args:
            blocks: for which servers are looked for first, where the swarm is too large to be read at once.
        Raises: NoRoute: it cannot be reached, and never could.
        """
        max_age_s = self.config.refresh_period_s if max_age_s is None else max_age_s
        return await self._known.read(fingerprint, max_age_s=max_age_s, blocks=blocks)

    @property
    def _servers(self) -> list[Announcement]:
        return self._known.servers

    @property
    def _roster(self) -> Roster:
        return self._known.roster

    async def keep_in_touch(self) -> None:
        """Read the directory now and then, until cancelled, also while nobody asks for a route."""
        period_s = self.config.idle_refresh_period_s
        while True:
            await asyncio.sleep(period_s)
            if self._known.fingerprint:
                with contextlib.suppress(NoRoute):
                    await self.servers(self._known.fingerprint, max_age_s=period_s / 2)
                await self._survey.visit(self._servers, SURVEYED_LATER)

    async def route(self, needs: Needs, attempt: Attempt, *, prefer: str = "") -> list[Hop]:
        """Return a route over live peers that have not refused this request.

        Args:
            prefer: id of a peer to take alone if it can do all of it.
        Raises: NoRoute.
        """
        missing = self._roster.missing(self._permitted(needs), self._avoided() | attempt.refused_by)
        await self.servers(needs.fingerprint, max_age_s=attempt.max_age_s, blocks=missing)
        await self._look_around()
        return plan_route(self._roster, self._permitted(needs), self.view(attempt), prefer=prefer)

    def _permitted(self, needs: Needs) -> Needs:
        """The same, of the servers that the user wants and that were not found to be false."""
        config = self.config
        false = self.audits.false
        return replace(needs, allowed=config.allowed_servers, blocked=config.blocked_servers, false=false)

    def view(self, attempt: Attempt | None = None) -> View:
        """What is known of the peers now."""
        now_s = time.monotonic()
        refused_by = attempt.refused_by if attempt is not None else frozenset()
        return View(
            here=self._survey.here,
            rtts_s=self._survey.rtts_s,
            slowness=self._speeds.slowness(now_s),
            tokens_under_way=self._tokens_under_way,
            avoid=self._avoided() | refused_by,
        )

    async def _look_around(self) -> None:
        """Before the first route where there is a choice, see how far the servers are; not for long."""
        if self._surveying is None and len(self._servers) > 1:
            self._surveying = asyncio.create_task(self._survey.visit(self._servers, SURVEYED_AT_FIRST))
            await asyncio.wait({self._surveying}, timeout=SURVEY_WAIT_S)

    def is_worth_leaving(self, hops: Sequence[Hop], needs: Needs, *, num_tokens: int, num_steps: int) -> bool:
        """Whether one of a session's hops was slow, and another route is worth feeding it again.

        Args:
            num_tokens: tokens, of all sequences, that the new route has to be fed first.
            num_steps: steps that the session may still take.
        """
        if not any(self._speeds.is_slow(hop.peer_id) for hop in hops):
            return False
        view = replace(self.view(), holding={hop.peer_id for hop in hops})
        try:
            others = plan_route(self._roster, self._permitted(needs), view)
        except (NoRoute, PromptTooLong):  # those that are left could not do it
            return False
        if [(hop.peer_id, hop.blocks) for hop in others] == [(hop.peer_id, hop.blocks) for hop in hops]:
            return False
        now_s, then_s = (sum(cost.total_s for cost in route_costs(each, needs, view)) for each in (hops, others))
        replay = replace(needs, session_tokens=0, batch_tokens=max(1, num_tokens))
        replay_s = sum(cost.total_s for cost in route_costs(others, replay, view))
        saved_s = (now_s - then_s) * min(num_steps, STEPS_AHEAD)
        return now_s > WORTH_LEAVING * then_s and saved_s > replay_s

    def took(self, hops: Sequence[Hop], hop_us: Sequence[int], num_tokens: int, seconds: float) -> None:
        """Note how long each hop had a step of so many tokens, as they say, if that fits what it took in all."""
        if len(hop_us) != len(hops) or sum(hop_us) > seconds * 1e6:
            return
        now_s = time.monotonic()
        for hop, microseconds in zip(hops, hop_us, strict=True):
            server = hop.server
            share = len(hop.blocks) / len(server.blocks)
            one_s = 1 / (server.decode_tokens_per_s or DEFAULT_TOKENS_PER_S)
            all_s = num_tokens / (server.forward_tokens_per_s or DEFAULT_TOKENS_PER_S)
            self._speeds.took(hop.peer_id, microseconds / 1e6, share * max(one_s, all_s), now_s)

    @contextlib.contextmanager
    def working(self, hop: Hop, num_tokens: int) -> Iterator[None]:
        """Let further batches take other ways while a peer works on one."""
        self._tokens_under_way[hop.peer_id] += num_tokens
        try:
            yield
        finally:
            self._tokens_under_way[hop.peer_id] -= num_tokens
            if not self._tokens_under_way[hop.peer_id]:
                del self._tokens_under_way[hop.peer_id]

    async def explain_route(self, needs: Needs) -> ExplainedRoute:
        """The route that a request would take now. Raises: NoRoute."""
        hops = await self.route(needs, Attempt())
        explained = explain(hops, self._roster, self._permitted(needs), self.view())
        remarks = [*explained.remarks, *self.audits.remarks()]
        if self.config.audit_fraction:
            auditors = zip(hops, await self.auditors(hops, needs), strict=True)
            remarks += [f"not audited: no other server has all of {hop}" for hop, other in auditors if other is None]
        return replace(explained, remarks=remarks)

    async def auditors(self, hops: Sequence[Hop], needs: Needs, *, not_these: Sequence[Hop] = ()) -> list[Hop | None]:
        """Choose who may recompute each of these hops: none of them, and none of the others; None: nobody can."""
        involved = self._avoided().union(hop.peer_id for hop in (*hops, *not_these))
        chosen: list[Hop | None] = []
        for hop in hops:
            of_hop = self._permitted(replace(needs, blocks=hop.blocks))
            able = [self._roster.servers[row] for row in self._roster.usable(of_hop, involved)]
            server = choose_auditor(able, hop, self._rng)
            chosen.append(None if server is None else Hop(server, hop.blocks))
        return chosen

    def _avoided(self) -> set[str]:
        return self._failures.avoided(time.monotonic()) | self._missing.keys() | (+self._silent).keys()

    async def check_model(self, needs: Needs, model_name: str) -> None:
        """Say early, and clearly, when the swarm serves something else than the model that was loaded.

        Raises: BadLink: it serves other models only.
        """
        if await self.servers(needs.fingerprint):
            return
        listings = await self.directory.models()
        if listings:
            served = ", ".join(f"{listing.name} (fingerprint {listing.fingerprint[:12]})" for listing in listings[:5])
            raise BadLink(
                f"this swarm serves {served}, not {model_name} (fingerprint {needs.fingerprint[:12]}): "
                "use the join link of a swarm for this model, or load the model and revision that it serves"
            )

    async def find_adapter(self, wanted: str, needs: Needs) -> AdapterListing:
        """Return the hosted adapter that a name means, see `choose_adapter`. Raises: BadRequest: nobody has it."""
        permitted = self._permitted(needs)

        async def choose(max_age_s: float | None) -> AdapterListing:
            servers = await self.servers(needs.fingerprint, max_age_s=max_age_s)
            return choose_adapter([each for each in servers if permitted.permits(each.peer_id)], wanted, needs.blocks)

        try:
            return await choose(None)
        except BadRequest:
            return await choose(FRESH_S)

    async def retrying(self, work: Callable[[Attempt], Awaitable[T]]) -> T:
        """Call `work` until it succeeds: peers that fail are avoided, a missing route is waited for.

        A peer's refusal counts for that peer alone; it is raised when nobody is left who has not refused. One that has
        too many requests has not failed: others are asked, or else it is asked again when it said.

        Raises: NoRoute: none appeared for route_timeout_s. PeerError: max_attempts peers failed one after another.
            TooManyRequests: that was all they said for route_timeout_s.
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
                attempt = replace(attempt, max_age_s=FRESH_S)
            except TooManyRequests as exc:
                last_failure = str(exc)
                deadline_s = loop.time() + self.config.route_timeout_s if deadline_s is None else deadline_s
                if loop.time() >= deadline_s:
                    raise
                await self.note_failure(exc)
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
                    await self.note_failure(exc)
                    attempt = replace(attempt, max_age_s=FRESH_S if num_failures > 1 else attempt.max_age_s)

    async def while_alive(
        self,
        work: Awaitable[T],
        hops: Sequence[Hop],
        timeout_s: float,
        *,
        progress: Callable[[], int] = lambda: 0,
        stall_s: float = math.inf,
    ) -> T:
        """Wait for what these hops are doing for us; whenever it takes long, ask them whether they are alive.

        Args:
            progress: how far the work is; while it moves on, nobody is asked: the answer would have to wait behind it.
            stall_s: how long it may stay where it is although they are alive.
        Raises: PeerUnavailable: one does not answer, or all do and there is still no result after timeout_s, or no
            progress for stall_s.
        """
        now_s = asyncio.get_running_loop().time
        task = asyncio.ensure_future(work)
        before, moved_at_s = progress(), now_s()
        try:
            async with asyncio.timeout(timeout_s):
                while not (await asyncio.wait({task}, timeout=self.config.silence_s))[0]:
                    if before != (before := progress()):
                        moved_at_s = now_s()
                        continue
                    if now_s() - moved_at_s > stall_s:
                        raise blame(PeerUnavailable(f"peer {hops[0]} takes nothing for {stall_s:.0f} s"), hops[0])
                    try:
                        await self._probe(hops)
                    except PeerUnavailable:
                        if before == progress():
                            raise
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

    async def elsewhere(self, attempt: Attempt, hops: Sequence[Hop], number: int) -> Attempt:
        """Return the attempt at something that stalls on these hops which goes another way.

        The first other way leaves out those that are slow to say that they are alive, or all if none is. Later ones
        leave out all of them, for that did not help, and may lead over servers that we have not met yet.

        Args:
            number: 1 for the first other way.
        """
        suspects = await self._suspects(hops)
        if number == 1:
            return replace(attempt, refused_by=attempt.refused_by | suspects)
        return Attempt(FRESH_S, attempt.refused_by.union(hop.peer_id for hop in hops))

    async def _suspects(self, hops: Sequence[Hop]) -> frozenset[str]:
        """Ask hops whether they are alive; return those that are slow to answer, or all if none is.

        Those that never answer count as failed.
        """
        asking = {hop.peer_id: self.try_in_background(self._ask(hop)) for hop in hops}
        if asking:
            await asyncio.wait(asking.values(), timeout=SUSPECT_S)
        silent = frozenset(peer_id for peer_id, task in asking.items() if not (task.done() and task.result()))
        for peer_id in silent:
            if not asking[peer_id].done():
                self._silent[peer_id] += 1
                asking[peer_id].add_done_callback(partial(self._no_longer_silent, peer_id))
        return silent or frozenset(asking)

    def _no_longer_silent(self, peer_id: str, _: asyncio.Task[bool]) -> None:
        self._silent[peer_id] -= 1

    async def _ask(self, hop: Hop) -> bool:
        """Say whether a peer is alive; take note if not."""
        try:
            await self._probe([hop])
        except PeerUnavailable as exc:
            await self.note_failure(exc)
            return False
        return True

    async def _answers(self, hop: Hop) -> bool:
        try:
            async with self.connector.lease(hop.address) as channel, errors_from_wire(hop.peer_id):
                request = pb.DescribeRequest(protocol_version=PROTOCOL_VERSION)
                await pb_grpc.BlocksStub(channel).Describe(request, timeout=PROBE_TIMEOUT_S)
        except TooManyRequests:
            return True  # that is an answer
        except PeerError as exc:
            logger.debug("%s does not answer: %s", hop, exc)
            return False
        return True

    def succeeded(self, peer_id: str) -> None:
        """Forget a peer's failures after it did what was asked."""
        self._failures.succeeded(peer_id)

    def finish_in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Do what nobody waits for before the client leaves."""
        task = asyncio.create_task(work)
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    def try_in_background(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Do what is given up when the client leaves."""
        task = asyncio.create_task(work)
        self._trying.add(task)
        task.add_done_callback(self._trying.discard)
        return task

    async def note_failure(self, error: SwarmError) -> None:
        """Avoid the peer that failed; errors that are no peer's say nothing about any."""
        if not isinstance(error, PeerError):
            return
        assert error.peer_id, f"an error of a peer does not say which: {error!r}"
        if isinstance(error, SessionLost | AdapterMissing):
            return
        if isinstance(error, TooManyRequests):
            self._failures.busy(error.peer_id, error.retry_after_s, time.monotonic())
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
        """Ask a peer that cannot be reached whether it is back, while it is announced, so that no request has to.

        And meet those that come instead of it, before all that are known are gone.
        """
        delay_s = self.config.avoid_s
        while server := next((each for each in self._servers if each.peer_id == peer_id), None):
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, self.config.max_avoid_s)
            if await self._answers(Hop(server, server.blocks)):
                self._failures.succeeded(peer_id)
                return
            await self.connector.forget(peer_id)
            with contextlib.suppress(NoRoute):
                await self.servers(self._known.fingerprint, max_age_s=FRESH_S)

    async def aclose(self) -> None:
        """Tell servers that open sessions end, and stop what runs in the background."""
        await cancel_and_wait([*self._trying])
        await asyncio.gather(*(farewell() for farewell in self.farewells))
        surveying = [self._surveying] if self._surveying is not None else []
        await asyncio.gather(*self._leaving)
        await cancel_and_wait([*self._missing.values(), *surveying])


def blame(error: E, hop: Hop) -> E:
    """Note in an error which peer is at fault."""
    error.peer_id = hop.peer_id
    return error


@asynccontextmanager
async def open_network(config: ClientConfig) -> AsyncIterator[Network]:
    """Join the swarm. Raises: PeerUnavailable: none of the initial peers answers. NotAMember: it is private."""
    async with AsyncExitStack() as owned:
        dht_config = DhtConfig(
            initial_peers=config.initial_peers,
            identity_path=config.identity_path,
            client_mode=True,
            invitation=config.invitation,
        )
        dht = await owned.enter_async_context(open_dht(dht_config))
        connector, _ = await owned.enter_async_context(open_connector(dht, connect_timeout_s=config.connect_timeout_s))
        network = Network(config, dht.directory, connector)
        owned.push_async_callback(network.aclose)
        touching = asyncio.create_task(network.keep_in_touch())
        owned.push_async_callback(cancel_and_wait, [touching])
        yield network
