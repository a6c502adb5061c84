"""The server half of a model: a contiguous range of its blocks.

It is the library's own base model with the other blocks taken out. What its `forward` does to the hidden states before
the first block (embedding norms, learned positions, scaling) and after the last (final norm) belongs to the client:
the hidden states are put in at the first block and taken out at the last, so that none of it takes part.
"""

# B batch, L new tokens, T cached and new tokens, D hidden, P prompt tokens, N blocks of the span

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from swarm.errors import BadCheckpoint, BadRequest
from swarm.model.anatomy import Anatomy, anatomy_of, base_class_of
from swarm.model.checkpoint import Checkpoint
from swarm.model.cutting import renumber, span_class
from swarm.model.loading import Progress, load_part
from swarm.model.span_cache import SpanCache
from swarm.ranges import BlockRange


@dataclass(slots=True)
class _Step:
    """What the hooks of one forward call need: the hidden states to put in, and those that come out."""

    x_BLD: Tensor
    prompts_NBPD: Tensor | None
    position: int
    out_BLD: Tensor | None = None

    def with_prompt(self, x_BLD: Tensor, index: int) -> Tensor:
        """Add the deep prompt of one block to those of these tokens that stand at its positions."""
        if self.prompts_NBPD is None or self.position >= self.prompts_NBPD.shape[2]:
            return x_BLD
        prompt_BPD = self.prompts_NBPD[index, :, self.position : self.position + x_BLD.shape[1]].to(x_BLD.dtype)
        length = prompt_BPD.shape[1]
        return torch.cat([x_BLD[:, :length] + prompt_BPD, x_BLD[:, length:]], dim=1)


