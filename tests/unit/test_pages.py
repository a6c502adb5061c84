"""The page pool: no page lost, none held twice by mistake, and every sequence reads what was written for it."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from swarm.errors import CacheFull
from swarm.server.pages import OutOfPages, PageCopy, PagePool, PageTable

SEED = 20261122
MAX_TABLES = 10


class Store:
    """A pool, the contents of its slots, and what every sequence should read: a plain list of values per table.

    The value written for a token depends on all tokens before it, as keys and values do.
    """

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        self.pool = PagePool(num_pages, page_tokens)
        self.slots: list[int | None] = [None] * (num_pages * page_tokens)
        self.expected: dict[PageTable, list[int]] = {}
        self.num_operations = 0

    @property
    def tables(self) -> list[PageTable]:
        return list(self.expected)

    def open(self, expected_tokens: int = 0) -> PageTable:
        self.num_operations += 1
        table = self.pool.open(expected_tokens)
        self.expected[table] = []
        return table

    def append(self, table: PageTable, tokens: list[int]) -> None:
        """Append and write tokens, or see that a refusal changes nothing."""
        self.num_operations += 1
        needed, before = self.pool.pages_needed(table, len(tokens)), self.state()
        holders = Counter(page for other in self.tables for page in other.pages)
        room = -table.length % self.pool.page_tokens
        must_copy = bool(tokens) and room > 0 and holders[table.pages[-1]] > 1
        assert needed == must_copy + max(0, -(-(len(tokens) - room) // self.pool.page_tokens))
        if needed > self.pool.num_free:
            with pytest.raises(OutOfPages, match=f"{len(tokens)} more tokens need {needed} pages"):
                self.pool.append(table, len(tokens))
            assert self.state() == before
            return
        num_free = self.pool.num_free
        copies = self.pool.append(table, len(tokens))
        assert num_free - self.pool.num_free == needed and len(copies) == must_copy
        self.copy(copies)
        self.write(table, self.continued(table, tokens))

    def continued(self, table: PageTable, tokens: list[int]) -> list[int]:
        values, last = [], (self.expected[table] or [0])[-1]
        for token in tokens:
            last = hash((last, token))
            values.append(last)
        return values

    def copy(self, copies: list[PageCopy]) -> None:
        for copy in copies:
            for i in range(copy.num_tokens):
                self.slots[copy.target_slot + i] = self.slots[copy.source_slot + i]

    def write(self, table: PageTable, values: list[int]) -> None:
        slots = [slot for start, end in table.runs() for slot in range(start, end)]
        for slot, value in zip(slots[len(slots) - len(values) :], values, strict=True):
            self.slots[slot] = value
        self.expected[table] += values

    def cut(self, table: PageTable, length: int) -> None:
        self.num_operations += 1
        self.pool.cut(table, length)
        del self.expected[table][length:]

    def fork(self, table: PageTable) -> PageTable:
        self.num_operations += 1
        num_free = self.pool.num_free
        twin = self.pool.fork(table)
        assert self.pool.num_free == num_free
        self.expected[twin] = list(self.expected[table])
        return twin

    def publish(self, table: PageTable, index: int) -> bool:
        self.num_operations += 1
        value = self.expected[table][(index + 1) * self.pool.page_tokens - 1]
        return self.pool.publish(table, index, str(value).encode())

    def adopt(self, table: PageTable, tokens: list[int]) -> bool:
        """Take the page of these tokens, if the pool still has it."""
        self.num_operations += 1
        values = self.continued(table, tokens)
        adopted = self.pool.adopt(table, str(values[-1]).encode())
        if adopted:
            self.expected[table] += values
        return adopted

    def close(self, table: PageTable) -> None:
        self.num_operations += 1
        self.pool.close(table)
        del self.expected[table]

    def read(self, table: PageTable) -> list[int | None]:
        return [value for start, end in table.runs() for value in self.slots[start:end]]

    def state(self) -> tuple[object, ...]:
        lists = [(table.length, list(table.pages), table.runs()) for table in self.tables]
        return lists, self.pool.num_free, self.pool.num_shared

    def check(self) -> None:
        """See that pages are counted exactly and that every sequence reads what it should."""
        pool = self.pool
        assert list(pool._tables) == self.tables
        holders = Counter(page for table in self.tables for page in table.pages)
        assert pool._num_holders == [holders[page] for page in range(pool.num_pages)]
        assert pool.num_used == len(holders) <= pool.num_pages and pool.num_used + pool.num_free == pool.num_pages
        assert pool.num_shared == sum(count > 1 for count in holders.values())
        for table, values in self.expected.items():
            assert table.length == len(values) and len(table.pages) == -(-table.length // pool.page_tokens)
            assert len(set(table.pages)) == len(table.pages)
            assert self.read(table) == values
            runs = table.runs()
            assert all(start < end for start, end in runs)
            assert all(end != start for (_, end), (start, _) in itertools.pairwise(runs)), "runs not joined"

    def random_operation(self, rng: random.Random) -> None:
        """Do one thing that a server may do; sequences often begin alike."""
        tables, page_tokens = self.tables, self.pool.page_tokens
        if not tables:
            self.open()
            return
        table = rng.choice(tables)
        if len(tables) == MAX_TABLES:
            self.close(table)
            return
        match rng.choices(range(7), weights=[3, 12, 3, 2, 6, 4, 2])[0]:
            case 0:
                self.open(rng.choice([0, rng.randrange(1, 8 * page_tokens)]))
            case 1:
                length = rng.choice([0, 1, 1, 1, rng.randrange(4 * page_tokens)])
                self.append(table, [rng.choice([1, 1, 1, 2])] * length)
            case 2:
                self.cut(table, rng.randrange(table.length + 1))
            case 3:
                self.fork(table)
            case 4 if table.length >= page_tokens:
                self.publish(table, rng.randrange(table.length // page_tokens))
            case 5 if table.length % page_tokens == 0:
                self.adopt(table, [rng.choice([1, 1, 1, 2])] * page_tokens)
            case 6:
                self.close(table)


@pytest.mark.parametrize("num_pages, page_tokens", [(1, 1), (7, 3), (24, 4), (20, 16), (200, 1)])
def test_ten_thousand_operations_in_all_lose_no_page_and_mix_up_no_content(num_pages, page_tokens):
    rng, store = random.Random(SEED), Store(num_pages, page_tokens)
    while store.num_operations < 2500:
        store.random_operation(rng)
        store.check()
    for table in store.tables:
        store.close(table)
    assert store.pool.num_free == num_pages and store.pool.num_shared == 0


class Operations(RuleBasedStateMachine):
    """The same operations chosen by hypothesis, which finds the shortest sequence of them that goes wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.store = Store(num_pages=6, page_tokens=3)

    def table(self, data: st.DataObject) -> PageTable:
        return self.store.tables[data.draw(st.integers(0, len(self.store.tables) - 1))]

    @rule(expected_tokens=st.integers(0, 30))
    def open(self, expected_tokens):
        self.store.open(expected_tokens)

    @precondition(lambda self: self.store.tables)
    @rule(data=st.data(), token=st.integers(1, 2), num_tokens=st.integers(0, 10))
    def append(self, data, token, num_tokens):
        self.store.append(self.table(data), [token] * num_tokens)

    @precondition(lambda self: self.store.tables)
    @rule(data=st.data())
    def cut(self, data):
        table = self.table(data)
        self.store.cut(table, data.draw(st.integers(0, table.length)))

    @precondition(lambda self: self.store.tables)
    @rule(data=st.data())
    def fork(self, data):
        self.store.fork(self.table(data))

    @precondition(lambda self: any(table.length >= 3 for table in self.store.tables))
    @rule(data=st.data())
    def publish(self, data):
        table = data.draw(st.sampled_from([table for table in self.store.tables if table.length >= 3]))
        self.store.publish(table, data.draw(st.integers(0, table.length // 3 - 1)))

    @precondition(lambda self: any(table.length % 3 == 0 for table in self.store.tables))
    @rule(data=st.data(), token=st.integers(1, 2))
    def adopt(self, data, token):
        table = data.draw(st.sampled_from([table for table in self.store.tables if table.length % 3 == 0]))
        self.store.adopt(table, [token] * 3)

    @precondition(lambda self: self.store.tables)
    @rule(data=st.data())
    def close(self, data):
        self.store.close(self.table(data))

    @invariant()
    def pages_and_contents_are_right(self):
        self.store.check()


TestOperations = Operations.TestCase
TestOperations.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_more_than_fits_is_refused_and_changes_nothing():
    store = Store(num_pages=4, page_tokens=8)
    table = store.open()
    store.append(table, [1] * 20)
    with pytest.raises(OutOfPages, match="13 more tokens need 2 pages, 1 are free") as refusal:
        store.pool.append(table, 13)
    assert isinstance(refusal.value, CacheFull)
    store.check()
    store.append(table, [1] * 12)
    assert store.pool.num_free == 0
    store.check()


def test_a_fork_copies_what_it_writes_behind_and_the_last_holder_writes_in_place():
    store = Store(num_pages=8, page_tokens=4)
    table = store.open()
    store.append(table, [1] * 6)
    fork = store.fork(table)
    assert (store.pool.num_used, store.pool.num_shared) == (2, 2)
    first, tail = table.pages
    assert store.pool.pages_needed(fork, 1) == 1
    copies = store.pool.append(fork, 1)
    assert copies == [PageCopy(source_slot=tail * 4, target_slot=fork.pages[1] * 4, num_tokens=2)]
    store.copy(copies)
    store.write(fork, [7])
    assert store.pool.append(table, 1) == [] and table.pages == [first, tail]
    store.write(table, [8])
    assert store.read(fork)[-1] == 7 and (store.pool.num_used, store.pool.num_shared) == (3, 1)
    store.check()


def test_rolling_back_gives_pages_back():
    store = Store(num_pages=8, page_tokens=4)
    table = store.open()
    store.append(table, [1] * 32)
    store.cut(table, 9)
    assert store.pool.num_used == 3
    store.cut(table, 0)
    assert store.pool.num_used == 0
    store.check()


def test_sixteen_sessions_of_one_prefix_store_it_once():
    store = Store(num_pages=16 * 40, page_tokens=16)
    tables = [store.open(expected_tokens=600) for _ in range(16)]
    for _ in range(0, 512, 64):  # all at once, in chunks, as a server prefills
        for table in tables:
            store.append(table, [1] * 64)
            for index in range(table.length // 16 - 4, table.length // 16):
                store.publish(table, index)
    assert (store.pool.num_used, store.pool.num_shared) == (32, 32)
    store.check()
    for i, table in enumerate(tables):
        store.append(table, [2 + i])
    assert (store.pool.num_used, store.pool.num_shared) == (32 + 16, 32)
    store.check()
    assert all(len(table.runs()) <= 2 for table in tables)


def test_who_adopts_a_prefix_takes_no_page_for_it():
    store = Store(num_pages=40, page_tokens=16)
    tables = [store.open() for _ in range(16)]
    for table in tables:
        for index in range(32):
            if not store.adopt(table, [1] * 16):
                store.append(table, [1] * 16)
                store.publish(table, index)
        assert store.pool.num_used == 32
    store.check()


def test_what_was_given_back_can_be_adopted_until_its_place_is_needed():
    store = Store(num_pages=8, page_tokens=2)
    table = store.open()
    store.append(table, [1, 1])
    store.publish(table, 0)
    store.close(table)
    assert store.pool.num_free == 8

    table = store.open()
    assert store.adopt(table, [1, 1]) and store.pool.num_free == 7
    store.check()
    store.close(table)

    other = store.open()
    store.append(other, [2] * 16)
    store.close(other)
    assert not store.adopt(store.open(), [1, 1])


def test_what_was_given_back_outlives_sessions_that_fit_elsewhere():
    store = Store(num_pages=64, page_tokens=2)
    table = store.open(expected_tokens=16)
    store.append(table, [1] * 8)
    for index in range(4):
        store.publish(table, index)
    store.close(table)
    for token in range(2, 9):  # 7 more sessions of 8 pages each, one after another, fill the pool once
        other = store.open(expected_tokens=16)
        store.append(other, [token] * 16)
        store.close(other)
    again = store.open(expected_tokens=16)
    assert all(store.adopt(again, [1, 1]) for _ in range(4))
    store.append(again, [1] * 8)
    store.check()
    assert len(again.runs()) == 1


def test_a_name_that_nobody_holds_goes_to_the_page_that_lies_better():
    store = Store(num_pages=8, page_tokens=2)
    gone = store.open(expected_tokens=2)
    store.append(gone, [1, 1])
    store.publish(gone, 0)
    table = store.open(expected_tokens=4)
    store.append(table, [1, 1, 2, 2])
    pages = list(table.pages)
    store.close(gone)
    assert not store.publish(table, 0) and table.pages == pages
    other = store.open()
    assert store.adopt(other, [1, 1]) and other.pages == pages[:1]
    store.check()


def test_a_page_has_one_name():
    pool = PagePool(num_pages=2, page_tokens=1)
    table, other = pool.open(), pool.open()
    pool.append(table, 1)
    pool.publish(table, 0, b"old")
    pool.publish(table, 0, b"new")
    assert not pool.adopt(other, b"old") and pool.adopt(other, b"new")


def test_a_published_page_that_changes_is_found_no_more():
    store = Store(num_pages=8, page_tokens=4)
    table = store.open()
    store.append(table, [1] * 4)
    store.publish(table, 0)
    store.cut(table, 2)
    other = store.open()
    assert store.adopt(other, [1] * 4)
    store.append(table, [2])  # copies: the other one holds the page
    assert store.read(other) == store.expected[other]
    store.close(other)

    table = store.open()
    assert store.adopt(table, [1] * 4)
    store.cut(table, 2)
    store.append(table, [2])  # in place: nobody else holds the page
    assert not store.adopt(store.open(), [1] * 4)
    store.check()


def test_the_runs_of_a_part_end_where_it_ends():
    pool = PagePool(num_pages=10, page_tokens=4)
    table, wall = pool.open(expected_tokens=8), pool.open(expected_tokens=4)
    pool.append(table, 8)
    pool.append(wall, 4)
    pool.append(table, 5)
    assert table.runs() == [(0, 8), (12, 17)]
    assert table.runs(0) == [] and table.runs(8) == [(0, 8)] and table.runs(9) == [(0, 8), (12, 13)]


@pytest.mark.parametrize("expected_tokens", [0, 1024], ids=["of unknown length", "of known length"])
def test_a_few_sessions_that_grow_step_by_step_in_a_half_empty_pool_are_one_run_each(expected_tokens):
    pool = PagePool(num_pages=512, page_tokens=16)  # 4 sessions of 1024 tokens fill half of it
    tables = [pool.open(expected_tokens) for _ in range(4)]
    for i, table in enumerate(tables):
        pool.append(table, 10 + 100 * i)
    while any(table.length < 1024 for table in tables):
        for table in tables:
            pool.append(table, min(1, 1024 - table.length))
    assert pool.num_used == 256 and all(len(table.runs()) == 1 for table in tables)


@given(st.data())
@settings(deadline=None)
def test_sessions_that_become_as_long_as_expected_are_one_run_each_even_if_they_fill_the_pool(data):
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    pool = PagePool(num_pages=sum(-(-length // 4) for length in lengths), page_tokens=4)
    tables = [pool.open(expected_tokens=length) for length in lengths]
    while growing := [table for table in tables if table.length < table.expected_tokens]:
        table = data.draw(st.sampled_from(growing))
        pool.append(table, data.draw(st.integers(1, table.expected_tokens - table.length)))
    assert pool.num_free == 0 and all(len(table.runs()) == 1 for table in tables)


def test_a_session_that_takes_the_place_of_another_leaves_its_neighbour_room_to_grow():
    pool = PagePool(num_pages=12, page_tokens=1)
    neighbour, gone, table = pool.open(expected_tokens=8), pool.open(expected_tokens=4), pool.open(expected_tokens=4)
    pool.append(neighbour, 1)
    pool.append(gone, 4)
    pool.close(gone)
    pool.append(table, 4)
    pool.append(neighbour, 7)
    assert (neighbour.runs(), table.runs()) == ([(0, 8)], [(8, 12)])


def test_a_pool_without_pages_is_refused():
    for num_pages, page_tokens in [(0, 16), (-1, 16), (16, 0)]:
        with pytest.raises(ValueError, match="a pool needs pages"):
            PagePool(num_pages, page_tokens)
