"""The compiled kernels, where this machine has them: those in kernels/, through ctypes.

They are built when Swarm is installed, if there is a C compiler. Without them everything works, more slowly.
"""

# M rows, N outputs, K inputs; of attention: T sequences, N key/value heads, G query heads of each, S slots,
# H size of a key, V size of a value, R runs

from __future__ import annotations

import ctypes
import enum
import functools
import importlib.util
import itertools
import logging
from collections.abc import Sequence

import torch  # before the kernels, which use the threads that torch brings
from torch import Tensor

logger = logging.getLogger(__name__)

MODULE = "swarm.model._kernels"
"""Under this name the library lies in the package; it is not a Python module."""


_SCALES = {8: torch.float32, 4: torch.bfloat16}
"""In which type the scales of weights of so many bits are."""


@functools.cache
def _library() -> ctypes.CDLL | None:
    spec = importlib.util.find_spec(MODULE)
    if spec is None or spec.origin is None:
        return None
    try:
        library = ctypes.CDLL(spec.origin)
    except OSError as exc:
        logger.warning("the compiled kernels cannot be loaded, install Swarm again: %s", exc)
        return None
    if not library.is_supported():
        return None
    if not hasattr(library, "best_level"):
        logger.warning("the compiled kernels are of an older version, install Swarm again")
        return None
    library.decode.argtypes = [ctypes.c_void_p]
    library.product.argtypes = [ctypes.c_int] * 3 + [ctypes.c_void_p] * 5 + [ctypes.c_long] * 3
    library.rms_norm.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_long] * 2 + [ctypes.c_float]
    library.rms_norm.restype = None
    library.attention.argtypes = [ctypes.c_void_p] * 8 + [ctypes.c_float]
    return library


def is_compiled() -> bool:
    """Whether the kernels were built and this processor has what they need."""
    return _library() is not None


class Level(enum.IntEnum):
    """The instructions that products are computed with; `enum level` of kernels/product.h."""

    AVX2 = 0
    AVX512 = 1
    """With those for bfloat16 and 16-bit integers."""
    AMX = 2
    """Tiles for weights of 16 bits; everything else as with AVX-512."""


@functools.cache
def best_level() -> Level:
    """The best that this processor and its system have."""
    library = _library()
    return Level.AVX2 if library is None else Level(library.best_level())


def is_wide() -> bool:
    """Whether there is AVX-512, and with it products in bfloat16."""
    return best_level() > Level.AVX2


@functools.cache
def has_fast_floats() -> bool:
    """Whether this processor has AVX-512, which torch's own kernels for few bits and for bfloat16 are made for."""
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


def product(
    bits: int, x_MK: Tensor, weights: Tensor, scales: Tensor | None, bias_N: Tensor | None, num_outputs: int
) -> Tensor:
    """Multiply rows with transposed weights and add the bias; summed in float32 and rounded once.

    Args:
        bits: 16 for weights in bfloat16, [N, K]; 8 or 4 for those that kernels/products.c describes, with scales.
        x_MK: on the CPU; bfloat16, or float32 if the weights have fewer bits. K is a multiple of 16 for weights of 16
            bits, of 64 for others.
    Returns: [M, num_outputs], in the dtype of x.
    """
    library = _library()
    assert library is not None, "nobody asked is_compiled()"
    dtype = x_MK.dtype
    assert dtype == torch.bfloat16 or (dtype == torch.float32 and bits != 16), "rows of a type that no kernel takes"
    x_MK = x_MK.contiguous()
    num_rows, num_inputs = x_MK.shape
    assert weights.is_contiguous() and weights.nbytes == num_outputs * num_inputs * bits // 8
    assert scales is None or (scales.is_contiguous() and scales.dtype == _SCALES[bits])
    y_MN = x_MK.new_empty(num_rows, num_outputs)
    scales_pointer = None if scales is None else scales.data_ptr()
    bias_N = None if bias_N is None else bias_N.to(dtype).contiguous()
    assert bias_N is None or bias_N.shape == (num_outputs,)
    bias_pointer = None if bias_N is None else bias_N.data_ptr()
    done = library.product(
        best_level(), bits, dtype == torch.bfloat16, x_MK.data_ptr(), weights.data_ptr(), scales_pointer, bias_pointer,
        y_MN.data_ptr(), num_rows, num_outputs, num_inputs,
    )  # fmt: skip
    if not done:
        raise MemoryError(f"no memory for {num_rows} rows of activations")
    return y_MN


