"""Which modules of a block a client may change, and how wide they are: found by looking at what passes through them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from swarm.errors import BadRequest, UnsupportedModel
from swarm.model.changes import PAST, Change, Prefix
from swarm.model.edits import Adapters
from swarm.model.kv_store import KVShape, kv_layout
from swarm.model.passage import first_input
from swarm.model.span import Span
from swarm.ranges import BlockRange

TRIAL_SHAPE = (2, 3)
"""Sequences and tokens that are sent through once."""


@dataclass(frozen=True, slots=True)
class Width:
    """What one token is at a module, before and after; in a cache, its keys and its values."""

    in_features: int
    out_features: int


Targets = Mapping[int, Mapping[str, Width]]
"""Number of a block in the model -> name of a module within it -> how wide it is. PAST stands for a block's cache, if
that can begin with a prefix."""


def find_targets(span: Span) -> Targets:
    """Return the modules that see every token once, each by itself, whatever they are made of.

    Linear layers of all precisions are among them, norms, attention and MLP as wholes; experts, which see some tokens,
    and what sees heads apart are not.
    """
    seen: dict[int, dict[str, list[Width | None]]] = {number: {} for number in span.blocks}

    def look(number: int, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = first_input(args, kwargs) if args or "hidden_states" in kwargs else None
            y = output[0] if isinstance(output, tuple) and output else output
            width = Width(x.shape[-1], y.shape[-1]) if _is_of_all_tokens(x) and _is_of_all_tokens(y) else None
            if isinstance(output, tuple) and width is not None and width.out_features != span.hidden_size:
                width = None  # a router: what else it returns would not follow its change
            seen[number].setdefault(name, []).append(width)

        return hook

    with ExitStack() as hooks, torch.inference_mode():
        for number, layer in zip(span.blocks, span.layers, strict=True):
            for name, module in layer.named_modules():
                if name:
                    hooks.callback(module.register_forward_hook(look(number, name), with_kwargs=True).remove)
        span(torch.zeros(*TRIAL_SHAPE, span.hidden_size, dtype=span.dtype, device=span.device))
    past = _past_widths(span)
    return {
        number: past.get(number, {})
        | {name: widths[0] for name, widths in of_block.items() if len(widths) == 1 and widths[0] is not None}
        for number, of_block in seen.items()
    }


def _past_widths(span: Span) -> Mapping[int, Mapping[str, Width]]:
    """What a token leaves in each block's cache; nothing where some block keeps more than keys and values."""

    def width(shape: KVShape) -> Width:
        return Width(shape.num_kv_heads * shape.key_dim, shape.num_kv_heads * shape.value_dim)

    try:
        layout = kv_layout(span)
    except UnsupportedModel:
        return {}
    return {number: {PAST: width(shape)} for number, shape in zip(layout.blocks, layout.shapes, strict=True)}


def _is_of_all_tokens(x: Any) -> TypeGuard[Tensor]:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return False
    return x.shape[:-1] in (TRIAL_SHAPE, (TRIAL_SHAPE[0] * TRIAL_SHAPE[1],))


def check_adapters(adapters: Adapters, blocks: BlockRange, targets: Targets) -> None:
    """Raise BadRequest unless every change is of a module that can be changed, and fits it."""
    for number, adapter in zip(blocks, adapters, strict=True):
        for change in adapter or ():
            width = _width_for(change, number, targets[number])
            try:
                change.check(width.in_features, width.out_features)
            except BadRequest as exc:
                raise BadRequest(f"in block {number}, {exc}") from exc


def _width_for(change: Change, number: int, widths: Mapping[str, Width]) -> Width:
    width = widths.get(change.target)
    if isinstance(change, Prefix) and width is None:
        raise BadRequest(f"block {number} keeps more than keys and values, so nothing can be put in front of them")
    if width is None or (change.target == PAST and not isinstance(change, Prefix)):
        known = ", ".join(sorted(widths.keys() - {PAST}))
        raise BadRequest(f"block {number} has no module {change.target} that can be changed, but {known}")
    return width
