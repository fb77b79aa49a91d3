"""Rotary position embedding on the Triton kernels."""

from fastattn.backends.triton.device import Kernels
from fastattn.backends.triton.layout import unit_last_stride

_kernels = Kernels("rotary")


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
    # Reading a GPU's values would wait for it: its kernel gives NaN where an offset is wrong.
    if t.offsets is not None and problem.device == "cpu":
        invalid = (t.offsets < 0) | (t.offsets > problem.seqlen_max - problem.seqlen)
        if invalid.any():
            return int(invalid.nonzero()[0])
    x, cos, sin = map(unit_last_stride, t[:3])
    offsets = None if t.offsets is None else t.offsets.contiguous()
    _kernels.rotary(
        x, cos, sin, offsets, out,
        offset=offset, interleaved=problem.interleaved, inverse=inverse,
    )  # fmt: skip
    return -1
