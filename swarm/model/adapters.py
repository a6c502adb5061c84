"""What a client changes in a block for its own calls: an adapter, which is data and never code.

A block's adapter is a set of changes, each of a declared kind at one module of the block. It travels as a safetensors
file and is named by the hash of its bytes, so that it is sent once and found again, wherever a route is cut.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from swarm.errors import BadRequest
from swarm.model.changes import KINDS, Bias, Bottleneck, Change, Ia3, Lora, Prefix, first_error
from swarm.ranges import BlockRange

__all__ = [
    "KINDS",
    "Bias",
    "BlockAdapter",
    "Bottleneck",
    "Change",
    "Ia3",
    "Lora",
    "ModelAdapter",
    "Prefix",
    "frozen",
    "num_prefix_tokens",
    "of_blocks",
    "undropped",
]

MAX_ADAPTER_BYTES = 1 << 30
"""Of one block's adapter, unless a server says less."""

MAX_TENSORS = 128
"""In one block's adapter."""

MAX_HEADER_BYTES = 1 << 18

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_METADATA_KEY = "swarm"
"""One entry, for the library keeps no order among several."""


@dataclass(frozen=True, eq=False)
class BlockAdapter:
    """All changes of one block. It counts as immutable: its bytes and its name are made once."""

    changes: Sequence[Change]
    """Sorted by target and kind, whatever order they were given in."""

    def __post_init__(self) -> None:
        changes = sorted(self.changes, key=lambda change: (change.target, change.kind))
        for one, other in itertools.pairwise(changes):
            if one.name == other.name:
                raise BadRequest(f"an adapter has two {one.kind} changes of {one.target}: leave one out")
        if not changes:
            raise BadRequest("an adapter changes nothing: leave it out")
        object.__setattr__(self, "changes", tuple(changes))

    def __iter__(self) -> Iterator[Change]:
        return iter(self.changes)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, in the order of their names in the file: the order in which gradients come back."""
        named = {f"{each.name}/{name}": tensor for each in self.changes for name, tensor in each.tensors().items()}
        return dict(sorted(named.items()))

    def with_tensors(self, tensors: Sequence[Tensor]) -> BlockAdapter:
        """The same changes with other tensors, in the order of `tensors()`."""
        named = dict(zip(self.tensors(), tensors, strict=True))
        return BlockAdapter(
            [each.with_tensors({name: named[f"{each.name}/{name}"] for name in each.tensor_names()}) for each in self]
        )

    def undropped(self) -> BlockAdapter:
        """The same changes, without dropout."""
        if not any(isinstance(each, Lora) and each.dropout for each in self):
            return self
        return BlockAdapter([replace(each, dropout=0.0) if isinstance(each, Lora) else each for each in self])

    @property
    def prefix(self) -> Prefix | None:
        """What stands in front of the sequences in this block."""
        return next((each for each in self if isinstance(each, Prefix)), None)

    @property
    def num_bytes(self) -> int:
        """What its tensors take."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def to_bytes(self) -> bytes:
        """The file: what the tensors held when this was first asked for."""
        return self._file[0]

    @property
    def digest(self) -> bytes:
        """sha-256 of the file, its name."""
        return self._file[1]

    @cached_property
    def _file(self) -> tuple[bytes, bytes]:
        for name, tensor in self.tensors().items():
            if tensor.dtype not in DTYPES.values():
                raise BadRequest(f"{name} is {tensor.dtype}: adapters are float32, float16 or bfloat16")
        scalars = {each.name: each.scalar_values() for each in self.changes}
        copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.tensors().items()}
        data = save_tensors(copies, {_METADATA_KEY: _Metadata(changes=scalars).model_dump_json()})
        return data, hashlib.sha256(data).digest()

    @classmethod
    def from_bytes(cls, data: bytes, *, max_bytes: int = MAX_ADAPTER_BYTES) -> Self:
        """Read a file that somebody has sent.

        Raises: BadRequest: it is not one, or holds what cannot be: unknown kinds, odd shapes or dtypes, NaN.
        """
        if len(data) > max_bytes:
            raise BadRequest(f"a block's adapter of {len(data)} bytes was sent, at most {max_bytes} are taken here")
        changes = _read_header(data)
        try:
            tensors = load_tensors(data)
        except (SafetensorError, ValueError, KeyError) as exc:
            raise BadRequest(f"an adapter is not a whole safetensors file: {exc}") from exc
        made = []
        for name, scalars in changes.items():
            target, kind = _split(name)
            parts = {each: tensors.pop(f"{name}/{each}", None) for each in KINDS[kind].tensor_names()}
            for each, tensor in parts.items():
                if tensor is None:
                    raise BadRequest(f"the {kind} change of {target} lacks its tensor {each!r}")
                low, high = tensor.aminmax()  # of which NaN is both
                if not bool(low.isfinite() & high.isfinite()):
                    raise BadRequest(f"{name}/{each} holds values that are not finite: the training has diverged")
            made.append(_make(KINDS[kind], target, parts, scalars))
        if tensors:
            raise BadRequest(f"an adapter holds a tensor {min(tensors)[:128]!r} that belongs to none of its changes")
        adapter = cls(made)
        adapter.__dict__["_file"] = data, hashlib.sha256(data).digest()
        return adapter


