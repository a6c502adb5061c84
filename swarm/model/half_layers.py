"""Layers in bfloat16 whose products and norms are computed by kernels of our own.

On processors that lack instructions for bfloat16, most of those in desktops among them, torch takes up to 6 times as
long for products (docs/decisions/0011), and minutes for their gradients. On those that have them, it reads the weights
for few rows, as decoding has, more slowly than memory gives them. Everywhere it takes a handful of calls for each norm.
Such a layer is still of its class, with its weight; only how it computes is another.
"""

# M rows of activations, K inputs, N outputs, D features

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from swarm.model import kernels
from swarm.model.kernels import Level, has_fast_floats
from swarm.model.weight_only import (
    DENSE_FROM_ROWS,
    dense_input_gradient,
    dense_product,
    layer_forward,
)

COLUMNS = 16
"""The kernel for products takes a multiple of so many inputs."""

KERNEL_ROWS = {Level.AVX2: DENSE_FROM_ROWS, Level.AVX512: 64, Level.AMX: 128}
"""With as many rows, others are faster: torch, or products in floats where the processor has nothing for bfloat16."""

NORM_COLUMNS = 8
"""The kernel for norms takes a multiple of so many features."""

TRIAL_ROWS = 64
"""Rows with which it is found out whether a module computes what the kernel does."""

NORM_ROWS = 64
"""With more rows, torch's kernels are faster, which use all cores."""


class HalfLinear(nn.Linear):
    """`nn.Linear` whose products, and gradients, are sums in float32, rounded once."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16 or self.weight.dtype != torch.bfloat16 or not x.is_cpu or self._is_for_torch(x):
            return super().forward(x)
        return layer_forward(x, self, self.weight, self.bias)

    def _is_for_torch(self, x: Tensor) -> bool:
        if not kernels.is_wide():
            return False
        needs_gradient = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        return needs_gradient or x.numel() >= KERNEL_ROWS[kernels.best_level()] * self.in_features

    bits = 16

    @property
    def kernel_weights(self) -> tuple[Tensor, None]:
        """What the compiled kernels take: the weights, without scales."""
        return self.weight, None

    def biased_product(self, x_MK: Tensor) -> Tensor:
        """Multiply rows with the weights and add the bias; bfloat16, no gradient."""
        if x_MK.shape[0] < KERNEL_ROWS[kernels.best_level()]:
            return kernels.product(16, x_MK, self.weight, None, self.bias, self.out_features)
        y_MN = dense_product(x_MK, self)
        if self.bias is not None:
            y_MN += self.bias
        return y_MN.to(torch.bfloat16)

    def input_gradient(self, grad_MN: Tensor) -> Tensor:
        """Multiply the gradient of the outputs with the weights; float32."""
        return dense_input_gradient(grad_MN, self)

    def rows(self, begin: int, end: int) -> Tensor:
        """The weights of the outputs [begin, end), in float32, [end - begin, K]."""
        return self.weight.detach()[begin:end].to(torch.float32)


class HalfNorm(nn.Module):
    """What the class of an RMSNorm is mixed with."""

    weight: Tensor
    epsilon: float

    def forward(self, x: Tensor) -> Tensor:
        needs_gradient = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        is_half = x.dtype == self.weight.dtype == torch.bfloat16
        num_features = self.weight.shape[0]
        if needs_gradient or not is_half or not x.is_cpu or x.numel() > NORM_ROWS * num_features:
            y: Tensor = super().forward(x)
            return y
        return kernels.rms_norm(x.reshape(-1, num_features), self.weight, self.epsilon).view(x.shape)


@functools.cache
def _half_norm(norm_class: type[nn.Module]) -> type[nn.Module]:
    return type(f"Half{norm_class.__name__}", (HalfNorm, norm_class), {})


def _epsilon(module: nn.Module) -> float | None:
    """That of a module which computes what our kernel does, as a trial shows; None: it is another module."""
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    names = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(epsilon, float) or names != {"weight"}:
        return None
    weight: Any = module.weight
    takes_one = len(inspect.signature(module.forward).parameters) == 1
    if not takes_one or weight.dim() != 1 or not _is_half(weight) or weight.shape[0] % NORM_COLUMNS:
        return None
    generator = torch.Generator().manual_seed(0)
    x_1MD = torch.randn(1, TRIAL_ROWS, weight.shape[0], generator=generator).to(torch.bfloat16)
    trial: Any = copy.deepcopy(module).requires_grad_(False)
    trial.weight.copy_(torch.randn(weight.shape, generator=generator))  # with ones, much looks the same
    with torch.no_grad():
        wanted = trial(x_1MD)[0].float()
    found = kernels.rms_norm(x_1MD[0], trial.weight, epsilon).float()
    # A sum in another order may round a number the other way, but hardly ever.
    is_same = torch.allclose(found, wanted, rtol=2**-7, atol=0) and (found == wanted).float().mean() > 0.999
    return epsilon if is_same else None


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bfloat16 and tensor.is_cpu and tensor.is_contiguous()


def use_half_kernels(model: nn.Module) -> None:
    """Give the layers of a model these kernels, if they are in bfloat16 on a processor where these are faster."""
    if not kernels.is_compiled() or (has_fast_floats() and not kernels.is_wide()):
        return
    for module in model.modules():
        # The class alone changes, so that tied weights, hooks and names stay.
        if type(module) is nn.Linear and module.in_features % COLUMNS == 0 and _is_half(module.weight):
            module.__class__ = HalfLinear
        elif (epsilon := _epsilon(module)) is not None:
            norm_class: Any = type(module)
            module.__class__ = _half_norm(norm_class)
            module.epsilon = epsilon  # type: ignore[assignment]
