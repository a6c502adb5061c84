"""What PEFT has put into the shadows of the blocks, as changes that servers can be asked to make.

PEFT replaces a shadow by a layer of its own that holds the adapter's parameters. That layer never runs: here it is
read, by what it is and what state it is in, and what no declared kind of change expresses is refused.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from swarm.errors import BadRequest
from swarm.model.adapters import BlockAdapter, ModelAdapter
from swarm.model.bottlenecks import Bottlenecks
from swarm.model.changes import Bias, Change, Ia3, Lora
from swarm.model.shadows import RemoteLayers, RemoteTensor

# I inputs of a module, O its outputs, R rank

Reader = Callable[[str, Any], list[Change]]
"""Takes the name of a module within its block and PEFT's layer there."""


def adapter_reader(model: nn.Module) -> Callable[[], ModelAdapter | None]:
    """Return a function that reads the adapters of a client half, and does not keep it alive."""
    layers = next(module for module in model.modules() if isinstance(module, RemoteLayers))
    alive = weakref.ref(model)
    return lambda: read_adapters(alive(), layers)


def read_adapters(model: nn.Module | None, layers: RemoteLayers) -> ModelAdapter | None:
    """Read the active adapters of all blocks, as they stand now.

    Args:
        model: the client half, whose configs say what PEFT was asked for.
        layers: its shadows.
    Returns: one entry for each block, or None where no block has an adapter; their tensors are PEFT's parameters, or
        differentiable in them.
    Raises: BadRequest: something in a shadow would have no effect.
    """
    bottlenecks = getattr(model, "bottlenecks", None)
    reads_peft = "peft" in sys.modules  # if not, PEFT changes nothing, and importing it would take seconds
    if not reads_peft and bottlenecks is None:
        return None
    if reads_peft:
        _refuse_trained_biases(model, layers)
    adapters: list[BlockAdapter | None] = []
    for number, (name, shadow) in enumerate(layers.named_children()):
        changes = _read_block(f"block {name}", shadow) if reads_peft else []
        changes += bottlenecks.changes(number) if isinstance(bottlenecks, Bottlenecks) else []
        adapters.append(BlockAdapter(changes) if changes else None)
    return adapters if any(adapters) else None


def _read_block(place: str, shadow: nn.Module) -> list[Change]:
    changes: list[Change] = []
    for name, layer in _tuner_layers(place, "", shadow):
        changes += _read_layer(place, name, layer)
    return changes


