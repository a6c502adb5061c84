"""Decoding through whole blocks by one kernel gives what the library's modules give, as precisely."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from marks import LEVELS, needs_compiled
from packing import NUM_SLOTS, make_span
from tiny_configs import tiny_config
from torch import Tensor, nn

from swarm.model import families, half_layers, kernels
from swarm.model.half_layers import use_half_kernels
from swarm.model.kv_store import KVStore, kv_layout
from swarm.model.narrow import narrow
from swarm.model.ragged import PackedSpan, Piece
from swarm.model.span import Span
from swarm.model.weight_only import Int4Linear, Int8Linear
from swarm.model.whole_blocks import WholeBlocks
from swarm.ranges import BlockRange

pytestmark = needs_compiled

SIZES = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "sliding_window": 64}

QUANTIZED = {"none": None, "int8": Int8Linear, "int4": Int4Linear}


@pytest.fixture(params=LEVELS, ids=lambda level: level.name)
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "best_level", lambda: request.param)
    monkeypatch.setattr(half_layers, "has_fast_floats", kernels.is_wide)


def half_span(model_type: str, quantization: str = "none", **settings: Any) -> Span:
    config = tiny_config(model_type)
    for name, value in {**SIZES, **settings}.items():
        setattr(config, name, value)
    span = make_span(config)
    span.model.to(torch.bfloat16)
    linear = QUANTIZED[quantization]
    for name, module in list(span.layers.named_modules()):
        if linear is not None and type(module) is nn.Linear:
            span.layers.set_submodule(name, linear.quantize(module.weight, module.bias))
    use_half_kernels(span.model)
    return span


def whole_of(packed: PackedSpan) -> WholeBlocks | None:
    return next((path for path in packed.fast_paths if isinstance(path, WholeBlocks)), None)


def open_packed(span: Span) -> PackedSpan:
    return PackedSpan(span, KVStore(kv_layout(span), NUM_SLOTS))


def rows(count: int, span: Span, seed: int = 1) -> Tensor:
    x_TD = torch.randn(count, span.hidden_size, generator=torch.Generator().manual_seed(seed))
    return x_TD.to(torch.bfloat16)


PREFIXES = [[(0, 9)], [(40, 45), (20, 30)], [(60, 61)]]
"""Slots of three sequences that have begun, of which the last continues elsewhere."""

STEPS = [[(0, 10)], [(40, 45), (20, 31)], [(60, 61), (90, 91)]]


def fill(packed: PackedSpan, span: Span) -> None:
    lengths = [sum(end - start for start, end in runs) for runs in PREFIXES]
    packed(rows(sum(lengths), span, 2), [Piece(n, 0, runs) for n, runs in zip(lengths, PREFIXES, strict=True)])


def step(number: int, **more: Any) -> Piece:
    return Piece(1, sum(end - start for start, end in PREFIXES[number]), STEPS[number], **more)


def decode_both_ways(span: Span, pieces: list[Piece], blocks: BlockRange | None = None) -> list[tuple[Tensor, KVStore]]:
    """What the next tokens give, and the store after it: by the kernel, and by the library's modules."""
    x_TD, found = rows(sum(piece.length for piece in pieces), span), []
    for by_kernel in (True, False):
        store = KVStore(kv_layout(span), NUM_SLOTS)
        fill(PackedSpan(span, store), span)
        packed = PackedSpan(span if blocks is None else narrow(span, blocks), store)
        whole = whole_of(packed)
        assert whole is not None and whole.takes(pieces)
        found.append(((packed if by_kernel else packed.by_modules)(x_TD, pieces), store))
    return found


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("quantization", QUANTIZED)
@pytest.mark.parametrize("model_type", sorted(families.WHOLE))
def test_the_kernel_computes_what_the_modules_compute(model_type: str, quantization: str) -> None:
    span = half_span(model_type, quantization)
    pieces = [step(0), step(1, position_ids_L=torch.tensor([7])), step(2)]
    blocks = BlockRange(1, 4)
    (ours, our_store), (theirs, their_store) = decode_both_ways(span, pieces, blocks)
    added = (theirs.float() - rows(3, span).float()).norm(dim=1)
    assert ((ours.float() - theirs.float()).norm(dim=1) <= 0.02 * added).all()
    for number in blocks:
        for our_heads, their_heads in zip(our_store.heads(number), their_store.heads(number), strict=True):
            for runs in STEPS:
                for start, end in runs:
                    mine, yours = (heads[:, :, start:end].float() for heads in (our_heads, their_heads))
                    assert (mine - yours).norm() <= 0.02 * yours.norm()


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("quantization", QUANTIZED)
def test_a_sequence_decodes_the_same_alone_and_among_others_and_by_several_threads(quantization: str) -> None:
    span = half_span("qwen3", quantization)
    x_TD, num_threads = rows(3, span), torch.get_num_threads()
    packed = open_packed(span)
    fill(packed, span)
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(packed(x_TD, [step(0), step(1), step(2)]))
            found.append(torch.cat([packed(x_TD[t : t + 1], [step(t)]) for t in range(3)]))
    finally:
        torch.set_num_threads(num_threads)
    assert all(torch.equal(each, found[0]) for each in found)


