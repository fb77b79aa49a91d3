"""Makes Triton's interpreter compute bfloat16 as a GPU does.

The interpreter keeps bfloat16 in 16-bit integers, truncates where a GPU rounds to nearest even, and
multiplies matrices of these integers as they stand. Conversions and products are replaced here.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_Builder = interpreter.InterpreterBuilder
_Handle = interpreter.TensorHandle
_cast, _dot = _Builder.cast_impl, _Builder.create_dot


def _widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _rounded(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _cast_impl(self, src, dst_type):
    source, target = src.dtype.scalar, dst_type.scalar
    if source == tl.bfloat16 and target == tl.float32:
        return _Handle(_widened(src.data), target)
    if source == tl.float32 and target == tl.bfloat16:
        return _Handle(_rounded(src.data), target)
    return _cast(self, src, dst_type)


def _create_fp_to_fp(self, src, dst_type, rounding_mode):
    if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
        if tl.float32 not in (src.dtype.scalar, dst_type.scalar):
            src = _convert(self, src, tl.float32, rounding_mode)
        return _cast_impl(self, src, dst_type)
    return _convert(self, src, dst_type, rounding_mode)


def _create_dot(self, a, b, d, *arguments):
    a, b = (
        _Handle(_widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
        for x in (a, b)
    )
    return _dot(self, a, b, d, *arguments)


_convert = _Builder.create_fp_to_fp
_Builder.cast_impl = _cast_impl
_Builder.create_fp_to_fp = _create_fp_to_fp
_Builder.create_dot = _create_dot
