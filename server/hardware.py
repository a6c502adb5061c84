"""What this machine offers: devices, and free memory."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from transformers import PretrainedConfig

from swarm.codec import torch_dtype
from swarm.errors import ResourceError
from swarm.model.anatomy import anatomy_of, base_class_of
from swarm.model.quantization import Scheme, block_bytes, prepare_for_own

from .placement import MemoryNeeds

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Names of glibc's mallopt(3)."""

KEPT_FREE_BYTES = 1 << 29
"""So much free memory a process keeps at most, for the next tensors, beside what it has budgets for."""


def keep_freed_memory(budget_bytes: int = 0) -> None:
    """Let this process keep the memory that tensors leave behind, for the next ones.

    Left alone, glibc gives it back to the system after most operations on a batch, and the next operation pays for new
    pages: a fifth of the time of a forward pass at 124M. Where there is no glibc, nothing is done.

    Args:
        budget_bytes: what comes and goes as a whole, as activations do in every step of training.
    """
    libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_ARENA_MAX, 1)  # the compute thread would have an arena that knows no threshold
        most = (1 << 31) - 1  # of an int
        libc.mallopt(M_TRIM_THRESHOLD, min(most, KEPT_FREE_BYTES + budget_bytes))
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 25)  # the most that it takes


def choose_device(wanted: str) -> torch.device:
    """Resolve "auto". Raises: ResourceError: the device is not there."""
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as exc:
        raise ResourceError(f"device {wanted!r} cannot be used here: choose cpu, cuda, cuda:N or mps") from exc
    return device


def choose_dtype(wanted: str, config: PretrainedConfig) -> torch.dtype:
    """Resolve "auto": the checkpoint's own dtype, float32 where it does not say."""
    if wanted != "auto":
        return torch_dtype(wanted)
    own = getattr(config, "dtype", None)
    if isinstance(own, str):
        return torch_dtype(own)
    return own if own in (torch.float32, torch.float16, torch.bfloat16) else torch.float32


def own_addresses() -> frozenset[str]:
    """The IP addresses of this machine."""
    return frozenset(each.address for entries in psutil.net_if_addrs().values() for each in entries)


def free_bytes(device: torch.device) -> int:
    """Memory that can be used on a device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


@contextmanager
def lack_of_memory(what: str) -> Iterator[None]:
    """Raise what torch and Python raise without memory as what it is. Raises: ResourceError"""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as exc:
        raise ResourceError(f"there is no memory for {what}: {exc}") from exc
    except RuntimeError as exc:
        if "allocate memory" not in str(exc):  # torch's words on a CPU
            raise
        raise ResourceError(f"there is no memory for {what}: {exc}") from exc


def pass_tokens(device_type: str) -> int:
    """How many tokens one pass through the blocks has at most.

    With twice as many, a CPU takes twice as long. On a GPU products of few rows wait for the weights: one of today does
    200 to 600 multiplications in the time that reading a number takes, and more where weights have to be unpacked.
    """
    return 2048 if device_type == "cuda" else 512


def memory_needs(
    config: PretrainedConfig, dtype: torch.dtype, device: torch.device, scheme: Scheme | None = None
) -> MemoryNeeds:
    """What one block of the model takes on a device, from its shapes alone.

    Args:
        scheme: how it is quantized; None: not at all, or as the checkpoint comes.
    Raises: UnsupportedModel, ResourceError: as the checkpoint comes, it cannot be loaded here.
    """
    with torch.device("meta"):
        base = base_class_of(config)(config)
        if scheme is None:
            prepare_for_own(base, config, device)
    layers = anatomy_of(config).find_layers(base)
    largest = max(block_bytes(layer, dtype, scheme) for layer in layers)
    num_heads = getattr(config, "num_attention_heads", None) or 1
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_dim = getattr(config, "head_dim", None) or anatomy_of(config).hidden_size // num_heads
    return MemoryNeeds(bytes_per_block=largest, cache_bytes_per_token=2 * num_kv_heads * head_dim * dtype.itemsize)
