"""What the hops of a route have committed to, for each token that they were fed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from swarm.commitments import NUM_SUMS, Sketcher, relative_error
from swarm.errors import ProtocolError
from swarm.ranges import BlockRange
from swarm.streams import Step
from swarm.v1 import blocks_pb2 as pb

from .network import blame
from .routing import Hop

# H hops, S sides: what entered, what left; B batch, T all tokens so far, L length, K sums of a sketch, D hidden

MISSTATED = 0.1
"""Relative error from which the last hop's commitment is not about the hidden states that it has returned."""


class Transcript:
    """The commitments of one route's hops to the tokens of a session, checked as they come.

    Args:
        keys: what each hop commits under, by its blocks.
    """

    def __init__(
        self, hops: Sequence[Hop], keys: Mapping[BlockRange, bytes], batch_size: int, hidden_size: int
    ) -> None:
        self.hops = hops
        self._sketchers = [Sketcher.of_key(keys[hop.blocks], hidden_size) for hop in hops]
        self._sketches_HSBTK = torch.empty(len(hops), 2, batch_size, 0, NUM_SUMS, dtype=torch.bfloat16)
        self.start = self.end = 0
        """The tokens [start, end) have been committed to."""

    def follows(self, hops: Sequence[Hop]) -> bool:
        """Whether it is about these hops."""
        return [(hop.peer_id, hop.blocks) for hop in hops] == [(hop.peer_id, hop.blocks) for hop in self.hops]

    def add(self, step: Step, commitments: Sequence[pb.Commitment], y_BLD: Tensor | None) -> None:
        """Take note of what the hops commit to for a step, which may replace later tokens.

        Args:
            y_BLD: what the last hop returned for the last tokens of the step, if anything.
        Raises: ProtocolError: they are missing, not the hops' own, or not about what was returned. Whoever handed a
            commitment on may have spoilt it, so one of those is blamed, by chance.
        """
        batch_size, length, _ = step.x_BLD.shape
        if len(commitments) != len(self.hops):
            raise self._blaming(0, f"{len(self.hops)} hops were to commit to a step, {len(commitments)} did")
        opened = [
            sketcher.open(commitment, step.position, batch_size, length)
            for sketcher, commitment in zip(self._sketchers, commitments, strict=True)
        ]
        known = [each for each in opened if each is not None]
        if len(known) < len(opened):
            spoilt = next(index for index, each in enumerate(opened) if each is None)
            raise self._blaming(spoilt, f"the commitment of {self.hops[spoilt]} is not one that it can have made")
        if y_BLD is not None and self._misstated(known[-1][1], y_BLD):
            raise self._blaming(-1, f"{self.hops[-1]} returned something else than it has committed to")
        self._write(step, torch.stack(known))

    def _blaming(self, first: int, message: str) -> ProtocolError:
        return blame(ProtocolError(message), random.choice(self.hops[first:]))

    def _misstated(self, sketches_BLK: Tensor, y_BLD: Tensor) -> bool:
        returned = self._sketchers[-1].sketch(y_BLD)
        return bool((relative_error(sketches_BLK[:, -y_BLD.shape[1] :], returned) > MISSTATED).any())

    def _write(self, step: Step, sketches_HSBLK: Tensor) -> None:
        begin, end = step.position, step.position + step.x_BLD.shape[1]
        if step.beam_idx:
            self._sketches_HSBTK = self._sketches_HSBTK[:, :, list(step.beam_idx)]
        if not self.start <= begin <= self.end:
            self.start = begin
        size = self._sketches_HSBTK.shape[3]
        if end > size:
            shape = list(self._sketches_HSBTK.shape)
            shape[3] = max(end, 2 * size)
            grown = self._sketches_HSBTK.new_zeros(shape)
            grown[:, :, :, :size] = self._sketches_HSBTK
            self._sketches_HSBTK = grown
        self._sketches_HSBTK[:, :, :, begin:end] = sketches_HSBLK
        self.end = end

    def part(self, start: int, end: int) -> Tensor:
        """A copy of the sketches of the tokens [start, end), [H, S, B, T, K]."""
        return self._sketches_HSBTK[:, :, :, start:end].clone()
