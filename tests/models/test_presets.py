"""Presets have the sizes that their papers and Hugging Face's configurations say."""

import pytest
import torch

from fastattn import models

CLASSES = {
    models.TransformerConfig: models.Transformer,
    models.DecoderConfig: models.Decoder,
    models.EncoderConfig: models.Encoder,
    models.VisionConfig: models.VisionTransformer,
}
PARAMETERS = {  # BERT's without its pooler
    "transformer-base": 63_082_496,
    "transformer-big": 214_245_376,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama-3-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "qwen2-0.5b": 494_032_768,
    "bert-base": 108_891_648,
    "bert-large": 334_092_288,
    "bert-tiny": 4_369_408,
    "vit-base-16": 86_567_656,
    "vit-large-16": 304_326_632,
    "vit-tiny-16": 5_717_416,
}


@pytest.mark.parametrize("name", models.PRESETS)
def test_parameters(name):
    config = models.preset(name)
    with torch.device("meta"):
        assert CLASSES[type(config)](config).num_parameters == PARAMETERS[name]


@pytest.mark.parametrize(
    "name, fields",
    [
        ("transformer-big", dict(dropout=0.3, attention_dropout=0.0, activation="relu")),
        ("t5-small", dict(dropout=0.1, norm_eps=1e-6, max_positions=1 << 20)),
        ("gpt2", dict(max_positions=1024, norm_eps=1e-5, activation="gelu_tanh")),
        ("llama-3-8b", dict(norm_eps=1e-5, rope_theta=5e5, dropout=0.0)),
        ("mistral-7b", dict(norm_eps=1e-5, rope_theta=1e4, window=4096)),
        ("qwen2-0.5b", dict(qkv_bias=True, norm_eps=1e-6, tie_embeddings=True)),
        ("bert-base", dict(norm_eps=1e-12, max_positions=512, types=2, activation="gelu")),
        ("vit-base-16", dict(dropout=0.1, attention_dropout=0.0, norm_eps=1e-6)),
        ("vit-tiny-16", dict(dropout=0.0, attention_dropout=0.0, norm_eps=1e-6)),
    ],
)
def test_options(name, fields):
    config = models.preset(name)
    assert {key: getattr(config, key) for key in fields} == fields


def test_a_config_of_another_model_is_refused():
    for name, model in (("gpt2", models.Encoder), ("bert-tiny", models.Transformer)):
        with pytest.raises(TypeError, match="config: expected .*Config, got .*Config"):
            model(models.preset(name))


def test_scores_begin_alike_with_any_scale():
    for scale in (None, 1.0):
        model = models.Transformer(models.preset("t5-small", num_layers=1, softmax_scale=scale))
        for stack in (model.encoder, model.decoder):
            q, k, _ = stack.layers[0].self_attn._project(torch.randn(1, 64, 512))
            scores = q @ k.mT * (scale or 64**-0.5)
            assert 0.4 < scores.std() < 0.6


def test_hugging_face_has_as_many():
    transformers = pytest.importorskip("transformers")
    sizes = {
        "t5-small": (transformers.T5ForConditionalGeneration, transformers.T5Config()),
        "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config()),
        "vit-base-16": (
            transformers.ViTForImageClassification,
            transformers.ViTConfig(num_labels=1000),
        ),
    }
    for name, (model, config) in sizes.items():
        with torch.device("meta"):
            assert model(config).num_parameters() == PARAMETERS[name], name


def test_fields_are_changed():
    config = models.preset("llama-3.2-1b", num_layers=2)
    assert config == models.preset("llama-3.2-1b").changed(num_layers=2)
    assert config.num_layers == 2
    assert config.rope_scaling == models.RopeScaling(32.0, 1.0, 4.0, 8192)


def test_a_model_of_a_preset_computes():
    sizes = dict(preset="bert-tiny", vocab_size=50, num_labels=3)
    model = models.build("SequenceClassifier", **sizes)
    assert model(torch.randint(1, 50, (2, 5))).shape == (2, 3)
    assert model.config == models.preset("bert-tiny", vocab_size=50, num_labels=3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models.preset("gpt3"), "name: expected one of transformer-base, .* got 'gpt3'"),
        (lambda: models.preset("gpt2", width=3), "width: not of DecoderConfig"),
        (lambda: models.preset("gpt2", d_model=0), "d_model: expected at least 1, got 0"),
        (
            lambda: models.build("Decoder", preset="bert-base"),
            "preset: expected one of gpt2, .* for Decoder, got 'bert-base'",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        call()
