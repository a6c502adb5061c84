"""What a request may contain: every check between a peer's message and the model. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from swarm import PROTOCOL_VERSION
from swarm.codec import FLOAT_DTYPES
from swarm.errors import BadRequest, Draining, PromptTooLong, ProtocolError
from swarm.ranges import BlockRange
from swarm.v1 import blocks_pb2 as pb

# B batch, L length, D hidden, N blocks, P virtual tokens

MAX_POSITION = 1 << 24
MAX_HOPS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLimits:
    """What one request may ask of this server."""

    max_session_tokens: int = 8192
    """Tokens in one session's cache, per sequence."""
    max_step_tokens: int = 512
    """Tokens (batch x length) in one step, beyond one token per sequence."""
    max_batch_tokens: int = 8192
    """Tokens (batch x length) in one Forward or Backward."""
    max_batch_size: int = 256
    """Sequences in one request."""
    max_virtual_tokens: int = 1024
    """Length of a deep prompt."""

    session_idle_s: float = 900.0
    """How long a session may go without a step before its cache is freed; its client replays it then."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) <= 0:
                raise BadRequest(f"{name} must be positive")

    def to_wire(self, max_adapter_bytes: int) -> pb.Limits:
        return pb.Limits(
            max_session_tokens=self.max_session_tokens,
            max_step_tokens=self.max_step_tokens,
            max_batch_tokens=self.max_batch_tokens,
            max_batch_size=self.max_batch_size,
            max_adapter_bytes=max_adapter_bytes,
        )


def check_version(version: int) -> None:
    """Raise ProtocolError unless the caller speaks our version."""
    if version != PROTOCOL_VERSION:
        raise ProtocolError(
            f"this server speaks protocol version {PROTOCOL_VERSION}, the caller version {version}: "
            "install the same release of swarm-llm on both"
        )


def check_fingerprint(wanted: str, served: str, model_name: str) -> None:
    """Raise BadRequest unless the caller means the model that is served here."""
    if wanted != served:
        raise BadRequest(
            f"this server holds {model_name} (fingerprint {served}), the caller asks for a model or revision with "
            f"fingerprint {wanted[:64]}: load the same model and revision"
        )


def check_blocks(wire: pb.BlockRange, served: BlockRange, num_model_blocks: int) -> BlockRange:
    """Return the wanted blocks, all of which are served here.

    Raises: BadRequest: there are no such blocks. Draining: others are served here by now.
    """
    blocks = BlockRange(wire.start, wire.end)
    blocks.check_inside(num_model_blocks)
    if not served.covers(blocks):
        raise Draining(f"blocks {blocks} were asked for, this server holds {served}: look up who holds them now")
    return blocks


def check_batch_spec(spec: pb.TensorSpec | None, hidden_size: int, limits: ServiceLimits, *, max_tokens: int) -> None:
    """Check the claimed shape of hidden states, before any of their bytes is kept.

    Raises: BadRequest: not floating point, not [B, L, D], or wrong D. PromptTooLong: too many tokens.
    """
    if spec is None:
        raise ProtocolError("a request must carry hidden states")
    if spec.dtype not in (pb.DTYPE_FLOAT32, pb.DTYPE_FLOAT16, pb.DTYPE_BFLOAT16):
        raise BadRequest("hidden states must be float32, float16 or bfloat16")
    if len(spec.shape) != 3:
        raise BadRequest(f"hidden states must have the shape [batch, length, hidden_size], got {list(spec.shape)[:8]}")
    batch, length, width = spec.shape
    if width != hidden_size:
        raise BadRequest(f"the model's hidden size is {hidden_size}, the hidden states have {width}")
    if batch > limits.max_batch_size:
        raise BadRequest(f"a batch of {batch} sequences was sent, this server takes at most {limits.max_batch_size}")
    check_num_tokens(batch, length, max(max_tokens, batch))


def check_num_tokens(batch_size: int, length: int, max_tokens: int) -> None:
    """Raise PromptTooLong if these are too many; a length counts the prefix."""
    if batch_size * length > max_tokens:
        raise PromptTooLong(f"{batch_size} x {length} tokens were sent, this server takes at most {max_tokens} at once")


def check_prefix(num_tokens: int, opening: pb.SessionOpen | pb.ComputeOpen) -> None:
    """Raise BadRequest if deep prompts, which belong to the first tokens, come with a prefix."""
    if num_tokens and opening.HasField("prompts"):
        raise BadRequest("deep prompts and a prefix cannot be used together: choose one of them")


def check_prompts_spec(
    spec: pb.TensorSpec | None, blocks: BlockRange, batch_size: int, hidden_size: int, limits: ServiceLimits
) -> None:
    """Check the claimed shape of deep prompts: [N, B or 1, P, D] with a bounded P."""
    if spec is None:
        return
    shape = list(spec.shape)
    fits = (
        len(shape) == 4
        and shape[0] == len(blocks)
        and shape[1] in (1, batch_size)
        and 1 <= shape[2] <= limits.max_virtual_tokens
        and shape[3] == hidden_size
    )
    if not fits or spec.dtype == pb.DTYPE_INT64:
        raise BadRequest(
            f"prompts must be floating point of shape [{len(blocks)}, 1 or {batch_size}, "
            f"1 to {limits.max_virtual_tokens}, {hidden_size}], got {shape[:8]}"
        )


def max_message_bytes(num_tokens: int, hidden_size: int, num_blocks: int, limits: ServiceLimits) -> int:
    """Bound on the tensors of one request: hidden states and their gradient, masks, positions, prompts (float32)."""
    prompts = num_blocks * limits.max_virtual_tokens * hidden_size * 4
    return 2 * num_tokens * hidden_size * 4 + 2 * num_tokens * 8 + prompts


def room_bytes(num_input_bytes: int, num_output_bytes: int) -> int:
    """What a step or batch takes at most beside the model: its tensors, and the answer as it is packed and sent."""
    return num_input_bytes + 3 * num_output_bytes


def check_mask(mask: Tensor | None, batch_size: int, length: int) -> None:
    """Raise BadRequest unless the mask is int64 [B, L] of zeros and ones."""
    if mask is None:
        return
    if mask.dtype != torch.int64 or mask.shape != (batch_size, length):
        raise BadRequest(f"attention_mask must be int64 of shape [{batch_size}, {length}], got {list(mask.shape)}")
    if bool(((mask != 0) & (mask != 1)).any()):
        raise BadRequest("attention_mask must contain zeros and ones only")


def check_position_ids(position_ids: Tensor | None, batch_size: int, length: int) -> None:
    """Raise BadRequest unless the positions are int64 [B or 1, L] and plausible."""
    if position_ids is None:
        return
    if position_ids.dtype != torch.int64 or position_ids.shape not in ((batch_size, length), (1, length)):
        raise BadRequest(f"position_ids must be int64 of shape [{batch_size}, {length}]")
    if bool(((position_ids < 0) | (position_ids > MAX_POSITION)).any()):
        raise BadRequest(f"position_ids must lie between 0 and {MAX_POSITION}")


def check_same_shape(gradient: Tensor | None, hidden_states: Tensor) -> Tensor:
    """Return the gradient, which must look like the hidden states it belongs to."""
    if gradient is None or gradient.dtype not in FLOAT_DTYPES or gradient.shape != hidden_states.shape:
        raise BadRequest("Backward needs grad_outputs of the same shape as hidden_states")
    return gradient


def check_forward_id(forward_id: bytes) -> None:
    """Raise ProtocolError unless the id is absent or has the length that makes it hard to guess."""
    if len(forward_id) not in (0, 16):
        raise ProtocolError("a forward id has 16 bytes")


def check_hop_times(hop_us: Sequence[int]) -> None:
    """Raise ProtocolError if a step has come through more hops than a route can have."""
    if len(hop_us) > MAX_HOPS:
        raise ProtocolError(f"a step has come through {len(hop_us)} hops, more than {MAX_HOPS}")


def check_held(held: Sequence[int]) -> None:
    """Raise ProtocolError unless later hops hold no less than earlier ones, of no more hops than a route can have."""
    if len(held) > MAX_HOPS:
        raise ProtocolError(f"a step names what {len(held)} later hops hold, more than {MAX_HOPS}")
    if any(later < earlier for earlier, later in pairwise(held)):
        raise ProtocolError("of a step, no hop may lack what a later one holds")


def check_beam_idx(beam_idx: list[int], batch_size: int) -> None:
    """Raise BadRequest unless the indices name sequences of the batch, one for each."""
    if beam_idx and (len(beam_idx) != batch_size or max(beam_idx) >= batch_size):
        raise BadRequest(f"beam_idx must name {batch_size} sequences, each below {batch_size}")
