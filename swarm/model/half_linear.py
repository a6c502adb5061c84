"""Linear layers in bfloat16 for processors that lack instructions for it, most of those in desktops among them.

There torch takes up to 6 times as long (docs/decisions/0011). Such a layer is still an
`nn.Linear` with its weight; only how it multiplies is another, while nobody trains it.
"""

# M rows of activations, K inputs, N outputs

from __future__ import annotations

import torch
from torch import Tensor, nn

from swarm.model import kernels
from swarm.model.weight_only import (
    DENSE_FROM_ROWS,
    dense_input_gradient,
    dense_product,
    frozen_forward,
    has_fast_floats,
)

COLUMNS = 16
"""The kernel takes a multiple of so many inputs."""


class HalfLinear(nn.Linear):
    """`nn.Linear` whose products are sums in float32, rounded once."""

    def forward(self, x: Tensor) -> Tensor:
        is_trained = torch.is_grad_enabled() and self.weight.requires_grad
        if is_trained or x.dtype != torch.bfloat16 or self.weight.dtype != torch.bfloat16 or not x.is_cpu:
            return super().forward(x)
        return frozen_forward(x, self)

    def biased_product(self, x_MK: Tensor) -> Tensor:
        """Multiply rows with the weights and add the bias; bfloat16, no gradient."""
        if x_MK.shape[0] < DENSE_FROM_ROWS:
            return kernels.half_product(x_MK.contiguous(), self.weight, self.bias)
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


def use_half_kernels(model: nn.Module) -> None:
    """Give the linear layers of a model these kernels, if they are in bfloat16 on a processor that lacks it."""
    if not kernels.is_compiled() or has_fast_floats():
        return
    for module in model.modules():
        if type(module) is not nn.Linear or module.in_features % COLUMNS:
            continue
        if module.weight.dtype == torch.bfloat16 and module.weight.is_cpu and module.weight.is_contiguous():
            module.__class__ = HalfLinear  # so that tied weights, hooks and names stay
