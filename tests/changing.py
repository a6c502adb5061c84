"""Adapters of all kinds, and the same changes made to a local model in the plainest way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from swarm.model.adapters import Bias, BlockAdapter, Bottleneck, Change, Ia3, Lora
from swarm.model.changes import PAST
from swarm.model.targets import Width


def random_change(kind: str, target: str, width: Width, draw: torch.Generator) -> Change:
    """A change whose tensors are not zero anywhere."""

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw) * 0.05

    size_in, size_out = width.in_features, width.out_features
    if kind == "lora":
        return Lora(target, some(4, size_in), some(size_out, 4), scaling=0.5)
    if kind == "ia3":
        return Ia3(target, 1 + some(size_out))
    if kind == "ia3 of inputs":
        return Ia3(target, 1 + some(size_in), of_input=True)
    if kind == "bias":
        return Bias(target, some(size_out))
    assert kind == "bottleneck"
    return Bottleneck(target, some(6, size_out), some(6), some(size_out, 6), some(size_out), "gelu")


KINDS = ("lora", "ia3", "ia3 of inputs", "bias", "bottleneck")


def random_adapter(widths: Mapping[str, Width], kinds: Sequence[str] = KINDS, *, seed: int = 0) -> BlockAdapter:
    """Each module of a block is changed, by one kind after the other."""
    draw = torch.Generator().manual_seed(seed)
    return BlockAdapter(
        [
            random_change(kinds[(number + seed) % len(kinds)], target, width, draw)
            for number, (target, width) in enumerate(sorted(widths.items()))
            if target != PAST
        ]
    )


@contextmanager
def changed(layers: Sequence[nn.Module], adapters: Sequence[BlockAdapter | None]) -> Iterator[None]:
    """Let the blocks of a local model be changed, whoever calls them."""

    def first(args: Any, kwargs: Any) -> Tensor:
        return args[0] if args else kwargs["hidden_states"]

    def before(change: Ia3) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
            x = first(args, kwargs) * change.factors
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

        return hook

    def after(change: Change) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            y = _plain(change, first(args, kwargs), output[0] if isinstance(output, tuple) else output)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        return hook

    with ExitStack() as hooks:
        for layer, adapter in zip(layers, adapters, strict=True):
            for change in adapter or ():
                module = layer.get_submodule(change.target)
                if isinstance(change, Ia3) and change.of_input:
                    handle: Any = module.register_forward_pre_hook(before(change), with_kwargs=True)
                else:
                    handle = module.register_forward_hook(after(change), with_kwargs=True)
                hooks.callback(handle.remove)
        yield


def _plain(change: Change, x: Tensor, y: Tensor) -> Tensor:
    if isinstance(change, Lora):
        return y + change.scaling * (x @ change.a_RI.T) @ change.b_OR.T
    if isinstance(change, Ia3):
        return y * change.factors
    if isinstance(change, Bias):
        return y + change.bias_O
    assert isinstance(change, Bottleneck)
    low = nn.functional.gelu(y @ change.down_KO.T + change.down_bias_K)
    return y + low @ change.up_OK.T + change.up_bias_O
