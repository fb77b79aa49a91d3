"""Saved models: what is loaded is what was saved, and nothing else is."""

import json
import os

import pytest
import torch

from fastattn import models

SIZES = dict(d_model=16, num_layers=2, num_heads=2, d_ff=24)
MODELS = {
    "Decoder": dict(vocab_size=20),
    "Decoder rotary": dict(
        vocab_size=20,
        positions="rotary",
        norm="rms",
        gated=True,
        num_heads_kv=1,
        tie_embeddings=False,
        rope_scaling=dict(
            factor=2.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8
        ),
    ),
    "Encoder": dict(vocab_size=20),
    "MaskedLanguageModel": dict(vocab_size=20),
    "SequenceClassifier": dict(vocab_size=20, num_labels=3),
    "SpanClassifier": dict(vocab_size=20),
    "TokenClassifier": dict(vocab_size=20, num_labels=3),
    "Transformer": dict(input_vocab_size=20, target_vocab_size=20, tie_embeddings="all"),
    "Transformer relative": dict(
        input_vocab_size=20, target_vocab_size=20, positions="relative", head_dim=6
    ),
    "VisionTransformer": dict(num_labels=3, image_size=8, patch_size=4, channels=1),
}


def make(which="Decoder"):
    torch.manual_seed(0)
    return models.build(which.split()[0], **SIZES, **MODELS[which]).eval()


def run(model):
    if isinstance(model, models.VisionTransformer):
        return model(torch.arange(64.0).view(1, 1, 8, 8) / 64)
    tokens = torch.arange(1, 11).view(2, 5)
    out = model(tokens, tokens) if isinstance(model, models.Transformer) else model(tokens)
    return torch.stack(out) if isinstance(out, tuple) else out


@pytest.mark.parametrize("which", MODELS)
def test_what_is_loaded_is_what_was_saved(tmp_path, which):
    model = make(which)
    models.save(model, tmp_path)
    loaded = models.load(tmp_path)
    assert type(loaded) is type(model) and loaded.config == model.config
    assert torch.equal(run(loaded), run(model))
    assert loaded.num_parameters == model.num_parameters
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_dtypes(tmp_path):
    models.save(make().bfloat16(), tmp_path)
    assert models.load(tmp_path).output.weight.dtype == torch.bfloat16
    assert models.load(tmp_path, dtype=torch.float32).output.weight.dtype == torch.float32


def test_an_interrupted_save_leaves_the_old_files(tmp_path, monkeypatch):
    models.save(make(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = make()
    torch.nn.init.zeros_(other.output.weight)

    def killed(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        models.save(other, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_only_own_models_are_saved(tmp_path):
    with pytest.raises(TypeError, match="model: expected one of Decoder, .* got Linear"):
        models.save(torch.nn.Linear(2, 2), tmp_path)


def change(folder, **changes):
    path = folder / "config.json"
    facts = json.loads(path.read_text())
    facts["config"] |= changes
    path.write_text(json.dumps(facts))


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"d_ff": 25}, ValueError, r"linear1\.weight: expected shape \(25, 16\), got \(24, 16\)"),
        ({"num_layers": 3}, ValueError, r"decoder\.layers\.2\.self_attn\.in_proj\.weight.*missing"),
        ({"num_layers": 1}, ValueError, r"decoder\.layers\.1\..* is not of this model"),
        ({"width": 5}, TypeError, "width: not of DecoderConfig"),
        ({"d_model": "x"}, TypeError, "d_model: expected int, got str"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, changes, error, message):
    models.save(make(), tmp_path)
    change(tmp_path, **changes)
    with pytest.raises(error, match=message):
        models.load(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_half_a_file_is_refused(tmp_path, name):
    models.save(make(), tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=name):
        models.load(tmp_path)


def test_absent_files_and_other_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        models.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="see fastattn.models.from_huggingface"):
        models.load(tmp_path)
