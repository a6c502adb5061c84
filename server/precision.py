"""In which form a server holds its blocks: the dtype, and in how many bits the weights."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from swarm.codec import dtype_name
from swarm.errors import BadRequest, ResourceError
from swarm.model.anatomy import anatomy_of
from swarm.model.quantization import AUTO, NONE, Scheme, check_installed, choose_scheme, dtype_of_own, own_quantization

from .config import ServerConfig
from .hardware import choose_dtype, memory_needs
from .placement import MemoryNeeds, choose_quantization

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Precision:
    """How blocks are held, and what one takes then."""

    dtype: torch.dtype
    """Of hidden states, and of all weights that are not quantized."""
    scheme: Scheme | None
    """How weights are quantized while they load; None: as the checkpoint has them."""
    quantization: str | None
    """As it is announced: that of the scheme, or the checkpoint's own."""
    needs: MemoryNeeds

    def __str__(self) -> str:
        return dtype_name(self.dtype) + (f" with weights in {self.quantization}" if self.quantization else "")


def choose_precision(
    config: ServerConfig, model_config: PretrainedConfig, device: torch.device, free_bytes: int
) -> Precision:
    """Resolve "auto", and see whether what was asked for can run here.

    Raises:
        BadRequest: the checkpoint is quantized already.
        UnsupportedModel, ResourceError: this machine lacks a device, a kernel or a package for it.
    """
    dtype = choose_dtype(config.dtype, model_config)
    own = own_quantization(model_config)
    if own is not None:
        if config.quantization not in (AUTO, NONE):
            raise BadRequest(f"this checkpoint comes quantized ({own}) and stays so: leave out --quantization")
        dtype = dtype_of_own(model_config, dtype, device)
        return Precision(dtype, None, own, memory_needs(model_config, dtype, device))
    quantization = config.quantization
    if quantization == AUTO:
        quantization = _resolve(config, model_config, device, dtype, free_bytes)
    scheme = choose_scheme(quantization, device.type)
    if scheme is None:
        return Precision(dtype, None, None, memory_needs(model_config, dtype, device))
    check_installed(scheme)
    return Precision(dtype, scheme, scheme.name, memory_needs(model_config, dtype, device, scheme))


def _resolve(
    config: ServerConfig, model_config: PretrainedConfig, device: torch.device, dtype: torch.dtype, free_bytes: int
) -> str:
    if device.type != "cuda":
        return NONE
    nf4 = choose_scheme("nf4", device.type)
    assert nf4 is not None
    in_nf4: MemoryNeeds | None = memory_needs(model_config, dtype, device, nf4)
    try:
        check_installed(nf4)
    except ResourceError as exc:
        logger.info("blocks stay unquantized: %s", exc)
        in_nf4 = None
    wanted = len(config.blocks) if config.blocks is not None else config.num_blocks
    return choose_quantization(
        device.type,
        memory_needs(model_config, dtype, device),
        in_nf4,
        free_bytes=free_bytes,
        num_blocks=wanted or anatomy_of(model_config).num_blocks,
    )
