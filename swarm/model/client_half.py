"""The client half of a model: the library's own class with its blocks replaced by one call.

Embeddings, norms, positions, scaling and heads are the class's own and lie here; the list of blocks is a list of
weightless shadows that hands the loop in `forward` a single module, which passes the hidden states to the swarm.
"""

# B batch, L new tokens, T cached and new tokens, D hidden

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import (
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.utils import ModelOutput

from swarm.errors import BadCheckpoint, BadRequest, ResourceError, UnsupportedModel
from swarm.model.anatomy import Anatomy, anatomy_of, base_class_of
from swarm.model.checkpoint import Checkpoint
from swarm.model.half_layers import use_half_kernels
from swarm.model.loading import build_empty, load_part
from swarm.model.pooling import refuse_padding_at_the_end_of_embeddings
from swarm.model.prefixes import ModelPrefix, read_prefix
from swarm.model.quantization import NONE, Scheme, choose_scheme
from swarm.model.remote_cache import RemoteCache
from swarm.model.shadows import RemoteLayers

logger = logging.getLogger(__name__)

REMOTE_ATTENTION = "swarm_remote"
"""The client's attention implementation: it has none, so its masks are placeholders."""


class RemoteCall(Protocol):
    """Runs hidden states through all blocks of the model, wherever they are."""

    def __call__(
        self,
        x_BLD: Tensor,
        *,
        cache: RemoteCache | None,
        attention_mask_BT: Tensor | None,
        position_ids_BL: Tensor | None,
        prefix: ModelPrefix | None,
    ) -> Tensor:
        """Run all blocks.

        Args:
            x_BLD: hidden states entering block 0.
            cache: None for a stateless call, through which gradients flow; else `cache.position` tokens came before.
            attention_mask_BT: None unless there is padding, or nothing else says that a row of positions that begin
                anew is one text. It does not count a prefix.
            position_ids_BL: None unless they differ from the L positions after the prefix and the cached tokens.
            prefix: keys and values that stand in front of all tokens in each block; None: nothing does.
        Returns: hidden states leaving the last block; shape, dtype and device of the input.
        """
        ...


@dataclass(slots=True)
class _Arguments:
    """What the base model was called with and its blocks are not told."""

    cache: RemoteCache | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    prefix: ModelPrefix | None = None
    wants_hidden_states: bool = False
    x_BLD: Tensor | None = None
    """The hidden states that entered the blocks, where they are wanted."""

    @property
    def may_be_packed(self) -> bool:
        """Whether positions that begin anew are those of several texts in one row, which do not see one another.

        The library, here and on servers, takes them for that where there is neither a mask nor a cache.
        """
        return self.attention_mask is None and self.cache is None


class RemoteBlocks(nn.Module):
    """What the loop over the layers gets instead of the layers."""

    def __init__(self, call: RemoteCall, first_layer: nn.Module, returns_tuple: bool) -> None:
        super().__init__()
        self.call = call
        self.arguments = threading.local()
        self._returns_tuple = returns_tuple
        # In __dict__, not in _modules: its attributes (layer type, window, ...) are asked for, it is no child.
        self.__dict__["_first_layer"] = first_layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_first_layer"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        arguments: _Arguments = self.arguments.now
        cache, prefix, length = arguments.cache, arguments.prefix, hidden_states.shape[1]
        num_before = (0 if cache is None else cache.position) + (prefix[0].num_tokens if prefix else 0)
        if arguments.wants_hidden_states:
            arguments.x_BLD = hidden_states
        mask_BT = _mask_if_padded(arguments.attention_mask, prefix)
        position_ids_BL = _positions_if_special(arguments.position_ids, num_before)
        if mask_BT is None and position_ids_BL is not None and not num_before and not arguments.may_be_packed:
            mask_BT = torch.ones(hidden_states.shape[:2], dtype=torch.int64, device=hidden_states.device)
        x_BLD = self.call(
            hidden_states,
            cache=cache,
            attention_mask_BT=mask_BT,
            position_ids_BL=position_ids_BL,
            prefix=prefix,
        )
        if cache is not None:
            cache.advance(length)
        return (x_BLD, None) if self._returns_tuple else x_BLD


class _ClientHalf:
    """What the client half adds to the library's class."""

    new_remote_cache: Callable[[], RemoteCache] = RemoteCache
    """Makes the cache of a call with use_cache=True; client code sets its own."""

    def new_default_cache(self) -> RemoteCache | None:
        """Make the cache of a call that leaves use_cache to the config, which wants one; client code overrides it."""
        return None

    def new_cache_behind(self, prefix: ModelPrefix) -> RemoteCache:
        """Make the cache of a call with use_cache=True that brings a prefix; client code overrides it."""
        cache = self.new_remote_cache()
        cache.prefix = prefix
        return cache

    def new_generation_cache(self, max_length: int) -> RemoteCache:
        """Make the cache of a generation that can reach `max_length` tokens; client code overrides it."""
        return self.new_remote_cache()

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        generation_config.cache_implementation = None  # a kind of local cache, which there is none of here
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            more = _num_draft_tokens(generation_config, generation_mode) + num_virtual_tokens(self)
            model_kwargs["past_key_values"] = self.new_generation_cache(max_cache_length + 1 + more)
        return super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )


