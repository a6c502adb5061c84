"""The places of the KV cache: which pages hold the tokens of which sequence.

A page has room for `page_tokens` tokens of one sequence in all blocks of the server. A slot is one token's place,
`page * page_tokens + offset`; adjacent pages have adjacent slots, so a run of them is one slice of the store. This is
bookkeeping only, for one thread: keys and values lie elsewhere, and whoever moves them follows what is said here.

Pages that several sequences have in common are held by several tables and copied before one of them is written into.
A page whose content has a name (`publish`) can be found by that name, even after its last holder has given it back,
until its place is needed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from swarm.errors import CacheFull

GAP = re.compile(rb"\0+")


class OutOfPages(CacheFull):
    """The pool has fewer free pages than the call needs; nothing was changed."""


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Tokens to be copied from one page to another, in every block, before any token of the step is written."""

    source_slot: int
    target_slot: int
    num_tokens: int


@dataclass(slots=True, eq=False)
class PageTable:
    """The pages of one sequence, in order. To be read by all, changed by its pool only."""

    page_tokens: int
    expected_tokens: int
    """How long the sequence may become, 0 if that is unknown."""
    length: int = 0
    """Tokens that have a place; only the last page may have room for more."""
    pages: list[int] = field(default_factory=list)
    _page_runs: list[tuple[int, int]] | None = field(default=None, repr=False)
    """Slots of adjacent pages; None: to be computed anew."""

    def runs(self, length: int | None = None) -> list[tuple[int, int]]:
        """Return the slots [start, end) of the first `length` tokens (of all, if None), in order, in as few runs as
        there are."""
        missing = self.length if length is None else length
        assert 0 <= missing <= self.length, f"{missing} tokens of a sequence of {self.length}"
        if self._page_runs is None:
            self._page_runs = self._join_pages()
        runs = []
        for start, end in self._page_runs:
            if missing <= 0:
                break
            runs.append((start, min(end, start + missing)))
            missing -= end - start
        return runs

    def _join_pages(self) -> list[tuple[int, int]]:
        breaks = [i for i in range(1, len(self.pages)) if self.pages[i] != self.pages[i - 1] + 1]
        bounds = zip([0, *breaks], [*breaks, len(self.pages)], strict=True)
        size = self.page_tokens
        return [(self.pages[i] * size, (self.pages[j - 1] + 1) * size) for i, j in bounds if i < j]


