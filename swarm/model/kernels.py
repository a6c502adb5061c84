"""The compiled kernels, where this machine has them: kernels/weight_only.c, through ctypes.

They are built when Swarm is installed, if there is a C compiler. Without them everything works, more slowly.
"""

# M rows, N outputs, K inputs

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging

import torch  # before the kernels, which use the threads that torch brings
from torch import Tensor

logger = logging.getLogger(__name__)

MODULE = "swarm.model._weight_only"
"""Under this name the library lies in the package; it is not a Python module."""


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
    for function in (library.half_product, library.int8_product, library.int4_product):
        function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long] * 3
        function.restype = ctypes.c_int
    return library


def is_compiled() -> bool:
    """Whether the kernels were built and this processor has what they need."""
    return _library() is not None


def weight_only_product(bits: int, x_MK: Tensor, data: Tensor, scales: Tensor, num_outputs: int) -> Tensor:
    """Multiply rows with transposed weights of 8 or 4 bits, laid out as kernels/weight_only.c says.

    Args:
        x_MK: float32, contiguous, on the CPU; K is a multiple of 64.
    Returns: [M, num_outputs], float32.
    """
    library = _library()
    assert library is not None, "nobody asked is_compiled()"
    assert x_MK.dtype == torch.float32 and x_MK.is_contiguous() and x_MK.shape[1] % 64 == 0
    y_MN = x_MK.new_empty(x_MK.shape[0], num_outputs)
    function = library.int8_product if bits == 8 else library.int4_product
    pointers = [tensor.data_ptr() for tensor in (x_MK, data, scales, y_MN)]
    if not function(*pointers, x_MK.shape[0], num_outputs, x_MK.shape[1]):
        raise MemoryError(f"no memory for {x_MK.shape[0]} rows of activations")
    return y_MN


def half_product(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """Multiply rows with transposed weights and add the bias; all bfloat16, summed in float32.

    Args:
        x_MK: contiguous, on the CPU; K is a multiple of 16.
    Returns: [M, N], bfloat16.
    """
    library = _library()
    assert library is not None, "nobody asked is_compiled()"
    assert x_MK.dtype == weight_NK.dtype == torch.bfloat16 and x_MK.is_contiguous() and x_MK.shape[1] % 16 == 0
    (num_rows, num_inputs), num_outputs = x_MK.shape, weight_NK.shape[0]
    y_MN = x_MK.new_empty(num_rows, num_outputs)
    bias_pointer = None if bias_N is None else bias_N.data_ptr()
    pointers = (x_MK.data_ptr(), weight_NK.data_ptr(), bias_pointer, y_MN.data_ptr())
    if not library.half_product(*pointers, num_rows, num_outputs, num_inputs):
        raise MemoryError(f"no memory for {num_rows} rows of activations")
    return y_MN
