"""A configuration's fields are of the kind that they say, and finite."""

import pytest

from fastattn import models

DECODER = dict(vocab_size=20)
ROPE = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"gated": "false"}, TypeError, "gated: expected bool, got str"),
        ({"bias": 0}, TypeError, "bias: expected bool, got int"),
        ({"qkv_bias": 1}, TypeError, "qkv_bias: expected bool or None, got int"),
        ({"d_model": 16.0}, TypeError, "d_model: expected int, got float"),
        ({"num_heads": True}, TypeError, "num_heads: expected int, got bool"),
        ({"dropout": "0.1"}, TypeError, "dropout: expected float, got str"),
        ({"dropout": True}, TypeError, "dropout: expected float, got bool"),
        ({"softcap": "30"}, TypeError, "softcap: expected float or None, got str"),
        ({"softcap": float("inf")}, ValueError, "softcap: expected a finite number, got inf"),
        ({"rope_theta": float("nan")}, ValueError, "rope_theta: expected a finite number, got nan"),
        ({"norm": 5}, TypeError, "norm: expected str, got int"),
        ({"rope_scaling": 8.0}, TypeError, "rope_scaling: expected RopeScaling or None, got float"),
        ({"rope_scaling": ROPE | {"factor": "8"}}, TypeError, "factor: expected float, got str"),
        ({"rope_scaling": ROPE | {"factor": 0}}, ValueError, "factor: expected a positive number"),
        (
            {"rope_scaling": ROPE | {"high_freq_factor": 1.0}},
            ValueError,
            "high_freq_factor: expected more than low_freq_factor=1.0, got 1.0",
        ),
        (
            {"rope_scaling": ROPE | {"original_max_positions": 0}},
            ValueError,
            "original_max_positions: expected at least 1, got 0",
        ),
        (
            {"rope_scaling": ROPE},
            ValueError,
            "rope_scaling: expected None with positions='learned'",
        ),
        (
            {"positions": "rotary", "d_model": 30, "num_heads": 2},
            ValueError,
            "head_dim: expected an even number with rotary positions, got 15",
        ),
        ({"rope_scaling": {"kind": "yarn"}}, TypeError, "kind: not of RopeScaling"),
    ],
)
def test_a_wrong_kind_is_named(fields, error, message):
    with pytest.raises(error, match=f"^{message}"):
        models.DecoderConfig(**DECODER | fields)


def test_a_whole_number_is_a_float():
    rotary = dict(positions="rotary", rope_scaling=ROPE)
    config = models.DecoderConfig(**DECODER, dropout=0, softcap=30, **rotary)
    assert config.changed() == config
    assert config.rope_scaling == models.RopeScaling(**ROPE)
