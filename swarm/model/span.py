"""The server half of a model: a contiguous range of its blocks.

It is the library's own base model with the other blocks taken out. What its `forward` does to the hidden states before
the first block (embedding norms, learned positions, scaling) and after the last (final norm) belongs to the client and
takes no part (see passage.py).
"""

# B batch, L new tokens, T cached and new tokens, D hidden, P prompt or prefix tokens, N blocks of the span, M key/value
# heads, H head dim

from __future__ import annotations

import inspect
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from swarm.errors import BadCheckpoint, BadRequest
from swarm.model.adapters import num_prefix_tokens
from swarm.model.anatomy import Anatomy, anatomy_of, base_class_of
from swarm.model.checkpoint import Checkpoint
from swarm.model.cutting import renumber, span_class
from swarm.model.dropout import Dropout
from swarm.model.edits import Adapters, AddPrompt, make_edits
from swarm.model.half_layers import use_half_kernels
from swarm.model.loading import Progress, load_part
from swarm.model.passage import Passage
from swarm.model.quantization import Scheme, keep_differentiable, log_share
from swarm.model.span_cache import SpanCache
from swarm.ranges import BlockRange


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
        self.takes_position_ids = "position_ids" in inspect.signature(model.forward).parameters
        self._passage = Passage(model, self.layers)
        self._bytes_per_token: int | None = None

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

    @cached_property
    def one_token(self) -> SpanCache:
        """What a token leaves in the blocks, found out by running one."""
        cache = self.new_cache(1)
        with torch.inference_mode():
            self(torch.zeros(1, 1, self.hidden_size, dtype=self.dtype, device=self.device), cache=cache)
        return cache

    def prefix_of(self, adapters: Adapters | None) -> list[tuple[Tensor, Tensor]]:
        """The keys and values that adapters put in front of the tokens, [1, M, P, H] for each block; [] for none.

        Differentiable in the adapters.
        Raises: BadRequest: they have not the same length in all blocks.
        """
        if not num_prefix_tokens(adapters):
            return []
        prefixes = [adapter.prefix for adapter in adapters or () if adapter is not None and adapter.prefix is not None]

        def heads(rows_PX: Tensor, like_1MTH: Tensor) -> Tensor:
            return rows_PX.to(like_1MTH.dtype).unflatten(1, (like_1MTH.shape[1], -1)).transpose(0, 1).unsqueeze(0)

        return [
            (heads(prefix.keys_PI, layer.keys), heads(prefix.values_PO, layer.values))
            for prefix, layer in zip(prefixes, self.one_token.layers, strict=True)
        ]

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
        adapters: Adapters | None = None,
        dropout: Dropout | None = None,
    ) -> Tensor:
        """Run the blocks of this span on L tokens more.

        Args:
            x_BLD: hidden states entering the first block, on the span's device.
            cache: what came before; None means that these tokens are the whole sequence. It grows by L; a call that
                fails leaves it as it was.
            attention_mask_BT: int64, 1 for a token and 0 for padding, cached tokens included; None means no padding.
            position_ids_BL: int64; None means the positions after the cached tokens, or after a prefix.
            prompts_NBPD: deep prompts, added to what enters each block at the positions below P; B may be 1.
            adapters: what is changed in each block, on the span's device. Without a cache the tokens come after the
                prefix that they may have; a cache begins with it already (see `prefix_of`).
            dropout: drops features before those changes that say so; None: nothing is dropped.
        Returns: hidden states leaving the last block, in the span's dtype; differentiable in x, prompts and adapters
            when gradients are enabled and there is no cache.
        Raises:
            BadRequest: a shape does not fit the span, the cache or the call.
        """
        if cache is None and (prefix := self.prefix_of(adapters)):
            cache = self.new_cache(x_BLD.shape[0])
            cache.begin_with(prefix)
            attention_mask_BT = _with_prefix(attention_mask_BT, cache.length)
        position = cache.length if cache is not None else 0
        self._check_shapes(x_BLD, cache, attention_mask_BT, position_ids_BL, prompts_NBPD)
        if adapters is not None and len(adapters) != len(self.blocks):
            raise BadRequest(f"adapters of {len(adapters)} blocks were given, the span has {len(self.blocks)}")
        x_BLD = x_BLD.to(self.dtype)
        inputs: dict[str, Any] = {"use_cache": cache is not None}
        if attention_mask_BT is not None:
            inputs["attention_mask"] = attention_mask_BT
        if position_ids_BL is None and position:  # not every model counts the cached tokens when it makes its own
            position_ids_BL = torch.arange(position, position + x_BLD.shape[1], device=x_BLD.device).unsqueeze(0)
        if position_ids_BL is not None and self.takes_position_ids:
            inputs["position_ids"] = position_ids_BL
        num_tokens = x_BLD.shape[0] * x_BLD.shape[1]
        edits = make_edits(
            _prompt_adder(prompts_NBPD, position),
            [(num_tokens, adapters)],
            dropout=dropout,
            first_block=self.blocks.start,
        )
        if cache is None:
            return self._passage(x_BLD, inputs, edits)
        inputs["past_key_values"] = cache
        cache.begin_step()
        finished = False
        try:
            out_BLD = self._passage(x_BLD, inputs, edits)
            finished = True
        finally:
            if not finished:
                cache.undo_step()
        cache.end_step(x_BLD.shape[1])
        return out_BLD

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


def _with_prefix(mask_BL: Tensor | None, num_tokens: int) -> Tensor | None:
    """An attention mask with ones for so many tokens in front."""
    return None if mask_BL is None else torch.cat([mask_BL.new_ones(mask_BL.shape[0], num_tokens), mask_BL], dim=1)


def _prompt_adder(prompts_NBPD: Tensor | None, position: int) -> AddPrompt | None:
    """What adds the deep prompt of a block to those of the tokens from `position` on that stand at its positions."""
    if prompts_NBPD is None or position >= prompts_NBPD.shape[2]:
        return None

    def add_prompt(x_BLD: Tensor, index: int) -> Tensor:
        prompt_BPD = prompts_NBPD[index, :, position : position + x_BLD.shape[1]].to(x_BLD.dtype)
        length = prompt_BPD.shape[1]
        return torch.cat([x_BLD[:, :length] + prompt_BPD, x_BLD[:, length:]], dim=1)

    return add_prompt


def load_span(
    checkpoint: Checkpoint,
    blocks: BlockRange,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    scheme: Scheme | None = None,
    progress: Progress | None = None,
) -> Span:
    """Read the blocks of a range, and nothing else, from a checkpoint.

    Args:
        scheme: how to quantize their weights; None: not at all, or as the checkpoint comes.
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
        **({} if scheme is None else scheme.loader_arguments(dtype)),
    )
    if missing:
        raise BadCheckpoint(
            f"{checkpoint.name!r} lacks {len(missing)} tensors of the blocks {blocks}, {min(missing)} among them"
        )
    if scheme is not None:
        log_share(model, scheme)
    use_half_kernels(model)
    keep_differentiable(model)
    renumber(model, anatomy, blocks)
    return Span(model.requires_grad_(False), anatomy, blocks)
