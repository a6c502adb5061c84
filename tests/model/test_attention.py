"""Attention over slots equals a plain loop over tokens, in place or by pages, at lengths where kernels take turns."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from marks import needs_compiled
from torch import Tensor
from transformers.masking_utils import chunked_causal_mask_function, sliding_window_causal_mask_function

from swarm.model import kernels, singles
from swarm.model.attention import RowAttention
from swarm.model.kv_store import KVLayout, KVShape, KVStore
from swarm.model.paged import PAGE_TOKENS, PagedAttention, as_pages, can_page, plan_paged
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
)


def page_by_page(
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
) -> Tensor:
    """What `varlen_attn` says it does with a block table, by the plainest means."""
    assert query.is_contiguous() and key.stride(-1) == 1 and window_size[1] == 0
    assert all(t.dtype == torch.int32 for t in (cu_seq_q, cu_seq_k, seqused_k, block_table))
    assert enable_gqa == (query.shape[1] != key.shape[2])
    assert cu_seq_k.diff().tolist() == [block_table.shape[1] * key.shape[1]] * len(seqused_k)
    outputs = []
    for start, end, num_keys, pages in zip(cu_seq_q, cu_seq_q[1:], seqused_k, block_table, strict=False):
        assert end - start <= max_q and num_keys <= max_k
        keys, values = (
            pool[pages].flatten(0, 1)[:num_keys].repeat_interleave(query.shape[1] // key.shape[2], 1).transpose(0, 1)
            for pool in (key, value)
        )
        products = query[start:end].transpose(0, 1) @ keys.transpose(1, 2) * scale
        diagonal = int(num_keys - (end - start))
        seen = torch.ones_like(products[0], dtype=torch.bool).tril(diagonal)
        if window_size[0] >= 0:
            seen = seen.triu(diagonal - window_size[0])
        weights = products.masked_fill(~seen, -math.inf).softmax(-1)
        outputs.append((weights @ values).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("num_heads", [2, 6])
@pytest.mark.parametrize("window", [None, WINDOW])
def test_paged_arguments_say_what_attention_in_place_does(num_heads: int, window: int | None) -> None:
    store = open_store(2048)
    q_1MTH = torch.randn(1, num_heads, sum(piece.length for piece in PAGED), HEAD_DIM)
    keys, values = store.heads(0)
    plan = plan_paged(PAGED, window, store)
    assert plan is not None and plan.block_table.tolist() == [[2, 3, 0], [4, 0, 0], [6, 7, 0]]
    assert plan.window_size == ((-1, 0) if window is None else (window - 1, 0))
    paged = page_by_page(**plan.arguments(q_1MTH, keys, values, 0.25))
    function = None if window is None else sliding_window_causal_mask_function(window)
    in_place = RowAttention(PAGED, function, store)(q_1MTH, keys, values, Scores(0.25))
    torch.testing.assert_close(paged.unsqueeze(0), in_place, atol=1e-5, rtol=0)


def test_the_kernel_takes_the_paged_arguments() -> None:
    store = open_store(2048, torch.bfloat16, "meta")  # its memory has the order that it has on a GPU
    plan, (keys, values) = plan_paged(PAGED, WINDOW, store), store.heads(0)
    assert isinstance(plan, PagedAttention)
    assert as_pages(keys).is_contiguous() and as_pages(keys).shape == (8, PAGE_TOKENS, NUM_KV_HEADS, HEAD_DIM)
    num_tokens = sum(piece.length for piece in PAGED)
    q_1MTH = torch.empty(1, 6, num_tokens, HEAD_DIM, dtype=torch.bfloat16, device="meta")
    assert plan(q_1MTH, keys, values, 0.25).shape == (1, num_tokens, 6, HEAD_DIM)


@pytest.mark.parametrize(
    "piece",
    [
        Piece(1, 9, [(100, 110)]),
        Piece(1, 9, [(0, 5), (256, 261)]),
        Piece(1, 9, [(2048, 2058)]),
        Piece(1, 9, [(0, 10)], key_mask_T=torch.ones(10, dtype=torch.bool)),
    ],
)
def test_sequences_off_whole_pages_or_padded_are_not_read_by_pages(piece: Piece) -> None:
    assert plan_paged([PAGED[1], piece], None, open_store(2100)) is None


def test_pages_are_for_gpus_only() -> None:
    assert not can_page(open_store(1024, torch.bfloat16))


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
