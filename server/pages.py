"""The places of the KV cache: which pages hold the tokens of which sequence.

A page has room for `page_tokens` tokens of one sequence in all blocks of the server. A slot is one token's place,
`page * page_tokens + offset`; adjacent pages are adjacent slots, so a run of them is one slice of the store. This is
bookkeeping only, for one thread: keys and values lie elsewhere, and whoever moves them follows what is said here.
"""

from __future__ import annotations

from dataclasses import dataclass

from swarm.errors import CacheFull


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
    """How long the sequence may become, as far as is known; 0 if it is not."""
    length: int = 0
    """Tokens for which there is room; the pages hold no more than the last one partly empty."""
    pages: list[int] = None  # type: ignore[assignment]

    def runs(self, length: int | None = None) -> list[tuple[int, int]]:
        """Return the slots [start, end) that hold the first `length` tokens (all by default), in order, as few runs
        as possible."""
        raise NotImplementedError


class PagePool:
    """All pages of a server and who holds them."""

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.num_free = num_pages
        """Pages that no table holds."""

    @property
    def num_used(self) -> int:
        """Pages that tables hold, each counted once."""
        return self.num_pages - self.num_free

    @property
    def num_shared(self) -> int:
        """Pages that more than one table holds."""
        raise NotImplementedError

    def open(self, expected_tokens: int = 0) -> PageTable:
        """Return a table of no tokens, which holds no page.

        Args:
            expected_tokens: how long the sequence may become, 0 if unknown. Nothing is reserved: it decides only where
                the sequence is placed, so that it can grow without being cut into several runs.
        """
        raise NotImplementedError

    def close(self, table: PageTable) -> None:
        """Give back all pages of a table, which must not be used again."""
        raise NotImplementedError

    def fork(self, table: PageTable) -> PageTable:
        """Return another table of the same tokens; both share their pages until one of them writes."""
        raise NotImplementedError

    def pages_needed(self, table: PageTable, num_tokens: int) -> int:
        """Return how many free pages `append` would take now."""
        raise NotImplementedError

    def append(self, table: PageTable, num_tokens: int) -> list[PageCopy]:
        """Make room for `num_tokens` more tokens behind those of the table.

        Returns: the copies to be made, in this order and before any token is written: a page that others share is
            copied before this table writes into it.
        Raises: OutOfPages: there are not enough free pages; nothing was changed.
        """
        raise NotImplementedError

    def cut(self, table: PageTable, length: int) -> None:
        """Forget all but the first `length` tokens; pages that hold none of them are given back."""
        raise NotImplementedError

    def publish(self, table: PageTable, index: int, key: bytes) -> bool:
        """Let other tables find page number `index` of the table, full and written, by the hash of what it holds.

        Args:
            key: stands for the page's content: equal keys, equal keys and values in every block, so it must cover all
                that they depend on: the tokens before, prompts, adapters.
        Returns: whether there was such a page already. Then the table took that one and gave back its own.
        """
        raise NotImplementedError

    def adopt(self, table: PageTable, key: bytes) -> bool:
        """Let the published page of this key hold the next `page_tokens` tokens of the table, which has only full pages.

        Takes no page if another table holds it at present, one that counted as free otherwise: a published page that
        is given back keeps its key until its place is needed. What was adopted need not be computed, and may be
        written again with the same content.

        Returns: whether there is such a page.
        """
        raise NotImplementedError
