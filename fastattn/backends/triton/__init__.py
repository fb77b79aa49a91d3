"""Triton backend: the kernels of ``fastattn.kernels``, on NVIDIA and AMD GPUs.

Under ``TRITON_INTERPRET=1`` Triton's interpreter runs them on a CPU, slowly, to test them.
"""

from fastattn.backends.triton import device, softmax

NAME = "triton"

_OPS = {
    "softmax": softmax,
}


def unsupported(problem) -> list[str]:
    """Every reason why this backend cannot run `problem`; empty if it can."""
    return device.refusals(problem) + _OPS[problem.op.rpartition("_")[0]].unsupported(problem)


softmax_fwd, softmax_bwd = softmax.softmax_fwd, softmax.softmax_bwd
