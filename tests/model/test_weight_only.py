"""Layers with weights in 8 or 4 bits: every kernel computes the product of the rounded weights, with gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from marks import LEVELS, needs_compiled
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear

from swarm.model import kernels, weight_only
from swarm.model.weight_only import (
    GROUP,
    CudaInt4Linear,
    Int4Linear,
    Int8Linear,
    Kernel,
    WeightOnlyLinear,
    choose_kernel,
    quantize_groups,
)

LINEARS = [Int8Linear, Int4Linear]

# What a kernel may differ by from the exact product of the same weights, in standard deviations of the product.
TOLERANCES = {
    (Kernel.DENSE, torch.float32): 1e-5,
    (Kernel.COMPILED, torch.float32): 2e-4,  # activations in 16 bits of fixed point
    (Kernel.DENSE, torch.bfloat16): 2e-2,
    (Kernel.COMPILED, torch.bfloat16): 2e-2,  # the product itself is rounded
    (Kernel.TORCH, torch.bfloat16): 4e-2,  # and the scales
}


@pytest.fixture(params=LEVELS, ids=lambda level: level.name)
def instruction_set(request, monkeypatch):
    """Let products be computed with each of the instruction sets of this machine."""
    monkeypatch.setattr(kernels, "best_level", lambda: request.param)


def make_layer(linear_class: type[WeightOnlyLinear], num_outputs: int, num_inputs: int, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_outputs, num_inputs, generator=generator) * 0.05 + 0.01
    bias = nn.Parameter(torch.randn(num_outputs, generator=generator))
    return linear_class.quantize(weight, bias).requires_grad_(False)


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).abs().max() / wanted.std())


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize(
    "linear_class, kernel, dtype",
    [
        pytest.param(linear_class, kernel, dtype, marks=needs_compiled if kernel is Kernel.COMPILED else ())
        for linear_class in LINEARS
        for kernel, dtype in TOLERANCES
        if kernel is not Kernel.TORCH or linear_class is Int8Linear
    ],
)
@pytest.mark.parametrize("num_inputs, num_outputs", [(64, 16), (192, 37), (1088, 50)])
def test_a_kernel_computes_the_product_of_the_rounded_weights(linear_class, kernel, dtype, num_inputs, num_outputs):
    layer = make_layer(linear_class, num_outputs, num_inputs)
    for num_rows in (1, 2, 3, 4, 7, 70):
        x_MK = randn(num_rows, num_inputs).to(dtype)
        exact = linear(x_MK.double(), layer.rows(0, num_outputs).double(), layer.bias.double())
        y_MN = layer.biased_product(x_MK, kernel)
        assert y_MN.dtype == dtype and error(y_MN, exact) < TOLERANCES[kernel, dtype], num_rows


@pytest.mark.usefixtures("instruction_set")
@needs_compiled
@pytest.mark.parametrize("linear_class", LINEARS)
def test_products_by_several_threads_equal_those_by_one(linear_class):
    layer, x_MK = make_layer(linear_class, 515, 320), randn(5, 320)
    num_threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(layer.biased_product(x_MK, Kernel.COMPILED))
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.usefixtures("instruction_set")
@needs_compiled
@pytest.mark.parametrize("linear_class", LINEARS)
def test_a_row_computes_the_same_alone_and_in_a_batch(linear_class):
    layer, x_MK = make_layer(linear_class, 70, 640), randn(11, 640)
    together = layer.biased_product(x_MK, Kernel.COMPILED)
    for row in range(11):
        assert torch.equal(together[row], layer.biased_product(x_MK[row : row + 1], Kernel.COMPILED)[0])


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("linear_class", LINEARS)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_spoils_its_own_row_alone(linear_class, number):
    layer, x_MK = make_layer(linear_class, 20, 128), randn(3, 128)
    clean = layer(x_MK)
    x_MK[1, 70] = number
    y_MN = layer(x_MK)
    assert not y_MN[1].isfinite().any()
    assert torch.equal(y_MN[[0, 2]], clean[[0, 2]])


@pytest.mark.usefixtures("instruction_set")
@needs_compiled
@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-20, 1e20])
def test_rows_of_any_magnitude(scale):
    layer, x_MK = make_layer(Int8Linear, 20, 128), randn(2, 128) * scale
    layer.bias.zero_()
    exact = x_MK.double() @ layer.rows(0, 20).double().t()
    found = layer.biased_product(x_MK, Kernel.COMPILED).double()
    assert (found - exact).abs().max() <= 2e-4 * exact.std() + 1e-30


@given(
    st.integers(1, 4), st.integers(1, 24), st.sampled_from([1e-4, 1.0, 30.0]), st.sampled_from([0.0, 3.0]), st.data()
)
@hypothesis_settings(max_examples=40, deadline=None)
def test_weights_are_rounded_by_at_most_half_a_step(num_groups, num_outputs, spread, offset, data):
    weight_NK = (randn(num_outputs, num_groups * GROUP, seed=data.draw(st.integers(0, 99))) + offset) * spread
    int8 = Int8Linear.quantize(weight_NK, None).rows(0, num_outputs)
    assert ((weight_NK - int8).abs() <= weight_NK.abs().amax(1, keepdim=True) / 127 * 0.501).all()
    int4 = Int4Linear.quantize(weight_NK, None).rows(0, num_outputs)
    groups = weight_NK.view(num_outputs, num_groups, GROUP)
    step = (groups.amax(2) - groups.amin(2)) / 15
    slack = groups.abs().amax(2) * 2**-8 + step * 15 * 2**-8  # zeros and scales are bfloat16
    assert ((groups - int4.view_as(groups)).abs() <= (step / 2 + slack)[..., None] * 1.01).all()


@pytest.mark.parametrize("linear_class", LINEARS)
def test_weights_that_are_all_the_same_survive(linear_class):
    for value in (0.0, 0.5):
        weight_NK = torch.full((16, 128), value)
        assert torch.allclose(linear_class.quantize(weight_NK, None).rows(0, 16), weight_NK, atol=1e-6)


@pytest.mark.parametrize("linear_class", LINEARS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_gradient_of_the_input_is_that_of_the_rounded_weights(linear_class, dtype, tolerance):
    layer = make_layer(linear_class, 1100, 128)  # more outputs than are in floats at a time
    layer.bias.data = layer.bias.to(dtype)
    ours, theirs = (randn(2, 3, 128).to(dtype).requires_grad_() for _ in range(2))
    grad = randn(2, 3, 1100).to(dtype)
    layer(ours).backward(grad)
    linear(theirs.double(), layer.rows(0, 1100).double(), layer.bias.double()).backward(grad.double())
    assert ours.grad.dtype == dtype and error(ours.grad, theirs.grad.double()) < tolerance
    assert all(parameter.grad is None for parameter in layer.parameters())


@pytest.mark.parametrize("linear_class", LINEARS)
def test_a_layer_is_as_large_as_it_says_and_shows_its_weights(linear_class):
    layer = linear_class.quantize(randn(48, 320).to(torch.bfloat16), None)
    assert sum(tensor.nbytes for tensor in layer.state_dict().values()) == linear_class.num_bytes(48, 320)
    assert layer.weight.shape == (48, 320) and layer.weight.dtype == torch.bfloat16
    assert not linear_class.fits(48, 96) and not linear_class.fits(1, 320)


def test_the_kernel_is_chosen_by_what_the_processor_can():
    def choose(bits: int, rows: int, dtype: torch.dtype, is_compiled: bool, fast_floats: bool) -> Kernel:
        return choose_kernel(bits, rows, dtype, is_compiled=is_compiled, fast_floats=fast_floats)

    for bits in (4, 8):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert choose(bits, 1, dtype, True, False) is Kernel.COMPILED
            assert choose(bits, 1, dtype, True, True) is Kernel.COMPILED
            assert choose(bits, 512, dtype, True, False) is Kernel.COMPILED
            assert choose(bits, 512, dtype, True, True) is Kernel.DENSE
            assert choose(bits, 512, dtype, False, False) is Kernel.DENSE
    assert choose(8, 1, torch.bfloat16, False, False) is Kernel.TORCH
    assert choose(8, 1, torch.float32, False, False) is Kernel.DENSE
    assert choose(4, 1, torch.bfloat16, False, True) is Kernel.DENSE


def test_int4_for_cuda_has_the_shapes_of_torchs_kernel():
    with FakeTensorMode():
        weight_NK = torch.empty(64, 256, dtype=torch.bfloat16)
        layer = CudaInt4Linear.quantize(weight_NK, None)
        assert sum(tensor.nbytes for tensor in layer.state_dict().values()) == CudaInt4Linear.num_bytes(64, 256)
        x = torch.empty(2, 3, 256, dtype=torch.float16, requires_grad=True)
        y = layer(x)
        assert y.shape == (2, 3, 64) and y.dtype == torch.float16
        y.sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape
    assert not CudaInt4Linear.fits(64, 192)


class Unpacked(CudaInt4Linear):
    """With a product of plain weights in the place of the kernel's."""

    def _product(self, x_MK: Tensor) -> Tensor:
        assert x_MK.shape[0] <= weight_only.DENSE_INPUTS, "more of the weights than fit at a time"
        return x_MK.to(torch.bfloat16) @ self.data.t()


@pytest.mark.parametrize("num_inputs", [256, 384])
def test_int4_for_cuda_has_its_weights_in_floats_a_part_at_a_time(num_inputs: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weight_only, "DENSE_INPUTS", 256)
    weight_NK = randn(64, num_inputs).to(torch.bfloat16)
    layer = Unpacked(weight_NK, torch.zeros(num_inputs // 128, 64, 2), num_inputs, None, weight_NK)
    assert torch.equal(layer.weight, weight_NK)
    grad_MN = randn(3, 64)
    torch.testing.assert_close(layer.input_gradient(grad_MN), grad_MN @ weight_NK.float(), rtol=1e-5, atol=1e-4)


def test_int4_for_cuda_shifts_its_zero_to_the_middle():
    weight_NK = randn(8, 256)
    q_NGg, scale_NG, zero_NG = quantize_groups(weight_NK, CudaInt4Linear.group)
    middle_NG = CudaInt4Linear.middle(scale_NG, zero_NG)
    shifted = (q_NGg - 8) * scale_NG.float()[..., None] + middle_NG.float()[..., None]
    step = scale_NG.float()[..., None]
    assert ((shifted - weight_NK.view_as(shifted)).abs() <= 0.6 * step).all()
