"""Take blocks out of a base model: which modules stay, under which numbers, and what its config then says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from swarm.errors import UnsupportedModel
from swarm.model.anatomy import Anatomy
from swarm.ranges import BlockRange


class NumberedLayers(nn.ModuleList):
    """Some blocks of a model under the numbers that they have in the whole model, as the checkpoint names them."""

    def __init__(self, layers: nn.ModuleList, blocks: BlockRange) -> None:
        super().__init__()
        for number in blocks:
            self.add_module(str(number), layers[number])


class PassThrough(nn.Module):
    """Stands for a part of the base model that only the client has; what it returns reaches no block."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point():
                return value
        return torch.zeros(())


def span_class(base: type[PreTrainedModel], anatomy: Anatomy, blocks: BlockRange) -> type[PreTrainedModel]:
    """A base model class whose instances have only these blocks.

    Each block is constructed as part of the whole model, so whatever depends on its number comes out right.
    """

    def __init__(self: PreTrainedModel, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        layers = anatomy.find_layers(self)
        _drop_client_parts(self, anatomy)
        self.set_submodule(anatomy.layers, NumberedLayers(layers, blocks))

    return type(base.__name__, (base,), {"__init__": __init__, "__module__": base.__module__})


def _drop_client_parts(base: nn.Module, anatomy: Anatomy) -> None:
    """Replace all parts with weights that stand beside the blocks: embeddings, positions, norms, projections."""
    *parents, _ = anatomy.layers.split(".")
    container = base
    for depth, _ in enumerate([*parents, ""]):
        kept = anatomy.layers.split(".")[depth]
        for name, child in list(container.named_children()):
            if name != kept and child.state_dict():
                container.set_submodule(name, PassThrough())
        container = container.get_submodule(kept)


def renumber(model: PreTrainedModel, anatomy: Anatomy, blocks: BlockRange) -> None:
    """Number the blocks from 0, as the loop over them and the cache expect, and cut the config likewise."""
    layers = nn.ModuleList(model.get_submodule(anatomy.layers).children())
    for index, (number, layer) in enumerate(zip(blocks, layers, strict=True)):
        set_number(layer, number, index)
    model.set_submodule(anatomy.layers, layers)
    cut_config(model.config, anatomy.num_blocks, blocks)


def set_number(layer: nn.Module, old: int, new: int) -> None:
    """Change the number under which a block's modules look up their cache."""
    for module in layer.modules():
        for name in ("layer_idx", "layer_id"):
            if getattr(module, name, None) == old:
                setattr(module, name, new)


def cut_config(config: PretrainedConfig, num_blocks: int, blocks: BlockRange) -> None:
    """Let a config of `num_blocks` blocks describe these alone, in place: all modules share it."""
    overrides = config.to_dict().get("per_layer_config") or {}
    kinds = (property, list, tuple)  # a config that was cut before has its computed lists as constants of its class
    computed = {name for name in dir(type(config)) if isinstance(getattr(type(config), name), kinds)}
    sliced = {
        name: value[blocks.start : blocks.end]
        for name in {*vars(config), *computed}
        if ("layer" in name or "block" in name) and name != "per_layer_config"
        if isinstance(value := getattr(config, name), list | tuple) and len(value) == num_blocks
    }
    if overrides:
        config.per_layer_config = None
    if computed & set(sliced):
        # Some configs compute these lists from periods and offsets, which would start anew in the middle of a model.
        constants = {name: sliced.pop(name) for name in computed & set(sliced)}
        config.__class__ = type(type(config).__name__, (type(config),), constants)
    for name, value in sliced.items():
        setattr(config, name, value)
    config.num_hidden_layers = len(blocks)
    if overrides:
        config.per_layer_config = {
            int(number) - blocks.start: values for number, values in overrides.items() if int(number) in set(blocks)
        }
    if config.num_hidden_layers != len(blocks):
        raise UnsupportedModel(f"the config of {config.model_type!r} models does not let itself be cut")
