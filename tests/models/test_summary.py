"""The table of a model's layers."""

import pytest
import torch
from torch import nn

import fastattn
from fastattn import models

LLAMA = dict(
    vocab_size=20, d_model=16, num_layers=3, num_heads=4, num_heads_kv=2, d_ff=24,
    positions="rotary", norm="rms", activation="silu", gated=True, bias=False,
)  # fmt: skip


def test_a_row_for_equal_layers():
    model = models.build("Decoder", **LLAMA, tie_embeddings=False)
    table = models.summary(model)
    rows = {row.layer: row for row in table.rows}
    layer = rows["decoder.layers.0-2"]
    assert layer.note == "x 3"
    assert layer.parameters == sum(p.numel() for p in model.decoder.layers.parameters())
    attention = rows["decoder.layers.0-2.self_attn"]
    assert attention.parameters == 3 * (16 * 32 + 16 * 16)
    assert attention.note == "x 3, heads 4, heads_kv 2, head_dim 4"
    assert table.parameters == table.trained == model.num_parameters == rows["(the model)"][3]
    assert table.bytes == 4 * table.parameters
    assert sum(row.parameters for row in table.rows if row.depth == 1) == table.parameters
    # A layer that differs stands apart.
    model.decoder.layers[1].self_attn.out_proj.requires_grad_(False)
    model.decoder.layers[2].bfloat16()
    table = models.summary(model)
    rows = {row.layer: row for row in table.rows}
    assert {f"decoder.layers.{i}" for i in range(3)} < rows.keys()
    assert table.parameters - table.trained == 16 * 16
    assert table.bytes < 4 * table.parameters
    assert "frozen" not in "".join(row.note for row in table.rows)
    model.decoder.layers[0].requires_grad_(False)
    assert models.summary(model, depth=2).rows[4].note == "frozen"


def test_what_is_shared_counts_once():
    table = models.summary(models.build("Decoder", **LLAMA))
    output = table.rows[-1]
    assert output[:4] == ("output", "Linear", 1, 0)
    assert output.note == "shares that of embedding.tokens"


def test_a_module_in_two_places_is_the_first_ones():
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(3, 3)), "b": nn.Sequential()})
    model["b"].append(model["a"][0])
    _, a, a_linear, b, b_linear = models.summary(nn.Sequential(model)).rows
    assert (a.parameters, a_linear.parameters, b.parameters, b_linear.parameters) == (12, 12, 0, 0)
    assert b.note == "shares that of 0.a.0"


def test_layers_with_other_heads_stand_apart():
    made = [fastattn.nn.MultiheadAttention(8, heads) for heads in (2, 2, 4)]
    rows = models.summary(nn.Sequential(*made), depth=1).rows
    assert [(row.layer, row.note) for row in rows[1:]] == [
        ("0-1", "x 2, heads 2, head_dim 4"),
        ("2", "heads 4, head_dim 2"),
    ]


def test_depth():
    model = nn.Transformer(16, 2, 2, 2, 24, batch_first=True)
    depths = [{row.depth for row in models.summary(model, depth=n).rows} for n in (0, 1, 2, 9)]
    assert depths == [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3, 4}]


def test_the_table():
    with torch.device("meta"):
        text = str(models.summary(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 5))))
    assert text.splitlines() == [
        "layer        class       parameters   share  bytes",
        "(the model)  Sequential          29  100.0%  116 B",
        "  0          Linear               9   31.0%   36 B",
        "  2          Linear              20   69.0%   80 B",
        "29 of 29 parameters are trained",
    ]
    assert "0 of 0 parameters" in str(models.summary(nn.ReLU()))


def test_bad_arguments():
    with pytest.raises(TypeError, match="model: expected torch.nn.Module, got int"):
        models.summary(3)
    with pytest.raises(ValueError, match="depth: expected at least 0, got -1"):
        models.summary(nn.ReLU(), depth=-1)