def rms_norm(x_MD: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """Divide rows by their root mean square, computed in float32, and multiply them with the weights; all bfloat16.

    Args:
        x_MD: on the CPU; D is a multiple of 8.
    """
    library = _library()
    assert library is not None, "nobody asked is_compiled()"
    assert x_MD.dtype == weight_D.dtype == torch.bfloat16
    x_MD = x_MD.contiguous()
    y_MD = torch.empty_like(x_MD)
    library.rms_norm(x_MD.data_ptr(), weight_D.data_ptr(), y_MD.data_ptr(), *x_MD.shape, epsilon)
    return y_MD


class Linear(ctypes.Structure):
    """`struct linear` of kernels/blocks.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("w", "scales", "bias")] + [
        (name, ctypes.c_int64) for name in ("N", "K", "bits")
    ]


class Norm(ctypes.Structure):
    """`struct norm`."""

    _fields_ = [("weight", ctypes.c_void_p), ("epsilon", ctypes.c_float)]


class Block(ctypes.Structure):
    """`struct block`."""

    _fields_ = [
        *((name, Linear) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, Norm) for name in ("norm", "q_norm", "k_norm", "mlp_norm")),
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
    ]


class Pass(ctypes.Structure):
    """`struct pass`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("blocks", "x", "cos", "sin", "slots", "runs", "ends")),
        *((name, ctypes.c_int64) for name in ("num_blocks", "T", "D", "N", "G", "H", "head", "slot")),
        ("scaling", ctypes.c_float),
        ("level", ctypes.c_int32),
    ]


address_of = ctypes.addressof


def decode(call: Pass) -> None:
    """Run whole blocks on one token of each sequence; kernels/blocks.h says what must be where."""
    library = _library()
    assert library is not None, "nobody asked is_compiled()"
    if not library.decode(ctypes.byref(call)):
        raise MemoryError(f"no memory for {call.T} rows of activations")


class Runs:
    """Where the tokens of some sequences lie, as `attention` takes it: slots [start, end), in order."""

    def __init__(self, sequences: Sequence[Sequence[tuple[int, int]]]) -> None:
        self.num_sequences = len(sequences)
        self.num_slots = max(end for runs in sequences for _, end in runs)
        """The store must have as many."""
        flat = [slot for runs in sequences for run in runs for slot in run]
        self.slots = (ctypes.c_int64 * len(flat))(*flat)
        self.ends = (ctypes.c_int64 * len(sequences))(*itertools.accumulate(map(len, sequences)))


def attention(q_TNGH: Tensor, keys_1NSH: Tensor, values_1NSV: Tensor, runs: Runs, scaling: float) -> Tensor:
    """Softmax attention of one token of each sequence over all tokens of the sequence; all bfloat16, on the CPU.

    Args:
        keys_1NSH, values_1NSV: numbers of a head and slot lie side by side; H and V are multiples of 16.
    Returns: [T, N, G, V].
    """
    library = _library()
    assert library is not None, "nobody asked is_compiled()"
    assert q_TNGH.dtype == keys_1NSH.dtype == values_1NSV.dtype == torch.bfloat16
    assert keys_1NSH.stride(3) == values_1NSV.stride(3) == 1 and runs.num_slots <= keys_1NSH.shape[2]
    q_TNGH = q_TNGH.contiguous()
    sizes = (*q_TNGH.shape, values_1NSV.shape[3])
    assert sizes[0] == runs.num_sequences and sizes[1:4:2] == (keys_1NSH.shape[1], keys_1NSH.shape[3])
    strides = (*keys_1NSH.stride()[1:3], *values_1NSV.stride()[1:3])
    y_TNGV = q_TNGH.new_empty(*sizes[:3], sizes[4])
    done = library.attention(
        q_TNGH.data_ptr(), keys_1NSH.data_ptr(), values_1NSV.data_ptr(), y_TNGV.data_ptr(), runs.slots, runs.ends,
        (ctypes.c_long * 5)(*sizes), (ctypes.c_long * 4)(*strides), scaling,
    )  # fmt: skip
    if not done:
        raise MemoryError(f"no memory for the attention of {sizes[0]} tokens")
    return y_TNGV
