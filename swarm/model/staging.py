"""What a pass takes to the device and back: in one copy each way, from and to memory that the device reads itself.

Copies of ordinary memory make the thread wait for the device, once for each tensor. Memory that is pinned to its place
is copied while the thread goes on. torch keeps pinned memory, and does not hand it out again before a copy has ended.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 256
"""Bytes; tensors begin at multiples of it, as those that torch allocates."""


@dataclass(frozen=True, slots=True)
class Field:
    """One tensor of a block."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Block:
    """Several tensors in one piece of memory."""

    def __init__(self, fields: Sequence[Field], device: torch.device, *, pinned: bool = False) -> None:
        ends, at = [], 0
        for field in fields:
            at = -(-at // ALIGNMENT) * ALIGNMENT + field.num_bytes
            ends.append(at)
        self.memory = torch.empty(at, dtype=torch.uint8, device=device, pin_memory=pinned)
        """uint8."""
        self.tensors = [
            self.memory[end - field.num_bytes : end].view(field.dtype).view(field.shape)
            for field, end in zip(fields, ends, strict=True)
        ]
        """Views of it, one for each field."""

    def fill(self, tensors: Sequence[Tensor]) -> None:
        """Copy tensors of the same shapes into it, in the dtypes of the fields."""
        for own, tensor in zip(self.tensors, tensors, strict=True):
            own.copy_(tensor)

    def load(self, tensors: Sequence[Tensor]) -> None:
        """The same from the CPU to the block's device, in one copy, which may still be under way at the return."""
        if self.memory.device.type != "cuda":
            self.fill(tensors)
            return
        fields = [Field(tuple(own.shape), own.dtype) for own in self.tensors]
        host = Block(fields, torch.device("cpu"), pinned=True)
        host.fill(tensors)
        self.memory.copy_(host.memory, non_blocking=True)


def send(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of the CPU on a device; those that are there already, as they are."""
    if device.type == "cpu":
        return list(tensors)
    fields = [Field(tuple(tensor.shape), tensor.dtype) for tensor in tensors if tensor.device.type == "cpu"]
    block = Block(fields, device)
    block.load([tensor for tensor in tensors if tensor.device.type == "cpu"])
    sent = iter(block.tensors)
    return [next(sent) if tensor.device.type == "cpu" else tensor for tensor in tensors]


class Fetch:
    """A tensor on its way to the CPU. Begin it, queue more work, then collect it."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: Any = None
        self._host = tensor
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))

    def collect(self) -> Tensor:
        """Wait until it has arrived; on the CPU."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.cpu()  # of other devices, copied only now