def _tuner_layers(place: str, name: str, module: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's layers below a module, with their names in the block."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(module, BaseTunerLayer):
        yield name, module
        return
    if isinstance(module, AuxiliaryTrainingWrapper) or any(each is not None for each in module._parameters.values()):
        raise BadRequest(
            f"{type(module).__name__} at {name or 'the top'} of {place} is trained as a whole, but that module lies on "
            "servers, which never change: use adapters there (modules_to_save is for what the client has, as the head)"
        )
    for child_name, child in module._modules.items():
        if child is not None:
            yield from _tuner_layers(place, f"{name}.{child_name}" if name else child_name, child)


def _read_layer(place: str, name: str, layer: Any) -> list[Change]:
    hooked = (layer, layer.base_layer)
    if any(each._forward_pre_hooks or each._forward_hooks for each in hooked):
        raise BadRequest(
            f"hooks were put on {name} of {place}, but it runs on servers and would not call them: one adapter for "
            "all rows of a batch (no adapter_names=), and initializations that watch the activations are not possible"
        )
    active = [each for each in layer.active_adapters if each in layer._get_available_adapters()]
    if layer.disable_adapters or not active:
        return []
    kind = type(layer)
    reader = _READERS.get(f"{kind.__module__}.{kind.__qualname__}")
    if reader is None or layer.get_base_layer() is not layer.base_layer:
        raise BadRequest(
            f"PEFT's {kind.__module__.removeprefix('peft.tuners.')}.{kind.__qualname__} on a "
            f"{type(layer.base_layer).__name__} ({name} of {place}) cannot be applied by servers: use LoRA (also "
            "rsLoRA, AdaLoRA, VeRA), IA3 or BEFT on linear layers, or prompt tuning"
        )
    return reader(name, layer)


def _refuse_trained_biases(model: nn.Module | None, layers: RemoteLayers) -> None:
    """PEFT trains with bias="all" what is called a bias among the parameters: the shadows' are none."""
    configs = getattr(model, "peft_config", None) or {}
    if not any(getattr(config, "bias", "none") == "all" for config in configs.values()):
        return
    if any(isinstance(module.__dict__.get("bias"), RemoteTensor) for module in layers.modules()):
        raise BadRequest(
            "bias='all' would train the biases of remote blocks, which never change: leave bias='none', or use "
            "BeftConfig, which trains biases of its own beside them"
        )


def _share_dropped(dropout: nn.Module) -> float:
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def _side_by_side(name: str, parts: Sequence[tuple[Tensor, Tensor, float, nn.Module]]) -> list[Change]:
    """Several products (A, B, scaling, dropout) of one module, as one: their ranks follow one another."""
    shares = {_share_dropped(dropout) for *_, dropout in parts}
    if len(shares) > 1:
        raise BadRequest(f"the active adapters of {name} drop different shares of its input: train one at a time")
    dropout = shares.pop()
    if len(parts) == 1:
        a_RI, b_OR, scaling, _ = parts[0]
        return [Lora(name, a_RI, b_OR, float(scaling), dropout)]
    a_RI = torch.cat([a for a, *_ in parts])
    b_OR = torch.cat([b * scaling for _, b, scaling, _ in parts], dim=1)
    return [Lora(name, a_RI, b_OR, 1.0, dropout)]


def _lora(name: str, layer: Any) -> list[Change]:
    active = [each for each in layer.active_adapters if each in layer.lora_A]
    for each in active:
        variant = layer.lora_variant.get(each)
        if variant is not None:
            raise BadRequest(
                f"{type(variant).__name__} of adapter {each!r} ({name}) cannot be applied by servers: use plain LoRA"
            )
    changes = _side_by_side(
        name,
        [
            (layer.lora_A[each].weight, layer.lora_B[each].weight, layer.scaling[each], layer.lora_dropout[each])
            for each in active
        ],
    )
    biases = [layer.lora_B[each].bias * layer.scaling[each] for each in active if layer.lora_B[each].bias is not None]
    return [*changes, Bias(name, sum(biases[1:], biases[0]))] if biases else changes


def _adalora(name: str, layer: Any) -> list[Change]:
    return _side_by_side(
        name,
        [
            (
                layer.lora_A[each] * layer.lora_E[each],
                layer.lora_B[each],
                layer.scaling[each] / (float(layer.ranknum[each]) + 1e-5),
                layer.lora_dropout[each],
            )
            for each in layer.active_adapters
            if each in layer.lora_A
        ],
    )


def _vera(name: str, layer: Any) -> list[Change]:
    parts = []
    for each in layer.active_adapters:
        if each in layer.vera_lambda_d:
            d_R, b_O = layer.vera_lambda_d[each], layer.vera_lambda_b[each]
            a_RI = layer.vera_A[each][:, : layer.in_features].to(d_R.device) * d_R[:, None]
            b_OR = layer.vera_B[each][: layer.out_features].to(b_O.device) * b_O[:, None]
            parts.append((a_RI, b_OR, 1.0, layer.vera_dropout[each]))
    return _side_by_side(name, parts)


def _ia3(name: str, layer: Any) -> list[Change]:
    active = [layer.ia3_l[each].flatten() for each in layer.active_adapters if each in layer.ia3_l]
    factors = active[0]
    for other in active[1:]:
        factors = factors * other
    return [Ia3(name, factors, layer.is_feedforward)]


def _beft(name: str, layer: Any) -> list[Change]:
    biases = [layer.beft_bias[each].flatten() for each in layer.active_adapters if each in layer.beft_bias]
    return [Bias(name, sum(biases[1:], biases[0]))]


_READERS: dict[str, Reader] = {
    "peft.tuners.lora.layer.Linear": _lora,
    "peft.tuners.adalora.layer.SVDLinear": _adalora,
    "peft.tuners.vera.layer.Linear": _vera,
    "peft.tuners.ia3.layer.Linear": _ia3,
    "peft.tuners.beft.layer.Linear": _beft,
}
"""By name, so that what a release of PEFT lacks is not asked for."""
