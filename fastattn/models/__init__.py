"""Complete models on fastattn's ops: the encoder-decoder Transformer, its blocks, generation."""

from fastattn.models.checkpoint import load_torch
from fastattn.models.config import TransformerConfig
from fastattn.models.transformer import AttentionWeights, Transformer

__all__ = ["AttentionWeights", "Transformer", "TransformerConfig", "load_torch"]
