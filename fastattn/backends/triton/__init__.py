"""Triton backend: the kernels of ``fastattn.kernels``, on NVIDIA and AMD GPUs.

Under ``TRITON_INTERPRET=1`` Triton's interpreter runs them on a CPU, slowly, to test them.
"""

from fastattn.backends.triton import (
    attention,
    cross_entropy,
    device,
    ffn,
    linear_cross_entropy,
    norm,
    rotary,
    softmax,
)

NAME = "triton"

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
    return device.refusals(problem) + _OPS[problem.op.rpartition("_")[0]].unsupported(problem)


attention_fwd, attention_bwd = attention.attention_fwd, attention.attention_bwd
softmax_fwd, softmax_bwd = softmax.softmax_fwd, softmax.softmax_bwd
ffn_fwd, ffn_bwd = ffn.ffn_fwd, ffn.ffn_bwd
norm_fwd, norm_bwd = norm.norm_fwd, norm.norm_bwd
cross_entropy_fwd = cross_entropy.cross_entropy_fwd
cross_entropy_bwd = cross_entropy.cross_entropy_bwd
linear_cross_entropy_fwd = linear_cross_entropy.linear_cross_entropy_fwd
linear_cross_entropy_bwd = linear_cross_entropy.linear_cross_entropy_bwd
rotary_fwd, rotary_bwd = rotary.rotary_fwd, rotary.rotary_bwd
