"""fastattn.softmax beside torch.softmax; `python bench/test_softmax.py` prints them interleaved."""

import pytest
import torch
import torch.nn.functional as F
from interleave import medians

import fastattn
from fastattn.backends.cpu import native

SHAPES = [(64, 128), (4096, 128), (1024, 512), (4096, 512), (4096, 4096), (512, 32000)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LIBRARIES = {"torch": torch.softmax, "fastattn": lambda x, dim: fastattn.softmax(x)}

# Scores of attention, and what is done with them: torch's composition and fastattn's call.
SCORES = (8, 8, 512, 512)
VISIBLE = (torch.arange(512) < torch.linspace(64, 512, 8).int()[:, None])[:, None, None]
PADDING = ~VISIBLE
FUTURE = torch.ones(512, 512, dtype=torch.bool).triu(1)
VARIANTS = {
    "log": {
        "torch": lambda x: torch.log_softmax(x, -1),
        "fastattn": lambda x: fastattn.softmax(x, log=True),
    },
    "masked, scaled": {
        "torch": lambda x: torch.softmax((x * 0.125).masked_fill(PADDING, -torch.inf), -1),
        "fastattn": lambda x: fastattn.softmax(x, scale=0.125, mask=VISIBLE),
    },
    "causal": {
        "torch": lambda x: torch.softmax(x.masked_fill(FUTURE, -torch.inf), -1),
        "fastattn": lambda x: fastattn.softmax(x, causal=True),
    },
    "dropout": {
        "torch": lambda x: F.dropout(torch.softmax(x, -1), 0.1),
        "fastattn": lambda x: fastattn.softmax(x, dropout_p=0.1),
    },
}


def plain(library):
    return lambda x: LIBRARIES[library](x, -1)


def forward(function, x):
    return lambda: function(x)


def backward(function, x):
    x = x.detach().requires_grad_()
    y = function(x)
    dy = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, x, dy, retain_graph=True)


def into(library, x):
    """A call that fills a result allocated before; fastattn's is that of the kernel itself."""
    out = torch.empty_like(x)
    if library == "copy":
        return lambda: out.copy_(x)
    if library == "torch":
        return lambda: torch.softmax(x, -1, out=out)
    dtype, no_mask, no_bias = native.DTYPES[x.dtype], (0, ()), (native.DTYPES[x.dtype], 0, ())
    scale, causal, log, dropout_p, seed = 1.0, False, False, 0.0, 0
    return lambda: native._C.softmax_fwd(
        dtype, x.shape, x.data_ptr(), x.stride(), *no_mask, *no_bias, scale, causal, log,
        dropout_p, seed, out.data_ptr(), 0,
    )  # fmt: skip


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("direction", [forward, backward], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_softmax(benchmark, shape, dtype, direction, library):
    benchmark.group = f"softmax {direction.__name__} {shape} {dtype}"
    benchmark(direction(plain(library), torch.randn(shape).to(dtype)))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_softmax_into(benchmark, shape, dtype, library):
    benchmark.group = f"softmax into {shape} {dtype}"
    benchmark(into(library, torch.randn(shape).to(dtype)))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("direction", [forward, backward], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_softmax_variants(benchmark, variant, dtype, direction, library):
    benchmark.group = f"softmax {variant} {direction.__name__} {dtype}"
    benchmark(direction(VARIANTS[variant][library], torch.randn(SCORES).to(dtype)))


def main():
    print(f"{'case':44} {'torch us':>9} {'ours us':>9} {'ratio':>6} {'GB/s':>6} {'of copy':>7}")
    for dtype in DTYPES:
        for shape in SHAPES:
            x = torch.randn(shape).to(dtype)
            for direction, tensors in ((forward, 2), (backward, 3)):
                rivals = {name: direction(plain(name), x) for name in LIBRARIES}
                seconds = medians(rivals | {"copy": x.clone})
                ours = seconds["fastattn"]
                rate = tensors * x.numel() * x.element_size() / ours
                copy = 2 * x.numel() * x.element_size() / seconds["copy"]
                case = f"{direction.__name__} {shape} {dtype}"
                print(
                    f"{case:44} {seconds['torch'] * 1e6:9.1f} {ours * 1e6:9.1f} "
                    f"{seconds['torch'] / ours:6.2f} {rate / 1e9:6.1f} {rate / copy:7.0%}"
                )


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
