"""Reference backend: every op in plain PyTorch, complete in every argument; the others' oracle.

Runs on any device and in float64; half precisions compute in float32.
"""

from fastattn.backends.reference import (
    attention,
    cross_entropy,
    ffn,
    linear_cross_entropy,
    norm,
    rotary,
    softmax,
)

NAME = "reference"


def unsupported(problem) -> list[str]:
    """Every reason why this backend cannot run `problem`: there is none."""
    return []


attention_fwd, attention_bwd = attention.attention_fwd, attention.attention_bwd
softmax_fwd, softmax_bwd = softmax.softmax_fwd, softmax.softmax_bwd
ffn_fwd, ffn_bwd = ffn.ffn_fwd, ffn.ffn_bwd
norm_fwd, norm_bwd = norm.norm_fwd, norm.norm_bwd
cross_entropy_fwd = cross_entropy.cross_entropy_fwd
cross_entropy_bwd = cross_entropy.cross_entropy_bwd
linear_cross_entropy_fwd = linear_cross_entropy.linear_cross_entropy_fwd
linear_cross_entropy_bwd = linear_cross_entropy.linear_cross_entropy_bwd
rotary_fwd, rotary_bwd = rotary.rotary_fwd, rotary.rotary_bwd
