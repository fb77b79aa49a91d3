"""The operators: one file an op, from public function to torch.library registration."""

from fastattn.ops.attention import attention
from fastattn.ops.cross_entropy import cross_entropy
from fastattn.ops.ffn import ffn, gated_ffn
from fastattn.ops.linear_cross_entropy import linear_cross_entropy
from fastattn.ops.norm import layer_norm, rms_norm
from fastattn.ops.rotary import rotary
from fastattn.ops.softmax import softmax

__all__ = [
    "attention",
    "cross_entropy",
    "ffn",
    "gated_ffn",
    "layer_norm",
    "linear_cross_entropy",
    "rms_norm",
    "rotary",
    "softmax",
]
