"""CPU backend: the hand-written SIMD kernels of the native module ``fastattn._C``."""

import torch

from fastattn.backends.cpu import (
    attention,
    cross_entropy,
    ffn,
    linear_cross_entropy,
    native,
    norm,
    rotary,
    softmax,
)

NAME = "cpu"

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_OPS = {
    "attention": attention,
    "softmax": softmax,
    "ffn": ffn,
    "gated_ffn": ffn,
    "layer_norm": norm,
    "rms_norm": norm,
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
    "rotary": rotary,
}


def unsupported(problem) -> list[str]:
    """Every reason why this backend cannot run `problem`; empty if it can."""
    reasons = [] if native.MISSING is None else [native.MISSING]
    if problem.device != "cpu":
        reasons.append(f"device={problem.device}, only cpu")
    if problem.dtype not in _DTYPES:
        reasons.append(f"dtype={problem.dtype}, only float32, float16 and bfloat16")
    return reasons + _OPS[problem.op.rpartition("_")[0]].unsupported(problem)


attention_fwd, attention_bwd = attention.attention_fwd, attention.attention_bwd
softmax_fwd, softmax_bwd = softmax.softmax_fwd, softmax.softmax_bwd
ffn_fwd, ffn_bwd = ffn.ffn_fwd, ffn.ffn_bwd
norm_fwd, norm_bwd = norm.norm_fwd, norm.norm_bwd
cross_entropy_fwd = cross_entropy.cross_entropy_fwd
cross_entropy_bwd = cross_entropy.cross_entropy_bwd
linear_cross_entropy_fwd = linear_cross_entropy.linear_cross_entropy_fwd
linear_cross_entropy_bwd = linear_cross_entropy.linear_cross_entropy_bwd
rotary_fwd, rotary_bwd = rotary.rotary_fwd, rotary.rotary_bwd
