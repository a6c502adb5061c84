"""The record of a session: what was fed to it, and what a replay sends."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from swarm.streams import Step

# B batch, L length, T all tokens so far, D hidden


@dataclass(frozen=True, slots=True)
class Record:
    """Everything fed to the session so far: what a replay sends.

    The tensors are buffers that grow by doubling, valid up to `length`; a decode step writes one row, it does not
    copy the past. What lies beyond `length` is scratch space, so a step that fails in the end changes nothing.
    """

    length: int = 0
    x_BTD: Tensor | None = None
    mask_BT: Tensor | None = None
    position_ids_BT: Tensor | None = None

    def followed_by(self, step: Step) -> Record:
        """The record after a step: reordered by its beams, cut at its position, its tokens appended."""
        batch_size, length, _ = step.x_BLD.shape
        total = step.position + length
        buffers = self if not step.beam_idx else self.rows(torch.tensor(step.beam_idx))
        default_BT = torch.arange(total).expand(batch_size, -1)
        return Record(
            total,
            _written(buffers.x_BTD, step.x_BLD, None, step.position),
            _written(buffers.mask_BT, step.mask_BL, torch.ones_like(default_BT), step.position),
            _written(buffers.position_ids_BT, step.position_ids_BL, default_BT, step.position),
        )

    def rows(self, rows: Tensor) -> Record:
        """The record of these rows; a row may come several times or not at all."""

        def pick(buffer: Tensor | None) -> Tensor | None:
            return None if buffer is None else buffer[rows]

        return Record(self.length, pick(self.x_BTD), pick(self.mask_BT), pick(self.position_ids_BT))

    def copied(self, length: int) -> Record:
        """Its first tokens, as no later step can change them."""

        def copy(buffer: Tensor | None) -> Tensor | None:
            return None if buffer is None else buffer[:, :length].clone()

        return Record(length, copy(self.x_BTD), copy(self.mask_BT), copy(self.position_ids_BT))

    def part(self, start: int, end: int) -> Step:
        """The tokens [start, end) as a step that returns nothing."""
        assert self.x_BTD is not None

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[:, start:end]

        return Step(start, 0, self.x_BTD[:, start:end], cut(self.mask_BT), cut(self.position_ids_BT))


def _written(buffer: Tensor | None, new: Tensor | None, default_BT: Tensor | None, position: int) -> Tensor | None:
    """Write `new` into the buffer at `position`, growing it; where only one of them exists, the default fills in."""
    if buffer is None and (new is None or position == 0):
        # A copy: the buffer is written to later, the caller's tensor (perhaps an expanded one) must not be.
        return None if new is None else new.clone(memory_format=torch.contiguous_format)
    if buffer is None:
        assert default_BT is not None
        buffer = default_BT[:, :position]
    if new is None:
        assert default_BT is not None
        new = default_BT[:, position:]
    end = position + new.shape[1]
    if end > buffer.shape[1]:
        grown = buffer.new_empty(buffer.shape[0], max(end, 2 * buffer.shape[1]), *buffer.shape[2:])
        grown[:, :position] = buffer[:, :position]
        buffer = grown
    buffer[:, position:end] = new
    return buffer