class Span(nn.Module):
    """The blocks [start, end) of a model, in eval mode and frozen."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, blocks: BlockRange) -> None:
        super().__init__()
        self.model = model
        """The base model, cut down; `model.config` describes these blocks alone, which are numbered from 0."""
        self.anatomy = anatomy
        """That of the whole model."""
        self.blocks = blocks
        self.num_model_blocks = anatomy.num_blocks
        self.hidden_size = anatomy.hidden_size
        self.layers: nn.ModuleList = model.get_submodule(anatomy.layers)
        self._accepted = set(inspect.signature(model.forward).parameters)
        self._steps = threading.local()
        self._bytes_per_token: int | None = None
        self.layers[0].register_forward_pre_hook(self._put_in, with_kwargs=True)
        self.layers[-1].register_forward_hook(self._take_out)

    @property
    def config(self) -> PretrainedConfig:
        """The config of these blocks alone."""
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def can_rewind(self) -> bool:
        """Whether a cache of this span can go back to every earlier position."""
        return self.new_cache(1).can_rewind

    def new_cache(self, batch_size: int) -> SpanCache:
        """An empty cache for `batch_size` sequences; it takes memory as tokens come."""
        return SpanCache(self.config, batch_size)

    def cache_bytes_per_token(self) -> int:
        """Bytes that one token of one sequence takes in a cache, all blocks of the span together.

        Recurrent states, which do not grow, are counted as if a sequence had 1024 tokens.
        """
        if self._bytes_per_token is None:
            with torch.inference_mode():
                cache = self.new_cache(1)
                x_BLD = torch.zeros(1, 8, self.hidden_size, dtype=self.dtype, device=self.device)
                self(x_BLD[:, :4], cache=cache)
                few = cache.num_bytes
                self(x_BLD[:, 4:], cache=cache)
                growth = (cache.num_bytes - few) // 4
            self._bytes_per_token = growth + max(0, few - 4 * growth) // 1024
        return self._bytes_per_token

    def forward(
        self,
        x_BLD: Tensor,
        *,
        cache: SpanCache | None = None,
        attention_mask_BT: Tensor | None = None,
        position_ids_BL: Tensor | None = None,
        prompts_NBPD: Tensor | None = None,
    ) -> Tensor:
        """Run the blocks of this span on L tokens more.

        Args:
            x_BLD: hidden states entering the first block, on the span's device.
            cache: what came before; None means that these tokens are the whole sequence. It grows by L; a call that
                fails leaves it as it was.
            attention_mask_BT: int64, 1 for a token and 0 for padding, cached tokens included; None means no padding.
            position_ids_BL: int64; None means the positions after the cached tokens.
            prompts_NBPD: deep prompts, added to what enters each block at the positions below P; B may be 1.
        Returns: hidden states leaving the last block, in the span's dtype; differentiable in x and prompts when
            gradients are enabled and there is no cache.
        Raises:
            BadRequest: a shape does not fit the span, the cache or the call.
        """
        position = cache.length if cache is not None else 0
        self._check_shapes(x_BLD, cache, attention_mask_BT, position_ids_BL, prompts_NBPD)
        step = _Step(x_BLD.to(self.dtype), prompts_NBPD, position)
        inputs: dict[str, Any] = {"inputs_embeds": step.x_BLD, "use_cache": cache is not None}
        if attention_mask_BT is not None:
            inputs["attention_mask"] = attention_mask_BT
        if position_ids_BL is None and position:  # not every model counts the cached tokens when it makes its own
            position_ids_BL = torch.arange(position, position + x_BLD.shape[1], device=x_BLD.device).unsqueeze(0)
        if position_ids_BL is not None and "position_ids" in self._accepted:
            inputs["position_ids"] = position_ids_BL
        if cache is None:
            self._run(step, inputs)
        else:
            inputs["past_key_values"] = cache
            cache.begin_step()
            finished = False
            try:
                self._run(step, inputs)
                finished = True
            finally:
                if not finished:
                    cache.undo_step()
            cache.end_step(x_BLD.shape[1])
        assert step.out_BLD is not None, "the base model never ran its last block"
        return step.out_BLD

    def _run(self, step: _Step, inputs: dict[str, Any]) -> None:
        self._steps.now = step
        try:
            if step.prompts_NBPD is None:
                self.model(**inputs)
            else:
                with self._prompt_hooks():
                    self.model(**inputs)
        finally:
            self._steps.now = None

    def _put_in(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        step: _Step = self._steps.now
        return _replace_hidden_states(args, kwargs, step.with_prompt(step.x_BLD, 0))

    def _take_out(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._steps.now.out_BLD = output[0] if isinstance(output, tuple) else output

    @contextmanager
    def _prompt_hooks(self) -> Iterator[None]:
        """Hooks for deep prompts, set only while needed: each costs time in every call of its block."""

        def hook_for(index: int) -> Any:
            def add_prompt(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                step: _Step = self._steps.now
                x_BLD = args[0] if args else kwargs["hidden_states"]
                return _replace_hidden_states(args, kwargs, step.with_prompt(x_BLD, index))

            return add_prompt

        with ExitStack() as hooks:
            for index, layer in enumerate(self.layers):
                if index:
                    handle = layer.register_forward_pre_hook(hook_for(index), with_kwargs=True)
                    hooks.callback(handle.remove)
            yield

    def _check_shapes(
        self,
        x_BLD: Tensor,
        cache: SpanCache | None,
        attention_mask_BT: Tensor | None,
        position_ids_BL: Tensor | None,
        prompts_NBPD: Tensor | None,
    ) -> None:
        if x_BLD.dim() != 3 or x_BLD.shape[2] != self.hidden_size or 0 in x_BLD.shape:
            raise BadRequest(f"hidden states must be [batch, length, {self.hidden_size}], not {list(x_BLD.shape)}")
        batch, length = x_BLD.shape[:2]
        if cache is not None and cache.batch_size != batch:
            raise BadRequest(f"the cache holds {cache.batch_size} sequences, the hidden states {batch}")
        total = length + (cache.length if cache is not None else 0)
        if attention_mask_BT is not None and attention_mask_BT.shape != (batch, total):
            raise BadRequest(f"the attention mask must be {[batch, total]}, not {list(attention_mask_BT.shape)}")
        if position_ids_BL is not None and position_ids_BL.shape not in ((batch, length), (1, length)):
            raise BadRequest(f"the position ids must be {[batch, length]}, not {list(position_ids_BL.shape)}")
        if prompts_NBPD is not None and (
            prompts_NBPD.dim() != 4
            or prompts_NBPD.shape[0] != len(self.blocks)
            or prompts_NBPD.shape[1] not in (1, batch)
            or prompts_NBPD.shape[3] != self.hidden_size
        ):
            wanted = [len(self.blocks), batch, "any", self.hidden_size]
            raise BadRequest(f"the deep prompts must be {wanted}, not {list(prompts_NBPD.shape)}")


def _replace_hidden_states(
    args: tuple[Any, ...], kwargs: dict[str, Any], x_BLD: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((x_BLD, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x_BLD})


def load_span(
    checkpoint: Checkpoint,
    blocks: BlockRange,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    progress: Progress | None = None,
) -> Span:
    """Read the blocks of a range, and nothing else, from a checkpoint.

    Raises:
        UnsupportedModel: the architecture cannot be cut.
        BadRequest: the model has no such blocks.
        BadCheckpoint: tensors of these blocks are missing, corrupt, or of the wrong shape.
        ResourceError: the device has no memory for them.
    """
    anatomy = anatomy_of(checkpoint.config)
    blocks.check_inside(anatomy.num_blocks)
    model, missing = load_part(
        span_class(base_class_of(checkpoint.config), anatomy, blocks),
        checkpoint.config,
        checkpoint,
        dtype=dtype,
        device=torch.device(device),
        progress=progress,
    )
    if missing:
        raise BadCheckpoint(
            f"{checkpoint.name!r} lacks {len(missing)} tensors of the blocks {blocks}, {min(missing)} among them"
        )
    renumber(model, anatomy, blocks)
    return Span(model.requires_grad_(False), anatomy, blocks)
