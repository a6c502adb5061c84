"""Audits of a session: its record is fed to other servers, and what both commit to is compared, while steps go on."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from swarm.commitments import relative_error
from swarm.errors import SwarmError
from swarm.streams import Step

from .audits import Finding, compare, settle, tolerance
from .chain import ChainConfig
from .lane import Lane
from .network import Network
from .record import Record
from .routing import Hop, Needs
from .tasks import cancel_and_wait
from .transcript import Transcript

logger = logging.getLogger(__name__)

# H hops, S sides, B batch, T tokens, X tokens of all sequences, K sums of a sketch


@dataclass(frozen=True, slots=True, eq=False)
class _Account:
    """What a lane had committed to of some tokens when an audit began, and what the record was then."""

    lane: Lane
    hops: Sequence[Hop]
    record: Record
    start: int
    sketches_HSBTK: Tensor

    @classmethod
    def of(cls, lane: Lane, transcript: Transcript, record: Record, start: int) -> _Account:
        start = max(start, transcript.start)
        end = min(transcript.end, record.length)
        return cls(lane, transcript.hops, record.copied(end), start, transcript.part(start, end))

    def sketches(self, of: Tensor) -> Tensor:
        """Those of tokens that are no padding, [H, S, X, K]."""
        mask_BT = self.record.mask_BT
        if mask_BT is None:
            return of.flatten(2, 3)
        return of[:, :, mask_BT[:, self.start : self.record.length].bool()]


class SessionAuditor:
    """Audits one session, one audit at a time.

    Args:
        needs: of a route for the session.
        config: what its chains are opened with.
    """

    def __init__(self, network: Network, needs: Needs, config: ChainConfig) -> None:
        self._network = network
        self._needs = needs
        self._config = config
        self._audited: Lane | None = None
        self._lanes: list[Lane] = []
        """On which the record is recomputed; the second one is there to settle."""
        self._auditors: Sequence[Hop | None] = ()
        """Who recomputes each hop on the first of them; None: nobody else can, it has to do so itself."""
        self._done = 0
        """Leading tokens of the record that were audited on the audited lane."""
        self._running: asyncio.Task[None] | None = None

    def changed(self, step: Step) -> None:
        """Note that the record is about to take a step, which may replace what was audited or is being audited."""
        self._done = 0 if step.beam_idx else min(self._done, step.position)
        for lane in self._lanes:
            lane.changed(step)

    def stepped(self, lane: Lane, record: Record, seconds: float) -> None:
        """Begin an audit if it is time for one, after a step on this lane."""
        pace = self._network.pace
        pace.stepped(seconds)
        if lane is not self._audited:
            self._leave(lane)
        is_idle = self._running is None or self._running.done()
        num_tokens = (record.length - self._done) * self._config.batch_size
        if is_idle and lane.transcript is not None and pace.is_due(num_tokens):
            account = _Account.of(lane, lane.transcript, record, self._done)
            self._running = self._network.try_in_background(self._audit(account))

    def _leave(self, lane: Lane) -> None:
        self._audited, self._done = lane, 0
        if self._running is not None:
            self._running.cancel()
        self._retire()

    def _retire(self) -> None:
        for each in self._lanes:
            each.retire()
        self._lanes = []

    async def wait(self) -> None:
        """Wait for the audit that runs, if one does."""
        if self._running is not None:
            await asyncio.wait({self._running})
            if not self._running.cancelled():
                self._running.result()  # an error would be our bug

    async def aclose(self) -> None:
        if self._running is not None:
            await cancel_and_wait([self._running])
        for lane in self._lanes:
            await lane.aclose()
        self._lanes = []

    async def _audit(self, account: _Account) -> None:
        began_s = time.monotonic()
        try:
            await self._judge(account)
        except SwarmError as exc:
            logger.debug("an audit could not be made: %s", exc)
            await self._network.note_failure(exc)
            self._retire()
        finally:
            self._network.pace.took(time.monotonic() - began_s)

    async def _judge(self, account: _Account) -> None:
        """Recompute, compare, and settle what does not agree."""
        if not self._lanes:
            auditors = await self._network.auditors(account.hops, self._needs)
            if not any(auditors):
                return
            self._lanes.append(self._lane_like(account.lane))
            self._auditors = _without_end(account.hops, auditors)
        hops = [other or hop for other, hop in zip(self._auditors, account.hops, strict=False)]
        recomputed = await self._recompute(account, self._lanes[0], hops)
        committed = account.sketches(account.sketches_HSBTK)[: len(hops)]
        verdict = compare(committed, recomputed, self._tolerances(account.hops, self._auditors))
        at = verdict.hop
        if verdict.finding is Finding.RIGHT:
            self._done = max(self._done, self._lanes[0].num_held)
        elif verdict.finding is Finding.UNCLEAR:
            self._network.audits.doubt(account.hops[at - 1 : at + 1], verdict.error)
            self._retire()
        else:
            await self._settle(account, hops, at, committed, recomputed)

    def _lane_like(self, audited: Lane) -> Lane:
        return Lane(self._network, self._needs, self._config, lambda _: self._leave(audited), audited=audited)

    def _tolerances(self, hops: Sequence[Hop], auditors: Sequence[Hop | None]) -> list[float | None]:
        exact = self._network.config.compression == "none"
        return [
            None if other is None else tolerance(hop.server, other.server, len(hop.blocks), exact_wire=exact)
            for hop, other in zip(hops, auditors, strict=False)
        ]

    async def _recompute(self, account: _Account, lane: Lane, hops: Sequence[Hop]) -> Tensor:
        """Feed a lane what it lacks of the record; return what its hops commit to, [H, S, X, K]."""
        record = account.record
        step = record.part(min(lane.num_held, record.length - 1), record.length)

        async def feed() -> Tensor:
            return await lane.feed(step, record, hops)

        if lane.is_open:
            await feed()
        else:
            await self._network.uploads.calling(hops, self._config.adapters, self._config.fingerprint, feed)
        assert lane.transcript is not None
        return account.sketches(lane.transcript.part(account.start, record.length))

    async def _settle(
        self, account: _Account, hops: Sequence[Hop], at: int, committed: Tensor, recomputed: Tensor
    ) -> None:
        """Let a third peer say who is right about a hop, and exclude the one who is not."""
        parties = [account.hops[at], hops[at]]
        (third,) = await self._network.auditors([account.hops[at]], self._needs, not_these=parties)
        if third is None:
            self._network.audits.doubt(parties, float(relative_error(committed[at, 1], recomputed[at, 1]).mean()))
            self._retire()
            return
        lane = self._lane_like(account.lane)
        self._lanes.append(lane)
        settled = await self._recompute(account, lane, [*hops[:at], third])
        accounts = [each[at, 1] for each in (committed, recomputed, settled)]
        pairs = ((1, 2), (0, 2), (0, 1))
        errors = [float(relative_error(accounts[one], accounts[other]).mean()) for one, other in pairs]
        false = settle((errors[0], errors[1], errors[2]))
        if false is None:
            self._network.audits.doubt(parties, errors[2])
        else:
            true = errors[false]
            self._network.audits.exclude((*parties, third)[false], error=errors[(false + 1) % 3], among_others=true)
        self._retire()


def _without_end(hops: Sequence[Hop], auditors: Sequence[Hop | None]) -> list[Hop | None]:
    """Leave out the last hops that nobody recomputes: nothing depends on them."""
    last = max(index for index, each in enumerate(auditors) if each is not None)
    return list(auditors[: last + 1])
