"""Bottleneck adapters for a whole model or a distributed one: PEFT has none, so their config and files are ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from swarm.errors import BadCheckpoint, BadRequest
from swarm.model.anatomy import anatomy_of
from swarm.model.changes import Activation, Bottleneck, Change, first_error
from swarm.model.shadows import RemoteLayers

ATTENTION = ("self_attn", "self_attention", "attn", "attention")
MLP = ("mlp", "feed_forward", "ffn")
"""What the library calls the two parts of a block."""

CONFIG_FILE = "bottlenecks.json"
WEIGHTS_FILE = "bottlenecks.safetensors"


class BottleneckConfig(BaseModel):
    """Which small networks to put behind which modules of every block."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: Annotated[int, Field(ge=1)] = 64
    """Numbers that are left of a hidden state in the middle."""
    activation: Activation = "relu"
    targets: tuple[str, ...] | None = None
    """Names of modules within a block. None: attention and MLP (Houlsby et al. 2019); Pfeiffer et al. 2021 have one
    behind the MLP alone: ("mlp",) in most models."""


class _Bottleneck(nn.Module):
    """The parameters of one; it begins as the identity."""

    def __init__(self, target: str, hidden_size: int, config: BottleneckConfig, device: torch.device) -> None:
        super().__init__()
        self.target, self.activation = target, config.activation
        self.down = nn.Linear(hidden_size, config.size, device=device, dtype=torch.float32)
        self.up = nn.Linear(config.size, hidden_size, device=device, dtype=torch.float32)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def change(self) -> Bottleneck:
        return Bottleneck(
            self.target, self.down.weight, self.down.bias, self.up.weight, self.up.bias, activation=self.activation
        )

    def hook(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """What a module of a whole model returns instead of its output."""
        y = output[0] if isinstance(output, tuple) else output
        y = self.change().apply(y, y)
        return (y, *output[1:]) if isinstance(output, tuple) else y


class Bottlenecks(nn.Module):
    """The bottleneck adapters of a model, as `model.bottlenecks`; all that is trained of it."""

    def __init__(
        self, config: BottleneckConfig, layers: Mapping[int, nn.Module], hidden_size: int, device: torch.device
    ) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList()
        for number, layer in layers.items():
            targets = config.targets or _default_targets(layer)
            missing = [each for each in targets if each not in dict(layer.named_modules())]
            if missing:
                raise BadRequest(f"block {number} has no module {missing[0]}: name others as targets")
            self.blocks.append(nn.ModuleList(_Bottleneck(each, hidden_size, config, device) for each in targets))

    def changes(self, number: int) -> list[Change]:
        """Those of one block, for servers."""
        return [each.change() for each in self._of(number)]

    def put_into(self, layers: Mapping[int, nn.Module]) -> None:
        """Let the modules of a whole model be followed by them."""
        for number, layer in layers.items():
            for each in self._of(number):
                layer.get_submodule(each.target).register_forward_hook(each.hook)

    def _of(self, number: int) -> list[_Bottleneck]:
        block = self.blocks[number]
        assert isinstance(block, nn.ModuleList)
        return [each for each in block if isinstance(each, _Bottleneck)]

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config and weights; `load_bottlenecks` reads them, for whole models too."""
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        (path / CONFIG_FILE).write_text(self.config.model_dump_json(indent=2) + "\n")
        save_file(
            {name: each.detach().cpu().contiguous() for name, each in self.state_dict().items()}, path / WEIGHTS_FILE
        )


def add_bottlenecks(model: PreTrainedModel, config: BottleneckConfig | None = None) -> Bottlenecks:
    """Put bottleneck adapters into a distributed or whole model, and freeze the rest of it.

    Returns: `model.bottlenecks`, whose parameters are to be trained.
    Raises: BadRequest: it has some already, or no such modules. UnsupportedModel: nobody knows its blocks.
    """
    if not isinstance(model, PreTrainedModel):
        raise BadRequest(f"bottleneck adapters go into a model of transformers, not into a {type(model).__name__}")
    if hasattr(model, "bottlenecks"):
        raise BadRequest("the model has bottleneck adapters already: load it again for others")
    anatomy = anatomy_of(model.config)
    found = model.base_model.get_submodule(anatomy.layers)
    layers = {int(name): layer for name, layer in found.named_children()}
    bottlenecks = Bottlenecks(config or BottleneckConfig(), layers, anatomy.hidden_size, model.device)
    model.requires_grad_(False)
    model.bottlenecks = bottlenecks
    if not isinstance(found, RemoteLayers):  # whose modules never run: servers are told of the changes
        bottlenecks.put_into(layers)
    return bottlenecks


def load_bottlenecks(model: PreTrainedModel, directory: str | Path) -> Bottlenecks:
    """Put saved bottleneck adapters into a distributed or whole model; arguments and errors as `add_bottlenecks` has.

    Raises: BadCheckpoint: there are none in the directory, or of another model.
    """
    path = Path(directory)
    try:
        config = BottleneckConfig.model_validate(json.loads((path / CONFIG_FILE).read_text()))
        tensors: dict[str, Tensor] = load_file(path / WEIGHTS_FILE)
    except ValidationError as exc:
        raise BadCheckpoint(f"{path / CONFIG_FILE} cannot be read: {first_error(exc)}") from exc
    except (OSError, ValueError, SafetensorError) as exc:
        raise BadCheckpoint(f"there are no bottleneck adapters in {str(path)!r}: {exc}") from exc
    bottlenecks = add_bottlenecks(model, config)
    try:
        bottlenecks.load_state_dict(tensors)
    except RuntimeError as exc:
        raise BadCheckpoint(f"the bottleneck adapters in {str(path)!r} are those of another model") from exc
    return bottlenecks


def _default_targets(layer: nn.Module) -> list[str]:
    """The attention and the MLP of a block."""
    names = [name for name, _ in layer.named_children() if name in ATTENTION + MLP]
    if len(names) != 2:
        raise BadRequest("which modules are attention and MLP of a block cannot be told from their names: pass targets")
    return names
