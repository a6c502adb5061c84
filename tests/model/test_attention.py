"""Attention over slots equals a plain loop over tokens, in place or by pages, at lengths where kernels take turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from marks import needs_compiled
from packing import page_by_page
from torch import Tensor
from transformers.masking_utils import chunked_causal_mask_function, sliding_window_causal_mask_function

from swarm.model import kernels, paged, singles
from swarm.model.attention import RowAttention
from swarm.model.kv_store import KVLayout, KVShape, KVStore
from swarm.model.paged import (
    PAGE_TOKENS,
    SINGLE_SPLITS,
    Kernel,
    Pager,
    as_pages,
    can_page,
    computes_the_same,
    open_pager,
)
from swarm.model.pieces import Piece
from swarm.model.sights import MaskFunction
from swarm.model.singles import Scores
from swarm.ranges import BlockRange

NUM_KV_HEADS, HEAD_DIM = 2, 16
WINDOW = 40


def open_store(num_slots: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> KVStore:
    """A store of one block, full of random numbers."""
    shape = KVShape(NUM_KV_HEADS, HEAD_DIM, HEAD_DIM)
    store = KVStore(KVLayout(BlockRange(0, 1), (shape,), dtype, torch.device(device)), num_slots)
    for heads in store.heads(0):
        heads.normal_()
    return store


def loop(pieces: Sequence[Piece], q_1MTH: Tensor, store: KVStore, window: int | None, scores: Scores) -> Tensor:
    """The oracle: one token and one head after the other."""
    rows = []
    for piece in pieces:
        slots = list(piece.slots_from(0))
        keys_KNH, values_KNH = (heads[slots].float() for heads in store.block(0))
        for position in range(piece.position, piece.num_keys):
            seen = torch.arange(max(0, position + 1 - (window or position + 1)), position + 1)
            if piece.key_mask_T is not None:
                seen = seen[piece.key_mask_T[seen]] if piece.key_mask_T[seen].any() else torch.tensor([position])
            heads = []
            for head in range(q_1MTH.shape[1]):
                kv_head = head * NUM_KV_HEADS // q_1MTH.shape[1]
                products = keys_KNH[seen, kv_head] @ q_1MTH[0, head, len(rows)].float() * (scores.scaling or 1)
                if scores.softcap is not None:
                    products = torch.tanh(products / scores.softcap) * scores.softcap
                weights = products.exp()
                sink = 0.0 if scores.sinks_M is None else float(scores.sinks_M[head].exp())
                heads.append(weights @ values_KNH[seen, kv_head] / (weights.sum() + sink))
            rows.append(torch.stack(heads))
    return torch.stack(rows).unsqueeze(0)


PIECES = (
    Piece(1, 619, [(0, 620)]),
    Piece(3, 560, [(640, 1000), (1100, 1303)]),
    Piece(1, 4, [(1400, 1405)]),
    Piece(600, 0, [(1500, 2100)]),
    Piece(1, 9, [(2200, 2205), (2300, 2305)]),
    Piece(1, 30, [(2310, 2341)], key_mask_T=torch.arange(31) >= 7),
    Piece(5, 2, [(2400, 2407)], key_mask_T=torch.arange(7) >= 4),
)


@pytest.mark.parametrize("num_heads", [2, 6])
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("gather_bytes", [0, singles.GATHER_BYTES])
@pytest.mark.parametrize(
    "scores",
    [
        Scores(0.25),
        Scores(0.25, softcap=2.0),
        Scores(0.25, sinks_M=torch.linspace(-1, 2, 6)),
    ],
)
def test_attention_equals_a_loop(
    num_heads: int, window: int | None, gather_bytes: int, scores: Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(singles, "GATHER_BYTES", gather_bytes)
    store = open_store(2500)
    scores = scores._replace(sinks_M=None if scores.sinks_M is None else scores.sinks_M[:num_heads])
    q_1MTH = torch.randn(1, num_heads, sum(piece.length for piece in PIECES), HEAD_DIM)
    function = None if window is None else sliding_window_causal_mask_function(window)
    keys, values = store.heads(0)
    ours = RowAttention(PIECES, function, store)(q_1MTH, keys, values, scores)
    torch.testing.assert_close(ours, loop(PIECES, q_1MTH, store, window, scores), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_heads", [2, 6, 10])
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("own_kernel", [True, False])
def test_attention_in_half_precision_stays_close_to_a_loop(
    dtype: torch.dtype, num_heads: int, window: int | None, own_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(singles, "has_fast_floats", lambda: not own_kernel)
    store = open_store(2500, dtype)
    q_1MTH = torch.randn(1, num_heads, sum(piece.length for piece in PIECES), HEAD_DIM).to(dtype)
    function = None if window is None else sliding_window_causal_mask_function(window)
    keys, values = store.heads(0)
    ours = RowAttention(PIECES, function, store)(q_1MTH, keys, values, Scores(0.25))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.float(), loop(PIECES, q_1MTH, store, window, Scores(0.25)), atol=2e-2, rtol=0)


def test_chunks_are_counted_from_the_first_token_that_is_no_padding() -> None:
    store, chunk = open_store(64), 4
    function: MaskFunction = chunked_causal_mask_function(chunk, torch.zeros(1, dtype=torch.int64))
    padded = Piece(1, 9, [(0, 10)], key_mask_T=torch.arange(10) >= 3)  # tokens 3..6 and 7..9
    q_1MTH = torch.randn(1, 2, 1, HEAD_DIM)
    keys, values = store.heads(0)
    ours = RowAttention([padded], function, store)(q_1MTH, keys, values, Scores(0.25))
    expected = loop([Piece(1, 2, [(7, 10)])], q_1MTH, store, None, Scores(0.25))
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


PAGED = (
    Piece(1, 619, [(512, 1024), (0, 108)]),
    Piece(30, 0, [(1024, 1054)]),
    Piece(2, 299, [(1536, 1837)]),
    Piece(1, 1, [(1280, 1282)]),
)

OFF_PAGES = (
    Piece(1, 9, [(1100, 1110)]),
    Piece(1, 9, [(1310, 1315), (1400, 1405)]),
    Piece(3, 7, [(256, 266)], key_mask_T=torch.arange(10) >= 2),
    Piece(1, 9, [(2048, 2058)]),
)
"""Not on whole pages, padded, on a page that the store does not have in full."""


def attend_paged(
    pieces: Sequence[Piece], q_1MTH: Tensor, store: KVStore, window: int | None, kernel: Kernel = page_by_page
) -> Tensor:
    row, (keys, values) = Pager(store, kernel).plan(pieces), store.heads(0)
    function = None if window is None else sliding_window_causal_mask_function(window)
    rest = RowAttention(row.rest, function, store)
    return row.attend(q_1MTH, keys, values, 0.25, window, lambda q_1MTH: rest(q_1MTH, keys, values, Scores(0.25)))


@pytest.mark.parametrize("num_heads", [2, 6])
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize(
    "pieces",
    [PAGED, PAGED[::3], PAGED[1:3], (*OFF_PAGES[:2], *PAGED, *OFF_PAGES[2:]), OFF_PAGES],
    ids=["all kinds", "single tokens", "longer", "mixed with others", "others"],
)
def test_attention_by_pages_is_attention_in_place(pieces: Sequence[Piece], num_heads: int, window: int | None) -> None:
    store = open_store(2100)
    q_1MTH = torch.randn(1, num_heads, sum(piece.length for piece in pieces), HEAD_DIM)
    expected = loop(pieces, q_1MTH, store, window, Scores(0.25))
    torch.testing.assert_close(attend_paged(pieces, q_1MTH, store, window), expected, atol=1e-5, rtol=0)


def test_one_padded_sequence_leaves_the_others_on_their_pages() -> None:
    row = Pager(open_store(2100), page_by_page).plan([PAGED[0], *OFF_PAGES, PAGED[1], PAGED[3]])
    singles, longer = row.parts
    assert singles.block_table.tolist() == [[2, 3, 0], [5, 0, 0]] and longer.block_table.tolist() == [[4]]
    assert singles.rows_T is not None and singles.rows_T.tolist() == [0, 37] and singles.max_q == 1
    assert longer.rows_T is not None and longer.rows_T.tolist() == list(range(7, 37)) and longer.max_q == 30
    assert list(row.rest) == list(OFF_PAGES)
    assert row.rest_rows_T is not None and row.rest_rows_T.tolist() == [1, 2, 3, 4, 5, 6]


def test_what_the_kernel_is_told_of_a_token_does_not_depend_on_the_others() -> None:
    """The kernel divides a sequence by these alone: the longest possible one, and the number of parts."""
    pager, store = Pager(open_store(2100), page_by_page), open_store(2100)
    q_1MTH, (keys, values) = torch.zeros(1, 6, 40, HEAD_DIM), store.heads(0)
    told = []
    for pieces in ([PAGED[3]], PAGED, [PAGED[1], PAGED[3], OFF_PAGES[2]]):
        part = pager.plan(pieces).parts[0]
        arguments = part.arguments(q_1MTH, keys, values, 0.25, None)
        told.append([arguments[name] for name in ("max_q", "max_k", "window_size", "num_splits")])
    assert told == [[1, 2048, (-1, -1), SINGLE_SPLITS]] * 3
    longer = pager.plan(PAGED).parts[1]
    assert longer.arguments(q_1MTH, keys, values, 0.25, None)["num_splits"] == 1
    assert longer.arguments(q_1MTH, keys, values, 0.25, WINDOW)["window_size"] == (WINDOW - 1, 0)


def test_the_kernel_takes_the_paged_arguments() -> None:
    from torch.nn.attention.varlen import varlen_attn

    store = open_store(2048, torch.bfloat16, "meta")  # its memory has the order that it has on a GPU
    row, (keys, values) = Pager(store, varlen_attn).plan(PAGED), store.heads(0)
    row = row.with_tensors([tensor.to("meta") for tensor in row.tensors])
    assert as_pages(keys).is_contiguous() and as_pages(keys).shape == (8, PAGE_TOKENS, NUM_KV_HEADS, HEAD_DIM)
    num_tokens = sum(piece.length for piece in PAGED)
    q_1MTH = torch.empty(1, 6, num_tokens, HEAD_DIM, dtype=torch.bfloat16, device="meta")
    out_1TMH = row.attend(q_1MTH, keys, values, 0.25, WINDOW, lambda q_1MTH: q_1MTH)
    assert out_1TMH.shape == (1, num_tokens, 6, HEAD_DIM)


SHAPE = KVShape(NUM_KV_HEADS, HEAD_DIM, HEAD_DIM)


def one_block(device: str, dtype: torch.dtype = torch.bfloat16, shape: KVShape = SHAPE) -> KVLayout:
    return KVLayout(BlockRange(0, 1), (shape,), dtype, torch.device(device))


@pytest.mark.parametrize("capability, fits", [((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_pages_are_for_gpus_that_the_kernel_is_made_for(
    capability: tuple[int, int], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert can_page(one_block("cuda"), 6) == fits
    assert not can_page(one_block("cpu"), 6)
    assert not can_page(one_block("cuda", torch.float32), 6)
    assert not can_page(one_block("cuda"), 5)  # not a multiple of the key/value heads
    assert not can_page(one_block("cuda", shape=KVShape(2, 512, 512)), 6)
    assert not can_page(one_block("cuda", shape=KVShape(2, 16, 8)), 6)


def test_a_kernel_that_computes_something_else_is_found_out() -> None:
    def without_lengths(**arguments: Any) -> Tensor:
        whole = torch.full_like(arguments["seqused_k"], 256)
        return page_by_page(**{**arguments, "seqused_k": torch.minimum(arguments["seqused_k"], whole)})

    def without_window(**arguments: Any) -> Tensor:
        return page_by_page(**{**arguments, "window_size": (-1, 0)})

    def trial(kernel: Kernel) -> bool:
        return computes_the_same(kernel, SHAPE, 6, torch.float32, torch.device("cpu"))

    assert trial(page_by_page)
    assert not trial(without_lengths) and not trial(without_window)


def test_a_kernel_that_does_not_run_leaves_attention_as_it_was(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**arguments: Any) -> Tensor:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(paged, "can_page", lambda layout, num_heads: True)
    monkeypatch.setattr(paged, "_kernel", lambda: refuse)
    paged._is_same.cache_clear()
    assert open_pager(open_store(2048), 6) is None and open_pager(open_store(2048), 6) is None
    assert [record.message for record in caplog.records] == [
        "attention reads one sequence after the other: no kernel image is available"
    ]
    paged._is_same.cache_clear()
    monkeypatch.setattr(paged, "_kernel", lambda: page_by_page)
    assert open_pager(open_store(2048), 6) is not None
    paged._is_same.cache_clear()


@needs_compiled
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("num_groups, key_dim, value_dim", [(1, 16, 16), (3, 64, 32), (4, 32, 128), (9, 128, 128)])
def test_our_kernel_computes_softmax_attention_as_precisely_as_it_is_rounded(
    num_groups: int, key_dim: int, value_dim: int, num_threads: int
) -> None:
    sequences = [[(3, 4)], [(10, 73)], [(80, 144), (200, 203)], [(300, 301), (310, 329), (400, 900)]]
    q_TNGH = torch.randn(4, 2, num_groups, key_dim).to(torch.bfloat16)
    keys, values = (torch.randn(1, 2, 1000, size).to(torch.bfloat16) for size in (key_dim, value_dim))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        ours = kernels.attention(q_TNGH, keys, values, kernels.Runs(sequences), 0.3)
    finally:
        torch.set_num_threads(before)
    for runs, q_NGH, y_NGV in zip(sequences, q_TNGH, ours, strict=True):
        slots = [slot for start, end in runs for slot in range(start, end)]
        weights_NGK = (q_NGH.double() @ keys[0, :, slots].double().transpose(1, 2) * 0.3).softmax(-1)
        wanted = weights_NGK @ values[0, :, slots].double()
        assert ((y_NGV.double() - wanted).abs() <= wanted.abs() * 2**-8 + 1e-5).all()
        alone = kernels.attention(q_NGH[None], keys, values, kernels.Runs([runs]), 0.3)
        assert torch.equal(alone[0], y_NGV)


@needs_compiled
def test_our_kernel_takes_scores_of_any_size_and_keeps_what_is_not_a_number() -> None:
    keys, values = torch.zeros(2, 1, 1, 200, 16, dtype=torch.bfloat16)
    keys[0, 0, :, 0] = torch.linspace(-3e4, 3e4, 200)
    values[0, 0, :, 0] = torch.arange(200)
    q_TNGH = torch.zeros(1, 1, 4, 16, dtype=torch.bfloat16)
    q_TNGH[0, 0, :, 0] = torch.tensor([1.0, -1.0, 0.0, float("nan")])
    runs = kernels.Runs([[(0, 200)]])
    out_G = kernels.attention(q_TNGH, keys, values, runs, 1.0)[0, 0, :, 0].float()
    assert out_G[:3].tolist() == [199.0, 0.0, 99.5] and bool(out_G[3].isnan())
    assert kernels.attention(q_TNGH, keys, values, runs, 1.0)[0, 0, :, 1:].float().nan_to_num().abs().max() == 0
