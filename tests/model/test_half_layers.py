"""Layers in bfloat16 with kernels of our own: products, norms, gradients, and what stays torch's."""

from __future__ import annotations

import pytest
import torch
from marks import LEVELS, needs_compiled
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from swarm.model import half_layers, kernels
from swarm.model.half_layers import HalfLinear, use_half_kernels


@pytest.fixture(autouse=True, params=LEVELS, ids=lambda level: level.name)
def processor(request, monkeypatch):
    monkeypatch.setattr(kernels, "best_level", lambda: request.param)
    monkeypatch.setattr(half_layers, "has_fast_floats", kernels.is_wide)


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def half_linear(weight_NK: Tensor, bias_N: nn.Parameter | None = None) -> HalfLinear:
    layer = nn.Linear(weight_NK.shape[1], weight_NK.shape[0], bias=bias_N is not None, device="meta")
    layer.weight, layer.bias = nn.Parameter(weight_NK), bias_N
    use_half_kernels(layer.requires_grad_(False))
    assert isinstance(layer, HalfLinear)
    return layer


@needs_compiled
@pytest.mark.parametrize("num_inputs, num_outputs", [(16, 1), (48, 37), (1040, 600)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_bfloat16_is_multiplied_as_precisely_as_its_results_are_rounded(num_inputs, num_outputs, has_bias):
    weight_NK = (randn(num_outputs, num_inputs) * 0.05).to(torch.bfloat16)
    bias = nn.Parameter(randn(num_outputs, seed=2).to(torch.bfloat16)) if has_bias else None
    layer = half_linear(weight_NK, bias)
    assert layer.weight.data_ptr() == weight_NK.data_ptr()
    for num_rows in (1, 2, 3, 4, 7, 17, 70):
        x_MK = randn(num_rows, num_inputs).to(torch.bfloat16)
        exact = linear(x_MK.double(), weight_NK.double(), bias.double() if has_bias else None)
        y_MN = layer(x_MK)
        assert y_MN.dtype == torch.bfloat16
        half_a_step = exact.abs() * 2**-8 + 1e-5
        assert ((y_MN.double() - exact).abs() <= half_a_step).all(), num_rows


@needs_compiled
def test_rows_of_bfloat16_compute_the_same_alone_in_a_batch_and_by_several_threads():
    layer = half_linear(randn(515, 320).to(torch.bfloat16))
    x_BLK = randn(2, 11, 320).to(torch.bfloat16)
    together = layer(x_BLK)
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(layer(x_BLK), together)
    finally:
        torch.set_num_threads(num_threads)
    for row in range(11):
        assert torch.equal(layer(x_BLK[1, row]), together[1, row])
    assert torch.equal(layer(x_BLK.transpose(0, 1)), together.transpose(0, 1))


@needs_compiled
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 3.4e38])
def test_bfloat16_keeps_what_is_not_finite(number):
    layer = half_linear(torch.ones(20, 32, dtype=torch.bfloat16))
    x_MK = torch.ones(3, 32, dtype=torch.bfloat16)
    x_MK[1] = number
    y_MN = layer(x_MK)
    assert torch.equal(y_MN[[0, 2]], torch.full((2, 20), 32.0, dtype=torch.bfloat16))
    wanted = torch.tensor(number, dtype=torch.bfloat16).mul(32)
    assert torch.equal(y_MN[1].isnan(), torch.full((20,), bool(wanted.isnan())))
    assert bool(wanted.isnan()) or torch.equal(y_MN[1], wanted.expand(20))


@needs_compiled
def test_gradients_pass_through_layers_in_bfloat16():
    weight_NK = randn(1100, 128).to(torch.bfloat16)
    model = nn.Sequential(nn.Linear(128, 1100), nn.Linear(1100, 3)).to(torch.bfloat16).requires_grad_(False)
    model[0].weight.copy_(weight_NK)
    ours, theirs = (randn(2, 3, 128).to(torch.bfloat16).requires_grad_() for _ in range(2))
    grad = randn(2, 3, 1100).to(torch.bfloat16)
    use_half_kernels(model)
    assert isinstance(model[0], HalfLinear) and type(model[1]) is nn.Linear  # 1100 is no multiple of 16
    model[0](ours).backward(grad)
    linear(theirs.double(), weight_NK.double(), model[0].bias.double()).backward(grad.double())
    assert ours.grad.dtype == torch.bfloat16
    error = (ours.grad.double() - theirs.grad).abs().max() / theirs.grad.double().std()
    assert error < 2e-2


