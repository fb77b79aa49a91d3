"""Configurations of well-known models, by name."""

from typing import Any

from fastattn.models.config import (
    Config,
    DecoderConfig,
    EncoderConfig,
    RopeScaling,
    TransformerConfig,
    VisionConfig,
)

_LLAMA: dict[str, Any] = dict(
    positions="rotary", norm="rms", activation="silu", gated=True, bias=False, dropout=0.0
)
_T5: dict[str, Any] = dict(
    input_vocab_size=32128,
    target_vocab_size=32128,
    positions="relative",
    norm_first=True,
    norm="rms",
    norm_eps=1e-6,
    bias=False,
    tie_embeddings="all",
    softmax_scale=1.0,
    embedding_scale=1.0,
    max_positions=1 << 20,  # the positions know no limit
)
_VASWANI: dict[str, Any] = dict(
    input_vocab_size=37000, target_vocab_size=37000, tie_embeddings="all", attention_dropout=0.0
)
_VIT: dict[str, Any] = dict(num_labels=1000, attention_dropout=0.0, norm_eps=1e-6)

# The sizes are those of the papers; what they leave open, as activations, lengths and padded
# vocabularies, is as in the configurations that were published with the weights.

PRESETS: dict[str, Config] = {
    # Vaswani et al. 2017, table 3
    "transformer-base": TransformerConfig(**_VASWANI),
    "transformer-big": TransformerConfig(
        **_VASWANI, d_model=1024, num_heads=16, d_ff=4096, dropout=0.3
    ),
    # Raffel et al. 2020, section 3.7
    "t5-small": TransformerConfig(**_T5, output_scale=512**-0.5),
    "t5-base": TransformerConfig(
        **_T5, d_model=768, num_layers=12, num_heads=12, d_ff=3072, output_scale=768**-0.5
    ),
    # Radford et al. 2019, table 2
    "gpt2": DecoderConfig(vocab_size=50257),
    "gpt2-medium": DecoderConfig(
        vocab_size=50257, d_model=1024, num_layers=24, num_heads=16, d_ff=4096
    ),
    "gpt2-large": DecoderConfig(
        vocab_size=50257, d_model=1280, num_layers=36, num_heads=20, d_ff=5120
    ),
    "gpt2-xl": DecoderConfig(
        vocab_size=50257, d_model=1600, num_layers=48, num_heads=25, d_ff=6400
    ),
    # Grattafiori et al. 2024, table 3; the small one is of their release 3.2
    "llama-3-8b": DecoderConfig(
        **_LLAMA,
        vocab_size=128256,
        d_model=4096,
        num_layers=32,
        num_heads=32,
        num_heads_kv=8,
        d_ff=14336,
        max_positions=8192,
        rope_theta=500000.0,
        tie_embeddings=False,
    ),
    "llama-3.2-1b": DecoderConfig(
        **_LLAMA,
        vocab_size=128256,
        d_model=2048,
        num_layers=16,
        num_heads=32,
        num_heads_kv=8,
        d_ff=8192,
        max_positions=131072,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
    ),
    # Jiang et al. 2023, table 1
    "mistral-7b": DecoderConfig(
        **_LLAMA,
        vocab_size=32000,
        d_model=4096,
        num_layers=32,
        num_heads=32,
        num_heads_kv=8,
        d_ff=14336,
        max_positions=32768,
        window=4096,
        tie_embeddings=False,
    ),
    # Yang et al. 2024, table 1
    "qwen2-0.5b": DecoderConfig(
        **_LLAMA,
        vocab_size=151936,
        d_model=896,
        num_layers=24,
        num_heads=14,
        num_heads_kv=2,
        d_ff=4864,
        max_positions=131072,
        rope_theta=1000000.0,
        norm_eps=1e-6,
        qkv_bias=True,
    ),
    # Devlin et al. 2019, section 3; the tiny one: Turc et al. 2019, table 1
    "bert-base": EncoderConfig(vocab_size=30522),
    "bert-large": EncoderConfig(
        vocab_size=30522, d_model=1024, num_layers=24, num_heads=16, d_ff=4096
    ),
    "bert-tiny": EncoderConfig(vocab_size=30522, d_model=128, num_layers=2, num_heads=2, d_ff=512),
    # Dosovitskiy et al. 2021, table 1; the tiny one: Touvron et al. 2021, table 1
    "vit-base-16": VisionConfig(**_VIT),
    "vit-large-16": VisionConfig(**_VIT, d_model=1024, num_layers=24, num_heads=16, d_ff=4096),
    "vit-tiny-16": VisionConfig(**_VIT, d_model=192, num_heads=3, d_ff=768, dropout=0.0),
}


def preset(name: str, /, **fields: Any) -> Any:
    """The configuration of a well-known model, with other values of some fields.

    ::

        model = models.Decoder(models.preset("gpt2"))
        model = models.SequenceClassifier(models.preset("bert-tiny", num_labels=5))

    The weights are new; those of Hugging Face's folders come by `from_huggingface`.

    Args:
        name: one of ``PRESETS``: transformer-base and -big, t5-small and -base (`Transformer`);
            gpt2, -medium, -large and -xl, llama-3-8b, llama-3.2-1b, mistral-7b, qwen2-0.5b
            (`Decoder`); bert-base, -large and -tiny (`Encoder` and its heads); vit-base-16,
            vit-large-16 and vit-tiny-16 (`VisionTransformer`).
        fields: of the configuration.

    Raises:
        ValueError, TypeError: an unknown name or field, or a value out of range.
    """
    if name not in PRESETS:
        raise ValueError(f"name: expected one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name].changed(**fields)
