"""A part of a span as a span of its own, sharing its weights: what a client gets that needs only some of the blocks."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from torch import nn

from swarm.errors import BadRequest
from swarm.model.anatomy import anatomy_of
from swarm.model.span import Span
from swarm.ranges import BlockRange

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


MAX_VIEWS = 32
"""How many parts of a span are kept; routes use few, and making one again takes milliseconds."""


class SpanViews:
    """A span and the parts of it that were asked for lately."""

    def __init__(self, span: Span) -> None:
        self.span = span
        self._views: dict[BlockRange, Span] = {}

    def view(self, blocks: BlockRange) -> Span:
        """Return the span of these blocks. Raises: BadRequest: not all of them are here."""
        if blocks == self.span.blocks:
            return self.span
        view = self._views.pop(blocks, None) or narrow(self.span, blocks)
        self._views[blocks] = view
        if len(self._views) > MAX_VIEWS:
            del self._views[next(iter(self._views))]
        return view


def narrow(span: Span, blocks: BlockRange) -> Span:
    """Return a span of some of the blocks, over the same parameters and buffers.

    Raises: BadRequest: not all of the blocks are in the span.
    """
    if not span.blocks.covers(blocks):
        raise BadRequest(f"blocks {blocks} were asked for, the span holds {span.blocks}")
    anatomy = anatomy_of(span.config)
    offset = blocks.start - span.blocks.start
    model: Any = _shared(span.model)
    layers = list(model.get_submodule(anatomy.layers).children())[offset : offset + len(blocks)]
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if getattr(module, "layer_idx", None) == index + offset:
                module.layer_idx = index
    model.set_submodule(anatomy.layers, nn.ModuleList(layers))
    model.config = _cut_config(span, offset, len(blocks))
    return Span(model, anatomy, blocks)


def _cut_config(span: Span, offset: int, num_blocks: int) -> object:
    config = copy.copy(span.config)
    for name, value in list(vars(config).items()):
        per_layer = "layer" in name or "block" in name
        if per_layer and isinstance(value, list | tuple) and len(value) == len(span.blocks):
            setattr(config, name, value[offset : offset + num_blocks])
    config.num_hidden_layers = num_blocks
    return config


def _shared(module: nn.Module) -> nn.Module:
    """A copy of the module tree whose modules are new and whose tensors are the same."""
    twin = copy.copy(module)
    twin._modules = {name: None if child is None else _shared(child) for name, child in module._modules.items()}
    for hooks in _HOOKS:
        setattr(twin, hooks, OrderedDict())
    return twin