ModelAdapter = Sequence[BlockAdapter | None]
"""One entry for each block of a model, block 0 first; None where nothing is changed."""


def of_blocks(adapters: ModelAdapter | None, blocks: BlockRange) -> ModelAdapter | None:
    """What is changed in these blocks of the model."""
    return None if adapters is None else adapters[blocks.start : blocks.end]


def undropped(adapters: ModelAdapter | None) -> ModelAdapter | None:
    """The same adapters for sessions, in which nothing is dropped: as they are while the model is not trained."""
    if adapters is None:
        return None
    return [adapter if adapter is None else adapter.undropped() for adapter in adapters]


def frozen(adapters: ModelAdapter | None) -> ModelAdapter | None:
    """The same adapters, their files made here and now: an optimizer may change the tensors before they are sent."""
    for adapter in adapters or ():
        if adapter is not None:
            adapter.to_bytes()
    return adapters


def num_prefix_tokens(adapters: ModelAdapter | None) -> int:
    """How many tokens stand in front of the sequences in these blocks.

    Raises: BadRequest: not as many in all of them.
    """
    prefixes = [None if adapter is None else adapter.prefix for adapter in adapters or ()]
    lengths = {0 if prefix is None else prefix.num_tokens for prefix in prefixes}
    if len(lengths) > 1:
        raise BadRequest(f"prefixes of {sorted(lengths)} tokens were given: all blocks need one of the same length")
    return next(iter(lengths), 0)


class _Entry(BaseModel):
    """A tensor in the header of a file."""

    dtype: str
    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1, max_length=2)]


class _Metadata(BaseModel):
    """What the changes of a file have beside tensors, by their names."""

    model_config = ConfigDict(extra="forbid")

    changes: Annotated[dict[str, dict[str, float | bool | str]], Field(min_length=1, max_length=MAX_TENSORS)]


class _Header(BaseModel):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, _Entry]

    metadata: Annotated[dict[str, str], Field(alias="__metadata__")]


def _read_header(data: bytes) -> dict[str, dict[str, Any]]:
    """Check what a file says about itself, before any tensor is made of it; return the scalars of its changes."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= size <= min(MAX_HEADER_BYTES, len(data) - 8):
        raise BadRequest("an adapter is not a whole safetensors file, or its header is longer than 256 KiB")
    try:
        header = _Header.model_validate_json(data[8 : 8 + size])
        metadata = _Metadata.model_validate_json(header.metadata.get(_METADATA_KEY, ""))
    except ValidationError as exc:
        raise BadRequest(f"the header of an adapter cannot be read: {first_error(exc)}") from exc
    entries = header.__pydantic_extra__ or {}
    if len(entries) > MAX_TENSORS:
        raise BadRequest(f"an adapter of {len(entries)} tensors was sent, a block's has at most {MAX_TENSORS}")
    for name, entry in entries.items():
        if entry.dtype not in DTYPES:
            raise BadRequest(f"{name[:128]} has the dtype {entry.dtype[:16]}: adapters are {', '.join(DTYPES)}")
    if sum(math.prod(entry.shape) * DTYPES[entry.dtype].itemsize for entry in entries.values()) > len(data):
        raise BadRequest("an adapter claims more tensors than it has bytes")
    return dict(metadata.changes)


def _split(name: str) -> tuple[str, str]:
    target, _, kind = name.rpartition("/")
    if kind not in KINDS:
        raise BadRequest(
            f"{target[:64]} is to be changed by {kind[:32]!r}, which is not known here: use {', '.join(KINDS)}"
        )
    return target, kind


def _make(kind: type[Change], target: str, tensors: Mapping[str, Any], scalars: Mapping[str, Any]) -> Change:
    try:
        checked = kind.scalars.model_validate(scalars)
    except ValidationError as exc:
        raise BadRequest(f"the {kind.kind} change of {target[:64]}: {first_error(exc)}") from exc
    return kind(target, **tensors, **checked.model_dump())
