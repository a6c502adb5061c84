"""Decoding on CUDA without Python between kernels: a pass is recorded once as a graph and replayed with other numbers.

A pass of single tokens is the same kernels in the same order whatever the tokens are, if all that differs lies in
tensors: hidden states, positions, slots, lengths and pages. These are static; rows that a pass does not need are filled
up with a token that writes to slots that no sequence has. What is recorded is the library's own modules.

It has not been run on a GPU yet: CPU tests replay by calling again what was recorded.
"""

# T tokens of the row, with those that fill it up, D hidden, P pages

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from swarm.model import families
from swarm.model.edits import Edits
from swarm.model.kv_store import KVStore
from swarm.model.paged import PAGE_TOKENS, PagedRow, Pager
from swarm.model.pieces import Piece, position_ids
from swarm.model.span import Span
from swarm.model.staging import Block, Field

logger = logging.getLogger(__name__)

MAX_ROWS = 128
"""With more tokens, launching kernels no longer takes longer than running them."""

MAX_PIECE_TOKENS = 16
"""Each token of a piece reads its sequence for itself here, which pays for the few of a draft."""

MAX_GRAPHS = 16
"""Sizes that are recorded; the memory of one is a pass's, and they share it."""

LEAST_PAGES, PAGES_FACTOR = 16, 4
"""Widths of page tables are these pages, this times as many, and so on: a wide one costs little, a recording much."""

_ALLOWED_ERROR = 0.05
"""How far what a replay adds to the hidden states may be from what the modules add, relative to it: products of
another number of rows are rounded in another order, and that over all blocks. Wrong numbers change all of it."""


class Rows(Protocol):
    """Runs rows through the modules of a span, over one store."""

    def of_pieces(self, x_TD: Tensor, pieces: Sequence[Piece], edits: Edits | None = None) -> Tensor:
        """Run any pieces; [T, D]."""

    def of_single_tokens(self, x_TD: Tensor, position_ids_T: Tensor, slots_T: Tensor, paged: PagedRow) -> Tensor:
        """Run tokens each of which is the last one of a sequence, all of it said by tensors on the device; [T, D]."""


class Recorder(Protocol):
    """Records what the device does, so that it can be done again."""

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return what does the same to the same memory again, and returns the tensor that then has the result.

        Raises: RuntimeError: it cannot be recorded.
        """


class CudaRecorder:
    """CUDA graphs; all of them share the memory for what is computed between."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """See Recorder."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()  # libraries prepare themselves at their first call, which cannot be recorded
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may use the device meanwhile, for uploads.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            y_TD = run()

        def replay() -> Tensor:
            graph.replay()
            return y_TD

        return replay


class Size(NamedTuple):
    """What a recording has room for."""

    num_rows: int
    num_pages: int
    """Of each sequence."""


@dataclass(frozen=True, slots=True, eq=False)
class _Recorded:
    inputs: Block
    """x_TD, position_ids_T, slots_T, seqused_k, block_table, where the recording reads them."""
    replay: Callable[[], Tensor]


