"""fastattn's norms beside torch's; `python bench/test_norm.py` prints them interleaved."""

import pytest
import torch
import torch.nn.functional as F
from interleave import medians

import fastattn

SHAPES = [(64, 128), (8, 128, 512), (4096, 128), (4096, 512), (4096, 4096)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def torch_layer_norm(x, residual, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def torch_rms_norm(x, residual, weight, bias):
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def torch_add_layer_norm(x, residual, weight, bias):
    s = x + residual
    return F.layer_norm(s, s.shape[-1:], weight, bias), s


def torch_add_rms_norm(x, residual, weight, bias):
    s = x + residual
    return F.rms_norm(s, s.shape[-1:], weight, 1e-6), s


# op: (torch's, fastattn's, tensors of the size of x that the forward and the backward touch)
OPS = {
    "layer_norm": (
        torch_layer_norm,
        lambda x, residual, weight, bias: fastattn.layer_norm(x, weight, bias),
        (2, 3),
    ),
    "rms_norm": (
        torch_rms_norm,
        lambda x, residual, weight, bias: fastattn.rms_norm(x, weight),
        (2, 3),
    ),
    "add+layer_norm": (
        torch_add_layer_norm,
        lambda x, residual, weight, bias: fastattn.layer_norm(x, weight, bias, residual=residual),
        (4, 4),
    ),
    "add+rms_norm": (
        torch_add_rms_norm,
        lambda x, residual, weight, bias: fastattn.rms_norm(x, weight, residual=residual),
        (4, 4),
    ),
}


def inputs(shape, dtype):
    x, residual = torch.randn(2, *shape).to(dtype)
    weight, bias = torch.randn(2, shape[-1]).to(dtype)
    return x, residual, weight, bias


def forward(function, args):
    return lambda: function(*args)


def backward(function, args):
    args = [x.detach().requires_grad_() for x in args]
    out = function(*args)
    outs = out if isinstance(out, tuple) else (out,)
    douts = [torch.randn_like(x) for x in outs]
    return lambda: torch.autograd.grad(outs, args, douts, retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("library", ["torch", "fastattn"])
@pytest.mark.parametrize("direction", [forward, backward], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("op", OPS)
def test_norm(benchmark, op, shape, dtype, direction, library):
    benchmark.group = f"{op} {direction.__name__} {shape} {dtype}"
    benchmark(direction(OPS[op][library == "fastattn"], inputs(shape, dtype)))


def main():
    print(f"{'case':56} {'torch us':>9} {'ours us':>9} {'ratio':>6} {'GB/s':>6} {'of copy':>7}")
    for dtype in DTYPES:
        for op, (torchs, ours, tensors) in OPS.items():
            for shape in SHAPES:
                args = inputs(shape, dtype)
                x = args[0]
                for direction, touched in zip((forward, backward), tensors, strict=True):
                    rivals = {"torch": direction(torchs, args), "ours": direction(ours, args)}
                    seconds = medians(rivals | {"copy": x.clone})
                    size = x.numel() * x.element_size()
                    rate, copy = touched * size / seconds["ours"], 2 * size / seconds["copy"]
                    print(
                        f"{f'{op} {direction.__name__} {shape} {dtype}':56} "
                        f"{seconds['torch'] * 1e6:9.1f} {seconds['ours'] * 1e6:9.1f} "
                        f"{seconds['torch'] / seconds['ours']:6.2f} "
                        f"{rate / 1e9:6.1f} {rate / copy:7.0%}"
                    )


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
