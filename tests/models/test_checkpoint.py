"""Saved models: what is loaded is what was saved, and nothing else is."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

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


def test_files_of_two_saves_are_refused(tmp_path, monkeypatch):
    models.save(make(), tmp_path)
    other = models.build("Decoder", **{**SIZES, "num_heads": 4}, vocab_size=20)
    replace = os.replace

    def killed(part, path):
        if path.name == "config.json":
            raise KeyboardInterrupt
        replace(part, path)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        models.save(other, tmp_path)
    with pytest.raises(ValueError, match="are of different saves"):
        models.load(tmp_path)


def test_a_killed_process_leaves_the_old_files(tmp_path):
    models.save(make(), tmp_path)
    program = f"""
import os, signal, torch
from fastattn import models
os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
model = models.load({str(tmp_path)!r})
torch.nn.init.zeros_(model.output.weight)
models.save(model, {str(tmp_path)!r})
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    assert torch.equal(run(models.load(tmp_path)), run(make()))


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    untied = make()
    untied.output.weight = torch.nn.Parameter(untied.output.weight.detach().clone())
    tied = make("Decoder rotary")
    tied.output.weight = tied.embedding.tokens.weight
    extended = make()
    extended.embedding.extra = torch.nn.Parameter(torch.zeros(2))
    for model, message in (
        (untied, r"output\.weight \(20, 16\) is not of this model"),
        (tied, r"output\.weight \(20, 16\) is missing"),
        (extended, r"embedding\.extra \(2,\) is not of this model"),
    ):
        with pytest.raises(ValueError, match=message):
            models.save(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("tie", ["none", "inputs", "target", "all"])
def test_what_is_tied_is_written_once(tmp_path, tie):
    model = models.build(
        "Transformer", **SIZES, input_vocab_size=20, target_vocab_size=20, tie_embeddings=tie
    ).eval()
    models.save(model, tmp_path)
    numbers = sum(weight.numel() for weight in load_file(tmp_path / "model.safetensors").values())
    loaded = models.load(tmp_path)
    assert numbers == model.num_parameters == loaded.num_parameters
    assert torch.equal(run(loaded), run(model))


def test_views_of_one_memory_are_saved(tmp_path):
    model = make()
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    parts = flat.split([parameter.numel() for parameter in model.parameters()])
    for parameter, part in zip(model.parameters(), parts, strict=True):
        parameter.data = part.view_as(parameter)
    models.save(model, tmp_path)
    assert torch.equal(run(models.load(tmp_path)), run(make()))


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    models.save(make(), tmp_path)
    config, weights = (tmp_path / name for name in ("config.json", "model.safetensors"))
    assert weights.stat().st_mode == config.stat().st_mode


def test_several_dtypes_are_loaded_as_one_that_is_asked_for(tmp_path):
    model = make()
    model.decoder.norm.bfloat16()
    models.save(model, tmp_path)
    with pytest.raises(ValueError, match="expected one dtype, or dtype=, got .*bfloat16 and .*32"):
        models.load(tmp_path)
    assert torch.equal(run(models.load(tmp_path, dtype=torch.float32)), run(make()))


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn])
def test_other_dtypes_are_refused(tmp_path, dtype):
    models.save(make(), tmp_path)
    with pytest.raises(ValueError, match="dtype: expected one of torch.float32, .*, got"):
        models.load(tmp_path, dtype=dtype)


@pytest.mark.parametrize(
    "facts, error",
    [
        ({"fastattn": 2}, ValueError),
        ({"config": ...}, ValueError),
        ({"save": ...}, ValueError),
        ({"model": ["Decoder"]}, TypeError),
        ({"model": "Linear"}, ValueError),
        ({"config": 5}, TypeError),
        ({"config": {}}, TypeError),
        ({"config": {"name": "Encoder"}}, TypeError),
    ],
)
def test_other_facts_are_refused(tmp_path, facts, error):
    models.save(make(), tmp_path)
    path = tmp_path / "config.json"
    facts = {**json.loads(path.read_text()), **facts}
    path.write_text(json.dumps({name: x for name, x in facts.items() if x is not ...}))
    with pytest.raises(error):
        models.load(tmp_path)


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
