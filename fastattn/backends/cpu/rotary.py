"""Rotary position embedding on the native kernels."""

from torch import Tensor

from fastattn.backends.cpu import native


def unsupported(problem) -> list[str]:
    """Why the kernels cannot run `problem`: they run every one of a known dtype."""
    return []


def _rows(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The tensor, copied unless its last stride is 1, and its strides."""
    strides = tensor.stride()
    if strides[-1] == 1 or tensor.shape[-1] <= 1:
        return tensor, strides
    tensor = tensor.contiguous()
    return tensor, tensor.stride()


def rotary_fwd(problem, t, offset, out) -> int:
    """Writes the rotated x to `out`; the first sequence with a wrong offset, or -1."""
    return _rotate(problem, t, offset, False, out)


def rotary_bwd(problem, t, offset, dx) -> int:
    """As `rotary_fwd`, by the negative angle: of dout, the gradient of x."""
    return _rotate(problem, t, offset, True, dx)


def _rotate(problem, t, offset, inverse, out) -> int:
    (x, x_strides), (cos, cos_strides), (sin, sin_strides) = map(_rows, t[:3])
    if not problem.table_batch:
        cos_strides, sin_strides = (0, *cos_strides), (0, *sin_strides)
    offsets = native.contiguous(t.offsets)
    return native._C.rotary(
        native.DTYPES[problem.dtype],
        native.DTYPES[problem.table],
        problem[3:9],
        (x.data_ptr(), x_strides),
        (cos.data_ptr(), cos_strides),
        (sin.data_ptr(), sin_strides),
        offset,
        native.pointer(offsets),
        problem.interleaved,
        inverse,
        (out.data_ptr(), out.stride()),
    )
