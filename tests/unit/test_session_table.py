"""Who may open a session, what it costs, what is kept of it when its stream breaks, and who gets it back."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import pytest
import torch
from test_adapter_store import ADAPTERS, held, new_store, put
from test_adapter_store import BLOCKS as ADAPTED_BLOCKS
from test_engine import BLOCKS, FakeViews
from torch import Tensor

from swarm.errors import BadRequest, CacheFull, PeerUnavailable, PromptTooLong, SessionLost, TooManyRequests
from swarm.server.adapters import Lease
from swarm.server.callers import OWN, Caller
from swarm.server.kv_cache import PageNames, StepInput
from swarm.server.pages import PagePool
from swarm.server.sessions import ServerSession, SessionKey, SessionTable

PAGE = 4
LATE_S = 60.0


def make_table(num_pages: int, *, grace_s: float = 60.0, share: float = 1.0) -> SessionTable:
    pool = PagePool(num_pages, PAGE)
    return SessionTable(FakeViews(), pool, 1 << 20, packed=True, grace_s=grace_s, share=share)  # type: ignore[arg-type]


def make_key(*, session_id: bytes | None = None, **fields: Any) -> SessionKey:
    made: dict[str, Any] = {"batch_size": 1, "max_tokens": 16, "blocks": BLOCKS} | fields
    return SessionKey(session_id=session_id or secrets.token_bytes(16), **made)


def fill(table: SessionTable, session: ServerSession, num_tokens: int) -> None:
    """What the engine does for a step."""
    with table.guard:
        session.cache.append(num_tokens)
        table.begun(session)


class Visitor:
    """Somebody who opens a session in a task of its own and holds it until told to leave."""

    def __init__(
        self,
        table: SessionTable,
        key: SessionKey,
        *,
        epoch: int = 1,
        adapters: Lease | None = None,
        timeout_s: float = LATE_S,
        caller: Caller = OWN,
    ) -> None:
        self._caller = caller
        self._leave: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.session: ServerSession | None = None
        self.task = asyncio.create_task(self._hold(table, key, epoch, adapters, timeout_s))

    async def _hold(
        self, table: SessionTable, key: SessionKey, epoch: int, adapters: Lease | None, timeout_s: float
    ) -> None:
        async with table.open(
            key, epoch=epoch, prompts_NBPD=None, adapters=adapters, timeout_s=timeout_s, caller=self._caller
        ) as self.session:
            await asyncio.wait({self._leave, self.session.failure}, return_when=asyncio.FIRST_COMPLETED)
            await (self._leave if self._leave.done() else self.session.failure)

    async def leave(self) -> None:
        self._leave.set_result(None)
        await self.task

    async def break_off(self, error: BaseException | None = None) -> None:
        """End as when the stream breaks, or with an error."""
        if error is None:
            self.task.cancel()
        else:
            self._leave.set_exception(error)
        await asyncio.gather(self.task, return_exceptions=True)


async def settle() -> None:
    for _ in range(6):
        await asyncio.sleep(0)


@asynccontextmanager
async def visiting(table: SessionTable, key: SessionKey, num_tokens: int) -> AsyncIterator[Visitor]:
    visitor = Visitor(table, key)
    await settle()
    assert visitor.session is not None
    fill(table, visitor.session, num_tokens)
    try:
        yield visitor
    finally:
        if not visitor.task.done():
            await visitor.leave()


async def test_a_session_takes_what_it_uses_not_what_it_may_reach():
    table = make_table(8)
    async with AsyncExitStack() as owned:
        for _ in range(4):  # together they may reach 16 pages
            await owned.enter_async_context(visiting(table, make_key(), 3))
        assert table.pool.num_used == 4
    assert table.pool.num_used == 0


async def test_what_could_not_fit_alone_is_refused_at_once():
    with pytest.raises(PromptTooLong, match="needs 5 MiB of cache, this server has 4 MiB in all"):
        async with make_table(4).open(make_key(max_tokens=17), epoch=1, prompts_NBPD=None, timeout_s=LATE_S):
            pass


async def test_prompts_count():
    table = make_table(4)
    prompts = torch.zeros(2, 1, 16, 8192)  # 1 MiB
    async with table.open(make_key(max_tokens=12), epoch=1, prompts_NBPD=prompts, timeout_s=0.0):
        assert table.pool.num_used == 1
    with pytest.raises(PromptTooLong):
        async with table.open(make_key(), epoch=1, prompts_NBPD=prompts, timeout_s=0.0):
            pass


async def test_without_room_a_new_session_waits_and_those_that_run_lose_nothing():
    table = make_table(4)
    async with visiting(table, make_key(), 16) as holder:
        with pytest.raises(CacheFull, match="no room"):
            async with table.open(make_key(), epoch=1, prompts_NBPD=None, timeout_s=0.0):
                pass
        first, second = Visitor(table, make_key()), Visitor(table, make_key())
        await settle()
        assert first.session is None and second.session is None
        await holder.leave()
        await settle()
        assert first.session is not None and second.session is not None
        await first.leave()
        await second.leave()
    assert table.pool.num_used == 0


async def test_admission_is_a_promise():
    """Sessions that were let in and have not begun count, so that not more are let in than can begin."""
    table = make_table(4)
    visitors = [Visitor(table, make_key(batch_size=1)) for _ in range(6)]
    await settle()
    assert [visitor.session is not None for visitor in visitors] == [True] * 4 + [False] * 2
    await visitors[0].leave()
    await settle()
    assert visitors[4].session is not None and visitors[5].session is None
    for visitor in visitors[1:]:
        visitor.task.cancel()
        with suppress(asyncio.CancelledError):
            await visitor.task
    async with visiting(table, make_key(batch_size=4, max_tokens=4), 4):
        assert table.pool.num_free == 0


async def test_a_session_too_large_for_the_present_room_lets_small_ones_past_as_much_as_it_wants_itself():
    table = make_table(8)
    async with visiting(table, make_key(), 13):  # 4 pages
        large = Visitor(table, make_key(batch_size=6, max_tokens=4))
        await settle()
        small = []
        for number in range(8):
            small.append(Visitor(table, make_key(max_tokens=4)))
            await settle()
            assert (small[-1].session is not None) == (number < 6)
            if number < 6:
                await small[-1].leave()
        assert large.session is None and table.statistics().num_waiting == 3
    await settle()
    assert large.session is not None, "what came free was kept for it"
    for each in (large, *small[6:]):
        await settle()
        await each.leave()
    assert table.pool.num_used == 0 and table.statistics().num_waited == 3


async def test_those_who_wait_and_give_up_take_nothing_with_them():
    table = make_table(4)
    async with visiting(table, make_key(), 16) as holder:
        waiting, following = Visitor(table, make_key(batch_size=3, max_tokens=4)), Visitor(table, make_key())
        await settle()
        waiting.task.cancel()
        await holder.leave()
        await settle()
        assert following.session is not None
        await following.leave()
    async with visiting(table, make_key(), 16):
        pass


async def test_a_stream_that_breaks_leaves_its_cache_for_whoever_opens_it_again():
    table, key = make_table(4), make_key()
    async with visiting(table, key, 7) as visitor:
        await visitor.break_off()
    assert table.statistics().num_sessions == 0 and table.statistics().num_kept == 1
    assert table.pool.num_used == 2
    async with table.open(key, epoch=2, prompts_NBPD=None, timeout_s=0.0) as session:
        assert session.cache.length == 7 and table.statistics().num_kept == 0
        with pytest.raises(SessionLost):
            table.get(key.session_id, 1)
        assert table.get(key.session_id, 2) is session
    assert table.pool.num_used == 0


@pytest.mark.parametrize("error", [BadRequest("the caller's fault"), SessionLost("closed"), ArithmeticError("our bug")])
async def test_other_ends_keep_nothing(error):
    table = make_table(4)
    async with visiting(table, make_key(), 7) as visitor:
        await visitor.break_off(error)
    assert table.pool.num_used == 0 and table.statistics().num_kept == 0


async def test_a_next_hop_that_fails_leaves_the_cache_here():
    table = make_table(4)
    async with visiting(table, make_key(), 7) as visitor:
        await visitor.break_off(PeerUnavailable("the next hop is gone"))
    assert table.statistics().num_kept == 1


async def test_a_cache_that_a_failed_step_left_undefined_is_not_kept():
    table = make_table(4)
    async with visiting(table, make_key(), 7) as visitor:
        visitor.session.cache.broken = True
        await visitor.break_off()
    assert table.pool.num_used == 0


async def test_a_caller_may_open_its_session_again_before_we_know_that_its_stream_is_dead():
    table, key = make_table(4), make_key()
    async with visiting(table, key, 7) as old:
        async with table.open(key, epoch=2, prompts_NBPD=None, timeout_s=0.0) as session:
            assert session.cache is old.session.cache
            with pytest.raises(PeerUnavailable, match="opened again"):
                await old.session.failure
            await old.break_off()
            assert table.get(key.session_id, 2) is session and session.cache.length == 7
        assert table.pool.num_used == 0


async def test_nobody_opens_the_session_of_another_or_of_another_epoch():
    table, key = make_table(8), make_key()
    async with visiting(table, key, 7):
        for other, epoch in [(key, 1), (make_key(session_id=key.session_id, max_tokens=12), 2)]:
            with pytest.raises(BadRequest, match="open already"):
                async with table.open(other, epoch=epoch, prompts_NBPD=None, timeout_s=0.0):
                    pass
        assert table.get(key.session_id, 1).cache.length == 7


async def test_a_session_that_ends_for_want_of_pages_keeps_none():
    table = make_table(8)
    visitor = Visitor(table, make_key())
    await settle()
    assert visitor.session is not None
    fill(table, visitor.session, 9)
    await visitor.break_off(CacheFull("no pages"))
    assert table.pool.num_used == 0 and table.statistics().num_kept == 0


async def test_kept_caches_do_not_give_way_in_vain():
    table = make_table(8)
    async with visiting(table, make_key(), 16):
        kept = Visitor(table, make_key())
        await settle()
        assert kept.session is not None
        fill(table, kept.session, 8)
        await kept.break_off()
        newcomer = Visitor(table, make_key(batch_size=5, max_tokens=4), timeout_s=0.0)
        await settle()
        assert newcomer.task.done() and isinstance(newcomer.task.exception(), CacheFull)
        assert table.statistics().num_kept == 1
    table.drop_kept()


async def test_what_is_kept_is_news_for_a_step_that_waits_for_pages():
    table = make_table(8)
    visitor = Visitor(table, make_key())
    await settle()
    assert visitor.session is not None
    fill(table, visitor.session, 9)
    before = table.num_releases
    await visitor.break_off()
    assert table.num_releases > before and table.statistics().num_kept == 1
    table.drop_kept()


async def test_kept_caches_give_way_to_who_needs_their_pages_oldest_first():
    table = make_table(4)
    keys = [make_key(max_tokens=8), make_key(max_tokens=8)]
    for key in keys:
        async with visiting(table, key, 8) as visitor:
            await visitor.break_off()
    assert table.pool.num_free == 0
    async with table.open(make_key(max_tokens=8), epoch=1, prompts_NBPD=None, timeout_s=0.0):
        assert table.statistics().num_kept == 1
        async with table.open(keys[1], epoch=2, prompts_NBPD=None, timeout_s=0.0) as session:
            assert session.cache.length == 8


async def test_the_grace_ends():
    table = make_table(4, grace_s=0.01)
    async with visiting(table, make_key(), 7) as visitor:
        await visitor.break_off()
    async with asyncio.timeout(30):
        while table.pool.num_used:
            await asyncio.sleep(0.005)
    assert table.statistics().num_kept == 0


def step(position: int, x_BLD: Tensor, **changes: Any) -> StepInput:
    fields: dict[str, Any] = {"step_id": 1, "num_outputs": 1, "beam_idx": [], "mask_BL": None, "position_ids_BL": None}
    return StepInput(position=position, x_BLD=x_BLD, **fields | changes)


def names_of(x_BLD: Tensor, *lengths: int, context: bytes = b"") -> list[list[tuple[int, bytes]]]:
    names, at = PageNames(x_BLD.shape[0], PAGE, context), 0
    rows: list[list[tuple[int, bytes]]] = [[] for _ in range(x_BLD.shape[0])]
    for length in lengths:
        for row, named in zip(rows, names.of_step(step(at, x_BLD[:, at : at + length])), strict=True):
            row.extend(named)
        at += length
    return rows


def test_pages_have_one_name_however_they_were_filled():
    x_BLD = torch.randn(2, 11, 3, dtype=torch.bfloat16)
    whole = names_of(x_BLD, 11)
    assert [[page for page, _ in row] for row in whole] == [[0, 1], [0, 1]]
    assert whole[0][0][1] != whole[1][0][1] != whole[0][1][1]
    for lengths in [(1,) * 11, (4, 4, 3), (3, 5, 3), (10, 1)]:
        assert names_of(x_BLD, *lengths) == whole


def test_the_same_bytes_of_another_type_of_numbers_are_other_hidden_states():
    x_BLD = torch.randn(1, 8, 3, dtype=torch.bfloat16)
    assert names_of(x_BLD, 8) != names_of(x_BLD.view(torch.float16), 8)
    assert names_of(x_BLD, 8) == names_of(x_BLD.to(torch.float32), 8)


def test_names_differ_with_the_context_and_with_what_came_before():
    x_BLD = torch.randn(1, 8, 3)
    changed = x_BLD.clone()
    changed[0, 0, 0] += 1
    assert names_of(x_BLD, 8, context=b"prompts") != names_of(x_BLD, 8)
    assert names_of(changed, 8)[0][1] != names_of(x_BLD, 8)[0][1]


def test_going_back_to_a_page_boundary_keeps_naming_and_into_a_page_ends_it():
    x_BLD = torch.randn(1, 12, 3)
    names = PageNames(1, PAGE, b"")
    names.of_step(step(0, x_BLD[:, :10]))
    assert names.of_step(step(4, x_BLD[:, 4:])) == [names_of(x_BLD, 12)[0][1:]]
    assert names.of_step(step(6, x_BLD[:, 6:])) == []
    assert names.of_step(step(8, x_BLD[:, 8:])) == []


@pytest.mark.parametrize(
    "changes", [{"beam_idx": [0]}, {"mask_BL": torch.ones(1, 4)}, {"position_ids_BL": torch.ones(1, 4)}]
)
def test_steps_with_more_to_them_than_their_tokens_end_naming(changes):
    names, x_BLD = PageNames(1, PAGE, b""), torch.randn(1, 8, 3)
    assert names.of_step(step(0, x_BLD[:, :4], **changes)) == []
    assert names.of_step(step(4, x_BLD[:, 4:])) == []


async def test_sessions_that_are_kept_end_when_the_room_of_their_adapters_is_needed_live_ones_do_not():
    table, store = make_table(8), new_store(4)
    live, old, new = (make_key() for _ in range(3))
    visitors = []
    for number, key in enumerate((live, old, new)):
        await put(store, ADAPTERS[number])
        with store.lease([ADAPTERS[number].digest, b""], ADAPTED_BLOCKS) as lease:
            visitors.append(Visitor(table, key, adapters=lease))
            await settle()
        fill(table, visitors[-1].session, 3)
    for visitor in visitors[1:]:
        await visitor.break_off()
    for number in (3, 4):  # unused, and instead of it
        await put(store, ADAPTERS[number])
    assert table.statistics().num_kept == 2
    with store.lease([ADAPTERS[4].digest, b""], ADAPTED_BLOCKS):
        await put(store, ADAPTERS[5])
        assert table.statistics().num_kept == 1 and table.pool.num_used == 2
        again = Visitor(table, new, epoch=2)
        await settle()
        assert again.session.cache.length == 3
        await put(store, ADAPTERS[6])  # instead of 5; what is live again stays
        assert held(store) == [0, 2, 4, 6]
    anew = Visitor(table, old, epoch=2)
    await settle()
    assert anew.session.cache.length == 0  # its client feeds it again
    for visitor in (visitors[0], again, anew):
        await visitor.leave()
    assert store.statistics().num_used == 0 and table.pool.num_used == 0


A, B = Caller("192.0.2.1"), Caller("192.0.2.2")


async def test_who_holds_least_is_let_in_first() -> None:
    table = make_table(16)
    first, second = (Visitor(table, make_key(max_tokens=60), caller=A) for _ in range(2))
    await settle()
    assert first.session is not None and second.session is not None
    fill(table, first.session, 32)
    fill(table, second.session, 24)
    waiting = [Visitor(table, make_key(batch_size=8), caller=A), Visitor(table, make_key(batch_size=2), caller=B)]
    await settle()
    assert [each.session is not None for each in waiting] == [False, False]
    await second.leave()
    await settle()
    assert [each.session is not None for each in waiting] == [False, True]
    for each in (first, *waiting):
        await each.break_off()


async def test_a_caller_with_most_of_the_cache_gives_up_what_it_uses_least_when_others_wait() -> None:
    table = make_table(16, share=0.5)
    hog = [Visitor(table, make_key(max_tokens=64), caller=A) for _ in range(3)]
    await settle()
    for number, each in enumerate(hog):
        assert each.session is not None
        fill(table, each.session, 20)
        each.session.used_at_s = float(number)
    own = Visitor(table, make_key(batch_size=2), caller=B)
    await asyncio.gather(hog[0].task, return_exceptions=True)
    await settle()
    assert isinstance(hog[0].task.exception(), TooManyRequests) and own.session is not None
    assert not hog[1].task.done() and not hog[2].task.done()
    assert table.statistics().num_reclaimed == 1 and table.statistics().num_kept == 0
    for each in (*hog[1:], own):
        await each.break_off()


async def test_nothing_is_taken_from_who_has_no_more_than_its_share_or_is_this_machine() -> None:
    for caller, share in ((A, 1.0), (OWN, 0.1)):
        table = make_table(4, share=share)
        holder = Visitor(table, make_key(), caller=caller)
        await settle()
        assert holder.session is not None
        fill(table, holder.session, 16)
        late = Visitor(table, make_key(), caller=B, timeout_s=0.01)
        with suppress(CacheFull):
            await late.task
        assert late.session is None and not holder.task.done()
        await holder.leave()
