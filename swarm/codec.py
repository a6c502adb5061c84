"""Tensors on the wire: specs, bytes, and the checks between them.

`pack` turns tensors into TensorSpecs and parts of at most CHUNK_BYTES; `Unpacker` does the reverse. An Unpacker
checks every spec, and the sum of their sizes, before it allocates anything, and refuses bytes that do not
add up. Both work on the tensors of one message together, in the order of the message's spec fields.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swarm.errors import BadRequest, ProtocolError
from swarm.v1 import blocks_pb2 as pb

CHUNK_BYTES = 1 << 20
"""Bytes of tensor data in one message; larger ones are slower per byte on every transport we measured."""

MAX_RANK = 4

_DTYPES: dict[pb.DType, torch.dtype] = {
    pb.DTYPE_FLOAT32: torch.float32,
    pb.DTYPE_FLOAT16: torch.float16,
    pb.DTYPE_BFLOAT16: torch.bfloat16,
    pb.DTYPE_INT64: torch.int64,
}
_WIRE_DTYPES = {dtype: number for number, dtype in _DTYPES.items()}

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def wire_dtype(dtype: torch.dtype) -> pb.DType:
    """Return the wire's number for a torch dtype."""
    return _WIRE_DTYPES[dtype]


def torch_dtype(name: str) -> torch.dtype:
    """Return the floating-point dtype of that name ("bfloat16"). Raises: BadRequest: it is none that travels."""
    for dtype in FLOAT_DTYPES:
        if name == dtype_name(dtype):
            return dtype
    raise BadRequest(f"dtype {name!r} is not supported: use float32, float16 or bfloat16")


