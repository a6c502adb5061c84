"""Frozen linear layers with kernels of their own, whose weights are kept in 8 or 4 bits.

Which kernel multiplies is decided by `choose_kernel`; all of them compute the same product of the same weights.
Gradients flow to the input alone, by way of the weights in float32, a part of them at a time.
"""

# M rows of activations, K inputs, N outputs, G groups of inputs

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from swarm.model import kernels
from swarm.model.kernels import has_fast_floats

GROUP = 64
"""Inputs that share a scale in 4 bits; kernels/products.c has the same number."""

PADDED_GROUPS = 8
"""Scales of 4-bit weights are padded to a multiple of so many groups, as the compiled kernels read them."""

DENSE_OUTPUTS = 1024
"""How many outputs' weights are in float32 at a time, where they have to be."""

DENSE_INPUTS = 1024
"""The same of inputs, where a kernel alone knows the layout of the weights: 56 MiB for the widest matrix of a 70B."""

DENSE_FROM_ROWS = 64
"""Rows from which on turning the weights into floats first is taken to be worth it, where the processor multiplies
floats faster than the kernels: torch's kernels take time in proportion to the rows."""


class Kernel(enum.Enum):
    """How a product is computed."""

    COMPILED = "our own"
    TORCH = "torch's"
    DENSE = "floats"
    """The weights are turned into floats, part by part, and multiplied as such."""


def choose_kernel(bits: int, num_rows: int, dtype: torch.dtype, *, is_compiled: bool, fast_floats: bool) -> Kernel:
    """Which kernel multiplies rows of activations on a CPU.

    Args:
        fast_floats: whether the processor has AVX-512 or more, for floats.
    """
    if num_rows >= DENSE_FROM_ROWS and (fast_floats or not is_compiled):
        return Kernel.DENSE
    if is_compiled:
        return Kernel.COMPILED
    # Of other types and of 4 bits in our layout, torch has no kernel that is faster than floats.
    return Kernel.TORCH if bits == 8 and dtype == torch.bfloat16 else Kernel.DENSE


