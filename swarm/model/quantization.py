"""In how many bits a server keeps the weights of its blocks, and by whose code.

What quantizes while loading is always the library's loader, which reads one tensor at a time: with bitsandbytes on
CUDA, with layers of our own (weight_only.py) elsewhere. A checkpoint that comes quantized keeps what it has.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, get_hf_quantizer, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from swarm.errors import BadRequest, ResourceError, UnsupportedModel
from swarm.model.weight_only import CudaInt4Linear, Int4Linear, Int8Linear, WeightOnlyLinear

logger = logging.getLogger(__name__)

AUTO, NONE = "auto", "none"
CHOICES = (AUTO, NONE, "int8", "int4", "nf4")

ROUTERS = frozenset(("router", "wg"))
"""Modules that choose experts: small, and a wrong choice costs more than a rounded weight."""

BNB_GROUP = 64
"""Weights that share a float32 scale in bitsandbytes' NF4."""

_OURS = "swarm_weight_only"
_NOT_OURS_TO_LOAD = {"torchao": "its tensors are described in file metadata, which is not read here"}


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way to keep weights."""

    name: str
    device_type: str
    linear: type[WeightOnlyLinear] | None
    """What takes the place of linear layers; None: what bitsandbytes has."""

    @property
    def _linear_types(self) -> tuple[str, ...]:
        """Classes that compute what nn.Linear does; other subclasses, such as routers, do not."""
        return ("Linear",) if self.linear is None else ("Linear", "FalconLinear")

    def quantizes(self, name: str, module: nn.Module) -> bool:
        """Whether a module's `weight` is quantized."""
        if isinstance(module, Conv1D):
            num_inputs, num_outputs = module.weight.shape
        elif isinstance(module, nn.Linear) and type(module).__name__ in self._linear_types:
            num_outputs, num_inputs = module.weight.shape
        else:
            return False
        if self.linear is None:
            return True
        return self.linear.fits(num_outputs, num_inputs) and not ROUTERS & set(name.split("."))

    def num_bytes(self, num_outputs: int, num_inputs: int) -> int:
        """What a quantized matrix takes."""
        if self.linear is not None:
            return self.linear.num_bytes(num_outputs, num_inputs)
        if self.name == "int8":
            return num_outputs * (num_inputs + 4)
        return num_outputs * num_inputs // 2 + num_outputs * num_inputs // BNB_GROUP * 4

    def loader_arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        """What `from_pretrained` has to be told."""
        if self.linear is not None:
            return {"quantization_config": _WeightOnlyConfig(self)}
        if self.name == "int8":
            # With a threshold, a column in which any row is large is multiplied in 16 bits, for all rows of the pass:
            # what one person sends would change another's result. The library's own default is 6.0.
            config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=[])
        else:
            config = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=dtype,
                llm_int8_skip_modules=[],  # by default it leaves out the last module, taking it for the head
            )
        return {"quantization_config": config}


SCHEMES = (
    Scheme("int8", "cpu", Int8Linear),
    Scheme("int4", "cpu", Int4Linear),
    Scheme("int8", "cuda", None),
    Scheme("nf4", "cuda", None),
    Scheme("int4", "cuda", CudaInt4Linear),
)


def choose_scheme(quantization: str, device_type: str) -> Scheme | None:
    """How a device keeps weights so.

    Args:
        quantization: one of CHOICES but AUTO.
    Raises:
        BadRequest: no such quantization.
        ResourceError: this kind of device cannot do it.
    """
    if quantization == NONE:
        return None
    if quantization not in CHOICES or quantization == AUTO:
        raise BadRequest(f"quantization must be one of {', '.join(CHOICES)}, not {quantization!r}")
    for scheme in SCHEMES:
        if (scheme.name, scheme.device_type) == (quantization, device_type):
            return scheme
    possible = [scheme.name for scheme in SCHEMES if scheme.device_type == device_type]
    others = [scheme.device_type for scheme in SCHEMES if scheme.name == quantization]
    raise ResourceError(
        f"{quantization} runs on {' and '.join(others)}, not on {device_type}: "
        f"use --quantization {' or '.join([*possible, NONE])}, or another --device"
    )


def check_installed(scheme: Scheme) -> None:
    """Raises: ResourceError: a package that it needs is missing."""
    if scheme.linear is None and importlib.util.find_spec("bitsandbytes") is None:
        raise ResourceError(
            f"{scheme.name} on {scheme.device_type} needs bitsandbytes: pip install 'swarm-llm[quantization]'"
        )


def own_quantization(config: PretrainedConfig) -> str | None:
    """How the checkpoint of a model comes quantized ("gptq", "fp8", ...); None: it does not."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    return str(getattr(method, "value", method) or "bitsandbytes")


def prepare_for_own(model: PreTrainedModel, config: PretrainedConfig, device: torch.device) -> HfQuantizer | None:
    """Give a model on `meta` the modules into which a checkpoint that comes quantized is loaded.

    Returns: the library's quantizer; None: the checkpoint is not quantized.
    Raises:
        UnsupportedModel: it is quantized in a way that cannot be loaded here.
        ResourceError: the library lacks a package, a kernel or a device for it.
    """
    method = own_quantization(config)
    if method is None:
        return None
    if method in _NOT_OURS_TO_LOAD:
        raise UnsupportedModel(f"this checkpoint is quantized with {method}: {_NOT_OURS_TO_LOAD[method]}")
    with _explained(method):
        quantizer = _quantizer_of(method, config, device)
        quantizer.preprocess_model(
            model=model, dtype=model.dtype, device_map={"": device}, checkpoint_files=None, use_kernels=False
        )
    return quantizer


def dtype_of_own(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Into which dtype the library turns the wanted one for a checkpoint that comes quantized: kernels of some kinds
    take no other.

    Raises: UnsupportedModel, ResourceError: see prepare_for_own.
    """
    method = own_quantization(config)
    if method is None or method in _NOT_OURS_TO_LOAD:
        return dtype
    with _explained(method):
        changed: torch.dtype = _quantizer_of(method, config, device).update_dtype(dtype)
    return changed