class PagePool:
    """All pages of a server and who holds them."""

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        if num_pages < 1 or page_tokens < 1:
            raise ValueError(f"a pool needs pages with room for tokens: {num_pages} pages of {page_tokens} tokens")
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.num_free = num_pages
        """Pages that no table holds; also those that can still be found by their key."""
        self.num_shared = 0
        """Pages that more than one table holds."""
        self.num_releases = 0
        """How often a page has come free so far."""
        self._num_holders = [0] * num_pages
        self._is_held = bytearray(num_pages)
        """1 where a page has holders: the gaps between them are found by a search for zeros."""
        self._keys: list[bytes | None] = [None] * num_pages
        self._published: dict[bytes, int] = {}
        self._tables: dict[PageTable, None] = {}
        self._cursor = 0
        """Where the newest run, grown as expected, ends."""

    @property
    def num_used(self) -> int:
        """Pages that tables hold, each counted once."""
        return self.num_pages - self.num_free

    def open(self, expected_tokens: int = 0) -> PageTable:
        """Return a table of no tokens, which holds no page.

        Args:
            expected_tokens: how long the sequence may become, 0 if that is unknown. Nothing is reserved: it decides
                only where the sequence lies, so that it and its neighbours can grow in one run.
        """
        table = PageTable(self.page_tokens, expected_tokens)
        self._tables[table] = None
        return table

    def close(self, table: PageTable) -> None:
        """Give back all pages of a table, which cannot be used again."""
        self.cut(table, 0)
        del self._tables[table]

    def fork(self, table: PageTable) -> PageTable:
        """Return another table of the same tokens; both share their pages until one of them writes."""
        for page in table.pages:
            self._hold(page)
        twin = PageTable(self.page_tokens, table.expected_tokens, table.length, list(table.pages))
        self._tables[twin] = None
        return twin

    def pages_needed(self, table: PageTable, num_tokens: int) -> int:
        """Return how many free pages `append` would take now."""
        num_new = -(-(table.length + num_tokens) // self.page_tokens) - len(table.pages)
        return num_new + 1 if num_tokens and self._is_tail_shared(table) else num_new

    def append(self, table: PageTable, num_tokens: int) -> list[PageCopy]:
        """Give places to `num_tokens` more tokens.

        Returns: copies to be made in this order, and before any token is written: what others hold as well is copied
            before this table writes behind it. At most one.
        Raises: OutOfPages: there are not enough free pages; nothing was changed.
        """
        assert num_tokens >= 0, f"{num_tokens} more tokens"
        needed = self.pages_needed(table, num_tokens)
        if needed > self.num_free:
            raise OutOfPages(f"{num_tokens} more tokens need {needed} pages, {self.num_free} are free")
        copies = []
        if num_tokens and self._is_tail_shared(table):
            source = table.pages.pop()
            self._extend(table, needed)
            self._release(source)
            source_slot, target_slot = source * self.page_tokens, table.pages[-needed] * self.page_tokens
            copies.append(PageCopy(source_slot, target_slot, table.length % self.page_tokens))
        else:
            if num_tokens and table.length % self.page_tokens:
                self._unpublish(table.pages[-1])
            self._extend(table, needed)
        table.length += num_tokens
        return copies

    def cut(self, table: PageTable, length: int) -> None:
        """Forget all but the first `length` tokens; pages that hold none of these are given back."""
        assert 0 <= length <= table.length, f"{length} tokens of a sequence of {table.length}"
        num_kept = -(-length // self.page_tokens)
        while len(table.pages) > num_kept:
            self._release(table.pages.pop())
        table.length = length

    def publish(self, table: PageTable, index: int, key: bytes) -> bool:
        """Let page number `index` of the table, which is full and written, be found by the name of its content.

        If another table holds a page of this name, this table takes that one and gives back its own.

        Args:
            key: tells apart all that keys and values depend on: tokens of the page and before it, prompts, adapters.
        Returns: whether the table has another page now.
        """
        assert (index + 1) * self.page_tokens <= table.length, f"page {index} of a sequence of {table.length} tokens"
        page, known = table.pages[index], self._published.get(key)
        if known == page:
            return False
        if known is not None and self._is_held[known]:
            self._hold(known)
            self._release(page)
            table.pages[index] = known
            table._page_runs = None
            return True
        if known is not None:
            self._unpublish(known)
        self._unpublish(page)
        self._published[key] = page
        self._keys[page] = key
        return False

    def adopt(self, table: PageTable, key: bytes) -> bool:
        """Let the published page of this name hold the next `page_tokens` tokens of a table of full pages.

        These tokens need not be written (if they are, then with what is there already). A page that nobody held counts
        as used from now on.

        Returns: whether there is such a page.
        """
        assert table.length == len(table.pages) * self.page_tokens, "the last page has room for more tokens"
        page = self._published.get(key)
        if page is None:
            return False
        self._hold(page)
        table.pages.append(page)
        table.length += self.page_tokens
        table._page_runs = None
        return True

    def _is_tail_shared(self, table: PageTable) -> bool:
        """Whether the next token goes into a page that others hold as well."""
        return table.length % self.page_tokens > 0 and self._num_holders[table.pages[-1]] > 1

    def _hold(self, page: int) -> None:
        self._num_holders[page] += 1
        self.num_shared += self._num_holders[page] == 2
        if not self._is_held[page]:
            self._is_held[page] = 1
            self.num_free -= 1

    def _release(self, page: int) -> None:
        self._num_holders[page] -= 1
        self.num_shared -= self._num_holders[page] == 1
        if not self._num_holders[page]:
            self._is_held[page] = 0
            self.num_free += 1
            self.num_releases += 1

    def _unpublish(self, page: int) -> None:
        """Forget the name of a page whose content changes; it may have none."""
        key = self._keys[page]
        if key is not None:
            del self._published[key]
            self._keys[page] = None

    def _extend(self, table: PageTable, count: int) -> None:
        """Add `count` free pages, each next to the one before where that is free."""
        if not count:
            return
        pages, starts = table.pages, list[int]()
        for missing in range(count, 0, -1):
            page = pages[-1] + 1 if pages else self.num_pages
            if page >= self.num_pages or self._is_held[page]:
                starts = starts or self._place_runs(table, missing)
                page = starts.pop()
            self._unpublish(page)
            self._hold(page)
            pages.append(page)
        table._page_runs = None

    def _place_runs(self, table: PageTable, count: int) -> list[int]:
        """Return where the next `count` pages of a table, and those expected later, may begin, the best place last.

        If they fit into a gap, behind what its left neighbour is expected to need, that is the only place. Runs are
        laid round the pool, so that what was given back last keeps its content longest. If they fit nowhere, parts of
        gaps are taken, the largest first, that leave the neighbour half of its gap.
        """
        wanted = max(count, self._expected_growth(table))
        neighbours = {other.pages[-1] + 1: other for other in self._tables if other.pages}
        fitting, parts = -1, []
        for gap in GAP.finditer(self._is_held):
            first, end = gap.span()
            neighbour = neighbours.get(first)
            start = first if neighbour is None else first + self._expected_growth(neighbour)
            ahead = max(start, self._cursor)
            if end - ahead >= wanted:
                fitting = ahead
                break
            if fitting < 0 and end - start >= wanted:
                fitting = start
            start = max(first, min(start, (first + end + 1) // 2, end - count))
            parts.append((end - start, start))
        if fitting < 0:
            return [start for _, start in sorted(parts)[-count:]]
        self._cursor = fitting + wanted
        return [fitting]

    def _expected_growth(self, table: PageTable) -> int:
        """How many more pages a table may need."""
        if not table.expected_tokens:
            return self.num_pages
        return max(0, -(-table.expected_tokens // self.page_tokens) - len(table.pages))