class WeightOnlyLinear(nn.Module, ABC):
    """As `nn.Linear`, frozen, with weights of few bits."""

    bits: ClassVar[int]

    def __init__(self, num_outputs: int, num_inputs: int, bias_N: nn.Parameter | None, like: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = num_outputs, num_inputs
        self.bias = bias_N
        # What the library reads the dtype and the device of a model from, if nothing else is left in floats.
        self.like = nn.Parameter(like.new_empty(0), requires_grad=False)

    @classmethod
    def fits(cls, num_outputs: int, num_inputs: int) -> bool:
        """Whether weights of this shape can be kept so; others stay as they are."""
        return num_inputs % GROUP == 0 and num_outputs >= 16

    @classmethod
    @abstractmethod
    def num_bytes(cls, num_outputs: int, num_inputs: int) -> int:
        """What weights of this shape take."""

    @classmethod
    @abstractmethod
    def quantize(cls, weight_NK: Tensor, bias_N: nn.Parameter | None) -> WeightOnlyLinear:
        """Round the weights of a linear layer."""

    @abstractmethod
    def biased_product(self, x_MK: Tensor) -> Tensor:
        """Multiply rows with the weights and add the bias, in the dtype of the rows; no gradient."""

    @abstractmethod
    def input_gradient(self, grad_MN: Tensor) -> Tensor:
        """Multiply the gradient of the outputs with the weights."""

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    def forward(self, x: Tensor) -> Tensor:
        return layer_forward(x, self)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


class HasProduct(Protocol):
    """What `layer_forward` asks of a layer; see WeightOnlyLinear."""

    in_features: int
    out_features: int

    def biased_product(self, x_MK: Tensor) -> Tensor: ...

    def input_gradient(self, grad_MN: Tensor) -> Tensor: ...


class _Product(torch.autograd.Function):
    """A product whose weights are not kept for backward in floats; given here, they may get a gradient."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor | None, bias_N: Tensor | None, layer: HasProduct) -> Tensor:
        ctx.layer, ctx.dtype = layer, x_MK.dtype
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(x_MK, weight_NK)  # the weight so that changing it before backward is noticed
        return layer.biased_product(x_MK)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dx_MK = ctx.layer.input_gradient(grad_MN).to(ctx.dtype) if needs_x else None
        if not (needs_weight or needs_bias):
            return dx_MK, None, None, None
        grad_MN = grad_MN.to(torch.float32)
        dweight_NK = None
        if needs_weight:
            x_MK, _ = ctx.saved_tensors
            dweight_NK = (grad_MN.t() @ x_MK.to(torch.float32)).to(ctx.dtype)
        return dx_MK, dweight_NK, grad_MN.sum(0).to(ctx.dtype) if needs_bias else None, None


def layer_forward(
    x: Tensor, layer: HasProduct, weight_NK: Tensor | None = None, bias_N: Tensor | None = None
) -> Tensor:
    """Run a linear layer: [..., K] to [..., N], in the dtype of x.

    Args:
        weight_NK, bias_N: those of the layer, where they may get a gradient.
    """
    x_MK = x.reshape(-1, layer.in_features)
    trained = [each for each in (x, weight_NK, bias_N) if each is not None and each.requires_grad]
    if torch.is_grad_enabled() and trained:
        y_MN: Tensor = _Product.apply(x_MK, weight_NK, bias_N, layer)
    else:
        y_MN = layer.biased_product(x_MK)
    return y_MN.view(*x.shape[:-1], layer.out_features)


class HasRows(Protocol):
    """A layer whose weights can be had in floats."""

    in_features: int
    out_features: int

    def rows(self, begin: int, end: int) -> Tensor:
        """The weights of the outputs [begin, end), in float32, [end - begin, K]."""


def dense_product(x_MK: Tensor, layer: HasRows) -> Tensor:
    """Multiply rows with the weights, a part of them in floats at a time; float32, no bias."""
    x_MK = x_MK.to(torch.float32)
    y_MN = x_MK.new_empty(x_MK.shape[0], layer.out_features)
    for begin in range(0, layer.out_features, DENSE_OUTPUTS):
        end = min(begin + DENSE_OUTPUTS, layer.out_features)
        y_MN[:, begin:end] = x_MK @ layer.rows(begin, end).t()
    return y_MN


def dense_input_gradient(grad_MN: Tensor, layer: HasRows) -> Tensor:
    """Multiply the gradient of the outputs with the weights, likewise; float32."""
    grad_MN = grad_MN.to(torch.float32)
    grad_MK = grad_MN.new_zeros(grad_MN.shape[0], layer.in_features)
    for begin in range(0, layer.out_features, DENSE_OUTPUTS):
        end = min(begin + DENSE_OUTPUTS, layer.out_features)
        grad_MK.addmm_(grad_MN[:, begin:end], layer.rows(begin, end))
    return grad_MK


class CpuLinear(WeightOnlyLinear):
    """What the layers for CPUs share: a choice of kernels, and weights that can be had in floats."""

    data: Tensor

    @abstractmethod
    def rows(self, begin: int, end: int) -> Tensor:
        """The weights of the outputs [begin, end), in float32, [end - begin, K]."""

    @property
    @abstractmethod
    def kernel_weights(self) -> tuple[Tensor, Tensor]:
        """What the compiled kernels take: the weights, and their scales."""

    def _torch_product(self, x_MK: Tensor) -> Tensor:
        """Multiply with torch's kernel, no bias."""
        raise NotImplementedError(f"torch has no kernel for {self.bits} bits in our layout")

    @property
    def weight(self) -> Tensor:
        """All weights, for models that look at them; made anew each time."""
        return self.rows(0, self.out_features).to(self.dtype)

    def biased_product(self, x_MK: Tensor, kernel: Kernel | None = None) -> Tensor:
        """See WeightOnlyLinear; `kernel`: None for the best one here."""
        if kernel is None:
            kernel = choose_kernel(
                self.bits, x_MK.shape[0], x_MK.dtype, is_compiled=kernels.is_compiled(), fast_floats=has_fast_floats()
            )
        if kernel is Kernel.COMPILED:
            return kernels.product(self.bits, x_MK, *self.kernel_weights, self.bias, self.out_features)
        y_MN = dense_product(x_MK, self) if kernel is Kernel.DENSE else self._torch_product(x_MK.contiguous())
        return _with_bias(y_MN, self.bias).to(x_MK.dtype)

    def input_gradient(self, grad_MN: Tensor) -> Tensor:
        return dense_input_gradient(grad_MN, self)


class Int8Linear(CpuLinear):
    """8 bits and a scale for each output."""

    bits = 8
    scale: Tensor

    def __init__(self, data_NK: Tensor, scale_N: Tensor, bias_N: nn.Parameter | None, like: Tensor) -> None:
        super().__init__(data_NK.shape[0], data_NK.shape[1], bias_N, like)
        self.register_buffer("data", data_NK)
        self.register_buffer("scale", scale_N)

    @classmethod
    def num_bytes(cls, num_outputs: int, num_inputs: int) -> int:
        return num_outputs * (num_inputs + 4)

    @classmethod
    def quantize(cls, weight_NK: Tensor, bias_N: nn.Parameter | None) -> Int8Linear:
        w_NK = weight_NK.to(torch.float32)
        scale_N = (w_NK.abs().amax(1) / 127).clamp_(min=torch.finfo(torch.float32).tiny)
        return cls((w_NK / scale_N[:, None]).round_().to(torch.int8), scale_N, bias_N, weight_NK)

    def rows(self, begin: int, end: int) -> Tensor:
        return self.data[begin:end].to(torch.float32).mul_(self.scale[begin:end, None])

    @property
    def kernel_weights(self) -> tuple[Tensor, Tensor]:
        return self.data, self.scale

    def _torch_product(self, x_MK: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(x_MK, self.data, self.scale.to(x_MK.dtype))


class Int4Linear(CpuLinear):
    """4 bits, with a scale and a zero for each output and group of inputs, laid out as kernels/products.c says."""

    bits = 4
    scale_zero: Tensor

    def __init__(self, data: Tensor, scale_zero: Tensor, num_inputs: int, bias_N: nn.Parameter | None, like: Tensor):
        super().__init__(data.shape[0], num_inputs, bias_N, like)
        self.register_buffer("data", data)
        self.register_buffer("scale_zero", scale_zero)

    @classmethod
    def num_bytes(cls, num_outputs: int, num_inputs: int) -> int:
        return num_outputs * (num_inputs // 2 + 4 * _padded(num_inputs // GROUP))

    @classmethod
    def quantize(cls, weight_NK: Tensor, bias_N: nn.Parameter | None) -> Int4Linear:
        q_NGg, scale_NG, zero_NG = quantize_groups(weight_NK, GROUP)
        num_outputs, num_groups, _ = q_NGg.shape
        parts = q_NGg.view(num_outputs, num_groups, 4, 16).unbind(2)
        words = parts[0] | parts[1] << 4 | parts[2] << 8 | parts[3] << 12
        data = words.to(torch.int16).view(torch.uint8).view(num_outputs, -1)
        scale_zero = scale_NG.new_zeros(num_outputs, _padded(num_groups), 2)
        scale_zero[:, :num_groups, 0] = scale_NG
        scale_zero[:, :num_groups, 1] = zero_NG
        return cls(data, scale_zero, weight_NK.shape[1], bias_N, weight_NK)

    def rows(self, begin: int, end: int) -> Tensor:
        words = self.data[begin:end].view(torch.int16).view(end - begin, -1, 16)
        q_NGg = torch.cat([words >> shift & 15 for shift in (0, 4, 8, 12)], 2)
        scale_zero = self.scale_zero[begin:end, : q_NGg.shape[1]].to(torch.float32)
        return q_NGg.to(torch.float32).mul_(scale_zero[..., :1]).add_(scale_zero[..., 1:]).flatten(1)

    @property
    def kernel_weights(self) -> tuple[Tensor, Tensor]:
        return self.data, self.scale_zero


class CudaInt4Linear(WeightOnlyLinear):
    """4 bits in the layout of torch's tensor-core kernel, which multiplies bfloat16. It has not run on a GPU yet."""

    bits = 4
    group = 128
    inner_k_tiles = 8

    def __init__(
        self, data: Tensor, scale_zero_GN2: Tensor, num_inputs: int, bias_N: nn.Parameter | None, like: Tensor
    ):
        super().__init__(scale_zero_GN2.shape[1], num_inputs, bias_N, like)
        self.register_buffer("data", data)
        self.register_buffer("scale_zero", scale_zero_GN2)

    @classmethod
    def fits(cls, num_outputs: int, num_inputs: int) -> bool:
        return num_inputs % (cls.inner_k_tiles * 16) == 0 and num_outputs % 8 == 0

    @classmethod
    def num_bytes(cls, num_outputs: int, num_inputs: int) -> int:
        return num_outputs * (num_inputs // 2 + 4 * (num_inputs // cls.group))

    @classmethod
    def quantize(cls, weight_NK: Tensor, bias_N: nn.Parameter | None) -> CudaInt4Linear:
        q_NGg, scale_NG, zero_NG = quantize_groups(weight_NK, cls.group)
        q_NK = q_NGg.flatten(1)
        pairs = (q_NK[:, ::2] << 4 | q_NK[:, 1::2]).to(torch.uint8)
        data = torch.ops.aten._convert_weight_to_int4pack(pairs, cls.inner_k_tiles)
        scale_zero_GN2 = torch.stack([scale_NG, cls.middle(scale_NG, zero_NG)], -1).transpose(0, 1).contiguous()
        return cls(data, scale_zero_GN2, weight_NK.shape[1], bias_N, weight_NK)

    @staticmethod
    def middle(scale_NG: Tensor, zero_NG: Tensor) -> Tensor:
        """What the kernel calls zero: its weights are (q - 8) * scale + zero."""
        return (zero_NG.float() + 8 * scale_NG.float()).to(torch.bfloat16)

    @property
    def weight(self) -> Tensor:
        """All weights, by way of the kernel, which alone knows its layout."""
        return torch.cat([columns_NC.to(self.dtype) for _, columns_NC in self._columns()], dim=1)

    def _columns(self) -> Iterator[tuple[slice, Tensor]]:
        """The weights of some inputs at a time, bfloat16: products of the kernel with rows that have a single 1."""
        for begin in range(0, self.in_features, DENSE_INPUTS):
            some = slice(begin, min(begin + DENSE_INPUTS, self.in_features))
            unit = torch.zeros(some.stop - begin, self.in_features, dtype=torch.bfloat16, device=self.like.device)
            unit.diagonal(begin).fill_(1)
            yield some, self._product(unit).t()

    def biased_product(self, x_MK: Tensor) -> Tensor:
        return _with_bias(self._product(x_MK), self.bias).to(x_MK.dtype)

    def _product(self, x_MK: Tensor) -> Tensor:
        x_MK = x_MK.to(torch.bfloat16).contiguous()
        return torch.ops.aten._weight_int4pack_mm(x_MK, self.data, self.group, self.scale_zero)

    def input_gradient(self, grad_MN: Tensor) -> Tensor:
        grad_MK = grad_MN.new_empty(grad_MN.shape[0], self.in_features)
        for some, columns_NC in self._columns():
            grad_MK[:, some] = grad_MN @ columns_NC.to(grad_MN.dtype)
        return grad_MK


def quantize_groups(weight_NK: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round weights to 4 bits between the smallest and the largest of each group of inputs.

    Returns: integers from 0 to 15, int32 [N, G, group]; scale and zero, bfloat16 [N, G]: w = scale * q + zero.
    """
    w_NGg = weight_NK.to(torch.float32).view(weight_NK.shape[0], -1, group)
    least_NG, most_NG = w_NGg.amin(2), w_NGg.amax(2)
    zero_NG = least_NG.to(torch.bfloat16)
    scale_NG = ((most_NG - zero_NG.float()) / 15).to(torch.bfloat16)
    divisor_NG1 = scale_NG.float().clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    q_NGg = ((w_NGg - zero_NG.float()[..., None]) / divisor_NG1).round_().clamp_(0, 15).to(torch.int32)
    return q_NGg, scale_NG, zero_NG


def _with_bias(y_MN: Tensor, bias_N: Tensor | None) -> Tensor:
    """In float32 where the product is, so that it is rounded once."""
    return y_MN if bias_N is None else y_MN + bias_N


def _padded(num_groups: int) -> int:
    return -(-num_groups // PADDED_GROUPS) * PADDED_GROUPS
