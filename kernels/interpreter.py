"""Makes Triton's interpreter compute bfloat16 and float8 as a GPU does, and waste less time.

The interpreter keeps both in integers, truncates where a GPU rounds to nearest even, and multiplies
matrices of bfloat16 as the integers that hold them. Conversions and products are replaced here. It
also prepares ``triton.language`` anew for each call of a device function; here, where it has to.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_Builder = interpreter.InterpreterBuilder
_Handle = interpreter.TensorHandle
_cast, _convert, _dot = _Builder.cast_impl, _Builder.create_fp_to_fp, _Builder.create_dot
# A dtype, and the integers that hold it in torch and in numpy.
_NARROW = {
    tl.bfloat16: (torch.bfloat16, torch.int16, np.uint16),
    tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8, np.uint8),
}


def _widened(bits: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    narrow, _, _ = _NARROW[dtype]
    return torch.from_numpy(np.ascontiguousarray(bits)).view(narrow).float().numpy()


def _rounded(values: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    narrow, held, bits = _NARROW[dtype]
    return torch.from_numpy(np.ascontiguousarray(values)).to(narrow).view(held).numpy().view(bits)


def _cast_impl(self, src, dst_type):
    source, target = src.dtype.scalar, dst_type.scalar
    if source in _NARROW and target == tl.float32:
        return _Handle(_widened(src.data, source), target)
    if source == tl.float32 and target in _NARROW:
        return _Handle(_rounded(src.data, target), target)
    return _cast(self, src, dst_type)


def _create_fp_to_fp(self, src, dst_type, rounding_mode):
    source, target = src.dtype.scalar, dst_type.scalar
    if source in _NARROW or target in _NARROW:
        if tl.float32 not in (source, target):
            src = _create_fp_to_fp(self, src, tl.float32, rounding_mode)
        return _cast_impl(self, src, dst_type)
    return _convert(self, src, dst_type, rounding_mode)


def _create_dot(self, a, b, d, *arguments):
    a, b = (
        _Handle(_widened(x.data, x.dtype.scalar), tl.float32) if x.dtype.scalar in _NARROW else x
        for x in (a, b)
    )
    return _dot(self, a, b, d, *arguments)


def _call(self, *args, **kwargs):
    if tl.core.is_builtin(tl.core.load):
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


interpreter.InterpretedFunction.__call__ = _call
_Builder.cast_impl = _cast_impl
_Builder.create_fp_to_fp = _create_fp_to_fp
_Builder.create_dot = _create_dot
