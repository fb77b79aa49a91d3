"""Layers and stacks of torch, stock and accelerated, side by side: inference and training steps."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastattn

BATCH, SEQLEN, D_MODEL, HEADS, D_FF = 8, 128, 512, 8, 2048


def encoder():
    layer = nn.TransformerEncoderLayer(D_MODEL, HEADS, D_FF, batch_first=True)
    return nn.TransformerEncoder(layer, 6)


def transformer():
    return nn.Transformer(D_MODEL, HEADS, 2, 2, D_FF, batch_first=True)


def tokens(dtype):
    return torch.randn(BATCH, SEQLEN, D_MODEL, dtype=dtype)


def padding():
    """Half of the tokens are padding."""
    return torch.arange(SEQLEN) >= torch.linspace(1, SEQLEN, BATCH).int()[:, None]


def attention_arguments(dtype):
    x = tokens(dtype)
    return (x, x, x), {"need_weights": False}


def encoder_arguments(dtype):
    return (tokens(dtype),), {}


def padded_arguments(dtype):
    return (tokens(dtype),), {"src_key_padding_mask": padding()}


def transformer_arguments(dtype):
    mask = nn.Transformer.generate_square_subsequent_mask(SEQLEN, dtype=dtype)
    return (tokens(dtype), tokens(dtype)), {"tgt_mask": mask, "tgt_is_causal": True}


CASES = {
    "attention": (
        lambda: nn.MultiheadAttention(D_MODEL, HEADS, batch_first=True),
        attention_arguments,
    ),
    "encoder": (encoder, encoder_arguments),
    "encoder padded": (encoder, padded_arguments),
    "transformer": (transformer, transformer_arguments),
}


def build(case, library, dtype):
    torch.manual_seed(0)
    make, arguments = CASES[case]
    model = make().to(dtype)
    if library == "fastattn":
        fastattn.accelerate(model)
    return model, *arguments(dtype)


def inference(case, library, dtype):
    """A call in eval and inference mode, where stock torch takes its fast path."""
    model, args, kwargs = build(case, library, dtype)
    model.eval()

    def call():
        with torch.inference_mode():
            return model(*args, **kwargs)

    return call


def training_step(case, library, dtype):
    """A call that does the forward, the loss, the backward and the optimizer's step."""
    model, args, kwargs = build(case, library, dtype)
    goal = torch.randn_like(args[0])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)

    def step():
        out = model(*args, **kwargs)
        loss = F.mse_loss(out[0] if isinstance(out, tuple) else out, goal)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("library", ["torch", "fastattn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_inference(benchmark, case, dtype, library):
    benchmark.group = f"inference {case} {dtype}"
    benchmark(inference(case, library, dtype))


@pytest.mark.parametrize("library", ["torch", "fastattn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_training(benchmark, case, dtype, library):
    benchmark.group = f"training {case} {dtype}"
    benchmark(training_step(case, library, dtype))


@pytest.mark.parametrize("library", ["torch", "fastattn"])
def test_overhead(benchmark, library):
    benchmark.group = "overhead of one layer, one token"
    layer = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True).eval()
    if library == "fastattn":
        fastattn.accelerate(layer)
    with torch.inference_mode():
        benchmark(layer, torch.randn(1, 1, 16))
