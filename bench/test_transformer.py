"""fastattn.models.Transformer beside torch.nn.Transformer with the same weights.

Run with ``pytest bench/test_transformer.py``; rows of a group compare.
"""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastattn.models import Transformer, TransformerConfig, load_torch

VOCAB_SIZE = 1000
BOS, EOS = 1, 2
CONFIGS = {
    "small": TransformerConfig(
        input_vocab_size=VOCAB_SIZE, target_vocab_size=VOCAB_SIZE, d_model=256, num_layers=3,
        num_heads=4, d_ff=1024, dropout=0.0,
    ),
    "base": TransformerConfig(
        input_vocab_size=VOCAB_SIZE, target_vocab_size=VOCAB_SIZE, dropout=0.0
    ),
}  # fmt: skip
SIZES = {"small": (16, 128), "base": (2, 256)}  # batch, seqlen of source and target


class Stock(nn.Module):
    """Stock layers between the embeddings and the output projection of a model."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        c = model.config
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "enable_nested_tensor is True")
            self.layers = nn.Transformer(
                c.d_model, c.num_heads, c.num_layers, c.num_layers, c.d_ff, c.dropout,
                c.activation, batch_first=True, norm_first=c.norm_first,
            )  # fmt: skip
        if not c.norm_first:
            self.layers.encoder.norm = self.layers.decoder.norm = None
        self.input_embedding = model.input_embedding
        self.target_embedding = model.target_embedding
        self.output = model.output
        load_torch(model, self.layers)

    def encode(self, src):
        return self.layers.encoder(self.input_embedding(src), src_key_padding_mask=src == 0)

    def decode(self, tgt, memory, padding):
        x = self.layers.decoder(
            self.target_embedding(tgt),
            memory,
            tgt_mask=nn.Transformer.generate_square_subsequent_mask(tgt.shape[1]).isneginf(),
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )
        return self.output(x)

    def forward(self, src, tgt):
        return self.decode(tgt, self.encode(src), src == 0)

    def generate(self, src, *, bos_id, eos_id, max_new_tokens):
        """Greedy; stock layers have no cache, so that each step decodes the whole prefix."""
        memory, padding = self.encode(src), src == 0
        tgt = src.new_full((src.shape[0], 1), bos_id)
        for _ in range(max_new_tokens):
            logits = self.decode(tgt, memory, padding)[:, -1]
            tgt = torch.cat([tgt, logits.argmax(-1, keepdim=True)], 1)
        return tgt[:, 1:]


@pytest.fixture(params=CONFIGS)
def size(request):
    torch.manual_seed(0)
    batch, seqlen = SIZES[request.param]
    src = torch.randint(3, VOCAB_SIZE, (batch, seqlen))
    for row, length in zip(src, torch.linspace(seqlen // 2, seqlen, batch).int(), strict=True):
        row[length:] = 0
    return request.param, src, torch.randint(3, VOCAB_SIZE, (batch, seqlen))


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request):
    return request.param


@pytest.fixture(params=["torch", "fastattn"])
def model(request, size, dtype):
    ours = Transformer(CONFIGS[size[0]])
    return (ours if request.param == "fastattn" else Stock(ours)).to(dtype)


def _measure(benchmark, group, fn):
    benchmark.group = group
    benchmark.pedantic(fn, warmup_rounds=1, rounds=5)


def test_forward(benchmark, size, dtype, model):
    name, src, tgt = size
    model.eval()
    with torch.no_grad():
        _measure(benchmark, f"forward {name} {dtype}", lambda: model(src, tgt))


def test_training_step(benchmark, size, dtype, model):
    name, src, tgt = size
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step():
        logits = model(src, tgt)
        loss = F.cross_entropy(logits.flatten(0, 1), tgt.flatten(), ignore_index=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    _measure(benchmark, f"training step {name} {dtype}", step)


@torch.no_grad()
def test_greedy(benchmark, size, dtype, model):
    name, src, _ = size
    model.eval()
    _measure(
        benchmark,
        f"greedy, 32 tokens {name} {dtype}",
        lambda: model.generate(src, bos_id=BOS, eos_id=None, max_new_tokens=32),
    )
