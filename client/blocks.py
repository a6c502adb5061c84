"""Remote blocks as a torch module: sliceable, differentiable with respect to what the client owns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swarm.announcement import AdapterListing
from swarm.errors import BadRequest
from swarm.model.adapters import Lora, ModelAdapter, frozen
from swarm.ranges import BlockRange

from .compute import Batch, RemoteCompute
from .hosted import check_one_way
from .loop import LoopThread

# B batch, L length, D hidden, N blocks, P virtual tokens


class RemoteBlocks(nn.Module):
    """The blocks of a model that run elsewhere; it has no parameters.

    `blocks[4:9]` is a module over some of them, `blocks[4]` over one. The hidden states that enter and leave have
    the shape [B, L, D]; gradients flow back to the inputs (prompts, adapters), never into the blocks.
    """

    def __init__(self, loop: LoopThread, compute: RemoteCompute, blocks: BlockRange, hidden_size: int) -> None:
        super().__init__()
        self.blocks = blocks
        self._loop = loop
        self._compute = compute
        self._hidden_size = hidden_size

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int | slice) -> RemoteBlocks:
        numbers = range(self.blocks.start, self.blocks.end)
        if isinstance(index, slice):
            chosen = numbers[index]
            if chosen.step != 1 or not chosen:
                raise BadRequest(f"remote blocks {self.blocks} take non-empty slices with step 1")
            blocks = BlockRange(chosen.start, chosen.stop)
        else:
            blocks = BlockRange(numbers[index], numbers[index] + 1)
        return RemoteBlocks(self._loop, self._compute, blocks, self._hidden_size)

    def forward(
        self,
        x_BLD: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        prompts: Tensor | None = None,
        adapters: ModelAdapter | None = None,
        active_adapter: str | AdapterListing | None = None,
    ) -> Tensor:
        """Run hidden states through the blocks.

        Args:
            x_BLD: hidden states entering the first of these blocks.
            attention_mask: int64 [B, L], 0 for padding.
            position_ids: int64 [B or 1, L]; None: 0, 1, ...
            prompts: deep prompts [N, B or 1, P, D] for these blocks, added at the first P positions of each.
            adapters: what is changed in the blocks of the model, block 0 first; their tensors get gradients too.
                Features are dropped where a change says so, each time others, drawn by torch's generator.
            active_adapter: instead of these, one that servers host; only its listing names the same one for sure.
        Raises: BadRequest: a shape does not fit. NoRoute: no servers for some blocks within the timeout.
        """
        self._check(x_BLD, attention_mask, position_ids, prompts)
        if adapters is not None and len(adapters) < self.blocks.end:
            raise BadRequest(f"adapters of {len(adapters)} blocks were given, these are blocks {self.blocks}")
        hosted = self.find_adapter(active_adapter)
        check_one_way(adapters, hosted)
        tensors = _tensors_of(adapters, self.blocks)
        wanted = any(each is not None and each.requires_grad for each in (x_BLD, prompts, *tensors))
        keep = wanted and torch.is_grad_enabled()
        call = _Call(self, keep, attention_mask, position_ids, frozen(adapters), hosted)
        y_BLD: Tensor = _RemoteFunction.apply(call, x_BLD, prompts, *tensors)
        return y_BLD

    def find_adapter(self, wanted: str | AdapterListing | None) -> AdapterListing | None:
        """The hosted adapter that a name means now. Raises: BadRequest: nobody has it."""
        if wanted is None or isinstance(wanted, AdapterListing):
            return wanted
        return self._loop.run(self._compute.find_adapter(wanted))

    def _check(self, x_BLD: Tensor, mask_BL: Tensor | None, ids_BL: Tensor | None, prompts_NBPD: Tensor | None) -> None:
        if x_BLD.dim() != 3 or x_BLD.shape[2] != self._hidden_size or 0 in x_BLD.shape or not x_BLD.is_floating_point():
            raise BadRequest(
                f"remote blocks take floating-point hidden states [batch, length, {self._hidden_size}], "
                f"got {x_BLD.dtype} {list(x_BLD.shape)}"
            )
        batch_size, length, _ = x_BLD.shape
        if mask_BL is not None and mask_BL.shape != (batch_size, length):
            raise BadRequest(f"attention_mask must have the shape {[batch_size, length]}, got {list(mask_BL.shape)}")
        if ids_BL is not None and ids_BL.shape not in ((batch_size, length), (1, length)):
            raise BadRequest(f"position_ids must have the shape {[batch_size, length]}, got {list(ids_BL.shape)}")
        if prompts_NBPD is None:
            return
        shape = list(prompts_NBPD.shape)
        if len(shape) != 4 or shape[0] != len(self) or shape[1] not in (1, batch_size) or shape[3] != self._hidden_size:
            raise BadRequest(
                f"prompts must have the shape [{len(self)}, 1 or {batch_size}, tokens, {self._hidden_size}], "
                f"got {shape}"
            )
        if not 1 <= shape[2] <= length:
            raise BadRequest(f"prompts of {shape[2]} tokens do not fit a sequence of {length}")

    def extra_repr(self) -> str:
        return f"blocks={self.blocks}"

    def _batch(self, call: _Call, x_BLD: Tensor, prompts_NBPD: Tensor | None) -> Batch:
        """The tensors on the CPU, prompts padded in front so that index 0 is block 0 of the model."""
        prompts = None
        if prompts_NBPD is not None:
            num_before = self.blocks.start
            padding = prompts_NBPD.new_zeros(num_before, *prompts_NBPD.shape[1:], device="cpu")
            prompts = torch.cat([padding, prompts_NBPD.detach().cpu()])
        mask = None if call.mask_BL is None else call.mask_BL.cpu().to(torch.int64)
        ids = None if call.position_ids_BL is None else call.position_ids_BL.cpu().to(torch.int64)
        seed = _dropout_seed(call.adapters)
        return Batch(x_BLD.detach().cpu(), self.blocks, mask, ids, prompts, call.adapters, call.hosted, seed)


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """What a call brings that gets no gradients."""

    blocks: RemoteBlocks
    differentiable: bool
    mask_BL: Tensor | None
    position_ids_BL: Tensor | None
    adapters: ModelAdapter | None
    hosted: AdapterListing | None


class _RemoteFunction(torch.autograd.Function):
    """Forward and backward calls as one differentiable operation."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x_BLD: Tensor, prompts: Tensor | None, *tensors: Tensor) -> Tensor:
        blocks = call.blocks
        batch = blocks._batch(call, x_BLD, prompts)
        y_BLD, traces = blocks._loop.run(blocks._compute.forward(batch, keep=call.differentiable))
        if call.differentiable:
            ctx.blocks, ctx.batch, ctx.traces = blocks, batch, traces
            ctx.like = [(tensor.device, tensor.dtype) for tensor in tensors]
            ctx.prompts_like = None if prompts is None else (prompts.device, prompts.dtype)
        return y_BLD.to(x_BLD.device)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BLD: Tensor) -> tuple[Tensor | None, ...]:
        blocks: RemoteBlocks = ctx.blocks
        grad = grad_BLD.cpu().contiguous()
        gradients = blocks._loop.run(blocks._compute.backward(ctx.batch, ctx.traces, grad))
        dprompts = gradients.dprompts_NBPD
        if dprompts is not None:
            dprompts = dprompts[blocks.blocks.start :].to(*ctx.prompts_like)
        dadapters = [each for number in blocks.blocks for each in gradients.dadapters.get(number, ())]
        cast = [gradient.to(*like) for gradient, like in zip(dadapters, ctx.like, strict=True)]
        return None, gradients.dx_BLD.to(grad_BLD.device), dprompts, *cast


def _tensors_of(adapters: ModelAdapter | None, blocks: BlockRange) -> list[Tensor]:
    """The tensors of the adapters of some blocks, in the order in which gradients come back."""
    chosen = () if adapters is None else adapters[blocks.start : blocks.end]
    return [tensor for adapter in chosen if adapter is not None for tensor in adapter.tensors().values()]


def _dropout_seed(adapters: ModelAdapter | None) -> int | None:
    """A new seed, if anything is to be dropped."""
    changes = [change for adapter in adapters or () if adapter is not None for change in adapter]
    if not any(isinstance(change, Lora) and change.dropout for change in changes):
        return None
    return int(torch.randint(1 << 62, ()))
