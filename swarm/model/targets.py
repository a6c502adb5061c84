"""Which modules of a block a client may change, and how wide they are: found by looking at what passes through them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

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
"""Sequences and tokens that are sent through, twice."""

TRIAL_SCALE = 0.1
"""Standard deviation of the hidden states that are sent, about that of embeddings."""

SAME, NOT_SAME = 0.05, 0.001
"""What counts as the same, in any precision, and what does not, as shares of the largest value."""


@dataclass(frozen=True, slots=True)
class Width:
    """What one token is at a module, before and after; in a cache, its keys and its values."""

    in_features: int
    out_features: int


Targets = Mapping[int, Mapping[str, Width]]
"""Number of a block in the model -> name of a module within it -> how wide it is. PAST stands for a block's cache, if
that can begin with a prefix."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a module was given and returned in one trial; None where that were not all tokens."""

    x_BLI: Tensor | None
    y_BLO: Tensor | None


def find_targets(span: Span) -> Targets:
    """Return the modules that see every token once, each by itself, whatever they are made of.

    Linear layers of all precisions are among them, norms, attention and MLP as wholes; experts, which see some tokens,
    and what sees heads apart are not. Two batches of random tokens are sent through, of which the second has the
    sequences of the first in the other order, and one other token: what a target sees follows them. Tokens that are
    alike would not tell a module that rearranges them from one that does not.
    """
    draw = torch.Generator().manual_seed(0)
    x_BLD = torch.randn(*TRIAL_SHAPE, span.hidden_size, generator=draw) * TRIAL_SCALE
    other_BLD = x_BLD.flip(0)
    other_BLD[0, -1] = torch.randn(span.hidden_size, generator=draw) * TRIAL_SCALE
    first, second = _trial(span, x_BLD), _trial(span, other_BLD)
    past = _past_widths(span)
    targets = {number: dict(past.get(number, {})) for number in span.blocks}
    for (number, name), calls in first.items():
        others = second.get((number, name), [])
        if len(calls) != 1 or len(others) != 1:
            continue
        (one,), (other,) = calls, others
        if one.x_BLI is None or one.y_BLO is None or other.x_BLI is None or other.y_BLO is None:
            continue
        if _follows(one.x_BLI, other.x_BLI) and _follows(one.y_BLO, other.y_BLO):
            targets[number][name] = Width(one.x_BLI.shape[-1], one.y_BLO.shape[-1])
    return targets


def _trial(span: Span, x_BLD: Tensor) -> dict[tuple[int, str], list[_Seen]]:
    """Send hidden states through; return what each module saw, call by call."""
    seen: dict[tuple[int, str], list[_Seen]] = {}

    def look(number: int, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = first_input(args, kwargs) if args or "hidden_states" in kwargs else None
            y = output[0] if isinstance(output, tuple) and output else output
            x_BLI, y_BLO = _by_tokens(x), _by_tokens(y)
            if isinstance(output, tuple) and y_BLO is not None and y_BLO.shape[-1] != span.hidden_size:
                y_BLO = None  # a router: what else it returns would not follow its change
            seen.setdefault((number, name), []).append(_Seen(x_BLI, y_BLO))

        return hook

    with ExitStack() as hooks, torch.inference_mode():
        for number, layer in zip(span.blocks, span.layers, strict=True):
            for name, module in layer.named_modules():
                if name:
                    hooks.callback(module.register_forward_hook(look(number, name), with_kwargs=True).remove)
        span(x_BLD.to(span.device, span.dtype))
    return seen


def _past_widths(span: Span) -> Mapping[int, Mapping[str, Width]]:
    """What a token leaves in each block's cache; nothing where some block keeps more than keys and values."""

    def width(shape: KVShape) -> Width:
        return Width(shape.num_kv_heads * shape.key_dim, shape.num_kv_heads * shape.value_dim)

    try:
        layout = kv_layout(span)
    except UnsupportedModel:
        return {}
    return {number: {PAST: width(shape)} for number, shape in zip(layout.blocks, layout.shapes, strict=True)}


def _by_tokens(x: Any) -> Tensor | None:
    """A copy on the CPU, [B, L, …]; None if that are not all tokens, each by itself."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return None
    if x.shape[:-1] not in (TRIAL_SHAPE, (TRIAL_SHAPE[0] * TRIAL_SHAPE[1],)):
        return None
    return x.detach().to("cpu", torch.float32, copy=True).reshape(*TRIAL_SHAPE, -1)


def _follows(one: Tensor, other: Tensor) -> bool:
    """Whether what a module saw in the second trial stands where the tokens that it was made of do."""
    change_BL = (other - one.flip(0)).abs().amax(dim=-1) / one.abs().max()
    is_changed = bool(change_BL[0, -1] > NOT_SAME)
    change_BL[0, -1] = 0
    return is_changed and bool((change_BL <= SAME).all())


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