def dtype_name(dtype: torch.dtype) -> str:
    """Return "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class Packed:
    """Tensors ready to be sent: `data` goes with the first message, each of `more` in one of its own."""

    specs: list[pb.TensorSpec | None]
    data: bytes
    more: list[bytes]


def pack(
    *tensors: Tensor | None, codec: pb.Codec | Sequence[pb.Codec] = pb.CODEC_RAW, raw: Sequence[Tensor] = ()
) -> Packed:
    """Serialize tensors of any device; None stays an absent spec.

    Args:
        codec: for floating-point tensors, one for all or one for each; integer tensors are always raw.
        raw: further tensors, behind the others, that the codec is not for.
    """
    codecs = [*codec] if isinstance(codec, Sequence) else [codec] * len(tensors)
    specs: list[pb.TensorSpec | None] = []
    payloads: list[memoryview] = []
    for index, tensor in enumerate((*tensors, *raw)):
        if tensor is None:
            specs.append(None)
            continue
        used = codecs[index] if tensor.dtype.is_floating_point and index < len(tensors) else pb.CODEC_RAW
        payload = _encode(tensor.detach(), used)
        specs.append(
            pb.TensorSpec(
                dtype=_WIRE_DTYPES[tensor.dtype], codec=used, shape=list(tensor.shape), num_bytes=payload.nbytes
            )
        )
        payloads.append(payload)
    total = payloads[0].tobytes() if len(payloads) == 1 else b"".join(payloads)
    if len(total) <= CHUNK_BYTES:
        return Packed(specs, total, [])
    parts = [total[at : at + CHUNK_BYTES] for at in range(0, len(total), CHUNK_BYTES)]
    return Packed(specs, parts[0], parts[1:])


class Unpacker:
    """Collects the bytes of one message's tensors.

    Args:
        specs: the message's specs in field order; None where a field is absent.
        max_bytes: what all tensors of the message may take on the wire, and again once decoded.
    Raises: ProtocolError: a spec is not allowed, or bytes do not add up.
    """

    def __init__(self, specs: Sequence[pb.TensorSpec | None], *, max_bytes: int) -> None:
        self._specs = list(specs)
        present = [spec for spec in self._specs if spec is not None]
        for spec in present:
            _check_spec(spec)
        self.num_raw_bytes = sum(map(raw_bytes, present))
        """What the tensors take once decoded."""
        total = sum(max(spec.num_bytes, raw_bytes(spec)) for spec in present)
        if total > max_bytes:
            raise ProtocolError(f"a message claims {total} bytes of tensors, at most {max_bytes} are allowed here")
        self.num_bytes = sum(spec.num_bytes for spec in present)
        """What comes over the wire."""
        self._buffer = bytearray()

    @property
    def done(self) -> bool:
        return len(self._buffer) == self.num_bytes

    def feed(self, data: bytes) -> None:
        """Add the next bytes."""
        if not data and not self.done:
            raise ProtocolError("a message part carries no bytes although some are missing")
        received = len(self._buffer) + len(data)
        if received > self.num_bytes:
            raise ProtocolError(f"tensors of {self.num_bytes} bytes were announced, {received} came")
        self._buffer += data

    def tensors(self) -> list[Tensor | None]:
        """Return the tensors (CPU, contiguous, writable), once `done`."""
        if not self.done:
            raise ProtocolError(f"tensors of {self.num_bytes} bytes were announced, only {len(self._buffer)} came")
        buffer = self._buffer
        result: list[Tensor | None] = []
        offset = 0
        for spec in self._specs:
            if spec is None:
                result.append(None)
                continue
            result.append(_decode(spec, buffer, offset))
            offset += spec.num_bytes
        return result


def optional(message: object, *fields: str) -> list[pb.TensorSpec | None]:
    """Return the TensorSpec fields of a message, None for the absent ones."""
    return [getattr(message, field) if message.HasField(field) else None for field in fields]  # type: ignore[attr-defined]


def raw_bytes(spec: pb.TensorSpec) -> int:
    """What a tensor takes once decoded."""
    return math.prod(spec.shape) * _DTYPES[spec.dtype].itemsize


def _check_spec(spec: pb.TensorSpec) -> None:
    if spec.dtype not in _DTYPES:
        raise ProtocolError(f"unknown tensor dtype {spec.dtype}")
    if spec.codec not in (pb.CODEC_RAW, pb.CODEC_INT8_PER_ROW):
        raise ProtocolError(f"unknown tensor codec {spec.codec}")
    if not 1 <= len(spec.shape) <= MAX_RANK or min(spec.shape) == 0:
        raise ProtocolError(f"tensor shape {list(spec.shape)[:8]} must have 1 to {MAX_RANK} dimensions of at least 1")
    num_elements = math.prod(spec.shape)
    if spec.codec == pb.CODEC_RAW:
        expected = num_elements * _DTYPES[spec.dtype].itemsize
    else:
        if not _DTYPES[spec.dtype].is_floating_point:
            raise ProtocolError("the 8-bit codec carries floating-point tensors only")
        expected = num_elements + 4 * (num_elements // spec.shape[-1])
    if spec.num_bytes != expected:
        raise ProtocolError(
            f"a tensor of shape {list(spec.shape)} takes {expected} bytes, the message claims {spec.num_bytes}"
        )


def _encode(tensor: Tensor, codec: pb.Codec) -> memoryview:
    if codec == pb.CODEC_RAW:
        return _bytes_of(tensor.to("cpu")).numpy().data
    rows = tensor.float().reshape(-1, tensor.shape[-1])
    scales = (rows.abs().amax(dim=1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    quantized = (rows / scales).round_().clamp_(-127, 127).to(torch.int8)
    return torch.cat([_bytes_of(scales.cpu()), _bytes_of(quantized.cpu())]).numpy().data


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _decode(spec: pb.TensorSpec, buffer: bytearray, offset: int) -> Tensor:
    dtype, shape = _DTYPES[spec.dtype], tuple(spec.shape)
    num_elements = math.prod(shape)
    if spec.codec == pb.CODEC_RAW:
        if offset % dtype.itemsize:
            buffer, offset = buffer[offset : offset + spec.num_bytes], 0
        return torch.frombuffer(buffer, dtype=dtype, count=num_elements, offset=offset).reshape(shape)
    num_rows = num_elements // shape[-1]
    scales = torch.frombuffer(bytearray(buffer[offset : offset + 4 * num_rows]), dtype=torch.float32)
    values = torch.frombuffer(buffer, dtype=torch.int8, count=num_elements, offset=offset + 4 * num_rows)
    return (values.reshape(num_rows, -1).float() * scales[:, None]).to(dtype).reshape(shape)
