"""Block ranges: which transformer blocks of a model somebody means."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from swarm.errors import BadRequest


@dataclass(frozen=True, slots=True, order=True)
class BlockRange:
    """The blocks [start, end) of a model, counted from 0; never empty."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise BadRequest(f"block range {self.start}:{self.end} must satisfy 0 <= start < end, for example 0:4")

    @classmethod
    def parse(cls, text: str) -> BlockRange:
        """Read "4:8" as the blocks 4, 5, 6 and 7."""
        start, colon, end = text.partition(":")
        if not (colon and start.strip().isdecimal() and end.strip().isdecimal()):
            raise BadRequest(f"block range {text!r} must be written START:END with two whole numbers, for example 0:4")
        return cls(int(start), int(end))

    def check_inside(self, num_model_blocks: int) -> None:
        """Raise BadRequest unless the model has all these blocks."""
        if self.end > num_model_blocks:
            raise BadRequest(
                f"block range {self} is outside the model, which has {num_model_blocks} blocks: "
                f"choose a range within 0:{num_model_blocks}"
            )

    def covers(self, other: BlockRange) -> bool:
        return self.start <= other.start and other.end <= self.end

    def __len__(self) -> int:
        return self.end - self.start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.end))

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"


def describe_blocks(blocks: Iterable[int]) -> str:
    """Write a set of block numbers as text: {0, 1, 2, 7} is "0-2, 7"."""
    runs: list[list[int]] = []
    for block in sorted(blocks):
        if runs and block == runs[-1][1] + 1:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