def _num_draft_tokens(generation_config: GenerationConfig, generation_mode: Any) -> int:
    """How far the drafts of assisted generation may reach beyond the last token that is kept."""
    if generation_mode != GenerationMode.ASSISTED_GENERATION:
        return 0
    return max(generation_config.prompt_lookup_num_tokens or 0, generation_config.num_assistant_tokens or 0, 20)


def num_virtual_tokens(model: Any) -> int:
    """How many tokens PEFT's prompt tuning puts in front, which it does where `generate` prepares its inputs."""
    wrapper = getattr(model.prepare_inputs_for_generation, "__self__", model)
    return getattr(getattr(wrapper, "active_peft_config", None), "num_virtual_tokens", 0) if wrapper is not model else 0


def load_client_half(
    auto_class: Any,
    checkpoint: Checkpoint,
    call: RemoteCall,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantization: str = NONE,
    **hf_kwargs: Any,
) -> PreTrainedModel:
    """Load everything but the blocks.

    Args:
        auto_class: AutoModel, AutoModelForCausalLM or AutoModelForSequenceClassification.
        call: runs the blocks.
        dtype: None means that of the checkpoint.
        quantization: "none", "int8" or "int4": in how many bits the language model's head is kept, and frozen.
        hf_kwargs: passed on to `from_pretrained`; `num_labels` and other config entries change the config.
    Returns: an instance of the library's class for this config.
    Raises:
        UnsupportedModel: the architecture cannot be cut, or has no such class, or no head that can be quantized.
        BadCheckpoint: tensors are missing, corrupt, or of the wrong shape.
        BadRequest: no such quantization. ResourceError: this kind of device cannot do it.
    """
    scheme = choose_scheme(quantization, torch.device(device).type)
    config = _unquantized(checkpoint.config)
    for name in [name for name in hf_kwargs if hasattr(config, name)]:
        setattr(config, name, hf_kwargs.pop(name))
    anatomy = anatomy_of(config)
    model, missing = load_part(
        _client_class(_class_of(auto_class, config), base_class_of(config), anatomy, call),
        config,
        checkpoint,
        dtype=dtype or getattr(config, "dtype", None) or torch.float32,
        device=torch.device(device),
        **hf_kwargs,
    )
    model.name_or_path = model.config.name_or_path = checkpoint.name  # what PEFT writes down as the base model
    _check_missing(model, missing, checkpoint, auto_class is AutoModelForSequenceClassification)
    AttentionMaskInterface.register(REMOTE_ATTENTION, _no_mask)
    model.config._attn_implementation_internal = REMOTE_ATTENTION
    if scheme is not None:
        _quantize_head(model, scheme)
    use_half_kernels(model)
    _settle(model, torch.device(device), model.dtype)  # only now: nothing on `meta` is given kernels
    if model.can_generate():
        model.generation_config = _generation_config(checkpoint, config)
    if auto_class is AutoModelForSequenceClassification:
        refuse_padding_at_the_end_of_embeddings(model)
    return model


def _quantize_head(model: Any, scheme: Scheme) -> None:
    head = model.get_output_embeddings()
    if scheme.linear is None:
        raise ResourceError(f"a client's head cannot be kept in {scheme.name} on {scheme.device_type}: leave it out")
    if head is None or not scheme.quantizes("head", head):
        raise UnsupportedModel(
            f"this {model.config.model_type} has no head that can be kept in {scheme.name}: leave it out"
        )
    model.set_output_embeddings(scheme.linear.quantize(head.weight.detach(), head.bias))
    model.config.tie_word_embeddings = False


def empty_client_half(checkpoint: Checkpoint) -> PreTrainedModel:
    """A causal language model as `load_client_half` returns it, but to look at: nothing is read, and it cannot run.

    Raises: UnsupportedModel: the architecture cannot be cut, or has no such class.
    """
    config = _unquantized(checkpoint.config)
    model_class = _class_of(AutoModelForCausalLM, config)
    client_class = _client_class(model_class, base_class_of(config), anatomy_of(config), _refuse_to_run)
    model = build_empty(client_class, config)
    _settle(model, torch.device("cpu"), torch.float32)
    return model


def _refuse_to_run(*_: Any, **__: Any) -> Tensor:
    raise BadRequest("this client half has no weights: it is only looked at")


