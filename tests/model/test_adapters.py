"""Adapters change what they say, for the call that brings them, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from changing import KINDS, changed, random_adapter
from packing import NUM_SLOTS, History, make_span
from tiny_configs import tiny_config
from torch import Tensor

from swarm.errors import BadRequest
from swarm.model.adapters import Bias, BlockAdapter, Bottleneck, Ia3, Lora, Prefix, undropped
from swarm.model.changes import PAST
from swarm.model.dropout import Dropout
from swarm.model.kv_store import KVStore, kv_layout
from swarm.model.ragged import PackedSpan, Piece
from swarm.model.span import Span
from swarm.model.targets import check_adapters, find_targets

FAMILIES = ("llama", "gpt2", "gemma2", "deepseek_v3", "mixtral", "gpt_oss", "qwen3")
PRIVATE = ("falcon", "bloom", "qwen3_next", "mpt")
"""Families that cannot run packed."""

STEPS = [
    [(0, 5), (1, 3), (2, 4)],
    [(0, 1), (1, 1), (3, 6), (4, 2), (2, 1)],
    [(0, 1), (1, 1), (2, 1), (3, 1), (4, 1)],
]
"""Rows: which sequence takes how many tokens."""


def adapters_for(span: Span, *, seed: int, skip: int | None = None) -> list[BlockAdapter | None]:
    targets = find_targets(span)
    return [
        None if number == skip else random_adapter(targets[number], seed=seed * 100 + number) for number in span.blocks
    ]


def gradients(span: Span, x_BLD: Tensor, adapters: list[BlockAdapter | None], **how: Any) -> list[Tensor]:
    x_BLD = x_BLD.clone().requires_grad_()
    leaves = [
        None if each is None else each.with_tensors([t.clone().requires_grad_() for t in each.tensors().values()])
        for each in adapters
    ]
    wanted = [x_BLD, *(tensor for each in leaves if each is not None for tensor in each.tensors().values())]
    y_BLD = span(x_BLD, adapters=leaves, **how)
    return [y_BLD.detach(), *torch.autograd.grad(y_BLD.pow(2).mean(), wanted)]


def plain_gradients(span: Span, x_BLD: Tensor, adapters: list[BlockAdapter | None]) -> list[Tensor]:
    x_BLD = x_BLD.clone().requires_grad_()
    leaves = [
        None if each is None else each.with_tensors([t.clone().requires_grad_() for t in each.tensors().values()])
        for each in adapters
    ]
    wanted = [x_BLD, *(tensor for each in leaves if each is not None for tensor in each.tensors().values())]
    with changed(span.layers, leaves):
        y_BLD = span(x_BLD)
    return [y_BLD.detach(), *torch.autograd.grad(y_BLD.pow(2).mean(), wanted)]


@pytest.mark.parametrize("model_type", FAMILIES + PRIVATE)
def test_outputs_and_gradients_equal_those_of_a_model_changed_by_hand(model_type: str) -> None:
    span = make_span(tiny_config(model_type))
    adapters, x_BLD = adapters_for(span, seed=1, skip=2), torch.randn(2, 5, span.hidden_size)
    before = span(x_BLD)
    for ours, theirs in zip(gradients(span, x_BLD, adapters), plain_gradients(span, x_BLD, adapters), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4 * float(theirs.abs().max().clamp(1)), rtol=0)
    assert torch.equal(span(x_BLD), before)
    assert not any(module._forward_pre_hooks for layer in span.layers[1:] for module in layer.modules())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_packed_row_of_several_clients_gives_each_its_own(model_type: str) -> None:
    span = make_span(tiny_config(model_type))
    packed = PackedSpan(span, KVStore(kv_layout(span), NUM_SLOTS))
    one, two = adapters_for(span, seed=1), adapters_for(span, seed=2, skip=1)
    sequences = [
        History(span, list(range(start, start + 18)), adapters=adapters)
        for start, adapters in ((0, one), (18, one), (36, None), (54, two), (72, one))
    ]
    error = 0.0
    for step in (
        [(0, 5), (1, 3), (2, 4)],
        [(0, 1), (1, 1), (3, 6), (4, 2), (2, 1)],
        [(number, 1) for number in range(5)],
    ):
        pieces, inputs, expected = [], [], []
        for number, length in step:
            inputs.append(torch.randn(length, span.hidden_size))
            with torch.no_grad():
                piece, y_LD = sequences[number].take(inputs[-1])
            pieces.append(piece)
            expected.append(y_LD)
        error = max(error, float((packed(torch.cat(inputs), pieces) - torch.cat(expected)).abs().max()))
    assert error <= 1e-4 * float(torch.cat(expected).abs().max().clamp(1))


def test_rows_without_an_adapter_are_what_they_would_be_without_the_others(span: Span) -> None:
    packed = PackedSpan(span, KVStore(kv_layout(span), NUM_SLOTS))
    x_TD, adapters = torch.randn(7, span.hidden_size), adapters_for(span, seed=1)
    rows = [(3, (0, 3)), (2, (10, 12)), (2, (20, 22))]
    without = packed(x_TD, [Piece(length, 0, [slots]) for length, slots in rows])
    with_others = packed(
        x_TD, [Piece(length, 0, [slots], adapters=adapters if slots[0] != 10 else None) for length, slots in rows]
    )
    assert torch.equal(with_others[3:5], without[3:5])
    assert not torch.allclose(with_others[:3], without[:3]) and not torch.allclose(with_others[5:], without[5:])


@pytest.fixture(scope="module")
def span() -> Span:
    return make_span(tiny_config("llama"))


def test_calls_within_one_another_do_not_see_each_others_adapters(span: Span) -> None:
    one, two = adapters_for(span, seed=1), adapters_for(span, seed=2)
    x_BLD, other_BLD = torch.randn(2, 5, span.hidden_size), torch.randn(1, 3, span.hidden_size)
    packed, pieces = PackedSpan(span, KVStore(kv_layout(span), NUM_SLOTS)), [Piece(3, 0, [(0, 3)], adapters=two)]
    wanted, plain, other = gradients(span, x_BLD, one), span(other_BLD), gradients(span, other_BLD, two)
    wanted_packed = packed(other_BLD[0], pieces)
    seen: list[int] = []

    def run_others(*_: object) -> None:
        if seen and seen[-1] == 0:  # from within one of these
            return
        seen.append(0)
        assert torch.equal(span(other_BLD), plain)
        assert torch.equal(packed(other_BLD[0], pieces), wanted_packed)
        assert all(torch.equal(a, b) for a, b in zip(gradients(span, other_BLD, two), other, strict=True))
        seen.append(1)

    modules = [module for layer in span.layers for module in layer.modules()]
    handles = [module.register_forward_pre_hook(run_others) for module in modules]
    try:
        results = gradients(span, x_BLD, one)
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) > 2 * 40
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results, wanted, strict=True))


def test_half_precision_and_quantized_modules_are_changed_as_well() -> None:
    from swarm.model.half_layers import use_half_kernels

    span, half = make_span(tiny_config("llama")), make_span(tiny_config("llama"))
    half.to(torch.bfloat16)
    use_half_kernels(half.model)
    adapters, x_BLD = adapters_for(span, seed=1), torch.randn(2, 5, span.hidden_size)
    assert find_targets(half).keys() == find_targets(span).keys()
    for ours, theirs in zip(gradients(half, x_BLD, adapters), gradients(span, x_BLD, adapters), strict=True):
        torch.testing.assert_close(ours.float(), theirs, atol=0.2 * float(theirs.abs().max()), rtol=0)


# Dropout


def dropped(share: float, *, first_row: int = 0, batch: int = 4, block: int = 3, seed: int = 9) -> Tensor:
    drop = Dropout(seed, first_row, length=6).at(block, "self_attn.q_proj")
    return drop(torch.ones(batch, 6, 50), share)


def test_dropout_follows_from_where_a_feature_is_and_nothing_else() -> None:
    whole = dropped(0.25)
    assert torch.equal(whole, dropped(0.25))
    assert torch.equal(whole[2:], dropped(0.25, first_row=2, batch=2))
    assert torch.equal(whole[:1].reshape(6, 50), dropped(0.25, batch=1).reshape(6, 50))
    for other in (dropped(0.25, seed=10), dropped(0.25, block=4), dropped(0.25, first_row=1)):
        assert 0.2 < float((other != whole).float().mean()) < 0.55


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(share: float) -> None:
    x = Dropout(1, 0, length=64).at(0, "mlp")(torch.ones(32, 64, 128), share)
    assert float((x == 0).float().mean()) == pytest.approx(share, abs=0.005)
    assert float(x.mean()) == pytest.approx(1, abs=0.02)
    for dim in (0, 1, 2):  # no row, position or feature is favoured
        means = (x == 0).float().mean([each for each in range(3) if each != dim])
        assert float((means - share).abs().max()) < 0.05


def test_slices_of_rows_with_dropout_add_up_to_the_whole(span: Span) -> None:
    targets = find_targets(span)
    draw = torch.Generator().manual_seed(0)
    adapters: list[BlockAdapter | None] = [
        BlockAdapter(
            [Lora("mlp.up_proj", torch.randn(4, 64, generator=draw), torch.randn(96, 4, generator=draw), 0.5, 0.3)]
        )
        for _ in targets
    ]
    x_BLD = torch.randn(3, 5, span.hidden_size)
    y_BLD = span(x_BLD, adapters=adapters, dropout=Dropout(7, 0, 5))
    parts = [span(x_BLD[row : row + 1], adapters=adapters, dropout=Dropout(7, row, 5)) for row in range(3)]
    torch.testing.assert_close(torch.cat(parts), y_BLD, atol=1e-4, rtol=0)
    assert not torch.allclose(span(x_BLD, adapters=adapters), y_BLD)


# Files


def lora(**changes: Any) -> Lora:
    return Lora(**({"target": "mlp", "a_RI": torch.ones(2, 64), "b_OR": torch.ones(64, 2)} | changes))


def all_kinds() -> BlockAdapter:
    return BlockAdapter(
        [
            lora(scaling=0.25, dropout=0.1),
            Ia3("mlp", torch.ones(64).bfloat16()),
            Bias("self_attn", torch.ones(64).half()),
            Bottleneck("self_attn", *map(torch.ones, ((3, 64), (3,), (64, 3), (64,))), activation="silu"),
            Prefix(PAST, torch.ones(3, 32), torch.ones(3, 32).half()),
        ]
    )


def test_a_file_gives_back_what_was_written() -> None:
    adapter = all_kinds()
    read = BlockAdapter.from_bytes(adapter.to_bytes())
    assert read.digest == adapter.digest == BlockAdapter(list(reversed(read.changes))).digest
    assert [each.name for each in read] == [
        "mlp/ia3",
        "mlp/lora",
        f"{PAST}/prefix",
        "self_attn/bias",
        "self_attn/bottleneck",
    ]
    assert list(read.tensors()) == sorted(read.tensors()) == list(adapter.tensors())
    for ours, theirs in zip(read.tensors().values(), adapter.tensors().values(), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert [each.scalar_values() for each in read] == [each.scalar_values() for each in adapter]


def test_a_file_keeps_what_the_tensors_held_first() -> None:
    weight = torch.ones(2, 64)
    adapter = BlockAdapter([lora(a_RI=weight)])
    digest = adapter.digest
    weight += 1
    assert adapter.digest == digest != BlockAdapter([lora(a_RI=weight)]).digest


def with_header(data: bytes, edit: Any) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    text = json.dumps(edit(header) or header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def renamed(old: str, new: str) -> Any:
    return lambda header: json.loads(json.dumps(header).replace(old, new))


@pytest.mark.parametrize(
    "data, sentence",
    [
        (b"", "whole safetensors file"),
        (b"\xff" * 64, "whole safetensors file"),
        (all_kinds().to_bytes()[:-1], "whole safetensors file"),
        (all_kinds().to_bytes() + b"!", "whole safetensors file"),
        (with_header(all_kinds().to_bytes(), lambda header: {key: header[key] for key in ("__metadata__",)}), "whole"),
        (with_header(all_kinds().to_bytes(), renamed("mlp/lora", "mlp/suffix")), "changed by 'suffix'"),
        (with_header(all_kinds().to_bytes(), renamed("dropout", "dropuot")), "dropuot"),
        (with_header(all_kinds().to_bytes(), renamed("0.25", "1e999")), "scaling"),
        (with_header(all_kinds().to_bytes(), renamed("silu", "exec")), "activation"),
        (with_header(all_kinds().to_bytes(), renamed("mlp/lora/a_RI", "mlp/lora/c_RI")), "lacks its tensor 'a_RI'"),
        (with_header(all_kinds().to_bytes(), renamed("F16", "F64")), "dtype"),
        (with_header(all_kinds().to_bytes(), lambda header: header.pop("__metadata__") and None), "header"),
        (with_header(all_kinds().to_bytes(), renamed("[2, 64]", "[2, 64, 1]")), "header"),
        (with_header(all_kinds().to_bytes(), renamed("[2, 64]", "[200000000, 64]")), "more tensors than it has bytes"),
        (with_header(all_kinds().to_bytes(), renamed("mlp/ia3", "../../mlp/ia3")), "no name of a module"),
    ],
)  # fmt: skip
def test_files_that_are_not_adapters_are_refused(data: bytes, sentence: str) -> None:
    with pytest.raises(BadRequest, match=sentence):
        BlockAdapter.from_bytes(data)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(BadRequest, match="not finite"):
        BlockAdapter.from_bytes(BlockAdapter([lora(b_OR=torch.full((64, 2), value))]).to_bytes())


def test_adapters_that_cannot_be_are_not_made() -> None:
    for make in (
        lambda: lora(target="mlp/../x"),
        lambda: lora(dropout=1.0),
        lambda: lora(scaling=torch.nan),
        lambda: BlockAdapter([]),
        lambda: Prefix("mlp", torch.ones(3, 64), torch.ones(3, 64)),
        lambda: BlockAdapter([lora(), lora()]),
        lambda: BlockAdapter([lora(a_RI=torch.ones(2, 64, dtype=torch.int64))]).to_bytes(),
        lambda: BlockAdapter.from_bytes(all_kinds().to_bytes(), max_bytes=100),
    ):
        with pytest.raises(BadRequest):
            make()


def test_what_does_not_fit_a_module_is_refused_by_its_name(span: Span) -> None:
    targets = find_targets(span)
    for change, sentence in (
        (lora(target="mlp.up_proj"), r"block 1, the lora change of mlp.up_proj needs 'b_OR' of the shape \[96, 2\]"),
        (lora(target="mlp.gone"), "block 1 has no module mlp.gone"),
        (lora(a_RI=torch.ones(64)), "needs 'a_RI'"),
        (Bias("self_attn", torch.ones(1, 64)), "needs 'bias_O'"),
        (Ia3("mlp.down_proj", torch.ones(64), of_input=True), r"'factors' of the shape \[96\]"),
    ):
        with pytest.raises(BadRequest, match=sentence):
            check_adapters([None, BlockAdapter([change]), None, None], span.blocks, targets)
    assert set(KINDS) > {"lora"}


def test_a_router_and_experts_cannot_be_changed_but_what_holds_them_can() -> None:
    targets = find_targets(make_span(tiny_config("mixtral")))
    assert "mlp.gate" not in targets[1] and {"mlp", "self_attn.q_proj"} <= targets[1].keys()


class Misplacing(torch.nn.Module):
    """A linear layer within a module that hands it the tokens in another order, as a mixture hands them to experts."""

    def __init__(self, inner: torch.nn.Module, order: list[int]) -> None:
        super().__init__()
        self.inner, self._order = inner, torch.tensor(order)

    def forward(self, x_BLD: Tensor) -> Tensor:
        rows = x_BLD.reshape(-1, x_BLD.shape[-1])
        if len(rows) != len(self._order):  # not the trial
            return self.inner(x_BLD)
        return self.inner(rows[self._order])[self._order.argsort()].reshape(*x_BLD.shape[:-1], -1)


@pytest.mark.parametrize("order", [[3, 4, 5, 0, 1, 2], [0, 2, 1, 3, 5, 4], [0, 3, 1, 4, 2, 5]])
def test_what_sees_the_tokens_in_another_order_cannot_be_changed(order: list[int]) -> None:
    span = make_span(tiny_config("llama"))
    mlp = span.layers[1].mlp
    mlp.up_proj = Misplacing(mlp.up_proj, order)
    targets = find_targets(span)[span.blocks.start + 1]
    assert "mlp.up_proj.inner" not in targets and {"mlp", "mlp.up_proj", "mlp.down_proj"} <= targets.keys()


def test_a_session_has_the_same_adapter_whether_the_model_is_trained_or_not() -> None:
    trained, evaluated = ([BlockAdapter([lora(dropout=share)]), None] for share in (0.1, 0.0))
    assert undropped(trained)[0].digest == evaluated[0].digest != trained[0].digest
    assert undropped(evaluated)[0] is evaluated[0] and undropped(trained)[1] is None and undropped(None) is None


def test_a_rank_above_what_a_module_has_is_refused(span: Span) -> None:
    adapter = BlockAdapter([Lora("mlp.up_proj", torch.zeros(97, 64), torch.zeros(96, 97))])
    with pytest.raises(BadRequest, match="has the rank 97: use at most 96"):
        check_adapters([adapter, *[None] * (len(span.blocks) - 1)], span.blocks, find_targets(span))
