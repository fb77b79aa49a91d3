"""Complete models on fastattn's ops: encoder-decoder, encoder, decoder, vision; generation."""

from fastattn.models.checkpoint import CONFIG, MODELS, build, load, load_torch, save
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
from fastattn.models.huggingface import from_huggingface
from fastattn.models.presets import PRESETS, preset
from fastattn.models.summary import Summary, summary
from fastattn.models.transformer import AttentionWeights, Transformer
from fastattn.models.vision import VisionTransformer

__all__ = [
    "CONFIG",
    "MODELS",
    "PRESETS",
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
    "Summary",
    "TokenClassifier",
    "Transformer",
    "TransformerConfig",
    "VisionConfig",
    "VisionTransformer",
    "build",
    "from_huggingface",
    "load",
    "load_torch",
    "preset",
    "save",
    "summary",
]
