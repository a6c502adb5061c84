"""Safetensors files seen from outside: their headers, checked before anything in them is trusted."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from swarm.errors import BadCheckpoint

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit on the JSON header."""
LENGTH_BYTES = 8
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies in its file."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read and check the header of a safetensors file; no tensor is read.

    Raises:
        BadCheckpoint: the file is missing, cut short, or its header does not describe it.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            if size < LENGTH_BYTES or not 2 <= length <= min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
                raise _corrupt(path, f"it has {size} bytes and claims a header of {length}")
            header = json.loads(file.read(length))
    except OSError as exc:
        raise BadCheckpoint(f"cannot read {path}: {exc.strerror or exc}") from exc
    except ValueError as exc:
        raise _corrupt(path, "its header is not JSON") from exc
    if not isinstance(header, dict):
        raise _corrupt(path, "its header is not a JSON object")
    num_data_bytes = size - LENGTH_BYTES - length
    return {
        name: _checked_entry(path, name, entry, num_data_bytes)
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _checked_entry(path: Path, name: str, entry: object, num_data_bytes: int) -> TensorEntry:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise _corrupt(path, f"the entry of {name!r} lacks dtype, shape or data_offsets")
    if not all(isinstance(length, int) and length >= 0 for length in shape):
        raise _corrupt(path, f"{name!r} has the shape {shape}")
    if not 0 <= begin <= end <= num_data_bytes:
        raise _corrupt(path, f"{name!r} ends at byte {end} of {num_data_bytes}")
    num_bits = DTYPE_BITS.get(dtype)
    num_elements = 1
    for length in shape:
        num_elements *= length
    if num_bits is not None and num_elements * num_bits != (end - begin) * 8:
        raise _corrupt(path, f"{name!r} is {dtype} {shape} but has {end - begin} bytes")
    return TensorEntry(dtype, tuple(shape), end - begin)


def _corrupt(path: Path, what: str) -> BadCheckpoint:
    return BadCheckpoint(f"{path} is not a whole safetensors file ({what}): delete it and fetch it again")
