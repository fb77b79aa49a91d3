"""Rotary position embedding on the native kernels."""

from fastattn.backends.cpu import native


def unsupported(problem) -> list[str]:
    """Why the kernels cannot run `problem`: they run every one of a known dtype."""
    return []


def rotary_fwd(problem, t, offset, out) -> int:
    """Writes the rotated x to `out`; the first sequence with a wrong offset, or -1."""
    return _rotate(problem, t, offset, False, out)


def rotary_bwd(problem, t, offset, dx) -> int:
    """As `rotary_fwd`, by the negative angle: of dout, the gradient of x."""
    return _rotate(problem, t, offset, True, dx)


def _rotate(problem, t, offset, inverse, out) -> int:
    x, cos, sin = map(native.unit_last_stride, t[:3])
    offsets = native.contiguous(t.offsets)
    shared = () if problem.table_batch else (0,)
    return native._C.rotary(
        native.DTYPES[problem.dtype],
        native.DTYPES[problem.table],
        problem[3:9],
        (x.data_ptr(), x.stride()),
        (cos.data_ptr(), shared + cos.stride()),
        (sin.data_ptr(), shared + sin.stride()),
        offset,
        native.pointer(offsets),
        problem.interleaved,
        inverse,
        (out.data_ptr(), out.stride()),
    )
