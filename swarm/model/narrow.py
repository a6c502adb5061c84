"""A part of a span as a span of its own, sharing its weights: what a client gets that needs only some of the blocks."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable

from torch import nn
from transformers import PretrainedConfig

from swarm.errors import BadRequest
from swarm.model.cutting import cut_config, set_number
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
    offset = blocks.start - span.blocks.start
    config = copy.copy(span.config)
    cut_config(config, len(span.blocks), BlockRange(offset, offset + len(blocks)))
    model = twin_of(span.model, lambda old: config if old is span.config else old)
    layers = list(model.get_submodule(span.anatomy.layers).children())[offset : offset + len(blocks)]
    for index, layer in enumerate(layers):
        set_number(layer, index + offset, index)
    model.set_submodule(span.anatomy.layers, nn.ModuleList(layers))
    return Span(model, span.anatomy, blocks)


def twin_of(module: nn.Module, config_for: Callable[[PretrainedConfig], PretrainedConfig]) -> nn.Module:
    """A copy of the module tree whose modules are new, refer to other configs and have no hooks; the tensors are the
    same."""
    twin = copy.copy(module)
    children = module._modules.items()
    twin._modules = {name: None if child is None else twin_of(child, config_for) for name, child in children}
    for hooks in _HOOKS:
        setattr(twin, hooks, OrderedDict())
    if isinstance(config := getattr(twin, "config", None), PretrainedConfig):
        twin.config = config_for(config)
    return twin
