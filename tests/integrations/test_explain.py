"""What `fastattn.explain` tells of models, layer by layer."""

import pytest
import torch
from torch import nn

import fastattn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        self.net = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 8))
        self.norm = nn.LayerNorm(8)
        self.other = type("Other", (nn.LayerNorm,), {})(8)

    def forward(self, x):
        return self.other(self.norm(self.net(self.layer(x))))


CALL = nn.Module.__call__


def test_a_call_is_told_with_its_layer():
    model = Model()
    fastattn.accelerate(model)
    explanation = fastattn.explain(model, torch.randn(2, 5, 32))
    found = [(row.layer, row.choice.problem.op) for row in explanation.rows]
    assert ("layer.self_attn", "attention_fwd") in found
    assert ("layer", "ffn_fwd") in found and ("net", "ffn_fwd") in found
    assert ("norm", "layer_norm_fwd") in found
    assert len(explanation) == len(found) and nn.Module.__call__ is CALL
    lines = str(explanation).splitlines()
    assert lines[0].split()[:3] == ["layer", "class", "op"]
    assert any("layer.self_attn" in line and "attention_fwd" in line for line in lines)


def test_layers_are_asked_without_inputs():
    model = Model()
    notes = {row.layer: row.note for row in fastattn.explain(model).rows}
    swaps = "fastattn.accelerate(model) swaps it"
    assert notes["layer"] == notes["layer.self_attn"] == notes["net"] == notes["norm"] == swaps
    assert notes["other"] == "a subclass of torch.nn.LayerNorm"
    with fastattn.accelerate(model):
        explanation = fastattn.explain(model)
    found = {row.layer for row in explanation.rows if row.choice is not None}
    assert found == {"layer", "layer.self_attn", "net", "norm"}
    assert {row.layer for row in explanation.rows if row.choice is None} == {"other"}
    assert "torch: a subclass" in str(explanation)


@pytest.mark.parametrize(
    "layer",
    [
        fastattn.nn.MultiheadAttention(32, 4, kdim=16, vdim=8),
        fastattn.nn.TransformerDecoderLayer(32, 4, 48),
        fastattn.nn.FeedForward(16, 32),
        fastattn.nn.GatedFeedForward(16, 32),
        fastattn.nn.RMSNorm(16),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_every_kind_of_layer_can_be_asked(layer):
    explanation = fastattn.explain(layer)
    assert explanation and all(choice.backend for choice in explanation)
    assert "(the model)" in str(explanation)


def test_a_refused_call_is_told_too():
    layer = fastattn.nn.RMSNorm(16).double()
    with fastattn.use_backend("cpu"):
        (row,) = fastattn.explain(layer, torch.zeros(2, 16, dtype=torch.float64)).rows
    assert row.choice.backend is None and "no backend" in str(
        fastattn.dispatch.Explanation([row.choice])
    )
    assert nn.Module.__call__ is CALL


def test_an_error_leaves_torch_as_it_was():
    model = Model()
    with pytest.raises((RuntimeError, AssertionError)):
        fastattn.explain(model, torch.zeros(2, 5, 31))
    assert nn.Module.__call__ is CALL


def test_transformers_layers():
    transformers = pytest.importorskip("transformers")
    from fastattn.integrations.transformers import use

    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=48,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with use(model), fastattn.accelerate(model):
        layers = {row.layer: row.choice.problem.op for row in fastattn.explain(model).rows}
        assert layers["model.layers.0.mlp"] == "gated_ffn_fwd"
        assert layers["model.norm"] == "rms_norm_fwd"
        rows = fastattn.explain(model, torch.ones(1, 6, dtype=torch.long)).rows
    found = {(row.layer, row.choice.problem.op) for row in rows}
    assert ("model.layers.0.self_attn", "attention_fwd") in found
