"""What a hop commits to: short sketches of the hidden states that enter and leave it, under a key of its own.

A sketch is a random projection: each feature is added to, or taken from, one of a few sums, and the key says which. Any
change of the hidden states, in one feature or in all, shows in it in proportion; who does not know the key cannot make
a change that does not.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from swarm.v1 import blocks_pb2 as pb

# S sides: what entered, what left; B batch, L length, X tokens of all sequences, D hidden, N hidden and some to fill,
# K sums of a sketch

NUM_SUMS = 16
"""Of one sketch: with 2 bytes each, a hop's commitment to a token takes 64."""

KEY_BYTES = TAG_BYTES = 16

BYTES_PER_TOKEN = 2 * NUM_SUMS * 2

MAX_BYTES = 1 << 20
"""What the commitments of one step may take, all hops together: they share its first message."""

MAX_ELEMENTS = 1 << 15
"""Of hidden states that are sketched at once."""

LARGEST_LEFT_OUT = 2
"""Sums of a sketch that errors do not count: models have a few features so large that nothing else would be seen."""


@dataclass(frozen=True, slots=True, eq=False)
class Sketcher:
    """Makes and checks the commitments of one hop in one session."""

    key: bytes
    order_N: npt.NDArray[np.intp]
    """The features in the order in which they are summed up, those of one sum together; one again, to fill the last."""
    signs_N: npt.NDArray[np.float32]
    """1 or -1; 0 for those that only fill."""

    @classmethod
    def of_key(cls, key: bytes, hidden_size: int) -> Sketcher:
        """The one of a key, the same on every machine."""
        drawn_D = np.frombuffer(hashlib.shake_256(key).digest(8 * hidden_size), dtype="<u8")
        order_D = np.argsort(drawn_D, kind="stable")
        signs_D = np.where(drawn_D[order_D] & 1, np.float32(1), np.float32(-1))
        fill = (0, -hidden_size % NUM_SUMS)
        return cls(key, np.pad(order_D, fill), np.pad(signs_D, fill))

    def sketch(self, x_BLD: Tensor) -> Tensor:
        """Sketch hidden states on the CPU: bfloat16 [B, L, K]."""
        pieces = x_BLD.flatten(0, 1).split(max(1, MAX_ELEMENTS // x_BLD.shape[2]))
        sums_XK = np.concatenate([self._sums(each.float().numpy()) for each in pieces])
        return torch.from_numpy(sums_XK).to(torch.bfloat16).unflatten(0, x_BLD.shape[:2])

    def _sums(self, x_XD: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        # numpy, because torch would take threads that are for the blocks.
        with np.errstate(invalid="ignore", over="ignore"):  # a peer may send anything
            signed_XN = x_XD.take(self.order_N, axis=1) * self.signs_N
            sums_XK: npt.NDArray[np.float32] = signed_XN.reshape(len(x_XD), NUM_SUMS, -1).sum(axis=2)
        return sums_XK

    def commit(self, position: int, x_BLD: Tensor, y_BLD: Tensor) -> pb.Commitment:
        """Commit to what entered and left the hop at a position."""
        sketches = torch.stack([self.sketch(x_BLD), self.sketch(y_BLD)]).view(torch.uint8).numpy().tobytes()
        return pb.Commitment(sketches=sketches, tag=self._tag(position, sketches))

    def open(self, commitment: pb.Commitment, position: int, batch_size: int, length: int) -> Tensor | None:
        """Return the sketches of a commitment, [S, B, L, K]; None: it is not this hop's for such a step."""
        fits = len(commitment.sketches) == BYTES_PER_TOKEN * batch_size * length
        if not fits or not hmac.compare_digest(commitment.tag, self._tag(position, commitment.sketches)):
            return None
        flat = torch.frombuffer(bytearray(commitment.sketches), dtype=torch.bfloat16)
        return flat.view(2, batch_size, length, NUM_SUMS)

    def _tag(self, position: int, sketches: bytes) -> bytes:
        return hmac.digest(self.key, struct.pack("<I", position) + sketches, "sha256")[:TAG_BYTES]


def max_step_tokens(num_hops: int) -> int:
    """Tokens, of all sequences, that a step may have so that the commitments of all hops fit into its messages."""
    return MAX_BYTES // (num_hops * BYTES_PER_TOKEN) - 1


def num_bytes(commitments: Sequence[pb.Commitment]) -> int:
    """What commitments take."""
    return sum(len(each.sketches) + len(each.tag) for each in commitments)


def relative_error(a_XK: Tensor, b_XK: Tensor) -> Tensor:
    """How far two sketches are apart, relative to the second one: about as far as the hidden states, [X]."""
    a_XK, b_XK = a_XK.float(), b_XK.float()
    largest = torch.maximum(a_XK.abs(), b_XK.abs()).topk(LARGEST_LEFT_OUT, dim=-1).indices
    counted_XK = torch.ones_like(a_XK).scatter_(-1, largest, 0.0)
    error_X = ((a_XK - b_XK) * counted_XK).norm(dim=-1)
    return torch.nan_to_num(error_X / (b_XK * counted_XK).norm(dim=-1).clamp_min(1e-30), nan=1e30, posinf=1e30)