def _quantizer_of(method: str, config: PretrainedConfig, device: torch.device) -> HfQuantizer:
    quantizer, *_ = get_hf_quantizer(copy.deepcopy(config), None, {"": device}, True, {})
    if quantizer is None:
        raise UnsupportedModel(f"this checkpoint is quantized with {method}, which transformers does not know")
    return quantizer


@contextmanager
def _explained(method: str) -> Iterator[None]:
    """Say in our words what the library lacks."""
    try:
        yield
    except (ImportError, ValueError, RuntimeError) as exc:
        raise ResourceError(f"this checkpoint is quantized with {method}, which cannot run here: {exc}") from exc


def keep_differentiable(model: nn.Module) -> None:
    """Let layers of bitsandbytes keep their weights as they were loaded.

    On processors with bfloat16 in AVX-512 the first pass without gradients packs them anew, in place, for a kernel that
    has no backward: gradients would then end at each of these layers, without a word.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def block_bytes(layer: nn.Module, dtype: torch.dtype, scheme: Scheme | None) -> int:
    """What a block on `meta` takes when it is loaded."""
    total = 0
    for name, module in layer.named_modules():
        is_quantized = scheme is not None and scheme.quantizes(name, module)
        for own_name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if is_quantized and own_name == "weight":
                assert scheme is not None
                rows, columns = tensor.shape
                total += scheme.num_bytes(*((columns, rows) if isinstance(module, Conv1D) else (rows, columns)))
            else:
                is_float = tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
                total += tensor.numel() * (dtype.itemsize if is_float else tensor.dtype.itemsize)
    return total


def log_share(model: nn.Module, scheme: Scheme) -> None:
    """Say what stayed in floats, such as the experts of mixtures, which are no linear layers."""
    kept = {
        name: tensor.nbytes
        for name, tensor in model.named_parameters()
        if tensor.is_floating_point() and tensor.dim() > 1
    }
    total = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    largest = max(kept, key=lambda name: kept[name], default="")
    logger.info(
        "weights in %s, %d MiB in all; matrices of %d MiB stay in floats%s",
        scheme.name, total >> 20, sum(kept.values()) >> 20, f", {largest} the largest of them" if largest else "",
    )  # fmt: skip


class _WeightOnlyConfig(QuantizationConfigMixin):
    """What the library's loader is told to quantize with layers of our own."""

    def __init__(self, scheme: Scheme) -> None:
        self.quant_method = _OURS  # a name under which ours is registered
        self.scheme = scheme
        if _OURS not in AUTO_QUANTIZER_MAPPING:
            register_quantizer(_OURS)(_WeightOnlyQuantizer)


class _WeightOnlyQuantizer(HfQuantizer):
    """Puts our layers in the place of the library's, each as soon as its weight is read."""

    quantization_config: _WeightOnlyConfig

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        name, _, own_name = param_name.rpartition(".")
        module = model.get_submodule(name)
        has_shape = not getattr(module, "is_misshapen", False)
        return own_name == "weight" and has_shape and self.quantization_config.scheme.quantizes(name, module)

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeWeights(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self.remove_quantization_config(model)  # it would travel with the config of every part of the span
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


class _QuantizeWeights(ConversionOps):
    """What the loader does with the tensors of one or, where it cuts what was fused, of several layers."""

    def __init__(self, quantizer: _WeightOnlyQuantizer) -> None:
        self._quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], *, model: PreTrainedModel, missing_keys: set[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        kept = {}
        for tensor_name, read in input_dict.items():
            tensor: Tensor = read[0] if isinstance(read, list) else read
            name, _, _ = tensor_name.rpartition(".")
            module = model.get_submodule(name)
            if not self._quantizer.param_needs_quantization(model, tensor_name):
                kept[tensor_name] = tensor
            elif tensor.shape != module.weight.shape:
                module.is_misshapen = True  # so that the loader reports it
                kept[tensor_name] = tensor
            else:
                model.set_submodule(name, self._quantized(module, tensor))
                missing_keys.discard(tensor_name)
        return kept

    def _quantized(self, module: nn.Module, weight: Tensor) -> WeightOnlyLinear:
        linear = self._quantizer.quantization_config.scheme.linear
        assert linear is not None and (module.bias is None or isinstance(module.bias, nn.Parameter))
        layer = linear.quantize(weight.t().contiguous() if isinstance(module, Conv1D) else weight, module.bias)
        for part in (layer, *layer.parameters()):
            setattr(part, "_is_hf_initialized", True)  # noqa: B010  # else the library fills it with random numbers
        return layer
