"""Adapters of all kinds, and the same changes made to a local model in the plainest way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from swarm.model.adapters import Bias, BlockAdapter, Bottleneck, Change, Ia3, Lora
from swarm.model.anatomy import anatomy_of
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


def layers_of(local: Any) -> Sequence[nn.Module]:
    """The blocks of a local model of any family."""
    layers: Any = local.base_model.get_submodule(anatomy_of(local.config).layers)
    return list(layers)


def _first(args: Any, kwargs: Any) -> Tensor:
    x: Tensor = args[0] if args else kwargs["hidden_states"]
    return x


def _instead(x: Tensor, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})


@contextmanager
def virtual_tokens(local: Any, embeddings_PD: Tensor, deep_NBPD: Tensor | None) -> Iterator[None]:
    """Put virtual tokens in the place of the first P positions of what enters the first block of a local model, and add
    deep prompts there in each block, when a call starts at position 0."""
    length = len(embeddings_PD)

    def enter(number: int) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
            x_BLD = _first(args, kwargs)
            if x_BLD.shape[1] == 1:  # decoding: the virtual tokens are in the cache
                return None
            front = embeddings_PD.expand(len(x_BLD), -1, -1) if number == 0 else x_BLD[:, :length]
            front = front if deep_NBPD is None else front + deep_NBPD[number]
            return _instead(torch.cat([front, x_BLD[:, length:]], dim=1), args, kwargs)

        return hook

    with ExitStack() as hooks:
        for number, layer in enumerate(layers_of(local)):
            hooks.callback(layer.register_forward_pre_hook(enter(number), with_kwargs=True).remove)
        yield


def loss_with_virtual_tokens(
    local: Any, embeddings_PD: Tensor, deep_NBPD: Tensor | None, ids: Tensor, mask: Tensor | None
) -> Tensor:
    """Prompt tuning of the whole model, written plainly; padding counts for the loss."""
    embedded = with_room(local, len(embeddings_PD), ids)
    if mask is not None:
        mask = torch.cat([mask.new_ones(len(ids), len(embeddings_PD)), mask], dim=1)
    with virtual_tokens(local, embeddings_PD, deep_NBPD):
        logits = local(inputs_embeds=embedded, attention_mask=mask, use_cache=False).logits[:, len(embeddings_PD) :]
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def with_room(local: Any, num_virtual: int, ids: Tensor) -> Tensor:
    """Embeddings of tokens, with room in front for virtual ones."""
    embedded = local.get_input_embeddings()(ids)
    return torch.cat([embedded.new_zeros(len(ids), num_virtual, embedded.shape[2]), embedded], dim=1)


@contextmanager
def changed(layers: Sequence[nn.Module], adapters: Sequence[BlockAdapter | None]) -> Iterator[None]:
    """Let the blocks of a local model be changed, whoever calls them."""

    def before(change: Ia3) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
            return _instead(_first(args, kwargs) * change.factors, args, kwargs)

        return hook

    def after(change: Change) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            y = _plain(change, _first(args, kwargs), output[0] if isinstance(output, tuple) else output)
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
