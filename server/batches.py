"""Forward and Backward: one batch through a range of blocks, no cache. What they compute, without any network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from swarm.model.span import Span
from swarm.ranges import BlockRange
from swarm.v1 import blocks_pb2 as pb

# B batch, L length, D hidden, N blocks, P virtual tokens


@dataclass(frozen=True, slots=True)
class Batch:
    """The tensors of one Forward or Backward, still on the CPU."""

    blocks: BlockRange
    x_BLD: Tensor
    mask_BL: Tensor | None
    position_ids_BL: Tensor | None
    prompts_NBPD: Tensor | None
    grad_BLD: Tensor | None
    codec: pb.Codec
    """How the hidden states came, and how the answer goes back."""


def _run_span(span: Span, batch: Batch, x_BLD: Tensor, prompts: Tensor | None) -> Tensor:
    device = span.device
    return span(
        x_BLD,
        attention_mask_BT=None if batch.mask_BL is None else batch.mask_BL.to(device),
        position_ids_BL=None if batch.position_ids_BL is None else batch.position_ids_BL.to(device),
        prompts_NBPD=prompts,
    )


def run_forward(span: Span, batch: Batch) -> Tensor:
    """Return the hidden states that leave the span, [B, L, D], on the CPU."""
    with torch.inference_mode():
        prompts = None if batch.prompts_NBPD is None else batch.prompts_NBPD.to(span.device, span.dtype)
        return _run_span(span, batch, batch.x_BLD.to(span.device, span.dtype), prompts).cpu()


def run_backward(span: Span, batch: Batch, grad_BLD: Tensor) -> tuple[Tensor, Tensor | None]:
    """Run forward again and return the gradients of the inputs, [B, L, D], and of the prompts, on the CPU."""
    with torch.enable_grad():
        inputs = [batch.x_BLD.to(span.device, span.dtype).requires_grad_()]
        if batch.prompts_NBPD is not None:
            inputs.append(batch.prompts_NBPD.to(span.device, span.dtype).requires_grad_())
        y_BLD = _run_span(span, batch, inputs[0], inputs[1] if len(inputs) == 2 else None)
        gradients = torch.autograd.grad(y_BLD, inputs, grad_BLD.to(y_BLD.device, y_BLD.dtype))
    return gradients[0].cpu(), gradients[1].cpu() if len(inputs) == 2 else None
