"""Packed execution gives what one sequence at a time gives, for every type that claims it, and disturbs nothing."""

from __future__ import annotations

import pytest
import torch
from packing import NUM_SLOTS, History, make_span, packing_error
from tiny_configs import tiny_config
from torch import Tensor

from swarm.errors import BadRequest, UnsupportedModel
from swarm.model import families, singles
from swarm.model.kv_store import KVStore, kv_layout
from swarm.model.narrow import narrow
from swarm.model.ragged import PackedSpan, Piece, is_packable
from swarm.model.span import Span
from swarm.ranges import BlockRange

VARIED = ("deepseek_v3", "gemma2", "gpt_oss", "llama4_text", "mistral", "gemma4_text", "minimax_m2", "gpt2")
"""Types of all kinds of attention: latent, soft-capped, with sinks, chunked, windowed, of several head sizes."""


@pytest.mark.parametrize("model_type", sorted(families.PACKABLE))
def test_packed_equals_one_sequence_at_a_time(model_type: str) -> None:
    assert packing_error(model_type, BlockRange(1, 4)) <= 1e-4


@pytest.mark.parametrize("model_type", VARIED)
def test_long_sequences_are_read_in_place(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(singles, "GATHER_BYTES", 0)
    assert packing_error(model_type, BlockRange(0, 3)) <= 1e-4


def test_packable_types_are_verified_types() -> None:
    assert families.EXPANDED <= families.PACKABLE <= families.VERIFIED


@pytest.mark.parametrize("model_type", ["bloom", "mpt", "falcon", "qwen3_next", "jamba", "deepseek_v32", "gpt_neo"])
def test_states_beyond_keys_and_private_attention_are_not_packable(model_type: str) -> None:
    assert not is_packable(make_span(tiny_config(model_type)))


def test_a_config_may_ask_for_more_than_its_type_can() -> None:
    assert is_packable(make_span(tiny_config("minimax_m3_vl_text")))
    sparse = tiny_config("minimax_m3_vl_text")
    sparse.layer_types = ["minimax_m3_sparse"] * 4
    assert not is_packable(make_span(sparse))


@pytest.fixture(scope="module")
def span() -> Span:
    return make_span(tiny_config("llama"))


def open_packed(span: Span) -> PackedSpan:
    return PackedSpan(span, KVStore(kv_layout(span), NUM_SLOTS))


def hidden(length: int, span: Span, seed: int = 3) -> Tensor:
    return torch.randn(length, span.hidden_size, generator=torch.Generator().manual_seed(seed))


def gradient(span: Span, x_BLD: Tensor, prompts_NBPD: Tensor) -> tuple[Tensor, ...]:
    inputs = x_BLD.clone().requires_grad_(), prompts_NBPD.clone().requires_grad_()
    out_BLD = span(inputs[0], prompts_NBPD=inputs[1])
    return out_BLD.detach(), *torch.autograd.grad(out_BLD.pow(2).mean(), inputs)


def test_a_twin_leaves_the_span_as_it_was(span: Span) -> None:
    x_BLD = torch.randn(2, 6, span.hidden_size)
    implementation = span.config._attn_implementation
    with torch.no_grad():
        before = span(x_BLD, cache=span.new_cache(2))
        open_packed(span)(hidden(4, span), [Piece(4, 0, [(0, 4)])])
        assert torch.equal(span(x_BLD, cache=span.new_cache(2)), before)
    assert span.config._attn_implementation == implementation
    assert all(module.config is span.config for module in span.layers.modules() if hasattr(module, "config"))


def test_a_packed_call_in_the_middle_of_training_changes_neither(span: Span) -> None:
    packed, pieces = open_packed(span), [Piece(3, 0, [(0, 3)], prompts_NPD=torch.randn(4, 2, span.hidden_size))]
    x_BLD, x_LD, prompts = torch.randn(2, 5, span.hidden_size), hidden(3, span), torch.randn(4, 1, 3, span.hidden_size)
    expected, expected_packed = gradient(span, x_BLD, prompts), packed(x_LD, pieces)
    inner: list[Tensor] = []
    modules = [module for layer in span.layers for module in layer.modules()]
    handles = [module.register_forward_pre_hook(lambda *_: inner.append(packed(x_LD, pieces))) for module in modules]
    try:
        results = gradient(span, x_BLD, prompts)
    finally:
        for handle in handles:
            handle.remove()
    assert len(inner) == len(modules) > 40
    assert all(torch.equal(each, expected_packed) for each in inner)
    for ours, theirs in zip(results, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_training_and_other_rows_in_the_middle_of_a_packed_call_change_nothing(span: Span) -> None:
    packed, view = open_packed(span), narrow(span, BlockRange(1, 3))
    other = PackedSpan(view, KVStore(kv_layout(span), NUM_SLOTS))
    pieces = [Piece(3, 0, [(0, 3)], prompts_NPD=torch.randn(4, 2, span.hidden_size)), Piece(1, 0, [(8, 9)])]
    x_BLD, x_TD, prompts = torch.randn(2, 5, span.hidden_size), hidden(4, span), torch.randn(4, 1, 3, span.hidden_size)
    expected, trained = packed(x_TD, pieces), gradient(span, x_BLD, prompts)
    other_expected = other(x_TD[:2], [Piece(2, 0, [(0, 2)])])
    inner: list[Tensor] = []

    def run_others(*_: object) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            inner.extend(gradient(span, x_BLD, prompts))
        assert torch.equal(other(x_TD[:2], [Piece(2, 0, [(0, 2)])]), other_expected)

    handles = [packed.layers[index].register_forward_pre_hook(run_others) for index in (0, 2)]
    try:
        assert torch.equal(packed(x_TD, pieces), expected)
    finally:
        for handle in handles:
            handle.remove()
    assert len(inner) == 2 * len(trained)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(inner, trained * 2, strict=True))


def test_views_share_the_store_of_the_span(span: Span) -> None:
    store = KVStore(kv_layout(span), NUM_SLOTS)
    first, second = (PackedSpan(narrow(span, blocks), store) for blocks in (BlockRange(0, 1), BlockRange(1, 4)))
    piece, x_LD = Piece(5, 0, [(10, 15)]), hidden(5, span)
    y_LD = second(first(x_LD, [piece]), [piece])
    torch.testing.assert_close(y_LD, open_packed(span)(x_LD, [piece]), atol=1e-5, rtol=0)
    # What the views wrote, the whole goes on with.
    more = PackedSpan(span, store)(hidden(1, span, seed=4), [Piece(1, 5, [(10, 16)])])
    with torch.no_grad():
        expected = span(torch.cat([x_LD, hidden(1, span, seed=4)]).unsqueeze(0))[0, 5:]
    torch.testing.assert_close(more, expected, atol=1e-5, rtol=0)


def test_rolled_back_slots_are_written_again(span: Span) -> None:
    packed, history = open_packed(span), History(span, list(range(30)))
    with torch.no_grad():
        for length in (7, 1, 1):
            piece, _ = history.take(x_LD := hidden(length, span, seed=length))
            packed(x_LD, [piece])
        history.cache.rewind(6)
        history.length = 6
        piece, expected = history.take(x_LD := hidden(3, span, seed=9))
    torch.testing.assert_close(packed(x_LD, [piece]), expected, atol=1e-5, rtol=0)


def test_copied_slots_go_on_as_a_sequence_of_their_own(span: Span) -> None:
    store = KVStore(kv_layout(span), NUM_SLOTS)
    packed, histories = PackedSpan(span, store), [History(span, list(range(start, start + 20))) for start in (0, 50)]
    x_LD = hidden(6, span)
    with torch.no_grad():
        piece = histories[0].take(x_LD)[0]
        histories[1].take(x_LD)
        packed(x_LD, [piece])
        store.copy([(0, 50, 4), (4, 54, 2)])
        taken = [history.take(hidden(1, span, seed=seed)) for seed, history in enumerate(histories)]
    ours = packed(torch.cat([hidden(1, span, seed=seed) for seed in (0, 1)]), [piece for piece, _ in taken])
    torch.testing.assert_close(ours, torch.cat([expected for _, expected in taken]), atol=1e-5, rtol=0)


def test_what_one_sequence_holds_does_not_reach_another(span: Span) -> None:
    packed = open_packed(span)
    bad = torch.full((3, span.hidden_size), torch.inf)
    alone = packed(hidden(2, span), [Piece(2, 0, [(3, 5)])])
    packed(bad, [Piece(3, 0, [(0, 3)])])
    both = packed(
        torch.cat([bad[:1], hidden(1, span, seed=5)]), [Piece(1, 3, [(0, 3), (5, 6)]), Piece(1, 2, [(3, 5), (6, 7)])]
    )
    assert both[0].isnan().all() and both[1].isfinite().all() and alone.isfinite().all()


def test_half_precision_stays_close() -> None:
    span = make_span(tiny_config("llama"))
    expected = open_packed(span)(hidden(9, span), [Piece(8, 0, [(0, 8)]), Piece(1, 0, [(8, 9)])])
    half = make_span(tiny_config("llama"))
    half.to(torch.bfloat16)
    ours = open_packed(half)(hidden(9, span), [Piece(8, 0, [(0, 8)]), Piece(1, 0, [(8, 9)])])
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), expected, atol=0.05 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize(
    "piece",
    [
        Piece(0, 0, []),
        Piece(2, 0, [(0, 3)]),
        Piece(2, 1, [(0, 2)]),
        Piece(2, 0, [(NUM_SLOTS - 1, NUM_SLOTS + 1)]),
        Piece(2, 0, [(0, 2)], position_ids_L=torch.zeros(3, dtype=torch.int64)),
        Piece(2, 1, [(0, 3)], key_mask_T=torch.ones(2, dtype=torch.bool)),
        Piece(2, 0, [(0, 2)], prompts_NPD=torch.zeros(3, 1, 64)),
    ],
)
def test_pieces_that_do_not_fit_are_refused(span: Span, piece: Piece) -> None:
    with pytest.raises(BadRequest):
        open_packed(span)(torch.zeros(max(1, piece.length), span.hidden_size), [piece])


def test_rows_and_stores_that_do_not_fit_are_refused(span: Span) -> None:
    with pytest.raises(BadRequest, match="hidden states"):
        open_packed(span)(hidden(3, span), [Piece(2, 0, [(0, 2)])])
    with pytest.raises(BadRequest, match="hidden states"):
        open_packed(span)(hidden(3, span), [])
    with pytest.raises(BadRequest, match="blocks"):
        PackedSpan(span, KVStore(kv_layout(narrow(span, BlockRange(1, 4))), NUM_SLOTS))


def test_keys_that_change_after_the_cache_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "EXPANDED", frozenset())
    span = make_span(tiny_config("deepseek_v3"))
    with pytest.raises(UnsupportedModel, match="changes keys"):
        open_packed(span)(hidden(2, span), [Piece(2, 0, [(0, 2)])])
    assert not is_packable(span)
