"""How many blocks a server can hold, in how many bits, and with how much cache: pure functions of a snapshot."""

from __future__ import annotations

from dataclasses import dataclass

from swarm.errors import ResourceError

CACHE_TOKENS = 8192
"""Tokens of KV cache that a server should have room for beside its blocks."""

LEAST_CACHE_TOKENS = 256
"""The smallest cache, of one page where pages are largest."""

MAX_ADAPTER_BYTES = 512 << 20
"""Room for adapters, where nobody says how much; an eighth of what the blocks leave, if that is less, and no more than
leaves the smallest cache its room."""

MAX_KEPT_BYTES = 2 << 30
"""Room for activations that wait for their Backward, where nobody says how much; a quarter of what the blocks leave, if
that is less."""

RESERVE_FRACTION = 0.15
"""Share of the free memory left for what passes compute with, and for the rest of the machine."""

GRAPH_FRACTION, MAX_GRAPH_BYTES = 0.05, 1 << 30
"""The part of it that activations may take while a Backward computes them again, and what it is at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeeds:
    """What holding blocks costs."""

    bytes_per_block: int
    """Weights of one block, as they are served."""
    cache_bytes_per_token: int
    """KV cache of one block for one token."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How a server uses its memory."""

    num_blocks: int
    cache_bytes: int
    adapter_bytes: int
    """For what clients change in the blocks."""
    kept_bytes: int
    """For activations of a Forward that wait for its Backward."""
    graph_bytes: int
    """For those that a Backward computes again; a part of what is left to the machine."""


def choose_quantization(
    device_type: str, in_full: MemoryNeeds, in_nf4: MemoryNeeds | None, *, free_bytes: int, num_blocks: int
) -> str:
    """Resolve "auto": NF4 on CUDA, if these blocks do not fit here in full and more of them fit in NF4.

    Args:
        in_nf4: None: NF4 cannot be had here.
        num_blocks: as many as this server was told to hold, otherwise the whole model.
    """
    if device_type != "cuda" or in_nf4 is None:
        return "none"
    num_in_full, num_in_nf4 = (
        min(num_blocks, _usable(free_bytes) // _with_cache(needs)) for needs in (in_full, in_nf4)
    )
    return "nf4" if num_in_nf4 > num_in_full else "none"


def plan_memory(
    needs: MemoryNeeds,
    *,
    free_bytes: int,
    num_model_blocks: int,
    num_blocks: int | None = None,
    adapter_bytes: int | None = None,
    kept_bytes: int | None = None,
) -> MemoryPlan:
    """Return how many blocks fit, with room for CACHE_TOKENS of cache each, and the budgets of all else.

    Args:
        num_blocks: wanted number of blocks; None: as many as fit.
        adapter_bytes: wanted room for adapters; None: some of what the blocks leave.
        kept_bytes: wanted room for kept activations; None: the same.
    Raises: ResourceError: not even one block fits, or fewer than the wanted number.
    """
    usable = _usable(free_bytes) - (adapter_bytes or 0) - (kept_bytes or 0)
    smallest = needs.bytes_per_block + needs.cache_bytes_per_token * LEAST_CACHE_TOKENS
    wanted = num_blocks if num_blocks is not None else max(1, min(num_model_blocks, usable // _with_cache(needs)))
    if wanted * smallest > usable:
        raise ResourceError(
            f"{wanted} block{'s' * (wanted > 1)} of this model need{'s' * (wanted == 1)} at least "
            f"{_mib(wanted * smallest)} MiB, {_mib(max(0, usable))} MiB can be used here"
            f"{f' beside {_mib(adapter_bytes)} MiB for adapters' if adapter_bytes else ''}"
            f"{f' beside {_mib(kept_bytes)} MiB for kept activations' if kept_bytes else ''}: free some memory, "
            f"{'give adapters less (--adapter-mib), ' if adapter_bytes else ''}"
            f"{'keep fewer activations (--kept-mib), ' if kept_bytes else ''}"
            f"{'ask for fewer blocks (--num-blocks), ' if wanted > 1 else ''}or use fewer bits (--quantization)"
        )
    left = usable - wanted * needs.bytes_per_block
    spare = left - wanted * (smallest - needs.bytes_per_block)
    if adapter_bytes is None:
        adapter_bytes = min(MAX_ADAPTER_BYTES, left // 8, spare)
        left, spare = left - adapter_bytes, spare - adapter_bytes
    if kept_bytes is None:
        kept_bytes = min(MAX_KEPT_BYTES, left // 4, spare)
        left -= kept_bytes
    cache_bytes = min(left, 4 * CACHE_TOKENS * needs.cache_bytes_per_token * wanted)
    graph_bytes = min(MAX_GRAPH_BYTES, int(free_bytes * GRAPH_FRACTION))
    return MemoryPlan(wanted, cache_bytes, adapter_bytes, kept_bytes, graph_bytes)


def fits(needs: MemoryNeeds, memory: MemoryPlan, *, free_bytes: int) -> bool:
    """Whether blocks and all that is planned for them fit into what is free now."""
    budgets = memory.cache_bytes + memory.adapter_bytes + memory.kept_bytes
    return memory.num_blocks * needs.bytes_per_block + budgets <= _usable(free_bytes)


def _usable(free_bytes: int) -> int:
    return int(free_bytes * (1 - RESERVE_FRACTION))


def _with_cache(needs: MemoryNeeds) -> int:
    return needs.bytes_per_block + CACHE_TOKENS * needs.cache_bytes_per_token


def _mib(num_bytes: int) -> int:
    return -(-num_bytes // (1 << 20))
