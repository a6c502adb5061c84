"""The client's view of a swarm: who is there, how to reach them, who failed lately; and the one retry helper."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import math
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

from .config import ClientConfig
from .hedging import LONGER, PATIENCE_S, StepTimes
from .hosted import choose_adapter
from .known_servers import KnownServers
from .observations import BATCH_SLOW, FailureMemory, SpeedMemory
from .routing import STEPS_AHEAD, ExplainedRoute, Hop, Needs, Roster, View, compute_s, explain, plan_route, route_costs
from .standing import Standing
from .tasks import cancel_and_wait
from .uploads import Uploads

logger = logging.getLogger(__name__)

T = TypeVar("T")
E = TypeVar("E", bound=PeerError)

SURVEYED_AT_FIRST, SURVEYED_LATER, SURVEYED_IN_A_CROWD = 16, 4, 32
"""How many servers are called to see how far they are: before the first route, and each time the directory is read; and
where there are many newcomers, also before each further attempt."""

SURVEY_WAIT_S = 0.5
"""How long the first route waits for that; what comes later counts for later routes."""

WORTH_LEAVING = 1.5
"""A session leaves a slow peer for a route that takes less than its own time divided by this."""

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
        self._standing = Standing()
        self._batch_speeds = SpeedMemory(BATCH_SLOW)
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

    async def route(
        self, needs: Needs, attempt: Attempt, *, prefer: str = "", holding: Collection[str] = ()
    ) -> list[Hop]:
        """Return a route over live peers that have not refused this request.

        Args:
            holding: ids of peers that hold cache for this session already.
            prefer: id of a peer to take alone if it can do all of it.
        Raises: NoRoute.
        """
        missing = self._roster.missing(self._permitted(needs), self._avoided() | attempt.refused_by)
        await self.servers(needs.fingerprint, max_age_s=attempt.max_age_s, blocks=missing)
        await self._look_around(is_first=attempt.max_age_s is None)
        view = replace(self.view(attempt), holding=holding)
        return plan_route(self._roster, self._permitted(needs), view, prefer=prefer)

    def _permitted(self, needs: Needs) -> Needs:
        """The same, of the servers that the user wants."""
        config = self.config
        return replace(needs, allowed=config.allowed_servers, blocked=config.blocked_servers, trust=config.trust)

    def view(self, attempt: Attempt | None = None) -> View:
        """What is known of the peers now."""
        now_s = time.monotonic()
        refused_by = attempt.refused_by if attempt is not None else frozenset()
        return View(
            here=self._survey.here,
            rtts_s=self._survey.rtts_s,
            queues_s=self._survey.queues_s,
            bytes_per_s=self.connector.throughput.to_peers,
            line_bytes_per_s=self.connector.throughput.bytes_per_s(),
            slowness=self._speeds.slowness(now_s),
            batch_slowness=self._batch_speeds.slowness(now_s),
            doubts_s=self._standing.doubts_s(self._servers, self._survey.rtts_s.keys(), now_s),
            tokens_under_way=self._tokens_under_way,
            failures=self._failures.weights(now_s),
            avoid=self._avoided() | refused_by,
        )

    async def _look_around(self, *, is_first: bool) -> None:
        """Before the first route where there is a choice, see how far the servers are; not for long.

        Before each further attempt among many newcomers as well: most of them may not exist.
        """
        crowded = self._standing.is_crowded(self._servers)
        if self._surveying is not None and not (crowded and not is_first and self._surveying.done()):
            return
        if len(self._servers) > 1:
            limit = SURVEYED_IN_A_CROWD if crowded else SURVEYED_AT_FIRST
            self._surveying = asyncio.create_task(self._survey.visit(self._servers, limit))
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
        if [hop.place for hop in others] == [hop.place for hop in hops]:
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
            self._speeds.took(hop.peer_id, microseconds / 1e6, compute_s(hop, num_tokens) + hop.server.queue_s, now_s)

    def expected_batch_s(self, hop: Hop, needs: Needs) -> float:
        """What a hop should take for a batch given now, by what it announces, behind what else it has of ours."""
        before = max(0, self._tokens_under_way[hop.peer_id] - needs.batch_tokens)
        view = replace(self.view(), batch_slowness={}, tokens_under_way={hop.peer_id: before})
        (cost,) = route_costs([hop], needs, view)
        return cost.total_s

    def took_batch(self, hop: Hop, seconds: float, expected_s: float) -> None:
        """Note how long a hop had a batch: the next ones are shared by that."""
        self._batch_speeds.took(hop.peer_id, seconds, expected_s, time.monotonic())

    def num_routes(self, needs: Needs) -> int:
        """Over how many routes of their own batches can be spread now; 0: there is none."""
        return self._roster.num_routes(self._permitted(needs), self._avoided())

    def bound_s(self, hops: Sequence[Hop], needs: Needs, num_tokens: int, *, opens: bool) -> float:
        """How long a step should take at most on a route that has no times of its own for such steps.

        By the steps of all sessions, and where there were none, by what the servers announce: without any bound, one
        that answers and does not compute would hold a client that has only just come.

        Args:
            num_tokens: of all sequences.
            opens: whether its chain has to be opened first.
        """
        feeding_s = self.feedings.bound_s(num_tokens)
        if feeding_s is None:
            feeding_s = self.prior_s(hops, needs, num_tokens)
        if not opens:
            return feeding_s
        opening_s = self.openings.bound_s(1)
        return feeding_s + (PATIENCE_S if opening_s is None else opening_s)

    def prior_s(self, hops: Sequence[Hop], needs: Needs, num_tokens: float) -> float:
        """How long these hops may take for so many tokens, by what they announce, before anything was seen."""
        fed = replace(needs, prompt_tokens=int(num_tokens), session_tokens=1)
        on_the_way_s = sum(cost.network_s + cost.queue_s for cost in route_costs(hops, fed, self.view()))
        return PATIENCE_S + LONGER * (on_the_way_s + sum(compute_s(hop, num_tokens) for hop in hops))

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
        return explain(hops, self._roster, self._permitted(needs), self.view(), self.connector.ways)

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
                if attempt.max_age_s is not None:  # else the directory may know of one by now
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
            slowest = await self._slowest(hops)
            raise blame(PeerUnavailable(f"peer {slowest} gave no result in {timeout_s:.0f} s"), slowest) from exc
        finally:
            if not task.done():
                task.cancel()
        return await task

    async def _probe(self, hops: Sequence[Hop]) -> None:
        for hop, answers in zip(hops, await asyncio.gather(*map(self._answers, hops)), strict=True):
            if not answers:
                raise blame(PeerUnavailable(f"peer {hop} does not answer within {PROBE_TIMEOUT_S:.0f} s"), hop)

    async def _slowest(self, hops: Sequence[Hop]) -> Hop:
        """The one of some hops that takes longest to say that it is alive: the likeliest to be the one that stalls."""
        if len(hops) == 1:
            return hops[0]
        answered: list[Hop] = []

        async def ask(hop: Hop) -> None:
            if await self._answers(hop):
                answered.append(hop)

        await asyncio.gather(*map(ask, hops))
        return next((hop for hop in hops if hop not in answered), None) or answered[-1]

    async def elsewhere(self, attempt: Attempt, needs: Needs, hops: Sequence[Hop], number: int) -> Attempt:
        """Return the attempt at something that stalls on these hops which goes another way.

        The first other way leaves out those that are slow to say that they are alive, or all if none is. Later ones
        leave out all of them, for that did not help, and may lead over servers that we have not met yet. Those without
        whom there is no way are not left out, unless that goes for all: another one may be at fault.

        Args:
            hops: of all ways that were tried.
            number: 1 for the first other way.
        """
        suspects = await self._suspects(hops)
        if number > 1:
            attempt = replace(attempt, max_age_s=FRESH_S)
            await self.servers(needs.fingerprint, max_age_s=FRESH_S)
            suspects = frozenset(hop.peer_id for hop in hops)
        return replace(attempt, refused_by=attempt.refused_by | self._dispensable(suspects, needs, attempt))

    def _dispensable(self, suspects: frozenset[str], needs: Needs, attempt: Attempt) -> frozenset[str]:
        """As many of some peers as there is a way without; all, where there is none without any."""
        needs, avoided = self._permitted(needs), self._avoided() | attempt.refused_by
        found: set[str] = set()
        for peer_id in sorted(suspects):
            if not self._roster.missing(needs, avoided | found | {peer_id}):
                found.add(peer_id)
        return frozenset(found) or suspects

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
        if (server := self._roster.get(peer_id)) is not None:
            self._standing.served(server)

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
        if (server := self._roster.get(error.peer_id)) is not None:
            self._standing.failed(server)
        if isinstance(error, PeerUnavailable) and error.peer_id not in self._missing:
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
                self._failures.reached(server.peer_id)

    async def _look_for(self, peer_id: str) -> None:
        """Ask a peer that cannot be reached whether it is back, while it is announced, so that no request has to.

        And meet those that come instead of it, before all that are known are gone. Our link to it is kept if it answers
        by that: it may be another peer that cannot reach it, and for us there may be no second way to it.
        """
        delay_s = 0.0
        while server := next((each for each in self._servers if each.peer_id == peer_id), None):
            await asyncio.sleep(delay_s)
            if await self._answers(Hop(server, server.blocks)):
                if delay_s:
                    self._failures.reached(peer_id)
                return
            await self.connector.forget(peer_id)
            if delay_s:
                with contextlib.suppress(NoRoute):
                    await self.servers(self._known.fingerprint, max_age_s=FRESH_S)
            delay_s = min(2 * delay_s or self.config.avoid_s, self.config.max_avoid_s)
        await self.connector.forget(peer_id)

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
