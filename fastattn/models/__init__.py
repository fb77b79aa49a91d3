"""Complete models on fastattn's ops: encoder-decoder, encoder, decoder, vision; generation."""

from fastattn.models.checkpoint import load_torch
from fastattn.models.config import (
    DecoderConfig,
    EncoderConfig,
    RopeScaling,
    TransformerConfig,
    VisionConfig,
)
from fastattn.models.decoder import Decoder
from fastattn.models.encoder import (
    Encoder,
    MaskedLanguageModel,
    SequenceClassifier,
    Span,
    SpanClassifier,
    TokenClassifier,
)
from fastattn.models.transformer import AttentionWeights, Transformer
from fastattn.models.vision import VisionTransformer

__all__ = [
    "AttentionWeights",
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "MaskedLanguageModel",
    "RopeScaling",
    "SequenceClassifier",
    "Span",
    "SpanClassifier",
    "TokenClassifier",
    "Transformer",
    "TransformerConfig",
    "VisionConfig",
    "VisionTransformer",
    "load_torch",
]
