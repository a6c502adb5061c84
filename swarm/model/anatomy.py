"""Where an architecture keeps its blocks, and whether it can be cut at all.

Newer configs say where things are (`base_model_pp_plan`); `families.py` knows the rest. Only the place of the layer
list is needed: everything else is left to the model's own `forward` on the client, and bypassed on servers.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from swarm.errors import BadCheckpoint, UnsupportedModel
from swarm.model import families

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Anatomy:
    """How the base model of one checkpoint is put together."""

    model_type: str
    num_blocks: int
    hidden_size: int
    layers: str
    """Dotted path of the layer list inside the base model."""
    layers_return_tuple: bool
    """Whether the base model takes `layer(...)[0]`, rather than `layer(...)`, as the hidden states."""

    max_session_tokens: int | None = None
    """How long a session can be without losing exactness; None: no such limit."""

    def find_layers(self, base: nn.Module) -> nn.ModuleList:
        """Find the layer list in a base model that still has all its blocks.

        Raises:
            UnsupportedModel: it is not there, or does not hold one module per block.
        """
        try:
            layers = base.get_submodule(self.layers)
        except AttributeError as exc:
            raise UnsupportedModel(
                f"models of the type {self.model_type!r} keep no blocks under {self.layers!r}: "
                "nothing is known about where to cut them"
            ) from exc
        if not isinstance(layers, nn.ModuleList) or len(layers) != self.num_blocks:
            raise UnsupportedModel(
                f"models of the type {self.model_type!r} do not keep their {self.num_blocks} blocks as one list"
            )
        return layers


def anatomy_of(config: PretrainedConfig) -> Anatomy:
    """Find where the blocks of a model are.

    Raises:
        UnsupportedModel: it cannot be cut into blocks; the message says why.
        BadCheckpoint: the config lacks the number of blocks or the hidden size.
    """
    model_type = config.model_type
    reason = families.reason_to_refuse(config)
    if reason is not None:
        raise UnsupportedModel(f"models of the type {model_type!r} cannot be cut into blocks: {reason}")
    path = families.LAYERS.get(model_type)
    if path is None:
        if "layers" not in (getattr(config, "base_model_pp_plan", None) or {}):
            raise UnsupportedModel(
                f"models of the type {model_type!r} cannot be cut into blocks: transformers has no pipeline plan for "
                "them, and nothing else is known about where they keep their blocks"
            )
        path = "layers"
        if model_type not in families.VERIFIED:
            logger.warning(
                "models of the type %r were never compared with the whole model: check the first results", model_type
            )
    num_blocks = getattr(config, "num_hidden_layers", None)
    hidden_size = getattr(config, "hidden_size", None)
    if not isinstance(num_blocks, int) or not isinstance(hidden_size, int) or num_blocks < 1 or hidden_size < 1:
        raise BadCheckpoint(f"the config of this {model_type!r} model lacks num_hidden_layers or hidden_size")
    return Anatomy(
        model_type,
        num_blocks,
        hidden_size,
        path,
        model_type in families.RETURN_TUPLE,
        families.max_session_tokens(config),
    )


def base_class_of(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class of the model without its head.

    Raises:
        UnsupportedModel: transformers registers none.
    """
    found = transformers.AutoModel._model_mapping.get(type(config), None)
    if isinstance(found, tuple):
        found = found[0]
    if found is None:
        raise UnsupportedModel(f"models of the type {config.model_type!r} have no base model class in transformers")
    return found
