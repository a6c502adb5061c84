"""A generation that begins again when a server turns out to have lied, while nobody has seen its tokens yet."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Tainted(Exception):
    """Raised through a generation some of whose tokens follow from results of a server that has lied."""


def until_untainted(generate: Callable[[], T]) -> T:
    """Generate, and again with the same random numbers whenever `Tainted` is raised.

    Each time one more server is excluded, so it ends.
    """
    numbers = _random_numbers()
    while True:
        try:
            return generate()
        except Tainted:
            logger.warning("generating again without the server that has lied")
            _restore(numbers)


def _random_numbers() -> tuple[torch.Tensor, list[torch.Tensor]]:
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), on_cuda


def _restore(numbers: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    on_cpu, on_cuda = numbers
    torch.set_rng_state(on_cpu)
    if on_cuda:
        torch.cuda.set_rng_state_all(on_cuda)
