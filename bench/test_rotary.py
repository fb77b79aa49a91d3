"""fastattn.rotary beside eager torch."""

import pytest
import torch

import fastattn

# (batch, heads, seqlen, head_dim)
SHAPES = [
    (1, 32, 1, 128),
    (8, 32, 1, 128),
    (1, 8, 128, 64),
    (1, 8, 2048, 64),
    (1, 32, 2048, 128),
    (2, 32, 4096, 128),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["bhsd", "bshd"]  # how x lies in memory


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def rotate_every_two(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def torch_halves(x, cos, sin):
    return x * cos + rotate_half(x) * sin


def torch_interleaved(x, cos, sin):
    return x * cos + rotate_every_two(x) * sin


def ours_halves(x, cos, sin):
    return fastattn.rotary(x, cos, sin)


def ours_interleaved(x, cos, sin):
    return fastattn.rotary(x, cos, sin, interleaved=True)


FORMS = {
    "halves": {"torch": torch_halves, "fastattn": ours_halves},
    "interleaved": {"torch": torch_interleaved, "fastattn": ours_interleaved},
}


def inputs(form, layout, shape, dtype):
    """x, and for each library its cos and sin: torch's have every column twice."""
    batch, heads, seqlen, head_dim = shape
    x = torch.randn(shape).to(dtype)
    if layout == "bshd":
        x = torch.randn(batch, seqlen, heads, head_dim).to(dtype).transpose(1, 2)
    angles = torch.arange(seqlen)[:, None] * 10000 ** -torch.linspace(0, 1, head_dim // 2)
    ours = angles.cos().to(dtype), angles.sin().to(dtype)
    twice = [
        t.repeat_interleave(2, -1) if form == "interleaved" else torch.cat((t, t), -1) for t in ours
    ]
    return x, {"torch": twice, "fastattn": ours}


def forward(function, x, cos, sin):
    return lambda: function(x, cos, sin)


def backward(function, x, cos, sin):
    x = x.detach().requires_grad_()
    out = function(x, cos, sin)
    dout = torch.randn_like(x)
    return lambda: torch.autograd.grad(out, x, dout, retain_graph=True)


@pytest.mark.parametrize("library", ["torch", "fastattn"])
@pytest.mark.parametrize("direction", [forward, backward], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_rotary(benchmark, form, layout, shape, dtype, direction, library):
    benchmark.group = f"{form} {layout} {direction.__name__} {shape} {dtype}"
    x, tables = inputs(form, layout, shape, dtype)
    benchmark(direction(FORMS[form][library], x, *tables[library]))
