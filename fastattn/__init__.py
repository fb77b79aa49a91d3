"""fastattn: hand-written fused attention, softmax and FFN kernels for PyTorch."""

from fastattn.dispatch import BackendError, use_backend
from fastattn.integrations.accelerate import accelerate, restore
from fastattn.integrations.explain import explain
from fastattn.ops import (
    attention,
    cross_entropy,
    ffn,
    gated_ffn,
    layer_norm,
    linear_cross_entropy,
    rms_norm,
    rotary,
    softmax,
)

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "accelerate",
    "attention",
    "cross_entropy",
    "explain",
    "ffn",
    "gated_ffn",
    "layer_norm",
    "linear_cross_entropy",
    "restore",
    "rms_norm",
    "rotary",
    "softmax",
    "use_backend",
]
