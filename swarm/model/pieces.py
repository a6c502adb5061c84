"""What one packed call runs: the next tokens of some sequences, and the slots of the KV store that are theirs."""

# T all tokens of a sequence, L new ones, D hidden, P prompt tokens, N blocks

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from swarm.errors import BadRequest
from swarm.model.edits import Adapters


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """The next tokens of one sequence (a session of batch B has B sequences)."""

    length: int
    """New tokens, at least 1."""
    position: int
    """Tokens of the sequence that are in the store already."""
    runs: Sequence[tuple[int, int]]
    """Slots [start, end) that hold the tokens 0..position+length-1 in order; the last `length` are written now."""
    position_ids_L: Tensor | None = None
    """int64; None means position..position+length-1."""
    key_mask_T: Tensor | None = None
    """bool, one per token 0..position+length-1, False for padding, on any device; None means no padding."""
    prompts_NPD: Tensor | None = None
    """Deep prompts of the blocks of the PackedSpan, on its device, added at the positions below P."""
    adapters: Adapters | None = None
    """What is changed in each of those blocks, on its device."""

    @property
    def num_keys(self) -> int:
        """Tokens of the sequence after this piece."""
        return self.position + self.length

    def runs_from(self, token: int) -> list[tuple[int, int]]:
        """The runs of the tokens from `token` on."""
        runs = []
        for start, end in self.runs:
            if token < end - start:
                runs.append((start + max(0, token), end))
            token -= end - start
        return runs

    def slots_from(self, token: int) -> Iterator[int]:
        """The slots of the tokens from `token` on."""
        for start, end in self.runs_from(token):
            yield from range(start, end)

    def check(self, num_slots: int, num_blocks: int, hidden_size: int) -> None:
        """Raises: BadRequest: the parts of this piece do not fit together, or not into the store and the blocks."""
        if self.length < 1 or self.position < 0:
            raise BadRequest(f"a piece has 1 token or more from position 0 on, not {self.length} from {self.position}")
        if sum(end - start for start, end in self.runs) != self.num_keys:
            raise BadRequest(f"{self.num_keys} tokens do not fit into the slots {list(self.runs)}")
        if any(start < 0 or end > num_slots for start, end in self.runs):
            raise BadRequest(f"the store has {num_slots} slots, not those of {list(self.runs)}")
        for name, tensor, shape in (
            ("position ids", self.position_ids_L, (self.length,)),
            ("key mask", self.key_mask_T, (self.num_keys,)),
        ):
            if tensor is not None and tensor.shape != shape:
                raise BadRequest(f"the {name} must be {list(shape)}, not {list(tensor.shape)}")
        prompts = self.prompts_NPD
        if prompts is not None and (prompts.dim() != 3 or prompts.shape[::2] != (num_blocks, hidden_size)):
            raise BadRequest(f"the deep prompts must be {[num_blocks, 'any', hidden_size]}, not {list(prompts.shape)}")
        if self.adapters is not None and len(self.adapters) != num_blocks:
            raise BadRequest(f"adapters of {len(self.adapters)} blocks were given, there are {num_blocks}")


def position_ids(pieces: Sequence[Piece]) -> Tensor:
    """Those of all tokens of a row, [T], int64, on the CPU."""
    if all(piece.position_ids_L is None for piece in pieces):
        positions = itertools.chain.from_iterable(range(piece.position, piece.num_keys) for piece in pieces)
        return torch.tensor(list(positions))
    return torch.cat(
        [
            torch.arange(piece.position, piece.num_keys) if piece.position_ids_L is None else piece.position_ids_L.cpu()
            for piece in pieces
        ]
    )


class FastPath(Protocol):
    """A way through all blocks of a packed span, for rows of some kinds, that takes less time than its modules do."""

    def takes(self, pieces: Sequence[Piece]) -> bool:
        """Whether these pieces can go that way, if nothing is changed in the blocks."""

    def __call__(self, x_TD: Tensor, position_ids_1T: Tensor, pieces: Sequence[Piece]) -> Tensor:
        """Run the blocks and write the keys and values; see PackedSpan. The positions are on the CPU."""
