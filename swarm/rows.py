"""Some sequences of a batch."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


def some_rows(tensor: MaybeTensor, start: int, end: int, *, dim: int = 0) -> MaybeTensor:
    """The sequences [start, end) of a tensor; all of one that has the same for every sequence, of length 1 in `dim`."""
    return tensor if tensor is None or tensor.shape[dim] == 1 else tensor.narrow(dim, start, end - start)
