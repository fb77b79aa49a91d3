"""A small model, and stock torch's with the same weights around the same embeddings."""

import warnings

import pytest
import torch
from torch import nn

import fastattn
from fastattn.models import Transformer, load_torch

SMALL = {
    "input_vocab_size": 23,
    "target_vocab_size": 19,
    "d_model": 32,
    "num_layers": 2,
    "num_heads": 4,
    "d_ff": 48,
    "dropout": 0.0,
    "max_positions": 24,
}


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Of every test here."""


@pytest.fixture
def preferred(backend):
    """One backend and instruction set at a time; what its kernels refuse runs on the reference."""
    with fastattn.use_backend("reference" if backend == "reference" else None):
        yield


@pytest.fixture
def small():
    """Makes a small model of the given options, in evaluation."""
    return lambda **options: Transformer(**{**SMALL, **options}).eval()


@pytest.fixture
def tokens():
    """Makes (batch, seqlen) tokens from 3 on: 0 pads, 1 begins, 2 ends."""
    return lambda batch, seqlen, limit=19: torch.randint(3, limit, (batch, seqlen))


class Stock:
    """`torch.nn.Transformer` with the layers' weights of a model, and the model's embeddings."""

    def __init__(self, model: Transformer) -> None:
        config = model.config
        self.model = model
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "enable_nested_tensor is True")
            self.layers = nn.Transformer(
                config.d_model, config.num_heads, config.num_layers, config.num_layers,
                config.d_ff, config.dropout, config.activation, norm_first=config.norm_first,
                bias=config.bias, batch_first=True,
            )  # fmt: skip
        if not config.norm_first:
            self.layers.encoder.norm = self.layers.decoder.norm = None
        for parameter in self.layers.parameters():
            # Zero biases and unit norms would hide a weight that is not used.
            nn.init.normal_(parameter, std=0.3)
        self.layers.to(model.output.weight)
        self.layers.train(model.training)
        load_torch(model, self.layers)

    def __call__(self, src, tgt):
        """The logits that the model's own layers should give."""
        padding = src == 0
        out = self.layers(
            self.model.input_embedding(src),
            self.model.target_embedding(tgt),
            tgt_mask=torch.ones(tgt.shape[1], tgt.shape[1], dtype=torch.bool).triu(1),
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )
        return self.model.output(out)


@pytest.fixture
def stock():
    """Makes the stock twin of a model."""
    return Stock
