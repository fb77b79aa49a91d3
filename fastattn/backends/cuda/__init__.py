"""CUDA backend: the hand-written CUDA C++ kernels of the native module, on NVIDIA GPUs.

It has the ops where control of the chip pays; the Triton backend runs the others.
"""

from fastattn.backends.cuda import attention, device, ffn, softmax

NAME = "cuda"

_OPS = {"attention": attention, "softmax": softmax, "ffn": ffn, "gated_ffn": ffn}


def unsupported(problem) -> list[str]:
    """Every reason why this backend cannot run `problem`; empty if it can."""
    op = problem.op.rpartition("_")[0]
    if op not in _OPS:
        return ["no CUDA C++ kernel of this op"]
    return device.refusals(problem) + _OPS[op].unsupported(problem)


attention_fwd, attention_bwd = attention.attention_fwd, attention.attention_bwd
softmax_fwd, softmax_bwd = softmax.softmax_fwd, softmax.softmax_bwd
ffn_fwd, ffn_bwd = ffn.ffn_fwd, ffn.ffn_bwd