@needs_compiled
@pytest.mark.parametrize("num_rows", [2, 70])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_layer_that_is_trained_learns_as_torchs_does(num_rows, has_bias):
    weight_NK, grad = randn(1100, 32).to(torch.bfloat16), randn(num_rows, 1100).to(torch.bfloat16)
    bias = nn.Parameter(randn(1100, seed=2).to(torch.bfloat16)) if has_bias else None
    layer = half_linear(weight_NK.clone(), bias).requires_grad_()
    ours, theirs = randn(num_rows, 32).to(torch.bfloat16).requires_grad_(), randn(num_rows, 32).to(torch.bfloat16)
    theirs = theirs.double().requires_grad_()
    exact = [tensor.detach().double().requires_grad_() for tensor in (weight_NK, *([bias] if has_bias else []))]
    y_MN = layer(ours)
    y_MN.backward(grad)
    wanted = linear(theirs, *exact)
    wanted.backward(grad.double())
    assert ((y_MN.double() - wanted).abs() <= wanted.abs() * 2**-8 + 1e-5).all()
    pairs = [(ours.grad, theirs.grad), (layer.weight.grad, exact[0].grad)]
    pairs += [(layer.bias.grad, exact[1].grad)] if has_bias else []
    for found, gradient in pairs:
        assert found.dtype == torch.bfloat16
        assert ((found.double() - gradient).abs() <= gradient.abs() * 2**-8 + 1e-4).all()


@needs_compiled
def test_a_bias_is_trained_on_a_frozen_weight():
    bias = nn.Parameter(torch.zeros(20, dtype=torch.bfloat16))
    layer = half_linear(randn(20, 32).to(torch.bfloat16), bias)
    layer.bias.requires_grad_()
    layer(randn(3, 32).to(torch.bfloat16)).sum().backward()
    assert layer.weight.grad is None and torch.equal(layer.bias.grad, torch.full((20,), 3.0, dtype=torch.bfloat16))


@needs_compiled
def test_other_types_and_tied_weights_stay_what_they_are():
    model = nn.ModuleDict({"embed": nn.Embedding(20, 32), "head": nn.Linear(32, 20, bias=False)}).to(torch.bfloat16)
    model["head"].weight = model["embed"].weight
    use_half_kernels(model.requires_grad_(False))
    assert type(model["head"]) is HalfLinear and model["head"].weight is model["embed"].weight
    assert list(model.state_dict()) == ["embed.weight", "head.weight"]
    model.to(torch.float32)
    x_MK = randn(3, 32)
    assert torch.equal(model["head"](x_MK), linear(x_MK, model["head"].weight))
    floats = nn.Linear(32, 20)
    use_half_kernels(floats)
    assert type(floats) is nn.Linear


def rms_norm(num_features: int = 48) -> nn.Module:
    norm = LlamaRMSNorm(num_features, eps=1e-5)
    norm.weight.data = randn(num_features, seed=3)
    return norm.to(torch.bfloat16).requires_grad_(False)


@needs_compiled
@pytest.mark.parametrize("magnitude", [0.0, 1e-20, 1.0, 1e15, 3e38, float("inf"), float("nan")])
def test_norms_in_bfloat16_compute_what_the_librarys_do(magnitude):
    norm, x_BLD = rms_norm(), (randn(2, 5, 48) * magnitude).to(torch.bfloat16)
    wanted = norm(x_BLD)
    use_half_kernels(norm)
    assert isinstance(norm, LlamaRMSNorm) and type(norm) is not LlamaRMSNorm and list(norm.state_dict()) == ["weight"]
    y_BLD = norm(x_BLD)
    assert y_BLD.dtype == torch.bfloat16 and y_BLD.shape == x_BLD.shape
    assert torch.allclose(y_BLD.float(), wanted.float(), rtol=2**-7, atol=0, equal_nan=True)
    turned = norm(x_BLD.transpose(0, 1))
    assert torch.equal(turned.nan_to_num(), y_BLD.transpose(0, 1).nan_to_num())


@needs_compiled
def test_a_norm_passes_gradients_and_takes_long_inputs_and_other_types_as_before():
    theirs, ours = rms_norm(), rms_norm()
    use_half_kernels(ours)
    for norm in (ours, theirs):
        norm.weight.requires_grad_()
    inputs = [randn(2, 48).to(torch.bfloat16).requires_grad_() for _ in range(2)]
    for norm, x_MD in zip((ours, theirs), inputs, strict=True):
        norm(x_MD).backward(torch.ones(2, 48, dtype=torch.bfloat16))
    assert torch.equal(inputs[0].grad, inputs[1].grad) and torch.equal(ours.weight.grad, theirs.weight.grad)
    for x_MD in (randn(100, 48).to(torch.bfloat16), randn(3, 48)):
        with torch.no_grad():
            assert torch.equal(ours(x_MD), theirs(x_MD))


@needs_compiled
def test_norms_that_compute_something_else_stay_as_they_are():
    norms = [
        GemmaRMSNorm(48).to(torch.bfloat16),  # one is added to its weights
        Olmo2RMSNorm(48).to(torch.bfloat16),  # rounds once
        nn.LayerNorm(48).to(torch.bfloat16),
        LlamaRMSNorm(44).to(torch.bfloat16),
        LlamaRMSNorm(48),
    ]
    classes = [type(norm) for norm in norms]
    for norm in norms:
        use_half_kernels(norm.requires_grad_(False))
    assert [type(norm) for norm in norms] == classes
