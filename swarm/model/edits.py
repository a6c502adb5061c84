"""What one call changes in the blocks that it runs through, and only that call: deep prompts and adapters."""

# T all tokens of a call, N blocks of the span, I inputs of a module, O its outputs

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from swarm.errors import BadRequest
from swarm.model.adapters import BlockAdapter
from swarm.model.changes import Change, Drop, Prefix
from swarm.model.dropout import Dropout

AddPrompt = Callable[[Tensor, int], Tensor]
"""Takes the hidden states that enter a block, and the block's place in the list; returns them with its deep prompt."""

Adapters = Sequence[BlockAdapter | None]
"""One entry for each block of a span."""


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """The tokens [start, end) of a call, and what is changed for them at one module."""

    start: int
    end: int
    change: Change
    drop: Drop | None


@dataclass(slots=True, eq=False)
class ModuleEdit:
    """What a call changes at one module."""

    num_tokens: int
    """Of the whole call."""
    parts: list[_Part] = field(default_factory=list)

    @property
    def changes_input(self) -> bool:
        return any(part.change.changes_input for part in self.parts)

    def enter(self, x: Tensor) -> Tensor:
        """What the module is given instead of x."""
        for part in self.parts:
            if part.change.changes_input:
                x = self._replaced(part, x, part.change.enter(self._tokens(part, x)))
        return x

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        """What the module returns instead of y, given x."""
        for part in self.parts:
            y = self._replaced(part, y, part.change.apply(self._tokens(part, x), self._tokens(part, y), part.drop))
        return y

    def _tokens(self, part: _Part, x: Tensor) -> Tensor:
        """The rows of a part, one for each token, however a module arranges what it takes and returns."""
        if x.numel() != self.num_tokens * x.shape[-1]:
            raise BadRequest(f"{part.change.target} does not see every token by itself, so it cannot be changed")
        return x.reshape(self.num_tokens, -1)[part.start : part.end]

    def _replaced(self, part: _Part, y: Tensor, rows: Tensor) -> Tensor:
        """The same with other values for the tokens of a part."""
        if part.end - part.start == self.num_tokens:
            return rows.reshape(y.shape)
        y = y.clone()  # a module may return what it was given
        y.view(self.num_tokens, -1)[part.start : part.end] = rows
        return y


@dataclass(frozen=True, slots=True, eq=False)
class Edits:
    """All that one call changes."""

    add_prompt: AddPrompt | None = None
    modules: Mapping[tuple[int, str], ModuleEdit] = field(default_factory=dict)
    """(the block's place in the list, name of the module within it) -> what is changed there."""


def make_edits(
    add_prompt: AddPrompt | None,
    adapters: Sequence[tuple[int, Adapters | None]],
    *,
    dropout: Dropout | None = None,
    first_block: int = 0,
) -> Edits | None:
    """Return what a call changes, None if it is nothing.

    Args:
        adapters: how many tokens follow one another, and what is changed for them; all tokens of the call in order.
        dropout: for training, where all tokens have the same adapters.
        first_block: the number of the span's first block in the model.
    """
    if all(each is None for _, each in adapters):
        return None if add_prompt is None else Edits(add_prompt)
    num_tokens = sum(count for count, _ in adapters)
    num_blocks = next(len(each) for _, each in adapters if each is not None)
    modules: dict[tuple[int, str], ModuleEdit] = {}
    for index in range(num_blocks):
        for start, end, adapter in _ranges(adapters, index):
            for change in adapter:
                if isinstance(change, Prefix):  # it is in the cache already
                    continue
                drop = None if dropout is None else dropout.at(first_block + index, change.target)
                edit = modules.setdefault((index, change.target), ModuleEdit(num_tokens))
                edit.parts.append(_Part(start, end, change, drop))
    return Edits(add_prompt, modules) if modules or add_prompt is not None else None


def _ranges(adapters: Sequence[tuple[int, Adapters | None]], index: int) -> list[tuple[int, int, BlockAdapter]]:
    """The ranges of tokens that have the same adapter in one block; neighbours are one range."""
    ranges, end = [], 0
    of_block = [(count, None if each is None else each[index]) for count, each in adapters]
    for _, group in itertools.groupby(of_block, key=lambda pair: id(pair[1])):
        pairs = list(group)
        start, end, adapter = end, end + sum(count for count, _ in pairs), pairs[0][1]
        if adapter is not None:
            ranges.append((start, end, adapter))
    return ranges
