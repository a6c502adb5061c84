"""Linear layers in bfloat16 with a kernel of our own: products, gradients, and what stays torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from swarm.model import half_linear as half_linear_module
from swarm.model import kernels
from swarm.model.half_linear import HalfLinear, use_half_kernels

needs_compiled = pytest.mark.skipif(not kernels.is_compiled(), reason="built without a C compiler, or not for AVX2")


@pytest.fixture(autouse=True)
def processor_without_bfloat16(monkeypatch):
    monkeypatch.setattr(half_linear_module, "has_fast_floats", lambda: False)


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
    for num_rows in (1, 2, 3, 4, 7, 70):
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
def test_a_layer_that_is_trained_learns_as_torchs_does():
    weight_NK, grad = randn(8, 32).to(torch.bfloat16), randn(2, 8).to(torch.bfloat16)
    layer, x_MK = half_linear(weight_NK.clone()), randn(2, 32).to(torch.bfloat16)
    layer.weight.requires_grad_()
    layer(x_MK).backward(grad)
    weight_NK.requires_grad_()
    linear(x_MK, weight_NK).backward(grad)
    assert torch.equal(layer.weight.grad, weight_NK.grad)


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