def test_what_is_not_a_number_stays_with_its_sequence() -> None:
    span = half_span("llama", "int4")
    packed = open_packed(span)
    fill(packed, span)
    x_TD = rows(3, span)
    alone = packed(x_TD[1:2], [step(1)])
    x_TD[0, 5] = torch.inf
    x_TD[2, 7] = torch.nan
    together = packed(x_TD, [step(0), step(1), step(2)])
    assert not together[0].isfinite().any() and not together[2].isfinite().any()
    assert torch.equal(together[1:2], alone)


@pytest.mark.usefixtures("processor")
def test_several_tokens_of_a_sequence_see_each_other_in_order() -> None:
    span = half_span("llama")
    pieces = [step(0), Piece(4, 15, [(40, 45), (20, 31), (70, 73)]), Piece(3, 0, [(80, 82), (90, 91)])]
    (ours, _), (theirs, _) = decode_both_ways(span, pieces)
    added = (theirs.float() - rows(8, span).float()).norm(dim=1)
    assert ((ours.float() - theirs.float()).norm(dim=1) <= 0.02 * added).all()


def test_padding_prompts_and_many_tokens_take_the_way_of_the_modules() -> None:
    span = half_span("llama")
    packed = open_packed(span)
    fill(packed, span)
    whole = whole_of(packed)
    assert whole is not None
    assert whole.takes([step(0), step(2)])
    assert not whole.takes([step(0, key_mask_T=torch.arange(10) > 2)])
    assert whole.takes([step(0), Piece(30, 0, [(20, 50)])])
    assert not whole.takes([step(0), Piece(31, 0, [(20, 51)])])
    assert not whole.takes([Piece(30, 3000, [(0, 3030)])])
    prompts_NPD = torch.ones(4, 10, span.hidden_size, dtype=torch.bfloat16)
    plain, prompted = packed(rows(1, span), [step(0)]), packed(rows(1, span), [step(0, prompts_NPD=prompts_NPD)])
    assert (plain - prompted).abs().max() > 0.1


def test_blocks_that_only_look_alike_are_found_out(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr(families, "WHOLE", families.WHOLE | {"granite", "olmo", "gemma"})
    settings = {"residual_multiplier": 0.9}
    assert whole_of(open_packed(half_span("granite", **settings))) is None
    assert "blocks of another kind" in caplog.text
    assert whole_of(open_packed(half_span("gemma"))) is None  # other norms, another activation


def test_a_window_counts_whatever_the_config_calls_the_layers() -> None:
    whole = whole_of(open_packed(half_span("mistral", sliding_window=10, layer_types=["full_attention"] * 4)))
    assert whole is not None and not whole.takes([step(1)])


def test_windows_and_other_types_of_numbers_are_left_to_the_modules() -> None:
    whole = whole_of(open_packed(half_span("mistral", sliding_window=10)))
    assert whole is not None
    assert whole.takes([step(0)])
    assert not whole.takes([step(0), step(1)])
    assert whole_of(open_packed(make_span(tiny_config("llama")))) is None