class GraphedBlocks:
    """The blocks of a packed span, for rows of few tokens, as decoding has; see FastPath."""

    def __init__(
        self, rows: Rows, store: KVStore, pager: Pager, hidden_size: int, dtype: torch.dtype, recorder: Recorder
    ) -> None:
        """Ask for one by `graphed_blocks`, which knows whether it can be used."""
        assert store.num_slots % PAGE_TOKENS == 0 and store.scrap_slots >= PAGE_TOKENS >= MAX_ROWS
        self._rows = rows
        self._store = store
        self._pager = pager
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._recorder = recorder
        self._recorded: dict[Size, _Recorded] = {}
        self.has_failed = False
        """Whether a size could not be recorded; none is tried after that."""

    def takes(self, pieces: Sequence[Piece]) -> bool:
        """See FastPath: few tokens, all sequences on whole pages, a size that is recorded or can be."""
        if sum(piece.length for piece in pieces) > MAX_ROWS or any(piece.length > MAX_PIECE_TOKENS for piece in pieces):
            return False
        tables = [self._pager.pages(piece) for piece in pieces]
        known = [pages for pages in tables if pages is not None]
        if len(known) < len(tables):
            return False
        may_record = len(self._recorded) < MAX_GRAPHS and not self.has_failed
        return may_record or self._size(pieces, known) in self._recorded

    def __call__(self, x_TD: Tensor, position_ids_1T: Tensor, pieces: Sequence[Piece]) -> Tensor:
        """See FastPath."""
        tables = [self._pager.pages(piece) or [] for piece in pieces]
        size = self._size(pieces, tables)
        recorded = self._recorded.get(size) or self._record(size)
        recorded.inputs.load(self._filled_up(x_TD, position_ids_1T[0], pieces, tables, size))
        return recorded.replay()[: x_TD.shape[0]].clone()  # the next pass writes there

    def _size(self, pieces: Sequence[Piece], tables: Sequence[Sequence[int]]) -> Size:
        num_rows = sum(piece.length for piece in pieces)
        num_pages = LEAST_PAGES
        while num_pages < max(map(len, tables)):
            num_pages *= PAGES_FACTOR
        return Size(1 << (num_rows - 1).bit_length(), num_pages)

    def _record(self, size: Size) -> _Recorded:
        device = self._store.layout.device
        inputs = Block(
            [
                Field((size.num_rows, self._hidden_size), self._dtype),
                Field((size.num_rows,), torch.int64),
                Field((size.num_rows,), torch.int64),
                Field((size.num_rows,), torch.int32),
                Field((size.num_rows, size.num_pages), torch.int32),
            ],
            device,
        )
        nothing = torch.zeros(0, self._hidden_size, dtype=self._dtype), torch.zeros(0, dtype=torch.int64)
        inputs.load(self._filled_up(*nothing, [], [], size))  # so that recording disturbs nobody
        x_TD, position_ids_T, slots_T, seqused_k, block_table = inputs.tensors
        planned = self._pager.single_tokens(seqused_k, block_table)
        paged = planned.with_tensors([tensor.to(device) for tensor in planned.tensors])

        def run() -> Tensor:
            return self._rows.of_single_tokens(x_TD, position_ids_T, slots_T, paged)

        try:
            replay = self._recorder.record(run)
        except RuntimeError as exc:
            logger.warning("passes of %d tokens are not recorded: decoding takes longer: %s", size.num_rows, exc)
            self.has_failed, replay = True, run
        self._recorded[size] = _Recorded(inputs, replay)
        return self._recorded[size]

    def _filled_up(
        self,
        x_TD: Tensor,
        position_ids_T: Tensor,
        pieces: Sequence[Piece],
        tables: Sequence[Sequence[int]],
        size: Size,
    ) -> list[Tensor]:
        """The inputs of a recording. To the kernel each token is the last one of a sequence of its own: all are in
        their slots before any is looked at."""
        num_more = size.num_rows - x_TD.shape[0]
        slots = list(itertools.chain.from_iterable(piece.slots_from(piece.position) for piece in pieces))
        seqused = [num_keys for piece in pieces for num_keys in range(piece.position + 1, piece.num_keys + 1)]
        scrap = self._store.num_slots
        table = torch.zeros(size.num_rows, size.num_pages, dtype=torch.int32)
        table[len(slots) :, 0] = scrap // PAGE_TOKENS
        row = 0
        for piece, pages in zip(pieces, tables, strict=True):
            table[row : row + piece.length, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
            row += piece.length
        return [
            F.pad(x_TD, (0, 0, 0, num_more)),
            F.pad(position_ids_T, (0, num_more)),
            torch.tensor(slots + list(range(scrap, scrap + num_more))),
            torch.tensor(seqused + [1] * num_more, dtype=torch.int32),
            table,
        ]


def graphed_blocks(
    span: Span, store: KVStore, pager: Pager | None, over: Callable[[KVStore, Pager | None], Rows]
) -> GraphedBlocks | None:
    """Return what decodes through a span, if the device can record it and replays what the modules compute.

    Args:
        over: what runs rows of this span over a store.
    """
    has_room = store.num_slots % PAGE_TOKENS == 0 and store.scrap_slots >= PAGE_TOKENS
    # Parts of a span are for few, and each would have memory of its own. Blocks that choose experts wait for the
    # device, which cannot be recorded.
    if pager is None or not has_room or span.blocks != store.layout.blocks:
        return None
    if span.anatomy.model_type not in families.WHOLE:
        return None
    recorder = CudaRecorder(store.layout.device)
    try:
        is_same, reason = replays_the_same(span, store, pager, over, recorder), "they give other results"
    except RuntimeError as exc:
        is_same, reason = False, str(exc)
    if not is_same:
        logger.warning("passes are not recorded, so that decoding takes longer: %s", reason)
        return None
    return GraphedBlocks(over(store, pager), store, pager, span.hidden_size, span.dtype, recorder)


BEGUN = (Piece(300, 0, [(512, 812)]), Piece(5, 0, [(0, 5)]), Piece(1, 0, [(256, 257)]))
CONTINUED = (
    (Piece(1, 300, [(512, 813)]), Piece(2, 5, [(0, 7)]), Piece(1, 1, [(256, 258)])),
    (Piece(1, 7, [(0, 8)]), Piece(1, 2, [(256, 259)]), Piece(1, 301, [(512, 814)])),
)
"""Two passes of one size, the second one with rows that fill it up."""


def replays_the_same(
    span: Span,
    store: KVStore,
    pager: Pager,
    over: Callable[[KVStore, Pager | None], Rows],
    recorder: Recorder,
) -> bool:
    """Whether replayed passes over a small store give what the modules give.

    Raises: RuntimeError: the device cannot record them.
    """
    tiny = KVStore(store.layout, 4 * PAGE_TOKENS, scrap_slots=PAGE_TOKENS)
    pager = pager.over(tiny)
    rows, seeded = over(tiny, pager), torch.Generator().manual_seed(0)
    graphed = GraphedBlocks(rows, tiny, pager, span.hidden_size, span.dtype, recorder)

    def hidden(pieces: Sequence[Piece]) -> Tensor:
        num_tokens = sum(piece.length for piece in pieces)
        return torch.randn(num_tokens, span.hidden_size, generator=seeded).to(span.dtype)

    with torch.inference_mode():
        rows.of_pieces(hidden(BEGUN), BEGUN)
        for pieces in CONTINUED:
            x_TD = hidden(pieces)
            wanted = rows.of_pieces(x_TD, pieces).float().cpu()
            found = graphed(x_TD, position_ids(pieces).unsqueeze(0), pieces).float().cpu()
            added = (wanted - x_TD.float()).norm(dim=1)
            if not bool(((found - wanted).norm(dim=1) <= _ALLOWED_ERROR * added).all()):
                return False
    return not graphed.has_failed
