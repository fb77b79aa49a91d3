"""Layers: drop-in replacements of torch.nn's, and feed-forward networks."""

from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.feed_forward import FeedForward, GatedFeedForward, Sequential
from fastattn.nn.norm import LayerNorm, RMSNorm
from fastattn.nn.softmax import Softmax
from fastattn.nn.transformer import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "FeedForward",
    "GatedFeedForward",
    "LayerNorm",
    "MultiheadAttention",
    "RMSNorm",
    "Sequential",
    "Softmax",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
]