def _unquantized(config: PretrainedConfig) -> PretrainedConfig:
    """A copy for the client half: only blocks are quantized, and they are not here."""
    config = type(config).from_dict(config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _settle(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
    for module in model.modules():
        if isinstance(module, RemoteLayers):
            module.settle(device, dtype)


def _no_mask(*_: Any, device: torch.device | None = None, **__: Any) -> Tensor:
    """Stands for a mask that nobody looks at: the servers make their own from the 2D mask."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def _class_of(auto_class: Any, config: PretrainedConfig) -> type[PreTrainedModel]:
    found = auto_class._model_mapping.get(type(config), None)
    if isinstance(found, tuple):
        found = found[0]
    if found is None:
        raise UnsupportedModel(f"models of the type {config.model_type!r} have no class for {auto_class.__name__}")
    return found


def _client_class(
    model_class: type[PreTrainedModel], base_class: type[PreTrainedModel], anatomy: Anatomy, call: RemoteCall
) -> type[PreTrainedModel]:
    """The library's class, with a constructor that replaces its blocks."""

    def __init__(self: PreTrainedModel, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        base = next(module for module in self.modules() if isinstance(module, base_class))
        layers = anatomy.find_layers(base)
        remote = RemoteBlocks(call, layers[0], anatomy.layers_return_tuple)
        base.set_submodule(anatomy.layers, RemoteLayers(layers, remote))
        parent, _, _ = anatomy.layers.rpartition(".")
        _capture_arguments(self, base.get_submodule(parent), remote, anatomy.num_blocks)

    bases = (_ClientHalf, model_class)
    return type(model_class.__name__, bases, {"__init__": __init__, "__module__": model_class.__module__})


def _capture_arguments(model: Any, base: nn.Module, remote: RemoteBlocks, num_blocks: int) -> None:
    """Hand the remote blocks what only the module that loops over them is told, per call and per thread."""
    parameters = list(inspect.signature(base.forward).parameters)
    base_config = getattr(base, "config", model.config)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = {**kwargs, **dict(zip(parameters, args, strict=False))}
        past, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
        prefix = None if past is None or isinstance(past, RemoteCache) else read_prefix(past, num_blocks)
        cache = past if prefix is None else None
        if cache is None and use_cache:
            cache = model.new_remote_cache() if prefix is None else model.new_cache_behind(prefix)
        elif cache is None and use_cache is None and getattr(base_config, "use_cache", False):
            cache = model.new_default_cache()
        if cache is not None:
            cache.prefix = prefix = prefix or cache.prefix
        kwargs["use_cache"] = cache is not None
        if cache is not None:
            kwargs["past_key_values"] = cache
        elif prefix is not None:
            kwargs["past_key_values"] = RemoteCache(prefix)  # for the positions that the library counts
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() != 2:
            raise BadRequest(f"the attention mask must be [batch, length], not {list(mask.shape)}")
        wants = kwargs.get("output_hidden_states", getattr(base_config, "output_hidden_states", False))
        remote.arguments.now = _Arguments(cache, mask, kwargs.get("position_ids"), prefix, bool(wants))
        return (), kwargs

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        arguments = getattr(remote.arguments, "now", None)  # none if the call was refused
        remote.arguments.now = None
        if arguments is None or arguments.x_BLD is None or not isinstance(output, ModelOutput):
            return
        if not output.get("hidden_states"):
            # The library records them with hooks on the class of its layers, and none of those runs here.
            output["hidden_states"] = (arguments.x_BLD, output.last_hidden_state)

    base.register_forward_pre_hook(before, with_kwargs=True)
    base.register_forward_hook(after, always_call=True)


def _mask_if_padded(mask_BT: Tensor | None, prefix: ModelPrefix | None) -> Tensor | None:
    """What is padding among the tokens behind a prefix."""
    if mask_BT is None or bool(mask_BT.all()):
        return None
    num_before = prefix[0].num_tokens if prefix else 0
    if not bool(mask_BT[:, :num_before].all()):
        raise BadRequest("the attention mask hides what past_key_values holds: all tokens see the whole prefix")
    return mask_BT[:, num_before:].to(torch.int64)


def _positions_if_special(position_ids: Tensor | None, position: int) -> Tensor | None:
    if position_ids is None:
        return None
    default = torch.arange(position, position + position_ids.shape[-1], device=position_ids.device)
    return None if bool((position_ids == default).all()) else position_ids


def _check_missing(model: PreTrainedModel, missing: set[str], checkpoint: Checkpoint, may_lack_head: bool) -> None:
    inside = {name for name in missing if not may_lack_head or name.startswith(model.base_model_prefix + ".")}
    if inside:
        raise BadCheckpoint(f"{checkpoint.name!r} lacks {len(inside)} tensors, {min(inside)} among them")
    if missing:
        logger.info("%s has no %s: newly initialized, train it", checkpoint.name, ", ".join(sorted(missing)))


def _generation_config(checkpoint: Checkpoint, config: PretrainedConfig) -> GenerationConfig:
    path = checkpoint.source.fetch("generation_config.json")
    if path is None:
        return GenerationConfig.from_model_config(config)
    return GenerationConfig.from_pretrained(path.parent)


__all__ = ["RemoteCache", "RemoteCall", "empty_client_half", "load_client_half", "num_virtual_tokens"]
